"""Pictures that explain: what a row looks like to its own tokens, how far updates move the weights, what a model learns and forgets,
which tokens of a conversation are trained on."""

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
