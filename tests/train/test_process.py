import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from train.process import MALLOC, XLA_FLAGS, Machine, read_machine, settings

ROOT = Path(__file__).parents[2]
FLAGS = " ".join(XLA_FLAGS[(0, 10)])


def machine(**changes: object) -> Machine:
    """One that gets every setting, but for the changes."""
    whole = {
        "system": "Linux",
        "arch": "x86_64",
        "cpu_flags": frozenset({"avx2", "avx512_bf16"}),
        "glibc": (2, 36),
        "huge_pages": "madvise",
        "jaxlib": "0.10.2",
        "accelerator": None,
    }
    return Machine(**(whole | changes))  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------------------- settings


def test_settings_of_a_machine_that_has_everything() -> None:
    assert settings({}, machine()).environ == {"GLIBC_TUNABLES": MALLOC, "XLA_FLAGS": FLAGS}


def test_the_users_settings_stay_and_win() -> None:
    users = {"GLIBC_TUNABLES": "glibc.malloc.arena_max=2", "XLA_FLAGS": "--xla_cpu_prefer_vector_width=256 --xla_dump_to=/x"}
    merged = settings(users, machine()).environ
    assert merged["GLIBC_TUNABLES"] == f"glibc.malloc.arena_max=2:{MALLOC}"
    ours = [flag for flag in XLA_FLAGS[(0, 10)] if "vector_width" not in flag]
    assert merged["XLA_FLAGS"].split() == [*ours, "--xla_cpu_prefer_vector_width=256", "--xla_dump_to=/x"]
    assert settings({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, machine(jaxlib="0.99.0")).environ == {}
    assert "XLA_FLAGS" not in settings({"XLA_FLAGS": "flags.txt"}, machine()).environ


def test_settings_once_made_are_not_made_again() -> None:
    assert settings(settings({}, machine()).environ, machine()).environ == {}


@pytest.mark.parametrize(
    ("changes", "variable", "words"),
    [
        ({"glibc": (2, 31)}, "GLIBC_TUNABLES", "glibc 2.35 or later, found 2.31"),
        ({"glibc": None}, "GLIBC_TUNABLES", "found none"),
        ({"huge_pages": "never"}, "GLIBC_TUNABLES", "transparent_hugepage is 'never'"),
        ({"jaxlib": "0.11.0"}, "XLA_FLAGS", "no flags are known to be good for jaxlib 0.11.0"),
    ],
)
def test_a_setting_left_alone_says_why(changes: dict, variable: str, words: str) -> None:
    advice = settings({}, machine(**changes))
    assert set(advice.environ) == {"GLIBC_TUNABLES", "XLA_FLAGS"} - {variable}
    assert words in (advice.malloc if variable == "GLIBC_TUNABLES" else advice.xla)


@pytest.mark.parametrize(
    ("environ", "changes", "words"),
    [
        ({"JAX_PLATFORMS": "cuda,cpu"}, {}, "JAX_PLATFORMS=cuda,cpu picks another device"),
        ({}, {"accelerator": "an NVIDIA GPU"}, "an NVIDIA GPU does the work"),
        ({}, {"arch": "aarch64"}, "this is Linux aarch64"),
        ({}, {"system": "Darwin", "arch": "arm64"}, "this is Darwin arm64"),
        ({}, {"cpu_flags": frozenset({"sse4_2"})}, "avx2 or more only"),
    ],
)
def test_nothing_is_set_where_the_cpu_does_not_work_or_is_another(environ: dict, changes: dict, words: str) -> None:
    advice = settings(environ, machine(**changes))
    assert advice.environ == {}
    assert words in advice.malloc
    assert words in advice.xla


def test_a_processor_without_bf16_gets_what_was_measured_without_it() -> None:
    advice = settings({}, machine(cpu_flags=frozenset({"avx2"}), jaxlib="0.10.2"))
    assert advice.environ == {"XLA_FLAGS": "--xla_cpu_experimental_ynn_fusion_type=-reduce"}
    assert "which this processor lacks" in advice.malloc
    newer = settings({}, machine(cpu_flags=frozenset({"avx2"}), jaxlib="0.12.0"))
    assert newer.environ == {}
    assert "no flags are known to be good for jaxlib 0.12.0" in newer.xla


def test_the_cpu_of_a_gpu_machine_is_set_when_asked_for_by_name() -> None:
    assert settings({"JAX_PLATFORMS": "cpu"}, machine(accelerator="an NVIDIA GPU")).environ


def test_this_machine_is_read() -> None:
    here = read_machine()
    assert here.jaxlib == jax.lib.__version__
    assert here.system in ("Linux", "Darwin", "Windows")


def test_importing_it_imports_no_jax() -> None:
    """Every start pays twice for what comes before `prepare`, `train/__init__.py` included."""
    code = "import sys, train.process; print('jax' in sys.modules)"
    assert run_python("-c", code, cwd=ROOT).stdout.strip() == "False"


def test_flags_in_the_table_are_known_to_this_jaxlib() -> None:
    """An unknown flag aborts the process."""
    flags = XLA_FLAGS.get(tuple(map(int, jax.lib.__version__.split(".")[:2])))
    if flags is None:
        pytest.skip(f"none are listed for jaxlib {jax.lib.__version__}")
    done = run_python("-c", "import jax; jax.devices('cpu'); print('ok')", XLA_FLAGS=" ".join(flags), JAX_PLATFORMS="cpu")
    assert done.stdout.strip() == "ok", done.stderr


# ------------------------------------------------------------------------------------------------------------------ prepare


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package that prepares as `recipes` does, for a machine that has everything, and a module that tells what became of it."""
    (tmp_path / "tiny").mkdir()
    whole = repr(machine())
    (tmp_path / "tiny/__init__.py").write_text(
        "from train import process\nfrom train.process import Machine\n"
        f"process.read_machine = lambda *_: {whole}\nprint('starting')\nprocess.prepare()\n"
    )
    (tmp_path / "tiny/tell.py").write_text(
        "import json, sys\nfrom train.process import process_settings\nprint(sys.argv[1:], json.dumps(process_settings()))\n"
    )
    return tmp_path


def run_python(*arguments: str, cwd: Path = ROOT, **environ: str) -> subprocess.CompletedProcess:
    ours = ("ZMAJ_PREPARED", "ZMAJ_NO_PREPARE", "XLA_FLAGS", "GLIBC_TUNABLES", "JAX_PLATFORMS")
    clean = {name: value for name, value in os.environ.items() if name not in ours}
    environ = {**clean, "PYTHONPATH": f"{cwd}:{ROOT}", **environ}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environ, capture_output=True, text=True, timeout=300)


linux = pytest.mark.skipif(sys.platform != "linux", reason="starts again on Linux only")


@linux
def test_dash_m_starts_again_once_with_settings_and_arguments(package: Path) -> None:
    done = run_python("-X", "dev", "-m", "tiny.tell", "--steps", "3 4", cwd=package)
    first, second, told = done.stdout.splitlines()
    assert (first, second) == ("starting", "starting")
    assert told.startswith("['--steps', '3 4']")
    assert f'"malloc": "{MALLOC}"' in told
    assert f'"xla_flags": "{FLAGS}"' in told
    assert '"prepared": true' in told


@linux
def test_the_users_tunables_are_told_whole(package: Path) -> None:
    told = run_python("-m", "tiny.tell", cwd=package, GLIBC_TUNABLES="glibc.malloc.arena_max=2").stdout.splitlines()[-1]
    assert f'"malloc": "glibc.malloc.arena_max=2:{MALLOC}"' in told


@linux
@pytest.mark.parametrize(
    ("arguments", "environ", "words"),
    [
        (["-m", "tiny.tell"], {"ZMAJ_NO_PREPARE": "1"}, "not set: ZMAJ_NO_PREPARE is set"),
        (["-c", "import tiny.tell"], {}, "not set: only `python -m recipes.<name>` sets it"),
        (["-m", "tiny.tell"], {"JAX_PLATFORMS": "cuda"}, "left alone: JAX_PLATFORMS=cuda picks another device"),
    ],
)
def test_a_process_that_does_not_start_again_says_why(package: Path, arguments: list, environ: dict, words: str) -> None:
    first, told = run_python(*arguments, cwd=package, **environ).stdout.splitlines()
    assert first == "starting"
    assert words in told
    assert '"prepared": false' in told
    assert '"malloc": ""' in told
