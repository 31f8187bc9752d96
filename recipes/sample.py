"""Continue a prompt with any model that can be loaded, as it is drawn.

python -m recipes.sample runs/pretrain_small-20261122-120000 --prompt 'def main('
python -m recipes.sample my_export/ --prompt 'import ' --temperature 0 --max-new-tokens 100
python -m recipes.sample my_export/ --prompt 'def f(' --samples 4 --min-p 0.1 --stop 'class ' '@'
"""

import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax.random as jr
import tyro
from pydantic import Field

from data.tokenizer import StreamDecoder, Tokenizer
from lm.generate import generate, stream
from recipes.command_line import fail
from recipes.generating import DrawConfig, ready
from recipes.stop_strings import StopStrings
from train.checkpoint import CheckpointError
from train.logs import plain_messages
from train.runtime import DeviceError


class Config(DrawConfig):
    """What to continue, and how."""

    model: Annotated[Path, tyro.conf.Positional] = Field(description="run, Hugging Face folder, GGUF file, or owner/name on the Hub")
    prompt: str = Field("", description="text to continue; empty: from the beginning of a document")
    max_new_tokens: int = Field(200, ge=1, description="tokens to draw at most; cut to what the context holds")
    samples: int = Field(1, ge=1, description="continuations; one is shown as it is drawn, several are drawn together and then shown")


def main(config: Config) -> None:
    """Print the prompt and what follows."""
    plain_messages()
    model, tokenizer, words = ready(config.model, config)
    print(f"[{words}]", file=sys.stderr)
    prompt = tokenizer.encode_prompt(config.prompt)
    room = model.config.context - len(prompt)
    if room < 1:
        raise ValueError(f"the prompt has {len(prompt)} tokens; this model takes 1 to {model.config.context - 1}")
    most = min(config.max_new_tokens, room)
    settings: dict[str, Any] = {"max_new_tokens": most, "sampler": config.sampler(), "key": jr.key(config.seed)}
    settings["stop_ids"] = [] if tokenizer.eos_id is None else [tokenizer.eos_id]

    begin = time.perf_counter()
    several: list[Any] = [] if config.samples == 1 else generate(model, [prompt], n=config.samples, **settings)
    counts = []
    for tokens in several or [stream(model, prompt, **settings)]:
        print(config.prompt, end="", flush=True)
        count, met = show(tokens, tokenizer, config.stop)
        counts.append(count)
        ends = "end of document" if count < most else "context is full" if most == room else "max-new-tokens"
        print(f"[stopped by: {ends if met is None else f'stop string {met!r}'}]", file=sys.stderr)
    seconds = time.perf_counter() - begin
    print(f"[{sum(counts)} tokens, {sum(counts) / seconds:.0f} tokens/s with compilation]", file=sys.stderr)


def show(tokens: Iterable[int], tokenizer: Tokenizer, stops: Sequence[str]) -> tuple[int, str | None]:
    """Print a continuation as it comes: how many tokens it had, and the stop string it ended at."""
    decoder, stopped, count = StreamDecoder(tokenizer), StopStrings(stops), 0
    for token in tokens:
        print(stopped.push(decoder.push(token)), end="", flush=True)
        count += 1
        if stopped.met is not None:
            break
    print(stopped.push(decoder.flush()) + stopped.flush())
    return count, stopped.met


if __name__ == "__main__":
    chosen = tyro.cli(Config, description=__doc__, prog="python -m recipes.sample")
    try:
        main(chosen)
    except (ValueError, OSError, CheckpointError, DeviceError) as error:
        fail(str(error))
