"""Which kernels a run uses, and in which dtype: one rule each, from facts about the device and the model to a name.

    backend     where                      dtype         head_dim                 soft-cap   sinks   dropout of probabilities
    cudnn       NVIDIA, compute ≥ 8        bf16, fp16    ≤ 128, a multiple of 8   no         no      no
    cpu         CPU                        any           any                      yes        yes     no
    xla         everywhere                 any           any                      no         no      no
    reference   everywhere                 any           any                      yes        yes     yes

The names are those of `lm.kernels.BACKENDS`. `auto` is the first of these that can, with one word more: `cudnn` must be asked for by
name, since it has not run on a card here yet. So a CPU takes `cpu`, with bf16 products or without: on a Zen 3, which knows AVX2 alone, fp32
steps of `pretrain_small` took 0.86 to 0.95 of `reference`'s time (docs/performance.md). A backend asked for by name that cannot is an
error; nothing is replaced.
"""

import re
from collections.abc import Mapping
from typing import Any, Literal

from lm.base import AbstractLM, leaves_by_path, role
from lm.kernels import BACKENDS

CUDNN_HEAD_DIM = 128  # as checked by jax.nn.dot_product_attention for its flash kernels
CUDNN_COMPUTE_CAPABILITY = 8.0  # Ampere


def choose_dtype(device: Mapping[str, Any]) -> Literal["float32", "bfloat16"]:
    """Of the blocks in training: bf16 where the device multiplies it faster than fp32.

    On a CPU that is AMD's, from Zen 4 on, where bf16 steps were 1.8 times as fast as those in fp32, and Intel's where it has AMX: there
    steps of `pretrain_small` were 1.6 (jax 0.10) and 1.75 times as fast (0.12). Intel's avx512_bf16 alone is no help to XLA's products: on
    an Emerald Rapids Xeon without AMX they ran at 160 to 218 GF/s in bf16 and 280 in fp32, and bf16 steps took 1.07 (jax 0.12) to 1.46
    times (0.10) as long (docs/performance.md).
    """
    fast = device["platform"] != "cpu" or (
        _has_bf16(device) and (device.get("cpu_vendor") == "AuthenticAMD" or "amx_bf16" in device["cpu_flags"])
    )
    return "bfloat16" if fast else "float32"


def choose_weights(device: Mapping[str, Any]) -> Literal["float32", "bfloat16"]:
    """Of the matrices in generation, where the time goes into reading them: bf16 wherever there are instructions for it."""
    return "bfloat16" if device["platform"] != "cpu" or _has_bf16(device) else "float32"


def _has_bf16(cpu: Mapping[str, Any]) -> bool:
    return "avx512_bf16" in cpu.get("cpu_flags", ())


def attention_of(model: AbstractLM) -> dict[str, Any]:
    """What `choose_backend` asks of a model: `head_dim`, `softcap` (of attention's scores) and `sinks`."""
    return {
        "head_dim": model.config.head_dim,
        "softcap": getattr(model.config, "attention_softcap", None),  # families that never had one have no such field
        "sinks": any(role(path) == "attn.sinks" for path in leaves_by_path(model)),
    }


def choose_backend(
    device: Mapping[str, Any],
    *,
    dtype: str,
    head_dim: int,
    seq: int,
    softcap: float | None = None,
    sinks: bool = False,
    dropout: float = 0.0,
    asked: str = "auto",
) -> str:
    """The name of the backend to train with.

    **Arguments:**

    - `device`: as from `train.runtime.device_facts`: `platform`, `device_kind`, `cpu_flags`, and `compute_capability` where known.
    - `dtype`: of the blocks.
    - `seq`: tokens of a row; cudnn takes even numbers only.
    - `softcap`, `dropout`: of attention scores and probabilities.
    - `sinks`: each head has a score more, of a place with nothing in it (gpt-oss).
    - `asked`: a name, or `auto`.

    **Raises:** `ValueError` where the name asked for cannot do it, with the reason and the names that can.
    """
    reasons = {name: _why_not(name, device, dtype, head_dim, seq, softcap, sinks, dropout) for name in ("cudnn", "cpu", "xla", "reference")}
    able = [name for name, reason in reasons.items() if reason is None]
    if asked == "auto":
        return next(name for name in able if name != "cudnn")
    if asked not in BACKENDS:
        raise ValueError(f"backend must be auto or one of {', '.join(BACKENDS)}, got {asked!r}")
    if reasons[asked] is not None:
        raise ValueError(f"backend {asked!r} cannot be used here: {reasons[asked]}. These can: {', '.join(able)}")
    return asked


def _why_not(
    name: str, device: Mapping[str, Any], dtype: str, head_dim: int, seq: int, softcap: float | None, sinks: bool, dropout: float
) -> str | None:
    """What keeps a backend from computing this, in words; `None` if nothing does."""
    if name == "reference":
        return None
    if dropout > 0:
        return f"it cannot drop attention probabilities (attention_dropout = {dropout})"
    if softcap is not None and name != "cpu":
        return f"it cannot soft-cap scores (attention_softcap = {softcap})"
    if sinks and name != "cpu":
        return "it has no attention sinks"
    if name == "cpu" and device["platform"] != "cpu":
        return f"it is written for CPUs, this is {device['device_kind']}"
    if name != "cudnn":
        return None
    capability = re.fullmatch(r"\d+\.\d+", str(device.get("compute_capability")))  # AMD's say gfx942
    if capability is None:
        return f"it is the flash kernel of NVIDIA cards, this is {device['device_kind']}"
    if float(capability[0]) < CUDNN_COMPUTE_CAPABILITY:
        return f"it asks for compute capability {CUDNN_COMPUTE_CAPABILITY}, this card has {capability[0]}"
    if dtype not in ("bfloat16", "float16"):
        return f"it computes in bfloat16 or float16 only, asked for is {dtype}"
    if head_dim > CUDNN_HEAD_DIM or head_dim % 8:
        return f"head_dim must be a multiple of 8 up to {CUDNN_HEAD_DIM}, it is {head_dim}"
    return f"rows must have an even number of tokens, they have {seq}" if seq % 2 else None
