"""What is on disk for a step of `train.checkpoint`, read and believed only if it agrees with its seal.

A step's folder holds, beside its arrays, a `record` (JSON) and a `seal`: a digest of every leaf and of the record. `read_sealed` reads
both, `newest_sound` takes the newest step that can be read, `check_target` compares the tree a caller asks for with what was saved.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree
from loguru import logger

from lm.digests import digest_of, layout, path_of

FORMAT = 1  # of the seal; raised when an older reader would be misled
RECORD, SEAL = "record", "seal"

_Value = TypeVar("_Value")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none could be read; the message says which and what to do."""


class Damage(Exception):
    """A step is not what was saved; the message says in what."""


def newest_sound(folder: Path, steps: list[int], read: Callable[[int], _Value], damaged: dict[int, str]) -> _Value:
    """Read the newest step that can be read; write down in `damaged` those that cannot, and why."""
    for step in reversed(steps):
        trouble = None
        try:
            value = read(step)
        except Damage as error:
            trouble = str(error)
        if _everywhere(trouble is None):
            return value
        damaged[step] = trouble or "another process finds it so"
        logger.error("checkpoint of step {} in {} is damaged: {}", step, folder, damaged[step])
        if step != steps[0]:
            logger.error("falling back to the step before it")
    tried = "; ".join(f"step {step}: {damaged[step]}" for step in reversed(steps))
    others = [step for step in steps_in(folder) if step not in steps]
    raise CheckpointError(f"no sound checkpoint in {folder}. Tried {tried}. Not tried: {others or 'none'}.")


def read_sealed(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, str]]]:
    """A step's record and its leaves' digests, each checked by the other."""
    read = {}
    for name in (RECORD, SEAL):
        try:
            read[name] = json.loads((folder / name / "metadata").read_text(encoding="utf-8"))  # as Orbax's JSON handler names it
        except (OSError, ValueError) as error:
            raise Damage(f"its {name} cannot be read ({first_line(error)})") from error
    record, seal = read[RECORD], read[SEAL]
    if isinstance(seal, dict) and seal.get("format", FORMAT) != FORMAT:
        raise Damage(f"its seal has format {seal['format']}, this version reads {FORMAT}")
    try:
        digests = {name: digest_of(listed) for name, listed in seal["leaves"].items()}
        sound = seal["record"] == digest_of(record) and record["digests"] == digests
    except (KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise Damage("its record and its seal do not agree")
    return record, seal["leaves"]


def check_target(what: str, target: PyTree, saved: dict[str, str]) -> None:
    """That the caller's tree is the saved one; that it is not is the caller's mistake, and no damage."""
    given = {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(target)}
    if strange := [path for path, leaf in given.items() if not hasattr(leaf, "dtype")]:
        raise ValueError(f"{what}: the tree to restore into may hold only arrays and ShapeDtypeStructs, but {strange[:5]} are neither.")
    asked = {path: layout(leaf) for path, leaf in given.items()}
    held = {path: value.rpartition(" ")[0] for path, value in saved.items()}
    wrong = [f"{path} is {held[path]}, not {asked[path]}" for path in asked.keys() & held.keys() if asked[path] != held[path]]
    wrong += [f"{path} was not saved" for path in asked.keys() - held.keys()]
    wrong += [f"{path} ({held[path]}) was saved but is not asked for" for path in held.keys() - asked.keys()]
    if wrong:
        shown = "; ".join(sorted(wrong)[:10]) + (f"; and {len(wrong) - 10} more" if len(wrong) > 10 else "")
        raise ValueError(f"{what} is not the tree asked for: {shown}. Build the tree from the config in the record.")
    wide = [path for path, leaf in given.items() if not isinstance(leaf, np.ndarray) and leaf.dtype.itemsize == 8]
    wide = [path for path in wide if not jnp.issubdtype(given[path].dtype, jax.dtypes.prng_key)]
    if wide and not jax.config.read("jax_enable_x64"):
        raise ValueError(f"{what}: {wide[:5]} are of 64 bits, which jax does not hold: ask for numpy arrays there.")


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []


def first_line(error: Exception) -> str:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if len(line) < 300 else line[:300] + "..."


def _everywhere(fine: bool) -> bool:
    """Whether all processes say so: they must fall back to the same step."""
    if jax.process_count() == 1:
        return fine
    return bool(np.all(multihost_utils.process_allgather(np.array(fine))))
