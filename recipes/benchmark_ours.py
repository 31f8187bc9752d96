"""A process of `recipes.benchmark` that does one thing with this project, a round at a time.

It is told what on its command line (JSON), builds it, and says so in a line of JSON with what it found on the way; then, for each line on
stdin, it does one round and answers with a line of JSON. So two processes can be timed in turn, A B A B, each in an environment of its own.
"""

import ctypes
import itertools
import json
import os
import platform
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import jaxtyping
import numpy as np

import lm
from data.cache import TokenCache
from data.pipeline import Batch, train_batches
from lm import kernels
from lm.decoding import decode, prefill
from lm.flight import Flight
from lm.models.llama import LlamaConfig
from lm.sampling import GREEDY
from train.checkpoint import Checkpoints
from train.optimizers import OptimizerConfig, build_optimizer
from train.process import process_settings
from train.runtime import compilation_cache
from train.step import StepConfig, TrainState, init_state, make_step

Round = Callable[[], dict[str, Any]]

PIPELINE_BATCHES = 200  # in a round

# What the `cpu` backend does its own way, piece by piece: for each, the table without it.
PIECES: dict[str, dict[str, Any]] = {
    "weight_gradient": {"linear": kernels.linear, "weight_gradient": kernels.weight_gradient},
    "attention": {"attention": kernels._jax_nn_attention("xla")},
    "layout": {"rms_norm": kernels.rms_norm, "rotate": kernels.rotate},
}


def ops_without(backend: str, pieces: list[str]) -> lm.Ops:
    """A backend with some of its pieces taken from the reference."""
    ops = lm.BACKENDS[backend]
    for piece in pieces:
        ops = replace(ops, name=f"{ops.name} without {piece}", **PIECES[piece])
    return ops


def batch_of(rows: int, seq: int, vocab: int) -> Batch:
    """Random tokens in rows of three documents, so that segments matter."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocab, (rows, seq + 1)).astype(np.int32)
    cuts = np.sort(rng.integers(1, seq, (rows, 2)), axis=1)
    places = np.arange(seq, dtype=np.int32)
    segments = 1 + (places >= cuts[:, :1]).astype(np.int32) + (places >= cuts[:, 1:])
    starts = np.where(segments == 1, 0, np.where(segments == 2, cuts[:, :1], cuts[:, 1:]))
    positions = (places - starts).astype(np.int32)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], positions, segments.astype(np.int32), np.ones((rows, seq), np.float32))
    return jax.tree.map(jnp.asarray, batch)


@dataclass(frozen=True)
class Training:
    """What a spec asks for, ready to be built."""

    fresh_state: Callable[[], TrainState]
    fresh_step: Callable[[], Any]  # a `CompiledStep`, new each time: nothing is remembered of an earlier trace
    batch: Batch


def training(spec: dict[str, Any]) -> Training:
    size = spec["size"]
    config = LlamaConfig(
        vocab=size["vocab"],
        d_model=size["d_model"],
        n_layers=size["n_layers"],
        n_heads=size["n_heads"],
        n_kv_heads=size["n_heads"],
        head_dim=size["d_model"] // size["n_heads"],
        d_ff=size["d_ff"],
        context=size["seq"],
        tied=True,
    )
    without = spec.get("without", [])
    flight = Flight(layers=spec.get("layers", "loop"), remat=spec.get("remat", "none"), dtype=spec["dtype"])
    ops = ops_without(spec["backend"], [piece for piece in without if piece in PIECES])
    chunk = size["batch"] * size["seq"] if "loss" in without else 1024
    step_config = StepConfig(loss_chunk=chunk, micro_batches=spec.get("micro_batches", 1), ratios_every=0)
    optimizer = build_optimizer(OptimizerConfig(name="adamw"))

    def fresh_step() -> Any:
        return make_step(optimizer, step_config, flight, ops, jr.key(0), donate="donation" not in without)

    batch = batch_of(size["batch"], size["seq"], size["vocab"])
    return Training(lambda: init_state(lm.build(config, key=jr.key(0)), optimizer), fresh_step, batch)


def train(spec: dict[str, Any]) -> tuple[Round, dict[str, Any]]:
    """Whole training steps: forward, backward, gradient norm, clipping, AdamW. On one batch again and again, or on those of a token cache,
    as the loop gets them."""
    asked = training(spec)
    imported_bytes = resident_bytes()
    step = asked.fresh_step()
    state = jax.block_until_ready(jax.jit(asked.fresh_state)())
    begin = time.perf_counter()
    state, metrics = jax.block_until_ready(step(state, asked.batch, 1e-3))
    first_s = time.perf_counter() - begin
    n_params = sum(leaf.size for leaf in jax.tree.leaves(state.trainable))
    facts = {"n_params": n_params, "first_s": first_s, "loss": float(metrics["loss"])} | program_of(step, state, asked.batch)
    facts["resident_bytes"] = imported_bytes
    batches = endless_batches(spec) if "tokens" in spec else itertools.repeat(asked.batch)
    held = {"state": state}
    forget_peak()

    def one_round() -> dict[str, Any]:
        times, waits = [], []
        for _ in range(spec["steps"]):
            begin = time.perf_counter()
            batch = jax.tree.map(jnp.asarray, next(batches))
            waits.append(time.perf_counter() - begin)
            held["state"], metrics = step(held["state"], batch, 1e-3)
            jax.block_until_ready((held["state"], metrics))
            times.append(time.perf_counter() - begin)
        return {"seconds": times, "wait_seconds": waits, "loss": float(metrics["loss"])}

    return one_round, facts


def program_of(step: Any, state: TrainState, batch: Batch) -> dict[str, Any]:
    """Bytes of the compiled step, as the compiler counts them, and its matrix products."""
    compiled = step.lower(state, batch).compile()
    found = compiled.memory_analysis()
    products, outside = products_outside(compiled.as_text())
    memory = {"argument_bytes": found.argument_size_in_bytes, "temp_bytes": found.temp_size_in_bytes}
    return memory | {"products": products, "products_outside": outside}


def endless_batches(spec: dict[str, Any]) -> Iterator[Batch]:
    """As `recipes.pretrain_small` gets them, from a token cache that is there."""
    size = spec["size"]
    return train_batches(TokenCache(Path(spec["tokens"])), batch=size["batch"], seq=size["seq"], seed=0, stop_step=10**9)


def pipeline(spec: dict[str, Any]) -> tuple[Round, dict[str, Any]]:
    """Batches as fast as they come, put where the step takes them."""
    batches = endless_batches(spec)

    def one_round() -> dict[str, Any]:
        for _ in range(3):  # made ahead, while nobody asked
            next(batches)
        begin = time.perf_counter()
        for _ in range(PIPELINE_BATCHES):
            jax.block_until_ready(jax.tree.map(jnp.asarray, next(batches)))
        return {"batch_s": (time.perf_counter() - begin) / PIPELINE_BATCHES}

    return one_round, {}


def checkpoint(spec: dict[str, Any]) -> tuple[Round, dict[str, Any]]:
    """A step, then its whole state saved as the recipes do it."""
    asked = training(spec)
    step = asked.fresh_step()
    held = {"state": jax.block_until_ready(jax.jit(asked.fresh_state)())}
    checkpoints = Checkpoints(spec["folder"])
    numbers = itertools.count(1)
    state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(held["state"].items()))

    def one_round() -> dict[str, Any]:
        held["state"], _ = jax.block_until_ready(step(held["state"], asked.batch, 1e-3))
        number = next(numbers)
        begin = time.perf_counter()
        checkpoints.save(number, held["state"].items(), {"train_s": 0.0})
        blocking_s = time.perf_counter() - begin
        checkpoints.wait()
        total_s = time.perf_counter() - begin
        files = [path for path in (Path(spec["folder"]) / str(number)).rglob("*") if path.is_file()]
        return {"blocking_s": blocking_s, "total_s": total_s, "bytes": sum(path.stat().st_size for path in files)}

    return one_round, {"state_bytes": state_bytes}


def trace(spec: dict[str, Any]) -> tuple[Round, dict[str, Any]]:
    """From Python to the program handed to the compiler, of a step that has never been traced."""
    asked = training(spec)
    state = jax.eval_shape(asked.fresh_state)

    def one_round() -> dict[str, Any]:
        step = asked.fresh_step()
        begin = time.perf_counter()
        step.lower(state, asked.batch)
        return {"trace_s": time.perf_counter() - begin}

    return one_round, {"first_trace_s": one_round()["trace_s"], "shape_checks": not jaxtyping.config.jaxtyping_disable}


def generation(spec: dict[str, Any]) -> tuple[Round, dict[str, Any]]:
    """A prompt for each sequence through the model, then tokens one by one, greedy."""
    dtype = jnp.dtype("bfloat16" if spec["dtype"] == "int8" else spec["dtype"])  # of products and caches
    model = lm.load_pretrained(spec["model"], dtype=dtype)
    model = lm.quantised(model) if spec["dtype"] == "int8" else model
    n, ops = spec["sequences"], lm.BACKENDS[spec["backend"]]
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, model.config.vocab, (n, spec["prompt"])), jnp.int32)
    lengths, keys = jnp.full(n, spec["prompt"], jnp.int32), jr.split(jr.key(0), n)
    stops = jnp.zeros(0, jnp.int32)

    def one_round() -> dict[str, Any]:
        begin = time.perf_counter()
        state = jax.block_until_ready(prefill(model, tokens, lengths, spec["slots"], keys, dtype, False, ops))
        prefilled = time.perf_counter()
        state, out = jax.block_until_ready(decode(model, state, stops, GREEDY, spec["new"], ops))
        assert int((out >= 0).sum()) == n * spec["new"]
        return {"prefill_s": prefilled - begin, "decode_s": time.perf_counter() - prefilled}

    bandwidth = read_bandwidth()
    begin = time.perf_counter()
    one_round()
    weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    return one_round, {"first_s": time.perf_counter() - begin, "weight_bytes": weight_bytes, "read_bytes_per_s": bandwidth}


def read_bandwidth(megabytes: int = 512) -> float:
    """Bytes a second that a sum over a large array reads: the most a decoder that reads all its weights for each token can hope for."""
    x = jnp.ones((megabytes << 18,), jnp.float32)
    total = jax.jit(jnp.sum)
    times = []
    for _ in range(8):
        begin = time.perf_counter()
        total(x).block_until_ready()
        times.append(time.perf_counter() - begin)
    return x.nbytes / min(times)


def products_outside(program: str) -> tuple[int, list[str]]:
    """How many matrix products a compiled program for the CPU holds, and the shapes of those that XLA does not hand to its fast library
    (YNNPACK), as HLO writes them."""
    fast = set(re.findall(r"calls=%([\w.-]+),.*__ynn_fusion", program))
    inside, products, outside = "", 0, []
    for line in program.splitlines():
        if line.endswith("{"):
            inside = line.removeprefix("ENTRY ").split(" ")[0].lstrip("%")
        elif found := re.search(r"= (\S+?)(?:\{[\d,]*\})? dot\(", line):
            products += 1
            if inside not in fast:
                outside.append(found[1])
    return products, outside


def resident_bytes() -> int:
    """Memory of this process that is in RAM now; 0 where the system does not tell so."""
    return _status("VmRSS") or 0


def peak_resident_bytes() -> int:
    """The most there was since this process began, or since `forget_peak`. Linux counts it from the process's own first instruction, where
    `getrusage` begins with what its parent had."""
    kibibytes_or_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return _status("VmHWM") or kibibytes_or_bytes * (1 if sys.platform == "darwin" else 1024)


def forget_peak() -> None:
    """Give back what compiling left free, which is hundreds of megabytes, and count the peak from now on, where the system can."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    place = Path("/proc/self/clear_refs")
    if os.access(place, os.W_OK):
        place.write_text("5")  # see proc(5)


def _status(name: str) -> int | None:
    place = Path("/proc/self/status")
    found = re.search(rf"^{name}:\s*(\d+) kB$", place.read_text(), re.MULTILINE) if place.exists() else None
    return 1024 * int(found[1]) if found else None


def main(spec: dict[str, Any]) -> None:
    """Build, then answer."""
    if spec.get("compilation_cache", True):
        compilation_cache()
    one_round, facts = KINDS[spec["kind"]](spec)
    settings = process_settings()
    facts |= {"jax": jax.__version__, "malloc": settings["malloc"], "xla_flags": settings["xla_flags"]}
    print(json.dumps(facts), flush=True)
    for _ in sys.stdin:
        answer = one_round() | {"peak_rss_bytes": peak_resident_bytes()}
        print(json.dumps(answer), flush=True)


KINDS: dict[str, Callable[[dict[str, Any]], tuple[Round, dict[str, Any]]]] = {
    "train": train,
    "decode": generation,
    "pipeline": pipeline,
    "checkpoint": checkpoint,
    "trace": trace,
}

if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
