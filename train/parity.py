"""Is it the same model? Our logits beside those of an implementation that shares no code with ours.

`transformers` computes them from a Hugging Face folder, llama.cpp says from a GGUF file which token it finds likeliest. Both are asked only
where they are installed; `compare` puts their answer beside ours, and `Comparison.passed` is its verdict. Without either there is no
verdict, and nobody may write one.
"""

import importlib.util
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from lm.base import AbstractLM

LIMIT = 1e-4  # of logits of order 10 in fp32: what sums in another order come to through some dozen layers
# Prose, code, digits, accents, another script: what tokenizers and models are asked for, in few tokens.
TEXT = """The capital of France is Paris. In 1905 Einstein was 26 years old; he published four papers that year.

def fibonacci(n: int) -> list[int]:
    numbers = [0, 1]
    while len(numbers) < n:
        numbers.append(numbers[-1] + numbers[-2])
    return numbers

Žižek a déjà vu 東京 in a naïve café: «3.14159 × 2 = 6.28318», she said. Once upon a time, there was a king who had three daughters."""

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


def in_words(found: Comparison | Choices) -> str:
    """A line for people, with the verdict."""
    verdict = "passed" if found.passed else "FAILED"
    if isinstance(found, Choices):
        return (
            f"{found.reference}: {found.places} places, the likeliest token is the same at {found.agreement:.1%} of them, and at "
            f"{found.clear_agreement:.1%} of the {found.clear} where ours leads by more than {MARGIN:g} logit: {verdict}"
        )
    return (
        f"{found.reference}: {found.places} places, logits up to {found.largest_logit:.1f} differ by at most {found.max_difference:.1e} "
        f"(limit {found.limit:.1e}), {found.mean_difference:.1e} in the mean; the likeliest token is the same at "
        f"{found.top1_agreement:.1%}, of the five likeliest {found.top5_agreement:.1%}; KL {found.kl:.1e} nats: {verdict}"
    )


# ------------------------------------------------------------------------------------------- who computes


def our_logits(model: AbstractLM, tokens: Int[np.ndarray, " places"]) -> Float[np.ndarray, "places vocab"]:
    """In fp32, products at full precision: on accelerators too."""
    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(lambda model, tokens: model(tokens))(model, jnp.asarray(tokens)), np.float32)


class Encoder(Protocol):
    """What the choice of tokens needs of a tokenizer."""

    def encode(self, text: str) -> np.ndarray: ...


def tokens_of(tokenizer: Encoder | None, model: AbstractLM, *, text: str = TEXT, places: int) -> Int[np.ndarray, " places"]:
    """The text's ids, `places` at most, or random ones where there is no tokenizer to ask.

    **Raises:** `ValueError` for a tokenizer that is not this model's.
    """
    most = min(places, model.config.context)
    if tokenizer is None:
        return np.random.default_rng(0).integers(0, model.config.vocab, most).astype(np.int32)
    tokens = tokenizer.encode(text)[:most]
    if len(tokens) < 2 or tokens.max() >= model.config.vocab:
        raise ValueError(
            f"the tokenizer gives {len(tokens)} ids up to {tokens.max(initial=-1)} for the text; expected at least 2, "
            f"below the model's vocabulary of {model.config.vocab}: is it this model's?"
        )
    return tokens


def is_installed(*packages: str) -> bool:
    return all(importlib.util.find_spec(package) is not None for package in packages)


def can_compare(python: Path | None) -> bool:
    """Whether `transformers` can be asked.

    **Raises:** `ValueError` where an interpreter was named that cannot be run or lacks it.
    """
    if python is None:
        return is_installed("transformers", "torch")
    code = "import importlib.util, sys; sys.exit(not all(map(importlib.util.find_spec, ('transformers', 'torch', 'numpy'))))"
    if not python.is_file() or not os.access(python, os.X_OK):
        raise ValueError(f"--parity-python {python}: expected a Python interpreter, as in /path/to/.venv/bin/python")
    if subprocess.run([python.absolute(), "-c", code], capture_output=True).returncode:
        raise ValueError(f"--parity-python {python}: expected torch, transformers and numpy there; one of them is missing")
    return True


def transformers_logits(
    folder: Path, tokens: Int[np.ndarray, " places"], python: Path | None = None
) -> tuple[str, Float[np.ndarray, "places vocab"]]:
    """Name and version, and the logits of the model in a Hugging Face folder, in fp32 by the plain formula of attention. No code from the
    folder is run.

    **Arguments:**

    - `python`: another interpreter that has `torch` and `transformers`, to compute them in; `None` is this one. It gets no token of the
      Hub and asks nothing of the network.

    **Raises:** `ValueError` with that interpreter's words where it fails.
    """
    if python is None:
        from train.reference import logits_of

        return logits_of(f"{folder}", np.asarray(tokens, np.int64))
    with tempfile.TemporaryDirectory() as name:
        given, found = Path(name) / "tokens.npy", Path(name) / "logits.npz"
        np.save(given, np.asarray(tokens, np.int64))
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"))}
        # From standard input, in a folder of its own: our packages must not be what it imports.
        asked = subprocess.run(
            [python.absolute(), "-", folder.resolve(), given, found],
            input=Path(__file__).with_name("reference.py").read_bytes(),
            cwd=name,
            env=environment | {"HF_HUB_OFFLINE": "1"},
            capture_output=True,
        )
        if asked.returncode:
            words = asked.stderr.decode(errors="replace").strip().splitlines()
            raise ValueError(f"{python} gave no logits of {folder.name}: {words[-1] if words else f'status {asked.returncode}'}")
        with np.load(found) as arrays:
            return str(arrays["name"]), arrays["logits"]


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
