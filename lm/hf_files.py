"""Folders of safetensors, whole or in shards with an index: what lies in them, one tensor read, a plan of shards written.

safetensors' own reader maps the file into memory, and the pages it touched count as ours until it lets go; so each tensor is read by an
opening of its own, and nothing but that tensor is ever resident. Its own writer wants all tensors of a file at once; the format is a
header and the bytes behind it (https://huggingface.co/docs/safetensors/index#format), so ours is here and holds one.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}  # those a weight may have
NUMBERS = DTYPES | {"I8": np.dtype(np.int8), "U8": np.dtype(np.uint8)}  # and those packed weights are made of
_PICKLES = re.compile(r".*\.(bin|pt|pth|ckpt|pkl)(\.index\.json)?")


class Entry(NamedTuple):
    """A tensor of a file, before it is read."""

    key: str
    file: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors writes it, "BF16"


# ------------------------------------------------------------------------------------------- reading


def entries_of(folder: Path) -> dict[str, Entry]:
    """All tensors in a folder's safetensors, by name.

    **Raises:** `FileNotFoundError` where there are no safetensors, or the index names a file that is not there; `ValueError` for a file
    that is cut short, an index that leads out of the folder or to a tensor its file does not hold, and for pickles.
    """
    names = sorted(path.name for path in folder.iterdir())
    if INDEX_FILE in names and WEIGHTS_FILE in names:
        raise ValueError(f"{folder} holds both {WEIGHTS_FILE} and {INDEX_FILE}: which is the model? Remove the one that is not")
    if WEIGHTS_FILE in names:
        return _header(folder / WEIGHTS_FILE)
    if INDEX_FILE not in names:
        raise no_safetensors(str(folder), names)
    place = folder / INDEX_FILE
    weight_map = weight_map_of(place)
    files = {name: folder / name for name in sorted(set(weight_map.values()))}
    absent = [name for name, file in files.items() if not file.is_file()]
    if absent:
        raise FileNotFoundError(f"{place} names files that are not in {folder}: {', '.join(absent)}. Was the download or copy cut short?")
    headers = {name: _header(file) for name, file in files.items()}
    wrong = [f"{key} in {name}" for key, name in weight_map.items() if key not in headers[name]]
    if wrong:
        raise ValueError(f"{place} names tensors that their files do not hold:\n  " + "\n  ".join(wrong))
    found = {key: entry for header in headers.values() for key, entry in header.items()}
    return found | {key: headers[name][key] for key, name in weight_map.items()}


def weight_map_of(place: Path) -> dict[str, str]:
    """The file of each tensor, as an index has it."""
    weight_map = read_json(place).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{place} has no weight_map: expected an object that names the file of each tensor")
    outside = sorted({name for name in weight_map.values() if not re.fullmatch(r"[\w.-]+\.safetensors", name)})
    if outside:
        raise ValueError(
            f"{place} names {', '.join(map(repr, outside))}: expected names of .safetensors files in its own folder. Files elsewhere are "
            "not read: an index from somebody else could point at any file of yours"
        )
    return weight_map


def read_tensor(entry: Entry) -> np.ndarray:
    """The tensor, as it lies in the file."""
    with _open(entry.file) as tensors:
        return tensors.get_tensor(entry.key)


def no_safetensors(where: str, names: Iterable[str]) -> Exception:
    """The error for a folder or repository without them."""
    pickles = sorted(name for name in names if _PICKLES.fullmatch(name))
    if not pickles:
        return FileNotFoundError(f"{where} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}")
    return ValueError(
        f"{where} has its weights as pickles only ({', '.join(pickles[:3])}{' ...' if len(pickles) > 3 else ''}). Opening a pickle runs "
        "code of whoever wrote it, so none is read here; expected safetensors. If you trust it, convert it once with transformers: "
        "AutoModelForCausalLM.from_pretrained(FOLDER, weights_only=True).save_pretrained(OUT)"
    )


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not whole JSON ({error}): was the download or copy cut short?") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}: expected a JSON object")
    return content


def _header(file: Path) -> dict[str, Entry]:
    with _open(file) as tensors:
        slices = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118
        return {key: Entry(key, file, tuple(each.get_shape()), each.get_dtype()) for key, each in slices.items()}


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="np")
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file ({error}): was the download or copy cut short?") from error


# ------------------------------------------------------------------------------------------- writing


class Plan(NamedTuple):
    """A tensor that is to be written."""

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def n_bytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


def write_folder(folder: Path, plans: Mapping[str, Plan], config: Mapping[str, Any], max_shard_bytes: int) -> None:
    """Write `config.json` and the tensors, each made when its turn comes.

    All files are whole on the disk under other names before the first takes its place, and only then the shards of an earlier model are
    removed: the disk must have room for both.

    **Raises:** `OSError` if it has not; nothing is left of the attempt.
    """
    shards = _shards(plans, max_shard_bytes)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)] if len(shards) > 1 else [WEIGHTS_FILE]
    texts = {CONFIG_FILE: config}
    if len(shards) > 1:
        weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        total = sum(plan.n_bytes for plan in plans.values())
        texts[INDEX_FILE] = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    with _replacing(folder, [*names, *texts]) as beside:
        for name, keys in zip(names, shards, strict=True):
            with _words_for_a_full_disk(folder / name):
                _write_shard(beside[name], {key: plans[key] for key in keys})
        for name, content in texts.items():
            with _words_for_a_full_disk(folder / name):
                beside[name].write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for path in folder.iterdir():
        if path.name not in beside and (path.name in (WEIGHTS_FILE, INDEX_FILE) or SHARD.fullmatch(path.name)):
            path.unlink()


def _shards(plans: Mapping[str, Plan], max_shard_bytes: int) -> list[list[str]]:
    """The tensors of each file, in order; one larger than the limit has a file to itself."""
    shards: list[list[str]] = [[]]
    filled = 0
    for key, plan in plans.items():
        if shards[-1] and filled + plan.n_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += plan.n_bytes
    return shards


def _write_shard(file: Path, plans: Mapping[str, Plan]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers wants to read it there
    ordered = sorted(plans, key=lambda key: -plans[key].dtype.itemsize)  # wide types first, so that each tensor is aligned
    names = {dtype: name for name, dtype in NUMBERS.items()}
    start = 0
    for key in ordered:
        plan = plans[key]
        end = start + plan.n_bytes
        header[key] = {"dtype": names[plan.dtype], "shape": plan.shape, "data_offsets": [start, end]}
        start = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with file.open("wb") as out:
        out.write(len(raw).to_bytes(8, "little") + raw)
        for key in ordered:
            tensor = np.asarray(plans[key].make(), order="C")  # ascontiguousarray would give a number an axis
            assert (tensor.shape, tensor.dtype) == (plans[key].shape, plans[key].dtype), key
            out.write(tensor.reshape(-1).view(np.uint8).data)
        out.flush()
        os.fsync(out.fileno())


@contextmanager
def _replacing(folder: Path, names: list[str]) -> Iterator[dict[str, Path]]:
    """A hidden file beside each name; at the end of the `with` they take their places, or go if it raises. Those a killed process left go
    first: no two may save into one folder at a time."""
    for path in folder.glob(".*.writing"):
        path.unlink()
    beside = {name: folder / f".{name}.writing" for name in names}
    try:
        yield beside
        for name, path in beside.items():
            os.replace(path, folder / name)
    finally:
        for path in beside.values():
            path.unlink(missing_ok=True)


@contextmanager
def _words_for_a_full_disk(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        free_mb = shutil.disk_usage(file.parent).free / 1e6
        raise OSError(
            error.errno,
            f"{file} could not be written ({error.strerror}, {free_mb:.0f} MB free): is the disk full? What was there is unchanged",
        ) from error
