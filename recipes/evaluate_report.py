"""What an evaluation says at its end: a table on the screen and a picture. The numbers are those of `results.json`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

MOST_GROUPS = 12  # on the screen; all are in results.json and in the picture


Published = Mapping[str, Mapping[str, float]]  # task → metric → fraction; "" is the headline


def published_scores(given: Sequence[str], tasks: Sequence[str]) -> dict[str, dict[str, float]]:
    """`TASK=PERCENT`, or `TASK/METRIC=PERCENT`, as fractions. **Raises:** `ValueError` for a word that is not, or a task not asked for."""
    found: dict[str, dict[str, float]] = {}
    for spec in given:
        name, _, percent = spec.partition("=")
        task, _, metric = name.partition("/")
        try:
            share = float(percent) / 100
        except ValueError:
            raise ValueError(f"--published '{spec}' is not TASK=PERCENT or TASK/METRIC=PERCENT, as in arc_easy/raw=54.1") from None
        if task not in tasks or not 0 <= share <= 1:
            raise ValueError(f"--published '{spec}': expected a percentage for one of the tasks {', '.join(tasks)}")
        found.setdefault(task, {})[metric] = share
    return found


def with_published(results: Mapping[str, Mapping[str, Any]], published: Published) -> dict[str, dict[str, Any]]:
    """The results, each metric with the figure that others published for it.

    **Raises:** `ValueError` for a metric that a task has not.
    """
    marked = {}
    for name, result in results.items():
        headline = next(iter(result["metrics"]))
        known = {metric or headline: share for metric, share in published.get(name, {}).items()}
        if strange := sorted(known.keys() - result["metrics"].keys()):
            raise ValueError(f"--published names {', '.join(strange)} of {name}, whose metrics are {', '.join(result['metrics'])}")
        metrics = {
            metric: estimate | ({"published": known[metric]} if metric in known else {}) for metric, estimate in result["metrics"].items()
        }
        marked[name] = {**result, "metrics": metrics}
    return marked


def show(results: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """The tables, and where the rest is."""
    console = wide_console()
    published = any("published" in estimate for result in results.values() for estimate in result["metrics"].values())
    table = Table(title="scores (shares in %) with 95 % intervals", title_justify="left")
    for column in ("task", "metric", "score", "interval", "n", "chance", *(["published"] if published else [])):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right", no_wrap=True)
    for name, result in results.items():
        for place, (metric, estimate) in enumerate(result["metrics"].items()):
            share = is_share(metric)
            chance = f"{100 * result['chance']:.1f}" if place == 0 and result.get("chance") is not None else ""
            known = f"{100 * estimate['published']:.1f}" if "published" in estimate else ""
            shown = (metric if len(result["metrics"]) > 1 or not share else result["metric"]).replace("_", " ")
            number = in_words(estimate["value"], metric)
            cells = (name if place == 0 else "", shown, number, interval_in_words(estimate, metric), f"{estimate['n']:,}", chance)
            table.add_row(*cells, *([known] if published else []))
        table.add_section()
    console.print(table)
    for name, result in results.items():
        show_groups(console, name, result.get("groups", {}))
    lines = [f"results {folder / 'results.json'}", f"picture {folder / 'scores.png'}", f"each answer {folder}/TASK.jsonl"]
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def show_groups(console: Console, name: str, groups: Mapping[str, Mapping[str, Any]]) -> None:
    """The groups of a task, worst first."""
    if not groups:
        return
    ordered = sorted(groups.items(), key=lambda each: each[1]["value"])
    half = MOST_GROUPS // 2
    shown = ordered if len(ordered) <= MOST_GROUPS else [*ordered[:half], *ordered[-half:]]
    table = Table(
        title=f"{name}: {len(ordered)} groups, worst first" + ("" if shown == ordered else f", the {half} at each end"),
        title_justify="left",
    )
    for column in ("group", "accuracy", "interval", "n"):
        table.add_column(column, justify="left" if column == "group" else "right")
    for place, (group, estimate) in enumerate(shown):
        table.add_row(group, in_words(estimate["value"], ""), interval_in_words(estimate, ""), f"{estimate['n']:,}")
        if shown != ordered and place == half - 1:
            table.add_section()
    console.print(table)


def is_share(metric: str) -> bool:
    """Whether a metric is a fraction, to be shown as a percentage."""
    return metric not in ("bits_per_byte", "perplexity")


def in_words(value: float, metric: str) -> str:
    """A share in percent."""
    return f"{100 * value:.1f}" if is_share(metric) else f"{value:.4f}" if metric == "bits_per_byte" else f"{value:,.2f}"


def interval_in_words(estimate: Mapping[str, Any], metric: str) -> str:
    low, high = estimate["low"], estimate["high"]
    return "one document" if low is None else f"{in_words(low, metric)} to {in_words(high, metric)}"


def wide_console() -> Console:
    """A terminal as it is; into a file or a pipe, wide enough for the tables."""
    console = Console()
    return console if console.is_terminal else Console(width=120)
