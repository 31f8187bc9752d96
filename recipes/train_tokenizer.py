"""Train a tokenizer and see what it is worth: the figures and the picture that tell whether a vocabulary fits a text.

A byte-level BPE tokenizer is trained on the training documents of the corpus and measured on the held-out ones, source by source
where the corpus is a mixture: bytes a token, fertility (tokens a word; Rust et al. 2021, arXiv:2012.15613), the words that cost most,
how much of the vocabulary is used. Other tokenizers are measured on the same text beside it. Seconds for some megabytes of text.

    python -m recipes.train_tokenizer --data my_texts/ --vocab 8192
    python -m recipes.train_tokenizer --data stdlib:0.5,books.jsonl.gz:0.5 --compare other/tokenizer.json another_model/
"""

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
import tyro
from loguru import logger
from pydantic import Field
from rich.console import Console
from rich.table import Table
from rich.text import Text

from data.sources import Source, open_source
from data.tokenizer import Tokenizer
from data.tokenizer_report import measure, visible, vocabulary_use
from recipes.command_line import CONFIG_FILE, RecipeConfig, fail
from train.logs import plain_messages, write_json

COLORS = ("#cfe8ff", "#ffe3c2", "#d5f2cf", "#f6d1e6", "#e6dcff", "#fff3b0")  # neighbours always differ
COLUMNS = 100  # characters of a line in the pictures


class Config(RecipeConfig):
    """What to train on, and what to compare with."""

    data: str = Field("stdlib", description="the corpus: stdlib, a file, a folder, hf://owner/name/split, or a mixture A:0.7,B:0.3")
    vocab: int = Field(4096, description="tokens of the vocabulary to be learned, special ones included")
    compare: tuple[Path, ...] = Field((), description="tokenizer.json files, or folders with one, to measure on the same text")
    on_invalid_utf8: Literal["error", "replace", "skip"] = Field("error", description="what to do with a document that is not UTF-8")
    report_mb: float = Field(
        20.0, gt=0, allow_inf_nan=False, description="megabytes of held-out text measured a source, at most; the rest is counted"
    )
    worst_words: int = Field(20, ge=0, description="how many of the costliest words to list")
    picture_characters: int = Field(1500, ge=1, description="characters of held-out text in the pictures")
    run_dir: Path | None = Field(None, description="folder for everything written; None: runs/train_tokenizer-DATE-TIME")


def main(config: Config) -> Path:
    """Train, measure, draw. Returns the run folder."""
    plain_messages()
    folder = config.run_dir or Path("runs") / f"train_tokenizer-{datetime.now():%Y%m%d-%H%M%S}"
    if (folder / CONFIG_FILE).exists():
        raise ValueError(f"{folder} already holds a run: choose another --run-dir")
    others = {str(path): Tokenizer.load(path) for path in config.compare}  # a wrong path stops here, before the training
    source = open_source(config.data, on_invalid_utf8=config.on_invalid_utf8)

    logger.info(f"training {config.vocab:,} tokens on {source.record['train_bytes']:,} bytes")
    tokenizer = Tokenizer.train((source.train[i]["text"] for i in range(len(source.train))), config.vocab)
    tokenizer.save(folder / "tokenizer")
    write_json(folder / CONFIG_FILE, config.model_dump(mode="json", exclude={"run_dir"}))

    parts = {part.name: part.source for part in source.parts} or {source.name: source}
    tokenizers = {"trained here": tokenizer, **others}
    results: dict[str, Any] = {"corpus": source.record, "tokenizers": {}}
    for name, one in tokenizers.items():
        logger.info(f"measuring {name}")
        results["tokenizers"][name] = report(one, parts, config)
    write_json(folder / "results.json", results)

    text = source.held_out[0]["text"][: config.picture_characters]
    draw(tokenizers, text, folder / "tokens.png")
    show(results, tokenizers, text, folder)
    return folder


# ------------------------------------------------------------------------------------------- figures


def report(tokenizer: Tokenizer, parts: dict[str, Source], config: Config) -> dict[str, Any]:
    """The figures of one tokenizer: each source, and the vocabulary over all of them."""
    use = np.zeros(tokenizer.vocab_size, np.int64)
    sources = {}
    for name, source in parts.items():
        figures, its_use = measure(tokenizer, some_texts(source, int(config.report_mb * 1e6)), worst=config.worst_words)
        sources[name] = figures | {"bytes_left_out": source.record["held_out_bytes"] - figures["bytes"]}
        use += its_use
    return {"digest": tokenizer.digest, "sources": sources, "vocabulary": vocabulary_use(use)}


def some_texts(source: Source, most_bytes: int) -> Iterator[str]:
    """Held-out documents until `most_bytes` are reached; the last one is cut."""
    left = most_bytes
    for i in range(len(source.held_out)):
        raw = source.held_out[i]["text"].encode()
        yield raw[:left].decode(errors="ignore")  # a character that the cut goes through is left out
        left -= len(raw)
        if left <= 0:
            return


# ------------------------------------------------------------------------------------------- pictures


def pieces_of(tokenizer: Tokenizer, text: str) -> list[str]:
    return [visible(piece) for piece in tokenizer.tokens_of(tokenizer.encode(text))]


def draw(tokenizers: dict[str, Tokenizer], text: str, path: Path) -> None:
    """The same text by every tokenizer, each token in the next colour. Characters that the font has not are boxes."""
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.font_manager import FontProperties, findfont, get_font
    from matplotlib.patches import Rectangle

    font = FontProperties(family="DejaVu Sans Mono", size=7)
    has_glyph = get_font(findfont(font)).get_char_index
    cells = {name: list(laid_out(pieces_of(one, text))) for name, one in tokenizers.items()}
    heights = [1 + max((row for row, *_ in found), default=0) for found in cells.values()]
    figure, axes = plt.subplots(
        len(cells), 1, figsize=(8, 0.16 * sum(heights) + 0.5 * len(cells)), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for axis, (name, found), height in zip(axes[:, 0], cells.items(), heights, strict=True):
        for row, column, token, character in found:
            axis.add_patch(Rectangle((column, row), 1, 1, color=COLORS[token % len(COLORS)], linewidth=0))
            shown = character if has_glyph(ord(character)) else "□"
            axis.text(column + 0.5, row + 0.5, shown, fontproperties=font, ha="center", va="center", parse_math=False)
        count = 1 + max((token for *_, token, _ in found), default=-1)
        axis.set(xlim=(0, COLUMNS), ylim=(height, 0), xticks=[], yticks=[])
        axis.set_title(f"{name}: {count:,} tokens", fontsize=8, loc="left", parse_math=False)
        axis.set_frame_on(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def laid_out(pieces: list[str]) -> Iterator[tuple[int, int, int, str]]:
    """Row, column, token and character of everything to be drawn, in lines of COLUMNS."""
    row = column = 0
    for token, piece in enumerate(pieces):
        for character in piece:
            if character == "\n":
                row, column = row + 1, 0
                continue
            if column == COLUMNS:
                row, column = row + 1, 0
            yield row, column, token, character
            column += 1


def show(results: dict[str, Any], tokenizers: dict[str, Tokenizer], text: str, folder: Path) -> None:
    """The tables and the picture for the terminal."""
    console = Console()
    table = Table(title="held-out text", title_justify="left")
    for column in ("tokenizer", "source", "bytes/token", "fertility", "words in one token", "vocabulary used"):
        table.add_column(column, justify="left" if column in ("tokenizer", "source") else "right")
    for name, one in results["tokenizers"].items():
        used = one["vocabulary"]
        for source, figures in one["sources"].items():
            share = f"{used['used']:,} of {used['size']:,}"
            values = f"{figures['bytes_per_token']:.3f}", f"{figures['fertility']:.3f}", f"{figures['words_in_one_token']:.1%}"
            table.add_row(Text(name), Text(source), *values, share)
            for what in ("documents_not_restored", "bytes_left_out"):
                if figures[what]:
                    logger.warning(f"{name} on {source}: {what.replace('_', ' ')} {figures[what]:,}")
    console.print(table)
    for source, figures in results["tokenizers"]["trained here"]["sources"].items():
        costly = ", ".join(f"{word['word']} {word['times']:,} × {word['tokens']}" for word in figures["worst_words"][:8])
        console.print(f"costliest words of {source} (times × tokens): {costly}", markup=False, highlight=False)
    for name, one in tokenizers.items():
        console.rule(Text(name))
        picture = Text()
        for token, piece in enumerate(pieces_of(one, text)):
            picture.append(piece, style=f"black on {COLORS[token % len(COLORS)]}")
        console.print(picture)
    console.print(f"tokenizer {folder / 'tokenizer'}\nfigures {folder / 'results.json'}\npicture {folder / 'tokens.png'}", markup=False)


if __name__ == "__main__":
    chosen = tyro.cli(Config, description=__doc__, prog="python -m recipes.train_tokenizer")
    try:
        main(chosen)
    except (ValueError, OSError) as error:
        fail(str(error))
