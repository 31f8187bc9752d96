"""Pictures that explain: what a row looks like to its own tokens, how far updates move the weights, what a model learns and forgets,
how it scores, which tokens of a conversation are trained on."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from lm.masks import Facts, may_attend
from train.logs import read_metrics

RATIO = "update_ratio/"  # how metrics of this kind begin


def plot_mask(facts: Facts, path: str | os.PathLike[str], *, window: int | None = None, labels: Sequence[str] | None = None) -> Path:
    """Draw the mask of one row into `path` (.png, .svg, .pdf): a line a query, a column a key, a colour a document.

    **Arguments:**

    - `facts`: of one row, `positions` and `segments` of shape `[seq]`.
    - `labels`: the text of each token, if wanted on the axes.
    """
    if facts.positions.ndim != 1:
        raise ValueError(f"a picture is of one row; these facts have shape {facts.positions.shape}: take one, as in positions[0]")
    seq = len(facts.positions)
    if labels is not None and len(labels) != seq:
        raise ValueError(f"labels must be one for each of the {seq} tokens, got {len(labels)}")
    segments = np.asarray(facts.segments)
    colours = 1 + (segments - 1) % 9  # of tab10, whose first is kept for padding's grey
    shown = np.where(np.asarray(may_attend(facts, facts, window)), np.where(segments > 0, colours, 7)[:, None], np.nan)

    side = min(12.0, max(3.0, 0.18 * seq + 1.5))  # inches
    figure, axes = plt.subplots(figsize=(side, side), layout="constrained")
    axes.imshow(shown, cmap="tab10", vmin=0, vmax=9, interpolation="none")
    axes.set(xlabel="key", ylabel="query", title="who sees whom" + ("" if window is None else f", window {window}"))
    if labels is not None:
        axes.set_xticks(range(seq), [label.replace("$", r"\$") for label in labels], rotation=90, fontsize=7)
        axes.set_yticks(range(seq), [label.replace("$", r"\$") for label in labels], fontsize=7)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return Path(path)


def plot_update_ratios(metrics_path: str | os.PathLike[str], png_path: str | os.PathLike[str], *, title: str) -> Path | None:
    """Draw how long each role's updates were beside its weights, over the run (`update_ratio/ROLE` in a `metrics.jsonl`). The dashed
    line, 1e-3, is what AdamW usually comes to; Muon begins far above. `None`, and no picture, where nothing was measured."""
    lines = [line for line in read_metrics(metrics_path) if any(name.startswith(RATIO) for name in line)]
    roles = sorted({name for line in lines for name in line if name.startswith(RATIO)})
    if not roles:
        return None
    figure, axes = plt.subplots(figsize=(8, 4.6), layout="constrained")
    colours = plt.get_cmap("tab20")
    for i, name in enumerate(roles):
        points = [(line["step"], line[name]) for line in lines if line.get(name, 0) > 0]
        axes.plot(*zip(*points, strict=True) if points else ([], []), label=name.removeprefix(RATIO), linewidth=1.1, color=colours(i % 20))
    axes.axhline(1e-3, color="black", linestyle="--", linewidth=1.0, label="1e-3 (AdamW's usual)")
    axes.set(yscale="log", xlabel="step", ylabel="length of update / length of weights", title=title)
    axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(png_path, dpi=140)
    plt.close(figure)
    return Path(png_path)


def plot_forgetting(metrics_path: str | os.PathLike[str], png_path: str | os.PathLike[str]) -> Path:
    """Draw held-out loss on new and old text over a continued run (`val_loss` and `old_val_loss` in a `metrics.jsonl`), with dashed lines
    where the model began, at step 0."""
    lines = read_metrics(metrics_path)
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for text, name, colour in (("new", "val_loss", "tab:blue"), ("old", "old_val_loss", "tab:red")):
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            words = f"{text} text: {points[0][1]:.3f} before, {points[-1][1]:.3f} now"
            axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=4, label=words)
            axes.axhline(points[0][1], color=colour, linestyle="--", linewidth=1.0)
    axes.set(xlabel="step", ylabel="held-out loss (nats per token)", title="learned and forgotten")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(png_path, dpi=140)
    plt.close(figure)
    return Path(png_path)


def plot_distillation(metrics_path: str | os.PathLike[str], png_path: str | os.PathLike[str], *, teacher_loss: float, title: str) -> Path:
    """Draw how a student came nearer to its teacher: above, its loss on held-out text (`val_loss`) with the teacher's own as a dashed line;
    below, what lies between them, in training (`divergence`) and on held-out text (`val_kl`), as far as it was measured."""
    lines = read_metrics(metrics_path)
    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(8, 5.6), layout="constrained")
    series = (
        (above, "val_loss", "student", {"color": "tab:blue", "marker": "o", "markersize": 4}),
        (below, "divergence", "in training", {"color": "tab:gray", "linewidth": 0.8, "alpha": 0.7}),
        (below, "val_kl", "KL(teacher‖student), held out", {"color": "tab:orange", "marker": "o", "markersize": 4}),
    )
    for axes, name, words, style in series:
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=f"{words}, now {points[-1][1]:.3f}", **style)
    above.axhline(teacher_loss, color="tab:red", linestyle="--", linewidth=1.1, label=f"teacher, {teacher_loss:.3f}")
    above.set(ylabel="held-out loss (nats a token)", title=title)
    below.set(xlabel="step", ylabel="apart (nats a token)", yscale="log")
    for axes in (above, below):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small", loc="upper right")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(png_path, dpi=140)
    plt.close(figure)
    return Path(png_path)


def plot_rewards(metrics_path: str | os.PathLike[str], png_path: str | os.PathLike[str], *, title: str) -> Path:
    """Draw how a reward model learned pairs apart: loss, accuracy, and how much more the chosen answers are worth, in training and on
    held-out pairs (`loss`, `accuracy`, `margin` in a `metrics.jsonl`, and with `val_`). Dashed: knowing nothing."""
    lines = read_metrics(metrics_path)
    figure, rows = plt.subplots(3, 1, sharex=True, figsize=(8, 7), layout="constrained")
    panels = (("loss", "loss (nats a pair)", np.log(2)), ("accuracy", "chosen answer wins", 0.5), ("margin", "margin of rewards", 0.0))
    for axes, (name, label, ignorant) in zip(rows, panels, strict=True):
        for series, words, style in (
            (name, "in training", {"color": "tab:gray", "linewidth": 0.8, "alpha": 0.7}),
            (f"val_{name}", "held out", {"color": "tab:blue", "marker": "o", "markersize": 4}),
        ):
            points = [(line["step"], line[series]) for line in lines if series in line]
            if points:
                axes.plot(*zip(*points, strict=True), label=f"{words}, now {points[-1][1]:.3f}", **style)
        axes.axhline(ignorant, color="black", linestyle="--", linewidth=1.0)
        axes.set(ylabel=label)
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    rows[0].set(title=title)
    rows[-1].set(xlabel="step")
    figure.savefig(png_path, dpi=140)
    plt.close(figure)
    return Path(png_path)


def plot_scores(results: Mapping[str, Mapping[str, Any]], path: str | os.PathLike[str], *, title: str) -> Path:
    """Draw the scores of an evaluation with their intervals: shares beside chance and what others published; below them the groups, where a
    task has some, and texts in bits per byte.

    **Arguments:**

    - `results`: as in the `results.json` of `recipes.evaluate`: by task `metric`, `metrics` (name → value, low, high and, where known,
      published), `chance`, `groups`.
    """
    shares = {name: result for name, result in results.items() if result["metric"] != "bits per byte"}
    texts = {name: result for name, result in results.items() if name not in shares}
    grouped = {name: result["groups"] for name, result in shares.items() if result.get("groups")}
    panels = [("shares", max(2.0, sum(len(each["metrics"]) + 1 for each in shares.values())))] if shares else []
    panels += [(name, len(groups) + 1.0) for name, groups in grouped.items()] + ([("texts", len(texts) + 1.5)] if texts else [])
    figure, rows = plt.subplots(
        len(panels), 1, squeeze=False, figsize=(8, 1.2 + 0.24 * sum(height for _, height in panels) + 0.5 * len(panels)),
        height_ratios=[height for _, height in panels], layout="constrained",
    )  # fmt: skip
    for axes, (panel, _) in zip(rows[:, 0], panels, strict=True):
        if panel == "texts":
            bits = [(name, result["metrics"]["bits_per_byte"], None) for name, result in texts.items()]
            _dots(axes, bits, "bits per byte, less is better", 1.0)
        elif panel == "shares":
            lines: list[_Line] = []
            for name, result in shares.items():
                several = len(result["metrics"]) > 1
                for metric, estimate in result["metrics"].items():
                    lines.append((f"{name}, {metric}" if several else name, estimate, result.get("chance")))
            _dots(axes, lines, "% right", 100.0)
        else:
            ordered = sorted(grouped[panel].items(), key=lambda each: each[1]["value"])
            _dots(axes, [(group, estimate, shares[panel].get("chance")) for group, estimate in ordered], f"{panel}, % right", 100.0)
    figure.suptitle(title)
    figure.savefig(path, dpi=140)
    plt.close(figure)
    return Path(path)


_Line = tuple[str, Mapping[str, Any], float | None]  # name, estimate, chance


def _dots(axes: Any, lines: Sequence[_Line], label: str, scale: float) -> None:
    """A line each, the first on top: a dot with its interval, a grey bar for chance, a diamond for what was published."""
    values, lows, highs = (
        np.array([scale * (each["value"] if each[edge] is None else each[edge]) for _, each, _ in lines])
        for edge in ("value", "low", "high")
    )
    errors = np.maximum(0.0, [values - lows, highs - values])
    axes.errorbar(values, range(len(lines)), xerr=errors, fmt="o", color="tab:blue", markersize=4, capsize=2, label="ours, 95 %")
    chances = [(scale * chance, place) for place, (*_, chance) in enumerate(lines) if chance is not None]
    known = [(scale * each["published"], place) for place, (_, each, _) in enumerate(lines) if "published" in each]
    for points, style, colour, name in ((chances, "|", "tab:gray", "chance"), (known, "D", "tab:orange", "published")):
        if points:
            axes.plot(*zip(*points, strict=True), style, color=colour, markersize=10 if style == "|" else 5, label=name)
    axes.set_yticks(range(len(lines)), [name for name, *_ in lines], fontsize=8)
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.set_xlabel(label)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize="x-small", loc="best")


def plot_tasks(before: Mapping[str, Any], after: Mapping[str, Any], png_path: str | os.PathLike[str]) -> Path:
    """Draw the share of right answers to each task, before and after a run, with 95 % intervals (`train.intervals.Estimate.record`)."""
    tasks = list(after)
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.45 * max(len(tasks), 1)), layout="constrained")
    for moved, (found, words, colour) in enumerate(((before, "before", "tab:gray"), (after, "after", "tab:blue"))):
        places = np.arange(len(tasks)) + 0.36 * (moved - 0.5)
        shares = [found[task]["value"] for task in tasks]
        below = [max(0.0, found[task]["value"] - found[task]["low"]) for task in tasks]
        above = [max(0.0, found[task]["high"] - found[task]["value"]) for task in tasks]
        axes.barh(places, shares, 0.34, color=colour, label=words, xerr=[below, above], error_kw={"linewidth": 1.0})
    axes.set(yticks=range(len(tasks)), yticklabels=[f"{task} ({after[task]['n']})" for task in tasks], xlim=(0, 1))
    axes.set(xlabel="right answers to held-out questions", title="learned")
    axes.invert_yaxis()
    axes.legend(fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(png_path, dpi=140)
    plt.close(figure)
    return Path(png_path)


READ, LEARNED = "#e4e4e4", "#f6a04d"  # behind tokens that are only read, and those that are trained on
FRAMES = ("tab:blue", "tab:green", "tab:purple", "tab:red", "tab:cyan", "tab:pink")  # around those of one conversation of a row
LINE_CHARACTERS = 92


def plot_conversation(
    tokens: Sequence[str],
    trained: Sequence[bool],
    png_path: str | os.PathLike[str],
    *,
    title: str | None = None,
    segments: Sequence[int] | None = None,
) -> Path:
    """Draw a conversation token by token, those that are trained on in colour.

    **Arguments:**

    - `tokens`: their text; line breaks end a line of the picture.
    - `segments`: of a packed row, the number of each token's conversation, framed in a colour of its own; 0, padding, is left white.
    """
    shown = [token.replace("\n", "⏎").replace("\t", "→") for token in tokens]
    places, line, at = [], 0, 0
    for token, text in zip(tokens, shown, strict=True):
        if at + len(text) > LINE_CHARACTERS:
            line, at = line + 1, 0
        places.append((line, at))
        at += len(text)
        if "\n" in token:
            line, at = line + 1, 0
    lines = places[-1][0] + 1 if places else 1
    figure, axes = plt.subplots(figsize=(10, 0.7 + 0.24 * lines))
    for i, (text, (row, column)) in enumerate(zip(shown, places, strict=True)):
        segment = None if segments is None else segments[i]
        face = "white" if segment == 0 else LEARNED if trained[i] else READ
        edge = "white" if not segment else FRAMES[(segment - 1) % len(FRAMES)]
        axes.add_patch(plt.Rectangle((column, row), len(text), 0.9, facecolor=face, edgecolor=edge, linewidth=0.8))
        axes.text(column + len(text) / 2, row + 0.48, text, family="monospace", fontsize=7.4, ha="center", va="center", parse_math=False)
    axes.set(xlim=(-0.5, LINE_CHARACTERS + 0.5), ylim=(lines + 0.1, -0.3))
    axes.axis("off")
    axes.set_title(title or "trained on: orange; only read: grey", fontsize=9, loc="left", parse_math=False)
    figure.savefig(png_path, dpi=140, bbox_inches="tight")
    plt.close(figure)
    return Path(png_path)
