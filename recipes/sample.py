"""Continue a prompt with any model this project trained or exported, as it is drawn.

python -m recipes.sample runs/pretrain_small-20261122-120000 --prompt 'def main('
python -m recipes.sample my_export/ --prompt 'import ' --temperature 0 --max-new-tokens 100
"""

import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import jax.random as jr
import numpy as np
import tyro
from pydantic import BaseModel, Field

from data.tokenizer import StreamDecoder
from lm.generate import Sampler, stream
from recipes.command_line import fail
from recipes.loading import load
from train.checkpoint import CheckpointError
from train.logs import plain_messages
from train.runtime import DeviceError, choose_device, compilation_cache


class Config(BaseModel, frozen=True, extra="forbid"):
    """What to continue, and how."""

    model: Annotated[Path, tyro.conf.Positional] = Field(description="run folder or export folder")
    prompt: str = Field("", description="text to continue; empty: from the beginning of a document")
    max_new_tokens: int = Field(200, ge=1, description="tokens to draw at most; cut to what the context holds")
    temperature: float = Field(0.7, ge=0, description="0: always the likeliest token")
    top_k: int | None = Field(None, ge=1, description="draw among the k likeliest tokens only")
    top_p: float | None = Field(0.95, gt=0, le=1, description="draw among the likeliest tokens that hold this probability together")
    samples: int = Field(1, ge=1, description="how many continuations, one after the other")
    seed: int = Field(0, ge=0, description="of the draws; sample i uses seed + i")
    device: Literal["auto", "cpu", "gpu", "tpu"] = Field("auto", description="where to compute")


def main(config: Config) -> None:
    """Print the prompt and what follows."""
    plain_messages()
    choose_device(config.device)
    compilation_cache()
    model, tokenizer, origin = load(config.model)
    print(f"[{origin}: {model.n_params:,} parameters]", file=sys.stderr)
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    prompt = np.concatenate([np.asarray(start, np.int32), tokenizer.encode(config.prompt)])
    room = model.config.context - len(prompt)
    if len(prompt) == 0 or room < 1:
        raise ValueError(f"the prompt has {len(prompt)} tokens; this model takes 1 to {model.config.context - 1}")
    sampler = Sampler(config.temperature, config.top_k, config.top_p)
    stops = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    for i in range(config.samples):
        print(config.prompt, end="", flush=True)
        decoder, begin, count = StreamDecoder(tokenizer), time.perf_counter(), 0
        most = min(config.max_new_tokens, room)
        for token in stream(model, prompt, max_new_tokens=most, sampler=sampler, stop_ids=stops, key=jr.key(config.seed + i)):
            print(decoder.push(token), end="", flush=True)
            count += 1
        print(decoder.flush())
        why = "end of document" if count < most else "context is full" if most == room else "max-new-tokens"
        seconds = time.perf_counter() - begin
        print(f"[{count} tokens, {count / seconds:.0f} tokens/s with compilation; stopped by: {why}]", file=sys.stderr)


if __name__ == "__main__":
    chosen = tyro.cli(Config, description=__doc__, prog="python -m recipes.sample")
    try:
        main(chosen)
    except (ValueError, OSError, CheckpointError, DeviceError) as error:
        fail(str(error))
