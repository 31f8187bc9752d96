"""A model and its tokenizer, from wherever they lie: a run of this project, a Hugging Face folder, a GGUF file, the Hub; with or without an
adapter on it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

import lm
from data.tokenizer import Tokenizer
from lm.adapter_files import ADAPTER_CONFIG
from lm.base import AbstractLM
from lm.hf import abstract
from lm.hf_files import INDEX_FILE, WEIGHTS_FILE
from lm.hub import folder_of
from lm.models import ARCHITECTURES, load_pretrained
from lm.native import quantisation_of
from lm.quant import KINDS
from recipes.command_line import CONFIG_FILE
from train.adapters import AdapterConfig, adapted, trained_part
from train.checkpoint import Checkpoints, read_record


def load(source: str | Path, *, revision: str | None = None) -> tuple[AbstractLM, Tokenizer, str]:
    """The model, its tokenizer, and words on where it came from.

    **Arguments:**

    - `source`: a run (its export if it has ended, else its last checkpoint), a Hugging Face folder, a GGUF file, or `"owner/name"` on the
      Hub; `"BASE+ADAPTER"` is one of these with the adapter of a folder merged in.
    - `revision`: of a repository on the Hub.

    **Raises:** `ValueError` or `FileNotFoundError` for what is none of these, and for an adapter of another base.
    """
    base, plus, adapter = str(source).rpartition("+")
    if plus and not Path(source).exists():
        model, tokenizer, origin = load(base, revision=revision)
        return lm.merge(lm.load_adapter(model, adapter)), tokenizer, f"{origin} with the adapter {adapter}"
    if is_gguf(source):
        return load_pretrained(source), Tokenizer.load(source), f"{source}"
    folder = Path(source)
    if not folder.is_dir():
        folder = folder_of(f"{source}", revision)  # says what is wrong with what is neither a folder nor on the Hub
    if holds_weights(folder):
        return load_pretrained(folder), Tokenizer.load(folder), f"{source}"
    if not (folder / "checkpoints").is_dir():
        if (folder / ADAPTER_CONFIG).is_file():
            belongs = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
            raise ValueError(f"{folder} is an adapter, of {belongs}: name its base before it, BASE+{folder}")
        if (folder / "export").is_dir():
            return load(folder / "export")
        raise ValueError(f"{folder} is no run and no model: expected a folder with model.safetensors, or one with checkpoints/")
    if exported_step(folder) == newest_step(folder):
        return load(folder / "export")
    record = read_record(folder / "checkpoints")
    if record.get("reward_model"):
        raise ValueError(f"{folder} trains a reward model and has not ended: its export/ can be opened once it has (--resume)")
    architecture = ARCHITECTURES[record["model_type"]]
    skeleton = abstract(architecture.model.init, architecture.config(**record["model"]))
    if "adapter" in record and record["adapter"]["kind"] != "none":
        return _adapted(folder, record, skeleton)
    item = "average" if record["use_average"] and "average" in record["digests"] else "model"
    with Checkpoints(folder / "checkpoints") as checkpoints:
        found = checkpoints.restore({item: eqx.filter(skeleton, lambda leaf: hasattr(leaf, "shape"))})
    origin = f"{folder}, checkpoint of step {found.step}" + (", average of the weights" if item == "average" else "")
    return found.items[item], Tokenizer.load(folder / "tokenizer"), origin


def _adapted(run: Path, record: Mapping[str, Any], skeleton: AbstractLM) -> tuple[AbstractLM, Tokenizer, str]:
    """The model of a run that trains adapters, merged. Its checkpoints hold no base: that is loaded anew from where the run had it.

    **Raises:** `ValueError` where there is none now, or another.
    """
    source = json.loads((run / CONFIG_FILE).read_text(encoding="utf-8"))["source"]
    loaded = jax.tree.leaves(load(source)[0])
    words = f"{run} trains adapters of {record['base']['name']}, and {source} is not that model"
    if [leaf.shape for leaf in loaded] != [leaf.shape for leaf in jax.tree.leaves(skeleton)]:
        raise ValueError(f"{words} as it was trained: arrays have other shapes (has the vocabulary grown?). Its export/ opens at the end")
    base = jax.tree.unflatten(jax.tree.structure(skeleton), [leaf.astype(jnp.float32) for leaf in loaded])
    if lm.Base.of(base, source).digest != record["base"]["digest"]:
        raise ValueError(f"{words}: it has other weights now. Bring back those the run began with")
    config = AdapterConfig(**record["adapter"])
    model = adapted(base, config, key=jr.key(0))
    trained, frozen = eqx.partition(model, trained_part(model, config, record.get("also", ())))
    item = "average" if record["use_average"] and "average" in record["digests"] else "trainable"
    with Checkpoints(run / "checkpoints") as checkpoints:
        found = checkpoints.restore({item: jax.eval_shape(lambda: trained)})
    origin = f"{run}, adapters of step {found.step} merged into {record['base']['name']}"
    merged = lm.dequantised(lm.merge(eqx.combine(found.items[item], frozen)))  # as the run will export it
    return merged, Tokenizer.load(run / "tokenizer"), origin


def kept_as(model: AbstractLM, weights: str, products: str) -> tuple[AbstractLM, str]:
    """A model to generate with, its matrices kept as `weights` says, and what they are.

    **Arguments:**

    - `weights`: a dtype, one of `lm.quant.KINDS`, or `auto`: as packed where they are, else in the dtype of `products`.
    - `products`: the dtype that packed matrices are multiplied in.

    **Raises:** `ValueError` for a packed model that is to be something else.
    """
    packed = quantisation_of(model)
    if packed:
        kinds = sorted({str(record["kind"]) for name, record in packed.items() if not name.startswith(("embed", "unembed"))})
        if weights not in ("auto", *kinds):
            raise ValueError(
                f"this model is packed as {' and '.join(kinds)}, and cannot be had as {weights}: take the one it was made from"
            )
        return lm.cast(model, jnp.dtype(products)), " and ".join(kinds)
    if weights in KINDS:
        return lm.quantised(model, weights, dtype=products), weights
    dtype = products if weights == "auto" else weights
    return lm.cast(model, jnp.dtype(dtype)), dtype


def is_gguf(source: str | Path) -> bool:
    return Path(source).suffix == ".gguf"


def is_run(source: str | Path) -> bool:
    return (Path(source) / "checkpoints").is_dir() or (Path(source) / "export").is_dir()


def holds_weights(folder: Path) -> bool:
    """Whether a folder is a model as Hugging Face keeps it."""
    return any((folder / name).is_file() for name in (WEIGHTS_FILE, INDEX_FILE))


def exported_step(run: Path) -> int | None:
    """The step of a run's export; `None` where there is none (`results.json` is written after it)."""
    results = run / "results.json"
    return json.loads(results.read_text(encoding="utf-8"))["steps"] if results.is_file() and (run / "export").is_dir() else None


def newest_step(run: Path) -> int | None:
    """The step of a run's newest checkpoint."""
    return max((int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit()), default=None)
