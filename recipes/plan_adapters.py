"""What does a fine-tuning step take, whole or with each kind of adapter? The very step of `recipes.sft_chat`, compiled.

Compiled for this machine, or ahead of time for an H100 or an RTX A6000 that need not be there; memory is what the compiler has planned, and
nothing is allocated. `--run-steps 5` then also takes some steps of each kind on this machine, each in a process of its own, and tells how
much memory that really held and how long a step took.

    python -m recipes.plan_adapters smollm2-135m --batch 4
    python -m recipes.plan_adapters smollm2-135m --batch 4 --run-steps 5
    uv run --extra plan python -m recipes.plan_adapters llama-3.2-1b --target a6000 --batch 8 --remat dots

`arguments` is what is there all the time: weights, adapters, the optimizer's moments, a batch. `temporaries` is all in between:
activations, gradients, what is cast and unpacked.
"""

import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import tyro
from pydantic import Field, model_validator

import lm
from lm.adapters import ALL_LINEARS
from lm.hf import abstract
from lm.hf_files import read_json
from lm.native import MODEL_TYPE, native_skeleton
from recipes.command_line import RecipeConfig, fail
from recipes.plan import gigabytes, memory_of
from recipes.running import ENDS_IN_WORDS, RunConfig, choose_flight
from train.adapters import AdapterConfig, abstract_adapted, trained_part
from train.backends import attention_of
from train.gpus import CARDS, check_gpu_compiler
from train.logs import plain_messages
from train.optimizers import OptimizerConfig, build_optimizer
from train.plan import Memory, abstract_batch, compile_for
from train.runtime import choose_device, device_facts, memory_in_use
from train.step import CompiledStep, StepConfig, TrainState, init_state, make_step

PRESETS = {name: config for architecture in lm.ARCHITECTURES.values() for name, config in architecture.presets.items()}

KINDS: dict[str, dict[str, str]] = {  # of `AdapterConfig`
    "full": {"kind": "none"},
    "LoRA, fp32 base": {"kind": "lora"},
    "LoRA, bf16 base": {"kind": "lora", "base": "bfloat16"},
    "rsLoRA, fp32 base": {"kind": "rslora"},
    "DoRA, fp32 base": {"kind": "dora"},
    "QLoRA, int8 base": {"kind": "lora", "base": "int8"},
    "QLoRA, NF4 base": {"kind": "lora", "base": "nf4"},
    "DoRA, NF4 base": {"kind": "dora", "base": "nf4"},
}


class Config(RecipeConfig):
    """The model, the step, and the device."""

    model: Annotated[str, tyro.conf.Positional] = Field(
        "smollm2-135m", description="a folder with config.json, or a preset: " + ", ".join(sorted(PRESETS))
    )
    target: Literal["cpu", "h100", "a6000"] = Field("cpu", description="the device; cpu: the processor of this machine")
    rank: int = Field(8, ge=1, description="of the adapters")
    targets: tuple[str, ...] = Field(ALL_LINEARS, description="roles or paths of the linear maps that get one: 'attn.[qv]_proj' 'mlp.*'")
    batch: int = Field(4, ge=1, description="rows of a step")
    seq: int = Field(512, ge=2, description="tokens of a row")
    layers: Literal["auto", "loop", "scan"] = Field("auto", description="blocks one by one or as a scan; auto: as the recipes choose")
    remat: Literal["none", "dots", "full"] = Field("none", description="what the backward pass recomputes to save memory")
    run_steps: int = Field(0, ge=0, description="steps to take of each kind, for the memory and time they really take; cpu only")

    @model_validator(mode="after")
    def _can_run(self) -> "Config":
        if self.run_steps and self.target != "cpu":
            raise ValueError(f"steps are run on this machine; for {self.target} they are only compiled: leave out --run-steps")
        return self


class Compiled(NamedTuple):
    """What the compiler says of a kind's step."""

    trained: int  # numbers
    memory: Memory


class Ran(NamedTuple):
    """What steps really took."""

    held_bytes: int  # by the process at its fullest, less what it held before there was a model
    step_s: float  # median


def main(config: Config) -> dict[str, Compiled]:
    """Compile a step of each kind, and print a line on it."""
    plain_messages()
    choose_device("cpu")
    if config.target != "cpu":
        check_gpu_compiler()
    ops, flight = flight_of(config, skeleton_of(config.model))
    limit = memory_of(config.target)
    print(f"{config.model} on {config.target}: {config.batch} rows of {config.seq} tokens, AdamW, adapters of rank {config.rank}")
    print(f"kernels {ops.name}, {flight.dtype}, layers as a {flight.layers}, remat {flight.remat}; MB = 1e6 bytes")
    print(f"there is {gigabytes(limit.bytes)}, {limit.words}\n")
    print(line("", "trained", "arguments", "temporaries", "together", *(["really held", "a step"] if config.run_steps else [])))
    found: dict[str, Compiled] = {}
    for name, asked in KINDS.items():
        state, step = beginning(config, asked)
        trained = sum(leaf.size for leaf in jax.tree.leaves(state.trainable))
        memory = compile_for(config.target, step, state, abstract_batch(config.batch, config.seq))
        found[name] = Compiled(trained, memory)
        cells = [f"{trained:,}", *map(megabytes, (memory.arguments, memory.temporaries, memory.peak))]
        if config.run_steps:
            ran = in_a_process_of_its_own(config, asked)
            cells += [megabytes(ran.held_bytes), f"{ran.step_s:.2f} s"]
        print(line(name, *cells) + ("" if memory.peak <= limit.bytes else "  does not fit"), flush=True)
    return found


def line(name: str, *cells: str) -> str:
    return f"{name:<18}" + "".join(f"{cell:>13}" for cell in cells)


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"


def beginning(config: Config, asked: dict[str, str]) -> tuple[TrainState, CompiledStep]:
    """The state before the first step, without numbers, and the step."""
    adapter = AdapterConfig(**asked, rank=config.rank, targets=config.targets)
    skeleton = skeleton_of(config.model)
    ops, flight = flight_of(config, skeleton)
    model, optimizer = abstract_adapted(skeleton, adapter), build_optimizer(OptimizerConfig(name="adamw", weight_decay=0.0))
    trained = trained_part(model, adapter)
    state = eqx.filter_eval_shape(lambda model: init_state(model, optimizer, trainable=trained), model)
    return state, make_step(optimizer, StepConfig(), flight, ops, jr.key(0), measured=True)


def skeleton_of(model: str) -> lm.AbstractLM:
    """A preset's model, or that of a folder, without numbers."""
    if model in PRESETS:
        shape = PRESETS[model]
        return abstract(lm.ARCHITECTURES[shape.model_type].model.init, shape)
    file = Path(model) / "config.json"
    if not file.is_file():
        raise ValueError(f"{model} is neither a folder with config.json nor a preset; these are: {', '.join(sorted(PRESETS))}")
    raw = read_json(file)
    if raw.get("model_type") == MODEL_TYPE:
        return native_skeleton(raw, lm.ARCHITECTURES, Path(model))
    if raw.get("model_type") not in lm.ARCHITECTURES:
        raise ValueError(f"{file} is of model_type {raw.get('model_type')!r}; known are {', '.join(sorted(lm.ARCHITECTURES))}")
    architecture = lm.ARCHITECTURES[raw["model_type"]]
    return abstract(architecture.model.init, architecture.config.from_hf(raw))


def flight_of(config: Config, model: lm.AbstractLM) -> Any:
    """Kernels and flight as the recipes choose them."""
    facts = device_facts() if config.target == "cpu" else CARDS[config.target].facts
    how = RunConfig(layers=config.layers, remat=config.remat)
    return choose_flight(how, facts, n_layers=model.config.n_layers, seq=config.seq, **attention_of(model))


def in_a_process_of_its_own(config: Config, asked: dict[str, str]) -> Ran:
    """`run`, where nothing was held before: the fullest moment of a process stays that of all its life."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(run, config, asked).result()


def run(config: Config, asked: dict[str, str]) -> Ran:
    """Take the steps, on numbers that are all alike: memory and time do not ask for other ones."""
    choose_device("cpu")
    skeleton, step = beginning(config, asked)
    before = memory_in_use()["peak_bytes"]

    def alike(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.full(leaf.shape, 0.01 if jnp.issubdtype(leaf.dtype, jnp.inexact) else 1, leaf.dtype)

    state, batch = jax.tree.map(alike, (skeleton, abstract_batch(config.batch, config.seq)))
    times: list[float] = []
    for _ in range(config.run_steps + 1):
        begin = time.perf_counter()
        state, metrics = step(state, batch, 1e-4)
        jax.block_until_ready((state, metrics))
        times.append(time.perf_counter() - begin)
    return Ran(memory_in_use()["peak_bytes"] - before, statistics.median(times[1:]))  # the first one compiled


if __name__ == "__main__":
    chosen = tyro.cli(Config, description=__doc__, prog="python -m recipes.plan_adapters")
    try:
        main(chosen)
    except ENDS_IN_WORDS as error:
        fail(str(error))
