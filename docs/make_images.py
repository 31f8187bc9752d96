"""The pictures of the pages in this folder, each from the code it explains.

    uv run python docs/make_images.py            all of them, into docs/images/
    uv run python docs/make_images.py rope mlp   some

Those of the model (masks, rope, mlp), of packing, of supervision and of schedules come out the same everywhere. The tokens are those of two
tokenizers trained on the standard library of the Python that runs this, so they differ a little between Python versions. For update_ratios
and forgetting a small model is trained on it and then on another text, which takes some minutes.
"""

import json
import sys
import sysconfig
import tempfile
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import tokenizers
from matplotlib.axes import Axes

from data.chat import CHATML, CHATML_TOKENS, ChatFormat
from data.conversations import read_conversation
from data.packing import PACKINGS, describe
from data.sources import open_source
from data.tokenizer import Tokenizer
from lm.layers import gelu, gelu_tanh, relu2
from lm.masks import Facts
from lm.rope import NTK, LinearScaling, Llama3, Yarn, rotary
from recipes import continue_pretrain, pretrain_small, train_tokenizer
from train.averages import AverageConfig, average_rate
from train.logs import read_metrics
from train.optimizers import ScheduleConfig, learning_rate
from train.pictures import plot_conversation, plot_mask, plot_update_ratios
from train.step import StepConfig

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

SCHEDULE_STEPS = 1000
SCHEDULES = {
    "linear (the default)": ScheduleConfig(peak=1.0),
    "cosine, final 0.1": ScheduleConfig(shape="cosine", peak=1.0, final=0.1),
    "wsd, decay 0.2": ScheduleConfig(shape="wsd", peak=1.0),
    "constant": ScheduleConfig(shape="constant", peak=1.0),
}
AVERAGES = {
    "ema, decay 0.999": AverageConfig(name="ema"),
    "ema, decay 0.95": AverageConfig(name="ema", decay=0.95),
    "swa, start 0.75": AverageConfig(name="swa"),
}

OLD_STEPS, NEW_STEPS, NEW_LOOKS = 400, 80, 8  # of the runs behind update_ratios and forgetting; steps between two looks
REPLAY_SHARES = (0.0, 0.25)

TALKS = (
    {
        "messages": [
            {"role": "user", "content": "What time is it in Oslo?"},
            {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "time", "arguments": {"place": "Oslo"}}}]},
            {"role": "tool", "content": "12:30"},
            {"role": "assistant", "content": "It is 12:30."},
        ],
        "tools": [{"type": "function", "function": {"name": "time", "parameters": {"place": "string"}}}],
    },
    {
        "messages": [
            {"role": "user", "content": "Is <|im_end|> a token?"},
            {"role": "assistant", "content": "Not if you write it."},
            {"role": "user", "content": "2 + 2?"},
            {"role": "assistant", "content": "4"},
        ]
    },
)

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


def schedules(path: Path) -> None:
    """The shapes of the learning rate, and how far each average of the weights moves towards them."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    steps = range(SCHEDULE_STEPS)
    for colour, dash, (name, schedule) in zip(LINES[1:], ("-", "-", "-", ":"), SCHEDULES.items(), strict=True):
        left.plot(steps, [*map(learning_rate(schedule, SCHEDULE_STEPS), steps)], color=colour, linestyle=dash, label=name, linewidth=1.8)
    left.set(xlabel="step", ylabel="fraction of the peak", ylim=(0, 1.05), title="Learning rate")
    for colour, (name, average) in zip(LINES[1:], AVERAGES.items(), strict=False):
        right.plot(steps, [*map(average_rate(average, SCHEDULE_STEPS), steps)], color=colour, label=name, linewidth=1.8)
    right.set(xlabel="step", yscale="log", title="Share of the newest weights in the average")
    left.legend(frameon=False, fontsize=9, loc="lower left")
    right.legend(frameon=False, fontsize=9)
    _finish(figure, path, left, right)


@cache
def _runs() -> tuple[tempfile.TemporaryDirectory, Path, list[Path]]:
    """The 1m preset on the top level of the standard library, and gone on with on its manual: without replay, and with it. The folder is
    there as long as the first of what is returned."""
    kept = tempfile.TemporaryDirectory()
    folder = Path(kept.name)
    for name, texts in (("library", _modules()), ("manual", {f"{topic}.txt": text.encode() for topic, text in topics.items()})):
        (folder / name).mkdir()
        for file, content in texts.items():
            (folder / name / file).write_bytes(content)
    first = pretrain_small.Config(
        **pretrain_small.PRESETS["1m"],
        preset="1m",
        data=str(folder / "library"),
        run_dir=folder / "old",
        steps=OLD_STEPS,
        step=StepConfig(ratios_every=5),
        report_samples=0,
    )
    pretrain_small.main(first)
    went_on = []
    for share in REPLAY_SHARES:
        settings = {"steps": NEW_STEPS, "validate_every": NEW_LOOKS, "replay_share": share, "run_dir": folder / f"share-{share}"}
        went_on.append(continue_pretrain.main(continue_pretrain.Config(source=folder / "old", data=str(folder / "manual"), **settings)))
    return kept, folder / "old", went_on


def _modules() -> dict[str, bytes]:
    library = Path(sysconfig.get_path("stdlib"))
    return {file.name: file.read_bytes() for file in sorted(library.glob("*.py"))}


def update_ratios(path: Path) -> None:
    """The picture a run leaves: the 1m preset, Muon, the learning rate falling in a line."""
    plot_update_ratios(_runs()[1] / "metrics.jsonl", path, title=f"1m preset, {OLD_STEPS} steps of Muon, learning rate 5e-3 falling to 0")


def forgetting(path: Path) -> None:
    """Held-out loss on new and old text while a run goes on, for each share of replay."""
    _, _, folders = _runs()
    figure, axes = plt.subplots(1, len(folders), figsize=(10, 3.6), sharey=True, layout="constrained")
    for axis, share, folder in zip(axes, REPLAY_SHARES, folders, strict=True):
        lines = read_metrics(folder / "metrics.jsonl")
        for colour, words, name in ((LINES[1], "new text", "val_loss"), (LINES[4], "old text", "old_val_loss")):
            steps, losses = zip(*((line["step"], line[name]) for line in lines if name in line), strict=True)
            label = f"{words}: {losses[0]:.2f} before, {losses[-1]:.2f} after"
            axis.plot(steps, losses, color=colour, marker="o", markersize=3.5, label=label)
            axis.axhline(losses[0], color=colour, linewidth=0.9, linestyle=":")
        axis.set(xlabel="step", title=f"replay share {share:g}" if share else "without replay")
        axis.legend(frameon=False, fontsize=9)
    axes[0].set_ylabel("held-out loss (nats a token)")
    _finish(figure, path, *axes)


def supervision(path: Path) -> None:
    """Two conversations in one row: what is trained on, and who sees whom."""
    # Words for tokens, so that the picture is the same everywhere and its tokens can be read.
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    texts = [CHATML, *(json.dumps(row, ensure_ascii=False) for row in TALKS), " Oslo?\nIt is 12:30. 9 12:30 4 user assistant tool"] * 3
    specials = ["<s>", "</s>"]
    core.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, special_tokens=specials))
    plain = Tokenizer(core, bos=None, eos="</s>", pad="</s>")
    form = ChatFormat(plain.changed(special_tokens=CHATML_TOKENS, chat_template=CHATML, eos=CHATML_TOKENS[1]))
    examples = [form.encode(read_conversation(row))[0] for row in TALKS]
    tokens = np.concatenate([example.tokens for example in examples])
    marks = np.concatenate([example.trained for example in examples])
    segments = np.repeat([1, 2], [len(example.tokens) for example in examples])
    title = "two conversations in one row (frames: blue and green); orange: trained on, grey: only read"
    plot_conversation(form.tokenizer.tokens_of(tokens), marks.tolist(), path, title=title, segments=segments.tolist())


def _finish(figure: plt.Figure, path: Path, *axes: Axes) -> None:
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


PICTURES = {"masks": masks, "rope": rope, "mlp": mlp, "packing": packing, "schedules": schedules}
PICTURES |= {"supervision": supervision}
PICTURES |= {
    "tokens": tokens,
    "update_ratios": update_ratios,
    "forgetting": forgetting,
}  # from runs: slow, and not quite the same everywhere


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
