"""What is proved of a folder before it is published: that it is the model, that others compute the same, and what it is worth on held-out
text.

The evidence is kept in the folder (`evidence.json`). Where the same files are written again, what was proved of them is taken from there:
a push that was cut off goes on without an hour of work.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from loguru import logger

from data.sources import Source, open_source
from data.tokenizer import Tokenizer
from lm.base import AbstractLM
from lm.models import load_pretrained
from lm.native import is_native
from recipes.corpus import encode, fewer_held_out
from recipes.loading import is_run
from recipes.report import nats_of
from recipes.running import RunConfig, choose_flight
from train.backends import attention_of
from train.card import NOT_COMPARED, OURS_ALONE
from train.intervals import bootstrap_ratio
from train.lineage import record_of
from train.parity import can_compare, compare, in_words, our_logits, tokens_of, transformers_logits
from train.publish import EVIDENCE_FILE, digests, in_dtype
from train.runtime import choose_device, device_facts
from train.step import make_token_nats


def prove(
    model: AbstractLM,
    tokenizer: Tokenizer | None,
    folder: Path,
    *,
    source: str,
    places: int,
    python: Path | None,
    measure: bool,
    earlier: Path,
) -> dict[str, Any]:
    """The evidence of a folder into which a model has been written.

    **Arguments:**

    - `source`: what the model was taken from. Of a run the held-out text is known.
    - `places`: tokens on which logits are compared, at most.
    - `python`: another interpreter, to ask `transformers` in.
    - `measure`: whether to measure the held-out text.
    - `earlier`: where such a folder may lie from before.
    """
    text = held_out_text(source) if measure and tokenizer is not None else None
    asked = {"places": places, "transformers": can_compare(python), "held_out": None if text is None else text.record["sha256"]}
    if (known := _known(earlier, digests(folder), asked)) is not None:
        logger.info(f"these files were proved before: that evidence is taken (to do it again, delete {earlier})")
        return known
    tokens = tokens_of(tokenizer, model, places=places)
    ours = our_logits(in_dtype(model, "float32"), tokens)
    again = load_pretrained(folder)
    equal = bool(np.array_equal(our_logits(in_dtype(again, "float32"), tokens), ours))
    logger.info(f"read back, its logits are {'equal bit for bit' if equal else 'NOT EQUAL'}")
    evidence = {"made_with": "zmaj-lm", "asked": asked, "read_back_equal": equal, **compared(folder, tokens, ours, python)}
    evidence["passed"] &= equal
    evidence["measured"] = {} if text is None or tokenizer is None else held_out_bits(again, tokenizer, text)
    return evidence


def compared(folder: Path, tokens: np.ndarray, ours: np.ndarray, python: Path | None) -> dict[str, Any]:
    """The logits that `transformers` computes from the folder beside ours: figures, verdict, words."""
    if is_native(folder):
        logger.info(OURS_ALONE)
        return {"compared": [], "words": OURS_ALONE, "lines": [], "passed": True}
    if not can_compare(python):
        logger.warning(f"{NOT_COMPARED}: install the extra `parity`, or name an interpreter that has transformers with --parity-python")
        return {"compared": [], "words": NOT_COMPARED, "lines": [], "passed": True}
    name, theirs = transformers_logits(folder, tokens, python)
    found = compare(name, theirs, ours)
    logger.info(in_words(found))
    words = f"{'passed' if found.passed else 'FAILED'}: compared with {name}"
    return {"compared": [found.record()], "words": words, "lines": [in_words(found)], "passed": found.passed}


def held_out_text(source: str) -> Source | None:
    """The corpus of a run with the part that training never saw; `None`, and said why, where there is none to be had."""
    run = Path(source)
    if not is_run(source) or not (run / "manifest.json").is_file():
        logger.info("no run: its held-out text is not known, and nothing is measured")
        return None
    manifest, _ = record_of(run)
    settings = manifest["sessions"][-1].get("settings", {})
    if "conversations" in manifest or settings.get("data_kind") == "conversations":
        logger.info("the run learned from conversations: its own figures stand in the card, and no text is measured again")
        return None
    spec, digest = settings.get("data"), (manifest.get("corpus") or {}).get("sha256")
    if not isinstance(spec, str) or digest is None:
        logger.info("the run's data is no plain text: nothing is measured again")
        return None
    try:
        text = open_source(spec, on_invalid_utf8=settings.get("on_invalid_utf8", "error"))
    except (ValueError, OSError) as error:
        logger.warning(f"the run's text is not to be had any more, so only the run's own figures stand in the card: {error}")
        return None
    if settings.get("held_out_documents") is not None:
        text = fewer_held_out(text, settings["held_out_documents"])
    if text.record["sha256"] != digest:
        logger.warning(f"{spec} has changed since the run: only the run's own figures stand in the card")
        return None
    return text


def held_out_bits(model: AbstractLM, tokenizer: Tokenizer, text: Source) -> dict[str, dict[str, Any]]:
    """Bits per byte of the held-out part, in the shape of the card's evaluations; the interval is that over documents."""
    device, shape, seq = choose_device("auto"), model.config, min(model.config.context, 1024)
    ops, flight = choose_flight(RunConfig(), device_facts(device), n_layers=shape.n_layers, seq=seq, **attention_of(model))
    held_out = encode(text.held_out, tokenizer, text, "held_out")
    logger.info(f"measuring {len(held_out)} held-out documents with {ops.name}, {flight.dtype}")
    nats, _ = nats_of(make_token_nats(flight, ops), in_dtype(model, "float32"), held_out, batch=16, seq=seq)
    bits = [nats.get(i, 0.0) / math.log(2) for i in range(len(held_out))]
    sizes = [int(size) for size in held_out.text_bytes]
    found = bootstrap_ratio(bits, sizes, seed=0)
    how = {"of": "documents", "bytes": sum(sizes), "window": seq, "stride": seq // 2, "kernels": ops.name, "products": flight.dtype}
    return {"held-out text": {"metric": "bits per byte", **found.record(), **how}}


def _known(folder: Path, written: dict[str, str], asked: dict[str, Any]) -> dict[str, Any] | None:
    """The evidence of an earlier folder that holds the same model, tokenizer and settings, where the same was asked."""
    if not (folder / EVIDENCE_FILE).is_file():
        return None
    known = json.loads((folder / EVIDENCE_FILE).read_text(encoding="utf-8"))
    files = known.pop("files", {})
    return known if known.get("asked") == asked and all(files.get(name) == digest for name, digest in written.items()) else None
