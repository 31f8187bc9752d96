"""What `recipes.scaling` found, as tables and pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recipes import ablate_table
from recipes.trial import machines

TITLES = {
    "sizes": "Loss over size",
    "widths": "Loss over learning rate",
    "batches": "Loss over batch",
    "decays": "Loss over weight decay",
    "tokens": "Loss over size at equal computation",
}
VALUES = {"rate": "peak rate", "batch": "batch, in rows,", "decay": "weight decay"}


def marks(part: str) -> tuple[str, str]:
    return tuple(f"<!-- the table of recipes.scaling, {part}, {end} -->" for end in ("begins", "ends"))  # type: ignore[return-value]


def put(said: str, part: str, page: Path, picture: Path | None) -> None:
    """Put a table between its marks on the page."""
    ablate_table.put(said, page, picture, marks=marks(part), words=TITLES[part])


def words_of_sizes(found: Mapping[str, Any]) -> str:
    """The ladder, the law, and whether it held."""
    lines, told, law = found["lines"], found["foretold"], found["law"]
    of: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        of.setdefault(line["size"], []).append(line)
    rows = ["| size | parameters | tokens | seeds | bits per byte | the law says |", "|---|---|---|---|---|---|"]
    for size, each in sorted(of.items(), key=lambda item: found["parameters"][item[0]]):
        bits = np.mean([line["bits_per_byte"] for line in each])
        n = found["parameters"][size]
        says = told["value"] if size == found["largest"] else float(law.at(n))
        rows.append(f"| {size} | {n:,} | {each[0]['tokens']:,} | {len(each)} | {bits:.4f} | {says:.4f} |")
    interval = "" if told["low"] is None else f" (95 %: {told['low']:.4f} to {told['high']:.4f})"
    foretelling = f"Foretold for {found['largest']} before it was run: {told['value']:.4f}{interval}"
    if not found["came_to"]:
        verdict = "; it was not run yet."
    else:
        came = float(np.mean(found["came_to"]))
        held = told["low"] is not None and told["low"] <= came <= told["high"]
        verdict = f"; it came to {came:.4f}, {'inside' if held else 'outside' if told['low'] is not None else 'with no interval to be in'}."
    off = ", ".join(f"{name} {value:.4f}" for name, value in found["laws_off_by"].items())
    head = f"Measured on {machines(lines)}: {found['corpus']}, {found['tokens_per_parameter']:g} tokens a parameter. {law.words()}" + (
        f"; the last rung but one foretold from those below it was off by: {off}." if off else "."
    )
    return "\n".join([head, "", *rows, "", foretelling + verdict])


def words_of_grid(found: Mapping[str, Any]) -> str:
    """The best value at each width under each rule."""
    lines, varied = found["lines"], found["varied"]
    rows = [
        "| rule | " + " | ".join(f"width {width}" for width in found["widths"]) + f" | best {varied} ~ width^ |",
        "|---|" + "---|" * (len(found["widths"]) + 1),
    ]
    for rule in found["rules"]:
        best = found["best"].get(rule, {})
        cells = []
        for width in found["widths"]:
            here = [line["bits_per_byte"] for line in lines if (line["rule"], line["width"]) == (rule, width)]
            cells.append(f"{best[width]:.3g} ({min(here):.4f})" if width in best else "not known")
        power = found["exponents"].get(rule)
        rows.append(f"| {rule} | {' | '.join(cells)} | {'not known' if power is None else f'{power:+.2f}'} |")
    head = (
        f"Measured on {machines(lines)}: {found['corpus']}, {lines[0]['tokens']:,} tokens a run, optimizer "
        f"{found['optimizer']}. Best {VALUES[varied]} as it would be at the base's width, and the best bits per byte of the grid."
    )
    return "\n".join([head, "", *rows])


def words_of_tokens(found: Mapping[str, Any]) -> str:
    """Bits per byte of each size at each budget, the best size of a budget, and how it grows."""
    counted = found["parameters"]
    sizes = sorted(counted, key=lambda size: counted[size])
    rows = [
        "| 6ND | " + " | ".join(f"{size} ({counted[size]:,})" for size in sizes) + " | best N | D | D / N |",
        "|---|" + "---|" * (len(sizes) + 3),
    ]
    for budget in found["budgets"]:
        course, best = found["courses"][budget], found["best"].get(budget)
        cells = [f"{course[counted[size]]:.4f}" if counted[size] in course else "" for size in sizes]
        ends = ["not known"] * 3
        if best is not None:
            tokens = budget / (6 * best)
            at_end = best <= min(course) or best >= max(course)
            ends = [f"{best:,.0f}{', the end of the ladder' if at_end else ''}", f"{tokens:,.0f}", f"{tokens / best:.2f}"]
        rows.append(f"| {budget:.1e} | {' | '.join([*cells, *ends])} |")
    power = found["exponent"]
    grows = "" if power is None else f" The best N grows as the budget to the power {power:.2f}, its tokens to the power {1 - power:.2f}."
    return "\n".join([f"Measured on {machines(found['lines'])}: {found['corpus']}.{grows}", "", *rows])


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, columns, figsize=(width, height), layout="constrained", sharey=True, squeeze=False)
    return plt, figure, axes[0]


def draw_sizes(found: Mapping[str, Any], path: Path) -> None:
    """Runs, the law through all but the largest, and what it foretold of that."""
    plt, figure, (axis,) = _figure(6.4, 3.8)
    sizes = np.array([line["parameters"] for line in found["lines"]], float)
    bits = np.array([line["bits_per_byte"] for line in found["lines"]])
    last = sizes == found["parameters"][found["largest"]]
    reach = np.geomspace(sizes.min(), found["parameters"][found["largest"]], 100)
    axis.plot(reach, found["law"].at(reach), color="tab:blue", linewidth=1.2, label=found["law"].words())
    axis.plot(sizes[~last], bits[~last], "o", color="tab:blue", label="fitted to")
    told = found["foretold"]
    if told["low"] is not None:
        x = found["parameters"][found["largest"]]
        axis.errorbar(
            x,
            told["value"],
            [[told["value"] - told["low"]], [told["high"] - told["value"]]],
            color="black",
            capsize=4,
            label="foretold, 95 %",
        )
    if last.any():
        axis.plot(sizes[last], bits[last], "D", color="tab:orange", label="came to")
    axis.set(xscale="log", xlabel="parameters", ylabel="bits per byte, held out")
    _ticks_of_sizes(axis, found["parameters"])
    _finish(plt, figure, [axis], path)


def draw_grid(found: Mapping[str, Any], path: Path) -> None:
    """Bits per byte over what was varied, a line a width, a panel a rule."""
    plt, figure, axes = _figure(4.2 * len(found["rules"]), 3.6, len(found["rules"]))
    for axis, rule in zip(axes, found["rules"], strict=True):
        for width in found["widths"]:
            course: dict[float, list[float]] = {}
            for line in found["lines"]:
                if (line["rule"], line["width"]) == (rule, width):
                    course.setdefault(line["value"], []).append(line["bits_per_byte"])
            values = sorted(course)
            axis.plot(values, [np.mean(course[value]) for value in values], "o-", markersize=3, linewidth=1, label=f"width {width}")
        axis.set(xscale="log", xlabel=f"{VALUES[found['varied']]} at the base's width", title=rule)
        tried = sorted({line["value"] for line in found["lines"]})
        ticks_at(axis, tried, [f"{value:g}" for value in tried])
    axes[0].set_ylabel("bits per byte, held out")
    bits = [line["bits_per_byte"] for line in found["lines"]]
    axes[0].set_ylim(min(bits) - 0.02, min(bits) + 3 * (np.median(bits) - min(bits)) + 0.05)
    _finish(plt, figure, axes, path)


def draw_tokens(found: Mapping[str, Any], path: Path) -> None:
    """Bits per byte over parameters, a line a budget, and the best size of each."""
    plt, figure, (axis,) = _figure(6.4, 3.8)
    for budget in found["budgets"]:
        course = found["courses"][budget]
        sizes = sorted(course)
        (line,) = axis.plot(sizes, [course[n] for n in sizes], "o-", markersize=3, linewidth=1, label=f"6ND = {budget:.1e}")
        if budget in found["best"]:
            axis.axvline(found["best"][budget], color=line.get_color(), linewidth=0.8, linestyle=":")
    axis.set(xscale="log", xlabel="parameters (dotted: the best)", ylabel="bits per byte, held out")
    _ticks_of_sizes(axis, found["parameters"])
    _finish(plt, figure, [axis], path)


def ticks_at(axis: Any, places: Sequence[float], labels: Sequence[str]) -> None:
    """Ticks of a logarithmic axis there and nowhere else."""
    axis.set_xticks(places, labels)
    axis.minorticks_off()


def _ticks_of_sizes(axis: Any, parameters: Mapping[str, int]) -> None:
    ticks_at(axis, list(parameters.values()), [f"{n / 1e6:.2g}M" for n in parameters.values()])


def _finish(plt: Any, figure: Any, axes: Any, path: Path) -> None:
    for axis in axes:
        axis.legend(fontsize="small")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
