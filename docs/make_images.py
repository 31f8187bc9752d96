"""The pictures of the pages in this folder, each from the code it explains.

    uv run python docs/make_images.py            all of them, into docs/images/
    uv run python docs/make_images.py rope mlp   some

Those of the model (masks, rope, mlp) and of packing come out the same everywhere. The tokens are those of two tokenizers trained on the
standard library of the Python that runs this, so they differ a little between Python versions.
"""

import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from data.packing import PACKINGS, describe
from data.sources import open_source
from data.tokenizer import Tokenizer
from lm.layers import gelu, gelu_tanh, relu2
from lm.masks import Facts
from lm.rope import NTK, LinearScaling, Llama3, Yarn, rotary
from recipes import train_tokenizer
from train.pictures import plot_mask

IMAGES = Path(__file__).parent / "images"
LINES = ("#1b1b1b", "#0072b2", "#e69f00", "#009e73", "#cc3377")  # told apart by the colour-blind, too (after Okabe and Ito)
DOCUMENTS = (
    "#9ecae1", "#fdbf6f", "#a6dba0", "#f4a6c0", "#c2b5e3", "#ffe28a", "#8fd3c8", "#e8b5a0", "#b8cf7a", "#d9b3d9", "#a9c1f5", "#f2cfa5",
)  # fmt: skip
PADDING_GREY = "#e4e4e4"

SENTENCES = (("the", "cat", "sat", "on", "the", "mat"), ("a", "dog", "ran", "by"), ("it", "rained"))

ROPE_DIM, ROPE_BASE, CONTEXT, FACTOR = 64, 10_000.0, 2048, 4.0
ROPE_KINDS = {
    "plain": None,
    "linear": LinearScaling(factor=FACTOR),
    "NTK": NTK(factor=FACTOR),
    "YaRN": Yarn(factor=FACTOR, original_context=CONTEXT),
    "Llama 3": Llama3(factor=FACTOR, low_freq_factor=1, high_freq_factor=4, original_context=CONTEXT),
}

PACKED_LENGTHS = (21, 7, 13, 4, 30, 9, 16, 7, 11, 8, 8, 17)  # tokens; one is longer than a row
PACKED_SEQ = 24

SNIPPET = '''\
def bits_per_byte(nats: float, text: str) -> float:
    """Loss over a whole text of 1234567 bytes, say."""
    for line in text.splitlines():
        if not line.strip():
            continue
    return nats / math.log(2) / len(text.encode("utf-8"))

Donaudampfschiff, naïveté, 漢字, 🙂 and antidisestablishmentarianism
'''


def masks(path: Path) -> None:
    """One packed row, seen whole and through a window of 3: what `train.pictures.plot_mask` draws."""
    positions = [place for sentence in SENTENCES for place in range(len(sentence))] + [0, 0]
    segments = [number for number, sentence in enumerate(SENTENCES, start=1) for _ in sentence] + [0, 0]
    labels = [word for sentence in SENTENCES for word in sentence] + ["(pad)", "(pad)"]
    facts = Facts(jnp.array(positions), jnp.array(segments))
    with tempfile.TemporaryDirectory() as folder:
        drawn = [plot_mask(facts, Path(folder) / f"{window}.png", window=window, labels=labels) for window in (None, 3)]
        plt.imsave(path, np.concatenate([plt.imread(each) for each in drawn], axis=1))


def rope(path: Path) -> None:
    """How far a text gets before each pair of dimensions has turned once, and how much slower the kinds let it turn."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.9), layout="constrained")
    pairs = np.arange(ROPE_DIM // 2)
    plain = np.asarray(rotary(ROPE_DIM, ROPE_BASE)[0])
    for colour, (name, kind) in zip(LINES, ROPE_KINDS.items(), strict=True):
        speeds = np.asarray(rotary(ROPE_DIM, ROPE_BASE, kind)[0])
        style = {"color": colour, "label": name, "linewidth": 3.0 if kind is None else 1.8, "alpha": 0.35 if kind is None else 1.0}
        left.plot(pairs, 2 * np.pi / speeds, **style)
        right.plot(pairs, plain / speeds, **style)
    for length, words in ((CONTEXT, "context trained on"), (CONTEXT * FACTOR, "context wanted")):
        left.axhline(length, color="#888888", linewidth=0.8, linestyle=":")
        left.text(0, length * 1.08, f"{words}, {length:,.0f}", fontsize=8, color="#555555")
    left.set(yscale="log", xlabel="pair of dimensions", ylabel="tokens", title="Tokens for one full turn")
    right.set(xlabel="pair of dimensions", ylabel="times slower than plain", title=f"The same, as stretch (factor {FACTOR:g})")
    right.legend(frameon=False)
    _finish(figure, path, left, right)


def mlp(path: Path) -> None:
    """The activations, and what GELU's tanh form gives away."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.7), layout="constrained")
    x = jnp.linspace(-4, 4, 801)
    activations = {"ReLU": jax.nn.relu, "GELU": gelu, "SiLU": jax.nn.silu, "ReLU²": relu2}
    for colour, (name, function) in zip(LINES, activations.items(), strict=False):
        left.plot(x, function(x), color=colour, label=name, linewidth=1.8)
    left.axhline(0, color="#bbbbbb", linewidth=0.8, zorder=0)
    left.axvline(0, color="#bbbbbb", linewidth=0.8, zorder=0)
    left.set(xlim=(-4, 3), ylim=(-0.6, 3), xlabel="x", title="Activations")
    left.legend(frameon=False)
    right.plot(x, 1e4 * (gelu_tanh(x) - gelu(x)), color=LINES[1], linewidth=1.8)
    right.axhline(0, color="#bbbbbb", linewidth=0.8, zorder=0)
    right.set(xlim=(-4, 4), xlabel="x", ylabel="difference · 10⁴", title="GELU by tanh (GPT-2) less GELU")
    _finish(figure, path, left, right)


def packing(path: Path) -> None:
    """The same documents in rows three ways: a colour and a number a document, … where it was cut, padding grey."""
    order = range(len(PACKED_LENGTHS))
    plans = {name: plan(PACKED_LENGTHS, PACKED_SEQ, order) for name, plan in PACKINGS.items()}
    figure, axes = plt.subplots(1, len(plans), figsize=(10, 4.1), layout="constrained")
    most = max(plan.rows for plan in plans.values())
    for axis, (name, plan) in zip(axes, plans.items(), strict=True):
        for row in range(plan.rows):
            axis.add_patch(plt.Rectangle((0, row + 0.08), PACKED_SEQ, 0.84, color=PADDING_GREY, linewidth=0))
            at = 0
            for i in range(plan.row_start[row], plan.row_start[row + 1]):
                document, length = int(plan.document[i]), int(plan.length[i])
                colour = DOCUMENTS[document % len(DOCUMENTS)]
                axis.add_patch(plt.Rectangle((at, row + 0.08), length, 0.84, facecolor=colour, edgecolor="white", linewidth=1.2))
                begins, ends = plan.start[i] == 0, plan.start[i] + length == PACKED_LENGTHS[document] - 1
                words = f"{'' if begins else '…'}{document}{'' if ends else '…'}"
                axis.text(at + length / 2, row + 0.52, words, ha="center", va="center", fontsize=8)
                at += length
        counts = describe(plan)
        title = f"{name}: {counts['rows']} rows, {counts['fill_fraction']:.0%} full, {counts['documents_cut']} cut"
        axis.set(xlim=(0, PACKED_SEQ), ylim=(most, 0), xlabel="position in the row", xticks=range(0, PACKED_SEQ + 1, 6))
        axis.set_title(title, fontsize=10)
        axis.set_yticks(np.arange(plan.rows) + 0.5, range(plan.rows), fontsize=8)
        axis.tick_params(length=0)
        axis.set_frame_on(False)
    axes[0].set_ylabel("row", loc="top")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def tokens(path: Path) -> None:
    """A text cut by two vocabularies: the picture of `recipes.train_tokenizer`."""
    corpus = open_source("stdlib").train
    texts = [corpus[i]["text"] for i in range(len(corpus))]
    tokenizers = {f"{vocab:,} tokens, learned from Python source": Tokenizer.train(texts, vocab) for vocab in (512, 4096)}
    train_tokenizer.draw(tokenizers, SNIPPET, path)


def _finish(figure: plt.Figure, path: Path, *axes: Axes) -> None:
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


PICTURES = {"masks": masks, "rope": rope, "mlp": mlp, "packing": packing, "tokens": tokens}


def main(names: list[str]) -> None:
    unknown = sorted(set(names) - set(PICTURES))
    if unknown:
        raise SystemExit(f"no picture is called {', '.join(unknown)}; there are {', '.join(PICTURES)}")
    IMAGES.mkdir(exist_ok=True)
    for name in names or PICTURES:
        path = IMAGES / f"{name}.png"
        PICTURES[name](path)
        print(f"{path.relative_to(IMAGES.parent.parent)}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
