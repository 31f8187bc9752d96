"""Where a token stands: rotary tables in all their stretched kinds, and the sinusoidal table of old.

Rotary positions (Su et al. 2021, arXiv:2104.09864) turn pairs of a head's entries by position · inverse wavelength. The kinds differ in the
inverse wavelengths alone (YaRN also in how long the turned vectors are), each a small function here; `rotary` picks the one a config asks
for. Tables are computed once a forward pass from the positions themselves and handed to every layer, so packed rows, left padding and a
decode step at position 31,007 need no case of their own. `lm.kernels.rotate` applies them.

Learned positions are an `Embedding` over positions and need nothing from here.
"""

import math
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from pydantic import BaseModel, Field

# ------------------------------------------------------------------------------------------- kinds


class _Kind(BaseModel, frozen=True, extra="forbid"):
    pass


class LinearScaling(_Kind):
    """Positions divided by `factor` (Chen et al. 2023, arXiv:2306.15595)."""

    kind: Literal["linear"] = "linear"
    factor: float = Field(ge=1)


class NTK(_Kind):
    """A larger base: fast pairs turn as before, slow ones `factor` times slower (bloc97 2023; arXiv:2309.00071, section 3.1)."""

    kind: Literal["ntk"] = "ntk"
    factor: float = Field(ge=1)


class DynamicNTK(_Kind):
    """NTK with the factor that a text of `length` tokens needs (emozilla 2023; arXiv:2309.00071, section 3.3).

    `transformers` lets the factor grow with each token drawn past `original_context`, which keys in a cache cannot follow. Here it is that
    of one fixed length; up to `original_context` it is 1, and both are plain RoPE.
    """

    kind: Literal["dynamic"] = "dynamic"
    factor: float = Field(ge=1)
    original_context: int = Field(gt=0)
    length: int = Field(gt=0)


class Llama3(_Kind):
    """Slow pairs divided by `factor`, fast ones left, those between blended (Llama 3.1; Grattafiori et al. 2024, arXiv:2407.21783; the
    formula is that of Meta's code)."""

    kind: Literal["llama3"] = "llama3"
    factor: float = Field(ge=1)
    low_freq_factor: float = Field(gt=0)
    high_freq_factor: float = Field(gt=0)
    original_context: int = Field(gt=0)


class Yarn(_Kind):
    """Blended between linear and plain by how often a pair turns within the original context, and scores sharpened (Peng et al. 2023,
    arXiv:2309.00071, section 3.2 to 3.4)."""

    kind: Literal["yarn"] = "yarn"
    factor: float = Field(ge=1)
    original_context: int = Field(gt=0)
    beta_fast: float = Field(32.0, gt=0)  # turns above which a pair is left alone; β in the paper
    beta_slow: float = Field(1.0, gt=0)  # turns below which it is interpolated; α in the paper
    attention_factor: float | None = Field(None, gt=0)  # of cos and sin; None: by the paper's rule
    mscale: float | None = None  # DeepSeek's two numbers in place of the rule
    mscale_all_dim: float | None = None
    truncate: bool = True  # the ramp begins and ends at whole pairs


class LongRope(_Kind):
    """Each pair divided by a number of its own, found by a search: one list for texts within `original_context`, another for longer ones;
    scores sharpened as if all were long (Ding et al. 2024, arXiv:2402.13753; the attention factor is that of Phi-3, arXiv:2404.14219).

    Which list: that for texts of `length` tokens, or, with `None`, for each row by its own last position, as `transformers` does. Keys in
    a cache cannot change lists when the text grows past `original_context`: a cache that long asks for a `length`.
    """

    kind: Literal["longrope"] = "longrope"
    short_factor: tuple[float, ...]  # one number for each pair
    long_factor: tuple[float, ...]
    original_context: int = Field(gt=1)
    factor: float = Field(gt=0)  # context / original context
    attention_factor: float | None = Field(None, gt=0)  # of cos and sin; None: √(1 + ln factor / ln original_context)
    length: int | None = Field(None, gt=0)  # of the texts; None: each row's own


class NoPositions(_Kind):
    """Attention without positions, order known by the causal mask alone (Kazemnejad et al. 2023, arXiv:2305.19466)."""

    kind: Literal["none"] = "none"


Scaling = LinearScaling | NTK | DynamicNTK | Llama3 | Yarn | LongRope | NoPositions


# ------------------------------------------------------------------------------------------- inverse wavelengths


def frequencies(rotary_dim: int, base: float) -> Float[Array, " half"]:
    """Radians a position, θ_i = base^(-2i / rotary_dim) for i in 0 … rotary_dim/2 - 1 (section 3.2.2)."""
    return base ** (-jnp.arange(0, rotary_dim, 2, dtype=jnp.float32) / rotary_dim)


def ntk_base(base: float, rotary_dim: int, factor: float) -> float:
    """The base under which the slowest pair turns `factor` times slower (arXiv:2309.00071, eq. 16)."""
    return base * factor ** (rotary_dim / (rotary_dim - 2))


def dynamic_factor(factor: float, length: int, original_context: int) -> float:
    """The factor for a text of `length` tokens, 1 within the original context."""
    return factor * max(length, original_context) / original_context - (factor - 1)


def llama3(plain: Float[Array, " half"], kind: Llama3) -> Float[Array, " half"]:
    """By turns within the original context: below `low_freq_factor` divided, above `high_freq_factor` plain, between them blended."""
    turns = kind.original_context * plain / (2 * math.pi)
    keep = jnp.clip((turns - kind.low_freq_factor) / (kind.high_freq_factor - kind.low_freq_factor), 0.0, 1.0)
    return keep * plain + (1 - keep) * plain / kind.factor


def yarn(plain: Float[Array, " half"], base: float, kind: Yarn) -> Float[Array, " half"]:
    """A ramp over pairs, from plain at `beta_fast` turns to interpolated at `beta_slow` (arXiv:2309.00071, eq. 17 to 21; over the number of
    the pair and rounded outwards, as in the authors' code)."""
    half = plain.shape[0]

    def pair_that_turns(times: float) -> float:  # the i for which original_context · θ_i = 2π · times
        return half * math.log(kind.original_context / (times * 2 * math.pi)) / math.log(base)

    low, high = pair_that_turns(kind.beta_fast), pair_that_turns(kind.beta_slow)
    if kind.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    slow = jnp.clip((jnp.arange(half, dtype=jnp.float32) - low) / max(high - low, 1e-3), 0.0, 1.0)
    return plain * (1 - slow) + plain / kind.factor * slow


def yarn_attention_factor(kind: Yarn) -> float:
    """What cos and sin are multiplied by: 0.1 ln(factor) + 1 (arXiv:2309.00071, eq. 22, its square root taken on each side)."""

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(kind.factor) + 1.0

    if kind.attention_factor is not None:
        return kind.attention_factor
    if kind.mscale and kind.mscale_all_dim:
        return mscale(kind.mscale) / mscale(kind.mscale_all_dim)
    return mscale(1.0)


def longrope(plain: Float[Array, " half"], kind: LongRope, *, long: bool) -> Float[Array, " half"]:
    """Each pair divided by its number in one of the two lists (arXiv:2402.13753, eq. 3; its unscaled first tokens are left out, as in
    Phi-3)."""
    check_pairs(kind, plain.shape[0])
    return plain / jnp.asarray(kind.long_factor if long else kind.short_factor, plain.dtype)


def longrope_attention_factor(kind: LongRope) -> float:
    """What cos and sin are multiplied by."""
    if kind.attention_factor is not None:
        return kind.attention_factor
    return math.sqrt(1 + math.log(kind.factor) / math.log(kind.original_context)) if kind.factor > 1 else 1.0


def check_pairs(scaling: Scaling | None, half: int) -> None:
    """Lists of LongRoPE that have not a number for each pair, in words."""
    if isinstance(scaling, LongRope):
        for name in ("short_factor", "long_factor"):
            if len(getattr(scaling, name)) != half:
                raise ValueError(f"{name} has {len(getattr(scaling, name))} numbers, expected {half}: one for each pair that is rotated")


def check_cache(scaling: Scaling | None, slots: int) -> None:
    """A cache in which a text could outgrow the list its first keys were made by, in words."""
    if isinstance(scaling, LongRope) and scaling.length is None and slots > scaling.original_context:
        raise ValueError(
            f"a cache of {slots} slots is longer than the original context of LongRoPE ({scaling.original_context}): texts that pass it "
            "are rotated otherwise from their first token on, which keys in a cache cannot follow. Give the config's rope_scaling the "
            "length the texts will have (a model takes another config by dataclasses.replace)"
        )


def rotary(head_dim: int, base: float, scaling: Scaling | None = None, fraction: float = 1.0) -> tuple[Float[Array, " half"], float]:
    """Inverse wavelengths of the rotated part, and the factor on cos and sin.

    **Arguments:**

    - `scaling`: `None` is plain RoPE. `NoPositions` has no wavelengths, and `LongRope` without a length has two sets: ask before.
    - `fraction`: of head_dim that is rotated, from its beginning (GPT-NeoX, arXiv:2204.06745); the rest passes unturned.
    """
    rotary_dim = int(head_dim * fraction)
    plain = frequencies(rotary_dim, base)
    match scaling:
        case LinearScaling():
            return plain / scaling.factor, 1.0
        case NTK():
            return frequencies(rotary_dim, ntk_base(base, rotary_dim, scaling.factor)), 1.0
        case DynamicNTK():
            factor = dynamic_factor(scaling.factor, scaling.length, scaling.original_context)
            return frequencies(rotary_dim, ntk_base(base, rotary_dim, factor)), 1.0
        case Llama3():
            return llama3(plain, scaling), 1.0
        case Yarn():
            return yarn(plain, base, scaling), yarn_attention_factor(scaling)
        case LongRope():
            if scaling.length is None:
                raise ValueError("LongRope without a length has two sets of wavelengths, chosen by the positions: tables_of does so")
            return longrope(plain, scaling, long=scaling.length > scaling.original_context), longrope_attention_factor(scaling)
        case NoPositions():
            raise ValueError("NoPositions rotates nothing: there are no tables to make")
    return plain, 1.0


# ------------------------------------------------------------------------------------------- tables


def tables(
    positions: Int[Array, "*batch seq"], inverse_wavelengths: Float[Array, "*#row half"], factor: float = 1.0
) -> tuple[Float[Array, "*batch seq rotary_dim"], Float[Array, "*batch seq rotary_dim"]]:
    """factor · cos and factor · sin of position · inverse wavelength in fp32, each half repeated to the full width (the rotate-half
    layout)."""
    angles = positions[..., None].astype(jnp.float32) * inverse_wavelengths
    angles = jnp.concatenate([angles, angles], axis=-1)
    return factor * jnp.cos(angles), factor * jnp.sin(angles)


def tables_of(positions: Int[Array, "*batch seq"], head_dim: int, base: float, scaling: Scaling | None, fraction: float) -> Any:
    """The pair of tables a config asks for; `None` for no positions."""
    if isinstance(scaling, NoPositions):
        return None
    if isinstance(scaling, LongRope) and scaling.length is None:
        plain = frequencies(int(head_dim * fraction), base)
        is_long = jnp.max(positions, axis=-1)[..., None, None] >= scaling.original_context  # *batch 1 1
        inverse = jnp.where(is_long, longrope(plain, scaling, long=True), longrope(plain, scaling, long=False))
        return tables(positions, inverse, longrope_attention_factor(scaling))
    return tables(positions, *rotary(head_dim, base, scaling, fraction))


def sinusoidal(positions: Int[Array, "*batch seq"], d_model: int) -> Float[Array, "*batch seq d_model"]:
    """sin in the even entries, cos in the odd ones, wavelengths from 2π to 10,000 · 2π (Vaswani et al. 2017, arXiv:1706.03762,
    section 3.5)."""
    angles = positions[..., None].astype(jnp.float32) * frequencies(d_model, 10_000.0)
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(*positions.shape, d_model)
