import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from train import runtime
from train.runtime import (
    MALLOC,
    XLA_FLAGS,
    Machine,
    cache_root,
    choose_device,
    compilation_cache,
    device_facts,
    measure_matmul_peak,
    memory_in_use,
    nvidia_attached,
    peak_flops,
    read_machine,
    settings,
    tpu_attached,
)

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
        ({"jaxlib": "0.11.0"}, "XLA_FLAGS", "no flags are known to be valid for jaxlib 0.11.0"),
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
        ({}, {"cpu_flags": frozenset({"avx2"})}, "avx512_bf16"),
    ],
)
def test_nothing_is_set_where_the_cpu_does_not_work_or_is_another(environ: dict, changes: dict, words: str) -> None:
    advice = settings(environ, machine(**changes))
    assert advice.environ == {}
    assert words in advice.malloc
    assert words in advice.xla


def test_the_cpu_of_a_gpu_machine_is_set_when_asked_for_by_name() -> None:
    assert settings({"JAX_PLATFORMS": "cpu"}, machine(accelerator="an NVIDIA GPU")).environ


def test_this_machine_is_read() -> None:
    here = read_machine()
    assert here.jaxlib == jax.lib.__version__
    assert here.system in ("Linux", "Darwin", "Windows")


def test_runtime_imports_no_jax() -> None:
    """Every start pays twice for what comes before `prepare`, `train/__init__.py` included."""
    code = "import sys, train.runtime; print('jax' in sys.modules)"
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
        "from train import runtime\nfrom train.runtime import Machine\n"
        f"runtime.read_machine = lambda *_: {whole}\nprint('starting')\nruntime.prepare()\n"
    )
    (tmp_path / "tiny/tell.py").write_text(
        "import json, sys\nfrom train.runtime import process_settings\nprint(sys.argv[1:], json.dumps(process_settings()))\n"
    )
    return tmp_path


def run_python(*arguments: str, cwd: Path = ROOT, **environ: str) -> subprocess.CompletedProcess:
    ours = ("ZMAJ_PREPARED", "ZMAJ_NO_PREPARE", "XLA_FLAGS", "GLIBC_TUNABLES", "JAX_PLATFORMS")
    clean = {name: value for name, value in os.environ.items() if name not in ours}
    environ = {**clean, "PYTHONPATH": f"{cwd}:{ROOT}", **environ}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environ, capture_output=True, text=True, timeout=60)


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


# ------------------------------------------------------------------------------------------------------------------ devices


def with_nvidia(root: Path) -> Path:
    (root / "proc/driver/nvidia/gpus/0000:01:00.0").mkdir(parents=True)
    return root


def with_google_card(root: Path, device: str) -> Path:
    card = root / "sys/bus/pci/devices/0000:00:04.0"
    card.mkdir(parents=True)
    (root / "dev/vfio").mkdir(parents=True)
    (card / "vendor").write_text("0x1ae0\n")
    (card / "device").write_text(device + "\n")
    return root


def test_attached_devices_are_seen(tmp_path: Path) -> None:
    assert not nvidia_attached(tmp_path)
    assert not tpu_attached(tmp_path)
    assert nvidia_attached(with_nvidia(tmp_path / "a"))
    assert tpu_attached(with_google_card(tmp_path / "b", "0x0063"))
    assert not tpu_attached(with_google_card(tmp_path / "c", "0x0042"))  # Google's network card


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if jax.default_backend() != "cpu":
        pytest.skip("tells what happens on a CPU")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)


@pytest.mark.usefixtures("on_cpu")
def test_auto_takes_the_cpu_of_a_plain_machine_and_refuses_that_of_a_gpu_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_cuda_plugin", lambda: None)
    assert choose_device("auto", root=tmp_path).platform == "cpu"
    assert choose_device("cpu", root=with_nvidia(tmp_path)).platform == "cpu"
    with pytest.raises(RuntimeError, match=r"which has an NVIDIA GPU.*`uv run --extra cuda .*`--device cpu`"):
        choose_device("auto", root=tmp_path)
    monkeypatch.setattr(runtime, "_cuda_plugin", lambda: "jax_cuda12_plugin")
    with pytest.raises(RuntimeError, match=r"is installed but did not start it \(`nvidia-smi`"):
        choose_device("auto", root=tmp_path)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert choose_device("auto", root=tmp_path).platform == "cpu"


@pytest.mark.usefixtures("on_cpu")
def test_a_device_that_is_not_there_is_refused_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_cuda_plugin", lambda: None)
    with pytest.raises(RuntimeError, match=r"device 'gpu' was asked for, but jax found only \['cpu'\].*no NVIDIA GPU either"):
        choose_device("gpu", root=tmp_path)
    with pytest.raises(RuntimeError, match=r"has an NVIDIA GPU. Install .*--extra cuda"):
        choose_device("gpu", root=with_nvidia(tmp_path))
    with pytest.raises(RuntimeError, match=r"has a TPU. Install .*--extra tpu"):
        choose_device("auto", root=with_google_card(tmp_path / "b", "0x005e"))


@pytest.mark.parametrize(
    ("device_kind", "tflops"),
    [
        ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v6 lite", 918),
    ],
)
def test_published_peaks(device_kind: str, tflops: float) -> None:
    peak = peak_flops(SimpleNamespace(platform="gpu", device_kind=device_kind))  # type: ignore[arg-type]
    assert peak.flops_per_s == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize("device_kind", ["NVIDIA L40", "NVIDIA GeForce RTX 4090 D", "NVIDIA H100 NVL", "Tesla T4"])
def test_a_device_that_is_not_listed_has_no_peak(device_kind: str) -> None:
    peak = peak_flops(SimpleNamespace(platform="gpu", device_kind=device_kind))  # type: ignore[arg-type]
    assert peak.flops_per_s is None
    assert device_kind in peak.source


def test_a_peak_that_the_user_knows_is_taken_and_must_be_a_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZMAJ_PEAK_FLOPS", "65e12")
    peak = peak_flops(SimpleNamespace(platform="gpu", device_kind="Tesla T4"))  # type: ignore[arg-type]
    assert (peak.flops_per_s, peak.source) == (65e12, "ZMAJ_PEAK_FLOPS")
    monkeypatch.setenv("ZMAJ_PEAK_FLOPS", "65 TFLOP/s")
    with pytest.raises(ValueError, match=r"ZMAJ_PEAK_FLOPS must be the FLOP/s of one device at best, .* got '65 TFLOP/s'"):
        peak_flops(jax.devices()[0])


def test_measured_peak_is_a_speed() -> None:
    peak = measure_matmul_peak(budget_s=0.4)
    assert peak.flops_per_s is not None
    assert 1e9 < peak.flops_per_s < 1e15
    assert peak.source.startswith("measured best matmul (")


def test_facts_are_json_and_memory_is_counted() -> None:
    facts = json.loads(json.dumps(device_facts()))
    assert facts["jax"] == jax.__version__
    assert facts["cpu_cores"] >= 1
    assert 1e7 < memory_in_use()["peak_bytes"] < 1e13


# -------------------------------------------------------------------------------------------------------------------- cache


def test_cache_follows_its_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ZMAJ_CACHE_DIR", raising=False)
    assert cache_root() == Path.home() / ".cache/zmaj-lm"
    monkeypatch.setenv("ZMAJ_CACHE_DIR", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
    try:
        folder = compilation_cache()
        assert jax.config.jax_persistent_cache_min_compile_time_secs == 0
        assert folder.parent == tmp_path / "jit"
        assert folder.is_dir()
        assert compilation_cache(tmp_path / "mine") == tmp_path / "mine"
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 7.0)
        monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "7")
        compilation_cache()
        assert jax.config.jax_persistent_cache_min_compile_time_secs == 7
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
        jax.config.update("jax_compilation_cache_dir", before)
