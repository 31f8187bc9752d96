"""What all tests share."""

import gc
import os
import sys
import tempfile
from pathlib import Path

from quick_xla import FLAGS

# Before JAX starts: no accelerator, so that tests mean the same everywhere.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Where bytecode is not to lie beside the sources, it lies elsewhere: else each process that tests start compiles some 2,000 modules anew.
if os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):
    bytecode = str(Path(tempfile.gettempdir()) / f"zmaj-tests-bytecode-{os.getuid()}")
    sys.pycache_prefix = os.environ.setdefault("PYTHONPYCACHEPREFIX", bytecode)
    sys.dont_write_bytecode = False

# What recipes compile in processes of their own is compiled once for all of them, on every worker of this run (`integration.recipe_runs`).
if "ZMAJ_TESTS_COMPILED" not in os.environ:
    compiled = tempfile.TemporaryDirectory(prefix="zmaj-tests-compiled-")  # gone with this process
    os.environ["ZMAJ_TESTS_COMPILED"] = compiled.name

# The peak of a CPU is measured at the start of each run, with all cores for 2.5 seconds.
os.environ.setdefault("ZMAJ_PEAK_FLOPS", "1e11")


def start_jax(*flags: str) -> None:
    """Start JAX with more XLA flags (the user's own word on one wins) and put the environment back: XLA reads it once, and the processes
    that tests start are to run as they would for a user."""
    users = os.environ.get("XLA_FLAGS")
    ours = [flag for flag in flags if flag.split("=")[0] not in (users or "")]
    os.environ["XLA_FLAGS"] = " ".join([*(users or "").split(), *ours])
    try:
        import jax

        jax.devices()
    finally:
        if users is None:
            os.environ.pop("XLA_FLAGS", None)
        else:
            os.environ["XLA_FLAGS"] = users


start_jax(*FLAGS)

import jax  # noqa: E402
import pytest  # noqa: E402
from tiny import tiny  # noqa: E402

# A recipe run in this process would have every later test write its programs to disk.
jax.config.update("jax_enable_compilation_cache", False)


LAST = ("lm", "train", "recipes", "data")  # folders of short files, the shortest at the end


def pytest_collection_modifyitems(items):
    """Whole stages first: a worker takes the next file when it is through with one, and none should begin with a long one at the end."""
    items.sort(key=lambda item: LAST.index(item.path.parent.name) if item.path.parent.name in LAST else -1)


@pytest.fixture(params=["gpt2", "llama", "qwen3", "zmaj"])
def model(request):
    return tiny(request.param)


MOST_MAPS = 1  # of 65,530 that Linux allows a process


@pytest.fixture(autouse=True, scope="module")
def few_compiled_programs():
    """Each program that XLA compiles for a CPU takes memory maps, and a process that has too many dies in the compiler: a worker that comes
    near forgets what it has compiled."""
    yield
    maps = Path("/proc/self/maps")
    if maps.is_file() and len(maps.read_text().splitlines()) > MOST_MAPS:
        jax.clear_caches()
        gc.collect()
