"""The language model: arrays and token ids, nothing of text, training or recipes.

Read in this order: `masks` (who may look at whom), `kernels` (the arithmetic), `layers`, `rope`, `cache`, `attention`, then one drawing
from end to end, `models/llama.py`, and what is done with it: `generate`, `hf`, `flight`.

Every module of this package is checked at run time: a wrong shape or dtype is an error that names the axis, at trace time and so at no cost
inside compiled code. `JAXTYPING_DISABLE=1` switches the checks off.
"""

from beartype import BeartypeConf as _BeartypeConf  # noqa: F401  (the hook below names it)
from jaxtyping import install_import_hook as _install_import_hook

# Installed for good: inside a `with`, modules imported later would go unchecked.
_install_import_hook("lm", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

from lm.adapter_files import Base  # noqa: E402
from lm.adapters import LoRA, add_lora, merge, trainable_filter, unmerge, without_adapters  # noqa: E402
from lm.base import AbstractBlock, AbstractLM, mark  # noqa: E402
from lm.cache import LayerCache  # noqa: E402
from lm.flight import Flight, Remat, Stack, put_on_flight  # noqa: E402
from lm.generate import Sampler, generate, stream  # noqa: E402
from lm.kernels import BACKENDS, REFERENCE, Ops, with_ops  # noqa: E402
from lm.layers import cast, dequantised, quantised  # noqa: E402
from lm.masks import Facts, may_attend  # noqa: E402
from lm.models import (  # noqa: E402
    ARCHITECTURES,
    build,
    load_adapter,
    load_pretrained,
    save_adapter,
    save_native,
    save_pretrained,
)

__all__ = [
    "ARCHITECTURES",
    "BACKENDS",
    "REFERENCE",
    "AbstractBlock",
    "AbstractLM",
    "Base",
    "Facts",
    "Flight",
    "LayerCache",
    "LoRA",
    "Ops",
    "Remat",
    "Sampler",
    "Stack",
    "add_lora",
    "build",
    "cast",
    "dequantised",
    "generate",
    "load_adapter",
    "load_pretrained",
    "mark",
    "may_attend",
    "merge",
    "put_on_flight",
    "quantised",
    "save_adapter",
    "save_native",
    "save_pretrained",
    "stream",
    "trainable_filter",
    "unmerge",
    "with_ops",
    "without_adapters",
]
