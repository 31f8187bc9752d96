"""Hugging Face folders: `config.json` and safetensors ⇄ the tree, driven by each architecture's own table of names.

The table maps the *role* of a leaf (`attn.q_proj.weight`) to the key in the file (`model.layers.{i}.self_attn.q_proj.weight`); loading
reads it one way, saving the other. Our weights have Hugging Face's layout, so most rows rename and nothing else; the others are any of
`transposed`, a `part` of a fused tensor, an `expert` a tensor, and, on the way in only, `packed`.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from lm.base import AbstractLM, leaves_by_path, role
from lm.hf_files import DTYPES, Entry, Plan, entries_of, read_tensor, write_folder

MAX_SHARD_BYTES = 5_000_000_000  # of a file, as the Hub's other writers have it

Shardings = jax.sharding.Sharding | Callable[[str], jax.sharding.Sharding] | None  # one for all arrays, or by the path of each


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
    def is_last(self) -> bool:
        return self.expert is None or self.expert == self.leaf.shape[0] - 1

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


def cut(tensor: np.ndarray, pieces: list[Piece]) -> list[np.ndarray]:
    """A tensor of the file → what it holds of each leaf."""
    whole = tensor.swapaxes(-1, -2) if pieces[0].stored.transposed else tensor
    if len(pieces) == 1:
        return [whole]
    sizes = [piece.rows or piece.shape[piece.axis] for piece in pieces]
    front = np.moveaxis(whole, pieces[0].axis, 0)
    turns = np.split(front.reshape(-1, sum(sizes), *front.shape[1:]), np.cumsum(sizes)[:-1], axis=1)
    return [piece.from_turns(turn) for piece, turn in zip(pieces, turns, strict=True)]


def joined(arrays: list[np.ndarray], pieces: list[Piece]) -> np.ndarray:
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
    skeleton: AbstractLM,
    names: Names,
    folder: Path,
    *,
    dtype: Any = None,
    sharding: Shardings = None,
    current_key: Callable[[str], str | None] = lambda key: key,
) -> AbstractLM:
    """Fill an abstract tree from a folder's safetensors, one tensor at a time: the most that is held is the arrays as they will be, and one
    tensor as it lies in the file (of a `packed` one also what unpacking takes).

    **Arguments:**

    - `dtype`: of the arrays; `None` keeps the file's.
    - `sharding`: where each array goes, by its path; one for all, or `None` for the default device.
    - `current_key`: today's name of a key found in a file, for families whose old files have others; `None` for a tensor that is no weight.

    **Raises:** `ValueError` listing every tensor that is missing, left over, or of another shape or dtype.
    """
    found = {current_key(key): entry for key, entry in entries_of(folder).items()}
    wanted = by_key(skeleton, names)
    sources = {key: _sources(key, pieces[0].stored.packed, found) for key, pieces in wanted.items()}
    problems = _problems(found, wanted, sources, _tied_twin(names, wanted, found))
    if problems:
        raise ValueError(f"{folder} does not hold the model its config.json describes:\n  " + "\n  ".join(problems))

    loaded: dict[str, jax.Array] = {}
    filling: dict[str, np.ndarray] = {}  # of experts, until all are in
    for key, pieces in wanted.items():
        tensor = _tensor_of(key, pieces, {source: found[source] for source in sources[key]})
        for piece, array in zip(pieces, cut(tensor, pieces), strict=True):
            if piece.path not in filling:
                filling[piece.path] = _buffer(piece.leaf.shape, np.dtype(tensor.dtype if dtype is None else dtype))
            filling[piece.path][... if piece.expert is None else piece.expert] = array
            if piece.is_last:
                loaded[piece.path] = placed(filling.pop(piece.path), piece.path, sharding)
        del tensor, array  # before the next is read
    return jax.tree.unflatten(jax.tree.structure(skeleton), [loaded[path] for path in leaves_by_path(skeleton)])


def _sources(key: str, packed: Packed | None, found: Mapping[Any, Entry]) -> list[str]:
    """The tensors of the file that make the one we want."""
    if packed is None or key in found or not any(key + suffix in found for suffix in packed.suffixes):
        return [key]
    return [key + suffix for suffix in packed.suffixes]


def _problems(
    found: Mapping[str | None, Entry], wanted: Mapping[str, list[Piece]], sources: Mapping[str, list[str]], twin: tuple[str, str] | None
) -> list[str]:
    """All that is wrong with a folder's tensors, a line each."""
    missing = [
        f"missing: {source}" + (f" {_file_shape(wanted[key])}" if source == key else "")
        for key, keys in sources.items()
        for source in keys
        if source not in found
    ]
    known = {source for keys in sources.values() for source in keys} | ({twin[0]} if twin else set())
    left_over = [f"left over: {key}" for key in found if key is not None and key not in known]
    here = {key: (found[key], _file_shape(pieces)) for key, pieces in wanted.items() if key in found}
    shapes = [f"shape: {key} is {entry.shape}, expected {shape}" for key, (entry, shape) in here.items() if entry.shape != shape]
    dtypes = [
        f"dtype: {key} is {entry.dtype}, expected one of {', '.join(DTYPES)}"
        for key, (entry, _) in here.items()
        if entry.dtype not in DTYPES
    ]
    problems = missing + left_over + shapes + dtypes
    if not problems and twin and not np.array_equal(read_tensor(found[twin[0]]), read_tensor(found[twin[1]])):
        problems.append(f"{twin[0]} is not equal to {twin[1]}, though config.json says they are one (tie_word_embeddings)")
    return problems


def _tied_twin(names: Names, wanted: Mapping[str, Any], found: Mapping[Any, Entry]) -> tuple[str, str] | None:
    """The keys of unembedding and embedding, where a file of a model in which they are one holds both."""
    embed, unembed = (_stored(names[role]).key if role in names else "" for role in ("embed.weight", "unembed.weight"))
    return (unembed, embed) if unembed in found and unembed not in wanted and embed in found else None


def _tensor_of(key: str, pieces: list[Piece], entries: Mapping[str, Entry]) -> np.ndarray:
    """The tensor that holds these pieces, unpacked if the file has not it but what makes it."""
    arrays = [read_tensor(entry) for entry in entries.values()]
    form = pieces[0].stored.packed
    tensor = arrays[0] if form is None or key in entries else form.decode(*arrays)
    if tensor.shape != _file_shape(pieces):
        raise ValueError(f"{', '.join(entries)} make a tensor of shape {tensor.shape}, expected {_file_shape(pieces)}")
    return tensor


def _buffer(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that begins where a CPU device takes it over as it is; elsewhere it would be copied, and held twice."""
    n_bytes = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(n_bytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + n_bytes].view(dtype).reshape(shape)


def placed(array: np.ndarray, path: str, sharding: Shardings) -> jax.Array:
    """An array where the sharding wants it."""
    where = sharding(path) if callable(sharding) else sharding
    return jax.device_put(array) if where is None else jax.make_array_from_callback(array.shape, where, lambda index: array[index])


def save_folder(
    model: AbstractLM,
    names: Names,
    folder: Path,
    *,
    dtype: Any = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    extra_config: Mapping[str, Any] | None = None,
) -> None:
    """Write `config.json` and `model.safetensors`, or shards with their index; `dtype=None` keeps the arrays' own. `extra_config` adds
    token ids and the like."""
    config = model.config.to_hf()  # first: it may refuse
    plans = {}
    for key, pieces in by_key(model, names).items():
        stored = np.dtype(pieces[0].leaf.dtype if dtype is None else dtype)
        if stored not in DTYPES.values():
            raise ValueError(f"{key} would be written as {stored}, expected one of {', '.join(map(str, DTYPES.values()))}: give dtype=")
        plans[key] = Plan(_file_shape(pieces), stored, partial(_gathered, pieces, stored))
    folder.mkdir(parents=True, exist_ok=True)
    config = config | {"dtype": str(next(iter(plans.values())).dtype)} | dict(extra_config or {})
    write_folder(folder, plans, config, max_shard_bytes)


def _gathered(pieces: list[Piece], dtype: np.dtype) -> np.ndarray:
    """The tensor of the file that holds these pieces."""
    return joined([on_host(piece.leaf, piece.expert).astype(dtype, copy=False) for piece in pieces], pieces)


def on_host(leaf: Any, expert: int | None = None) -> np.ndarray:
    """The numbers of a leaf, or of one expert. An array keeps for good the copy it once gave to the host, so one that lies elsewhere is
    asked through a copy."""
    if isinstance(leaf, jax.Array) and [device.platform for device in leaf.devices()] != ["cpu"]:
        return np.asarray(jnp.copy(leaf) if expert is None else jax.lax.dynamic_index_in_dim(leaf, expert, keepdims=False))
    return np.asarray(leaf)[... if expert is None else expert]
