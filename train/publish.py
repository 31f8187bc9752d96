"""From a trained model to a folder that `transformers` and the Hub accept."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import jax.numpy as jnp

from lm.base import AbstractLM
from lm.models import save_pretrained

# Keys of `results`: what the model is held against.
YARDSTICKS = {"xz": "xz -9", "xz_primed": "xz -9, primed with the training text"}


class SavableTokenizer(Protocol):
    """What the export needs of a tokenizer (`data.tokenizer.Tokenizer` has it)."""

    @property
    def bos_id(self) -> int | None: ...
    @property
    def eos_id(self) -> int | None: ...
    @property
    def pad_id(self) -> int | None: ...
    @property
    def prompt_prefix(self) -> tuple[int, ...]: ...
    @property
    def opening_id(self) -> int | None: ...
    def save(self, folder: Path, *, model_max_length: int | None = None) -> None: ...


def export(
    model: AbstractLM, tokenizer: SavableTokenizer, folder: Path, *, manifest: Mapping[str, Any], results: Mapping[str, Any]
) -> None:
    """Write `config.json`, `model.safetensors` (fp32), the tokenizer's files, `generation_config.json` and a README card.

    **Arguments:**

    - `manifest`: what the run was made of; the card quotes corpus, model and device, and never a path of this machine.
    - `results`: what it measured.
    """
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    ids = {name: value for name, value in ids.items() if value is not None}
    beside = folder.with_name(f".{folder.name}.building")  # renamed at the end: a folder of this name is always whole
    shutil.rmtree(beside, ignore_errors=True)
    save_pretrained(model, beside, dtype=jnp.float32, extra_config=ids)
    tokenizer.save(beside, model_max_length=model.config.context)
    generation = ids | {"do_sample": True, "temperature": 0.7, "top_p": 0.95, "max_length": model.config.context}
    (beside / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    (beside / "README.md").write_text(card(manifest, results, opening_of(tokenizer)), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)


def card(manifest: Mapping[str, Any], results: Mapping[str, Any], opening: str) -> str:
    """The model card, in the Hub's format: front matter, then words. `opening` is a sentence on how documents begin."""
    corpus, model, device = manifest["corpus"], manifest["model"], manifest["sessions"][-1]["device"]
    text = f"the standard library of {corpus['python']}" if "python" in corpus else f"{corpus['kind']} source"
    kv_heads = model.get("n_kv_heads", model["n_heads"])
    continued = manifest.get("continued_from")
    origin = "trained from scratch" if continued is None else f"continued from {continued['source']}"
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [jax, equinox, zmaj-lm]",
        "---",
        "",
        f"# A {model['parameters'] / 1e6:.1f}M-parameter {model['model_type']} {origin}",
        "",
        f"Trained with zmaj-lm on {corpus['train_bytes']:,} bytes of text ({text}, {corpus['train_documents']:,} documents): "
        f"{manifest['tokens']:,} tokens in {manifest['steps']:,} steps on {device.get('cpu') or device['device_kind']}.",
        "",
        f"| held-out text ({results['held_out_bytes']:,} bytes) | bits per byte |",
        "|---|---|",
        f"| this model | {results['bits_per_byte']:.4f} |",
        *(f"| {coder} | {results[key]:.4f} |" for key, coder in YARDSTICKS.items() if key in results),
        *(f"| before, {name} text | {found['bits_per_byte']:.4f} |" for name, found in results.get("before", {}).items()),
        *(f"| after, {name} text | {found['bits_per_byte']:.4f} |" for name, found in results.get("after", {}).items()),
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained("this folder")',
        'model = AutoModelForCausalLM.from_pretrained("this folder")',
        "```",
        "",
        opening,
        "",
        f"Layers {model['n_layers']}, width {model['d_model']}, heads {model['n_heads']} ({kv_heads} for keys), "
        f"MLP {model['d_ff']}, vocabulary {model['vocab']:,}, context {model['context']:,}; seed {manifest['seed']}; "
        f"corpus sha256 `{corpus['sha256']}`.",
        "",
    ]
    return "\n".join(lines)


def opening_of(tokenizer: SavableTokenizer) -> str:
    """How documents began in training, and whether `tokenizer(text)` in `transformers` begins so."""
    itself = "as the tokenizer begins every text" if tokenizer.prompt_prefix else "which the tokenizer does not add by itself"
    return f"In training a document began with token {tokenizer.opening_id}, {itself}."
