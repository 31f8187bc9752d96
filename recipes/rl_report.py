"""What `recipes.grpo_arithmetic` says of its steps and of the whole: where the seconds go, what the updates told, before and after."""

import time
from pathlib import Path
from typing import Any

import numpy as np

from data.tasks.problems import Share
from train.logs import read_metrics


class Clock:
    """Where the seconds of a step go."""

    PARTS = ("rollout_s", "reward_s", "check_s", "update_s")

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(self.PARTS, 0.0)
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        """The time since the last lap belongs to this part."""
        now = time.perf_counter()
        self.seconds[part] += now - self._last
        self._last = now


def of_updates(told: list[dict[str, Any]]) -> dict[str, float]:
    """The numbers of the updates of one step: their mean; the largest of those called so; the last of what counts up."""
    numbers = {name: [float(update[name]) for update in told] for name in told[0] if name not in ("update_ratio", "tokens", "sigmas")}
    joined = {name: max(values) if name.endswith("_max") else float(np.mean(values)) for name, values in numbers.items()}
    ratios = {f"update_ratio/{role}": float(value) for role, value in told[-1].get("update_ratio", {}).items() if np.isfinite(value)}
    return joined | {name: numbers[name][-1] for name in ("skipped", "spikes")} | ratios


def nothing_learned(idle: int, metrics: dict[str, Any]) -> str:
    right, wrong = 100 * metrics["groups_all_right"], 100 * metrics["groups_all_wrong"]
    return (
        f"steps so far with nothing to learn from: {idle}. In each group all answers were worth the same (in this one {right:.0f}% of "
        f"groups all right, {wrong:.0f}% all wrong). Is the task too easy or too hard for this model?"
    )


# ------------------------------------------------------------------------------------------- of the whole run


def summary(folder: Path, train_s: float, ks: list[int], **asked: Any) -> dict[str, Any]:
    """Before and after, and where the time went. `asked`: what was set, to stand in front."""
    lines = read_metrics(folder / "metrics.jsonl")
    looks = [line for line in lines if "pass@1" in line]
    steps = [line for line in lines if "reward" in line]
    spent = {part: sum(line[part] for line in steps) for part in Clock.PARTS}

    def look(line: dict[str, Any]) -> dict[str, list[float]]:
        return {f"pass@{k}": [line[f"pass@{k}"], line[f"pass@{k}_low"], line[f"pass@{k}_high"]] for k in ks}

    return {
        **asked,
        "minutes": train_s / 60,
        "train_s": train_s,
        "before": look(looks[0]),
        "after": look(looks[-1]),
        "largest_gap": max(line["gap_max"] for line in steps),
        "share_of_time": {part.removesuffix("_s"): seconds / sum(spent.values()) for part, seconds in spent.items()},
        "rollout_tokens_per_s": float(np.median([line["rollout_tokens_per_s"] for line in steps])),
        "tokens_generated": int(sum(line["tokens_generated"] for line in steps)),
    }


def show(results: dict[str, Any]) -> None:
    """On the screen, what came of it."""

    def words(measured: list[float]) -> str:
        return f"{Share(*measured)}"

    print(f"\nheld-out problems, seed {results['seed']}, {results['algorithm']}, {results['minutes']:.1f} minutes of RL")
    for k in results["before"]:
        print(f"  {k:8} before {words(results['before'][k]):26} after {words(results['after'][k])}")
    if control := results.get("control"):
        print(
            f"  control: {control['minutes']:.1f} more minutes of imitation: best {words(control['best'])}, last {words(control['last'])}"
        )
    shares = ", ".join(f"{name} {100 * share:.0f}%" for name, share in results["share_of_time"].items())
    print(f"  time: {shares}; {results['rollout_tokens_per_s']:,.0f} rollout tokens/s; largest gap {results['largest_gap']:.1e} nats")


def json_safe(value: Any) -> Any:
    """Infinities as words: JSON has none."""
    if isinstance(value, dict):
        return {name: json_safe(each) for name, each in value.items()}
    return str(value) if isinstance(value, float) and not np.isfinite(value) else value
