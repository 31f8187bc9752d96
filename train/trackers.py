"""A run's numbers in TensorBoard, Weights & Biases and trackio, beside its own `metrics.jsonl`.

`open_trackers` opens those asked for by name and gives one `Trackers`: `log`, `image`, `close`. What each is given and where it keeps it:

    tensorboard   `tensorboard/` in the run folder; look with `tensorboard --logdir FOLDER`
    wandb         the user's account, or `wandb/` in the run folder with `WANDB_MODE=offline` (send later with `wandb sync`)
    trackio       `TRACKIO_DIR`, or trackio's own cache; look with `trackio show --project PROJECT`

All of their own environment variables are heeded (`WANDB_MODE`, `WANDB_ENTITY`, `TRACKIO_SPACE_ID`, ...). NaN and infinity are handed on as
they are: all three keep them, and leave a gap in the curve.

A resumed run goes on where it was: the id of its W&B and trackio run is kept in `trackers.json`. Steps done again since the last checkpoint
are not doubled. TensorBoard is told to forget the old ones; W&B and trackio cannot forget, so they keep the old ones and are not given the
new, which are the same numbers where the run is resumed as it was.
"""

import importlib
import importlib.util
import io
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path
from secrets import token_hex
from types import TracebackType
from typing import Any, Protocol, Self

from loguru import logger

TRACKERS: tuple[str, ...] = ("tensorboard", "wandb", "trackio")
MEMORY = "trackers.json"  # in the run folder: ids, and the last step told

_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}


class Tracker(Protocol):
    """One of them."""

    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def image(self, step: int, name: str, path: Path) -> None: ...

    def close(self, failed: bool) -> None: ...


class Trackers:
    """Those that are open. Use it in a `with`: W&B then knows whether the run ended well. Without any, it does nothing."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = list(trackers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(failed=error is not None and not isinstance(error, SystemExit))

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Tell numbers of one step; several times for one step is fine, going back to an earlier one is not. What is `None` (not known) is
        left out, and so is `step`, which is the axis."""
        known = {name: float(value) for name, value in metrics.items() if value is not None and name != "step"}
        for tracker in self._trackers:
            tracker.log(step, known)

    def image(self, step: int, name: str, path: str | os.PathLike[str]) -> None:
        """Show a picture (PNG) under a name."""
        for tracker in self._trackers:
            tracker.image(step, name, Path(path))

    def close(self, failed: bool = False) -> None:
        """Write out what is still held back. A second time does nothing."""
        trackers, self._trackers = self._trackers, []
        with ExitStack() as closing:  # one that cannot be closed does not keep the others open
            for tracker in trackers:
                closing.callback(tracker.close, failed)


def open_trackers(
    names: Sequence[str], folder: Path, *, project: str, run_name: str, config: Mapping[str, Any], start_step: int = 1
) -> Trackers:
    """Open trackers by name.

    **Arguments:**

    - `names`: some of `TRACKERS`, or none.
    - `folder`: of the run.
    - `project`, `run_name`: what W&B and trackio file the run under. A resumed run keeps those it began with.
    - `config`: numbers, strings, lists and dictionaries (as from `model_dump(mode="json")`), shown beside the curves.
    - `start_step`: the first step this process will log: after restoring step n, n + 1; 0 if what was before the first step is logged.

    **Raises:** `ValueError`, see `check_trackers`.
    """
    check_trackers(names)
    folder.mkdir(parents=True, exist_ok=True)
    opened: list[Tracker] = []
    with ExitStack() as undo:
        for name in names:
            opened.append(_OPEN[name](folder, project, run_name, dict(config), start_step))
            undo.callback(opened[-1].close, True)  # if a later one cannot be opened
        undo.pop_all()
    return Trackers(opened)


def check_trackers(names: Sequence[str]) -> None:
    """That all of them can be opened, as far as this is known without opening them.

    **Raises:** `ValueError` for a name that is none of `TRACKERS`, and for packages that are not installed, with the command to run.
    """
    unknown = [name for name in names if name not in TRACKERS]
    if unknown or len(set(names)) < len(names):
        raise ValueError(f"trackers must be some of {', '.join(TRACKERS)}, each once; got {', '.join(names)}")
    missing = [name for name in names if importlib.util.find_spec(_PACKAGES[name]) is None]
    if missing:
        packages = ", ".join(_PACKAGES[name] for name in missing)
        raise ValueError(f"tracking with {', '.join(missing)} needs {packages}, which is not installed: run `uv sync --extra trackers`")


# -------------------------------------------------------------------------------------------------------------- TensorBoard


class _TensorBoard:
    """tensorboardX: writes event files with numpy and protobuf alone, and can purge, which `tensorboard.summary.Writer` cannot."""

    def __init__(self, folder: Path, project: str, run_name: str, config: dict[str, Any], start_step: int) -> None:
        from tensorboardX import SummaryWriter

        logdir = folder / "tensorboard"
        seen = any(logdir.glob("events.out.tfevents.*"))
        # The name of a file holds the second only. Two writers in one second would share a file, and order is by name.
        suffix = f".{time.time_ns():020d}"
        self._writer = SummaryWriter(str(logdir), purge_step=start_step if seen else None, flush_secs=10, filename_suffix=suffix)
        if not seen:
            self._writer.add_text("config", f"```json\n{json.dumps(config, indent=2)}\n```", 0)
        logger.info(f"tensorboard: look with `tensorboard --logdir {folder}`")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, path: Path) -> None:
        import matplotlib.image

        self._writer.add_image(name, matplotlib.image.imread(path), step, dataformats="HWC")

    def close(self, failed: bool) -> None:
        self._writer.close()


# ----------------------------------------------------------------------------------------------------- what cannot forget


class _Memory:
    """What a tracker must know when the run is resumed, in `trackers.json`, and which steps it has been told already."""

    def __init__(self, folder: Path, name: str, start_step: int, new: dict[str, Any]) -> None:
        self._path, self._name = folder / MEMORY, name
        kept = self._all()
        self.resumed = name in kept
        self.values: dict[str, Any] = kept[name] if self.resumed else {**new, "last_step": -1}
        self.first = max(start_step, self.values["last_step"] + 1)
        if self.first > start_step:
            logger.info(f"{name}: steps {start_step} to {self.first - 1} were logged before the run stopped and are not logged again")

    def is_new(self, step: int) -> bool:
        return step >= self.first

    def told(self, step: int) -> None:
        """After the tracker was: a process killed in between leaves one point twice rather than none."""
        if step > self.values["last_step"]:
            self.values["last_step"] = step
            self.save()

    def save(self) -> None:
        half = self._path.with_name(f".{MEMORY}.tmp")
        half.write_text(json.dumps(self._all() | {self._name: self.values}, indent=2) + "\n", encoding="utf-8")
        half.replace(self._path)  # once a step, so without an fsync

    def _all(self) -> dict[str, Any]:
        return json.loads(self._path.read_text(encoding="utf-8")) if self._path.exists() else {}


class _WandB:
    """Weights & Biases. It prints nothing and leaves stdout alone (the run has its own console and log); what the machine does is measured
    as usual."""

    def __init__(self, folder: Path, project: str, run_name: str, config: dict[str, Any], start_step: int) -> None:
        # Crash reports of wandb to its makers: only if the user says so. Read when wandb is imported.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self._image = wandb.Image
        self._memory = _Memory(folder, "wandb", start_step, {"id": token_hex(4), "project": project, "run_name": run_name})
        kept = self._memory.values
        try:
            self._run = wandb.init(
                project=kept["project"],
                name=kept["run_name"],
                id=kept["id"],
                resume="allow",
                dir=str(folder.resolve()),
                config=config,
                reinit="create_new",  # another run that is open in this process stays open
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.errors.UsageError as error:
            raise ValueError(f"wandb: {error} Or keep the run on this machine, without an account: WANDB_MODE=offline") from error
        self._memory.save()
        if self._run.disabled:
            logger.warning("wandb: nothing is kept, since WANDB_MODE=disabled")
        else:
            logger.info(f"wandb: {self._run.dir if self._run.offline else self._run.url}")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if self._memory.is_new(step):
            self._run.log(metrics, step=step)
            self._memory.told(step)

    def image(self, step: int, name: str, path: Path) -> None:
        if self._memory.is_new(step):
            self._run.log({name: self._image(str(path))}, step=step)
            self._memory.told(step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=1 if failed else 0)


class _Trackio:
    """trackio: an SQLite file on this machine, unless the user's environment names a Space. What it would print goes to `run.log` only."""

    def __init__(self, folder: Path, project: str, run_name: str, config: dict[str, Any], start_step: int) -> None:
        trackio = _silently(lambda: importlib.import_module("trackio"))
        self._image, self._finish = trackio.Image, trackio.finish
        self._memory = _Memory(folder, "trackio", start_step, {"project": project, "run_name": run_name})
        kept = self._memory.values
        resume = "allow" if self._memory.resumed else "never"  # trackio's run of another folder may bear the same name
        self._run = _silently(
            lambda: trackio.init(project=kept["project"], name=kept["run_name"], config=config, resume=resume, embed=False)
        )
        if kept.get("id", self._run.id) != self._run.id:
            logger.warning(f"trackio: the run that began here is gone, or a newer one is also called {kept['run_name']}: going on there")
        kept |= {"run_name": self._run.name, "id": self._run.id}
        self._memory.save()
        logger.info(f"trackio: look with `trackio show --project {kept['project']}`")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if self._memory.is_new(step):
            self._run.log(metrics, step=step)
            self._memory.told(step)

    def image(self, step: int, name: str, path: Path) -> None:
        if self._memory.is_new(step):
            self._run.log({name: self._image(path)}, step=step)
            self._memory.told(step)

    def close(self, failed: bool) -> None:
        _silently(self._finish)  # the run's own `finish` would be called a second time when Python ends, with words


def _silently(act: Callable[[], Any]) -> Any:
    """Run it with its prints sent to the log as details."""
    words = io.StringIO()
    try:
        with redirect_stdout(words), redirect_stderr(words):
            return act()
    finally:
        for line in words.getvalue().splitlines():
            logger.debug("{}", line)


_OPEN: dict[str, Callable[[Path, str, str, dict[str, Any], int], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "trackio": _Trackio,
}
