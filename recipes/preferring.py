"""What recipes that learn from pairs share: the pairs, of a file or the model's own; which of them a step has; the loop over them.

`recipes.dpo` teaches a model to prefer one answer to the other, `recipes.reward_model` teaches one to say how good an answer is.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import jax.random as jr
import numpy as np
import tyro
from loguru import logger
from pydantic import Field, model_validator

from data.preferences import Pair, read_pairs
from lm.base import AbstractLM
from recipes.command_line import how_to_resume, resumable
from recipes.curves import Watch, curve_for
from recipes.prompting import Prompting
from recipes.rl_stages import Drawing
from recipes.running import RunConfig, begin_session, restore, trackers_of, watched
from train.adapters import AdapterConfig
from train.checkpoint import Checkpoints
from train.debug import debug_nans
from train.logs import RunLog, progress, write_json
from train.loop import interruptible, steps
from train.optimizers import OptimizerConfig, ScheduleConfig, learning_rate
from train.step import CompiledStep, StepConfig, TrainState

Rows = TypeVar("Rows", bound=tuple)  # a NamedTuple of arrays, two rows a pair: the chosen answer, and right behind it the rejected one


class PairConfig(RunConfig):
    """A run over pairs."""

    source: Annotated[Path, tyro.conf.Positional] = Field(
        description="the model to begin with: run, Hugging Face folder, GGUF file, or owner/name on the Hub"
    )
    data: Path | None = Field(None, description="a file of preferences (.json, .jsonl, .gz); None: the model's own answers to the task")
    task: Literal["arithmetic", "calculator", "countdown", "counting", "reversal"] = Field("arithmetic", description="see data/tasks")
    problems: int = Field(1000, ge=1, description="problems of the task that are answered to make pairs")
    answers: int = Field(8, ge=2, description="answers to each, of which one right and one wrong make a pair")
    max_new_tokens: int = Field(6, ge=1, description="longest answer to a problem, its end included")

    adapter: AdapterConfig = AdapterConfig(kind="none")
    seq: int = Field(512, gt=1, description="longest prompt and answer, in tokens; longer pairs are left out, and counted")
    batch: int = Field(64, gt=0, description="pairs a step")
    steps: int | None = resumable(None, ge=1, description="optimizer steps; None: by --epochs")
    epochs: float = Field(4.0, gt=0, description="passes over the pairs, where --steps is not given")
    optimizer: OptimizerConfig = OptimizerConfig(name="adamw", beta2=0.99, weight_decay=0.0)
    schedule: ScheduleConfig = ScheduleConfig(peak=5e-5, warmup=0.1)
    step: StepConfig = StepConfig()
    validate_every: int = resumable(20, ge=1, description="steps between looks at the held-out pairs")
    validate_rows: int = resumable(256, ge=1, description="held-out pairs in such a look")
    save_every: int = resumable(100, ge=1, description="steps between checkpoints")
    sample_every: int = resumable(100, ge=1, description="steps between answers to a held-out prompt on the screen")
    seed: int = Field(0, ge=0, description="of draws, pairs and their order")

    @model_validator(mode="after")
    def _pieces_fit(self) -> "PairConfig":
        if self.batch % self.step.micro_batches:
            raise ValueError(f"batch ({self.batch} pairs) must be a multiple of step.micro_batches ({self.step.micro_batches})")
        return self

    def total_steps(self, pairs: int) -> int:
        """Of the run, on so many pairs to train on.

        **Raises:** `ValueError` where they are less than one batch.
        """
        if pairs < self.batch:
            raise ValueError(f"{pairs} pairs to train on are less than one batch of {self.batch}: take a smaller --batch, or more pairs")
        return self.steps if self.steps is not None else max(1, round(self.epochs * pairs / self.batch))


# ------------------------------------------------------------------------------------------- pairs


def own_pairs(config: PairConfig, model: AbstractLM, drawing: Drawing, path: Path) -> list[Pair]:
    """Of the model's answers to each problem one right and one wrong, drawn at random; none of a problem where all are alike. They are
    drawn once a run, and kept at `path`."""
    if path.is_file():
        return read_pairs(path)
    task, rng = drawing.task, np.random.default_rng((config.seed, 3))
    problems = [task.train[i] for i in rng.permutation(len(task.train))[: config.problems]]
    lines: list[str] = []
    at_once = max(1, 1024 // config.answers)
    with progress("drawing pairs", len(problems)) as bar:
        for at in range(0, len(problems), at_once):
            some = problems[at : at + at_once]
            filled = some + [some[0]] * (at_once - len(some))  # one shape for all parts
            rollouts = drawing.draw(model, filled, config.answers, jr.fold_in(jr.key(config.seed), at))
            solved = drawing.prompting.judge(task, filled, rollouts).solved.reshape(at_once, config.answers)
            for i, problem in enumerate(some):
                right, wrong = np.flatnonzero(solved[i]), np.flatnonzero(~solved[i])
                if len(right) and len(wrong):
                    rows = i * config.answers + np.array([rng.choice(right), rng.choice(wrong)])
                    chosen, rejected = (drawing.prompting.text(rollouts.answer(int(row))) for row in rows)
                    lines.append(json.dumps({"prompt": problem.prompt, "chosen": chosen, "rejected": rejected}, ensure_ascii=False))
            bar(at + len(some))
    if not lines:
        raise ValueError(
            f"{len(problems)} problems had {config.answers} answers each, none both right and wrong ones: nothing is to be preferred. "
            "Take a model that can do some of the task, more --problems or more --answers"
        )
    logger.info(f"of {len(problems):,} problems, {len(lines):,} had right and wrong answers among {config.answers}: so many pairs")
    beside = path.with_name(f".{path.name}.writing")
    beside.write_text("\n".join(lines) + "\n", encoding="utf-8")
    beside.replace(path)  # whole or not there: a resumed run reads it
    return read_pairs(path)


def identity_of_pairs(config: PairConfig, pairs: Sequence[Pair]) -> str:
    """What is learned from: a digest of a file's pairs; of the model's own the task, since the rest follows from the model."""
    if config.data is None:
        return config.task
    return hashlib.sha256("\n".join(map(repr, pairs)).encode()).hexdigest()


def encoded(
    pairs: Sequence[Pair], prompting: Prompting, seq: int, context: int, *, targets: bool = False
) -> tuple[list[tuple[np.ndarray, np.ndarray]], list[Pair]]:
    """(prompt, answer with its end) of each chosen and each rejected answer in turn, as tokens; and the pairs they are of. A pair whose
    prompt and answer are longer than `seq` tokens, or than the model's `context`, is left out, and counted.

    **Arguments:**

    - `targets`: the last token is only a target and not read, so that one more fits.

    **Raises:** `ValueError` where none is left.
    """
    found, kept = [], []
    limit = f"--seq {seq} tokens" if seq <= context else f"the model's context of {context} tokens"
    for pair in pairs:
        prompt = prompting.conversation(pair.messages)
        answers = [prompting.answer(text)[0] for text in (pair.chosen, pair.rejected)]
        if len(prompt) + max(map(len, answers)) - targets <= min(seq, context):
            found += [(prompt, answer) for answer in answers]
            kept.append(pair)
    if not kept:
        raise ValueError(f"every one of the {len(pairs)} pairs is longer than {limit}")
    if len(kept) < len(pairs):
        logger.warning(f"{len(pairs) - len(kept)} of {len(pairs)} pairs are longer than {limit}, and left out")
    return found, kept


def split(rows: Rows, pairs: Sequence[Pair]) -> tuple[Rows, Rows]:
    """Those to train on, and those held out."""
    held_out = np.repeat([pair.is_held_out for pair in pairs], 2)
    return type(rows)(*(field[~held_out] for field in rows)), type(rows)(*(field[held_out] for field in rows))


def pairs_at(rows: Rows, index: int, batch: int, seed: int) -> Rows:
    """The pairs of a step: one shuffled pass after the other, a remainder waiting for the next shuffle."""
    count = len(rows[0]) // 2
    epoch, place = divmod(index, count // batch)
    pairs = np.random.default_rng((seed, 4, epoch)).permutation(count)[place * batch : (place + 1) * batch]
    order = np.stack([2 * pairs, 2 * pairs + 1], axis=1).reshape(-1)
    return type(rows)(*(field[order] for field in rows))


# ------------------------------------------------------------------------------------------- the loop


def learn(
    recipe: str,
    config: PairConfig,
    folder: Path,
    begun: TrainState,
    compiled: CompiledStep,
    batches: Callable[[int], Iterator[Any]],
    *,
    total: int,
    identity: dict[str, str],
    kept: dict[str, Any],
    manifest: dict[str, Any],
    session: dict[str, Any],
    look: Callable[[Any], dict[str, float]],
    sample: Callable[[Any], str],
    ends: Callable[[Any], dict[str, float]] = lambda model: {},
) -> tuple[TrainState, dict[str, Any]]:
    """From the start, or the last checkpoint, to the last step: log, look, save. The last state, and for the results the seconds it took
    (`train_s`) and where it left its reference curve.

    **Arguments:**

    - `batches`: those from a step on.
    - `kept`: what checkpoints say of the model, beside what is trained. Adapters are kept without their base, which lies elsewhere.
    - `manifest`: gets its `sessions` here, and is written.
    - `look`: numbers on held-out pairs, `val_…`, of a model.
    - `sample`: words for the screen, of a model.
    - `ends`: dearer numbers, taken before the first step and after the last.
    """
    by_reference = config.adapter.kind != "none"
    step = debug_nans(compiled) if config.debug_nans else compiled
    watch = Watch(curve_for(recipe, config, identity))
    with Checkpoints(folder / "checkpoints", keep_latest=config.keep_latest) as checkpoints:
        found = restore(checkpoints, begun, identity, total, by_reference=by_reference)
        state, start, record = found or (begun, 0, {"train_s": 0.0})
        begin = time.monotonic() - record["train_s"]
        manifest["sessions"] = begin_session(recipe, folder, config, start, session)
        write_json(folder / "manifest.json", manifest)
        with (
            trackers_of(config, folder, recipe, start + 1) as trackers,
            RunLog(folder, total_steps=total, start_step=start + 1 if start else 0, trackers=trackers, watch=watch.line) as log,
            interruptible() as interrupt,
        ):
            if start == 0 and (measures := look(state.model) | ends(state.model)):
                log.log(0, **measures)

            def pause(done: int) -> bool:
                return interrupt.due(done) or done % config.save_every == 0 or done % config.validate_every == 0

            rate = learning_rate(config.schedule, total)
            training = steps(step, state, batches(start), rate, start=start, stop=total, pause=pause)
            with watched(training, config, folder) as training:
                for done, state, arrived in training:
                    for metrics in arrived:
                        metrics["pairs_per_s"] = metrics.pop("tokens_per_s")
                        log.log(**metrics)  # type: ignore[arg-type]
                    last = done == total
                    if done % config.validate_every == 0 or last:
                        measures = look(state.model)
                        log.log(done, **measures)
                        if measures:
                            accuracy, margin = measures["val_accuracy"], measures["val_margin"]
                            log.message(f"step {done}: held-out accuracy {accuracy:.3f}, margin {margin:.3f}")
                    if done % config.sample_every == 0 or last:
                        log.message(f"step {done}, {sample(state.model)}")
                    if done % config.save_every == 0 or last or interrupt.due(done):
                        record = {"identity": identity, "use_average": False, "train_s": time.monotonic() - begin, **kept}
                        checkpoints.save(done, state.items(by_reference=by_reference), record)
                    if interrupt.due(done):
                        checkpoints.wait()
                        log.message(f"stopped at step {done} of {total}, everything saved. Go on with:\n  {how_to_resume(folder, recipe)}")
                        raise SystemExit(interrupt.exit_status)
            if start < total and (measures := ends(state.model)):
                log.log(total, **measures)
    return state, {"train_s": record["train_s"], **watch.record()}
