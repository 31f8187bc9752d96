"""Laws over sizes: what a loss is at N parameters, fitted to a few, with intervals for one that was not seen.

    offset   L(N) = E + A / Nᵃ     (Hoffmann et al. 2022, arXiv:2203.15556, eq. 2, tokens in a fixed ratio to N)
    power    L(N) = A / Nᵃ         (Kaplan et al. 2020, arXiv:2001.08361, eq. 1.1)

For a given a both are linear in the rest, so least squares needs a search over a alone: a grid, then its best place refined.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from train.intervals import Estimate

LawName = Literal["offset", "power"]
EXPONENTS = np.geomspace(0.01, 2.0, 200)
RESAMPLES = 1000


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
    unit = np.exp(np.mean(np.log(n)))  # near 1 the columns stay apart in size

    def at_exponent(exponent: float) -> tuple[float, float, float]:
        """Squared error, E and A (of N / unit)."""
        x = (n / unit) ** -exponent
        floor = 0.0
        scale = float(x @ y / (x @ x))
        if name == "offset":
            spread = x - x.mean()
            slope = float(spread @ (y - y.mean()) / (spread @ spread))
            below = float(y.mean() - slope * x.mean())
            if slope < 0:  # no fall with size: the floor alone
                floor, scale = float(y.mean()), 0.0
            elif below >= 0:
                floor, scale = below, slope
        return float(np.sum(np.square(y - floor - scale * x))), floor, scale

    errors = [at_exponent(exponent)[0] for exponent in EXPONENTS]
    best = int(np.argmin(errors))
    low, high = EXPONENTS[max(0, best - 1)], EXPONENTS[min(len(EXPONENTS) - 1, best + 1)]
    golden = (np.sqrt(5) - 1) / 2
    for _ in range(60):  # golden section: between neighbours of the grid's best place the error has one valley
        first, second = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, second) if at_exponent(first)[0] < at_exponent(second)[0] else (first, high)
    exponent = float((low + high) / 2)
    _, floor, scale = at_exponent(exponent)
    return Law(name, floor, scale * unit**exponent, exponent)


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
    found = []
    for _ in range(RESAMPLES):
        drawn = rng.choice(residuals, len(n) + 1)
        found.append(float(fit(n, law.at(n) + drawn[:-1], law.name).at(size)) + drawn[-1])
    low, high = np.percentile(found, [2.5, 97.5])
    return Estimate(value, float(low), float(high), len(n), f"bootstrap of residuals, {RESAMPLES} draws")
