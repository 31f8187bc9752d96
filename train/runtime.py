"""The hardware: which device there is, how fast it could be, how much memory it took.

`choose_device` finds the device, `device_facts` describes it, `peak_flops` says how fast it could be, `memory_in_use` how much it took.
`compilation_cache` keeps compiled programs between runs. This module and `train.gpus` are the only ones that know the hardware's name.

Importing this module imports nothing but the standard library: `train.process` needs it before all else.
"""

import importlib.util
import os
import platform
import re
import sys
import time
from dataclasses import dataclass
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import jax

ROOT = Path("/")  # where device files are looked for; tests point elsewhere

# ------------------------------------------------------------------------------------------------------------------ devices

# Google's PCI vendor number also stands on its network cards and disks, so the device's counts too (jax keeps this list).
_GOOGLE, _TPU_CHIPS = "0x1ae0", ("0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076")


class DeviceError(RuntimeError):
    """The device asked for cannot be used, or using another one would be a surprise."""


def nvidia_attached(root: Path = ROOT) -> bool:
    """Whether the machine has an NVIDIA GPU and its driver, jax's opinion aside."""
    gpus = root / "proc/driver/nvidia/gpus"
    return (root / "dev/nvidia0").exists() or (gpus.is_dir() and any(gpus.iterdir()))


def tpu_attached(root: Path = ROOT) -> bool:
    """Whether the machine has a TPU, jax's opinion aside."""
    if (root / "dev/accel0").exists():
        return True
    cards = (root / "sys/bus/pci/devices").glob("*") if (root / "dev/vfio").exists() else ()
    return any(text_of(card / "vendor").strip() == _GOOGLE and text_of(card / "device").strip() in _TPU_CHIPS for card in cards)


def choose_device(asked: Literal["auto", "cpu", "gpu", "tpu"] = "auto", *, root: Path = ROOT) -> "jax.Device":
    """The device to run on; call it before the first computation.

    **Arguments:**

    - `asked`: `'auto'` takes what jax takes, but refuses the CPU of a machine with a GPU or TPU that jax was not
      installed for: a mistake far more often than a wish. `'cpu'` insists on the CPU, `'gpu'` and `'tpu'` on those.
    - `root`: where the machine's device files are looked for.

    **Raises:** `RuntimeError`, saying what to install or which name to ask for, when the device asked for is not to be had."""
    import jax

    if asked == "auto":
        device: jax.Device = jax.devices()[0]
        told_so = os.environ.get("JAX_PLATFORMS", "").split(",")[0] == "cpu"
        if device.platform == "cpu" and not told_so:
            if nvidia_attached(root):
                raise DeviceError(f"jax runs on the CPU of this machine, which has an NVIDIA GPU. {_how_to_get('gpu')}")
            if tpu_attached(root):
                raise DeviceError(f"jax runs on the CPU of this machine, which has a TPU. {_how_to_get('tpu')}")
        return device

    if asked == "cpu":
        jax.config.update("jax_platforms", "cpu")  # heeded until the first computation
        if jax.default_backend() != "cpu":
            raise DeviceError(
                f"device 'cpu' was asked for, but jax has already started on {jax.default_backend()!r}: "
                "choose the device before the first computation, or start with JAX_PLATFORMS=cpu."
            )
        return jax.devices()[0]

    try:
        return jax.devices(asked)[0]
    except RuntimeError as error:
        found = f"jax found only {sorted({device.platform for device in jax.devices()})}"
        attached = nvidia_attached(root) if asked == "gpu" else tpu_attached(root)
        name = "an NVIDIA GPU" if asked == "gpu" else "a TPU"
        if attached:
            hint = f"The machine has {name}. {_how_to_get(asked)}"
        else:
            hint = f"The machine shows no {name.split(' ', 1)[1]} either: run elsewhere, or leave --device out."
        raise DeviceError(f"device {asked!r} was asked for, but {found}. {hint}") from error


def _how_to_get(platform_name: str) -> str:
    extra = {"gpu": "cuda", "tpu": "tpu"}[platform_name]
    insist = "or insist on the CPU with `--device cpu`."
    if cuda_plugin() if platform_name == "gpu" else importlib.util.find_spec("libtpu"):
        check = {"gpu": "`nvidia-smi` shows whether its driver is well", "tpu": "another process may hold it"}[platform_name]
        return f"jax's plugin for it is installed but did not start it ({check}; see jax's own warnings); {insist}"
    return f"Install jax's plugin for it, `uv run --extra {extra} python -m recipes...`, {insist}"


def cuda_plugin() -> str | None:
    return next((name for name in ("jax_cuda12_plugin", "jax_cuda13_plugin") if importlib.util.find_spec(name)), None)


def device_facts(device: "jax.Device | None" = None) -> dict[str, Any]:
    """Hardware and versions, for the run's record; JSON as it stands. Without `device`, of jax's first one."""
    import jax

    device = device or jax.devices()[0]
    packages = ("jax", "jaxlib", "equinox", "optax", "grain", "orbax-checkpoint", "numpy")
    interesting = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")
    flags = cpu_flags()
    return {
        "platform": device.platform,
        "device_kind": device.device_kind,
        "compute_capability": getattr(device, "compute_capability", None),  # of NVIDIA cards
        "device_count": jax.device_count(),
        "process_count": jax.process_count(),
        "memory_bytes": _memory_bytes(device),  # of one device; on a CPU, of the machine
        "cpu": _cpu_name(),
        "cpu_vendor": _cpu_vendor(),  # as its instruction set tells, "AuthenticAMD"; None: it does not
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu_flags": [flag for flag in interesting if flag in flags],
        "system": platform.platform(),
        "python": platform.python_version(),
        **{package.replace("-", "_"): metadata.version(package) for package in packages},
    }


def _memory_bytes(device: "jax.Device") -> int | None:
    if device.platform == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None
    return (device.memory_stats() or {}).get("bytes_limit")


def _cpu_name() -> str:
    named = re.search(r"^model name\s*:\s*(.+)$", text_of(ROOT / "proc/cpuinfo"), re.MULTILINE)
    return named[1] if named else platform.processor() or platform.machine()


def _cpu_vendor() -> str | None:
    named = re.search(r"^vendor_id\s*:\s*(.+)$", text_of(ROOT / "proc/cpuinfo"), re.MULTILINE)
    return named[1] if named else None


def cpu_flags(root: Path = ROOT) -> frozenset[str]:
    listed = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text_of(root / "proc/cpuinfo"), re.MULTILINE)  # x86, ARM
    return frozenset(listed[1].split()) if listed else frozenset()


def text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:  # absent, or not for us
        return ""


# -------------------------------------------------------------------------------------------------------------------- speed


@dataclass(frozen=True)
class Peak:
    """How fast one device can multiply matrices at best."""

    flops_per_s: float | None  # None: not known, and so no MFU
    source: str  # who says so


# Dense bf16 with fp32 accumulation, per jax device, as the makers publish it; where they quote 2:4 sparsity, half of it.
# The names are jax's `device_kind`, as regular expressions that must match in full: an 'L4' is not an 'L40', nor a
# '4090' a '4090 D'.
_AMPERE = "NVIDIA GA102 whitepaper v2.1, appendix A"
_HOPPER = "NVIDIA H100 Tensor Core GPU datasheet"
_TPU = "Google Cloud TPU documentation"
PEAKS: tuple[tuple[str, float, str], ...] = (
    (r"NVIDIA RTX A6000", 154.8e12, "NVIDIA RTX A6000 datasheet (309.7 sparse)"),
    (r"NVIDIA GeForce RTX 3090", 71e12, _AMPERE),
    (r"NVIDIA GeForce RTX 4090", 165.2e12, "NVIDIA Ada GPU architecture whitepaper, appendix A"),
    (r"NVIDIA A100\b.*", 312e12, "NVIDIA A100 Tensor Core GPU datasheet"),
    (r"NVIDIA L4", 121e12, "NVIDIA L4 datasheet (242 sparse)"),
    (r"NVIDIA L40S", 362e12, "NVIDIA L40S datasheet (733 sparse)"),
    (r"NVIDIA H100 PCIe", 756e12, _HOPPER + " (1,513 sparse)"),
    (r"NVIDIA H100( SXM.*)?( \d+GB HBM\d\w?)", 989.4e12, "NVIDIA H100 whitepaper, table 2 (SXM5)"),
    (r"NVIDIA H200", 989.4e12, "NVIDIA H200 datasheet (SXM, 1,979 sparse)"),
    (r"NVIDIA B200", 2250e12, "NVIDIA HGX B200 datasheet (36 PFLOPS sparse in eight)"),
    (r"TPU v4", 275e12, _TPU),
    (r"TPU v5 ?(lite|e)", 197e12, _TPU),
    (r"TPU v5p?", 459e12, _TPU),
    (r"TPU v6 ?(lite|e)", 918e12, _TPU),
)


def peak_flops(device: "jax.Device") -> Peak:
    """The most bf16 FLOP/s one device can do: what `ZMAJ_PEAK_FLOPS` says; else published for GPUs and TPUs, and of a CPU measured here,
    which takes up to 3 seconds."""
    if said := os.environ.get("ZMAJ_PEAK_FLOPS"):
        return Peak(_positive(said, "ZMAJ_PEAK_FLOPS"), "ZMAJ_PEAK_FLOPS")
    return measure_matmul_peak() if device.platform == "cpu" else published_peak(device.device_kind)


def _positive(said: str, name: str) -> float:
    try:
        number = float(said)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise ValueError(f"{name} must be the FLOP/s of one device at best, a number above 0 as in 154.8e12, got {said!r}")
    return number


def published_peak(device_kind: str) -> Peak:
    for name, flops_per_s, source in PEAKS:
        if re.fullmatch(name, device_kind):
            return Peak(flops_per_s, f"{source}: dense bf16")
    return Peak(None, f"no published peak is listed for {device_kind!r}: set ZMAJ_PEAK_FLOPS, or add it to PEAKS in train/runtime.py")


def measure_matmul_peak(budget_s: float = 2.5) -> Peak:
    """The fastest of many square matrix products on the default device, fp32 and bf16 operands, always accumulated in fp32.

    It is what the machine gave in this moment: neighbours on the same cores lower it."""
    import jax
    import jax.numpy as jnp

    dot = jax.jit(lambda a, b: jax.lax.dot(a, b, preferred_element_type=jnp.float32))
    trials = [(size, dtype) for size in (1024, 2048) for dtype in (jnp.float32, jnp.bfloat16)]
    best, what = 0.0, ""
    end = time.perf_counter() + budget_s
    for i, (size, dtype) in enumerate(trials):
        a = jnp.ones((size, size), dtype)
        dot(a, a).block_until_ready()  # compiled, and pages touched
        share = (end - time.perf_counter()) / (len(trials) - i)
        stop = time.perf_counter() + share
        while True:  # once at least, however long it took to compile
            begin = time.perf_counter()
            dot(a, a).block_until_ready()
            speed = 2 * size**3 / (time.perf_counter() - begin)
            if speed > best:
                best, what = speed, f"{jnp.dtype(dtype).name}, {size} x {size}"
            if time.perf_counter() > stop:
                break
    return Peak(best, f"measured best matmul ({what})")


# ---------------------------------------------------------------------------------------------------------- cache and memory


def cache_root() -> Path:
    """Where zmaj-lm keeps what it can make again: `ZMAJ_CACHE_DIR`, or `~/.cache/zmaj-lm`."""
    return Path(os.environ.get("ZMAJ_CACHE_DIR") or "~/.cache/zmaj-lm").expanduser()


def compilation_cache(folder: Path | None = None) -> Path:
    """Keep compiled programs for the next run; returns where.

    By default under `cache_root()/jit`, in a folder for this kind of processor: a home directory is often shared by
    unlike machines, and a program compiled for one may hold instructions the other lacks. Small programs are kept, too, unless the user's
    environment says from how many seconds on: a run has dozens of them, which together take seconds."""
    import jax

    if folder is None:
        kind = sha256(" ".join([_cpu_name(), *sorted(cpu_flags())]).encode()).hexdigest()[:8]
        folder = cache_root() / "jit" / f"{platform.machine()}-{kind}"
    folder.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return folder


def memory_in_use() -> dict[str, Any]:
    """`peak_bytes` so far, and `of` what: the fullest of this process's devices, or, where devices do not count (CPU),
    the whole process."""
    import jax

    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    known = [peak for peak in peaks if peak is not None]
    if known:
        return {"peak_bytes": max(known), "of": "device"}
    import resource  # Unix only

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "of": "process"}
