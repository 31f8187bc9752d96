"""Would it fit, and how long would it take? The step of a pretraining recipe, compiled for a card that need not be there.

The very step that the recipe would run (same model, optimizer, batch, kernels) is compiled ahead of time for an H100 or an RTX A6000, and
never run; nothing is allocated. Memory is what the compiler has planned. FLOPs follow from a formula, time from an assumed MFU:
everything printed is computed, nothing is measured.

    uv run --extra plan python -m recipes.plan pretrain_124m                          # for an H100
    uv run --extra plan python -m recipes.plan pretrain_1b --target a6000
    uv run --extra plan python -m recipes.plan pretrain_1b --remat dots --step.micro-batches 128 --backend xla
    uv run --extra plan python -m recipes.plan pretrain_1b --sweep                    # micro-batches and remat side by side

Flags that are not named below are those of the recipe; its preset is the one called like the card, unless `--preset` says otherwise. The
status is 1 where the step does not fit. `--target cpu` compiles for this machine.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Annotated, Literal

import jax
import tyro
from pydantic import Field

from recipes import pretrain_1b, pretrain_124m, pretrain_small
from recipes.command_line import RecipeConfig, fail, parse
from recipes.pretrain_small import Experiment, beginning, flight_of
from recipes.running import ENDS_IN_WORDS
from train.gpus import CARDS, check_gpu_compiler, gpu_memory_share
from train.logs import model_flops_per_token
from train.plan import Memory, abstract_batch, compile_for
from train.runtime import choose_device, device_facts, published_peak
from train.step import make_token_nats

RECIPES: dict[str, tuple[ModuleType, str]] = {  # and the preset where none has the name of the target
    "pretrain_small": (pretrain_small, "4m"),
    "pretrain_124m": (pretrain_124m, "h100"),
    "pretrain_1b": (pretrain_1b, "h100"),
}


class Config(RecipeConfig):
    """What to compile, for which device."""

    recipe: Annotated[Literal["pretrain_small", "pretrain_124m", "pretrain_1b"], tyro.conf.Positional] = Field(description="whose step")
    target: Literal["h100", "a6000", "cpu"] = Field("h100", description="the device; cpu: the processor of this machine")
    mfu: float = Field(0.4, gt=0, le=1, description="assumed share of the card's peak that training reaches; an assumption, not a figure")
    sweep: bool = Field(False, description="also other numbers of micro-batches and all of remat, as a table")


@dataclass(frozen=True)
class Plan:
    """What was computed of one step."""

    parameters: int
    step: Memory
    measuring: int  # bytes while held-out text is measured
    flops: float  # a step
    ran_with: str  # kernels and flight, in words

    @property
    def peak(self) -> int:
        return max(self.step.peak, self.measuring)


def main(config: Config, experiment: Experiment) -> bool:
    """Print the plan. Returns whether the step fits."""
    choose_device("cpu")
    found = plan(experiment, config.target)
    limit = memory_of(config.target)
    fits = tell(config, experiment, found, limit)
    if config.sweep:
        sweep(config, experiment, limit)
    return fits


def plan(experiment: Experiment, target: str) -> Plan:
    """Compile the step, and the program that measures held-out text, for a target."""
    ops, flight = flight_of(experiment, device_facts() if target == "cpu" else CARDS[target].facts)
    if target != "cpu":
        check_gpu_compiler(cudnn=ops.name == "cudnn")
    fresh_state, step = beginning(experiment, experiment.model_config_of(experiment.vocab), flight, ops)
    state = jax.eval_shape(fresh_state)
    token_nats = jax.jit(make_token_nats(flight, ops, experiment.step.loss_chunk))
    at_once = experiment.batch // experiment.step.micro_batches
    in_training = compile_for(target, step, state, abstract_batch(experiment.batch, experiment.seq))
    measuring = compile_for(target, token_nats, state.model, abstract_batch(2 * at_once, experiment.seq))
    n_params = sum(leaf.size for leaf in jax.tree.leaves(state.model))
    return Plan(
        parameters=n_params,
        step=in_training,
        measuring=in_training.arguments + measuring.outputs + measuring.temporaries,  # the state of training stays where it is
        flops=model_flops_per_token(n_params, experiment.n_layers, experiment.d_model, experiment.seq) * experiment.batch * experiment.seq,
        ran_with=f"kernels {ops.name}, {flight.dtype}, layers as a {flight.layers}, remat {flight.remat}, "
        f"{experiment.step.micro_batches} micro-batches of {at_once} rows of {experiment.seq:,} tokens",
    )


# ------------------------------------------------------------------------------------------- what is said


@dataclass(frozen=True)
class Limit:
    """The memory there is."""

    bytes: int
    words: str  # where it comes from


def memory_of(target: str) -> Limit:
    if target == "cpu":
        return Limit(device_facts()["memory_bytes"], "the memory of this machine")
    share, card = gpu_memory_share(), CARDS[target]
    words = f"{share:.0%} of the card's {gigabytes(card.memory_bytes)}, which is what jax takes (XLA_CLIENT_MEM_FRACTION)"
    return Limit(int(share * card.memory_bytes), words)


def tell(config: Config, experiment: Experiment, found: Plan, limit: Limit) -> bool:
    """One step, a line a figure with where it comes from; whether it fits."""
    spare = limit.bytes - found.peak
    verdict = f"fits, {gigabytes(spare)} to spare" if spare >= 0 else f"does not fit: {gigabytes(-spare)} too much"
    print(f"{config.recipe} on {config.target}: computed, nothing is measured. GB = 1e9 bytes")
    print(f"{found.ran_with}\n")
    line("parameters", f"{found.parameters:,}", "of the abstract model")
    line("arguments", gigabytes(found.step.arguments), "compiler: state and batch")
    line("outputs", gigabytes(found.step.outputs), "compiler: those not written over the state that was given")
    line("temporaries", gigabytes(found.step.temporaries), "compiler: activations, gradients, casts")
    line("peak", gigabytes(found.step.peak), "the three together")
    line("measuring", gigabytes(found.measuring), "the state of training, and the compiler's plan of measuring held-out text")
    line("there is", gigabytes(limit.bytes), limit.words)
    line("", "", verdict)
    line("FLOPs a step", f"{found.flops:.4g}", "tokens · (6 N + 12 L d T), arXiv:2204.02311; what is recomputed does not count")
    peak = None if config.target == "cpu" else published_peak(CARDS[config.target].device_kind)
    if peak is not None and peak.flops_per_s is not None:
        tokens, step_s = experiment.batch * experiment.seq, found.flops / (config.mfu * peak.flops_per_s)
        words = f"at {config.mfu:.0%} of {peak.flops_per_s / 1e12:,.1f} TFLOP/s: the MFU is assumed, the peak published ({peak.source})"
        line("a step", f"{step_s:,.2f} s", words)
        line("tokens/s", f"{tokens / step_s:,.0f}", f"{tokens:,} tokens in that time")
        if steps := experiment.steps:
            line("the run", f"{steps * step_s / 3600:,.1f} h", f"{steps:,} steps, {steps * tokens:.3g} tokens")
    return spare >= 0


def line(what: str, figure: str, source: str) -> None:
    print(f"{what:<13}{figure:>15}  {source}".rstrip())


def sweep(config: Config, experiment: Experiment, limit: Limit) -> None:
    """The same step in other pieces, and with more or less recomputed."""
    print("\nremat  micro-batches  rows at once  temporaries        peak")
    for each in variants(experiment):
        found, pieces = plan(each, config.target), each.step.micro_batches
        verdict = "fits" if found.peak <= limit.bytes else "does not fit"
        figures = f"{gigabytes(found.step.temporaries):>13}{gigabytes(found.peak):>12}  {verdict}"
        print(f"{each.remat:<7}{pieces:>13}{each.batch // pieces:>14}{figures}", flush=True)


def variants(experiment: Experiment) -> Iterator[Experiment]:
    """A quarter to twice as many rows at once, with every policy of rematerialisation."""
    now = experiment.step.micro_batches
    counts = sorted({pieces for pieces in (now // 2, now, 2 * now, 4 * now) if pieces > 0 and experiment.batch % pieces == 0})
    for remat in ("none", "dots", "full"):
        for pieces in counts:
            step = experiment.step.model_copy(update={"micro_batches": pieces})
            yield experiment.model_copy(update={"remat": remat, "step": step})


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def asked(argv: list[str]) -> tuple[Config, Experiment]:
    """The flags of the plan, and those of the recipe that it is of."""
    config, rest = tyro.cli(Config, args=argv, description=__doc__, prog="python -m recipes.plan", return_unknown_args=True)
    recipe, preset = RECIPES[config.recipe]
    preset = config.target if config.target in recipe.PRESETS else preset
    return config, parse(recipe.Config, "", recipe=config.recipe, presets=recipe.PRESETS, default_preset=preset, argv=rest)


if __name__ == "__main__":
    try:
        fitting = main(*asked(sys.argv[1:]))
    except ENDS_IN_WORDS as error:
        fail(str(error))
    sys.exit(0 if fitting else 1)
