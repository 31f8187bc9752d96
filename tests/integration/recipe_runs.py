"""Running recipes as a user does: another process, with caches of its own and next to nothing of the tests' environment; or, where that is
not what is tested, the same module in this process."""

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

from quick_xla import FLAGS

from recipes import golden

ROOT = Path(__file__).parents[2]

# A model of a few thousand parameters whose runs still go through every stage. One model, so that it is compiled once.
SMALL = [
    *("--preset", "1m", "--vocab", "400", "--d-model", "32", "--n-layers", "2", "--d-ff", "48", "--dropout", "0.1"),
    *("--seq", "64", "--batch", "4", "--validate-rows", "8", "--report-samples", "3"),
]


def environment(cache: Path) -> dict[str, str]:
    """The user's, without what the tests set but for what saves them time, and with caches of their own. Compiled programs are shared with
    the other runs of these tests: the same small model is compiled once."""
    ours = ("JAX_", "XLA_", "GLIBC_", "ZMAJ_", "PYTEST_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    cache.mkdir(parents=True, exist_ok=True)
    if not (cache / "jit").exists():
        (cache / "jit").symlink_to(os.environ["ZMAJ_TESTS_COMPILED"])
    saving = {"XLA_FLAGS": " ".join(FLAGS), "ZMAJ_PEAK_FLOPS": "1e11"}
    return kept | {"ZMAJ_CACHE_DIR": str(cache), "JAX_PLATFORMS": "cpu"} | saving


def run_here(arguments: list[str], recipe: str = "pretrain_small") -> tuple[int, str]:
    """Exit status and all output of `python -m recipes.<recipe>`, without the seconds that a process takes to begin."""
    typed, sys.argv = sys.argv, [f"recipes/{recipe}.py", *map(str, arguments)]
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*found in sys.modules after import of package 'recipes'", category=RuntimeWarning)
            runpy.run_module(f"recipes.{recipe}", run_name="__main__")
    except SystemExit as left:
        return int(left.code or 0), said.getvalue()
    finally:
        sys.argv = typed
    return 0, said.getvalue()


def curve_of(run: Path, to: Path, metric: str = "loss") -> Path:
    """The reference curve of a run, with a narrow band, a step at a time."""
    return golden.main(golden.Config(runs=(run,), to=to, every=1, least=1e-3, metric=metric))


def left_at(run: Path) -> list[int]:
    """Where a run left its reference curve."""
    return json.loads((run / "results.json").read_text())["left_reference_curve_at"]


def start(arguments: list[str], cache: Path, recipe: str = "pretrain_small", **more: str) -> subprocess.Popen:
    """`more`: variables of the environment."""
    command = [sys.executable, "-m", f"recipes.{recipe}", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, env=environment(cache) | more, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(arguments: list[str], cache: Path, recipe: str = "pretrain_small", **more: str) -> tuple[int, str]:
    """Exit status and all output."""
    process = start(arguments, cache, recipe, **more)
    return finish(process)


def finish(process: subprocess.Popen) -> tuple[int, str]:
    """Wait, ten minutes at most, and leave nothing running."""
    try:
        output, _ = process.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, output


def corpus(folder: Path) -> Path:
    """Some 60 files of real Python."""
    library = Path(sysconfig.get_path("stdlib"))
    folder.mkdir(parents=True, exist_ok=True)
    for package in ("json", "email", "http", "logging", "html", "urllib", "xml", "importlib"):
        for file in sorted((library / package).rglob("*.py")):
            (folder / "_".join(file.relative_to(library).parts)).write_bytes(file.read_bytes())
    return folder
