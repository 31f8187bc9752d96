"""A GGUF file here and in llama.cpp: how fast each reads a prompt and draws tokens, on the same weights, side by side.

python -m recipes.benchmark_gguf model.gguf                                   # this project alone
python -m recipes.benchmark_gguf model.gguf --llama-python venv/bin/python    # beside llama.cpp, from an interpreter that has cyllama

One sequence of random tokens, greedy. Each side is a process of its own, and they take turns, A B A B, so that a neighbour slows
all alike; figures are medians over rounds. Ours unpacks the weights and keeps them as asked, llama.cpp multiplies them as they are packed.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from pydantic import Field
from rich.console import Console

from recipes.benchmark_tables import print_table
from recipes.benchmark_workers import ROOT, Worker, in_turns, median_of, ours, together, users_environment
from recipes.command_line import RecipeConfig, fail
from train.logs import plain_messages, write_json


class Config(RecipeConfig):
    """What to measure, and how long."""

    model: Annotated[Path, tyro.conf.Positional] = Field(description="GGUF file")
    llama_python: Path | None = Field(None, description="an interpreter that has cyllama; None: llama.cpp is not measured")
    weights: tuple[Literal["bfloat16", "int8", "float32"], ...] = Field(("bfloat16", "int8"), description="how ours keeps the matrices")
    prompts: tuple[int, ...] = Field((128, 1024), description="tokens of a prompt, each measured")
    new: int = Field(128, ge=1, description="tokens drawn after a prompt")
    slots: int = Field(2048, ge=1, description="places of the cache")
    rounds: int = Field(5, ge=1, description="turns that each of those compared takes")
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = Field(None, description="also write the figures here")


def main(config: Config) -> dict[str, Any]:
    """Measure, show, and return tokens a second by prompt and by who."""
    plain_messages()
    if config.model.suffix != ".gguf" or not config.model.is_file():
        raise ValueError(f"expected a GGUF file, got {config.model}")
    if max(config.prompts, default=0) + config.new > config.slots or min(config.prompts, default=0) < 1:
        raise ValueError(f"--prompts must be 1 to {config.slots - config.new} each, what --slots leaves beside --new; got {config.prompts}")
    figures = {f"prompt{prompt}": measured(config, prompt) for prompt in config.prompts}
    if config.json_file is not None:
        write_json(config.json_file, figures)
    columns = ("who", *(f"{what}, prompt of {prompt:,}" for prompt in config.prompts for what in ("read", "drawn")))
    whos = next(iter(figures.values()))
    rows = [[who.replace("_", " "), *(f"{speed:,.0f}" for found in figures.values() for speed in found[who].values())] for who in whos]
    print_table(Console(), f"{config.model.name}, one sequence, tokens/s", columns, rows)
    return figures


def measured(config: Config, prompt: int) -> dict[str, dict[str, float]]:
    """Tokens a second of each side, read and drawn."""
    spec = {"kind": "decode", "model": str(config.model.resolve()), "sequences": 1, "backend": "cpu"}
    spec |= {"prompt": prompt, "new": config.new, "slots": config.slots}
    workers = {f"ours_{weights}": ours(spec | {"dtype": weights}) for weights in config.weights}
    if config.llama_python is not None:
        script = str(ROOT / "recipes" / "benchmark_llama_cpp.py")
        workers["llama.cpp"] = Worker([str(config.llama_python), script, json.dumps(spec)], users_environment())
    with together(workers):
        answers = in_turns(workers, config.rounds, f"prompt of {prompt}")
    return {
        who: {"read_tokens_per_s": prompt / median_of(each, "prefill_s"), "drawn_tokens_per_s": config.new / median_of(each, "decode_s")}
        for who, each in answers.items()
    }


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__, prog="python -m recipes.benchmark_gguf"))
    except (ValueError, OSError, RuntimeError) as error:
        fail(str(error))
