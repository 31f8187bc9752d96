"""How far a measured score may be from the true one: 95 % confidence intervals, each named by its method.

- `wilson`: a share of items that were right. Never leaves [0, 1], and is honest at 0 and 1 (Wilson 1927; Agresti and Coull 1998).
- `mean_of_groups`: the mean of several shares, each of its own items, by the normal law with the variance of each group (stratified).
- `bootstrap_ratio`: Σ a / Σ b over documents (nats over bytes), by drawing as many documents again and again (Efron 1979, percentiles).
- `clustered_ratio`: the same ratio by Student's law, of sums whose terms hang together inside a document (Liang and Zeger 1986).
- `mean_of_few`: the mean of a few numbers, such as differences over seeds, by Student's law, which knows how little few tell.

They tell what other items of the same kind would have given, and nothing about other prompts, seeds or tasks; the last, of seeds, nothing
about other items.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Z = 1.959963984540054  # of the normal law, 95 % two-sided
RESAMPLES = 2000
AT_ONCE = 100  # of them, in memory


class Estimate(NamedTuple):
    """A score and where the true one lies, 95 times of 100."""

    value: float
    low: float | None  # None: one item tells nothing of the spread
    high: float | None
    n: int  # items
    interval: str  # the method

    def record(self) -> dict[str, Any]:
        return self._asdict()


def wilson(right: float, n: int) -> Estimate:
    """The share `right / n`, where an undecided item may count a half. The interval holds every p for which the share lies within Z
    standard errors of p: (p̂ + Z²/2n ± Z √(p̂(1 - p̂)/n + Z²/4n²)) / (1 + Z²/n)."""
    if not 0 <= right <= n or n < 1:
        raise ValueError(f"expected 0 <= right <= n with n at least 1, got {right} of {n}")
    share = right / n
    centre, spread = share + Z**2 / (2 * n), Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    scale = 1 + Z**2 / n
    return Estimate(share, max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale), n, "Wilson")


def mean_of_groups(right: Sequence[int], n: Sequence[int]) -> Estimate:
    """The mean of the groups' shares, every group counting the same. Its standard error is √(Σ pᵢ(1 - pᵢ)/nᵢ) / groups."""
    if not len(right) == len(n) > 0 or min(n) < 1:
        raise ValueError(f"expected as many counts as groups, each of at least one item; got {list(right)} of {list(n)}")
    shares = [r / size for r, size in zip(right, n, strict=True)]
    value = sum(shares) / len(shares)
    error = math.sqrt(sum(p * (1 - p) / size for p, size in zip(shares, n, strict=True))) / len(shares)
    return Estimate(value, max(0.0, value - Z * error), min(1.0, value + Z * error), sum(n), "normal, stratified by group")


def mean_of_few(numbers: Sequence[float]) -> Estimate:
    """The mean x̄ of n numbers: x̄ ± t s / √n, with their standard deviation s (over n - 1) and t of n - 1 degrees of freedom."""
    n = len(numbers)
    if n < 1:
        raise ValueError("expected at least one number, got none")
    value = float(np.mean(numbers))
    if n == 1:
        return Estimate(value, None, None, 1, "none: one number")
    reach = student_t(n - 1) * float(np.std(numbers, ddof=1)) / math.sqrt(n)
    return Estimate(value, value - reach, value + reach, n, f"Student's t, {n - 1} degrees of freedom")


def clustered_ratio(tops: npt.ArrayLike, bottoms: npt.ArrayLike) -> Estimate:
    """r = Σ tops / Σ bottoms, one of each a document (cluster); tops may be sums of differences, of either sign.

    Its variance is that of the sum of what each document misses r by, G/(G - 1) Σ (top - r · bottom)² / (Σ bottoms)², and Student's law
    of G - 1 degrees of freedom gives the interval: terms inside a document may hang together as they like.
    """
    top, bottom = np.asarray(tops, np.float64), np.asarray(bottoms, np.float64)
    if len(top) != len(bottom) or not bottom.sum() > 0:
        raise ValueError(f"expected as many tops as bottoms, the latter not all 0; got {len(top)} and {len(bottom)}")
    value, n = float(top.sum() / bottom.sum()), len(top)
    if n == 1:
        return Estimate(value, None, None, 1, "none: one document")
    error = math.sqrt(n / (n - 1) * np.sum(np.square(top - value * bottom))) / bottom.sum()
    reach = student_t(n - 1) * float(error)
    return Estimate(value, value - reach, value + reach, n, f"Student's t, clustered by document, {n - 1} degrees of freedom")


def student_t(freedom: int) -> float:
    """The t that a number of Student's law stays within 95 times of 100, either way; 12.706 for 1 degree of freedom, 1.960 for many."""

    def within(t: float) -> float:
        """P(|T| <= t), a finite sum (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4) in θ = atan(t / √freedom)."""
        angle = math.atan(t / math.sqrt(freedom))
        cosine, odd = math.cos(angle), freedom % 2
        total, term = 0.0, cosine if odd else 1.0
        for k in range(2 + odd, freedom + 1, 2):
            total, term = total + term, term * cosine**2 * (k - 1) / k
        return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total

    low, high = 0.0, 1000.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) < 0.95 else (low, middle)
    return high


def bootstrap_ratio(tops: npt.ArrayLike, bottoms: npt.ArrayLike, *, seed: int) -> Estimate:
    """Σ tops / Σ bottoms, one of each a document."""
    top, bottom = np.asarray(tops, np.float64), np.asarray(bottoms, np.float64)
    if len(top) != len(bottom) or not bottom.sum() > 0:
        raise ValueError(f"expected as many tops as bottoms, the latter not all 0; got {len(top)} and {len(bottom)}")
    value = float(top.sum() / bottom.sum())
    if len(top) == 1:
        return Estimate(value, None, None, 1, "none: one document")
    rng = np.random.default_rng(seed)
    ratios = []
    for _ in range(RESAMPLES // AT_ONCE):
        drawn = rng.integers(0, len(top), (AT_ONCE, len(top)))
        below = bottom[drawn].sum(axis=1)
        ratios.append(top[drawn].sum(axis=1)[below > 0] / below[below > 0])
    low, high = np.percentile(np.concatenate(ratios), [2.5, 97.5])
    return Estimate(value, float(low), float(high), len(top), f"bootstrap over documents, {RESAMPLES} draws")
