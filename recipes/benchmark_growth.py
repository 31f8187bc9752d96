"""How the training step grows, for `recipes.benchmark`: tokens a second against width, depth, sequence length and batch, around one size.

A step whose FLOPs, as counted by `train.logs.model_flops_per_token`, came at the speed of the size in the middle would lie on the thin line
of the picture. The count has attention's scores in full; the kernel leaves out most of what lies above the diagonal.
"""

import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from loguru import logger
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from recipes.benchmark_config import AXES, SIZES, Config, Figures, few, flops_of, spec_of, tokens_of
from recipes.benchmark_workers import all_of, in_turns, ours, together


def grown(size: dict[str, int], axis: str, value: int) -> dict[str, int]:
    """A size with one number changed, and what goes along with it.

    Width: heads stay as wide as they are, d_ff goes in proportion, in steps of 64. Sequence length: fewer rows, to the same tokens a step
    as far as that goes.
    """
    match axis:
        case "width":
            heads = value * size["n_heads"] // size["d_model"]
            d_ff = 64 * max(1, round(value * size["d_ff"] / size["d_model"] / 64))
            return size | {"d_model": value, "n_heads": heads, "d_ff": d_ff}
        case "depth":
            return size | {"n_layers": value}
        case "seq":
            return size | {"seq": value, "batch": max(1, tokens_of(size) // value)}
        case "batch":
            return size | {"batch": value}
    raise AssertionError(axis)


def measure_growth(config: Config, figures: Figures) -> None:
    """Each point takes turns with the size in the middle, which stays up all the time."""
    config, name = few(config), config.sizes[0]
    middle = SIZES[name]
    asked = {"width": config.widths, "depth": config.depths, "seq": config.seqs, "batch": config.batches}
    of_middle = {"width": middle["d_model"], "depth": middle["n_layers"], "seq": middle["seq"], "batch": middle["batch"]}
    growth: dict[str, Any] = figures.setdefault("growth", {"size": name, **{axis: {} for axis in AXES}})
    with together({"middle": ours(spec_of(middle, config))}) as steady:
        facts_of_middle = steady["middle"].facts
        times_of_middle = all_of(in_turns(steady, config.rounds, name)["middle"])
        for axis in AXES:
            for value in sorted({*asked[axis]} - {of_middle[axis]} - {int(done) for done in growth[axis]}):
                logger.info(f"growth: {axis} {value}")
                size = grown(middle, axis, value)
                with together({"point": ours(spec_of(size, config))}) as point:
                    answers = in_turns(steady | point, config.rounds, f"{axis} {value}")
                    found = figures_of(size, point["point"].facts, all_of(answers["point"]))
                beside = figures_of(middle, facts_of_middle, all_of(answers["middle"]))
                growth[axis][str(value)] = found | {"flops_ratio": found["gflops"] / beside["gflops"]}
                figures.keep()
                times_of_middle += all_of(answers["middle"])
    in_the_middle = figures_of(middle, facts_of_middle, times_of_middle) | {"flops_ratio": 1.0}
    for axis in AXES:  # it belongs to all four
        points = growth[axis] | {str(of_middle[axis]): in_the_middle}
        growth[axis] = {value: points[value] for value in sorted(points, key=int)}
    figures["growth"] = growth


def figures_of(size: dict[str, int], facts: dict[str, Any], times: list[float]) -> dict[str, Any]:
    median, flops = statistics.median(times), flops_of(size, facts["n_params"])
    return {
        "n_params": facts["n_params"],
        "tokens_per_s": tokens_of(size) / median,
        "step_s": median,
        "gflops": flops / median / 1e9,
        "flops_per_token": flops / tokens_of(size),
        "temp_bytes": facts["temp_bytes"],
    }


def draw_growth(growth: dict[str, Any], folder: Path) -> Path:
    """Four panels, one an axis: tokens a second as measured, and where they would lie at the middle's FLOP/s. What a point reached of
    those, in turns with the middle, stands beside it."""
    middle = next(found for found in growth["width"].values() if found["flops_ratio"] == 1.0)
    names = {"width": "d_model", "depth": "layers", "seq": "tokens of a row", "batch": "rows of a batch"}
    figure, panels = plt.subplots(2, 2, figsize=(10, 7.5), layout="constrained")
    for axis, axes in zip(AXES, panels.flat, strict=True):
        values = [int(value) for value in growth[axis]]
        points = list(growth[axis].values())
        predicted = [1e9 * middle["gflops"] / found["flops_per_token"] for found in points]
        axes.plot(values, predicted, color="black", linewidth=0.7, label=f"{growth['size']}'s FLOP/s at every point")
        axes.plot(values, [found["tokens_per_s"] for found in points], color="tab:blue", marker="o", markersize=4, label="measured")
        for value, found in zip(values, points, strict=True):
            place = {"xy": (value, found["tokens_per_s"]), "xytext": (0, -12), "textcoords": "offset points"}
            axes.annotate(f"{found['flops_ratio']:.0%}", **place, fontsize=7, ha="center")
        axes.set(xscale="log", yscale="log", xlabel=names[axis], ylabel="tokens / s", title=f"{axis}, around {growth['size']}")
        axes.set_xticks(values, [f"{value:,}" for value in values])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda speed, _: f"{speed:,.0f}"))
        for each in (axes.xaxis, axes.yaxis):
            each.set_minor_formatter(NullFormatter())
        axes.tick_params(labelsize=8)
        axes.margins(y=0.2)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize="x-small", frameon=False)
    path = folder / "growth.png"
    figure.savefig(path, dpi=140)
    plt.close(figure)
    return path
