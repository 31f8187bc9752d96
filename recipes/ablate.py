"""What is each thing worth that is known to help? Short runs that differ from a baseline in one of them, on the same text, each with some
seeds.

A run is `recipes.speedrun` without its folder (`recipes.trial`): so many tokens, then bits per byte on all held-out text. Every run is one
line of `--file`; what is there already is not run again, so a series may be stopped at any time and goes on with the same command. At the
end, and with `--table-only` at once, the lines of these very settings become a table and a picture:

- the difference to the baseline at the same tokens, paired by seed (same seed, same order of the text), with the 95 % interval of Student's
  law over the seeds;
- seconds a token, in those of the baseline: measured apart, the two in turns of some steps on one machine, the median of the rounds;
- the difference at the same minutes: to the first is added what the baseline loses when it gets as many tokens fewer as the change is
  slower. It is an estimate, from the baseline with half as many tokens more (`more_tokens`).

    python -m recipes.ablate --only relu2 zero_init            # these, and the baseline with them
    python -m recipes.ablate --only relu2+zero_init            # both at once
    python -m recipes.ablate                                   # all, hours on two cores
    python -m recipes.ablate --table-only
    taskset -c 0 python -m recipes.ablate --seeds 0 &          # two series at once, a core each
    taskset -c 1 python -m recipes.ablate --seeds 1

The runs of several machines may stand in one file: only bits per byte are taken from them.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro
from loguru import logger
from pydantic import Field, field_validator
from rich.console import Console

from recipes import ablate_table, speedrun
from recipes.command_line import RecipeConfig, fail
from recipes.running import ENDS_IN_WORDS
from recipes.trial import Material, append_line, changed, machine, material, read_lines, run_trial, settings_digest, times_beside
from train.logs import plain_messages, progress
from train.optimizers import OptimizerConfig, ScheduleConfig
from train.runtime import choose_device, compilation_cache
from train.transfer import MATRICES

Changes = Callable[[speedrun.Experiment], dict[str, Any]]

BASELINE = "baseline"
MORE_TOKENS = "more_tokens"  # for the price of a token


def _schedule(**settings: Any) -> Changes:
    return lambda c: {"schedule": settings}


def _optimizer(**settings: Any) -> Changes:
    return lambda c: {"optimizer": settings}


def _matrices(name: str, factor: float) -> Changes:
    return _optimizer(name=name, learning_rate_of=dict.fromkeys(MATRICES, factor))


# What each changes. Steps follow from the tokens, which all have alike.
SWITCHES: dict[str, Changes] = {
    BASELINE: lambda c: {},
    MORE_TOKENS: lambda c: {"steps": int(ablate_table.MORE * (c.steps or 0))},
    # the drawing
    "no_qk_norm": lambda c: {"qk_norm": False},
    "relu2": lambda c: {"mlp": "relu2", "d_ff": 3 * c.d_ff // 2},  # as many parameters
    "zero_init": lambda c: {"zero_init": True},
    "untied": lambda c: {"tied": False},
    "embed_norm": lambda c: {"embed_norm": True},
    "stream_lambdas": lambda c: {"stream_lambdas": True},
    "value_residual": lambda c: {"value_residual": True},
    "value_embeddings": lambda c: {"value_embeddings": max(1, c.n_layers // 4)},
    "softcap_15": lambda c: {"logit_softcap": 15.0},
    "softcap_30": lambda c: {"logit_softcap": 30.0},
    "window": lambda c: {"window": max(1, c.seq // 4), "window_pattern": "SSSL"},
    # the optimizer of the matrices, each at a rate usual for it beside Muon's; embedding, head and norms stay at the baseline's AdamW
    "adamw": _matrices("adamw", 1 / 3),
    "soap": _matrices("soap", 3 / 5),
    "normuon": _optimizer(name="normuon"),
    "schedule_free": lambda c: _matrices("schedule_free", 1 / 3)(c) | {"schedule": {"shape": "constant"}},  # of all
    "lion": _optimizer(name="lion"),  # of all; its signs are times 0.2 already
    "cautious": _optimizer(cautious=True),
    "no_decay": _optimizer(weight_decay=0.0),
    "decay_double": lambda c: {"optimizer": {"weight_decay": 2 * c.optimizer.weight_decay}},
    # learning rate
    "rate_half": lambda c: {"schedule": {"peak": c.schedule.peak / 2}},
    "rate_double": lambda c: {"schedule": {"peak": 2 * c.schedule.peak}},
    "embed_rate_third": _optimizer(learning_rate_of={"embed.weight": 0.3}),
    "embed_rate_triple": _optimizer(learning_rate_of={"embed.weight": 3.0}),
    "embed_rate_ten": _optimizer(learning_rate_of={"embed.weight": 10.0}),
    "embed_rate_thirty": _optimizer(learning_rate_of={"embed.weight": 30.0}),
    "cosine": _schedule(shape="cosine"),
    "cooldown_20": _schedule(shape="wsd", decay=0.2),
    "cooldown_70": _schedule(shape="wsd", decay=0.7),
    "z_loss": lambda c: {"step": {"z_loss": 1e-4}},
    # the rows
    "batch_half": lambda c: {"batch": max(1, c.batch // 2)},
    "batch_double": lambda c: {"batch": 2 * c.batch},
    "whole_documents": lambda c: {"packing": "best_fit"},
}


class Config(RecipeConfig):
    """Which runs, and where their lines go."""

    only: tuple[str, ...] = Field((), description="switches, or several joined by +; none: all. The baseline is always among them")
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1, description="of weights, data order and dropout")
    tokens: int = Field(
        800_000,
        gt=0,
        description="places of the rows that a run trains on",
    )
    rounds: int = Field(6, gt=0, description="of timing, a switch beside the baseline")
    round_steps: int = Field(6, gt=0, description="steps of each in a round")
    preset: Literal["1m", "4m", "14m", "30m", "60m"] = Field("1m", description="sizes of the baseline, as in pretrain_small")
    base: dict[str, str] = Field({}, description="other values of the baseline, by dotted name: schedule.peak 3e-3 mlp relu2")
    data: str = Field("stdlib", description="the corpus, in the words of pretrain_small's --data")
    file: Path = Field(Path("docs/ablations.jsonl"), description="where the lines go, one a run")
    page: Path | None = Field(Path("docs/ablations.md"), description="where the table goes, between its marks; None: only the screen")
    picture: Path | None = Field(Path("docs/images/ablations.png"), description="where the picture goes; None: nowhere")
    table_only: bool = Field(False, description="run nothing: only the table and the picture of what is there")
    device: Literal["auto", "cpu", "gpu", "tpu"] = Field("auto", description="where to compute")

    @field_validator("only")
    @classmethod
    def _are_known(cls, only: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := sorted({part for name in only for part in name.split("+")} - SWITCHES.keys()):
            raise ValueError(f"no switch is called {', '.join(unknown)}; there are {', '.join(SWITCHES)}")
        return only


# ------------------------------------------------------------------------------------------- main


def main(config: Config) -> dict[str, Any]:
    """Run what is missing, then the table. What the table says is returned, by name."""
    plain_messages()
    device = choose_device(config.device)
    compilation_cache()
    runs = experiments(config)
    text = material(runs[BASELINE])
    digests = {name: settings_digest(experiment, text) for name, experiment in runs.items()}
    if not config.table_only:
        run_missing(config, runs, digests, text, device)
    kept = read_lines(config.file)
    lines = [line for line in kept if is_run(line) and digests.get(line["name"]) == line["settings"] and line["seed"] in config.seeds]
    if not any(line["name"] == BASELINE for line in lines):
        raise ValueError(f"{config.file} has no run of the baseline with these settings: leave out --table-only")
    timed = [line for line in kept if is_time(line, digests)]
    found = ablate_table.summed_up(lines, {line["name"]: float(np.median(line["ratios"])) for line in timed})
    said = ablate_table.words(found, lines, timed, text.source.name)
    Console().print(said, markup=False, highlight=False, soft_wrap=True)
    picture = None if config.picture is None else ablate_table.draw(found, config.picture)
    if config.page is not None:
        ablate_table.put(said, config.page, picture)
        logger.info(f"written {config.page}" + (f" and {picture}" if picture else ""))
    return found


def experiments(config: Config) -> dict[str, speedrun.Experiment]:
    """The settings of each run by its name, the baseline first; their seed is not set yet."""
    # What all is compared with stays what it was, whatever becomes the default of pretrain_small.
    fixed = {"data": config.data, "optimizer": OptimizerConfig(), "schedule": ScheduleConfig()}
    plain = speedrun.Experiment(**(speedrun.PRESETS[config.preset] | fixed))
    base = changed(plain, nested(config.base))
    names = [BASELINE, MORE_TOKENS, *(name for name in config.only or SWITCHES if name not in (BASELINE, MORE_TOKENS))]
    found: dict[str, speedrun.Experiment] = {}
    for name in names:
        experiment = with_tokens(base, config.tokens)
        for part in name.split("+"):
            experiment = changed(experiment, SWITCHES[part](experiment))
            if part != MORE_TOKENS:
                experiment = with_tokens(experiment, config.tokens)
        found[name] = experiment
    return found


def with_tokens(experiment: speedrun.Experiment, tokens: int) -> speedrun.Experiment:
    """As many steps as the tokens are worth at this batch."""
    return experiment.model_copy(update={"steps": max(1, tokens // (experiment.batch * experiment.seq))})


def nested(flat: dict[str, str]) -> dict[str, Any]:
    """`{"schedule.peak": "3e-3"}` → `{"schedule": {"peak": "3e-3"}}`; pydantic reads the numbers."""
    found: dict[str, Any] = {}
    for path, value in flat.items():
        *groups, name = path.replace("-", "_").split(".")
        place = found
        for group in groups:
            place = place.setdefault(group, {})
        place[name] = value
    return found


def is_run(line: Mapping[str, Any]) -> bool:
    return line.get("kind", "run") == "run"


def is_time(line: Mapping[str, Any], digests: Mapping[str, str]) -> bool:
    """Whether a line tells how long one of these switches takes beside this baseline."""
    asked = (digests.get(line["name"]), digests[BASELINE])
    return line.get("kind") == "time" and (line["settings"], line["baseline"]) == asked


def run_missing(config: Config, runs: dict[str, speedrun.Experiment], digests: dict[str, str], text: Material, device: jax.Device) -> None:
    """Every run that the file does not have, a seed after the other, so that an early stop leaves whole comparisons."""
    kept = read_lines(config.file)
    done = {(line["name"], line["seed"], line["settings"]) for line in kept if is_run(line)}
    missing = [(name, seed) for seed in config.seeds for name in runs if (name, seed, digests[name]) not in done]
    logger.info(f"{len(missing)} runs to do, {len(runs) * len(config.seeds) - len(missing)} are in {config.file} already")
    facts = machine(runs[BASELINE], device)
    begin = time.monotonic()
    for i, (name, seed) in enumerate(missing):
        experiment = runs[name].model_copy(update={"seed": seed})
        assert experiment.steps is not None
        with progress(f"{name}, seed {seed}", experiment.steps) as told:
            trial = run_trial(experiment, text, lambda steps, _, told=told: told(steps))  # type: ignore[misc]
        append_line(config.file, {"name": name, "seed": seed, "settings": digests[name], **trial.record(), **facts})
        left = (time.monotonic() - begin) / (i + 1) * (len(missing) - i - 1)
        logger.info(
            f"run {i + 1} of {len(missing)}: {name}, seed {seed}: {trial.bits_per_byte:.4f} bits per byte, "
            f"{trial.step_s:.3f} s a step, {trial.train_s:.0f} s; {left / 60:.0f} minutes left"
        )
        jax.clear_caches()  # programs of a run are of no use to the next
    timed = {line["name"] for line in kept if is_time(line, digests)}
    names = [name for name in runs if name not in (BASELINE, MORE_TOKENS) and name not in timed]
    with progress("seconds a token, beside the baseline's", len(names)) as told:
        for i, name in enumerate(names, start=1):
            ratios = times_beside(runs[BASELINE], runs[name], text, rounds=config.rounds, steps=config.round_steps)
            facts_of_it = {"settings": digests[name], "baseline": digests[BASELINE], "ratios": ratios}
            append_line(config.file, {"kind": "time", "name": name, **facts_of_it, **facts})
            told(i)
            logger.info(
                f"time {i} of {len(names)}: {name}: x {np.median(ratios):.3f} of the baseline's ({min(ratios):.3f} to {max(ratios):.3f})"
            )
            jax.clear_caches()


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__, prog="python -m recipes.ablate"))
    except ENDS_IN_WORDS as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("stopped: every run that was finished stands in the file; the same command goes on")
