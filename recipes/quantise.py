"""Write any model that can be loaded with its matrices in fewer bits, say what that saves, and measure what it costs.

The matrices of the blocks become int8 (a scale a row), int4 (a scale for each `--group` neighbours) or nf4; embedding and unembedding
become int8 whatever the kind, norms and biases stay (`lm.quantised`). The folder written is our own (`lm.native`): its config.json names no
model `transformers` knows; the recipes and `lm.load_pretrained` open it.

    python -m recipes.quantise HuggingFaceTB/SmolLM2-135M-Instruct small/ --kind int4 --group 64
    python -m recipes.quantise runs/pretrain_small-DATE-TIME small/ --data my_texts/

With `--data` the bits per byte of that text are measured before and after, with the products in the same dtype. Nothing is trained: each
number goes to the nearest one there is.
"""

import hashlib
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

import equinox as eqx
import grain
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from loguru import logger
from pydantic import Field
from rich.console import Console
from rich.table import Table

import lm
from data.cache import TokenCache
from data.sources import open_source
from data.tokenizer import Tokenizer
from lm.base import AbstractLM
from lm.flight import Flight
from recipes.command_line import RecipeConfig, fail
from recipes.convert import special_ids
from recipes.loading import load
from recipes.report import bits_of, nats_of
from train.backends import attention_of, choose_backend, choose_weights
from train.checkpoint import CheckpointError
from train.logs import plain_messages, write_json
from train.runtime import DeviceError, choose_device, compilation_cache, device_facts
from train.step import make_token_nats

REPORT = "quantisation.json"


class Config(RecipeConfig):
    """What to make smaller, how, and where to."""

    source: Annotated[str, tyro.conf.Positional] = Field(description="run, Hugging Face folder, GGUF file, or owner/name on the Hub")
    out: Annotated[Path, tyro.conf.Positional] = Field(description="folder to write; new, or empty")
    kind: Literal["int8", "int4", "nf4"] = Field("int4", description="what the matrices of the blocks become")
    group: int | None = Field(None, ge=2, description="int4 and nf4: neighbours in a row that share a scale; None: 32 and 64")
    double: bool = Field(False, description="nf4: scales in 8 bits too")
    data: str | None = Field(None, description="text to measure bits per byte on, before and after: a file, a folder, stdlib, ...")
    max_bytes: int = Field(200_000, ge=1000, description="of that text, at most; the documents in order, the last one cut")
    seq: int = Field(512, ge=2, description="tokens of a row in this measurement; each is predicted from half a row at least")
    device: Literal["auto", "cpu", "gpu", "tpu"] = Field("auto", description="where to measure")


# ------------------------------------------------------------------------------------------- main


def main(config: Config) -> dict[str, Any]:
    """Pack, write, read back, measure. What is printed is returned."""
    plain_messages()
    if config.out.is_file() or (config.out.is_dir() and any(config.out.iterdir())):
        raise ValueError(f"{config.out} is not an empty folder: choose another, nothing is overwritten")
    device = choose_device(config.device)
    compilation_cache()
    products = choose_weights(device_facts(device))
    model, tokenizer, origin = load(config.source)
    packed = lm.quantised(model, config.kind, group=config.group, double=config.double, dtype=products)
    if n_bytes(packed) == n_bytes(model):
        raise ValueError(f"{origin} is packed already: quantise the model it was made from")
    logger.info(f"{origin}: {model.config.model_type}, {model.n_params:,} parameters; products in {products}")

    lm.save_native(packed, config.out, extra_config=special_ids(tokenizer))
    tokenizer.save(config.out, model_max_length=model.config.context)
    if not equal(lm.load_pretrained(config.out), packed):
        raise ValueError(f"{config.out}, read back, is not what was written: is the disk sound?")
    report: dict[str, Any] = {"source": Path(config.source).name if Path(config.source).exists() else config.source}
    report |= {"kind": config.kind, "group": config.group, "double": config.double, "parameters": model.n_params}
    sizes = {"before": n_bytes(model), "as bfloat16": 2 * model.n_params, "after": n_bytes(packed)}
    report["bytes"] = sizes
    if config.data is not None:
        report["bits_per_byte"], report["text_bytes"] = measured(config, model, packed, tokenizer, products, device)
    write_json(config.out / REPORT, report)
    show(report, config.out)
    return report


def n_bytes(model: AbstractLM) -> int:
    """What the arrays take in memory."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(eqx.filter(model, eqx.is_array)))


def equal(one: AbstractLM, other: AbstractLM) -> bool:
    same = bool(jax.tree.structure(one) == jax.tree.structure(other))  # type: ignore[operator]
    return same and all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


# ------------------------------------------------------------------------------------------- what it costs


def measured(
    config: Config, model: AbstractLM, packed: AbstractLM, tokenizer: Tokenizer, products: str, device: jax.Device
) -> tuple[dict[str, float], int]:
    """Bits per byte of the text before and after, and how many bytes it has."""
    documents = texts(config)
    seq = min(config.seq, model.config.context)
    backend = choose_backend(device_facts(device), dtype=products, seq=seq, **attention_of(model))
    token_nats = make_token_nats(Flight(dtype=products), lm.BACKENDS[backend])
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        digest = hashlib.sha256("\0".join(document["text"] for document in documents).encode()).hexdigest()
        cache = TokenCache.build_or_open(grain.MapDataset.source(documents), tokenizer, folder, source_digest=digest, split="held_out")
        for name, each in (("before", lm.cast(model, jnp.dtype(products))), ("after", packed)):
            nats, _ = nats_of(token_nats, each, cache, batch=4, seq=seq)
            found[name] = bits_of(cache, nats, range(len(cache)))
        return found, int(sum(cache.text_bytes))


def texts(config: Config) -> list[dict[str, str]]:
    """The first documents of the source, as many as there are bytes for."""
    assert config.data is not None
    source = open_source(config.data)
    found: list[dict[str, str]] = []
    left = config.max_bytes
    for part in (source.held_out, source.train):
        for i in range(len(part)):
            text = part[i]["text"].encode()[:left].decode(errors="ignore")  # a character cut in half goes
            if left < 2 or not text:
                return found
            found.append({"text": text, "name": part[i]["name"]})
            left -= len(text.encode())
    return found


# ------------------------------------------------------------------------------------------- report


def show(report: dict[str, Any], out: Path) -> None:
    """A table, and the folder."""
    bits = report.get("bits_per_byte", {})
    table = Table("", "MB", *(["bits per byte"] if bits else []), title=f"{report['parameters']:,} parameters")
    kind = report["kind"] + (f", group {report['group']}" if report["group"] else "") + (", double" if report["double"] else "")
    for name, row in (("as it was", "before"), ("as bfloat16", "as bfloat16"), (kind, "after")):
        measured_bits = {"before": bits.get("before"), "after": bits.get("after")}.get(row)
        cells = [f"{measured_bits:.4f}" if measured_bits is not None else ""] if bits else []
        table.add_row(name, f"{report['bytes'][row] / 1e6:.1f}", *cells)
    Console().print(table)
    if bits:
        rise = bits["after"] / bits["before"] - 1
        Console().print(f"on {report['text_bytes']:,} bytes of text: {rise:+.2%}", highlight=False)
    words = f"written {out}; python -m recipes.sample {out} --prompt 'Once' opens it"
    Console().print(words, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    chosen = tyro.cli(Config, description=__doc__, prog="python -m recipes.quantise")
    try:
        main(chosen)
    except (ValueError, OSError, CheckpointError, DeviceError) as error:
        fail(str(error))
