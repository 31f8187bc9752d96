import json
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from train import runtime
from train.runtime import (
    cache_root,
    choose_device,
    compilation_cache,
    device_facts,
    measure_matmul_peak,
    memory_in_use,
    nvidia_attached,
    peak_flops,
    published_peak,
    tpu_attached,
)

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
    monkeypatch.setattr(runtime, "cuda_plugin", lambda: None)
    assert choose_device("auto", root=tmp_path).platform == "cpu"
    assert choose_device("cpu", root=with_nvidia(tmp_path)).platform == "cpu"
    with pytest.raises(RuntimeError, match=r"which has an NVIDIA GPU.*`uv run --extra cuda .*`--device cpu`"):
        choose_device("auto", root=tmp_path)
    monkeypatch.setattr(runtime, "cuda_plugin", lambda: "jax_cuda12_plugin")
    with pytest.raises(RuntimeError, match=r"is installed but did not start it \(`nvidia-smi`"):
        choose_device("auto", root=tmp_path)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert choose_device("auto", root=tmp_path).platform == "cpu"


@pytest.mark.usefixtures("on_cpu")
def test_a_device_that_is_not_there_is_refused_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "cuda_plugin", lambda: None)
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
    assert published_peak(device_kind).flops_per_s == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize("device_kind", ["NVIDIA L40", "NVIDIA GeForce RTX 4090 D", "NVIDIA H100 NVL", "Tesla T4"])
def test_a_device_that_is_not_listed_has_no_peak(device_kind: str) -> None:
    peak = published_peak(device_kind)
    assert peak.flops_per_s is None
    assert device_kind in peak.source


def test_a_peak_that_the_user_knows_is_taken_and_must_be_a_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    a_card = SimpleNamespace(platform="gpu", device_kind="NVIDIA L4")
    monkeypatch.delenv("ZMAJ_PEAK_FLOPS")  # of these tests
    assert peak_flops(a_card) == published_peak("NVIDIA L4")  # type: ignore[arg-type]
    monkeypatch.setenv("ZMAJ_PEAK_FLOPS", "65e12")
    peak = peak_flops(a_card)  # type: ignore[arg-type]
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
