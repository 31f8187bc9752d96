"""Would a step of reinforcement learning fit on a card that need not be there? Its programs, compiled, and what lives between them.

The programs are those that `recipes.grpo_gsm8k` runs, with its settings: the sampler, which reads the prompts and draws the answers with
its cache; the trainer's log-probabilities of what was drawn, by the model that learns and by the one it began with; the update, AdamW on
fp32 masters with a bf16 flight. They are compiled ahead of time for an H100 or an RTX A6000, and never run; nothing is allocated. Memory
is what the compiler has planned: everything printed is computed, nothing is measured.

    uv run --extra plan python -m recipes.plan_rl                                               # Qwen3-0.6B on an H100
    uv run --extra plan python -m recipes.plan_rl --preset qwen3-1.7b --target a6000 --prompts 8
    uv run --extra plan python -m recipes.plan_rl --width 320 --step.micro-batches 32

Flags that are not named below are those of the recipe. The status is 1 where the step does not fit. `--target cpu` compiles for this
machine.
"""

import sys
from pathlib import Path
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import tyro
from pydantic import Field

from lm.decoding import Decoding
from lm.flight import Flight
from recipes import grpo_gsm8k
from recipes.command_line import RecipeConfig, fail, parse
from recipes.grpo_gsm8k import PRESETS
from recipes.plan import gigabytes, memory_of
from recipes.plan_adapters import skeleton_of
from recipes.rl_stages import row_for
from recipes.running import ENDS_IN_WORDS, choose_flight
from train.backends import attention_of
from train.gpus import CARDS, check_gpu_compiler
from train.logs import plain_messages
from train.optimizers import build_optimizer
from train.plan import Memory, compile_for
from train.policy import PolicyBatch, policy_objective
from train.rl import drawn_log_probs
from train.rollout import draw_program, start_program
from train.runtime import choose_device, device_facts
from train.step import init_state, make_step

RECIPES = ("grpo_gsm8k",)  # whose flags may follow


class Config(RecipeConfig):
    """The device, and how long prompts are."""

    target: Literal["h100", "a6000", "cpu"] = Field("h100", description="the device; cpu: the processor of this machine")
    width: int = Field(256, ge=1, description="tokens kept for a prompt: those of the longest of the data, which a plan does not read")


class Program(NamedTuple):
    """One of the step's programs."""

    name: str
    memory: Memory
    live: int  # bytes on the device while it runs, with what others have left there


class Plan(NamedTuple):
    """What was computed of one step."""

    parameters: int
    held: dict[str, int]  # bytes that are there all the time
    programs: list[Program]
    ran_with: str

    @property
    def peak(self) -> int:
        return max(program.live for program in self.programs)


def main(config: Config, rl: grpo_gsm8k.Config) -> bool:
    """Print the plan. Returns whether the step fits."""
    plain_messages()
    choose_device("cpu")
    return tell(config, rl, plan(config, rl))


def plan(config: Config, rl: grpo_gsm8k.Config) -> Plan:
    """Compile the programs of one step for the target."""
    if config.target != "cpu":
        check_gpu_compiler()
    model = skeleton_of(shape_of(rl.model))
    facts = device_facts() if config.target == "cpu" else CARDS[config.target].facts
    seq = config.width + rl.max_new_tokens
    ops, flight = choose_flight(rl, facts, n_layers=model.config.n_layers, seq=seq, **attention_of(model))
    optimizer = build_optimizer(rl.optimizer)
    state = eqx.filter_eval_shape(lambda model: init_state(model, optimizer), model)
    held = {"state of training": size_of(state), "the model it began with": size_of(model)}
    always = sum(held.values())

    def program(name: str, compiled: Any, *arguments: Any, shared: int, beside: int = 0) -> Program:
        """`shared`: bytes of its arguments that are held anyway; `beside`: others that are there while it runs."""
        memory = compile_for(config.target, compiled, *arguments)
        return Program(name, memory, always + beside + memory.peak - shared)

    weights = size_of(model)
    decoding = Flight(layers="loop", dtype=flight.dtype)
    reading = jax.jit(start_program(seq, decoding, ops))
    prompts = ints(rl.prompts, config.width), ints(rl.prompts), jax.eval_shape(lambda: jr.split(jr.key(0), rl.rows))
    begun: Decoding = jax.eval_shape(reading, model, *prompts)
    drawing = jax.jit(draw_program(rl.drawn_by, rl.max_new_tokens, decoding, ops), donate_argnums=1)

    targets = row_for(seq - 1)
    batch = abstract_policy_batch(rl.rows, targets, reference=rl.kl_weight > 0)
    pieces = rl.parts * rl.step.micro_batches
    some = abstract_policy_batch(rl.rows // rl.step.micro_batches, targets, reference=False)
    judging = jax.jit(drawn_log_probs(flight, ops, rl.drawn_by, chunk=rl.step.loss_chunk))
    kl: dict[str, Any] = {"importance_cap": rl.importance_cap, "kl_weight": rl.kl_weight, "kl": rl.kl}
    objective = policy_objective(rl.chosen, flight, ops, sampler=rl.drawn_by, most=rl.max_new_tokens, **kl, chunk=rl.step.loss_chunk)
    update = make_step(optimizer, rl.step, flight, ops, jr.key(0), objective=objective)
    part = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((leaf.shape[0] // rl.parts, *leaf.shape[1:]), leaf.dtype), batch)
    programs = [
        program("sampler: prompts", reading, model, *prompts, shared=weights),
        program("sampler: answers", drawing, model, begun, ints(rl.rows), ints(2), shared=weights),
        program("log-probabilities", judging, model, some, shared=weights),
        program("update", update, state, part, shared=size_of(state)),
    ]
    words = f"kernels {ops.name}, {flight.dtype}, layers as a {flight.layers} (drawing: a loop), remat {flight.remat}; "
    words += f"{rl.prompts} prompts of up to {config.width} tokens, {rl.n} answers of up to {rl.max_new_tokens} to each, "
    words += f"updates in {pieces} pieces of {rl.rows // pieces} answers"
    return Plan(sum(leaf.size for leaf in jax.tree.leaves(model)), held, programs, words)


def shape_of(model: Path) -> str:
    """What `skeleton_of` takes: a folder, or of a repository the preset of its name."""
    return f"{model}" if model.is_dir() else model.name.lower()


def size_of(tree: Any) -> int:
    """Bytes of all arrays, abstract or not."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def ints(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def abstract_policy_batch(rows: int, seq: int, *, reference: bool) -> PolicyBatch:
    """The shapes of a batch, as `train.rl.policy_batch` makes them."""
    whole, real = ints(rows, seq), jax.ShapeDtypeStruct((rows, seq), jnp.float32)
    values: dict[str, Any] = dict.fromkeys(("loss_weights", "advantages", "sampler_log_probs", "old_log_probs"), real)
    tokens: dict[str, Any] = dict.fromkeys(("tokens", "targets", "positions", "segments"), whole)
    return PolicyBatch(**tokens, **values, reference_log_probs=real if reference else None)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------- what is said


def tell(config: Config, rl: grpo_gsm8k.Config, found: Plan) -> bool:
    """A line a program; whether all fit."""
    limit = memory_of(config.target)
    print(f"{rl.model} on {config.target}: computed, nothing is measured. GB = 1e9 bytes")
    print(f"{found.parameters:,} parameters; {found.ran_with}\n")
    for name, size in found.held.items():
        print(f"{name:<26}{gigabytes(size):>12}  held all the time: {HELD[name]}")
    print(f"\n{'program':<20}{'arguments':>13}{'outputs':>13}{'temporaries':>13}{'live':>13}")
    for name, memory, live in found.programs:
        print(f"{name:<20}" + "".join(f"{gigabytes(size):>13}" for size in (memory.arguments, memory.outputs, memory.temporaries, live)))
    print(
        "\narguments, outputs (those not written over an argument) and temporaries: the compiler's; live: these, and what is held beside\n"
    )
    print(f"{'peak':<26}{gigabytes(found.peak):>12}  the fullest of them")
    print(f"{'there is':<26}{gigabytes(limit.bytes):>12}  {limit.words}")
    spare = limit.bytes - found.peak
    print(f"{'':<26}{'':>12}  {f'fits, {gigabytes(spare)} to spare' if spare >= 0 else f'does not fit: {gigabytes(-spare)} too much'}")
    return spare >= 0


HELD = {
    "state of training": "fp32 masters, AdamW's two moments, step",
    "the model it began with": "fp32; the KL refers to it",
}


def asked(argv: list[str]) -> tuple[Config, grpo_gsm8k.Config]:
    """The flags of the plan, and those of the recipe that it is of."""
    config, rest = tyro.cli(Config, args=argv, description=__doc__, prog="python -m recipes.plan_rl", return_unknown_args=True)
    return config, parse(grpo_gsm8k.Config, "", recipe="grpo_gsm8k", presets=PRESETS, default_preset="qwen3-0.6b", argv=rest)


if __name__ == "__main__":
    try:
        fitting = main(*asked(sys.argv[1:]))
    except ENDS_IN_WORDS as error:
        fail(str(error))
    sys.exit(0 if fitting else 1)
