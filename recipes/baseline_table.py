"""What `recipes.baseline` found: the grid of both sides, and how long each takes to the same bits per byte."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from recipes import ablate_table
from recipes.trial import machines

MARKS = ("<!-- the table of recipes.baseline begins -->", "<!-- the table of recipes.baseline ends -->")
NAMES = {"ours": "ours", "torch": "PyTorch"}

Course = Sequence[tuple[float, float]]  # (seconds, bits per byte), by seconds


def seconds_to(course: Course, bits: float) -> float | None:
    """When a side comes to these bits per byte: between two of its runs by a line in log seconds; `None` outside of what it ran."""
    for (early, more), (late, fewer) in pairwise(course):
        if fewer <= bits <= more and more > fewer:
            share = (more - bits) / (more - fewer)
            return math.exp(math.log(early) + share * (math.log(late) - math.log(early)))
    exact = [seconds for seconds, reached in course if reached == bits]
    return exact[0] if exact else None


def ratios(ours: Course, theirs: Course) -> list[tuple[float, float]]:
    """(bits per byte, their seconds over ours to come to that), at each of their runs and each of ours that both came to."""
    found = []
    for bits in sorted({reached for _, reached in (*ours, *theirs)}, reverse=True):
        mine, other = seconds_to(ours, bits), seconds_to(theirs, bits)
        if mine is not None and other is not None:
            found.append((bits, other / mine))
    return found


def words(found: Mapping[str, Any]) -> str:
    """The grid, the best places, and the ratio of minutes."""
    lines = found["lines"]
    grid = [line for line in lines if not line["race"]]
    rates, batches = sorted({line["rate"] for line in grid}), sorted({line["batch"] for line in grid})
    rows = ["| side | rows a step | " + " | ".join(f"rate {rate:g}" for rate in rates) + " |", "|---|---|" + "---|" * len(rates)]
    for side in found["best"]:
        for batch in batches:
            cells = []
            for rate in rates:
                here = [line["bits_per_byte"] for line in grid if (line["side"], line["rate"], line["batch"]) == (side, rate, batch)]
                text = "" if not here else "diverged" if here[0] >= 99 else f"{here[0]:.4f}"
                cells.append(f"**{text}**" if found["best"][side] == (rate, batch) else text)
            rows.append(f"| {NAMES[side]} | {batch} | {' | '.join(cells)} |")
    tokens = max(line["tokens"] for line in grid)
    parameters = {side: next(line["parameters"] for line in lines if line["side"] == side) for side in found["best"]}
    versions = {line["torch"] for line in lines if "torch" in line}
    head = (
        f"Measured on {machines(grid)}{''.join(f', torch {v}' for v in sorted(versions))}: "
        f"{found['corpus']}, bits per byte of the held-out text after {tokens:,} tokens; "
        + ", ".join(f"{NAMES[side]} {n:,} parameters" for side, n in parameters.items())
        + "."
    )
    said = [head, "", *rows]
    courses = {side: course for side, course in found["courses"].items() if course}
    if courses:
        raced = [line for line in lines if line["race"]]
        said += [
            "",
            f"The best of each in turns, on {machines(raced)}:",
            "",
            "| side | tokens | seconds, compilation too | of steps alone | bits per byte |",
        ]
        said.append("|---|---|---|---|---|")
        for side in courses:
            for line in sorted((line for line in raced if line["side"] == side), key=lambda line: line["budget"]):
                seconds = f"{line['train_s']:.0f} | {line['steps'] * line['step_s']:.0f}"
                said.append(f"| {NAMES[side]} | {line['tokens']:,} | {seconds} | {line['bits_per_byte']:.4f} |")
    if {"ours", "torch"} <= courses.keys():
        told = []
        for words, column in (("compilation too", 0), ("steps alone", 1)):
            ours, theirs = ([(run[column], run[2]) for run in courses[side]] for side in ("ours", "torch"))
            if pairs := ratios(ours, theirs):
                told.append(f"{words} {', '.join(f'{r:.2f} at {b:.4f}' for b, r in pairs)}")
        said += [
            "",
            f"Seconds of PyTorch over ours, to the same bits per byte: {'; '.join(told)}."
            if told
            else "No bits per byte that both came to: race them at more budgets.",
        ]
    return "\n".join(said)


def put_table(said: str, page: Path, picture: Path | None) -> None:
    ablate_table.put(said, page, picture, marks=MARKS, words="Bits per byte over seconds, the best of each side")


def draw(found: Mapping[str, Any], path: Path) -> None:
    """All runs as dots, the race of the best as lines, over seconds of training."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for side, color in (("ours", "tab:blue"), ("torch", "tab:orange")):
        here = [line for line in found["lines"] if line["side"] == side and line["bits_per_byte"] < 99]
        axis.plot([line["train_s"] for line in here], [line["bits_per_byte"] for line in here], ".", color=color, alpha=0.4)
        if course := found["courses"].get(side):
            axis.plot([run[0] for run in course], [run[2] for run in course], "o-", color=color, label=f"{NAMES[side]}, best of its grid")
    axis.set(xscale="log", xlabel="seconds of training, compilation too", ylabel="bits per byte, held out")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("{x:g}")
    axis.legend(fontsize="small")
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
