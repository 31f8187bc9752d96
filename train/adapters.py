"""The settings of an adapter as a recipe has them, and what they make of a model."""

from collections.abc import Sequence
from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Key
from pydantic import Field

import lm
from lm.adapters import ALL_LINEARS, Model
from train.settings import Settings


class AdapterConfig(Settings):
    """What is trained of a model, and how the rest is kept."""

    kind: Literal["none", "lora", "rslora", "dora"] = Field(
        "lora", description="low-rank adapters: plain, scaled by the root of the rank, or with magnitudes; none: all weights are trained"
    )
    rank: int = Field(8, ge=1, description="of the adapters; each has rank · (inputs + outputs) numbers")
    alpha: float = Field(16.0, gt=0, description="what adapters are multiplied with, over their rank (rslora: over its root)")
    dropout: float = Field(0.0, ge=0, lt=1, description="rate on what adapters read, in training")
    targets: tuple[str, ...] = Field(ALL_LINEARS, description="roles or paths of the linear maps that get one: 'attn.[qv]_proj' 'mlp.*'")
    base: Literal["as_is", "bfloat16", "int8", "nf4"] = Field(
        "as_is", description="how frozen weights are kept; int8 and nf4 are unpacked in each product (QLoRA)"
    )


def adapted(model: Model, config: AdapterConfig, *, key: Key[Array, ""]) -> Model:
    """The model with its weights kept as asked and adapters on. `none`: as it was.

    **Raises:** `ValueError` for a packed base without adapters, and as `lm.add_lora` does.
    """
    if config.kind == "none":
        if config.base != "as_is":
            raise ValueError(f"base {config.base!r} is for weights that are not trained; with adapter kind none all are: leave it as_is")
        return model
    if config.base == "bfloat16":
        model = lm.cast(model, jnp.bfloat16)
    elif config.base != "as_is":
        model = lm.quantised(model, config.base)
    return lm.add_lora(
        model,
        rank=config.rank,
        alpha=config.alpha,
        targets=config.targets,
        key=key,
        dropout=config.dropout,
        rslora=config.kind == "rslora",
        dora=config.kind == "dora",
    )


def trained_part(model: Any, config: AdapterConfig, also: Sequence[str] = ()) -> Any:
    """`lm.trainable_filter`, or `None`, which is all, where there are no adapters."""
    return None if config.kind == "none" else lm.trainable_filter(model, also)


def abstract_adapted(skeleton: Any, config: AdapterConfig) -> Any:
    """The tree `adapted` would make, without numbers."""
    return eqx.filter_eval_shape(lambda model: adapted(model, config, key=jr.key(0)), skeleton)
