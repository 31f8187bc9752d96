"""How fast is it here? Training steps, memory, data, decoding, checkpoints, compiling: measured on this machine, side by side.

Each thing measured is a process of its own, and those compared take turns, A B A B, so that a neighbour on the machine slows both. Figures
are medians over rounds; ratios are of medians from the same rounds. What is measured is written to the run folder part by part, and a run
that was stopped goes on with the parts it has not done.

    python -m recipes.benchmark                                     # all parts, this project alone
    python -m recipes.benchmark --against torch                     # beside PyTorch (uv run --extra parity ...)
    python -m recipes.benchmark --parts train --sizes S --rounds 2 --json speed.json

Sizes S and M: a Llama of 13.8 M and 60 M parameters, 4,096 tokens a step. FLOPs a token are 6 N + 12 L d T (Chowdhery et al. 2022,
arXiv:2204.02311, appendix B), the share of the peak is over the best matrix product measured in the same run.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import jax.random as jr
import tyro
from loguru import logger
from pydantic import Field
from rich.console import Console
from rich.table import Table

from lm.models import build, save_pretrained
from lm.models.llama import PRESETS
from recipes.command_line import RecipeConfig, fail
from train.logs import model_flops_per_token, plain_messages, progress, write_json
from train.runtime import device_facts, measure_matmul_peak

ROOT = Path(__file__).parents[1]

# vocab, width, layers, heads, MLP width, tokens of a row, rows of a batch
SIZES: dict[str, dict[str, int]] = {
    "T": {"vocab": 512, "d_model": 64, "n_layers": 2, "n_heads": 2, "d_ff": 176, "seq": 64, "batch": 4},
    "S": {"vocab": 8192, "d_model": 384, "n_layers": 6, "n_heads": 6, "d_ff": 1024, "seq": 256, "batch": 16},
    "M": {"vocab": 16384, "d_model": 640, "n_layers": 10, "n_heads": 10, "d_ff": 1728, "seq": 512, "batch": 8},
    "S-1k": {"vocab": 8192, "d_model": 384, "n_layers": 6, "n_heads": 6, "d_ff": 1024, "seq": 1024, "batch": 4},
    "S-4k": {"vocab": 8192, "d_model": 384, "n_layers": 6, "n_heads": 6, "d_ff": 1024, "seq": 4096, "batch": 1},
    "S-8k": {"vocab": 8192, "d_model": 384, "n_layers": 6, "n_heads": 6, "d_ff": 1024, "seq": 8192, "batch": 1},
}

# The steps of the CPU's fast path, each as what to take away from it: environment, or settings of the worker.
LADDER: dict[str, dict[str, Any]] = {
    "huge pages": {"environ": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}},
    "bf16 operands": {"dtype": "float32"},
    "weight gradient transposed in memory": {"without": ["weight_gradient"]},
    "blocked attention": {"without": ["attention"]},
    "chunked loss": {"without": ["loss"]},
    "layouts that vectorise": {"without": ["layout"]},
    "XLA flags": {"environ": {"ZMAJ_NO_PREPARE": "1", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}},
    "layers as a loop": {"layers": "scan"},
    "donated buffers": {"without": ["donation"]},
}

Part = Literal["train", "ladder", "decode"]

DECODING = "smollm2-135m"  # the preset of `lm.models.llama` that generates, with random weights


class Config(RecipeConfig):
    """What to measure, and how long."""

    parts: tuple[Part, ...] = Field(("train", "ladder", "decode"), description="what to measure")
    sequences: tuple[int, ...] = Field((1, 4, 16), description="sequences decoded together")
    prompt: int = Field(128, ge=1, description="tokens of a prompt; a prefill of 1,024 is measured besides")
    new: int = Field(128, ge=1, description="tokens drawn after each prompt")
    slots: tuple[int, ...] = Field((384, 2048), description="places of the cache")
    sizes: tuple[str, ...] = Field(("S", "M"), description="sizes of the training step: " + ", ".join(SIZES))
    against: Literal["none", "torch"] = Field("none", description="measure PyTorch beside it, eager and compiled")
    torch_python: Path | None = Field(None, description="an interpreter that has torch; None: this one")
    rounds: int = Field(5, ge=1, description="turns that each of those compared takes")
    steps: int = Field(10, ge=1, description="training steps in a round")
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = Field(None, description="also write the figures here")
    run_dir: Path | None = Field(
        None, description="folder of figures and pictures; parts already there are kept. None: runs/benchmark-DATE"
    )


# ------------------------------------------------------------------------------------------- processes that take turns


class Worker:
    """A process that does a round of work when asked."""

    def __init__(self, command: Sequence[str], environ: dict[str, str]) -> None:
        self.command = command
        self.words = tempfile.TemporaryFile("w+")  # noqa: SIM115  # what it says on stderr: a pipe nobody reads would fill up
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.words, text=True
        )
        self.facts = self._answer()

    def round(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        self.words.seek(0)
        words = self.words.read().strip().splitlines()
        raise RuntimeError(f"a process of the benchmark ended: {' '.join(self.command)}\n" + "\n".join(words[-8:]))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.terminate()
        self.process.wait()


def users_environment() -> dict[str, str]:
    """As it was before this process was given its own settings (`train.runtime.prepare`): each worker finds its own."""
    prepared = {"ZMAJ_PREPARED", "GLIBC_TUNABLES", "XLA_FLAGS"} if "ZMAJ_PREPARED" in os.environ else set()
    return {name: value for name, value in os.environ.items() if name not in prepared}


def ours(spec: dict[str, Any], environ: dict[str, str] | None = None) -> Worker:
    return Worker([sys.executable, "-m", "recipes.benchmark_ours", json.dumps(spec)], users_environment() | (environ or {}))


def torchs(spec: dict[str, Any], python: Path | None) -> Worker:
    script = str(ROOT / "recipes" / "benchmark_torch.py")
    return Worker([str(python or sys.executable), script, json.dumps(spec)], users_environment())


@contextmanager
def together(workers: dict[str, Worker]) -> Iterator[dict[str, Worker]]:
    """Closed at the end, whatever happens."""
    with ExitStack() as closing:
        for worker in workers.values():
            closing.callback(worker.close)
        yield workers


def in_turns(workers: dict[str, Worker], rounds: int, title: str) -> dict[str, list[dict[str, Any]]]:
    """A B A B: the answers of each worker, round by round. The first round of each warms up and is not kept."""
    for worker in workers.values():
        worker.round()
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    with progress(title, rounds * len(workers)) as told:
        for number in range(rounds):
            for i, (name, worker) in enumerate(workers.items()):
                answers[name].append(worker.round())
                told(number * len(workers) + i + 1)
    return answers


def seconds(answers: list[dict[str, Any]]) -> list[float]:
    return [time for answer in answers for time in answer["seconds"]]


# ------------------------------------------------------------------------------------------- parts


def spec_of(size: str, config: Config, **changes: Any) -> dict[str, Any]:
    bf16 = {"kind": "train", "size": SIZES[size], "backend": "cpu", "dtype": "bfloat16", "steps": config.steps}
    return bf16 | {name: value for name, value in changes.items() if name != "environ"}


def measure_train(config: Config, figures: dict[str, Any]) -> None:
    """The training step at each size, beside PyTorch if asked."""
    for size in config.sizes:
        logger.info(f"train {size}: {SIZES[size]}")
        cold = ours(spec_of(size, config, compilation_cache=False))
        first_s = cold.facts["first_s"]
        cold.close()
        workers = {"ours": ours(spec_of(size, config))}
        workers["ours"].close()
        workers = {"ours": ours(spec_of(size, config))}  # now from the compilation cache
        if config.against == "torch":
            plain = {"kind": "train", "size": SIZES[size], "dtype": "bfloat16", "steps": config.steps}
            for name, compiled in (("torch_eager", False), ("torch_compile", True)):
                workers[name] = torchs(plain | {"compile": compiled}, config.torch_python)
        with together(workers):
            facts = workers["ours"].facts
            answers = in_turns(workers, config.rounds, f"train {size}")
            times = {name: seconds(each) for name, each in answers.items()}
        sizes = SIZES[size]
        tokens = sizes["batch"] * sizes["seq"]
        flops = tokens * model_flops_per_token(facts["n_params"], sizes["n_layers"], sizes["d_model"], sizes["seq"])
        median = statistics.median(times["ours"])
        found: dict[str, Any] = {
            "n_params": facts["n_params"],
            "tokens_per_s": tokens / median,
            "step_s": median,
            "best_step_s": min(times["ours"]),
            "gflops": flops / median / 1e9,
            "best_gflops": flops / min(times["ours"]) / 1e9,
            "first_s": first_s,
            "first_s_cached": facts["first_s"],
            "argument_bytes": facts["argument_bytes"],
            "temp_bytes": facts["temp_bytes"],
            "products_outside": len(facts["products_outside"]),
            "peak_rss_bytes": max(answer["peak_rss_bytes"] for answer in answers["ours"]),
            "share_of_peak": flops / median / figures["machine"]["matmul_flops_per_s"],
        }
        for name, each in times.items():
            if name != "ours":
                found |= {f"{name}_step_s": statistics.median(each), f"{name}_best_step_s": min(each)}
                found |= {f"ratio_{name}": statistics.median(each) / median, f"{name}_first_s": workers[name].facts["first_s"]}
        figures[f"train.{size}"] = found


def measure_ladder(config: Config, figures: dict[str, Any]) -> None:
    """The training step of size S with each piece of the fast path taken away in turn."""
    size = config.sizes[0]
    for piece, without in LADDER.items():
        logger.info(f"without {piece}")
        workers = {"whole": ours(spec_of(size, config)), "without": ours(spec_of(size, config, **without), without.get("environ"))}
        with together(workers):
            answers = in_turns(workers, config.rounds, f"without {piece}")
        times = {name: seconds(each) for name, each in answers.items()}
        medians = {name: statistics.median(each) for name, each in times.items()}
        ratio = medians["without"] / medians["whole"]
        figures.setdefault("ladder", {})[piece] = {
            "ratio": ratio,
            "best_ratio": min(times["without"]) / min(times["whole"]),
            "step_s": medians["without"],
            "temp_bytes_ratio": workers["without"].facts["temp_bytes"] / workers["whole"].facts["temp_bytes"],
        }


def measure_decode(config: Config, figures: dict[str, Any]) -> None:
    """Prefill and decoding at several sequences, beside `transformers` on the same checkpoint if asked."""
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(build(PRESETS[DECODING], key=jr.key(0)), folder)
        cases = [(n, config.prompt, config.new, slots) for n in config.sequences for slots in config.slots] + [(1, 1024, 8, 2048)]
        for n, prompt, new, slots in cases:
            name = f"decode.{n}.slots{slots}" if prompt == config.prompt else "prefill.1024"
            logger.info(f"{name}: {n} sequences, prompt {prompt}, {new} new tokens, {slots} slots")
            spec = {"kind": "decode", "model": folder, "sequences": n, "prompt": prompt, "new": new, "slots": slots, "backend": "cpu"}
            workers = {f"ours_{dtype}": ours(spec | {"dtype": dtype}) for dtype in ("bfloat16", "int8", "float32")}
            if config.against == "torch" and (slots == cases[0][3] or prompt != config.prompt):  # its cache grows: slots are ours
                workers |= {
                    f"transformers_{dtype}": torchs(spec | {"dtype": dtype}, config.torch_python) for dtype in ("bfloat16", "float32")
                }
            with together(workers):
                answers = in_turns(workers, config.rounds, name)
            found: dict[str, Any] = {}
            for who, each in answers.items():
                found[f"{who}.tokens_per_s"] = n * new / statistics.median(answer["decode_s"] for answer in each)
                found[f"{who}.prefill_tokens_per_s"] = n * prompt / statistics.median(answer["prefill_s"] for answer in each)
            facts = workers["ours_bfloat16"].facts
            # Every token reads all weights once, whatever the number of sequences.
            found["limit_tokens_per_s"] = n * facts["read_bytes_per_s"] / facts["weight_bytes"]
            found["read_bytes_per_s"] = facts["read_bytes_per_s"]
            figures[name] = found


PARTS = {"train": measure_train, "ladder": measure_ladder, "decode": measure_decode}

# ------------------------------------------------------------------------------------------- main


def main(config: Config) -> Path:
    """Measure the parts asked for. Returns the run folder."""
    plain_messages()
    unknown = [size for size in config.sizes if size not in SIZES]
    if unknown or not config.sizes:
        raise ValueError(f"--sizes must be some of {', '.join(SIZES)}, got {', '.join(config.sizes) or 'none'}")
    folder = config.run_dir or Path("runs") / f"benchmark-{datetime.now():%Y%m%d-%H%M%S}"
    path = folder / "figures.json"
    figures: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    figures.setdefault("machine", device_facts() | {"matmul_flops_per_s": measure_matmul_peak().flops_per_s})
    figures["machine"] |= {"rounds": config.rounds, "steps": config.steps}
    done = figures.setdefault("parts", [])
    for part in config.parts:
        if part in done:
            logger.info(f"{part}: already measured in {path}")
            continue
        PARTS[part](config, figures)
        done.append(part)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, figures)
    if config.json_file is not None:
        write_json(config.json_file, flat(figures))
    show(figures)
    show_decoding(Console(), figures)
    Console().print(f"figures {path}", markup=False, highlight=False, soft_wrap=True)
    return folder


def flat(figures: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"train.S": {"tokens_per_s": 1}}` → `{"train.S.tokens_per_s": 1}`."""
    found: dict[str, Any] = {}
    for name, value in figures.items():
        path = f"{prefix}{name}"
        found |= flat(value, f"{path}.") if isinstance(value, dict) else {path: value}
    return found


def show(figures: dict[str, Any]) -> None:
    """The tables."""
    console = Console()
    trained = {name.removeprefix("train."): found for name, found in figures.items() if name.startswith("train.")}
    if trained:
        console.print("training step", style="italic")
        table = Table()
        for column in ("size", "tokens/s", "GF/s", "best GF/s", "of peak", "first step s", "cached", "torch compile", "torch eager"):
            table.add_column(column, justify="left" if column == "size" else "right")
        for size, found in trained.items():
            ratios = [f"{found[name]:.2f}x" if name in found else "" for name in ("ratio_torch_compile", "ratio_torch_eager")]
            speed = [
                f"{found['tokens_per_s']:,.0f}",
                f"{found['gflops']:.0f}",
                f"{found['best_gflops']:.0f}",
                f"{found['share_of_peak']:.0%}",
            ]
            table.add_row(size, *speed, f"{found['first_s']:.1f}", f"{found['first_s_cached']:.1f}", *ratios)
        console.print(table)
    if "ladder" in figures:
        console.print("a step without one piece of the fast path, times as long", style="italic")
        table = Table()
        for column in ("without", "median", "best", "temporary memory"):
            table.add_column(column, justify="left" if column == "without" else "right")
        for piece, found in figures["ladder"].items():
            table.add_row(piece, *(f"{found[name]:.2f}x" for name in ("ratio", "best_ratio", "temp_bytes_ratio")))
        console.print(table)


def show_decoding(console: Console, figures: dict[str, Any]) -> None:
    """Tokens a second of all sequences together."""
    rows = {name: found for name, found in figures.items() if name.startswith(("decode.", "prefill."))}
    if not rows:
        return
    whos = list(dict.fromkeys(key.rsplit(".", 1)[0] for found in rows.values() for key in found if "." in key))
    console.print(f"generation, {DECODING}, tokens/s of all sequences together", style="italic")
    table = Table()
    for column in ("case", *whos, "limit of bf16 by memory"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for name, found in rows.items():
        what = "prefill_tokens_per_s" if name.startswith("prefill") else "tokens_per_s"
        speeds = [f"{found[f'{who}.{what}']:,.0f}" if f"{who}.{what}" in found else "" for who in whos]
        table.add_row(name, *speeds, "" if name.startswith("prefill") else f"{found['limit_tokens_per_s']:,.0f}")
    console.print(table)


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__, prog="python -m recipes.benchmark"))
    except (ValueError, OSError, RuntimeError) as error:
        fail(str(error))
