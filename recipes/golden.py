"""Make the reference curve of a recipe from its runs (`recipes.curves`).

    python -m recipes.golden runs/pretrain_small-A runs/pretrain_small-B runs/pretrain_small-C
    python -m recipes.pretrain_small --steps 1082                               # is watched from now on

The runs have the same settings on the same text; seeds may differ, and with three of them the curve serves any seed. The losses of every
few steps are averaged, over the runs too. The tolerance is `--sigmas` times the spread of the runs, smoothed over neighbours, and at least
`--least`: other kernels round in other ways. The picture shows the runs in their band.
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
    every: int = Field(10, ge=1, description="steps in a mean")
    sigmas: float = Field(4.0, gt=0, description="standard deviations over the runs that the loss may be away")
    least: float = Field(0.05, gt=0, description="nats a token that it may always be away")
    first: int = Field(10, ge=1, description="steps whose losses are kept one by one, to be replayed by the tests")
    picture: Path | None = Field(None, description="where to draw runs and band; None: nowhere")


def main(config: Config) -> Path:
    """Read the runs, write the curve. Returns its file."""
    plain_messages()
    records = [json.loads(read_file(run / "manifest.json")) for run in config.runs]
    settings = [without_beside(json.loads(read_file(run / CONFIG_FILE))) for run in config.runs]
    recipes = {record["sessions"][-1]["command"][2].removeprefix("recipes.") for record in records}
    identities = [{"corpus": record["corpus"]["sha256"], "tokenizer": record["tokenizer"]["digest"]} for record in records]
    check_alike(config.runs, {"recipe": [*recipes], "settings": settings, "text": identities})
    courses = [losses_of(run, settings[0]["steps"]) for run in config.runs]
    groups = np.array([[mean for _, mean in means(course, config.every)] for course in courses])  # runs × groups
    if not groups.size:
        raise ValueError(f"the runs have {settings[0]['steps']} steps, fewer than --every {config.every}")
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
    name = config.name or f"{recipe}-{settings[0]['steps']}"
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


def losses_of(run: Path, steps: int) -> dict[int, float]:
    """The loss of each step. **Raises:** `ValueError` for a run that has not ended."""
    found = {line["step"]: line["loss"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line}
    if len(found) < steps:
        raise ValueError(f"{run} has the losses of {len(found)} steps of {steps}: has it ended?")
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
    axis.set(xlabel="step", ylabel="loss (nats per token)", title=f"{curve.recipe}: reference curve")
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
