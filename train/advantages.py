"""From rewards to advantages: how much better each answer was than what could be expected of its prompt.

Rewards come as `[prompts, n]`: n answers to each prompt. NaN marks an answer that is left out; it takes part in no mean, and its advantage
is NaN. All of this is a few numbers a step, so it is numpy, in fp64.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float

Rewards = Float[np.ndarray, "prompts n"]

STD_EPS = 1e-4  # added to the standard deviation, as in TRL's GRPOTrainer
SAME = 1e-9  # rewards of a group that differ by less are equal


def reinforce(rewards: Rewards, baseline: float = 0.0) -> Rewards:
    """A_i = r_i - b with one b for all prompts: REINFORCE (Williams 1992, eq. 4). `RunningMean` keeps such a b."""
    return rewards - baseline


def rloo(rewards: Rewards) -> Rewards:
    """A_i = r_i - mean_{j≠i} r_j: the other answers to the prompt are the baseline (Kool et al. 2019; Ahmadian et al. 2024,
    arXiv:2402.14740, eq. 6). It equals n/(n-1) · (r_i - mean r)."""
    counts = np.sum(~np.isnan(rewards), axis=1, keepdims=True)
    others = (np.nansum(rewards, axis=1, keepdims=True) - rewards) / np.maximum(counts - 1, 1)
    return np.where(counts > 1, rewards - others, np.where(np.isnan(rewards), np.nan, 0.0))


def grpo(rewards: Rewards) -> Rewards:
    """A_i = (r_i - mean r) / (std r + 1e-4) over the answers to the prompt (Shao et al. 2024, arXiv:2402.03300, section 4.1.2). std has n-1
    in it, and the small number is added, as TRL and verl do; the paper says neither."""
    counts = np.sum(~np.isnan(rewards), axis=1, keepdims=True)
    centred = dr_grpo(rewards)
    variance = np.nansum(np.square(centred), axis=1, keepdims=True) / np.maximum(counts - 1, 1)
    return centred / (np.sqrt(variance) + STD_EPS)


def dr_grpo(rewards: Rewards) -> Rewards:
    """A_i = r_i - mean r: without the division, which favours prompts that are nearly always or nearly never solved (Liu et al. 2025,
    arXiv:2503.20783, section 3.2)."""
    counts = np.maximum(np.sum(~np.isnan(rewards), axis=1, keepdims=True), 1)
    return rewards - np.nansum(rewards, axis=1, keepdims=True) / counts


class RunningMean:
    """A baseline for `reinforce`: the mean reward of past batches, b ← decay · b + (1 - decay) · mean r, started at the first mean."""

    def __init__(self, decay: float = 0.9, value: float | None = None) -> None:
        self.decay, self.value = decay, value

    def advantages(self, rewards: Rewards) -> Rewards:
        """Against the mean before this batch (with none yet, against its own), which then enters it."""
        mean = float(np.nanmean(rewards))
        baseline = mean if self.value is None else self.value
        self.value = self.decay * baseline + (1 - self.decay) * mean
        return reinforce(rewards, baseline)


OF_GROUP: dict[str, Callable[[Rewards], Rewards]] = {"rloo": rloo, "grpo": grpo, "dr_grpo": dr_grpo}


def informative(rewards: Rewards) -> Bool[np.ndarray, " prompts"]:
    """Which groups have rewards that differ. In the others every advantage is 0 and nothing is learned; DAPO draws new prompts in their
    place (Yu et al. 2025, arXiv:2503.14476, section 3.2, "dynamic sampling")."""
    low = np.min(np.where(np.isnan(rewards), np.inf, rewards), axis=1)
    high = np.max(np.where(np.isnan(rewards), -np.inf, rewards), axis=1)
    return high - low > SAME


def overlong_penalty(lengths: np.ndarray, most: int, buffer: int) -> np.ndarray:
    """What is added to the reward of long answers (DAPO, arXiv:2503.14476, eq. 13, "soft overlong punishment"):

    0 up to most - buffer tokens, then ((most - buffer) - length) / buffer, down to -1 at `most`; -1 beyond.
    """
    if not 0 < buffer <= most:
        raise ValueError(f"the buffer of the length penalty ({buffer} tokens) must lie in 1 … {most}, the most an answer may have")
    return np.clip((most - buffer - np.asarray(lengths, np.float64)) / buffer, -1.0, 0.0)
