"""What surrounds the training step, for `recipes.benchmark`: data, checkpoints, tracing with and without shape checks, imports."""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from loguru import logger

from data.cache import TokenCache
from data.sources import open_source
from data.tokenizer import Tokenizer
from recipes.benchmark_config import SIZES, Config, Figures, spec_of, tokens_of
from recipes.benchmark_workers import ROOT, all_of, in_turns, median_of, ours, together, users_environment
from train.logs import progress

CHECKED, UNCHECKED = {"JAXTYPING_DISABLE": "0"}, {"JAXTYPING_DISABLE": "1"}  # environments in which shapes are checked, and are not


def measure_pipeline(config: Config, figures: Figures) -> None:
    """Batches as `recipes.pretrain_small` makes them (`train_batches`: tokens from a file, packed by concatenation), taken as fast as they
    come; beside it training steps on one batch that stays, and on batches from the pipeline."""
    size = config.sizes[0]
    logger.info(f"pipeline: rows of {SIZES[size]['seq']} tokens from {config.data}, batches of {SIZES[size]['batch']}")
    with tempfile.TemporaryDirectory() as folder:
        cache, encode_s = encoded(config.data, SIZES[size]["vocab"], Path(folder))
        tokens = {"tokens": str(cache.folder)}
        workers = {
            "pipeline": ours({"kind": "pipeline", "size": SIZES[size]} | tokens),
            "still": ours(spec_of(SIZES[size], config)),
            "fed": ours(spec_of(SIZES[size], config) | tokens),
        }
        with together(workers):
            answers = in_turns(workers, config.rounds, "pipeline")
    batch_s = median_of(answers["pipeline"], "batch_s")
    medians = {name: statistics.median(all_of(answers[name])) for name in ("still", "fed")}
    figures["pipeline"] = {
        "size": size,
        "data": config.data,
        "documents": len(cache),
        "tokens": cache.total_tokens,
        "encode_tokens_per_s": cache.total_tokens / encode_s,
        "tokens_per_s": tokens_of(SIZES[size]) / batch_s,
        "batch_s": batch_s,
        "share_of_step": batch_s / medians["still"],
        "wait_s": statistics.median(all_of(answers["fed"], "wait_seconds")),
        "fed_step_s": medians["fed"],
        "fed_ratio": medians["fed"] / medians["still"],
    }


def encoded(data: str, vocab: int, folder: Path) -> tuple[TokenCache, float]:
    """The training documents of a corpus as tokens on disk, by a tokenizer trained on them, and the seconds the encoding took."""
    source = open_source(data)
    tokenizer = Tokenizer.train((source.train[i]["text"] for i in range(len(source.train))), vocab)
    begin = time.perf_counter()
    cache = TokenCache.build_or_open(source.train, tokenizer, folder, source_digest=source.record["sha256"], split="train")
    return cache, time.perf_counter() - begin


def measure_checkpoint(config: Config, figures: Figures) -> None:
    """Saving the whole state: how long the loop stands still, and how long until it is on the disk of the run folder."""
    size = config.sizes[0]
    logger.info(f"checkpoint of {size}")
    with tempfile.TemporaryDirectory(dir=config.run_dir) as folder:
        workers = {"ours": ours(spec_of(SIZES[size], config, kind="checkpoint", folder=str(Path(folder).absolute())))}
        with together(workers):
            answers = in_turns(workers, config.rounds, "checkpoint")["ours"]
    figures["checkpoint"] = {
        "size": size,
        "blocking_s": median_of(answers, "blocking_s"),
        "total_s": median_of(answers, "total_s"),
        "bytes": median_of(answers, "bytes"),
        "state_bytes": workers["ours"].facts["state_bytes"],
    }


def measure_trace(config: Config, figures: Figures) -> None:
    """From Python to the program handed to the compiler, with shape checks and without: the first time in a fresh process, which is what a
    user waits for, and once more in the same one. Then the steps themselves, which should not tell."""
    size = config.sizes[0]
    logger.info(f"trace of a step of {size}, with shape checks and without")
    environs: dict[str, dict[str, str]] = {"checked": CHECKED, "unchecked": UNCHECKED}
    first: dict[str, list[float]] = {name: [] for name in environs}
    again: dict[str, list[float]] = {name: [] for name in environs}
    with progress("trace", config.rounds) as told:
        for number in range(config.rounds):
            for name, environ in environs.items():
                with together({"tracer": ours(spec_of(SIZES[size], config, kind="trace"), environ)}) as workers:
                    assert workers["tracer"].facts["shape_checks"] == (name == "checked")
                    first[name].append(workers["tracer"].facts["first_trace_s"])
                    again[name].append(workers["tracer"].round()["trace_s"])
            told(number + 1)
    steppers = {name: ours(spec_of(SIZES[size], config), environ) for name, environ in environs.items()}
    with together(steppers):
        answers = in_turns(steppers, config.rounds, "steps with checks and without")
    step_s = {name: statistics.median(all_of(each)) for name, each in answers.items()}
    checked_s, unchecked_s = (statistics.median(first[name]) for name in environs)
    figures["trace"] = {
        "size": size,
        "seconds": checked_s,
        "without_checks_seconds": unchecked_s,
        "overhead_s": checked_s - unchecked_s,
        "again_seconds": statistics.median(again["checked"]),
        "again_without_checks_seconds": statistics.median(again["unchecked"]),
        "step_s": step_s["checked"],
        "without_checks_step_s": step_s["unchecked"],
        "step_ratio": step_s["unchecked"] / step_s["checked"],
    }


# What a fresh interpreter is asked to do, and in which environment.
IMPORTS: dict[str, tuple[list[str], dict[str, str]]] = {
    "python": (["-c", "pass"], {}),
    "jax": (["-c", "import jax, equinox"], {}),
    "lm": (["-c", "import lm"], {}),
    "lm_without_checks": (["-c", "import lm"], UNCHECKED),
    "train": (["-c", "import train.step"], {}),
    "help": (["-m", "recipes.pretrain_small", "--help"], {}),
}


def measure_imports(config: Config, figures: Figures) -> None:
    """Processes from their start to their end, in turns. The first turn writes bytecode and fills the disk's cache, and is not kept."""
    logger.info("imports")
    times: dict[str, list[float]] = {name: [] for name in IMPORTS}
    with tempfile.TemporaryDirectory() as bytecode, progress("imports", config.rounds + 1) as told:
        everywhere = users_environment()
        if everywhere.pop("PYTHONDONTWRITEBYTECODE", ""):  # each start would compile all that it imports
            everywhere |= {"PYTHONPYCACHEPREFIX": bytecode}
        for number in range(config.rounds + 1):
            for name, (arguments, environ) in IMPORTS.items():
                begin = time.perf_counter()
                ended = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=everywhere | environ, capture_output=True)
                times[name].append(time.perf_counter() - begin)
                if ended.returncode:
                    words = ended.stderr.decode(errors="replace").strip().splitlines()[-8:]
                    raise RuntimeError(f"python {' '.join(arguments)} ended with status {ended.returncode}\n" + "\n".join(words))
            told(number + 1)
    figures["imports"] = {f"{name}_s": statistics.median(each[1:]) for name, each in times.items()}
    figures["imports"]["of"] = {
        name: " ".join([*(f"{key}={value}" for key, value in environ.items()), "python", *arguments])
        for name, (arguments, environ) in IMPORTS.items()
    }
