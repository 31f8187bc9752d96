"""A corpus in the hands of a recipe: said in words, and encoded once for all runs."""

from dataclasses import replace
from hashlib import sha256
from typing import Any

from loguru import logger

from data.cache import TokenCache
from data.mixture import mixed_source
from data.rows import MixedRows, Mixture, OnEnd, Rows
from data.sources import Source
from data.tokenizer import Tokenizer
from train.logs import progress
from train.runtime import cache_root


def describe_source(source: Source) -> None:
    """Say what is trained on, what is held out and by which rule, and what was left out."""
    record = source.record
    logger.info(
        f"corpus {source.name}: {record['train_documents']:,} documents, {record['train_bytes']:,} bytes to train on; "
        f"{record['held_out_documents']:,} documents, {record['held_out_bytes']:,} bytes held out ({record['held_out_rule']})"
    )
    counts = {name.replace("_", " "): record.get(name, 0) for name in LEFT_OUT}
    counts |= record["left_out"] if isinstance(record.get("left_out"), dict) else {}
    if any(counts.values()):
        logger.info("left out or changed: " + ", ".join(f"{count:,} {what}" for what, count in counts.items() if count))


def fewer_held_out(source: Source, most: int) -> Source:
    """The source with at most `most` held-out documents (of each part of a mixture), evenly spaced; the others are left out of everything.
    It is a corpus of its own, with a `sha256` of its own."""
    if source.parts:
        return mixed_source(source.record["spec"], [replace(part, source=fewer_held_out(part.source, most)) for part in source.parts])
    documents, record = len(source.held_out), source.record
    if documents <= most:
        return source
    every = documents // most
    kept = source.held_out[: most * every : every]
    changed = {
        "sha256": sha256(f"{record['sha256']} held out: {most}".encode()).hexdigest(),
        "held_out_rule": f"{record['held_out_rule']}, of these {most:,} evenly spaced",
        "held_out_documents": most,
        "held_out_bytes": sum(len(document["text"].encode()) for document in kept),
        "held_out_documents_left_out": documents - most,
    }
    return replace(source, held_out=kept, record=record | changed)


LEFT_OUT = (
    "empty_documents",
    "blank_lines",
    "invalid_documents_skipped",
    "invalid_documents_replaced",
    "characters_replaced",
    "null_texts",
    "held_out_documents_left_out",
)


def encode(documents: Any, tokenizer: Tokenizer, source: Source, split: str) -> TokenCache:
    """Encoded once a tokenizer and corpus, on disk, for all runs."""
    folder, digest = cache_root() / "tokens", source.record["sha256"]
    with progress(f"encoding {split} documents", len(documents)) as told:
        return TokenCache.build_or_open(
            documents, tokenizer, folder, source_digest=digest, split=split, on_progress=lambda done, _: told(done)
        )


def encode_training(source: Source, tokenizer: Tokenizer, on_end: OnEnd) -> TokenCache | Mixture:
    """The tokens of the source, or of each part of a mixture."""
    if not source.parts:
        return encode(source.train, tokenizer, source, "train")
    caches = tuple(encode(part.source.train, tokenizer, part.source, "train") for part in source.parts)
    names, weights = tuple(part.name for part in source.parts), tuple(part.weight for part in source.parts)
    return Mixture(names, caches, weights, on_end)


def describe_packing(rows: Rows) -> None:
    """Say what packing makes of the documents: how many are cut, how much of the rows is padding."""
    parts = rows.describe() if isinstance(rows, MixedRows) else {"rows": rows.describe()}
    for name, counts in parts.items():
        logger.info(
            f"{name}: {counts['rows']:,} an epoch by {counts['packing']}, {counts['pairs']:,} tokens and {counts['padding']:,} of padding "
            f"({1 - counts['fill_fraction']:.1%}); {counts['documents_cut']:,} documents are cut"
        )


def describe_mixture(mixture: dict[str, dict[str, float]]) -> None:
    """Say what a run is really made of (`rows.realised`)."""
    for name, part in mixture.items():
        shares = f"{part['token_share']:.2%} (asked: {part['weight']:.2%})"
        logger.info(f"mixture: {name} {part['tokens']:,} tokens, {shares}, {part['epochs']:.2f} epochs")
