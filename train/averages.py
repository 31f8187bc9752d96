"""Averages of the weights over the steps: often better than the last weights, and steadier to look at.

The step keeps `average` beside the weights and moves it towards them by a rate it is given, as it is given the learning rate:
`average += rate * (weights - average)`. Which average it is lies in the rates alone, plain numbers by step.
"""

import math
from collections.abc import Callable
from typing import Literal

from pydantic import Field

from train.settings import Settings


class AverageConfig(Settings):
    """Which average of the weights is kept. It costs the memory of the weights once more."""

    name: Literal["none", "ema", "swa"] = Field(
        "none", description="ema: exponential moving average; swa: plain mean over the last part of the run"
    )
    decay: float = Field(0.999, ge=0, lt=1, description="ema: weight of the past, per step; less at the start of the run")
    start: float = Field(0.75, ge=0, lt=1, description="swa: fraction of the steps after which the mean begins")
    every: int = Field(1, ge=1, description="swa: steps between weights that enter the mean")
    use: bool = Field(True, description="validate, sample and export the average (and measure both); no: the weights as trained")


def average_rate(config: AverageConfig, total_steps: int) -> Callable[[int], float]:
    """How far the average moves towards the weights that update 0, 1, ... made; 1 takes them over, 0 leaves it.

    ema: 1 - decay; at the start more, 9 / (10 + step), so that the random weights of the beginning are soon forgotten. swa: the mean of the
    weights after updates `start`, `start + every`, ... (Izmailov et al. 2018, arXiv:1803.05407); before it begins, the weights themselves.
    """
    first = math.ceil(config.start * total_steps)

    def at(step: int) -> float:
        if config.name == "ema":
            return max(1 - config.decay, 9 / (10 + step))
        if step <= first:
            return 1.0
        count, rest = divmod(step - first, config.every)
        return 0.0 if rest else 1 / (count + 1)

    return at
