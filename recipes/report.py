"""What came of a run: bits per byte on held-out text beside `xz`, samples, the picture, and the last words on the screen."""

import json
import lzma
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax.random as jr
import numpy as np
from loguru import logger
from rich.console import Console
from rich.table import Table

import lm
from data.cache import TokenCache
from data.pipeline import evaluation_batches
from data.sources import Source
from data.tasks.python_syntax import complete_statements, parses
from data.tokenizer import Tokenizer
from lm.generate import Sampler
from lm.native import is_native
from train.card import YARDSTICKS
from train.logs import plot_curves, progress, write_json
from train.loop import bits_per_byte, nats_by_document
from train.runtime import cache_root

# ------------------------------------------------------------------------------------------- samples


SAMPLER = Sampler(temperature=0.7, top_p=0.95)
HEAD_CHARACTERS = 160  # of a held-out file, up to the end of a line: what a sample continues
SAMPLE_CHARACTERS = 200  # at least, or the sample is drawn again


def heads(source: Source, tokenizer: Tokenizer, *, seq: int, most: int = 256) -> list[np.ndarray]:
    """The start of a document and its first lines, of the first `most` held-out files, as far as they fit into half the context."""
    found = []
    for i in range(min(most, len(source.held_out))):
        text = source.held_out[i]["text"]
        end = text.find("\n", min(HEAD_CHARACTERS, len(text)))
        tokens = tokenizer.encode(text[: end + 1] if end >= 0 else text)
        found.append(np.concatenate([[tokenizer.opening_id], tokens])[: seq // 2].astype(np.int32))
    return found


def stops(tokenizer: Tokenizer) -> list[int]:
    """Where a document ends."""
    return [] if tokenizer.eos_id is None else [tokenizer.eos_id]


def one_sample(model: Any, tokenizer: Tokenizer, prompt: np.ndarray, *, seq: int, seed: int) -> str:
    """A short continuation, always drawn with the same key, so that looks at different steps compare."""
    room = min(64, seq - len(prompt))
    tokens = lm.generate(model, [prompt], max_new_tokens=room, sampler=SAMPLER, stop_ids=stops(tokenizer), key=jr.key(seed))[0]
    return tokenizer.decode(tokens)


def draw_samples(
    model: Any, tokenizer: Tokenizer, prompts: list[np.ndarray], *, count: int, seq: int, seed: int
) -> tuple[list[dict[str, Any]], int]:
    """`count` continuations of at least SAMPLE_CHARACTERS, taking the prompts in turn, and how many were drawn for them."""
    kept: list[dict[str, Any]] = []
    drawn = 0
    room = min(seq // 2, 320)
    for attempt in range(4):
        missing = count - len(kept)
        if missing == 0:
            break
        turn = [(drawn + i) % len(prompts) for i in range(missing)]
        key = jr.fold_in(jr.key(seed), attempt)
        outputs = lm.generate(model, [prompts[i] for i in turn], max_new_tokens=room, sampler=SAMPLER, stop_ids=stops(tokenizer), key=key)
        for i, tokens in zip(turn, outputs, strict=True):
            text = tokenizer.decode(tokens)
            if len(text) >= SAMPLE_CHARACTERS:
                kept.append({"file": i, "prompt": tokenizer.decode(prompts[i]), "text": text, "finished": len(tokens) < room})
        drawn += missing
    return kept, drawn


def share_that_parses(samples: list[dict[str, Any]]) -> float:
    whole = [complete_statements(s["prompt"] + s["text"], after=len(s["prompt"]), finished=s["finished"]) for s in samples]
    return sum(map(parses, whole)) / len(samples)


def real_samples(samples: list[dict[str, Any]], source: Source) -> list[dict[str, Any]]:
    """The text that really follows each prompt, cut at the sample's length."""
    real = []
    for sample in samples:
        text = source.held_out[sample["file"]]["text"]
        start = len(sample["prompt"])
        real.append({**sample, "text": text[start : start + len(sample["text"])], "finished": start + len(sample["text"]) >= len(text)})
    return real


# ------------------------------------------------------------------------------------------- report


XZ_WINDOW = 64 << 20  # bytes that xz -9 looks back; a larger text is not compared: it would take minutes, and priming would be lost


def xz_yardsticks(source: Source) -> dict[str, float]:
    """Bits per byte of `xz -9` on the held-out files joined in path order: alone, and primed with the training text. Kept on disk, for it
    takes a while. What is larger than xz's window is left out, and said."""
    sizes = {"xz": source.record["held_out_bytes"], "xz_primed": source.record["held_out_bytes"] + source.record["train_bytes"]}
    wanted = [name for name, size in sizes.items() if size <= XZ_WINDOW]
    for name in sizes.keys() - set(wanted):
        logger.info(f"not measured: {name} ({sizes[name]:,} bytes, more than the {XZ_WINDOW:,} that xz -9 looks back)")
    kept = cache_root() / "xz" / f"{source.record['sha256']}.json"
    if wanted and not kept.exists():
        logger.info("compressing the same text with xz, for comparison")
        held_out = b"".join(document["text"].encode() for document in source.held_out)
        found = {"xz": 8 * len(lzma.compress(held_out, preset=9)) / len(held_out)}
        if "xz_primed" in wanted:
            train = b"".join(document["text"].encode() for document in source.train)
            primed, alone = (len(lzma.compress(text, preset=9)) for text in (train + held_out, train))
            found["xz_primed"] = 8 * (primed - alone) / len(held_out)
        write_json(kept, found)
    return json.loads(kept.read_text(encoding="utf-8")) if wanted else {}


def nats_of(token_nats: Any, model: Any, held_out: TokenCache, *, batch: int, seq: int) -> tuple[dict[int, float], dict[int, int]]:
    """Nats and tokens of every held-out document, each token with half a row of context where its document has that much before it."""
    batches = evaluation_batches(held_out, batch=batch, seq=seq, stride=max(1, seq // 2))
    with progress("held-out batches", len(batches)) as told:
        nats, tokens = nats_by_document(token_nats, model, batches, told)
    assert sum(tokens.values()) == held_out.total_tokens - len(held_out), "every token but each document's first is predicted, once"
    return nats, tokens


def bits_of(held_out: TokenCache, nats: dict[int, float], documents: Iterable[int]) -> float:
    """Bits per byte of some documents. One of a single token has nothing to predict and no nats."""
    chosen = list(documents)
    return bits_per_byte(sum(nats.get(i, 0.0) for i in chosen), sum(int(held_out.text_bytes[i]) for i in chosen))


def documents_by_part(source: Source) -> dict[str, range]:
    """The held-out documents of each part of a mixture: they stand one part after another."""
    found, start = {}, 0
    for part in source.parts:
        end = start + part.source.record["held_out_documents"]
        found[part.name] = range(start, end)
        start = end
    return found


def measure(model: Any, token_nats: Any, source: Source, held_out: TokenCache, *, batch: int, seq: int) -> dict[str, Any]:
    """Bits per byte of all held-out text, and of the parts of it that can be told apart."""
    nats, tokens = nats_of(token_nats, model, held_out, batch=batch, seq=seq)
    everything = range(len(held_out))
    others = [i for i in everything if not held_out.names[i].startswith("encodings/")]  # tables of character codes
    results: dict[str, Any] = {
        "bits_per_byte": bits_of(held_out, nats, everything),
        "held_out_bytes": int(sum(held_out.text_bytes)),
        "held_out_tokens": sum(tokens.values()),
    }
    if 0 < len(others) < len(held_out):
        results["bits_per_byte_without_encodings"] = bits_of(held_out, nats, others)
    if source.parts:
        results["bits_per_byte_by_source"] = {name: bits_of(held_out, nats, part) for name, part in documents_by_part(source).items()}
    return results


def draw_curves(folder: Path, results: dict[str, Any], title: str) -> None:
    """`loss.png`, with xz's figures as lines."""
    nats_per_bit = math.log(2) * results["held_out_bytes"] / results["held_out_tokens"]  # bits a byte → nats a token
    references = {coder: results[key] * nats_per_bit for key, coder in (("xz", "xz -9"), ("xz_primed", "xz -9, primed")) if key in results}
    plot_curves(folder / "metrics.jsonl", folder / "loss.png", title=title, references=references)


def judge_samples(
    model: Any,
    tokenizer: Tokenizer,
    prompts: list[np.ndarray],
    source: Source,
    results: dict[str, Any],
    folder: Path,
    *,
    count: int,
    seq: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Draw samples, write them down, and, where the corpus is Python, count those that parse."""
    if count == 0:
        return []
    logger.info(f"drawing {count} samples")
    samples, drawn = draw_samples(model, tokenizer, prompts, count=count, seq=seq, seed=seed)
    results |= {"samples": len(samples), "samples_drawn": drawn}
    if samples and all(document["name"].endswith(".py") for document in source.held_out):
        results["samples_that_parse"] = share_that_parses(samples)
        results["real_text_that_parses"] = share_that_parses(real_samples(samples, source))
    (folder / "samples.txt").write_text("\n\n".join(f"{'=' * 100}\n{s['prompt']}⟦{s['text']}⟧" for s in samples), encoding="utf-8")
    return samples


def show(results: dict[str, Any], folder: Path, samples: list[dict[str, Any]]) -> None:
    """The last words on the screen."""
    console = Console()
    if samples:
        sample = samples[0]
        console.rule("a sample: the head of a held-out file, then the model")
        console.print(sample["prompt"], style="dim", end="", markup=False, highlight=False)
        console.print(sample["text"], markup=False, highlight=False)
    console.print("held-out text, bits per byte (less is better)", style="italic", highlight=False)
    table = Table()
    table.add_column("coder")
    table.add_column("bits per byte", justify="right")
    weights = f", {results['weights']}" if "bits_per_byte_other_weights" in results else ""
    table.add_row(f"this model{weights}", f"{results['bits_per_byte']:.4f}")
    for name, value in results.get("bits_per_byte_other_weights", {}).items():
        table.add_row(f"this model, {name}", f"{value:.4f}")
    if "bits_per_byte_without_encodings" in results:
        table.add_row("this model, without encodings/", f"{results['bits_per_byte_without_encodings']:.4f}")
    for name, value in results.get("bits_per_byte_by_source", {}).items():
        table.add_row(f"this model, {name}", f"{value:.4f}")
    for key, coder in YARDSTICKS.items():
        if key in results:
            table.add_row(coder, f"{results[key]:.4f}")
    console.print(table)
    share = results["mfu"]
    console.print(
        f"{results['tokens_per_s']:,.0f} tokens/s" + (f", MFU {share:.1%}" if share is not None else ", peak of this device not known")
    )
    if results.get("samples_drawn") and not results["samples"]:
        console.print(f"none of the {results['samples_drawn']} samples drawn reached {SAMPLE_CHARACTERS} characters, so none is judged")
    if "samples_that_parse" in results:
        kept = f"{results['samples']} samples of at least {SAMPLE_CHARACTERS} characters ({results['samples_drawn']} drawn)"
        real = f"{results['real_text_that_parses']:.0%}"
        console.print(f"{results['samples_that_parse']:.0%} of {kept} parse as Python; of real text cut alike {real}", soft_wrap=True)
    reader = "lm.load_pretrained alone" if is_native(folder / "export") else "transformers"
    lines = [f"curve {folder / 'loss.png'}", f"for {reader} {folder / 'export'}"]
    if samples:
        lines.append(f"samples {folder / 'samples.txt'}")
    lines.append(f"more samples: python -m recipes.sample {folder} --prompt 'def main('")
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
