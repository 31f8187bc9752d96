"""Laws over sizes: what a loss is at N parameters, fitted to a few, with intervals for one that was not seen.

    offset   L(N) = E + A / Nᵃ     (Hoffmann et al. 2022, arXiv:2203.15556, eq. 2, tokens in a fixed ratio to N)
    power    L(N) = A / Nᵃ         (Kaplan et al. 2020, arXiv:2001.08361, eq. 1.1)

For a given a both are linear in the rest, so least squares needs a search over a alone: a grid, then a finer one around its best place.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from train.intervals import Estimate

LawName = Literal["offset", "power"]
EXPONENTS = np.geomspace(0.01, 2.0, 200)
REFINED = 5  # times: the grid between the best place's neighbours, each ten times as fine
RESAMPLES = 500


class Law(NamedTuple):
    """A fitted law."""

    name: LawName
    floor: float  # E; 0 in a power law
    scale: float  # A
    exponent: float  # a

    def at(self, sizes: npt.ArrayLike) -> np.ndarray:
        return self.floor + self.scale * np.asarray(sizes, np.float64) ** -self.exponent

    @property
    def numbers(self) -> int:
        """Free ones."""
        return 3 if self.name == "offset" else 2

    def words(self) -> str:
        floor = f"{self.floor:.4f} + " if self.name == "offset" else ""
        return f"L(N) = {floor}{self.scale:.4g} / N^{self.exponent:.4f}"


def fit(sizes: npt.ArrayLike, losses: npt.ArrayLike, name: LawName = "offset") -> Law:
    """The law of least squares; neither E nor A is below 0.

    **Raises:** `ValueError` for fewer different sizes than the law has numbers.
    """
    n, y = np.asarray(sizes, np.float64), np.asarray(losses, np.float64)
    needed = 3 if name == "offset" else 2
    if len(n) != len(y) or len(np.unique(n)) < needed:
        raise ValueError(
            f"a law {name} has {needed} numbers: expected losses of at least {needed} different sizes, got {sorted(set(n.tolist()))}"
        )
    floor, scale, exponent = _fitted(n, y[None], name)
    return Law(name, float(floor[0]), float(scale[0]), float(exponent[0]))


def _fitted(n: np.ndarray, y: np.ndarray, name: LawName) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """E, A and a of each of several rows of losses, `[rows, runs]`, at the same sizes."""
    unit = np.exp(np.mean(np.log(n)))  # near 1 the columns stay apart in size

    def at(exponents: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Squared error, E and A (of N / unit) at each of a row's exponents, `[rows or 1, candidates]`."""
        x = (n / unit) ** -exponents[..., None]  # [rows or 1, candidates, runs]
        target = y[:, None, :]
        floor = np.zeros((len(y), exponents.shape[1]))
        scale = np.sum(x * target, axis=-1) / np.sum(x * x, axis=-1)
        if name == "offset":
            spread, mean = x - x.mean(axis=-1, keepdims=True), y.mean(axis=-1)[:, None]
            slope = np.sum(spread * (target - mean[..., None]), axis=-1) / np.sum(spread * spread, axis=-1)
            below = mean - slope * x.mean(axis=-1)
            flat, above = slope < 0, below >= 0  # no fall with size: the floor alone; a floor below 0: none
            floor = np.where(flat, mean, np.where(above, below, 0.0))
            scale = np.where(flat, 0.0, np.where(above, slope, scale))
        return np.sum(np.square(target - floor[..., None] - scale[..., None] * x), axis=-1), floor, scale

    rows = np.arange(len(y))
    grid = EXPONENTS[None]
    for _ in range(REFINED + 1):
        error, floor, scale = at(grid)
        best = np.argmin(error, axis=1)
        exponent = np.broadcast_to(grid, error.shape)[rows, best]
        below, above = (np.broadcast_to(grid, error.shape)[rows, np.clip(best + step, 0, grid.shape[1] - 1)] for step in (-1, 1))
        grid = np.linspace(below, above, 21, axis=1)
    floor, scale = floor[rows, best], scale[rows, best]
    return floor, scale * unit**exponent, exponent


def chosen(sizes: npt.ArrayLike, losses: npt.ArrayLike) -> tuple[Law, dict[str, float]]:
    """The law that foretells best the largest of these sizes from the others, fitted to all of them; and how far off each was (root mean
    square). With three sizes or fewer it is the power law."""
    n, y = np.asarray(sizes, np.float64), np.asarray(losses, np.float64)
    inside = n < n.max()
    off: dict[str, float] = {}
    names: tuple[LawName, ...] = ("offset", "power")
    for name in names:
        if len(np.unique(n[inside])) >= (3 if name == "offset" else 2):
            off[name] = float(np.sqrt(np.mean(np.square(fit(n[inside], y[inside], name).at(n[~inside]) - y[~inside]))))
    best: Any = min(off, key=lambda name: off[name]) if off else "power"
    return fit(n, y, best), off


def foretold(law: Law, sizes: Sequence[float], losses: Sequence[float], size: float, *, seed: int = 0) -> Estimate:
    """What one run at `size` will come to, and where it will lie 95 times of 100: residuals are drawn anew, the law is fitted to what they
    make, and one more is added (bootstrap of residuals, Efron 1979; they are first made as large as n points of a law with p numbers leave
    them too small, √(n / (n - p))). The law itself is taken for granted."""
    n, y = np.asarray(sizes, np.float64), np.asarray(losses, np.float64)
    value, free = float(law.at(size)), len(n) - law.numbers
    if free < 1:
        return Estimate(value, None, None, len(n), f"none: {len(n)} runs for {law.numbers} numbers")
    residuals = (y - law.at(n)) * np.sqrt(len(n) / free)
    rng = np.random.default_rng(seed)
    drawn = rng.choice(residuals, (RESAMPLES, len(n) + 1))
    floor, scale, exponent = _fitted(n, law.at(n) + drawn[:, :-1], law.name)
    found = floor + scale * size**-exponent + drawn[:, -1]
    low, high = np.percentile(found, [2.5, 97.5])
    return Estimate(value, float(low), float(high), len(n), f"bootstrap of residuals, {RESAMPLES} draws")


def valley(places: Sequence[float], losses: Sequence[float]) -> float:
    """Where a loss over a learning rate, a batch or a size is least: the bottom of the parabola, in the logarithm of the place, through the
    best one and its two neighbours; the best itself where it stands at an end, or where the three make no valley."""
    order = np.argsort(places)
    x, y = np.log(np.asarray(places, float)[order]), np.asarray(losses, float)[order]
    i = int(np.argmin(y))
    if i in (0, len(y) - 1):
        return float(np.exp(x[i]))
    a, b, _ = np.polyfit(x[i - 1 : i + 2], y[i - 1 : i + 2], 2)
    return float(np.exp(-b / (2 * a))) if a > 0 else float(np.exp(x[i]))


def exponent(best: Mapping[int, float] | Mapping[float, float]) -> float:
    """p in best ~ sizeᵖ, by least squares in logarithms."""
    x, y = np.log(np.array(list(best))), np.log(np.array(list(best.values())))
    return float(np.polyfit(x, y, 1)[0])
