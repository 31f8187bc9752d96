"""Continue a prompt with any model that can be loaded, as it is drawn.

python -m recipes.sample runs/pretrain_small-20261122-120000 --prompt 'def main('
python -m recipes.sample my_export/ --prompt 'import ' --temperature 0 --max-new-tokens 100
python -m recipes.sample my_export/ --prompt 'def f(' --samples 4 --min-p 0.1 --stop 'class ' '@'
"""

import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax.random as jr
import numpy as np
import tyro
from pydantic import Field

from data.tokenizer import StreamDecoder, Tokenizer
from lm.generate import Sampler, generate, stream
from recipes.command_line import RecipeConfig, fail
from recipes.loading import kept_as, load
from recipes.stop_strings import StopStrings
from train.backends import choose_weights
from train.checkpoint import CheckpointError
from train.logs import plain_messages
from train.runtime import DeviceError, choose_device, compilation_cache, device_facts


class Config(RecipeConfig):
    """What to continue, and how."""

    model: Annotated[Path, tyro.conf.Positional] = Field(description="run, Hugging Face folder, GGUF file, or owner/name on the Hub")
    prompt: str = Field("", description="text to continue; empty: from the beginning of a document")
    max_new_tokens: int = Field(200, ge=1, description="tokens to draw at most; cut to what the context holds")
    temperature: float = Field(0.7, ge=0, description="0: always the likeliest token")
    top_k: int | None = Field(None, ge=1, description="draw among the k likeliest tokens only")
    top_p: float | None = Field(0.95, gt=0, le=1, description="draw among the likeliest tokens that hold this probability together")
    min_p: float | None = Field(None, ge=0, le=1, description="draw among tokens at least this fraction as likely as the likeliest")
    repetition_penalty: float = Field(1.0, gt=0, description="above 1: tokens of the prompt and the continuation become less likely")
    logit_bias: dict[int, float] = Field({}, description="token ids and what is added to their logits, as in 13 -5.0 42 2.5")
    stop: tuple[str, ...] = Field((), description="strings at which a continuation ends, beside the end of a document; not shown")
    samples: int = Field(1, ge=1, description="continuations; one is shown as it is drawn, several are drawn together and then shown")
    seed: int = Field(0, ge=0, description="of the draws")
    device: Literal["auto", "cpu", "gpu", "tpu"] = Field("auto", description="where to compute")
    weights: Literal["auto", "float32", "bfloat16", "int8", "int4", "nf4"] = Field(
        "auto", description="how the matrices are kept; auto: as packed, or bfloat16 where the device has instructions for it, else float32"
    )


def main(config: Config) -> None:
    """Print the prompt and what follows."""
    plain_messages()
    device = choose_device(config.device)
    compilation_cache()
    model, tokenizer, origin = load(config.model)
    model, weights = kept_as(model, config.weights, choose_weights(device_facts(device)))
    print(f"[{origin}: {model.n_params:,} parameters, as {weights}]", file=sys.stderr)
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    prompt = np.concatenate([np.asarray(start, np.int32), tokenizer.encode(config.prompt)])
    room = model.config.context - len(prompt)
    if len(prompt) == 0 or room < 1:
        raise ValueError(f"the prompt has {len(prompt)} tokens; this model takes 1 to {model.config.context - 1}")
    bias = tuple(config.logit_bias.items())
    sampler = Sampler(config.temperature, config.top_k, config.top_p, config.min_p, config.repetition_penalty, bias)
    most = min(config.max_new_tokens, room)
    settings: dict[str, Any] = {"max_new_tokens": most, "sampler": sampler, "key": jr.key(config.seed)}
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
