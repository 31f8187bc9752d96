"""Our own folder, for what no other library computes from its `config.json`: packed weights, settings `transformers` has no keys for, and a
drawing of our own (`lm.models.zmaj`).

    config.json            {"model_type": "zmaj", "zmaj": {"format": 1, "architecture": …, "config": …, "quantisation": …}, …}
    model.safetensors      every array under its path, blocks.3.attn.q_proj.weight.codes; or shards and an index

`model_type` is our own, so that nobody takes the folder for a model it knows. `quantisation` tells, by role, how each packed matrix was
packed (`lm.quant.Quantised.record`); where the layers of a role differ, by path.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from lm.adapters import adapters_of, nodes
from lm.base import AbstractLM, leaves_by_path, role
from lm.hf import MAX_SHARD_BYTES, Shardings, abstract, on_host, placed
from lm.hf_files import CONFIG_FILE, NUMBERS, Plan, entries_of, read_json, read_tensor, write_folder
from lm.layers import cast, with_matrices
from lm.quant import Quantised, repacked

MODEL_TYPE = "zmaj"
FORMAT = 1  # raised when an older reader would be misled


def save_native(
    model: AbstractLM, folder: Path, *, max_shard_bytes: int = MAX_SHARD_BYTES, extra_config: Mapping[str, Any] | None = None
) -> None:
    """Write our own folder; see `lm.save_native`."""
    if adapters_of(model):
        raise ValueError("this model has adapters: merge them (lm.merge), or write them to files of their own (lm.save_adapter)")
    leaves = leaves_by_path(model)
    plans = {path.replace("/", "."): Plan(leaf.shape, np.dtype(leaf.dtype), partial(on_host, leaf)) for path, leaf in leaves.items()}
    said = {
        "format": FORMAT,
        "architecture": model.config.model_type,
        "config": model.config.model_dump(mode="json"),
        "quantisation": quantisation_of(model),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_folder(folder, plans, {"model_type": MODEL_TYPE, MODEL_TYPE: said} | dict(extra_config or {}), max_shard_bytes)


def quantisation_of(model: AbstractLM) -> dict[str, dict[str, Any]]:
    """How each packed matrix was packed: under its role where all layers of that are alike, else under its path. Empty for a model that is
    not packed."""
    of_path = {path: node.record() for path, node in nodes(model, lambda node: isinstance(node, Quantised)).items()}
    here = {path.removesuffix("/weight") for path in leaves_by_path(model) if path.endswith("/weight")}  # not packed
    of_role: dict[str, list[dict[str, Any]]] = {}
    for path, record in of_path.items():
        of_role.setdefault(role(path), []).append(record)
    mixed = {role(f"{path}/weight") for path in here} | {name for name, found in of_role.items() if any(each != found[0] for each in found)}
    return {path if role(path) in mixed else role(path): record for path, record in of_path.items()}


def load_native(raw: Mapping[str, Any], architectures: Mapping[str, Any], folder: Path, *, dtype: Any, sharding: Shardings) -> AbstractLM:
    """Read our own folder, its `config.json` being `raw`.

    **Raises:** `ValueError` for a format or an architecture of another version, and for tensors that are not those of the config.
    """
    skeleton = native_skeleton(raw, architectures, folder)
    wanted = {path.replace("/", "."): (path, leaf) for path, leaf in leaves_by_path(skeleton).items()}
    entries = entries_of(folder)
    problems = [f"missing: {key}" for key in wanted.keys() - entries.keys()]
    problems += [f"left over: {key}" for key in entries.keys() - wanted.keys()]
    problems += [
        f"{key} is {entries[key].dtype} {entries[key].shape}, expected shape {leaf.shape}{'' if _is_float(leaf) else f' of {leaf.dtype}'}"
        for key, (_, leaf) in wanted.items()
        if key in entries and (entries[key].shape != leaf.shape or not _has_type(entries[key].dtype, leaf))
    ]
    if problems:
        raise ValueError(f"{folder} does not hold the model its config.json describes:\n  " + "\n  ".join(sorted(problems)))
    own = {f"{path}/{name}" for path, node in nodes(skeleton, _is_packed).items() for name in leaves_by_path(node)}
    arrays = []
    for key, (path, _) in wanted.items():
        array = read_tensor(entries[key])
        array = array if dtype is None or path in own else array.astype(dtype)
        arrays.append(placed(array, path, sharding))
    model = jax.tree.unflatten(jax.tree.structure(skeleton), arrays)
    return model if dtype is None else cast(model, dtype)


def native_skeleton(raw: Mapping[str, Any], architectures: Mapping[str, Any], folder: Path) -> AbstractLM:
    """The abstract tree of the model that a `config.json` of ours describes.

    **Raises:** `ValueError` for a format or an architecture of another version.
    """
    said = raw.get(MODEL_TYPE)
    if not isinstance(said, Mapping) or said.get("format") != FORMAT:
        found = said.get("format") if isinstance(said, Mapping) else None
        raise ValueError(f"{folder} is a folder of ours in format {found}; this version reads {FORMAT}")
    if said["architecture"] not in architectures:
        raise ValueError(f"{folder} holds the architecture {said['architecture']!r}; known are {', '.join(sorted(architectures))}")
    architecture = architectures[said["architecture"]]
    return _packed(abstract(architecture.model.init, architecture.config(**said["config"])), said["quantisation"])


def is_native(folder: Path) -> bool:
    """Whether a folder with a model in it is one of ours."""
    return read_json(folder / CONFIG_FILE).get("model_type") == MODEL_TYPE


def _is_packed(node: Any) -> bool:
    return isinstance(node, Quantised)


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _has_type(name: str, leaf: Any) -> bool:
    """Integers are what they are; floats may be of any width."""
    found = NUMBERS.get(name)
    return found is not None and (jnp.issubdtype(found, jnp.floating) if _is_float(leaf) else found == leaf.dtype)


def _packed(skeleton: AbstractLM, quantisation: Mapping[str, Mapping[str, Any]]) -> AbstractLM:
    """The abstract tree with the matrices packed that the file says."""

    def of(path: str, weight: Any) -> Any:
        record = quantisation.get(f"{path}/weight", quantisation.get(role(f"{path}/weight")))
        return weight if record is None else repacked(weight, record)

    return eqx.filter_eval_shape(lambda model: with_matrices(model, of), skeleton)
