"""What every training recipe needs around its experiment: the flags that say how it is carried out, the run folder, going on with a run.

Nothing here changes what is trained; that is the recipe's own page.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from loguru import logger
from pydantic import BaseModel, field_validator

import lm
from data.pipeline import Batch
from data.rows import MixedRows, Rows
from lm.flight import Flight
from recipes.command_line import CONFIG_FILE, RecipeConfig, load_config, resumable
from train.backends import choose_backend, choose_dtype
from train.checkpoint import CheckpointError, Checkpoints
from train.debug import NonFinite
from train.logs import write_json
from train.loop import SpikeError
from train.process import process_settings
from train.profile import profiled
from train.runtime import DeviceError, Peak, device_facts
from train.step import TrainState
from train.trackers import Trackers, check_trackers, open_trackers

# What ends a run with words instead of a traceback.
ENDS_IN_WORDS = (ValueError, OSError, CheckpointError, DeviceError, SpikeError, NonFinite)


class RunConfig(RecipeConfig):
    """How a run is carried out. All of it may differ when the run is resumed."""

    run_dir: Path | None = resumable(None, description="folder of the run; None: runs/RECIPE-DATE-TIME")
    resume: bool = resumable(False, description="go on where the run in --run-dir (or the latest one) stopped")
    device: Literal["auto", "cpu", "gpu", "tpu"] = resumable("auto", description="where to compute")
    backend: str = resumable("auto", description="kernels: auto (the rule of train.backends) or one of " + ", ".join(lm.BACKENDS))
    dtype: Literal["auto", "float32", "bfloat16"] = resumable(
        "auto",
        description="operands of matrix products; masters stay float32. float32 on a GPU or TPU means its default: TF32, or bf16 passes",
    )
    layers: Literal["auto", "loop", "scan"] = resumable(
        "auto", description="blocks one by one or as a scan; auto: scan above 12 layers, and on a CPU with remat"
    )
    remat: Literal["none", "dots", "full"] = resumable("none", description="what the backward pass recomputes to save memory")
    save_every: int = resumable(200, ge=1, description="steps between checkpoints")
    validate_every: int = resumable(100, ge=1, description="steps between looks at the held-out loss")
    validate_rows: int = resumable(64, ge=1, description="rows of held-out text in such a look")
    sample_every: int = resumable(200, ge=1, description="steps between samples on the screen")
    keep_latest: int = resumable(2, ge=1, description="checkpoints kept, beside the best one")
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = resumable(
        (), description="where the numbers are shown, beside metrics.jsonl"
    )
    profile: int | None = resumable(
        None, ge=1, description="steps to trace, a few after the start: a Perfetto file and a table of operations"
    )
    curve: Path | None = resumable(None, description="reference curve to be watched beside; None: that of docs/golden with these settings")
    debug_nans: bool = resumable(False, description="stop at the first NaN or infinity and find the operation that made it; slower")

    @field_validator("backend")
    @classmethod
    def _is_known(cls, backend: str) -> str:
        if backend not in ("auto", *lm.BACKENDS):
            raise ValueError(f"must be auto or one of {', '.join(lm.BACKENDS)}")
        return backend


def choose_flight(
    config: RunConfig,
    facts: Mapping[str, Any],
    *,
    n_layers: int,
    head_dim: int,
    seq: int,
    softcap: float | None = None,
    sinks: bool = False,
) -> tuple[lm.Ops, Flight]:
    """Kernels, dtype and layer loop for a device (its `device_facts`), unless the user named them. What is chosen is printed and
    recorded. `softcap` is that of attention scores."""
    dtype = config.dtype if config.dtype != "auto" else choose_dtype(facts)
    merged = facts["platform"] == "cpu" and config.remat != "none"  # XLA for CPUs may merge a loop's second pass with its first
    layers = config.layers if config.layers != "auto" else "scan" if n_layers > 12 or merged else "loop"
    backend = choose_backend(facts, dtype=dtype, head_dim=head_dim, seq=seq, softcap=softcap, sinks=sinks, asked=config.backend)
    return lm.BACKENDS[backend], Flight(layers=layers, remat=config.remat, dtype=dtype)


def seconds_a_step(step: Any, state: TrainState, batch: Any) -> float:
    """Compile the step, then time it, on a state that is thrown away: the median of six, or of fewer where they take
    half a minute: the machine may stand still for some seconds."""
    times: list[float] = []
    while len(times) < 7 and (len(times) < 3 or sum(times[1:]) < 30):
        begin = time.perf_counter()
        state, metrics = step(state, batch, 0.0)
        jax.block_until_ready((state, metrics))
        times.append(time.perf_counter() - begin)
    return float(np.median(times[1:]))  # the first one compiled


def steps_that_fit(step: Any, state: TrainState, first_batch: Batch, rows: Rows, batch: int, *, minutes: float, max_epochs: float) -> int:
    """How many steps the time allows, measured with this state, which is used up; and no more than the passes over the text allowed."""
    seconds = seconds_a_step(step, state, first_batch)
    fit, most = int(minutes * 60 / seconds), int(max_epochs * rows.rows_per_epoch / batch)
    if isinstance(rows, MixedRows) and rows.on_end == "stop":
        most = min(most, rows.rows_before_an_end() // batch)
    taken = max(1, min(fit, most))
    logger.info(
        f"{seconds:.2f} s a step: {fit:,} steps fit into {minutes:g} minutes, {most:,} make {max_epochs:g} epochs; taking {taken:,}"
    )
    return taken


def watched(training: Iterator[Any], config: RunConfig, folder: Path) -> AbstractContextManager[Iterator[Any]]:
    """The loop, traced for `--profile` steps once the first three are done. Use it in a `with`, so that a trace always ends."""
    if config.profile is None:
        return nullcontext(training)
    return closing(profiled(training, folder / "profile", first=3, count=config.profile))


def trackers_of(config: RunConfig, folder: Path, recipe: str, first: int) -> Trackers:
    """Those asked for; `first` is the first step they will be told."""
    settings = config.model_dump(mode="json", exclude={"resume", "run_dir"})
    return open_trackers(config.trackers, folder, project=f"zmaj-{recipe}", run_name=folder.name, config=settings, start_step=first)


# ------------------------------------------------------------------------------------------- the run folder


def check_start(config: RunConfig, folder: Path) -> None:
    """What would only come out after minutes: a new run needs a folder of its own, and trackers their packages.

    **Raises:** `ValueError` otherwise, with what to do.
    """
    logger.info(f"run folder: {folder}")
    check_trackers(config.trackers)
    if config.resume:
        return
    if (folder / CONFIG_FILE).exists():
        raise ValueError(f"{folder} already holds a run: add --resume to go on with it, or choose another --run-dir")
    left_by_a_start_that_failed = {".lock", "run.log", "tokenizer"}
    others = sorted({path.name for path in folder.iterdir()} - left_by_a_start_that_failed)
    if others:
        raise ValueError(f"{folder} is no run, and not empty (it has {', '.join(others[:3])} …): choose another --run-dir")


def save_config(config: BaseModel, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG_FILE, config.model_dump(mode="json", exclude={"resume", "run_dir"}))


def restore(
    checkpoints: Checkpoints, abstract: TrainState, identity: dict[str, str], total_steps: int, *, by_reference: bool = False
) -> tuple[TrainState, int, dict[str, Any]] | None:
    """The state of the last checkpoint, the steps done, and its record; `None` where there is none yet. `by_reference`: the checkpoint
    holds nothing of what is frozen (`TrainState.items`), so those arrays of `abstract` are the real ones."""
    if not checkpoints.steps():
        return None
    found = checkpoints.restore(jax.eval_shape(lambda state: state.items(by_reference=by_reference), abstract))
    if found.record["identity"] != identity:
        raise ValueError(
            f"this run was trained on {found.record['identity']}; now they are {identity}. "
            "One of them has changed since (another Python? edited files?): bring it back, or start a new run"
        )
    if found.step > total_steps:
        raise ValueError(f"the run has done {found.step} steps already; --steps {total_steps} would be fewer")
    complete = found.step == total_steps
    logger.info("training is complete: only the report is made again" if complete else f"going on after step {found.step}")
    return abstract.with_items(found.items, found.step), found.step, found.record


def session_facts(device: jax.Device, ops: lm.Ops, flight: Flight, peak: Peak) -> dict[str, Any]:
    """What this process runs with, for the record."""
    ran_with = {"kernels": ops.name, **flight.model_dump(), **process_settings()}
    return {"ran_with": ran_with, "device": device_facts(device), "peak": {"flops_per_s": peak.flops_per_s, "source": peak.source}}


def begin_session(recipe: str, folder: Path, config: Any, start: int, session: dict[str, Any]) -> list[dict[str, Any]]:
    """The processes that worked on this run, this one added. What differs from the last one and changes the numbers is said."""
    written = folder / "manifest.json"
    earlier = json.loads(written.read_text(encoding="utf-8"))["sessions"] if config.resume and written.exists() else []
    saved = load_config(type(config), folder)
    if start and saved.steps != config.steps:
        logger.warning(
            f"the run now has {config.steps} steps instead of {saved.steps}: the learning rate follows the new schedule from here"
        )
    for name in ("ran_with", "device"):
        if earlier and earlier[-1][name] != session[name]:
            old, new = earlier[-1][name], session[name]
            changed = [f"{key} {old.get(key)} → {new.get(key)}" for key in new if old.get(key) != new.get(key)]
            logger.warning(f"not the same {name} as before, so not bit for bit the same run: {'; '.join(changed)}")
    save_config(config, folder)
    command = ["python", "-m", f"recipes.{recipe}", *sys.argv[1:]]
    settings = config.model_dump(mode="json", exclude=set(RunConfig.model_fields))  # what is trained; how it is carried out is in `session`
    return [*earlier, {"start_step": start, "command": command, "commit": commit(), "settings": settings, **session}]


def commit() -> str | None:
    """The commit of this checkout, with a mark if files have changed since; `None` outside git."""
    try:
        asked = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=Path(__file__).parent, capture_output=True)
    except FileNotFoundError:  # no git on this machine
        return None
    return asked.stdout.decode().strip() or None if asked.returncode == 0 else None
