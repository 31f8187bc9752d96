"""The tables of `recipes.benchmark`: what was measured, for reading on a screen."""

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from recipes.benchmark_config import AXES, DECODING


def show(figures: dict[str, Any]) -> None:
    """Each part that has been measured."""
    console = Console()
    show_training(console, figures)
    show_ladder(console, figures)
    show_decoding(console, figures)
    show_around(console, figures)
    show_imports(console, figures)
    show_growth(console, figures)
    show_memory(console, figures)


def print_table(console: Console, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """The first column reads, the others count."""
    table = Table()
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(title, style="italic")
    console.print(table)


def show_training(console: Console, figures: dict[str, Any]) -> None:
    trained = {name.removeprefix("train."): found for name, found in figures.items() if name.startswith("train.")}
    if not trained:
        return
    columns = ("size", "tokens/s", "GF/s", "best GF/s", "of peak", "first step s", "cached", "torch compile", "torch eager")
    rows = []
    for size, found in trained.items():
        ratios = [f"{found[name]:.2f}x" if name in found else "" for name in ("ratio_torch_compile", "ratio_torch_eager")]
        speed = [f"{found['tokens_per_s']:,.0f}", f"{found['gflops']:.0f}", f"{found['best_gflops']:.0f}", f"{found['share_of_peak']:.0%}"]
        rows.append([size, *speed, f"{found['first_s']:.1f}", f"{found['first_s_cached']:.1f}", *ratios])
    print_table(console, "training step", columns, rows)


def show_ladder(console: Console, figures: dict[str, Any]) -> None:
    if "ladder" not in figures:
        return
    columns = ("without", "median", "best", "temporary memory")
    rows = [
        [piece, *(f"{found[name]:.2f}x" for name in ("ratio", "best_ratio", "temp_bytes_ratio"))]
        for piece, found in figures["ladder"].items()
    ]
    print_table(console, "a step without one piece of the fast path, times as long", columns, rows)


def show_decoding(console: Console, figures: dict[str, Any]) -> None:
    """Tokens a second of all sequences together."""
    cases = {name: found for name, found in figures.items() if ".slots" in name or name.startswith("prefill.")}
    if not cases:
        return
    whos = list(dict.fromkeys(key.rsplit(".", 1)[0] for found in cases.values() for key in found if "." in key))
    rows = []
    for name, found in cases.items():
        what = "prefill_tokens_per_s" if name.startswith("prefill") else "tokens_per_s"
        speeds = [f"{found[f'{who}.{what}']:,.0f}" if f"{who}.{what}" in found else "" for who in whos]
        case = name.removeprefix("decode.").replace(".slots", " × ") + ("" if "prefill" in name else " slots")
        rows.append([case, *speeds, "" if name.startswith("prefill") else f"{found['limit_tokens_per_s']:,.0f}"])
    columns = ("sequences", *(who.replace("_", " ") for who in whos), "bf16 limit by memory")
    print_table(console, f"generation, {DECODING}, tokens/s of all sequences together", columns, rows)


def show_around(console: Console, figures: dict[str, Any]) -> None:
    """What surrounds the step: data, checkpoints, tracing."""
    rows = []
    if found := figures.get("pipeline"):
        rows += [
            ["data: tokens/s, alone", f"{found['tokens_per_s']:,.0f}"],
            [f"data: share of a step of {found['size']}", f"{found['share_of_step']:.2%}"],
            ["data: steps fed by it wait", f"{1e3 * found['wait_s']:.2f} ms"],
            ["data: steps fed by it take", f"{found['fed_ratio']:.3f}x"],
            ["data: encoding text, tokens/s", f"{found['encode_tokens_per_s']:,.0f}"],
        ]
    if found := figures.get("checkpoint"):
        rows += [
            [f"checkpoint of {found['size']}: the loop is blocked", f"{found['blocking_s']:.3f} s"],
            ["checkpoint: until it is on disk", f"{found['total_s']:.3f} s"],
            ["checkpoint: on disk", f"{found['bytes'] / 1e6:,.1f} MB"],
        ]
    if found := figures.get("trace"):
        rows += [
            [f"trace of a step of {found['size']}, first in its process", f"{found['seconds']:.2f} s"],
            ["trace: without shape checks", f"{found['without_checks_seconds']:.2f} s"],
            ["trace: so the checks cost", f"{found['overhead_s']:.2f} s"],
            ["trace: once more in the same process", f"{found['again_seconds']:.2f} s"],
            ["trace: the same without shape checks", f"{found['again_without_checks_seconds']:.2f} s"],
            ["the step: without shape checks, times as long", f"{found['step_ratio']:.3f}x"],
        ]
    if rows:
        print_table(console, "around the step", ("what", ""), rows)


def show_imports(console: Console, figures: dict[str, Any]) -> None:
    if found := figures.get("imports"):
        rows = [
            [command, f"{found[f'{name}_s']:.2f}", f"{found[f'{name}_s'] / found['jax_s']:.2f}x"] for name, command in found["of"].items()
        ]
        print_table(console, "a fresh process, from its start to its end", ("command", "s", "of jax alone"), rows)


def show_growth(console: Console, figures: dict[str, Any]) -> None:
    if not (growth := figures.get("growth")):
        return
    columns = (f"around {growth['size']}", "parameters", "tokens/s", "GF/s", f"FLOP/s beside {growth['size']}", "temporary MB")
    rows = []
    for axis in AXES:
        for value, found in growth[axis].items():
            speeds = f"{found['tokens_per_s']:,.0f}", f"{found['gflops']:.0f}", f"{found['flops_ratio']:.2f}x"
            rows.append([f"{axis} {value}", f"{found['n_params'] / 1e6:.1f} M", *speeds, f"{found['temp_bytes'] / 1e6:,.0f}"])
    print_table(console, "training step as it grows", columns, rows)


def show_memory(console: Console, figures: dict[str, Any]) -> None:
    if not (memory := figures.get("memory")):
        return
    columns = ("case, micro-batches", "arguments MB", "temporary MB", "by formula", "above it", "temporary", "time", "held MB")
    for size, cases in memory.items():
        rows = []
        for case, by_pieces in cases.items():
            for pieces, found in by_pieces.items():
                megabytes = [f"{found[name] / 1e6:,.0f}" for name in ("argument_bytes", "temp_bytes", "expected_temp_bytes")]
                off = f"{found['temp_bytes'] / found['expected_temp_bytes'] - 1:+.0%}"
                ratios = f"{found['temp_ratio']:.2f}x", f"{found['step_ratio']:.2f}x"
                rows.append([f"{case}, {pieces}", *megabytes, off, *ratios, f"{found['step_rss_bytes'] / 1e6:,.0f}"])
        print_table(console, f"memory of a step of {size}", columns, rows)
