"""Checkpoints that can be believed.

`Checkpoints` saves named trees of arrays (`model`, `optimizer`, ...) and a `record` (JSON) for a step, in the
background, and brings the newest sound one back. Orbax writes and reads the arrays; it keeps no checksum, so a flipped
byte would come back as a wrong weight. Beside each step therefore stands a `seal` (`train.seals`): a digest of every leaf
and of the record. What does not agree with its seal is *damaged*: it is reported, skipped, and set aside before the next save,
never deleted and never used.

    with Checkpoints("runs/a") as checkpoints:
        checkpoints.save(100, {"model": params, "optimizer": optimizer_state}, {"config": config}, metric=2.71)
        restored = checkpoints.restore({"model": eqx.filter_eval_shape(...)})

On disk a step is `<folder>/<step>/<item>`, written under another name and renamed when whole: a killed process leaves
the earlier steps untouched.
"""

import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jaxtyping import PyTree
from loguru import logger

from lm.digests import digest_of, has_no_elements, leaf_digests
from train.seals import FORMAT, RECORD, SEAL, CheckpointError, Damage, check_target, first_line, newest_sound, read_sealed, steps_in

_TMP = ".orbax-checkpoint-tmp"  # how Orbax ends the name of a step that is not yet whole
_policies = ocp.checkpoint_managers.preservation_policy


@dataclass(frozen=True)
class Restored:
    """What came back."""

    step: int
    items: dict[str, PyTree]
    record: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run. Use it in a `with`: leaving it, also by an exception, waits for the last save."""

    def __init__(self, folder: str | os.PathLike[str], *, keep_latest: int = 2, keep_best: int = 1) -> None:
        """**Arguments:**

        - `folder`: made by the first save; reading never makes or changes anything.
        - `keep_latest`: how many of the newest steps to keep. They are kept whatever their metric.
        - `keep_best`: how many steps to keep, besides, for the smallest metric. One saved without a metric does not count."""
        if keep_latest < 1 or keep_best < 0:
            raise ValueError(f"keep_latest must be at least 1 and keep_best at least 0, got {keep_latest} and {keep_best}.")
        self.folder = Path(folder).absolute()
        self._damaged: dict[int, str] = {}  # met by restore, to be set aside by the next save: step -> what is wrong
        self._writing: int | None = None  # the step saved last, perhaps still in the background
        best = _policies.BestN(get_metric_fn=_rank, reverse=True, n=keep_best, keep_checkpoints_without_metrics=False)
        _quiet_orbax()
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                create=False,
                # Orbax's own best_fn with max_to_keep would delete the newest step when it is not among the best;
                # given a policy, best_fn only makes it write the metrics down.
                preservation_policy=_policies.AnyPreservationPolicy([_policies.LatestN(keep_latest), best]),
                best_fn=_rank,
                best_mode="min",
            ),
        )

    def save(self, step: int, items: dict[str, PyTree], record: dict[str, Any], *, metric: float | None = None) -> None:
        """Save a step in the background; the arrays may be donated or overwritten as soon as this returns.

        A failed save is raised by the next `save`, `wait` or `close`. A step that is there already with equal items is
        left as it is; with other items it is set aside as `replaced-<step>`, and so are later steps, which belong to a
        course of training that this one leaves.

        **Arguments:**

        - `step`: the number of updates done.
        - `items`: trees whose leaves are all arrays (`eqx.filter(model, eqx.is_array)`); `None` is no leaf.
        - `record`: anything JSON can say. It is stored with `digests`, one per item, added.
        - `metric`: what `keep_best` compares, smaller is better; a NaN is worse than any number."""
        self.wait()
        if reserved := {RECORD, SEAL, "metrics"} & items.keys():
            raise ValueError(f"items may not be called {sorted(reserved)}: choose other names.")
        leaves = {name: leaf_digests(tree) for name, tree in items.items()}
        if hollow := [f"{name}/{path}" for name in items for path, value in leaves[name].items() if has_no_elements(value)]:
            raise ValueError(f"Orbax cannot save arrays without elements: leave out {hollow[:5]}.")
        digests = {name: digest_of(listed) for name, listed in leaves.items()}
        if "digests" in record:
            raise ValueError("the record may not have a key 'digests': it is added here, one digest per item.")
        record = _as_json(record) | {"digests": digests}
        seal = {"format": FORMAT, "record": digest_of(record), "leaves": leaves}

        if step in self.steps() and step not in self._damaged and self._digests_at(step) == digests:
            logger.info("checkpoint of step {} is already in {}: left as it is", step, self.folder)
            return
        self._make_room(step)
        arrays = {name: ocp.args.StandardSave(tree) for name, tree in items.items() if leaves[name]}
        args = ocp.args.Composite(**arrays, **{RECORD: ocp.args.JsonSave(record), SEAL: ocp.args.JsonSave(seal)})
        metrics = None if metric is None else {"metric": float(metric)}
        # force: Orbax would decide by itself whether a save is due, and say nothing.
        self._writing = step
        self._orbax(lambda: self._manager.save(step, args=args, metrics=metrics, force=True))

    def restore(self, items: dict[str, PyTree], step: int | None = None) -> Restored:
        """Bring back a step's items and record; the newest step that is sound, or the one asked for.

        **Arguments:**

        - `items`: for each item wanted (some or all of those saved) a tree like the saved one, of
          `jax.ShapeDtypeStruct`s or arrays. A leaf with a sharding is laid out by it; one without comes to this
          process's first device; a numpy array comes back as numpy.
        - `step`: `None` takes the newest sound step, and says loudly which were damaged and how. A step named here is
          taken or refused.

        **Raises:** `FileNotFoundError` when there is no such step; `CheckpointError` when the step, or every step, is
        damaged; `ValueError` when the trees are not those saved, which is no damage, so no other step is tried."""
        self.wait()
        steps = self.steps()
        if not steps or (step is not None and step not in steps):
            wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
            raise FileNotFoundError(f"{wanted} in {self.folder}; steps there: {steps or 'none'}.")
        tries = steps if step is None else [step]
        return newest_sound(self.folder, tries, lambda s: self._restore_step(s, items), self._damaged)

    def steps(self) -> list[int]:
        """The steps that are whole on disk, oldest first; damage shows only when they are read."""
        return steps_in(self.folder)

    def best_step(self) -> int | None:
        """The step with the smallest metric among those kept; `None` when none has one."""
        self.wait()
        return self._manager.best_step()

    def wait(self) -> None:
        """Until the save in the background is on disk; raises `CheckpointError` if it failed."""
        self._orbax(self._manager.wait_until_finished)

    def close(self) -> None:
        """Wait, then let go of the threads. A `with` does this by itself."""
        self._orbax(self._manager.close)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.close()
        except CheckpointError as failed:
            if error is None:
                raise
            logger.error("{}", failed)  # and the error that ended the run goes on its way

    # ------------------------------------------------------------------------------------------------------------- helpers

    def _restore_step(self, step: int, items: dict[str, PyTree]) -> Restored:
        record, leaves = read_sealed(self.folder / str(step))
        if absent := sorted(items.keys() - leaves.keys()):
            raise ValueError(f"step {step} in {self.folder} has the items {sorted(leaves)}, not {absent}: ask for those.")
        for name, target in items.items():
            check_target(f"item {name!r} of step {step} in {self.folder}", target, leaves[name])
        targets = {name: jax.tree.map(_target, tree) for name, tree in items.items() if leaves[name]}
        try:
            args = ocp.args.Composite(**{name: ocp.args.StandardRestore(tree) for name, tree in targets.items()})
            trees = dict(self._manager.restore(step, args=args).items()) if targets else {}
        except Exception as error:  # Orbax raises bare Exceptions, and many others, on a damaged file
            if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
                raise
            raise Damage(f"{type(error).__name__}: {first_line(error)}") from error
        for name, tree in trees.items():
            found = leaf_digests(tree)
            wrong = [path for path, value in leaves[name].items() if found.get(path) != value]
            if wrong:
                shown = ", ".join(wrong[:5]) + (", ..." if len(wrong) > 5 else "")
                raise Damage(f"{len(wrong)} of the {len(found)} leaves of {name!r} are not what was saved: {shown}")
        return Restored(step, {name: trees.get(name, items[name]) for name in items}, record)

    def _digests_at(self, step: int) -> dict[str, str] | None:
        try:
            return read_sealed(self.folder / str(step))[0]["digests"]
        except Damage:
            return None

    def _make_room(self, step: int) -> None:
        """Move out of the way what must not be there when `step` is saved. Nothing is being written at this time."""
        renamed = {s: f"damaged-{s}" for s in self._damaged} | {
            s: f"replaced-{s}" for s in self.steps() if s >= step and s not in self._damaged
        }
        _together("zmaj: all have looked")
        if jax.process_index() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for old, name in renamed.items():
                target = next(p for p in _numbered(self.folder / name) if not p.exists())
                (self.folder / str(old)).rename(target)
                logger.warning("checkpoint of step {} set aside as {}", old, target)
            for half in self.folder.glob(f"*{_TMP}*"):  # of a process that was killed, or of a save that failed
                logger.warning("removing {}, a checkpoint that was never finished", half)
                shutil.rmtree(half)
        _together("zmaj: room for a checkpoint")
        self._damaged.clear()
        if renamed:
            self._manager.reload()

    def _orbax(self, call: Callable[[], object]) -> None:
        """Run what may raise a save's error, at once or from the background, and say what it means."""
        try:
            call()
        except Exception as error:
            self._manager.reload()  # Orbax has already forgotten the steps it would have deleted after this save
            full = "the disk is full: " if "No space left" in str(error) else ""
            raise CheckpointError(
                f"the checkpoint of step {self._writing} could not be written to {self.folder}: {full}{first_line(error)} "
                f"Mend that and resume; steps still whole there: {self.steps() or 'none'}."
            ) from error


def read_record(folder: str | os.PathLike[str], step: int | None = None) -> dict[str, Any]:
    """The record of a step, verified, without touching its arrays. Without `step`, of the newest step whose record is
    sound; damage is reported."""
    folder = Path(folder).absolute()
    steps = steps_in(folder)
    if not steps or (step is not None and step not in steps):
        wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        raise FileNotFoundError(f"{wanted} in {folder}; steps there: {steps or 'none'}.")
    tries = steps if step is None else [step]
    return newest_sound(folder, tries, lambda s: read_sealed(folder / str(s))[0], {})


# -------------------------------------------------------------------------------------------------------------------- small


def _target(leaf: Any) -> Any:
    """With an explicit place: Orbax would otherwise take the saved one, which this machine may not have."""
    if isinstance(leaf, np.ndarray):
        return leaf
    place = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def _numbered(path: Path) -> Iterable[Path]:
    """path, path-2, path-3, ..."""
    yield path
    n = 2
    while True:
        yield path.with_name(f"{path.name}-{n}")
        n += 1


def _rank(metrics: dict[str, float]) -> float:
    return math.inf if math.isnan(metrics["metric"]) else metrics["metric"]


def _as_json(record: dict[str, Any]) -> dict[str, Any]:
    """As it will be read back (tuples as lists), or an error that says what cannot be written."""
    try:
        return json.loads(json.dumps(record))
    except (TypeError, ValueError) as error:
        raise ValueError(f"the record must be something JSON can say: {error}.") from error


def _together(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _quiet_orbax() -> None:
    """Drop Orbax's notes below the rank of error, and its tracebacks; other users of absl's logger are not touched."""
    absl = logging.getLogger("absl")
    if _not_orbax_chatter not in absl.filters:
        absl.addFilter(_not_orbax_chatter)


def _not_orbax_chatter(record: logging.LogRecord) -> bool:
    if f"{os.sep}orbax{os.sep}" not in record.pathname:
        return True
    return record.levelno >= logging.ERROR and not record.exc_info  # the exception of a save comes again from `wait`, in words
