"""From a trained model to a folder that `transformers` and the Hub accept; the Hub alone where `transformers` has no such model.

`export` is what a run does at its end. `recipes.publish` takes the same steps apart: `write_model`, a look at what was written, and
`finish`, which adds the card, the lineage and the record of what was proved. A folder under its final name is always whole.
`leaks` looks for what must not leave this machine.
"""

import hashlib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import equinox as eqx
import jax
from loguru import logger

from lm.base import AbstractLM
from lm.hf_config import NotInTransformers
from lm.models import save_native, save_pretrained
from lm.native import is_native
from train.card import Card, render
from train.lineage import GIVEN, LINEAGE_FILE, lineage
from train.logs import write_json

EVIDENCE_FILE = "evidence.json"  # of a published folder: by it we know a repository for ours
CARD_FILE = "README.md"
_ANY_WORD = (".png", "tokenizer.json")  # where "/usr" may stand by chance, or as a token
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")  # of the Hub


class SavableTokenizer(Protocol):
    """What the export needs of a tokenizer (`data.tokenizer.Tokenizer` has it)."""

    @property
    def bos_id(self) -> int | None: ...
    @property
    def eos_id(self) -> int | None: ...
    @property
    def pad_id(self) -> int | None: ...
    @property
    def prompt_prefix(self) -> tuple[int, ...]: ...
    @property
    def opening_id(self) -> int | None: ...
    @property
    def chat_templates(self) -> Mapping[str, str]: ...
    def save(self, folder: Path, *, model_max_length: int | None = None) -> None: ...


def export(
    model: AbstractLM,
    tokenizer: SavableTokenizer,
    folder: Path,
    *,
    manifest: Mapping[str, Any],
    results: Mapping[str, Any],
    also: Callable[[Path], None] = lambda folder: None,
    note: str | None = None,
) -> None:
    """Write `config.json`, `model.safetensors` (fp32), the tokenizer's files, `generation_config.json`, `lineage.json` and a README card.

    **Arguments:**

    - `manifest`: what the run was made of. Under `continued_from` it has what `train.lineage.continued_from` says of the model it began
      with, if there was one.
    - `results`: what it measured. `bits_per_byte` and `held_out_bytes` make the card's table; other figures stand in the lineage.
    - `also`: writes what else belongs into the folder, before it takes its place.
    - `note`: words that stand first on the card.
    """
    stages = lineage(manifest, results)
    with building(folder) as beside:
        write_model(in_dtype(model, "float32"), tokenizer, beside)
        also(beside)
        name, scores = folder.resolve().parent.name, run_evaluations(results)
        finish(beside, card_of(name, model, tokenizer, "float32", stages, scores, native=is_native(beside), note=note))


def run_evaluations(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What a run measured itself, in the card's shape."""
    found = {"held-out text": results} if "bits_per_byte" in results else {}
    found |= {f"held-out {name} text, {when}": of for when in ("before", "after") for name, of in results.get(when, {}).items()}
    return {
        task: {"metric": "bits per byte", "value": of["bits_per_byte"], "measured": "by the run"}
        | ({"bytes": of["held_out_bytes"]} if "held_out_bytes" in of else {})
        for task, of in found.items()
        if isinstance(of, Mapping) and "bits_per_byte" in of
    }


def card_of(
    name: str,
    model: AbstractLM,
    tokenizer: SavableTokenizer | None,
    dtype: str,
    stages: Sequence[Mapping[str, Any]],
    evaluations: Mapping[str, Mapping[str, Any]],
    **more: Any,
) -> Card:
    """The card of a model, with what model and tokenizer say themselves. `more`: other fields of `Card`."""
    facts = {"model_type": model.config.model_type, "parameters": model.n_params, **model.config.model_dump()}
    return Card(
        name=name,
        model=facts,
        dtype=dtype,
        stages=[dict(stage) for stage in stages],
        evaluations=evaluations,
        **({} if tokenizer is None else how_texts_begin(tokenizer, trained_here=stages[-1]["stage"] != GIVEN)),
        **more,
    )


def how_texts_begin(tokenizer: SavableTokenizer, *, trained_here: bool) -> dict[str, Any]:
    """What the card says to those who write prompts. Of a model that was given nobody told us how its texts began."""
    needs_bos = trained_here and not tokenizer.prompt_prefix and tokenizer.bos_id is not None and tokenizer.opening_id == tokenizer.bos_id
    itself = "as the tokenizer begins every text" if tokenizer.prompt_prefix else "which the tokenizer does not add by itself"
    words = f"In training a document began with token {tokenizer.opening_id}, {itself}." if trained_here else None
    return {"opening": words, "needs_bos": needs_bos, "chat": bool(tokenizer.chat_templates)}


@contextmanager
def building(folder: Path) -> Iterator[Path]:
    """A folder beside, which takes the other's place when all is well."""
    beside = folder.with_name(f".{folder.name}.building")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    yield beside
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)


def write_weights(model: AbstractLM, folder: Path, extra_config: Mapping[str, Any]) -> None:
    """Weights and config as `transformers` reads them, or, where it has no such model, as a folder of ours, which is said."""
    try:
        save_pretrained(model, folder, extra_config=extra_config)
    except NotInTransformers as reason:
        logger.info(f"written as a folder of ours, for lm.load_pretrained alone: {reason}")
        save_native(model, folder, extra_config=extra_config)


def write_model(model: AbstractLM, tokenizer: SavableTokenizer | None, folder: Path) -> None:
    """Weights, config, tokenizer and settings of generation, the arrays in the dtype they have."""
    ids = special_ids(tokenizer)
    write_weights(model, folder, ids)
    if tokenizer is not None:
        tokenizer.save(folder, model_max_length=model.config.context)
    generation = ids | {"do_sample": True, "temperature": 0.7, "top_p": 0.95, "max_length": model.config.context}
    write_json(folder / "generation_config.json", generation)


def finish(folder: Path, card: Card, evidence: Mapping[str, Any] | None = None) -> None:
    """Add the lineage, the card, and with it the digest of every file, so that later ones know what was written."""
    write_json(folder / LINEAGE_FILE, list(card.stages))
    (folder / CARD_FILE).write_text(render(card), encoding="utf-8")
    if evidence is not None:
        write_json(folder / EVIDENCE_FILE, {**evidence, "files": digests(folder)})


def digests(folder: Path) -> dict[str, str]:
    """The sha256 of every file of a folder but the record of evidence, by its path there."""
    found = {}
    for name in files_of(folder):
        if name != EVIDENCE_FILE:
            with (folder / name).open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def files_of(folder: Path) -> list[str]:
    """The paths in a folder, sorted, as a repository names them."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def in_dtype(model: AbstractLM, dtype: str) -> AbstractLM:
    """Every array of numbers, norms too."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if eqx.is_inexact_array(leaf) else leaf, model)


def special_ids(tokenizer: SavableTokenizer | None) -> dict[str, int]:
    """The keys of `config.json` that speak of tokens."""
    if tokenizer is None:
        return {}
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    return {name: value for name, value in ids.items() if value is not None}


def leaks(folder: Path, secrets: Sequence[str], places: Sequence[str | Path]) -> list[str]:
    """Where the folder's text (weights' own metadata too) holds a secret, a token of the Hub, or a path of this machine: `file: what`.

    **Arguments:**

    - `secrets`: texts that may stand nowhere, such as the token in use. They are not repeated in what is returned.
    - `places`: folders of this machine. The root of the file system is none.
    """
    named = {f"{Path(place)}" for place in places if len(Path(place).parts) > 1}
    patterns = {place: re.compile(rf"(?<![\w.-]){re.escape(place)}(?![\w.-])") for place in sorted(named)}
    found = []
    for name in files_of(folder):
        text = _text_of(folder / name)
        if any(secret in text for secret in secrets) or _TOKEN.search(text):
            found.append(f"{name}: a token of the Hub")
        if not name.endswith(_ANY_WORD):
            found += [f"{name}: {place}" for place, pattern in patterns.items() if pattern.search(text)]
    return found


def _text_of(file: Path) -> str:
    """A file's text; of safetensors the header, which may hold words."""
    with file.open("rb") as opened:
        if file.suffix == ".safetensors":
            return opened.read(int.from_bytes(opened.read(8), "little")).decode(errors="replace")
        return opened.read().decode(errors="replace")
