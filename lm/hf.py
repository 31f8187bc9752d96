"""Hugging Face folders: `config.json` and safetensors ⇄ the tree, driven by each architecture's own table of names.

The table maps the *role* of a leaf (`attn.q_proj.weight`) to the key in the file (`model.layers.{i}.self_attn.q_proj.weight`); loading
reads it one way, saving the other. Our weights have Hugging Face's layout, so most rows rename and nothing else; the others are any of
`transposed`, a `part` of a fused tensor, an `expert` a tensor, and, on the way in only, `packed`.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

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


class Packed(NamedTuple):
    """Another form a tensor may have in the file: several tensors it is computed from."""

    suffixes: tuple[str, ...]  # of their keys, each behind the tensor's own
    decode: Callable[..., np.ndarray]  # their arrays, in that order → the tensor


@dataclass(frozen=True)
class Stored:
    """How the file keeps one of our leaves, where it does more than rename it."""

    key: str  # in the file; {i} is the layer, {e} the expert
    transposed: bool = False  # kept (in, out): the last two axes change places
    part: int | None = None  # which piece of a fused tensor, counted along its output axis; sizes are those of the leaves
    rows: int | str | None = None  # where pieces take turns: how many rows of this one follow each other, or the config's field; None: all
    packed: Packed | None = None  # read where the file has not the tensor itself


def transposed(stored: str | Stored) -> Stored:
    """A matrix the file keeps as (in, out), such as those of GPT-2's Conv1D."""
    return replace(_stored(stored), transposed=True)


def part(i: int, stored: str | Stored, *, rows: int | str | None = None) -> Stored:
    """Piece `i` of a tensor that holds several of our leaves, such as queries, keys and values. One lies after the other, or they take
    turns: `rows` of the first, as many of the second, and so on over and over (gate and up of gpt-oss with `rows=1`). Where the config
    has to say it, `rows` names its field (queries, keys and values of GPT-NeoX with `rows="head_dim"`: a head's stand together)."""
    return replace(_stored(stored), part=i, rows=rows)


def expert(stored: str | Stored) -> Stored:
    """A leaf with an axis of experts in front, of which the file keeps each under its own key: `{e}` counts them from 0."""
    stored = _stored(stored)
    if "{e}" not in stored.key:
        raise ValueError(f"expert({stored.key!r}): expected a key with {{e}} where the number of the expert stands")
    return stored


def packed(stored: str | Stored, suffixes: tuple[str, ...], decode: Callable[..., np.ndarray]) -> Stored:
    """A tensor that a file may hold as several others, such as MXFP4's `…_blocks` and `…_scales`. A file with the tensor itself is read as
    ever; else `decode` gets the arrays of `key + suffix`, as they are in the file, and returns what would lie under `key`. Saved is the
    tensor itself."""
    return replace(_stored(stored), packed=Packed(suffixes, decode))


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
    return replace(stored, key=stored.key.replace("{i}", layer.group(1) if layer else ""))


class Piece(NamedTuple):
    """What a tensor of the file holds of a leaf: all of it, or one expert."""

    path: str
    stored: Stored
    leaf: Any  # array or jax.ShapeDtypeStruct
    expert: int | None
    rows: int | None  # as `Stored.rows`, the config asked

    @property
    def shape(self) -> tuple[int, ...]:
        return self.leaf.shape if self.expert is None else self.leaf.shape[1:]

    @property
    def axis(self) -> int:
        """Of the outputs: a bias ends with them, a weight has its inputs behind."""
        return -1 if len(self.shape) == 1 or self.path.endswith("bias") else -2

    def in_turns(self, array: np.ndarray) -> np.ndarray:
        """(turns, rows, ...): outputs in front, as this piece takes its turns."""
        front = np.moveaxis(array, self.axis, 0)
        return front.reshape(-1, self.rows or len(front), *front.shape[1:])

    def from_turns(self, array: np.ndarray) -> np.ndarray:
        return np.moveaxis(array.reshape(-1, *array.shape[2:]), 0, self.axis)


def by_key(tree: Any, names: Names) -> dict[str, list[Piece]]:
    """The pieces behind each key of the file, those of a fused tensor in order."""
    found: dict[str, list[Piece]] = {}
    for path, leaf in leaves_by_path(tree).items():
        stored = stored_leaf(path, names)
        rows = getattr(tree.config, stored.rows) if isinstance(stored.rows, str) else stored.rows
        for e in range(leaf.shape[0]) if "{e}" in stored.key else (None,):
            found.setdefault(stored.key.replace("{e}", str(e)), []).append(Piece(path, stored, leaf, e, rows))
    return {key: sorted(pieces, key=lambda piece: piece.stored.part or 0) for key, pieces in found.items()}


def _file_shape(pieces: list[Piece]) -> tuple[int, ...]:
    """The shape a tensor of the file must have to hold these pieces."""
    shape = list(pieces[0].shape)
    shape[pieces[0].axis] = sum(piece.shape[piece.axis] for piece in pieces)
    if pieces[0].stored.transposed:
        shape[-2:] = shape[:-3:-1]
    return tuple(shape)


def _cut(tensor: np.ndarray, pieces: list[Piece]) -> list[np.ndarray]:
    """A tensor of the file → what it holds of each leaf."""
    whole = tensor.swapaxes(-1, -2) if pieces[0].stored.transposed else tensor
    if len(pieces) == 1:
        return [whole]
    sizes = [piece.rows or piece.shape[piece.axis] for piece in pieces]
    front = np.moveaxis(whole, pieces[0].axis, 0)
    turns = np.split(front.reshape(-1, sum(sizes), *front.shape[1:]), np.cumsum(sizes)[:-1], axis=1)
    return [piece.from_turns(turn) for piece, turn in zip(pieces, turns, strict=True)]


def _joined(arrays: list[np.ndarray], pieces: list[Piece]) -> np.ndarray:
    """What it holds of each leaf → a tensor of the file."""
    whole = arrays[0]
    if len(pieces) > 1:
        turns = [piece.in_turns(array) for piece, array in zip(pieces, arrays, strict=True)]
        whole = pieces[0].from_turns(np.concatenate(turns, axis=1))
    return np.ascontiguousarray(whole.swapaxes(-1, -2) if pieces[0].stored.transposed else whole)


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
    wanted = by_key(skeleton, names)
    sources = {key: _sources(key, pieces[0].stored.packed, found) for key, pieces in wanted.items()}
    known = {source for keys in sources.values() for source in keys}
    problems = [
        f"missing: {source}" + (f" {_file_shape(wanted[key])}" if source == key else "")
        for key, keys in sources.items()
        for source in keys
        if source not in found
    ]
    problems += [f"left over: {key}" for key in found if key is not None and key not in known]
    for key, pieces in wanted.items():
        if key in found and (shape := _shape_of(*found[key])) != _file_shape(pieces):
            problems.append(f"shape: {key} is {shape}, expected {_file_shape(pieces)}")
    if problems:
        raise ValueError(f"{folder} does not hold the model its config.json describes:\n  " + "\n  ".join(problems))

    loaded: dict[str, Any] = {}
    for key, pieces in wanted.items():
        arrays = [_read(*found[source]) for source in sources[key]]
        decode = pieces[0].stored.packed.decode if pieces[0].stored.packed and key not in found else None
        tensor = decode(*arrays) if decode else arrays[0]
        if tensor.shape != _file_shape(pieces):
            raise ValueError(f"{', '.join(sources[key])} in {folder} make {tensor.shape}, expected {_file_shape(pieces)}")
        for piece, array in zip(pieces, _cut(tensor, pieces), strict=True):
            if piece.expert is None:
                loaded[piece.path] = jnp.asarray(array, dtype=dtype)
                continue
            if piece.path not in loaded:
                loaded[piece.path] = np.empty(piece.leaf.shape, array.dtype if dtype is None else dtype)
            loaded[piece.path][piece.expert] = array
            if piece.expert == piece.leaf.shape[0] - 1:
                loaded[piece.path] = jnp.asarray(loaded[piece.path])
    return jax.tree.unflatten(jax.tree.structure(skeleton), [loaded[path] for path in leaves_by_path(skeleton)])


def _sources(key: str, packed: Packed | None, found: Mapping[Any, Any]) -> list[str]:
    """The tensors of the file that make the one we want."""
    if packed is None or key in found or not any(key + suffix in found for suffix in packed.suffixes):
        return [key]
    return [key + suffix for suffix in packed.suffixes]


def _shape_of(key: str, file: Path) -> tuple[int, ...]:
    with _open(file) as tensors:
        return tuple(tensors.get_slice(key).get_shape())


def _read(key: str, file: Path) -> np.ndarray:
    with _open(file) as tensors:
        return tensors.get_tensor(key)


def save_folder(model: AbstractLM, names: Names, folder: Path, *, dtype: Any = None, extra_config: Mapping[str, Any] | None = None) -> None:
    """Write `config.json` and `model.safetensors`; `dtype=None` keeps the arrays' own. `extra_config` adds token ids and the like."""
    config = model.config.to_hf()  # first: it may refuse
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for key, pieces in by_key(model, names).items():
        arrays = [np.asarray(piece.leaf if piece.expert is None else piece.leaf[piece.expert]) for piece in pieces]
        tensors[key] = _joined([array if dtype is None else array.astype(dtype) for array in arrays], pieces)
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
