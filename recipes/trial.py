"""A short run that leaves a few numbers and no folder: what `ablate`, `scaling` and the grid beside PyTorch are made of.

It is the experiment of `recipes.pretrain_small` (same corpus, rows, model, step and measure), without checkpoints, samples and export.
"""

import hashlib
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

import lm
from data.cache import TokenCache
from data.pipeline import train_batches
from data.rows import Mixture, training_rows
from data.sources import Source, open_source
from data.tokenizer import Tokenizer
from lm.flight import Flight
from recipes.corpus import encode, encode_training, fewer_held_out
from recipes.curves import settings_of
from recipes.pretrain_small import Experiment, beginning, flight_of, train_or_load_tokenizer
from recipes.report import bits_of, nats_of
from recipes.running import commit
from train.averages import average_rate
from train.backends import choose_dtype
from train.loop import steps
from train.optimizers import learning_rate
from train.runtime import device_facts
from train.step import TrainState, make_token_nats

AnyExperiment = TypeVar("AnyExperiment", bound=Experiment)


@dataclass(frozen=True)
class Material:
    """The text of a series of trials, encoded once."""

    source: Source
    tokenizer: Tokenizer
    train: TokenCache | Mixture
    held_out: TokenCache

    @property
    def identity(self) -> dict[str, str]:
        return {"corpus": self.source.record["sha256"], "tokenizer": self.tokenizer.digest}


@dataclass(frozen=True)
class Trial:
    """What came of one."""

    losses: list[float]  # nats a token, of each step
    bits_per_byte: float  # of the held-out text
    nats: dict[int, float]  # of each held-out document
    tokens: int  # trained on, padding not counted
    parameters: int
    step_s: float  # median of the steps after the first, which compiles
    fast_step_s: float  # a tenth of them were faster
    train_s: float  # of all steps, with compilation

    def record(self) -> dict[str, Any]:
        """The numbers of a line in a file; the courses are left out."""
        names = ("bits_per_byte", "tokens", "parameters", "step_s", "fast_step_s", "train_s")
        last = self.losses[-max(1, len(self.losses) // 10) :]
        return {name: getattr(self, name) for name in names} | {"steps": len(self.losses), "last_loss": float(np.mean(last))}


def material(config: Experiment) -> Material:
    """Corpus, tokenizer and tokens of an experiment."""
    source = open_source(config.data, on_invalid_utf8=config.on_invalid_utf8)
    if config.held_out_documents is not None:
        source = fewer_held_out(source, config.held_out_documents)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = train_or_load_tokenizer(config, source, Path(folder))
    return Material(
        source, tokenizer, encode_training(source, tokenizer, config.on_end), encode(source.held_out, tokenizer, source, "held_out")
    )


def run_trial(config: Experiment, text: Material, told: Callable[[int, float], None] = lambda done, loss: None) -> Trial:
    """Train for `config.steps` steps and measure all held-out text.

    **Arguments:**

    - `told`: the steps done and the newest loss known, after each step.

    **Raises:** `ValueError` where the steps are not given, or the text is too small for one batch.
    """
    if config.steps is None:
        raise ValueError("a trial needs --steps: how many fit into some minutes would differ from one to the next")
    course = trained(config, text, told)
    averaged = course.state.averaged if config.average.use else None
    model = course.state.model if averaged is None else averaged
    at_once = config.batch // config.step.micro_batches
    nats, _ = nats_of(
        make_token_nats(course.flight, course.ops, config.step.loss_chunk), model, text.held_out, batch=2 * at_once, seq=config.seq
    )
    times = [line["step_s"] for line in course.lines[1:]] or [course.lines[0]["step_s"]]
    rows = training_rows(text.train, seq=config.seq, seed=config.seed, packing=config.packing)
    return Trial(
        losses=[line["loss"] for line in course.lines],
        bits_per_byte=bits_of(text.held_out, nats, range(len(text.held_out))),
        nats=nats,
        tokens=rows.pairs_in(config.steps * config.batch),
        parameters=sum(leaf.size for leaf in jax.tree.leaves(model)),
        step_s=float(np.median(times)),
        fast_step_s=float(np.quantile(times, 0.1)),
        train_s=course.train_s,
    )


class Course(NamedTuple):
    """What training gave: the state it came to, the numbers of each step, and what it ran with."""

    state: TrainState
    lines: list[dict[str, float]]
    train_s: float
    ops: lm.Ops
    flight: Flight


def trained(
    config: Experiment, text: Material, told: Callable[[int, float], None] = lambda done, loss: None, *, stop: int | None = None
) -> Course:
    """Train, all steps or the first `stop` of them; `told` as in `run_trial`."""
    made = make_training(config, text)
    stop = made.steps if stop is None else min(stop, made.steps)
    lines: list[dict[str, float]] = []
    begin = time.perf_counter()
    for done, reached, arrived in made.run(stop):
        state = reached
        lines += arrived
        told(done, lines[-1]["loss"] if lines else float("nan"))
    return Course(state, lines, time.perf_counter() - begin, made.ops, made.flight)


class Training(NamedTuple):
    """An experiment about to be trained."""

    steps: int
    run: Callable[..., Generator[tuple[int, TrainState, list[dict[str, float]]]]]  # (stop, pause=...): what train.loop.steps yields
    ops: lm.Ops
    flight: Flight


def make_training(config: Experiment, text: Material) -> Training:
    """Its first state and its step; nothing is run yet."""
    total = config.steps
    assert total is not None
    ops, flight = flight_of(config, device_facts(jax.devices()[0]))
    fresh_state, step = beginning(config, config.model_config_of(text.tokenizer.vocab_size), flight, ops)
    rate, rate_of_average = learning_rate(config.schedule, total), average_rate(config.average, total)
    packing: dict[str, Any] = {"batch": config.batch, "seq": config.seq, "seed": config.seed, "packing": config.packing}

    def run(stop: int, pause: Callable[[int], bool] = lambda done: False) -> Generator[tuple[int, TrainState, list[dict[str, float]]]]:
        with train_batches(text.train, **packing, stop_step=stop) as batches:
            yield from steps(step, fresh_state(), batches, rate, average_rate=rate_of_average, start=0, stop=stop, pause=pause)

    return Training(total, run, ops, flight)


def times_beside(one: Experiment, other: Experiment, text: Material, *, rounds: int, steps: int) -> list[float]:
    """How much longer `other` takes for a token than `one`: the two take turns of so many steps, and each round gives the ratio of the
    medians of its two turns, so that what slows the machine slows both. A round before them compiles and is not counted."""
    turns = rounds + 1
    runs = [make_training(each, text).run(turns * steps, lambda done: done % steps == 0) for each in (one, other)]
    found = []
    for _ in range(turns):
        medians = []
        for run in runs:
            lines = [line for _, _, arrived in itertools.islice(run, steps) for line in arrived]
            medians.append(float(np.median([line["step_s"] / line["tokens"] for line in lines])))
        found.append(medians[1] / medians[0])
    for run in runs:
        run.close()
    return found[1:]


def changed(config: AnyExperiment, changes: dict[str, Any]) -> AnyExperiment:
    """The experiment with some values changed, nested groups by their fields, and checked again."""

    def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
        both = {
            name: merged(old[name], value) for name, value in new.items() if isinstance(value, dict) and isinstance(old.get(name), dict)
        }
        return old | new | both

    return type(config)(**merged(config.model_dump(), changes))


def settings_digest(config: Experiment, text: Material) -> str:
    """A name for what is trained, on which text: all settings but the seed and those of how it is carried out."""
    carried_out = {name: getattr(config, name) for name in ("dtype", "backend")}  # they round in other ways
    return hashlib.sha256(json.dumps([settings_of(config), carried_out, text.identity], sort_keys=True).encode()).hexdigest()[:12]


def machine(config: Experiment, device: jax.Device) -> dict[str, Any]:
    """Where and with what a line was made."""
    facts = device_facts(device)
    dtype = choose_dtype(facts) if config.dtype == "auto" else config.dtype
    names = {"device": facts["device_kind"], "cpu": facts["cpu"], "cores": facts["cpu_cores"], "dtype": dtype}
    return {**names, "jax": jax.__version__, "commit": commit()}


def machines(lines: Sequence[Mapping[str, Any]]) -> str:
    """The machines of some lines, in words."""
    found: dict[str, None] = {}  # in order, each once
    for line in lines:
        cores = f"{line['cores']} core{'s' if line['cores'] > 1 else ''} of {line['cpu']}" if line["device"] == "cpu" else line["device"]
        found[f"{cores}, {line['dtype']}, jax {line['jax']}"] = None
    return "; ".join(found)


def append_line(path: Path, line: dict[str, Any]) -> None:
    """One more line of JSON, on the disk when this returns but for a power cut. Half a line that a killed process left is cut off first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = read_lines(path)
    if path.exists() and path.read_bytes()[-1:] not in (b"", b"\n"):
        path.write_text("".join(json.dumps(each) + "\n" for each in whole), encoding="utf-8")
    with path.open("a", encoding="utf-8") as out:
        out.write(json.dumps(line, allow_nan=False) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of such a file; a half-written last one is left out.

    **Raises:** `ValueError` that names the line for what is no JSON before it.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    found = []
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line.endswith("\n"):
            break
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error}): mend or remove that line") from None
    return found
