"""How fast is it here? Training steps, memory, data, decoding, checkpoints, compiling: measured on this machine, side by side.

Each thing measured is a process of its own, and those compared take turns, A B A B, so that a neighbour on the machine slows both. Figures
are medians over rounds; ratios are of medians from the same rounds. What is measured is written to the run folder case by case, and a
run that was stopped goes on with the cases it has not done.

    python -m recipes.benchmark                                     # all parts, this project alone
    python -m recipes.benchmark --against torch                     # beside PyTorch (uv run --extra parity ...)
    python -m recipes.benchmark --parts train --sizes S S-8k --rounds 2 --json speed.json

Parts, and about how long each takes on two cores:

- train (4 minutes, with PyTorch 8): tokens a second, share of the machine's best matrix product, compile time, memory; all --sizes.
- ladder (7): the step without each piece of the CPU's fast path.
- decode (6): prefill and generation at several sequences.
- pipeline (1): batches a second, what share of a step one takes, how long steps wait for theirs.
- checkpoint (half a minute): how long saving blocks the loop, and until it is on the disk of the run folder.
- trace (2): what shape checks add to tracing, and to the step, where it should be nothing.
- imports (2): fresh processes that import lm, or show a recipe's help, beside jax alone.
- growth (8): the step against width, depth, sequence length and batch, and growth.png.
- memory (25): the step's memory beside a formula; what rematerialisation and accumulation save and cost; memory.png; all --sizes.

Sizes S and M: a Llama of 13.8 M and 60 M parameters, 4,096 tokens a step. FLOPs a token are 6 N + 12 L d T (Chowdhery et al. 2022,
arXiv:2204.02311, appendix B), the share of the peak is over the best matrix product measured in the same run.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import jax.random as jr
import tyro
from loguru import logger
from rich.console import Console

from lm.models import build, save_pretrained
from lm.models.llama import PRESETS
from recipes.benchmark_config import DECODING, SIZES, Config, Figures, PartName, check, flops_of, spec_of, tokens_of
from recipes.benchmark_growth import draw_growth, measure_growth
from recipes.benchmark_memory import draw_memory, measure_memory
from recipes.benchmark_parts import measure_checkpoint, measure_imports, measure_pipeline, measure_trace
from recipes.benchmark_tables import show
from recipes.benchmark_workers import all_of, in_turns, ours, together, torchs
from recipes.command_line import fail
from train.backends import choose_dtype
from train.logs import plain_messages, write_json
from train.runtime import device_facts, measure_matmul_peak

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

# PyTorch's sides of the comparison: name, compiled, dtype. On some processors its fp32 products are the faster ones.
TORCH = (("torch_eager", False, "bfloat16"), ("torch_compile", True, "bfloat16"), ("torch_compile_fp32", True, "float32"))

# ------------------------------------------------------------------------------------------- parts


def measure_train(config: Config, figures: Figures) -> None:
    """The training step at each size, beside PyTorch if asked."""
    for size in config.sizes:
        if f"train.{size}" in figures:
            continue
        logger.info(f"train {size}: {SIZES[size]}")
        cold = ours(spec_of(SIZES[size], config, compilation_cache=False))
        first_s = cold.facts["first_s"]
        cold.close()
        workers = {"ours": ours(spec_of(SIZES[size], config))}
        workers["ours"].close()
        workers = {"ours": ours(spec_of(SIZES[size], config))}  # now from the compilation cache
        if config.against == "torch":
            for name, compiled, dtype in TORCH:
                workers[name] = torchs(spec_of(SIZES[size], config, compile=compiled, dtype=dtype), config.torch_python)
        with together(workers):
            facts = workers["ours"].facts
            answers = in_turns(workers, config.rounds, f"train {size}")
            times = {name: all_of(each) for name, each in answers.items()}
        tokens, flops = tokens_of(SIZES[size]), flops_of(SIZES[size], facts["n_params"])
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
        figures.keep()


def measure_ladder(config: Config, figures: Figures) -> None:
    """The training step of size S with each piece of the fast path taken away in turn."""
    size = config.sizes[0]
    ladder = figures.setdefault("ladder", {})
    for piece, without in LADDER.items():
        if piece in ladder:
            continue
        logger.info(f"without {piece}")
        changes = {name: value for name, value in without.items() if name != "environ"}
        workers = {
            "whole": ours(spec_of(SIZES[size], config, dtype="bfloat16")),
            "without": ours(spec_of(SIZES[size], config, **{"dtype": "bfloat16"} | changes), without.get("environ")),
        }
        with together(workers):
            answers = in_turns(workers, config.rounds, f"without {piece}")
        times = {name: all_of(each) for name, each in answers.items()}
        medians = {name: statistics.median(each) for name, each in times.items()}
        ratio = medians["without"] / medians["whole"]
        ladder[piece] = {
            "ratio": ratio,
            "best_ratio": min(times["without"]) / min(times["whole"]),
            "step_s": medians["without"],
            "temp_bytes_ratio": workers["without"].facts["temp_bytes"] / workers["whole"].facts["temp_bytes"],
        }
        figures.keep()


def measure_decode(config: Config, figures: Figures) -> None:
    """Prefill and decoding at several sequences, beside `transformers` on the same checkpoint if asked."""
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(build(PRESETS[DECODING], key=jr.key(0)), folder)
        cases = [(n, config.prompt, config.new, slots) for n in config.sequences for slots in config.slots] + [(1, 1024, 8, 2048)]
        for n, prompt, new, slots in cases:
            name = f"decode.{n}.slots{slots}" if prompt == config.prompt else "prefill.1024"
            if name in figures:
                continue
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
            if name == f"decode.{n}.slots{config.slots[0]}":  # in short: in the dtype `recipes.sample` would take on a CPU with bf16
                speed = found["ours_bfloat16.tokens_per_s"]
                figures[f"decode.{n}"] = {"tokens_per_s": speed}
                theirs = [found[key] for key in found if key.startswith("transformers_") and ".prefill" not in key]
                if theirs:
                    figures[f"decode.{n}"]["ratio_transformers"] = speed / max(theirs)  # over its better dtype
            figures.keep()


Measure = Callable[[Config, Figures], None]
PARTS: dict[PartName, Measure] = {
    "train": measure_train,
    "ladder": measure_ladder,
    "decode": measure_decode,
    "pipeline": measure_pipeline,
    "checkpoint": measure_checkpoint,
    "trace": measure_trace,
    "imports": measure_imports,
    "growth": measure_growth,
    "memory": measure_memory,
}

# ------------------------------------------------------------------------------------------- main


def main(config: Config) -> Path:
    """Measure the parts asked for. Returns the run folder."""
    plain_messages()
    check(config)
    folder = config.run_dir or Path("runs") / f"benchmark-{datetime.now():%Y%m%d-%H%M%S}"
    dtype = config.dtype or choose_dtype(device_facts())
    config = config.model_copy(update={"run_dir": folder, "dtype": dtype})
    figures = Figures(folder / "figures.json")
    figures.setdefault("machine", device_facts() | {"matmul_flops_per_s": measure_matmul_peak().flops_per_s})
    figures["machine"] |= {"rounds": config.rounds, "steps": config.steps, "dtype": dtype}
    done = figures.setdefault("parts", [])
    folder.mkdir(parents=True, exist_ok=True)
    for part in config.parts:
        if part in done:
            logger.info(f"{part}: already measured in {figures.path}")
            continue
        begin = time.monotonic()
        PARTS[part](config, figures)
        done.append(part)
        figures.setdefault("part_s", {})[part] = time.monotonic() - begin
        logger.info(f"{part}: measured in {figures['part_s'][part]:.0f} s")
        figures.keep()
    if config.json_file is not None:
        write_json(config.json_file, flat(figures))
    show(figures)
    pictures = [draw_growth(figures["growth"], folder)] if "growth" in figures else []
    pictures += [draw_memory(figures["memory"], folder)] if "memory" in figures else []
    for written in (figures.path, *pictures):
        Console().print(f"written {written}", markup=False, highlight=False, soft_wrap=True)
    return folder


def flat(figures: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"train.S": {"tokens_per_s": 1}}` → `{"train.S.tokens_per_s": 1}`."""
    found: dict[str, Any] = {}
    for name, value in figures.items():
        path = f"{prefix}{name}"
        found |= flat(value, f"{path}.") if isinstance(value, dict) else {path: value}
    return found


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__, prog="python -m recipes.benchmark"))
    except (ValueError, OSError, RuntimeError) as error:
        fail(str(error))
