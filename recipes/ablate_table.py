"""What a series of ablations says: differences to the baseline, at the same tokens and at the same minutes, as a table and a picture."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recipes.trial import machines
from train.intervals import Estimate, mean_of_few

MORE = 1.5  # times the baseline's tokens, in the runs that say what a token is worth
MARKS = ("<!-- the table of recipes.ablate begins -->", "<!-- the table of recipes.ablate ends -->")


def summed_up(lines: Sequence[Mapping[str, Any]], times: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """By name, the best first: `bits_per_byte` (mean over seeds), `difference` (an `Estimate`, to the baseline with the same seed), `time`
    (of a token, over the baseline's, from `times`), `at_same_minutes` (the difference to expect then). NaN stands for what is not known:
    the time, or the price of a token."""
    of: dict[str, dict[int, Mapping[str, Any]]] = {}
    for line in lines:
        of.setdefault(line["name"], {})[line["seed"]] = line
    base = of["baseline"]
    price = price_of_tokens(base, of.get("more_tokens", {}))
    found: dict[str, dict[str, Any]] = {}
    for name, runs in of.items():
        seeds = sorted(runs.keys() & base.keys())
        if name == "more_tokens" or not seeds:
            continue
        difference = mean_of_few([runs[s]["bits_per_byte"] - base[s]["bits_per_byte"] for s in seeds])
        time = 1.0 if name == "baseline" else times.get(name, math.nan)
        found[name] = {
            "bits_per_byte": float(np.mean([runs[s]["bits_per_byte"] for s in seeds])),
            "difference": difference,
            "time": time,
            "at_same_minutes": difference.value + price * math.log(time) if name != "baseline" else 0.0,
            "parameters": runs[seeds[0]]["parameters"],
        }
    return dict(sorted(found.items(), key=lambda item: item[1]["difference"].value))


def price_of_tokens(base: Mapping[int, Mapping[str, Any]], more: Mapping[int, Mapping[str, Any]]) -> float:
    """What the baseline loses in bits per byte for each e-fold of tokens that it gets fewer, from runs with more of them; NaN without."""
    pairs = [(base[seed], more[seed]) for seed in base.keys() & more.keys()]
    if not pairs:
        return math.nan
    slopes = [(b["bits_per_byte"] - m["bits_per_byte"]) / math.log(m["tokens"] / b["tokens"]) for b, m in pairs]
    return float(np.mean(slopes))


def verdict(difference: Estimate) -> str:
    """By the interval: what lies on one side of 0 altogether."""
    if difference.low is None or difference.high is None:
        return "one seed"
    return "better" if difference.high < 0 else "worse" if difference.low > 0 else "not decided"


def words(found: Mapping[str, Mapping[str, Any]], lines: Sequence[Mapping[str, Any]], timed: Sequence[Mapping[str, Any]], data: str) -> str:
    """The table as Markdown, what it was measured on, and the winners."""
    base = next(line for line in lines if line["name"] == "baseline")
    seeds = len({line["seed"] for line in lines if line["name"] == "baseline"})
    head = (
        f"Measured on {machines(lines)}: {data}, {base['tokens']:,} tokens a run ({base['steps']} steps), "
        f"{base['parameters']:,} parameters, {base['fast_step_s']:.3f} s a step, {seeds} seed{'s' if seeds > 1 else ''}; "
        f"the baseline comes to {found['baseline']['bits_per_byte']:.4f} bits per byte."
        + (f" Times measured on {machines(timed)}." if timed else "")
    )
    rows = [
        "| change | bits per byte, same tokens | 95 % | verdict | time of a token | bits per byte, same minutes (estimated) |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in found.items():
        if name == "baseline":
            continue
        d: Estimate = row["difference"]
        interval = "" if d.low is None or d.high is None else f"{d.low:+.4f} to {d.high:+.4f}"
        minutes = row["at_same_minutes"]
        rows.append(
            f"| `{name}` | {d.value:+.4f} | {interval} | {verdict(d)} | {_known(row['time'], 'x {:.2f}')} | {_known(minutes, '{:+.4f}')} |"
        )
    return "\n".join([head, "", *rows, "", *winners(found)])


def _known(value: float, form: str) -> str:
    return "not known" if math.isnan(value) else form.format(value)


def winners(found: Mapping[str, Mapping[str, Any]], most: int = 3) -> list[str]:
    """The changes that are better for certain at the same tokens, and those expected to be at the same minutes."""
    others = {name: row for name, row in found.items() if name != "baseline"}
    sure = [name for name, row in others.items() if verdict(row["difference"]) == "better"][:most]
    faster = sorted((name for name, row in others.items() if row["at_same_minutes"] < 0), key=lambda n: others[n]["at_same_minutes"])[:most]

    def listed(names: Sequence[str]) -> str:
        return ", ".join(f"`{name}`" for name in names) or "none"

    return [
        f"Better at the same tokens, whole interval below 0: {listed(sure)}. Expected to be better at the same minutes: {listed(faster)}."
    ]


def put(said: str, page: Path, picture: Path | None, *, marks: tuple[str, str] = MARKS, words: str = "What each change is worth") -> None:
    """Put a table between its marks on a page, and below it the picture with some words.

    **Raises:** `ValueError` for a page without them.
    """
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    before, begin, rest = text.partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not begin or not end:
        raise ValueError(f"{page} has no place for the table: expected a line {marks[0]} and, below it, {marks[1]}")
    shown = "" if picture is None else f"\n![{words}](images/{picture.name})\n"
    page.write_text(f"{before}{begin}\n\n{said}\n{shown}\n{end}{after}", encoding="utf-8")


def draw(found: Mapping[str, Mapping[str, Any]], path: Path) -> Path:
    """Differences with their intervals, best above; open rings where the same minutes would take them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [(name, row) for name, row in found.items() if name != "baseline"][::-1]
    figure, axis = plt.subplots(figsize=(7, 1.2 + 0.26 * max(1, len(rows))), layout="constrained")
    for y, (_, row) in enumerate(rows):
        d: Estimate = row["difference"]
        color = {"better": "tab:green", "worse": "tab:red"}.get(verdict(d), "tab:gray")
        if d.low is not None and d.high is not None:
            axis.plot([d.low, d.high], [y, y], color=color, linewidth=1.6)
        axis.plot(d.value, y, "o", color=color, markersize=5)
        if not math.isnan(row["at_same_minutes"]):
            axis.plot(row["at_same_minutes"], y, "o", markerfacecolor="none", markeredgecolor="black", markersize=6)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(rows)), [name for name, _ in rows])
    axis.set_xlabel(
        "bits per byte less (left) or more than the baseline\nfilled: same tokens, 95 % over seeds\nring: same minutes, estimated"
    )
    axis.grid(axis="x", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
