"""Which of two is better, and is it certain? Two models on the same held-out text, token by token.

    python -m recipes.compare runs/A runs/B                         # runs of one corpus: its held-out part
    python -m recipes.compare runs/A/export owner/name --data my_texts/

A and B are runs, Hugging Face folders, folders of ours, GGUF files, or `owner/name` on the Hub. Every token that both predict gives a
difference; those of one document hang together, so the interval is of documents: Student's law with the variance clustered by document
(Liang and Zeger 1986, eq. 2 with independence inside). Where the tokenizers differ there are no common tokens, and the documents' bits are
compared. Of two runs that read the same rows in the same order, the losses of their steps are paired likewise, and the seconds they took.

The interval tells what other documents of the kind would give. It tells nothing of other seeds: a difference between two *recipes* needs
runs with several (`recipes.ablate`).
"""

import json
import math
from dataclasses import replace
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import grain
import numpy as np
import tyro
from loguru import logger
from pydantic import Field
from rich.console import Console
from rich.table import Table

import lm
from data.cache import TokenCache
from data.pipeline import evaluation_batches
from data.sources import Source, open_source
from data.tokenizer import Tokenizer
from lm.base import AbstractLM
from recipes.command_line import CONFIG_FILE, RecipeConfig, fail
from recipes.corpus import describe_source, encode, fewer_held_out
from recipes.evaluate_model import run_with
from recipes.evidence import held_out_text
from recipes.loading import is_run, load
from recipes.running import ENDS_IN_WORDS
from train.intervals import Estimate, clustered_ratio
from train.logs import plain_messages, progress, read_metrics, write_json
from train.runtime import choose_device, compilation_cache, device_facts
from train.step import make_token_nats

METRICS_FILE = "metrics.jsonl"


class Config(RecipeConfig):
    """What to compare, on what."""

    a: Annotated[Path, tyro.conf.Positional] = Field(description="run, folder, GGUF file, or owner/name on the Hub")
    b: Annotated[Path, tyro.conf.Positional] = Field(description="the other one")
    data: str | None = Field(None, description="text whose held-out part is measured, as pretrain_small's --data; None: that of the runs")
    whole: bool = Field(False, description="measure all of --data, not only what is held out of it")
    documents: int | None = Field(None, ge=2, description="documents measured, evenly spaced; None: all")
    seq: int | None = Field(None, ge=2, description="tokens of a window, moved on by half of it; None: the shorter context, at most 1024")
    batch: int = Field(16, ge=1, description="windows computed at a time")
    run_dir: Path | None = Field(None, description="folder for results.json and differences.png; None: runs/compare-DATE-TIME")
    device: Literal["auto", "cpu", "gpu", "tpu"] = Field("auto", description="where to compute")
    backend: str = Field("auto", description="kernels: auto (the rule of train.backends) or one of " + ", ".join(lm.BACKENDS))
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="operands of matrix products; auto: as in training")


class Side(NamedTuple):
    """One of the two, and what it said."""

    name: str
    model: AbstractLM
    tokenizer: Tokenizer


class Said(NamedTuple):
    """Of one side: bits of each document, and of each token with the document it is in."""

    bits: np.ndarray  # [documents]
    token_bits: np.ndarray  # [tokens], in the order in which the windows come
    of_document: np.ndarray  # [tokens]


# ------------------------------------------------------------------------------------------- main


def main(config: Config) -> dict[str, Any]:
    """Load, measure, compare. What is printed is returned."""
    plain_messages()
    device = choose_device(config.device)
    compilation_cache()
    sides = [Side(name, *load(source)[:2]) for name, source in zip("AB", (config.a, config.b), strict=True)]
    for side, source in zip(sides, (config.a, config.b), strict=True):
        logger.info(f"{side.name}: {source}, {side.model.config.model_type}, {side.model.n_params:,} parameters")
    text = text_of(config)
    describe_source(text)
    seq = config.seq or min(1024, *(side.model.config.context for side in sides))
    for side in sides:
        if seq > side.model.config.context:
            raise ValueError(f"--seq {seq} passes the context of {side.name} ({side.model.config.context}): take fewer tokens")

    said, text_bytes = [], np.zeros(0)
    for side in sides:
        cache = encode(text.held_out, side.tokenizer, text, "held_out")
        text_bytes = np.asarray(cache.text_bytes, float)
        said.append(measured(side, cache, config, device_facts(device), seq))
    same_tokens = sides[0].tokenizer.digest == sides[1].tokenizer.digest
    results: dict[str, Any] = {
        "a": config.a.name,
        "b": config.b.name,
        "documents": len(text_bytes),
        "bytes": int(text_bytes.sum()),
        "window": seq,
        "same_tokens": same_tokens,
        **compared(said[0], said[1], text_bytes, same_tokens=same_tokens),
    }
    if course := courses(config.a, config.b):
        results["training"] = course
    folder = config.run_dir or Path("runs") / f"compare-{datetime.now():%Y%m%d-%H%M%S}"
    write_json(folder / "results.json", results)
    draw(said[0].bits - said[1].bits, text_bytes, results, folder / "differences.png")
    show(results, folder)
    return results


def text_of(config: Config) -> Source:
    """The text to measure on: that asked for, else the held-out part of the corpus that both runs had.

    **Raises:** `ValueError` where there is none, or the runs had different ones.
    """
    if config.data is not None:
        text = open_source(config.data)
        if config.whole:
            parts = [text.train[i] for i in range(len(text.train))] + [text.held_out[i] for i in range(len(text.held_out))]
            text = _with_held_out(text, parts, "whole")
        if not len(text.held_out):
            raise ValueError(f"{config.data} holds nothing out: add --whole to measure all of it")
    else:
        found = [held_out_text(f"{source}") for source in (config.a, config.b)]
        if found[0] is None and found[1] is None:
            raise ValueError("neither is a run whose corpus is known: say --data TEXT, and --whole where all of it may be measured")
        known = [each for each in found if each is not None]
        if len({each.record["sha256"] for each in known}) > 1:
            raise ValueError("the two runs had different corpora, and what one held out the other may have read: say --data TEXT")
        if len(known) == 1:
            logger.warning("only one of them is a run of this corpus: whether the other has read its held-out part is not known")
        text = known[0]
    return text if config.documents is None else fewer_held_out(text, config.documents)


def _with_held_out(text: Source, documents: list[Any], how: str) -> Source:
    record = text.record | {
        "sha256": sha256(f"{text.record['sha256']} {how}".encode()).hexdigest(),
        "held_out_rule": "all of it",
        "held_out_documents": len(documents),
        "held_out_bytes": sum(len(document["text"].encode()) for document in documents),
    }
    return replace(text, held_out=grain.MapDataset.source(documents), record=record)


def measured(side: Side, cache: TokenCache, config: Config, facts: dict[str, Any], seq: int) -> Said:
    """The bits of every token, each with half a window before it where its document has that much."""
    ops, flight = run_with(side.model, facts, config.dtype, config.backend)
    token_nats = make_token_nats(flight, ops)
    batches = evaluation_batches(cache, batch=config.batch, seq=seq, stride=max(1, seq // 2))
    bits, places = [], []
    with progress(f"{side.name}: held-out batches", len(batches)) as told:
        for done, (batch, documents) in enumerate(batches, start=1):
            counted = batch.loss_weights > 0
            bits.append(np.asarray(token_nats(side.model, batch), np.float64)[counted] / math.log(2))
            places.append(documents[counted])
            told(done)
    all_bits, of_document = np.concatenate(bits), np.concatenate(places)
    return Said(np.bincount(of_document, all_bits, len(cache)), all_bits, of_document)


# ------------------------------------------------------------------------------------------- comparing


def compared(a: Said, b: Said, text_bytes: np.ndarray, *, same_tokens: bool) -> dict[str, Any]:
    """Bits per byte of both, the difference A - B with its interval, the verdict; of common tokens the mean difference too, and what share
    of them each predicts better."""
    difference = clustered_ratio(a.bits - b.bits, text_bytes)
    found: dict[str, Any] = {
        "bits_per_byte": {"a": float(a.bits.sum() / text_bytes.sum()), "b": float(b.bits.sum() / text_bytes.sum())},
        "difference": difference.record(),
        "verdict": verdict(difference),
    }
    if same_tokens:
        assert np.array_equal(a.of_document, b.of_document), "the windows follow from the tokens alone"
        differences = a.token_bits - b.token_bits
        per_document = np.bincount(a.of_document, minlength=len(text_bytes))
        among = per_document > 0
        tokens = clustered_ratio((a.bits - b.bits)[among], per_document[among])
        naive = float(differences.std(ddof=1) / math.sqrt(len(differences)))
        found["tokens"] = {
            "n": len(differences),
            "difference": tokens.record(),  # bits a token
            "standard_error_if_independent": naive,
            "a_better": float(np.mean(differences < 0)),
            "b_better": float(np.mean(differences > 0)),
            "correlation": float(np.corrcoef(a.token_bits, b.token_bits)[0, 1]),
        }
    return found


def verdict(difference: Estimate) -> str:
    """By the interval of A - B, in bits: less is better."""
    if difference.low is None or difference.high is None:
        return "not decided: one document tells nothing of others"
    if difference.high < 0:
        return "A is better"
    return "B is better" if difference.low > 0 else "not decided"


def courses(a: Path, b: Path) -> dict[str, Any]:
    """Of two runs: seconds, and, where both read the same rows in the same order, their last losses, paired by step. Empty where they are
    no runs."""
    if not all(is_run(run) and (run / METRICS_FILE).is_file() and (run / CONFIG_FILE).is_file() for run in (a, b)):
        return {}
    lines = [{line["step"]: line for line in read_metrics(run / METRICS_FILE) if "loss" in line} for run in (a, b)]
    if not all(lines):
        return {}
    seconds = [float(np.median([line["step_s"] for line in each.values()])) for each in lines]
    found: dict[str, Any] = {"step_s": dict(zip("ab", seconds, strict=True)), "steps": {"a": max(lines[0]), "b": max(lines[1])}}
    found["same_order"] = order_of(a) == order_of(b)
    if found["same_order"]:
        common = sorted(lines[0].keys() & lines[1].keys())
        last = common[-max(2, len(common) // 10) :]
        pairs = [lines[0][step]["loss"] - lines[1][step]["loss"] for step in last]
        found["last_losses"] = {"steps": len(last), "difference": clustered_ratio(pairs, np.ones(len(pairs))).record()}  # nats a token
    return found


def order_of(run: Path) -> tuple[Any, ...] | None:
    """What the rows of a run's steps hang on."""
    config = json.loads((run / CONFIG_FILE).read_text(encoding="utf-8"))
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8")) if (run / "manifest.json").is_file() else {}
    corpus, tokenizer = (manifest.get("corpus") or {}).get("sha256"), (manifest.get("tokenizer") or {}).get("digest")
    return (corpus, tokenizer, *(config.get(name) for name in ("batch", "seq", "seed", "packing"))) if corpus else None


# ------------------------------------------------------------------------------------------- report


def show(results: dict[str, Any], folder: Path) -> None:
    """The figures of both, and the verdict."""
    console, table = Console(), Table(title=f"{results['documents']} documents, {results['bytes']:,} bytes", title_justify="left")
    for column in ("", f"A, {results['a']}", f"B, {results['b']}", "A - B", "95 %"):
        table.add_column(column, justify="left" if column == "" else "right")
    difference, bits = results["difference"], results["bits_per_byte"]
    table.add_row("bits per byte", f"{bits['a']:.4f}", f"{bits['b']:.4f}", f"{difference['value']:+.4f}", interval(difference))
    if tokens := results.get("tokens"):
        among = tokens["difference"]
        table.add_row("bits a token", "", "", f"{among['value']:+.4f}", interval(among))
        table.add_row("tokens predicted better", f"{tokens['a_better']:.1%}", f"{tokens['b_better']:.1%}", "", "")
    if course := results.get("training"):
        seconds = course["step_s"]
        table.add_row("seconds a step", f"{seconds['a']:.3f}", f"{seconds['b']:.3f}", f"x {seconds['a'] / seconds['b']:.2f}", "")
        if last := course.get("last_losses"):
            among = last["difference"]
            table.add_row(f"loss, last {last['steps']} steps", "", "", f"{among['value']:+.4f}", interval(among))
    console.print(table)
    console.print(f"{results['verdict']}; written {folder}", markup=False, highlight=False, soft_wrap=True)


def interval(estimate: dict[str, Any]) -> str:
    return "not known" if estimate["low"] is None else f"{estimate['low']:+.4f} to {estimate['high']:+.4f}"


def draw(differences: np.ndarray, text_bytes: np.ndarray, results: dict[str, Any], path: Path) -> None:
    """The difference of each document, sorted, and that of all with its interval."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    each = np.sort(differences / np.maximum(text_bytes, 1))
    figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
    axis.bar(range(len(each)), each, width=1.0, color=np.where(each < 0, "tab:blue", "tab:orange"))
    all_of = results["difference"]
    axis.axhline(all_of["value"], color="black", linewidth=1.2, label=f"all: {all_of['value']:+.4f}")
    if all_of["low"] is not None:
        axis.axhspan(all_of["low"], all_of["high"], color="black", alpha=0.15, label="95 %, clustered by document")
    axis.set(
        xlabel="held-out documents, sorted",
        ylabel="bits per byte, A - B",
        title=f"A {results['a']}, B {results['b']}: {results['verdict']}",
    )
    axis.legend(fontsize="small")
    axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__, prog="python -m recipes.compare"))
    except ENDS_IN_WORDS as error:
        fail(str(error))
