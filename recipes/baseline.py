"""How many fewer minutes does it take here than with the usual GPT-2 in PyTorch? Both sides tuned over one grid, then raced.

The other side is `recipes/baseline_gpt2_torch.py`: nanoGPT's GPT-2 and its AdamW, on the tokens of the same cache, measured on the same
held-out windows. Ours is `recipes.pretrain_small` (`--ours speedrun` for our own drawing). Both are run at every learning rate and batch of
the grid for `--tokens`; the best place of each then runs at every one of `--budgets` times as many, the two taking turns, so that a
neighbour on the machine slows both. From those courses follows how long each takes to the same bits per byte. The grid asks only for bits
per byte, so its two sides may run at once, a core each; the race wants the machine for itself.

    python -m recipes.baseline --torch-python .venv-torch/bin/python      # hours on two cores; stop it and go on at will
    python -m recipes.baseline --sides ours                                # ours alone, without torch
    taskset -c 0 python -m recipes.baseline --sides ours --no-race &       # the grid alone, both sides at once
    taskset -c 1 python -m recipes.baseline --sides torch --no-race
    python -m recipes.baseline --table-only

Each run is a line of `--file`; what is there is not run again.
"""

import hashlib
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import numpy as np
import tyro
from loguru import logger
from pydantic import Field
from rich.console import Console

from data.cache import TokenCache
from data.packing import plan_windows
from recipes import baseline_table, pretrain_small, speedrun
from recipes.ablate import nested
from recipes.benchmark_workers import ROOT, users_environment
from recipes.command_line import RecipeConfig, fail
from recipes.report import bits_of
from recipes.running import ENDS_IN_WORDS
from recipes.trial import Material, append_line, changed, machine, material, read_lines, run_trial, settings_digest
from train.backends import choose_dtype
from train.logs import plain_messages, progress
from train.runtime import choose_device, compilation_cache, device_facts

Side = Literal["ours", "torch"]


class Config(RecipeConfig):
    """The grid, the race, and where the lines go."""

    sides: tuple[Side, ...] = Field(("ours", "torch"), min_length=1, description="who runs")
    ours: Literal["pretrain_small", "speedrun"] = Field("pretrain_small", description="our side: the default recipe, or our own drawing")
    rates: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2), min_length=1, description="peak learning rates of the grid"
    )
    batches: tuple[Annotated[int, Field(gt=0)], ...] = Field((4, 8), min_length=1, description="rows a step of the grid")
    tokens: int = Field(500_000, gt=0, description="tokens of each run of the grid")
    budgets: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (0.5, 1.0, 2.0, 4.0), description="times as many in the race of the two best"
    )
    race: bool = Field(True, description="race the best of each after the grid")
    seed: int = Field(0, ge=0, description="of both sides")
    preset: Literal["1m", "4m", "14m", "30m", "60m"] = Field("4m", description="sizes, as in pretrain_small")
    base: dict[str, str] = Field(
        {}, description="other values of our side, by dotted name; of theirs d-model, n-layers, n-heads, seq follow"
    )
    data: str = Field("stdlib", description="the corpus, in the words of pretrain_small's --data")
    torch_python: Path | None = Field(None, description="an interpreter that has torch and numpy; None: this one")
    torch_compile: bool = Field(True, description="torch.compile their model")
    torch_threads: int | None = Field(None, ge=1, description="threads of theirs; None: as torch chooses")
    file: Path = Field(Path("docs/baseline.jsonl"), description="where the lines go")
    page: Path | None = Field(Path("docs/ablations.md"), description="where the table goes, between its marks; None: only the screen")
    picture: Path | None = Field(Path("docs/images/baseline.png"), description="where the picture goes; None: nowhere")
    table_only: bool = Field(False, description="run nothing")
    device: Literal["auto", "cpu", "gpu", "tpu"] = Field("cpu", description="where ours computes; theirs computes on the CPU")


# ------------------------------------------------------------------------------------------- main


def main(config: Config) -> dict[str, Any]:
    """The grid, the race, the table. What was found is returned."""
    plain_messages()
    device = choose_device(config.device)
    compilation_cache()
    if "torch" in config.sides and not config.table_only:
        check_torch(config)
    plain = experiment(config, config.rates[0], config.batches[0], 1.0)
    facts = machine(plain, device)
    text = material(plain)
    places = [(rate, batch) for batch in config.batches for rate in config.rates]
    with tempfile.TemporaryDirectory() as name:
        windows = held_out_windows(text.held_out, experiment(config, 1.0, 1, 1.0).seq, Path(name) / "held_out.npz")
        grid = [Place(side, rate, batch, 1.0, False) for rate, batch in places for side in config.sides]
        lines = carried_out(config, grid, text, windows, facts)
        best = {side: place for side in config.sides if (place := best_place(lines, side))}
        if config.race:
            race = [Place(side, *best[side], budget, True) for budget in config.budgets for side in config.sides if side in best]
            lines += carried_out(config, race, text, windows, facts)
    if not lines:
        raise ValueError(f"{config.file} has no run with these settings: leave out --table-only")
    found = {"lines": lines, "best": best, "courses": {side: course(lines, side) for side in best}, "corpus": text.source.name}
    said = baseline_table.words(found)
    Console().print(said, markup=False, highlight=False, soft_wrap=True)
    if config.picture is not None:
        baseline_table.draw(found, config.picture)
    if config.page is not None:
        baseline_table.put_table(said, config.page, config.picture)
    return found


def experiment(config: Config, rate: float, batch: int, budget: float) -> pretrain_small.Experiment:
    """Our side at a place of the grid."""
    kind = speedrun.Experiment if config.ours == "speedrun" else pretrain_small.Experiment
    plain = changed(kind(data=config.data, seed=config.seed, **pretrain_small.PRESETS[config.preset]), nested(config.base))
    steps = max(1, round(budget * config.tokens / (batch * plain.seq)))
    return changed(plain, {"batch": batch, "steps": steps, "schedule": {"peak": rate}})


def best_place(lines: list[dict[str, Any]], side: str) -> tuple[float, int] | None:
    """Learning rate and batch of a side's best run of the grid."""
    here = [line for line in lines if line["side"] == side and not line["race"]]
    best = min(here, key=lambda line: line["bits_per_byte"], default=None)
    return None if best is None else (best["rate"], best["batch"])


def course(lines: list[dict[str, Any]], side: str) -> list[tuple[float, float, float]]:
    """(seconds of training with compilation, seconds of its steps alone, bits per byte) of a side's runs in the race, by budget."""
    here = [line for line in lines if line["side"] == side and line["race"]]
    return [
        (line["train_s"], line["steps"] * line["step_s"], line["bits_per_byte"]) for line in sorted(here, key=lambda line: line["budget"])
    ]


# ------------------------------------------------------------------------------------------- runs


class Place(NamedTuple):
    """Of the grid, or of the race."""

    side: str
    rate: float  # peak
    batch: int
    budget: float
    race: bool


def carried_out(config: Config, places: list[Place], text: Material, windows: Path, facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The lines of these runs: those of the file, and, one after the other, those missing."""
    digests = [digest_of(config, place, text) for place in places]
    kept = {line["settings"]: line for line in read_lines(config.file)}
    missing = [] if config.table_only else [i for i, digest in enumerate(digests) if digest not in kept]
    begin = time.monotonic()
    for n, i in enumerate(missing):
        place = places[i]
        run = experiment(config, place.rate, place.batch, place.budget)
        title = f"{place.side}, rate {place.rate:g}, {place.batch} rows, {run.steps} steps"
        with progress(title, run.steps or 0) as told:
            if place.side == "ours":
                figures = run_trial(run, text, lambda done, _, told=told: told(done)).record()  # type: ignore[misc]
            else:
                figures = torch_run(config, run, text, windows, told)
        figures["bits_per_byte"] = figures["bits_per_byte"] if math.isfinite(figures["bits_per_byte"]) else 99.0  # diverged
        figures["last_loss"] = figures["last_loss"] if math.isfinite(figures["last_loss"]) else 99.0
        line = {**place._asdict(), "settings": digests[i], **figures, **facts}
        append_line(config.file, line)
        kept[digests[i]] = line
        left = (time.monotonic() - begin) / (n + 1) * (len(missing) - n - 1)
        logger.info(
            f"run {n + 1} of {len(missing)}: {title}: {line['bits_per_byte']:.4f} bits per byte in {line['train_s']:.0f} s; "
            f"about {left / 60:.0f} minutes left"
        )
        jax.clear_caches()
    return [kept[digest] for digest in digests if digest in kept]


def digest_of(config: Config, place: Place, text: Material) -> str:
    run, use = experiment(config, place.rate, place.batch, place.budget), "race" if place.race else "grid"
    if place.side == "ours":
        return f"{settings_digest(run, text)}-{config.ours}-{config.seed}-{use}"
    said = [torch_spec(config, run, text, "", ""), text.identity]
    return f"{hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]}-torch-{config.seed}-{use}"


def held_out_windows(cache: TokenCache, seq: int, path: Path) -> Path:
    """The windows of `recipes.trial`'s measure, one a row: `tokens`, `targets`, `weights` (1 where a token counts), `document`."""
    plan = plan_windows(cache.lengths, seq, max(1, seq // 2))
    n = len(plan.document)
    tokens, targets, weights = np.zeros((n, seq), np.int32), np.zeros((n, seq), np.int32), np.zeros((n, seq), np.float32)
    for i in range(n):
        length = int(plan.length[i])
        read = cache.piece(int(plan.document[i]), int(plan.start[i]), length + 1)
        tokens[i, :length], targets[i, :length] = read[:-1], read[1:]
        weights[i, int(plan.context[i]) : length] = 1
    np.savez(path, tokens=tokens, targets=targets, weights=weights, document=plan.document)
    return path


def torch_spec(config: Config, run: pretrain_small.Experiment, text: Material, tokens: str, windows: str) -> dict[str, Any]:
    """What their process is told."""
    size = {"vocab": text.tokenizer.vocab_size, "d_model": run.d_model, "n_layers": run.n_layers, "n_heads": run.n_heads, "seq": run.seq}
    assert isinstance(text.train, TokenCache), "checked by whole_stream"
    return {
        "size": size,
        "batch": run.batch,
        "steps": run.steps,
        "rate": run.schedule.peak,
        "warmup": run.schedule.warmup,
        "seed": run.seed,
        "compile": config.torch_compile,
        "threads": config.torch_threads,
        "products": run.dtype if run.dtype != "auto" else choose_dtype(device_facts(jax.devices("cpu")[0])),
        "dtype": text.train.record["dtype"],
        "tokens": tokens,
        "held_out": windows,
    }


def torch_run(config: Config, run: pretrain_small.Experiment, text: Material, windows: Path, told: Any) -> dict[str, Any]:
    """Their side, in a process of its own. **Raises:** `ValueError` with its words where it fails."""
    if not isinstance(text.train, TokenCache):
        raise ValueError("--data is a mixture: PyTorch's side reads one stream of tokens; name one text")
    spec = torch_spec(config, run, text, f"{text.train.folder.resolve() / 'tokens.bin'}", f"{windows}")
    script = ROOT / "recipes" / "baseline_gpt2_torch.py"
    with tempfile.TemporaryFile("w+") as words:
        command = [f"{config.torch_python or sys.executable}", f"{script}", json.dumps(spec)]
        process = subprocess.Popen(command, env=users_environment(), stdout=subprocess.PIPE, stderr=words, text=True)
        assert process.stdout is not None
        result: dict[str, Any] = {}
        try:
            for line in process.stdout:
                said = json.loads(line) if line.startswith("{") else {}
                if said.get("kind") == "progress":
                    told(said["done"])
                elif said.get("kind") == "result":
                    result = said
            status = process.wait()
        finally:
            process.kill()
        if status or not result:
            words.seek(0)
            raise ValueError(f"PyTorch's side ended with status {status}:\n" + "\n".join(words.read().strip().splitlines()[-8:]))
    nats = dict(enumerate(result.pop("nats")))
    del result["kind"]
    return {"bits_per_byte": bits_of(text.held_out, nats, range(len(text.held_out))), **result}


def check_torch(config: Config) -> None:
    """**Raises:** `ValueError` saying what to do where torch cannot be asked."""
    python = f"{config.torch_python or sys.executable}"
    try:
        asked = subprocess.run([python, "-c", "import torch, numpy"], capture_output=True)
    except OSError as error:
        raise ValueError(f"--torch-python {python} cannot be run ({error}): expected a Python interpreter") from None
    if asked.returncode:
        words = asked.stderr.decode(errors="replace").strip().splitlines()
        raise ValueError(
            f"{python} has no torch ({words[-1] if words else 'no words'}): uv sync --extra parity, or name another with --torch-python; "
            "--sides ours runs ours alone"
        )


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__, prog="python -m recipes.baseline"))
    except ENDS_IN_WORDS as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("stopped: every run that was finished stands in the file; the same command goes on")
