"""Pictures that explain: what a row looks like to its own tokens."""

import os
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from lm.masks import Facts, may_attend


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
