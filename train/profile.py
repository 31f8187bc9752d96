"""Where the time of a step goes: a trace of a few steps by JAX's profiler, and the operations that took longest.

`profiled` stands around `train.loop.steps`. The file it leaves opens in a browser at https://ui.perfetto.dev, which reads it there and
sends it nowhere; `longest_operations` makes a table of the same file, which the log shows at once.
"""

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from loguru import logger

SHOWN = 12  # rows of the table


def profiled(training: Iterable[tuple[Any, ...]], folder: Path, *, first: int, count: int) -> Generator[tuple[Any, ...], None, None]:
    """What `training` yields, unchanged, with `count` steps traced once `first` steps of this process are done: the first one compiles,
    which tells nothing of the others.

    The device is waited for before and after, so that the trace holds these steps whole and no part of others. What the caller does
    between them (validating, saving) is in it too. The trace also ends, and is told of, where an error passes or the caller leaves and
    closes the generator (`with contextlib.closing(...)`).

    **Arguments:**

    - `training`: `(done, state, ...)` after each step, as from `train.loop.steps`.
    - `folder`: gets `plugins/profile/TIME/perfetto_trace.json.gz`.
    """
    if first < 1 or count < 1:
        raise ValueError(f"a trace begins after 1 step or more (first is {first}) and is 1 step long or more (count is {count})")
    seen, traced, state = 0, 0, None
    tracing = False
    try:
        for after in training:
            done, state, *_ = after
            seen += 1
            traced += tracing
            if traced == count and tracing:
                tracing = False
                _end(folder, state, traced, count)
            yield after
            if seen == first:
                jax.block_until_ready(state)
                jax.profiler.start_trace(folder, create_perfetto_trace=True)
                tracing = True
                logger.info(f"tracing {count} steps after step {done}")
        if seen < first:
            logger.warning(f"nothing was traced: the run ended after {seen} steps, before the {first} that were to go first")
    finally:
        if tracing:
            _end(folder, state, traced, count)


def _end(folder: Path, state: Any, traced: int, count: int) -> None:
    """Stop, and say what came of it."""
    # After an error the state may have been donated to a step that failed; there is nothing to wait for then.
    alive = [leaf for leaf in jax.tree.leaves(state) if not (isinstance(leaf, jax.Array) and leaf.is_deleted())]
    try:
        jax.block_until_ready(alive)
    finally:  # a device that failed says so here
        jax.profiler.stop_trace()
    if traced < count:
        logger.warning(f"{traced} of {count} steps were traced: the run ended before the others")
    path = latest_trace(folder)
    where = f"trace: {path.resolve()}\n  open it at https://ui.perfetto.dev (the file stays on this machine)"
    logger.info("{}", f"{where}\n{table(longest_operations(path), max(traced, 1))}")


# ------------------------------------------------------------------------------------------- the table


class Operation(NamedTuple):
    """All operations of one kind, summed over steps and threads."""

    name: str  # XLA's, without the number at its end
    times: int
    self_s: float  # without the operations inside, as of a loop


def latest_trace(folder: Path) -> Path:
    """The newest trace under a folder that `profiled` was given."""
    found = sorted(folder.glob("plugins/profile/*/perfetto_trace.json.gz"), key=lambda path: path.stat().st_mtime_ns)
    if not found:
        raise ValueError(f"{folder} holds no trace (plugins/profile/*/perfetto_trace.json.gz): give the folder that `profiled` was given")
    return found[-1]


def longest_operations(path: Path) -> list[Operation]:
    """The device's operations in a trace, longest first. Those are the events that name an XLA operation (`hlo_op`); where a backend names
    none, the list is empty, and the file is still good to look at."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    threads: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event.get("ph") == "X" and "hlo_op" in event.get("args", {}):
            threads[event["pid"], event["tid"]].append(event)
    self_us: dict[str, float] = defaultdict(float)
    times: dict[str, int] = defaultdict(int)
    for thread in threads.values():
        around: list[tuple[float, str]] = []  # (end, kind) of the operations that this one stands in
        for event in sorted(thread, key=lambda event: (event["ts"], -event["dur"])):
            kind = re.sub(r"(\.\d+)+$", "", event["args"]["hlo_op"])
            while around and around[-1][0] <= event["ts"]:
                around.pop()
            if around:
                self_us[around[-1][1]] -= event["dur"]
            self_us[kind] += event["dur"]
            times[kind] += 1
            around.append((event["ts"] + event["dur"], kind))
    return sorted((Operation(kind, times[kind], us / 1e6) for kind, us in self_us.items()), key=lambda each: -each.self_s)


def table(operations: list[Operation], n_steps: int) -> str:
    """The longest operations as lines of text, per step."""
    if not operations:
        return "  no operation is named in it"
    total = sum(each.self_s for each in operations)
    lines = [f"  {'ms a step':>10} {'share':>6} {'times':>6}  operation, without those inside it ({n_steps} steps)"]
    for each in operations[:SHOWN]:
        lines.append(f"  {1e3 * each.self_s / n_steps:10.2f} {each.self_s / total:6.1%} {each.times / n_steps:6g}  {each.name}")
    if rest := operations[SHOWN:]:
        seconds = sum(each.self_s for each in rest)
        lines.append(f"  {1e3 * seconds / n_steps:10.2f} {seconds / total:6.1%} {'':6}  {len(rest)} other kinds")
    return "\n".join(lines)
