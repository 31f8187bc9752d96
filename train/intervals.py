"""How far a measured score may be from the true one: 95 % confidence intervals, each named by its method.

- `wilson`: a share of items that were right. Never leaves [0, 1], and is honest at 0 and 1 (Wilson 1927; Agresti and Coull 1998).

They tell what other items of the same kind would have given, and nothing about other prompts, seeds or tasks.
"""

import math
from typing import Any, NamedTuple

Z = 1.959963984540054  # of the normal law, 95 % two-sided


class Estimate(NamedTuple):
    """A score and where the true one lies, 95 times of 100."""

    value: float
    low: float | None  # None: one item tells nothing of the spread
    high: float | None
    n: int  # items
    interval: str  # the method

    def record(self) -> dict[str, Any]:
        return self._asdict()


def wilson(right: int, n: int) -> Estimate:
    """The share `right / n`. The interval holds every p for which the share lies within Z standard errors of p:
    (p̂ + Z²/2n ± Z √(p̂(1 - p̂)/n + Z²/4n²)) / (1 + Z²/n)."""
    if not 0 <= right <= n or n < 1:
        raise ValueError(f"expected 0 <= right <= n with n at least 1, got {right} of {n}")
    share = right / n
    centre, spread = share + Z**2 / (2 * n), Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    scale = 1 + Z**2 / n
    return Estimate(share, max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale), n, "Wilson")
