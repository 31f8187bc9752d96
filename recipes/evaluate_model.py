"""How a model is run when it is only measured."""

from collections.abc import Mapping
from typing import Any

import lm
from lm.base import AbstractLM, leaves_by_path, role
from lm.flight import Flight
from train.backends import choose_backend, choose_dtype


def run_with(model: AbstractLM, facts: Mapping[str, Any], dtype: str, backend: str) -> tuple[lm.Ops, Flight]:
    """Kernels and flight on a device with these `device_facts`, by the rules of `train.backends` where "auto" is asked for. Layers run as a
    loop: nothing is differentiated, and a scan would copy the weights for every batch."""
    chosen = choose_dtype(facts) if dtype == "auto" else dtype
    config = model.config
    sinks = any(role(path) == "attn.sinks" for path in leaves_by_path(model))
    softcap = getattr(config, "attention_softcap", None)
    name = choose_backend(facts, dtype=chosen, head_dim=config.head_dim, seq=256, softcap=softcap, sinks=sinks, asked=backend)
    return lm.BACKENDS[name], Flight(dtype=chosen)
