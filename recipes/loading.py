"""A model and its tokenizer, from any folder this project writes: a run, or a Hugging Face export."""

import json
from pathlib import Path

import equinox as eqx

from data.tokenizer import Tokenizer
from lm.base import AbstractLM
from lm.hf import abstract
from lm.models import ARCHITECTURES, load_pretrained
from train.checkpoint import Checkpoints, read_record


def load(folder: Path) -> tuple[AbstractLM, Tokenizer, str]:
    """The model, its tokenizer, and words on where it came from.

    **Arguments:**

    - `folder`: an export (`config.json`, `model.safetensors`), or a run: its export if it has ended, else its last checkpoint.
    """
    if (folder / "model.safetensors").is_file() or (folder / "model.safetensors.index.json").is_file():
        return load_pretrained(folder), Tokenizer.load(folder), f"{folder}"
    if not (folder / "checkpoints").is_dir():
        if (folder / "export").is_dir():
            return load(folder / "export")
        raise ValueError(
            f"{folder} is no run and no model: expected a folder with model.safetensors, or one with checkpoints/"
            + ("" if folder.exists() else " (it does not exist)")
        )
    if exported_step(folder) == newest_step(folder):
        return load(folder / "export")
    record = read_record(folder / "checkpoints")
    architecture = ARCHITECTURES[record["model_type"]]
    skeleton = abstract(architecture.model.init, architecture.config(**record["model"]))
    item = "average" if record["use_average"] and "average" in record["digests"] else "model"
    with Checkpoints(folder / "checkpoints") as checkpoints:
        found = checkpoints.restore({item: eqx.filter(skeleton, lambda leaf: hasattr(leaf, "shape"))})
    origin = f"{folder}, checkpoint of step {found.step}" + (", average of the weights" if item == "average" else "")
    return found.items[item], Tokenizer.load(folder / "tokenizer"), origin


def exported_step(run: Path) -> int | None:
    """The step of a run's export; `None` where there is none (`results.json` is written after it)."""
    results = run / "results.json"
    return json.loads(results.read_text(encoding="utf-8"))["steps"] if results.is_file() and (run / "export").is_dir() else None


def newest_step(run: Path) -> int | None:
    """The step of a run's newest checkpoint."""
    return max((int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit()), default=None)
