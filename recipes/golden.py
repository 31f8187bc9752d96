"""Make the reference curve of a recipe from its runs (`recipes.curves`).

    python -m recipes.golden runs/pretrain_small-A runs/pretrain_small-B runs/pretrain_small-C
    python -m recipes.pretrain_small --steps 1082                               # is watched from now on

The runs have the same settings on the same text; seeds may differ, and with three of them the curve serves any seed. The losses of every
few steps are averaged, over the runs too. A run that was stopped gives a curve of its beginning, which a whole run is followed beside as
far as it goes. What a run began with is known by its digest, so it must be the very same model; where that was trained here and comes out a
little different each time, `--without model` leaves it out. The tolerance is `--sigmas` times the spread of the runs, smoothed over
neighbours, and at least `--least`: other kernels round in other ways. The picture shows the runs in their band.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from loguru import logger
from pydantic import Field

from recipes.command_line import CONFIG_FILE, RecipeConfig, fail
from recipes.curves import BESIDE, CURVES, Curve, means
from recipes.running import ENDS_IN_WORDS
from train.logs import plain_messages, read_metrics, write_json


class Config(RecipeConfig):
    """Which runs, and how wide the band is to be."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = Field(min_length=1, description="run folders of one recipe, ended")
    name: str | None = Field(None, description="of the file, without .json; None: RECIPE-STEPS")
    to: Path = Field(CURVES, description="folder that the curve is written to")
    metric: str = Field("loss", description="the number of metrics.jsonl that is followed: loss, or reward")
    without: tuple[str, ...] = Field((), description="digests that are not asked for, of those the first run has: model, start, teacher …")
    every: int = Field(10, ge=1, description="steps in a mean")
    sigmas: float = Field(4.0, gt=0, description="standard deviations over the runs that a mean may be away")
    least: float = Field(0.05, gt=0, description="how far it may always be away (of a loss: nats a token)")
    first: int = Field(10, ge=1, description="steps kept one by one, to be replayed by the tests")
    picture: Path | None = Field(None, description="where to draw runs and band; None: nowhere")


def main(config: Config) -> Path:
    """Read the runs, write the curve. Returns its file."""
    plain_messages()
    records = [json.loads(read_file(run / "manifest.json")) for run in config.runs]
    settings = [without_beside(json.loads(read_file(run / CONFIG_FILE))) for run in config.runs]
    recipes = {record["sessions"][-1]["command"][2].removeprefix("recipes.") for record in records}
    if old := [run.name for run, record in zip(config.runs, records, strict=True) if "identity" not in record]:
        raise ValueError(
            f"{old[0]} does not say what it was made from (no identity in its manifest.json): it is of an older version; run it anew"
        )
    if unknown := sorted(set(config.without) - records[0]["identity"].keys()):
        raise ValueError(f"--without {unknown[0]}: the runs have {', '.join(records[0]['identity'])}")
    identities = [{name: digest for name, digest in record["identity"].items() if name not in config.without} for record in records]
    check_alike(config.runs, {"recipe": [*recipes], "settings": settings, "text or model": identities})
    courses = [course_of(run, config.metric) for run in config.runs]
    if len(lengths := {len(course) for course in courses}) > 1:
        logger.info(f"the runs have {min(lengths)} to {max(lengths)} steps: the curve ends with the shortest")
        courses = [{step: value for step, value in course.items() if step <= min(lengths)} for course in courses]
    groups = np.array([[mean for _, mean in means(course, config.every)] for course in courses])  # runs × groups
    if not groups.size:
        raise ValueError(f"the runs have {len(courses[0])} steps, fewer than --every {config.every}")
    tolerances = (
        np.maximum(config.least, config.sigmas * smoothed(groups.std(axis=0, ddof=1)))
        if len(groups) > 1
        else np.full(groups.shape[1], config.least)
    )
    ran = records[0]["sessions"][-1]
    recipe = recipes.pop()
    curve = Curve(
        recipe=recipe,
        settings=settings[0],
        identity=identities[0],
        metric=config.metric,
        seeds=tuple(record["seed"] for record in records),
        every=config.every,
        losses=tuple(np.round(groups.mean(axis=0), 5).tolist()),
        tolerances=tuple(np.round(tolerances, 5).tolist()),
        first=tuple(round(courses[0][step], 6) for step in range(1, min(config.first, len(courses[0])) + 1)),
        made_with={
            "commit": ran["commit"],
            "device": ran["device"]["device_kind"],
            "ran_with": ran["ran_with"],
            "jax": ran["device"].get("jax"),
        },
    )
    name = config.name or (f"{recipe}-{settings[0]['steps']}" if settings[0].get("steps") else recipe)
    path = config.to / f"{name}.json"
    write_json(path, curve.model_dump(mode="json"))
    logger.info(f"written {path}: {len(curve.losses)} means of {curve.every} steps, seeds {', '.join(map(str, curve.seeds))}")
    if config.picture is not None:
        draw(curve, groups, config.picture)
    return path


def read_file(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: expected the folder of a run")
    return path.read_text(encoding="utf-8")


def without_beside(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in BESIDE}


def check_alike(runs: tuple[Path, ...], facts: dict[str, list[Any]]) -> None:
    """**Raises:** `ValueError` where the runs are not of one kind."""
    for what, each in facts.items():
        if other := [run.name for run, fact in zip(runs, each, strict=False) if fact != each[0]]:
            raise ValueError(f"the runs differ in their {what}: {runs[0].name} is not like {', '.join(other)}; a curve is of one kind")
    if len(facts["recipe"]) > 1:
        raise ValueError(f"the runs are of several recipes: {', '.join(sorted(facts['recipe']))}")


def course_of(run: Path, metric: str) -> dict[int, float]:
    """The metric of each step. **Raises:** `ValueError` for a run without it."""
    lines = read_metrics(run / "metrics.jsonl")
    found = {line["step"]: line[metric] for line in lines if metric in line and line["step"] > 0}
    if not found:
        names = sorted({name for line in lines for name in line})
        raise ValueError(f"{run} has no {metric!r} in its metrics.jsonl: expected one of {', '.join(names)}")
    return found


def smoothed(spread: np.ndarray, reach: int = 2) -> np.ndarray:
    """The root mean square of each and its neighbours: of a few runs a spread is a rough guess."""
    squares = [np.mean(np.square(spread[max(0, i - reach) : i + reach + 1])) for i in range(len(spread))]
    return np.sqrt(np.array(squares))


def draw(curve: Curve, groups: np.ndarray, path: Path) -> None:
    """The runs in their band."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = curve.every * np.arange(1, len(curve.losses) + 1)
    middle, reach = np.array(curve.losses), np.array(curve.tolerances)
    figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
    axis.fill_between(steps, middle - reach, middle + reach, color="tab:blue", alpha=0.2, label="band")
    for course, seed in zip(groups, curve.seeds, strict=True):
        axis.plot(steps, course, linewidth=0.9, label=f"seed {seed}")
    axis.set(
        xlabel="step", ylabel="loss (nats per token)" if curve.metric == "loss" else curve.metric, title=f"{curve.recipe}: reference curve"
    )
    axis.legend(fontsize="small")
    axis.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__, prog="python -m recipes.golden"))
    except ENDS_IN_WORDS as error:
        fail(str(error))
