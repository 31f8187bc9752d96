"""What a run tells: while it goes, and after.

`RunLog` writes a line of numbers a step to `metrics.jsonl`, words to `run.log`, and shows a progress bar, or, where
stdout is no terminal, a plain line now and then. `read_metrics` and `plot_curves` look back. `model_flops_per_token` and
`mfu` turn a speed into a fraction of the hardware's.
"""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from loguru import logger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from train.trackers import Trackers

if TYPE_CHECKING:
    from loguru import Message, Record

PLAIN_LINE_EVERY_S = 15.0  # where stdout is no terminal

_loguru_default = 0  # the number of the handler loguru starts with, which writes to stderr


class RunLog:
    """The log of one run, in its folder. Use it in a `with`."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        total_steps: int,
        start_step: int = 0,
        quiet: bool = False,
        trackers: Trackers | None = None,
        watch: Callable[[int, Mapping[str, Any]], None] = lambda step, metrics: None,
    ) -> None:
        """**Arguments:**

        - `folder`: gets `metrics.jsonl` and `run.log`; both are continued when they are there.
        - `total_steps`: the number of updates in the whole run; the bar ends there.
        - `start_step`: the first step that this process will log. Lines of `metrics.jsonl` from there on, left by a
          process that got further than its last checkpoint, are dropped, with a warning that counts them, so that the
          file reads as if the run had never stopped. After restoring step n, the next step logged is n + 1.
        - `quiet`: no bar and no words on the console, but for warnings and errors.
        - `trackers`: told every number that is logged.
        - `watch`: called with every line, its step and its numbers."""
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.total_steps, self.start_step = total_steps, start_step
        self._console = Console(soft_wrap=True)
        self._live = self._console.is_terminal and not quiet
        self._plain = not self._console.is_terminal and not quiet
        self._quiet = quiet
        self._trackers = trackers or Trackers([])
        self._watch = watch
        self._shown: dict[str, float] = {}  # the latest of what the bar names
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[words]}"),
            console=self._console,
            disable=not self._live,
            expand=True,
        )

    def __enter__(self) -> Self:
        path = self.folder / "metrics.jsonl"
        dropped = _truncate(path, self.start_step)
        level = "WARNING" if self._quiet else "INFO"
        _remove_loguru_default()
        self._sinks = [
            logger.add(self._print, level=level, format=_console_format, diagnose=False, filter=lambda r: "kept_only" not in r["extra"]),
        ]
        if self.folder.resolve() not in _kept:
            self._sinks.append(_keep(self.folder))
        if dropped:
            logger.warning("dropped {} lines of {} from step {} on: this run writes them again", dropped, path, self.start_step)
        self._file = path.open("a", encoding="utf-8")
        self._begin = time.monotonic()
        self._first: tuple[int, float] | None = None  # the first step logged and when: the speed counts from there, not from compiling
        self._last_plain, self._plain_line = -math.inf, ""
        self._task = self._progress.add_task("step", total=self.total_steps, completed=max(0, self.start_step - 1), words="")
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()
        self._print_plain_line()
        if error is not None and kind is not None and not isinstance(error, SystemExit):
            logger.bind(kept_only=True).error("stopped by {}: {}", kind.__name__, error)  # on the screen it comes from who catches it
        self._file.close()
        for sink in self._sinks:
            logger.remove(sink)
        _restore_loguru_default()

    def log(self, step: int, **metrics: Any) -> None:
        """Write one line for a step; several for the same step are fine (losses now, an evaluation later).

        Values are numbers, arrays of one number, strings, booleans or `None`. The bar shows `loss`, `val_loss` and
        `tokens_per_s` when given. JSON has no NaN or infinity: they are written as the strings "nan", "inf", "-inf", and
        `read_metrics` turns them back."""
        if step < self.start_step:
            raise ValueError(
                f"step {step} was logged, but this run said it would start at step {self.start_step}: its lines would stand twice."
            )
        values = {name: _plain_value(name, value) for name, value in metrics.items()}
        line = {"step": int(step)} | {name: _json_value(value) for name, value in values.items()}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()  # a killed process loses at most the line it was writing
        self._trackers.log(int(step), {name: value for name, value in values.items() if isinstance(value, int | float)})
        self._watch(int(step), values)
        self._shown |= {
            name: v for name, v in values.items() if name in ("loss", "val_loss", "tokens_per_s") and isinstance(v, int | float)
        }
        self._show(int(step))

    def message(self, text: str) -> None:
        """Say something, on the console and in `run.log`. (So does loguru's `logger`, from anywhere.)"""
        logger.opt(depth=1).info("{}", text)

    def show(self, what: Any) -> None:
        """Put something that `rich` can draw on a terminal, above the bar. Elsewhere nothing is shown."""
        if self._live:
            self._console.print(what)

    # ------------------------------------------------------------------------------------------------------------- console

    def _show(self, step: int) -> None:
        now = time.monotonic()
        if step > 0:
            self._first = self._first or (step, now)
        first_step, first_time = self._first or (step, now)
        words = [f"{name.replace('_', ' ')} {value:.4f}" for name, value in self._shown.items() if name != "tokens_per_s"]
        if "tokens_per_s" in self._shown:
            words.append(f"{self._shown['tokens_per_s']:,.0f} tokens/s")
        words.append(f"{_clock(now - self._begin)} gone")
        if step > first_step:
            words.append(f"{_clock((self.total_steps - step) * (now - first_time) / (step - first_step))} left")
        if self._live:
            self._progress.update(self._task, completed=step, words="  ".join(words))
        self._plain_line = f"step {step}/{self.total_steps}  {'  '.join(words)}"
        if self._plain and now - self._last_plain >= PLAIN_LINE_EVERY_S:
            self._last_plain = now
            self._print_plain_line()

    def _print_plain_line(self) -> None:
        if self._plain and self._plain_line:
            print(self._plain_line, file=self._console.file, flush=True)
            self._plain_line = ""

    def _print(self, message: "Message") -> None:
        """loguru's words through the bar's console, which then draws the bar anew below them."""
        style = {"WARNING": "yellow", "ERROR": "bold red", "CRITICAL": "bold red"}.get(message.record["level"].name, "")
        self._console.print(Text(str(message).rstrip("\n"), style=style))


def _console_format(record: "Record") -> str:
    level = "{level} " if record["level"].no > logger.level("INFO").no else ""
    return "{time:HH:mm:ss} " + level + "{message}\n{exception}"


def _remove_loguru_default() -> None:
    with contextlib.suppress(ValueError):  # someone has removed it already
        logger.remove(_loguru_default)


def _restore_loguru_default() -> None:
    global _loguru_default
    _loguru_default = logger.add(sys.stderr, format=_console_format, level="INFO", diagnose=False)


def plain_messages() -> None:
    """Time and words for people, instead of loguru's default with module and line. Recipes call it first."""
    _remove_loguru_default()
    _restore_loguru_default()


_kept: set[Path] = set()  # folders whose run.log `words_kept` is writing


@contextlib.contextmanager
def words_kept(folder: Path) -> Iterator[None]:
    """All words said inside also go to `run.log` in the folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    sink = _keep(folder)
    _kept.add(folder.resolve())
    try:
        yield
    finally:
        _kept.remove(folder.resolve())
        logger.remove(sink)


def _keep(folder: Path) -> int:
    return logger.add(folder / "run.log", level="DEBUG", format="{time:YYYY-MM-DD HH:mm:ss} {level: <7} {message}", diagnose=False)


@contextlib.contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with the time left for one long piece of work; call what it yields with the number done. No terminal, no bar."""
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.update(task, completed=done)


def _clock(seconds: float) -> str:
    hours, rest = divmod(round(max(0.0, seconds)), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


# ------------------------------------------------------------------------------------------------------------------ metrics


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, in order, with "nan", "inf" and "-inf" as floats again; a half-written last line is left out."""
    return [{name: _from_json(value) for name, value in line.items()} for line in _whole_lines(Path(path))]


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Write JSON so that the file is either the old one or the new one, never half of it."""
    text = json.dumps(obj, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    _replace(Path(path), text)


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with half.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    half.replace(path)


def _truncate(path: Path, start_step: int) -> int:
    """Drop the lines from start_step on and a half-written last one; returns how many."""
    if not path.exists():
        return 0
    text = path.read_text(encoding="utf-8", errors="replace")
    kept = [line for line in _whole_lines(path) if line["step"] < start_step]
    dropped = len(text.splitlines()) - len(kept)
    if dropped:
        _replace(path, "".join(json.dumps(line) + "\n" for line in kept))
    return dropped


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    parsed = []
    for number, line in enumerate(lines, start=1):
        try:
            parsed.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):  # the process was killed while writing it
                break
            raise ValueError(f"{path}, line {number} is not JSON ({error}): mend or remove that line.") from error
    return parsed


def _plain_value(name: str, value: Any) -> float | int | str | bool | None:
    if hasattr(value, "item") and getattr(value, "size", 1) == 1:
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"metric {name!r} is a {type(value).__name__} of shape {getattr(value, 'shape', '?')}: log single numbers or strings.")


def _json_value(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _from_json(value: Any) -> Any:
    return float(value) if value in ("nan", "inf", "-inf") else value


# -------------------------------------------------------------------------------------------------------------------- speed


def model_flops_per_token(n_params: int, n_layers: int, d_model: int, seq: int) -> float:
    """FLOPs of forward and backward per trained token, `6 N + 12 L d T`.

    The count of Chowdhery et al. 2022 (PaLM, arXiv:2204.02311, appendix B), after Kaplan et al. 2020 (arXiv:2001.08361):
    two FLOPs a parameter forward and four backward; attention's scores and sums over T keys a token, causal or not, with
    heads * head_dim = d_model. What is computed again (rematerialisation) does not count. `n_params` counts a tied
    embedding once and leaves out an untied input embedding, which multiplies nothing, and the experts a token is not sent to."""
    return 6.0 * n_params + 12.0 * n_layers * d_model * seq


def mfu(tokens_per_s: float, flops_per_token: float, peak_flops_per_s: float | None) -> float | None:
    """Model FLOPs utilisation: the fraction of the peak (of all devices together) that training uses; `None` when the peak is not known."""
    return None if peak_flops_per_s is None else tokens_per_s * flops_per_token / peak_flops_per_s


# --------------------------------------------------------------------------------------------------------------------- plots


def plot_curves(
    metrics_path: str | os.PathLike[str],
    png_path: str | os.PathLike[str],
    *,
    title: str,
    references: dict[str, float] | None = None,
) -> None:
    """Draw a run: training loss (each step pale, its running mean dark), validation points, learning rate and gradient norm.

    **Arguments:**

    - `metrics_path`: a `metrics.jsonl` with any of `loss`, `val_loss`, `learning_rate`, `grad_norm`.
    - `references`: losses to compare with, drawn as dashed lines and named."""
    import matplotlib

    matplotlib.use("Agg")  # draws to files, without a display
    import matplotlib.pyplot as plt

    lines = read_metrics(metrics_path)
    small = [name for name in ("learning_rate", "grad_norm") if _series(lines, name)[0]]
    steps, losses = _series(lines, "loss")
    val_steps, val_losses = _series(lines, "val_loss")
    if not steps and not val_steps:
        raise ValueError(f"{metrics_path} has no finite 'loss' or 'val_loss' in its {len(lines)} lines: there is nothing to draw.")

    ratios = [3.0] + [1.0] * len(small)
    figure, rows = plt.subplots(
        len(ratios), 1, sharex=True, squeeze=False, figsize=(8, 3.4 + 1.3 * len(small)), height_ratios=ratios, layout="constrained"
    )
    axes = rows[:, 0]
    main = axes[0]
    smooth = _running_mean(losses, max(1, len(losses) // 50))
    if steps:
        main.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
        main.plot(steps, smooth, color="tab:blue", linewidth=1.6, label=f"train, now {smooth[-1]:.3f}")
    if val_steps:
        marker = "o" if len(val_steps) <= 60 else None
        main.plot(val_steps, val_losses, color="tab:orange", marker=marker, markersize=4, label=f"validation, now {val_losses[-1]:.3f}")
    for (name, value), color in zip((references or {}).items(), ("tab:green", "tab:red", "tab:purple", "tab:brown") * 9, strict=False):
        main.axhline(value, color=color, linestyle="--", linewidth=1.1, label=f"{name}, {value:.3f}")
    main.set(title=title, ylabel="loss (nats per token)")
    main.set_ylim(*_loss_range(smooth, val_losses, list((references or {}).values())))
    main.legend(loc="upper right", fontsize="small")
    for axis, name in zip(axes[1:], small, strict=True):
        axis.plot(*_series(lines, name), color="tab:gray", linewidth=1.0)
        axis.set_ylabel(name.replace("_", " "))
    if "grad_norm" in small and min(_series(lines, "grad_norm")[1]) > 0:
        axes[-1].set_yscale("log")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    lost = sum(isinstance(line.get("loss"), float) and not math.isfinite(line["loss"]) for line in lines)
    axes[-1].set_xlabel(f"step ({lost} losses were NaN or infinite and are not drawn)" if lost else "step")
    Path(png_path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png_path, dpi=140)
    plt.close(figure)


def _series(lines: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """The finite values of a metric and their steps."""
    found = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), int | float) and math.isfinite(line[name])]
    return [step for step, _ in found], [float(value) for _, value in found]


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    """The mean of the last `width` values at each point (of fewer at the start)."""
    return [sum(values[max(0, i - width + 1) : i + 1]) / (i - max(0, i - width + 1) + 1) for i in range(len(values))]


def _loss_range(smooth: list[float], val_losses: list[float], references: list[float]) -> tuple[float, float]:
    """From the lowest thing to show to where the curve begins, so that one early spike does not flatten the rest."""
    shown = [*smooth, *val_losses, *references]
    low, high = min(shown), max([*smooth[:1], *val_losses[:1], *references])
    high = max(high, sorted(shown)[int(0.99 * (len(shown) - 1))])
    margin = 0.05 * (high - low) or 0.1
    return low - margin, high + margin
