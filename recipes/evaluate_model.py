"""How a model is run when it is only measured."""

from collections.abc import Mapping
from typing import Any

import lm
from lm.base import AbstractLM
from lm.flight import Flight
from train.backends import attention_of, choose_backend, choose_dtype


def run_with(model: AbstractLM, facts: Mapping[str, Any], dtype: str, backend: str) -> tuple[lm.Ops, Flight]:
    """Kernels and flight on a device with these `device_facts`, by the rules of `train.backends` where "auto" is asked for. Layers run as a
    loop: nothing is differentiated, and a scan would copy the weights for every batch."""
    chosen = choose_dtype(facts) if dtype == "auto" else dtype
    name = choose_backend(facts, dtype=chosen, seq=256, asked=backend, **attention_of(model))
    return lm.BACKENDS[name], Flight(dtype=chosen)
