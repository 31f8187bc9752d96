"""Hugging Face folders: `config.json` and safetensors ⇄ the tree, driven by each architecture's own table of names.

The table maps the *role* of a leaf (`attn.q_proj.weight`) to the key in the file (`model.layers.{i}.self_attn.q_proj.weight`); loading
reads it one way, saving the other. Our weights have Hugging Face's layout, so most rows rename and nothing else; the others are
`transposed`, or a `part` of a fused tensor, or both.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lm.base import AbstractLM, leaves_by_path, role

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class Stored:
    """How the file keeps one of our leaves, where it does more than rename it."""

    key: str  # in the file; {i} is the layer
    transposed: bool = False  # kept (in, out)
    part: int | None = None  # which piece of a fused tensor, counted along its output axis; sizes are those of the leaves


def transposed(stored: str | Stored) -> Stored:
    """A matrix the file keeps as (in, out), such as those of GPT-2's Conv1D."""
    return replace(_stored(stored), transposed=True)


def part(i: int, stored: str | Stored) -> Stored:
    """Piece `i` of a tensor that holds several of our leaves one after the other, such as queries, keys and values."""
    return replace(_stored(stored), part=i)


def _stored(row: str | Stored) -> Stored:
    return row if isinstance(row, Stored) else Stored(row)


Names = Mapping[str, str | Stored]  # role of a leaf → how the file keeps it


def stored_leaf(path: str, names: Names) -> Stored:
    """The file's key for one of our leaves, and how it lies there."""
    this_role = role(path)
    if this_role not in names:
        raise ValueError(f"leaf {path} (role {this_role}) has no Hugging Face name; the table knows {sorted(names)}")
    layer = re.match(r"blocks/(\d+)/", path)
    stored = _stored(names[this_role])
    return replace(stored, key=stored.key.format(i=layer.group(1) if layer else ""))


def _by_key(tree: Any, names: Names) -> dict[str, list[tuple[str, Stored, Any]]]:
    """(path, how stored, leaf) of the leaves behind each key of the file, the pieces of a fused tensor in order."""
    found: dict[str, list[tuple[str, Stored, Any]]] = {}
    for path, leaf in leaves_by_path(tree).items():
        stored = stored_leaf(path, names)
        found.setdefault(stored.key, []).append((path, stored, leaf))
    return {key: sorted(leaves, key=lambda each: each[1].part or 0) for key, leaves in found.items()}


def _file_shape(leaves: list[tuple[str, Stored, Any]]) -> tuple[int, ...]:
    """The shape a tensor of the file must have to hold these leaves."""
    first = leaves[0][2].shape
    shape = (sum(leaf.shape[0] for _, _, leaf in leaves), *first[1:])
    return shape[::-1] if leaves[0][1].transposed else shape


def abstract(init: Callable[..., AbstractLM], config: Any) -> AbstractLM:
    """The tree without its numbers: every array a `jax.ShapeDtypeStruct`."""
    return eqx.filter_eval_shape(lambda key: init(config, key=key), jr.key(0))


def load_weights(
    skeleton: AbstractLM, names: Names, folder: Path, *, dtype: Any = None, current_key: Callable[[str], str | None] = lambda key: key
) -> AbstractLM:
    """Fill an abstract tree from a folder's safetensors, one tensor at a time.

    **Arguments:**

    - `current_key`: today's name of a key found in a file, for families whose old files have others; `None` for a tensor that is no weight.

    **Raises:** `ValueError` listing every tensor that is missing, left over, or of another shape.
    """
    found = {current_key(key): (key, file) for key, file in _files_of(folder).items()}
    wanted = _by_key(skeleton, names)
    problems = [f"missing: {key} {_file_shape(leaves)}" for key, leaves in wanted.items() if key not in found]
    problems += [f"left over: {key}" for key in found if key is not None and key not in wanted]
    loaded: dict[str, jax.Array] = {}
    for file in sorted({file for _, file in found.values()}):
        with _open(file) as tensors:
            for key, leaves in wanted.items():
                in_file, where = found.get(key, ("", None))
                if where != file:
                    continue
                shape = tuple(tensors.get_slice(in_file).get_shape())
                if shape != _file_shape(leaves):
                    problems.append(f"shape: {key} is {shape}, expected {_file_shape(leaves)}")
                elif not problems:
                    loaded |= _leaves_of(tensors.get_tensor(in_file), leaves, dtype)
    if problems:
        raise ValueError(f"{folder} does not hold the model its config.json describes:\n  " + "\n  ".join(problems))
    return jax.tree.unflatten(jax.tree.structure(skeleton), [loaded[path] for path in leaves_by_path(skeleton)])


def _leaves_of(tensor: np.ndarray, leaves: list[tuple[str, Stored, Any]], dtype: Any) -> dict[str, jax.Array]:
    """Our leaves, cut from a tensor of the file."""
    whole = tensor.T if leaves[0][1].transposed else tensor
    pieces = np.split(whole, np.cumsum([leaf.shape[0] for _, _, leaf in leaves])[:-1]) if len(leaves) > 1 else [whole]
    return {path: jnp.asarray(piece, dtype=dtype) for (path, _, _), piece in zip(leaves, pieces, strict=True)}


def save_folder(model: AbstractLM, names: Names, folder: Path, *, dtype: Any = None, extra_config: Mapping[str, Any] | None = None) -> None:
    """Write `config.json` and `model.safetensors`; `dtype=None` keeps the arrays' own. `extra_config` adds token ids and the like."""
    config = model.config.to_hf()  # first: it may refuse
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for key, leaves in _by_key(model, names).items():
        pieces = [np.asarray(leaf if dtype is None else leaf.astype(dtype)) for _, _, leaf in leaves]
        whole = np.concatenate(pieces) if len(pieces) > 1 else pieces[0]
        tensors[key] = np.ascontiguousarray(whole.T) if leaves[0][1].transposed else whole
    try:
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{folder / WEIGHTS_FILE} could not be written ({error}): is the disk full?") from error
    stored = str(next(iter(tensors.values())).dtype)
    config = config | {"dtype": stored} | dict(extra_config or {})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not whole JSON ({error}): was the download or copy cut short?") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}: expected a JSON object")
    return content


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="np")
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file ({error}): was the download or copy cut short?") from error


def _files_of(folder: Path) -> dict[str, Path]:
    """Which file holds which tensor."""
    if (folder / INDEX_FILE).is_file():
        weight_map = read_json(folder / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{folder / INDEX_FILE} has no weight_map: expected an object that names the file of each tensor")
        return {key: folder / name for key, name in weight_map.items()}
    if not (folder / WEIGHTS_FILE).is_file():
        raise FileNotFoundError(f"{folder} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}")
    with _open(folder / WEIGHTS_FILE) as tensors:
        return dict.fromkeys(tensors.keys(), folder / WEIGHTS_FILE)
