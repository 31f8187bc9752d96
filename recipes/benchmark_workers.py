"""Processes that take turns, A B A B, for `recipes.benchmark`: so a neighbour on the machine slows all of those compared alike."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from train.logs import progress

ROOT = Path(__file__).parents[1]


class Worker:
    """A process that does a round of work when asked."""

    def __init__(self, command: Sequence[str], environ: dict[str, str]) -> None:
        self.command = command
        self.words = tempfile.TemporaryFile("w+")  # noqa: SIM115  # what it says on stderr: a pipe nobody reads would fill up
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.words, text=True
        )
        self.facts = self._answer()

    def round(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        self.words.seek(0)
        words = self.words.read().strip().splitlines()
        raise RuntimeError(f"a process of the benchmark ended: {' '.join(self.command)}\n" + "\n".join(words[-8:]))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.terminate()
        self.process.wait()


def users_environment() -> dict[str, str]:
    """As it was before this process was given its own settings (`train.process.prepare`): each worker finds its own."""
    prepared = {"ZMAJ_PREPARED", "GLIBC_TUNABLES", "XLA_FLAGS"} if "ZMAJ_PREPARED" in os.environ else set()
    return {name: value for name, value in os.environ.items() if name not in prepared}


def ours(spec: dict[str, Any], environ: dict[str, str] | None = None) -> Worker:
    return Worker([sys.executable, "-m", "recipes.benchmark_ours", json.dumps(spec)], users_environment() | (environ or {}))


def torchs(spec: dict[str, Any], python: Path | None) -> Worker:
    script = str(ROOT / "recipes" / "benchmark_torch.py")
    return Worker([str(python or sys.executable), script, json.dumps(spec)], users_environment())


@contextmanager
def together(workers: dict[str, Worker]) -> Iterator[dict[str, Worker]]:
    """Closed at the end, whatever happens."""
    with ExitStack() as closing:
        for worker in workers.values():
            closing.callback(worker.close)
        yield workers


def in_turns(workers: dict[str, Worker], rounds: int, title: str) -> dict[str, list[dict[str, Any]]]:
    """A B A B: the answers of each worker, round by round. The first round of each warms up and is not kept."""
    for worker in workers.values():
        worker.round()
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    with progress(title, rounds * len(workers)) as told:
        for number in range(rounds):
            for i, (name, worker) in enumerate(workers.items()):
                answers[name].append(worker.round())
                told(number * len(workers) + i + 1)
    return answers


def all_of(answers: list[dict[str, Any]], name: str = "seconds") -> list[float]:
    """What each step took, over all rounds."""
    return [time for answer in answers for time in answer[name]]


def median_of(answers: list[dict[str, Any]], name: str) -> float:
    """Over rounds."""
    return statistics.median(answer[name] for answer in answers)
