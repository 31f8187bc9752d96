"""Bring a model in, write it as a Hugging Face folder, and prove that it is the same.

The source is a folder, a repository of the Hub, a GGUF file, or a run of this project. It is loaded, written to OUT, read back, which must
give the same logits bit for bit, and then compared with an implementation that shares no code with ours:

- `transformers`, where it is installed (or in the interpreter that `--parity-python` names): on the source's own files; for a GGUF file,
  on the folder written.
- llama.cpp, for a GGUF file, where `cyllama` is installed: which token it finds likeliest wherever our choice is clear.
- Neither: the golden models of the family, tiny ones whose logits `transformers` computed once. They speak for the code, not for these
  weights.
- Nor those: the report says `not compared: no independent reference`, or that the drawing is our own.

    python -m recipes.convert HuggingFaceTB/SmolLM2-135M-Instruct converted/
    python -m recipes.convert SmolLM2-135M-Instruct.Q4_1.gguf converted/ --dtype bfloat16
    uv run --extra parity python -m recipes.convert runs/pretrain_small-DATE-TIME converted/

The report is printed and written to OUT/parity.json. A comparison that fails ends with status 1; what was written stays, to be looked at.
"""

import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from loguru import logger
from pydantic import Field
from rich.console import Console
from safetensors.numpy import save_file

from data.tokenizer import Tokenizer
from lm.base import AbstractLM
from lm.hub import folder_of
from lm.models import load_pretrained
from lm.native import is_native
from recipes.command_line import RecipeConfig, fail
from recipes.loading import holds_weights, is_gguf, is_run, load
from train.card import OURS_ALONE
from train.checkpoint import CheckpointError
from train.logs import plain_messages, write_json
from train.parity import (
    TEXT,
    Choices,
    Comparison,
    can_compare,
    compare,
    compare_choices,
    in_words,
    is_installed,
    llama_cpp_choices,
    our_logits,
    tokens_of,
    transformers_logits,
)
from train.publish import in_dtype, special_ids, write_weights

GOLDEN = Path(__file__).parents[1] / "tests" / "lm" / "golden"  # there in a checkout
REPORT = "parity.json"


class Config(RecipeConfig):
    """What to bring in, and where to."""

    source: Annotated[str, tyro.conf.Positional] = Field(description="folder, .gguf file, run, or owner/name on the Hub")
    out: Annotated[Path, tyro.conf.Positional] = Field(description="folder to write; new, or empty")
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = Field(
        "keep", description="of the tensors written; keep: as they are, a GGUF file's as float32"
    )
    revision: str | None = Field(None, description="branch, tag or commit of a repository on the Hub; None: main")
    text: str = Field(TEXT, min_length=1, description="text on which implementations are compared")
    places: int = Field(128, ge=2, description="tokens of it, at most")
    parity_python: Path | None = Field(None, description="interpreter with torch and transformers to compare with; None: this one")


# ------------------------------------------------------------------------------------------- main


def main(config: Config) -> bool:
    """Convert and compare. Whether everything that was compared passed."""
    plain_messages()
    if config.out.is_file() or (config.out.is_dir() and any(config.out.iterdir())):
        raise ValueError(f"{config.out} is not an empty folder: choose another, nothing is overwritten")
    can_compare(config.parity_python)  # an interpreter that cannot is told now
    model, tokenizer, origin = bring_in(config.source, config.revision)
    logger.info(f"{origin}: {model.config.model_type}, {model.n_params:,} parameters")
    if config.dtype != "keep":
        model = in_dtype(model, config.dtype)
    tokens = tokens_of(tokenizer, model, text=config.text, places=config.places)

    write_weights(model, config.out, special_ids(tokenizer))
    if tokenizer is None:
        logger.warning(f"{config.source} has no tokenizer that we can read: {config.out} gets none")
    else:
        tokenizer.save(config.out, model_max_length=model.config.context)
    ours = our_logits(in_dtype(model, "float32"), tokens)
    again = load_pretrained(config.out)
    equal = bool(np.array_equal(our_logits(in_dtype(again, "float32"), tokens), ours))
    logger.info(f"written {config.out}; read back, its logits are {'equal bit for bit' if equal else 'NOT EQUAL'}")

    compared, words = compared_with(config, model, tokens, ours)
    report = {
        "source": Path(config.source).name if Path(config.source).exists() else config.source,  # no path of this machine
        "model_type": model.config.model_type,
        "parameters": model.n_params,
        "dtype": config.dtype,
        "places": len(tokens),
        "read_back_equal": equal,
        "compared": [each.record() for each in compared],
        "words": words,
    }
    write_json(config.out / REPORT, report)
    show(report, compared, config.out / REPORT)
    return equal and all(each.passed for each in compared)


def bring_in(source: str, revision: str | None) -> tuple[AbstractLM, Tokenizer | None, str]:
    """As `recipes.loading.load`, and a folder without a `tokenizer.json` is a model all the same."""
    if not is_gguf(source) and not is_run(source):
        folder = folder_of(source, revision)
        if holds_weights(folder) and not (folder / "tokenizer.json").is_file():
            return load_pretrained(folder), None, source
    return load(source, revision=revision)


# ------------------------------------------------------------------------------------------- who else computes


def compared_with(config: Config, model: AbstractLM, tokens: np.ndarray, ours: np.ndarray) -> tuple[list[Comparison | Choices], str]:
    """Every independent implementation that is at hand, and the verdict in words."""
    if is_native(config.out):
        return [], OURS_ALONE
    compared: list[Comparison | Choices] = []
    if is_gguf(config.source) and is_installed("cyllama"):
        compared.append(compare_choices(*llama_cpp_choices(Path(config.source), tokens), ours))
    if can_compare(config.parity_python):
        rewritten = is_gguf(config.source) or is_run(config.source) or config.dtype != "keep"
        theirs = config.out if rewritten else folder_of(config.source, config.revision)
        name, logits = transformers_logits(theirs, tokens, config.parity_python)
        on = f"{name}, on {'the folder written' if theirs == config.out else 'the source'}"
        compared.append(compare(on, logits, ours))
    if compared:
        passed = all(each.passed for each in compared)
        return compared, f"{'passed' if passed else 'FAILED'}: compared with {' and '.join(each.reference for each in compared)}"
    golden = golden_comparisons(model.config.model_type)
    if not golden:
        return [], "not compared: no independent reference"
    verdict = "pass" if all(each.passed for each in golden) else "FAIL"
    return [*golden], f"these weights were not compared: no independent reference is installed. The golden models of the family {verdict}"


def golden_comparisons(model_type: str) -> list[Comparison]:
    """Our code beside the committed logits of the family's tiny models, case by case; empty where there are none."""
    file = GOLDEN / f"{model_type}.npz"
    if not file.is_file():
        return []
    spec = importlib.util.spec_from_file_location("golden_weights", GOLDEN.parents[1] / "golden_weights.py")
    assert spec is not None
    assert spec.loader is not None
    weights = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(weights)
    found = []
    with np.load(file) as golden, tempfile.TemporaryDirectory() as name:
        for case in sorted({name.rsplit(".", 1)[0] for name in golden.files}):
            (Path(name) / "config.json").write_text(str(golden[f"{case}.config"]), encoding="utf-8")
            shapes = json.loads(str(golden[f"{case}.shapes"]))
            save_file({key: weights.draw(key, tuple(shape)) for key, shape in shapes.items()}, Path(name) / "model.safetensors")
            ours = our_logits(load_pretrained(name), golden[f"{case}.tokens"][0])
            found.append(compare(f"golden model {model_type} {case}", golden[f"{case}.logits"][0], ours))
    return found


# ------------------------------------------------------------------------------------------- report


def show(report: dict[str, Any], compared: list[Comparison | Choices], path: Path) -> None:
    """A line for each that was compared, and the verdict."""
    lines = [in_words(each) for each in compared]
    for line in (f"{report['model_type']}, {report['parameters']:,} parameters", *lines, report["words"], f"written {path}"):
        Console().print(line, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    chosen = tyro.cli(Config, description=__doc__, prog="python -m recipes.convert")
    try:
        passed = main(chosen)
    except (ValueError, OSError, CheckpointError) as error:
        fail(str(error))
    sys.exit(0 if passed else 1)
