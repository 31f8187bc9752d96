"""What a training step should need, beside what the compiler gives it, for `recipes.benchmark`.

The count is that of Korthikanti et al. 2022 (arXiv:2205.05198, section 4: what a layer keeps for its backward pass), made again for our
block and for what the hand-written passes of `lm.kernels_cpu` keep. With t tokens of a micro-batch, d = d_model, f = d_ff, h heads, a block
keeps, in bytes:

    4 t d · 2    the residual stream (fp32) before each norm
    2 t d · 2    each norm's result, which the linear maps behind it want for their weight gradients
    2 t d · 3    q, k, v, turned
    4 t d        what attention gives, which the compiler leaves in fp32, and 4 t h logarithms of its denominators
    2 t d        the same with a token's heads side by side, for the weight gradient of o_proj
    2 t f · 5    gate, up, sigmoid(gate), silu(gate), and the product that down_proj takes

which is t (24 d + 10 f + 4 h); no `seq × seq` matrix, which in the paper is the largest part. Under `remat` a block keeps 4 t d, its input;
under `dots` also what its linear maps gave, in fp32 as the products come, 16 t d + 8 t f (o_proj's too, but not down_proj's, which no
backward pass asks for). Beside them stand the blocks' weights in bf16, 2 bytes each, gradients in fp32, and where logits are made, 6 bytes
for each of a chunk's (fp32, and their gradient in bf16), 6 for each entry of the unembedding (its gradient, and its bf16 copy) and
8 t d for hidden states and their gradient. Not all of it at the same time: `expected_bytes` takes the fullest moment.

What comes out is more, for reasons that are not the formula's:

- On CPUs the compiler does early what waits for nothing, so that threads always find work: it copies the moments, turns inputs over for the
  weight gradients and makes attention's weights for the backward pass while the forward one still runs. The case `compact` is compiled in
  the order that needs least memory instead, which is what `train.process` asks jaxlib 0.12 for anyway.
- Where blocks run as a loop, remat saves nothing on a CPU with jaxlib 0.10: the compiler drops the barriers that keep what is computed
  again apart from what was computed before, finds the two equal, and keeps the first. As a scan they are two loops, which it cannot merge;
  so `--layers auto` scans. jaxlib 0.12 does it right.
- As a scan without remat, it takes the widening of what was kept in bf16 out of the loop, and so holds all layers' in fp32 as well.
- The linear maps of the `cpu` backend, with their own backward pass, hide their products from the policy `dots`, which then is `full`.
"""

import statistics
from importlib import metadata
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from loguru import logger

from lm.kernels_cpu_attention import block_of
from recipes.benchmark_config import SIZES, Config, Figures, RematName, few, spec_of, tokens_of
from recipes.benchmark_workers import all_of, in_turns, ours, together

LOSS_CHUNK = 1024  # tokens unembedded at a time, as `recipes.benchmark_ours` sets it

# XLA ends a process for a flag it does not know; these releases of jaxlib know this one.
COMPACT = {"XLA_FLAGS": "--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
COMPACT_RELEASES = {"0.10"}  # of jaxlib that do not have it by default (`train.process`)

# What the picture shows; a batch is too small to be seen.
PURPOSES = ("parameters", "moments", "bf16 weights", "activations", "gradients", "loss or block")


def expected_bytes(size: dict[str, int], remat: RematName, micro_batches: int) -> dict[str, int]:
    """Bytes by purpose at the fullest moment of a step of AdamW in bf16; the formula is on the page above. `parameters`, `moments` and
    `batch` are the step's arguments, the others its temporary memory."""
    vocab, d, f, h, n_layers = (size[name] for name in ("vocab", "d_model", "d_ff", "n_heads", "n_layers"))
    linears = n_layers * (4 * d * d + 3 * d * f)
    n_params = vocab * d + linears + n_layers * 2 * d + d
    t = tokens_of(size) // micro_batches
    block = t * (24 * d + 10 * f + 4 * h)
    kept = n_layers * {"none": block, "dots": t * (20 * d + 8 * f), "full": 4 * t * d}[remat]
    loss = 6 * min(LOSS_CHUNK, t) * vocab + 6 * vocab * d + 8 * t * d
    sums = 4 * n_params if micro_batches > 1 else 0  # gradients of the micro-batches before
    scores = 3 * 4 * t * h * min(block_of(size["seq"], None), size["seq"])  # of a block of keys with all queries: S, P, dP
    undone = (block if remat != "none" else 0) + scores  # what the backward pass of a block makes again
    moments = (
        {"activations": kept, "gradients": sums, "loss or block": loss},  # the loss is being taken
        {"activations": kept, "gradients": sums + 4 * vocab * d, "loss or block": undone},  # the last block is being undone
        {"activations": kept // n_layers, "gradients": sums + 4 * n_params, "loss or block": undone},  # the first one
    )
    arguments = {"parameters": 4 * n_params, "moments": 8 * n_params, "batch": 5 * 4 * tokens_of(size)}
    return arguments | {"bf16 weights": 2 * linears} | max(moments, key=lambda moment: sum(moment.values()))


def measure_memory(config: Config, figures: Figures) -> None:
    """Rematerialisation and accumulation, blocks as a loop and as a scan: each takes turns with the plain step (loop, none, 1)."""
    config = few(config)
    for name in config.sizes:
        size, found = SIZES[name], figures.setdefault("memory", {}).setdefault(name, {})
        with together({"plain": ours(spec_of(size, config))}) as plain:
            first = figures_of(size, "none", 1, plain["plain"].facts, in_turns(plain, config.rounds, name)["plain"])
            found.setdefault("none", {})["1"] = first | {"step_ratio": 1.0, "temp_ratio": 1.0}
            for case, remat, pieces, changes, environ in cases(config, size):
                if str(pieces) in found.get(case, {}):
                    continue
                logger.info(f"memory {name}: {case}, {pieces} micro-batches")
                with together({"case": ours(spec_of(size, config, **changes), environ)}) as worker:
                    answers = in_turns(plain | worker, config.rounds, f"{name} {case} {pieces}")
                    of_case = figures_of(size, remat, pieces, worker["case"].facts, answers["case"])
                plain_s = statistics.median(all_of(answers["plain"]))
                ratios = {"step_ratio": of_case["step_s"] / plain_s, "temp_ratio": of_case["temp_bytes"] / first["temp_bytes"]}
                found.setdefault(case, {})[str(pieces)] = of_case | ratios
                figures.keep()


Case = tuple[str, RematName, int, dict[str, Any], dict[str, str]]  # name, remat, micro-batches, settings of the worker, environment


def cases(config: Config, size: dict[str, int]) -> list[Case]:
    """All but the plain step. A number of micro-batches that does not divide the batch is left out, and said."""
    for pieces in config.micro_batches:
        if size["batch"] % pieces:
            logger.info(f"memory: {pieces} micro-batches do not divide a batch of {size['batch']} rows; left out")
    fitting = [pieces for pieces in config.micro_batches if size["batch"] % pieces == 0]
    found: list[Case] = []
    for layers in config.layers:
        for remat in config.remats:
            for pieces in fitting:
                changes = {"layers": layers, "remat": remat, "micro_batches": pieces}
                if (layers, remat, pieces) != ("loop", "none", 1):
                    found.append((remat if layers == "loop" else f"scan-{remat}", remat, pieces, changes, {}))
    if "loop" in config.layers and ".".join(metadata.version("jaxlib").split(".")[:2]) in COMPACT_RELEASES:
        found.append(("compact", "none", 1, {}, COMPACT))
    return found


def figures_of(size: dict[str, int], remat: RematName, pieces: int, facts: dict[str, Any], answers: list[dict[str, Any]]) -> dict[str, Any]:
    expected = expected_bytes(size, remat, pieces)
    arguments = sum(expected[name] for name in ("parameters", "moments", "batch"))
    peak = max(answer["peak_rss_bytes"] for answer in answers)
    return {
        "argument_bytes": facts["argument_bytes"],
        "temp_bytes": facts["temp_bytes"],
        "expected_argument_bytes": arguments,
        "expected_temp_bytes": sum(expected.values()) - arguments,
        "expected": expected,
        "peak_rss_bytes": peak,
        "step_rss_bytes": peak - facts["resident_bytes"],  # without Python and its libraries
        "step_s": statistics.median(all_of(answers)),
    }


def draw_memory(memory: dict[str, Any], folder: Path) -> Path:
    """For each case two bars: by formula, in colours; as compiled, arguments and temporary memory; a line for what the process really held
    while it took steps, less what it held before there was a model: the compiled program itself is in it."""
    figure, panels = plt.subplots(1, len(memory), figsize=(1 + 6.5 * len(memory), 6), layout="constrained", squeeze=False)
    colours = plt.get_cmap("tab10")
    for (size, found), axes in zip(memory.items(), panels.flat, strict=True):
        rows = [(f"{case}, {pieces}", each) for case, by_pieces in found.items() for pieces, each in by_pieces.items()]
        for place, (_, each) in enumerate(rows):
            end = 0.0
            for i, purpose in enumerate(PURPOSES):
                label = f"formula: {purpose}" if place == 0 else None
                axes.barh(place - 0.2, each["expected"][purpose] / 1e6, 0.38, left=end, color=colours(i), label=label)
                end += each["expected"][purpose] / 1e6
            compiled = each["argument_bytes"] / 1e6, each["temp_bytes"] / 1e6
            axes.barh(place + 0.2, compiled[0], 0.38, color="0.35", label="compiler: arguments" if place == 0 else None)
            axes.barh(place + 0.2, compiled[1], 0.38, left=compiled[0], color="0.7", label="compiler: temporary" if place == 0 else None)
            held = each["step_rss_bytes"] / 1e6
            axes.plot([held, held], [place, place + 0.4], color="black", label="held by the process" if place == 0 else None)
        axes.set_yticks(range(len(rows)), [name for name, _ in rows])
        axes.invert_yaxis()
        axes.set(xlabel="MB", ylabel="case, micro-batches", title=f"a step of {size}: by formula (above), as compiled (below)")
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *panels.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=3 * len(memory), fontsize="small", frameon=False
    )
    path = folder / "memory.png"
    figure.savefig(path, dpi=140)
    plt.close(figure)
    return path
