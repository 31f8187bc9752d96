"""The curve a run must follow: the loss of earlier runs with the same settings on the same text, with a band around it.

`recipes.golden` makes one of runs; it lies in `docs/golden/`. A run whose settings it has is watched: the mean loss of every few steps must
lie within the tolerance, and the first one that does not is said at once, so that what a change has broken shows in the first minute.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from loguru import logger
from pydantic import BaseModel, model_validator

from recipes.running import RunConfig

CURVES = Path(__file__).parents[1] / "docs" / "golden"  # there in a checkout
# Settings that do not change what is trained, or are known otherwise (text and models by their digests): those of RunConfig, and these.
BESIDE = {
    *RunConfig.model_fields,
    "data",
    "seed",
    "preset",
    "minutes",
    "max_epochs",
    "report_samples",
    "source",
    "model",
    "teacher",
    "gap_limit",
}


class Curve(BaseModel, frozen=True, extra="forbid"):
    """What earlier runs did."""

    recipe: str
    settings: dict[str, Any]  # of the runs, without those in `BESIDE`; `steps` among them
    identity: dict[str, str]  # digests of what it was made from: text, tokenizer, the model it began with
    metric: str = "loss"  # what is followed, of the numbers of metrics.jsonl
    seeds: tuple[int, ...]
    every: int  # steps in a mean
    losses: tuple[float, ...]  # of the metric (a loss: nats a token), mean over `every` steps and over the runs
    tolerances: tuple[float, ...]  # a mean may be this far from that
    first: tuple[float, ...]  # the metric of the first steps with the first of the seeds, one by one
    made_with: dict[str, Any]  # commit, device and kernels

    @model_validator(mode="after")
    def _is_whole(self) -> "Curve":
        if not self.losses or len(self.losses) != len(self.tolerances) or not self.seeds or self.every < 1:
            raise ValueError("a curve needs a tolerance for each loss, at least one of them, a seed, and `every` of at least 1")
        return self

    def why_not(self, recipe: str, config: Any, identity: Mapping[str, str]) -> str | None:
        """Why it is not the curve of a run, in words; `None` where it is. Settings that came later count as they are by default."""
        if self.recipe != recipe:
            return f"it is of {self.recipe}"
        if other := sorted(name for name in self.identity if self.identity[name] != identity.get(name)):
            return f"another {' and '.join(other)}"
        if unknown := sorted(self.settings.keys() - type(config).model_fields.keys()):
            return f"settings that are no more: {', '.join(unknown)}"
        needed = {name: getattr(config, name) for name, field in type(config).model_fields.items() if field.is_required()}
        theirs, ours = settings_of(type(config)(**(needed | self.settings))), settings_of(config)
        if other := sorted(name for name in ours if ours[name] != theirs[name]):
            return f"another {', '.join(other)}"
        if config.seed not in self.seeds and len(self.seeds) < 3:  # of three, any other will lie among them
            return f"seed {', '.join(map(str, self.seeds))}"
        return None


def settings_of(config: BaseModel) -> dict[str, Any]:
    """What is trained, and for how long: the settings but for those in `BESIDE`."""
    return config.model_dump(mode="json", exclude=BESIDE)


def read_curve(path: Path) -> Curve:
    """**Raises:** `ValueError` that names the file where it is no curve."""
    try:
        return Curve.model_validate_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no reference curve as recipes.golden writes them: {error}") from None


def curve_for(recipe: str, config: Any, identity: Mapping[str, str]) -> Curve | None:
    """The curve that was asked for, or the one of these settings among those of the project. What was found is said.

    **Raises:** `ValueError` where the one asked for is of other settings.
    """
    if config.curve is not None:
        curve = read_curve(config.curve)
        if reason := curve.why_not(recipe, config, identity):
            raise ValueError(f"--curve {config.curve} is not the curve of this run: {reason}")
        logger.info(f"followed beside {config.curve}")
        return curve
    reasons = {}
    for path in sorted(CURVES.glob(f"{recipe}*.json")):
        curve = read_curve(path)
        reasons[path.name] = curve.why_not(recipe, config, identity)
        if reasons[path.name] is None:
            logger.info(f"followed beside the reference curve docs/golden/{path.name}")
            return curve
    if reasons:
        logger.info("no reference curve for this run: " + "; ".join(f"{name}: {reason}" for name, reason in reasons.items()))
    return None


def means(losses: Mapping[int, float], every: int) -> Iterator[tuple[int, float]]:
    """`(step, mean loss of it and the steps before it)` for each whole group of `every` steps, steps counted from 1."""
    for end in range(every, max(losses, default=0) + 1, every):
        group = [losses[step] for step in range(end - every + 1, end + 1) if step in losses]
        if len(group) == every:
            yield end, sum(group) / every


class Watch:
    """Tells when a run leaves the band, once for each time it does."""

    def __init__(self, curve: Curve | None) -> None:
        self.curve = curve
        self.group: dict[int, float] = {}
        self.left: list[int] = []  # steps at whose means the run was found outside, having been inside before
        self._outside = False

    def line(self, step: int, metrics: Mapping[str, Any]) -> None:
        """One line of the log, which may have the number that is followed."""
        if self.curve is not None and self.curve.metric in metrics:
            self.see(step, float(metrics[self.curve.metric]))

    def see(self, step: int, loss: float) -> None:
        """One more step, counted from 1. A group that a resumed run has seen in part is passed over."""
        if self.curve is None:
            return
        self.group[step] = loss
        if step % self.curve.every:
            return
        found = [mean for end, mean in means(self.group, self.curve.every) if end == step]
        self.group.clear()
        place = step // self.curve.every - 1
        if not found or place >= len(self.curve.losses):
            return
        expected, tolerance = self.curve.losses[place], self.curve.tolerances[place]
        outside = not abs(found[0] - expected) <= tolerance  # NaN is outside
        if outside and not self._outside:
            self.left.append(step)
            logger.warning(
                f"step {step}: the run has left its reference curve: the mean {self.curve.metric} of {self.curve.every} steps is "
                f"{found[0]:.4f}, expected {expected:.4f} ± {tolerance:.4f}. Is it the change you meant, or is something broken?"
            )
        elif self._outside and not outside:
            logger.info(f"step {step}: back on its reference curve")
        self._outside = outside

    def record(self) -> dict[str, Any]:
        """For the results: nothing where there was no curve."""
        return {} if self.curve is None else {"left_reference_curve_at": self.left}
