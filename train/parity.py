"""Is it the same model? Our logits beside those of an implementation that shares no code with ours.

`transformers` computes them from a Hugging Face folder, llama.cpp says from a GGUF file which token it finds likeliest. Both are asked only
where they are installed; `compare` puts their answer beside ours, and `Comparison.passed` is its verdict. Without either there is no
verdict, and nobody may write one.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from lm.base import AbstractLM

LIMIT = 1e-4  # of logits of order 10 in fp32: what sums in another order come to through some dozen layers
MARGIN = 1.0  # logits between our likeliest token and the next, from which on an engine that rounds otherwise must choose it too


@dataclass(frozen=True)
class Comparison:
    """Logits of two implementations at the same places of the same text."""

    reference: str  # name and version
    places: int  # tokens compared
    max_difference: float  # of logits
    mean_difference: float
    largest_logit: float  # of the reference, in size
    top1_agreement: float  # share of places with the same likeliest token
    top5_agreement: float  # share of the reference's five likeliest that are among ours
    kl: float  # KL(reference ‖ ours) a place, nats, mean

    @property
    def limit(self) -> float:
        """`LIMIT`, larger in proportion where logits are above 10: fp32 has a relative precision."""
        return LIMIT * max(1.0, self.largest_logit / 10)

    @property
    def passed(self) -> bool:
        return self.max_difference < self.limit

    def record(self) -> dict[str, Any]:
        return asdict(self) | {"limit": self.limit, "passed": self.passed}


@dataclass(frozen=True)
class Choices:
    """The tokens an engine that rounds otherwise finds likeliest, beside ours: those where our margin is clear must be the same."""

    reference: str
    places: int
    clear: int  # places where our likeliest token leads by more than `MARGIN`
    clear_agreement: float  # share of those with the same choice
    agreement: float  # share of all

    @property
    def passed(self) -> bool:
        return self.clear > 0 and self.clear_agreement == 1.0

    def record(self) -> dict[str, Any]:
        return asdict(self) | {"margin": MARGIN, "passed": self.passed}


def compare(reference: str, theirs: Float[np.ndarray, "places vocab"], ours: Float[np.ndarray, "places vocab"]) -> Comparison:
    """Two sets of logits. **Raises:** `ValueError` where there is none, or one is no number."""
    for name, logits in ((reference, theirs), ("ours", ours)):
        if logits.size == 0 or not np.isfinite(logits).all():
            raise ValueError(
                f"the logits of {name} cannot be compared: {np.sum(~np.isfinite(logits))} of {logits.size} are no finite number"
            )
    theirs, ours = theirs.astype(np.float64), ours.astype(np.float64)
    difference = np.abs(theirs - ours)
    their_five, our_five = (np.argsort(-logits, axis=-1)[:, :5] for logits in (theirs, ours))
    common = [len(np.intersect1d(a, b)) / len(a) for a, b in zip(their_five, our_five, strict=True)]
    their_logs, our_logs = (logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True) for logits in (theirs, ours))
    return Comparison(
        reference=reference,
        places=len(theirs),
        max_difference=float(difference.max()),
        mean_difference=float(difference.mean()),
        largest_logit=float(np.abs(theirs).max()),
        top1_agreement=float(np.mean(their_five[:, 0] == our_five[:, 0])),
        top5_agreement=float(np.mean(common)),
        kl=float(np.mean(np.sum(np.exp(their_logs) * (their_logs - our_logs), axis=-1))),
    )


def compare_choices(reference: str, choices: Sequence[int], ours: Float[np.ndarray, "places vocab"]) -> Choices:
    """An engine's likeliest tokens beside our logits at the same places."""
    if len(choices) != len(ours):
        raise ValueError(f"{reference} chose at {len(choices)} places, ours are {len(ours)}")
    second, first = np.sort(ours, axis=-1)[:, -2:].T
    same, clear = np.argmax(ours, axis=-1) == np.asarray(choices), first - second > MARGIN
    return Choices(
        reference=reference,
        places=len(choices),
        clear=int(clear.sum()),
        clear_agreement=float(same[clear].mean()) if clear.any() else 0.0,
        agreement=float(same.mean()),
    )


# ------------------------------------------------------------------------------------------- who computes


def our_logits(model: AbstractLM, tokens: Int[np.ndarray, " places"]) -> Float[np.ndarray, "places vocab"]:
    """In fp32, products at full precision: on accelerators too."""
    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(lambda model, tokens: model(tokens))(model, jnp.asarray(tokens)), np.float32)


def is_installed(*packages: str) -> bool:
    return all(importlib.util.find_spec(package) is not None for package in packages)


def transformers_logits(folder: Path, tokens: Int[np.ndarray, " places"]) -> tuple[str, Float[np.ndarray, "places vocab"]]:
    """Name and version, and the logits of the model in a Hugging Face folder, in fp32 by the plain formula of attention. No code from the
    folder is run."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True).eval()
    with torch.inference_mode():
        logits = model(torch.from_numpy(np.asarray(tokens, np.int64))[None]).logits[0].float().numpy()
    return f"transformers {metadata.version('transformers')}", logits


def llama_cpp_choices(file: Path, tokens: Int[np.ndarray, " places"]) -> tuple[str, list[int]]:
    """Name and version, and the likeliest next token at each place by llama.cpp, which multiplies a GGUF's weights as they are packed."""
    from cyllama.llama import llama_cpp

    llama_cpp.disable_logging()
    model = llama_cpp.LlamaModel(str(file), llama_cpp.LlamaModelParams())
    settings = llama_cpp.LlamaContextParams()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = max(64, len(tokens))
    context = llama_cpp.LlamaContext(model, settings)
    batch = llama_cpp.LlamaBatch(n_tokens=len(tokens), embd=0, n_seq_max=1)
    batch.set_batch([int(token) for token in tokens], 0, True)  # logits at every place
    context.decode(batch)
    likeliest = llama_cpp.LlamaSampler(llama_cpp.LlamaSamplerChainParams())
    likeliest.add_greedy()
    return f"llama.cpp (cyllama {metadata.version('cyllama')})", [likeliest.sample(context, i) for i in range(len(tokens))]
