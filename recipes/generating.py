"""What recipes that draw text share: the flags of the draw, and a model made ready for it."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax
from pydantic import Field

from data.tokenizer import Tokenizer
from lm.base import AbstractLM
from lm.sampling import Sampler
from recipes.command_line import RecipeConfig, resumable
from recipes.loading import kept_as, load
from train.backends import choose_weights
from train.runtime import choose_device, compilation_cache, device_facts


class DrawConfig(RecipeConfig):
    """How tokens are drawn, and where."""

    temperature: float = Field(0.7, ge=0, description="0: always the likeliest token")
    top_k: int | None = Field(None, ge=1, description="draw among the k likeliest tokens only")
    top_p: float | None = Field(0.95, gt=0, le=1, description="draw among the likeliest tokens that hold this probability together")
    min_p: float | None = Field(None, ge=0, le=1, description="draw among tokens at least this fraction as likely as the likeliest")
    repetition_penalty: float = Field(1.0, gt=0, description="above 1: tokens of the prompt and the continuation become less likely")
    logit_bias: dict[int, float] = Field({}, description="token ids and what is added to their logits, as in 13 -5.0 42 2.5")
    stop: tuple[str, ...] = Field((), description="strings at which a text ends, beside the model's own end; not shown")
    seed: int = Field(0, ge=0, description="of the draws")
    device: Literal["auto", "cpu", "gpu", "tpu"] = resumable("auto", description="where to compute")
    weights: Literal["auto", "float32", "bfloat16", "int8", "int4", "nf4"] = Field(
        "auto", description="how the matrices are kept; auto: as packed, or bfloat16 where the device has instructions for it, else float32"
    )

    def sampler(self) -> Sampler:
        bias = tuple(self.logit_bias.items())
        return Sampler(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty, bias)


@functools.cache
def compile_clock() -> Callable[[], float]:
    """What gives the seconds this process has spent on tracing and compiling since this was called first: they are no one's speed."""
    spent = [0.0]

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event.startswith("/jax/core/compile/"):
            spent[0] += duration_secs

    jax.monitoring.register_event_duration_secs_listener(listen)
    return lambda: spent[0]


def ready(source: str | Path, config: DrawConfig) -> tuple[AbstractLM, Tokenizer, str]:
    """The model on its device, its matrices as asked, its tokenizer, and words on all that."""
    device = choose_device(config.device)
    compilation_cache()
    model, tokenizer, origin = load(source)
    model, weights = kept_as(model, config.weights, choose_weights(device_facts(device)))
    return model, tokenizer, f"{origin}: {model.n_params:,} parameters, as {weights}"
