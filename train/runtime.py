"""The process and the hardware: what must be set before the work begins, and what it runs on.

This is the only module that knows the hardware's name. `prepare` gives the process the malloc and XLA settings its
processor likes, before jax is imported; `process_settings` tells, for the run's record, what is really in force.
`choose_device` finds the device, `device_facts` describes it, `peak_flops` says how fast it could be, `memory_in_use`
how much it took. `compilation_cache` keeps compiled programs between runs.

Importing this module imports nothing but the standard library: `recipes/__init__.py` needs it before all else.
"""

import importlib.util
import json
import os
import platform
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import jax

ROOT = Path("/")  # where device files are looked for; tests point elsewhere

# ------------------------------------------------------------------------------------------------- settings of the process

# XLA frees and asks again for its whole scratch arena each step; in pages of 4 KiB the page faults alone are about a
# quarter of a training step. glibc 2.35 and later answer large requests in huge pages when told to.
MALLOC = "glibc.malloc.hugetlb=1"

# By jaxlib release, because an XLA flag that jaxlib does not know ends the process. All three were measured on an AVX-512
# processor with bf16 instructions, and together take about 7 % off a training step: wide vectors; reductions kept out of
# YNNPACK, which otherwise swallows norms and softmaxes whole and writes out their broadcasts; and row reductions left as
# one loop each.
_AVX512 = (
    "--xla_cpu_prefer_vector_width=512",
    "--xla_cpu_experimental_ynn_fusion_type=-reduce",
    "--xla_disable_hlo_passes=tree_reduction_rewriter",
)
# By default XLA orders a CPU's operations so that threads always find work, and so makes early what is wanted late. In the order that needs
# least memory a step of jaxlib 0.12 holds a sixth to a third less and is no slower (best times 4 % less); in 0.10 it was not faster.
_COMPACT = "--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"
XLA_FLAGS = {(0, 10): _AVX512, (0, 12): (*_AVX512, _COMPACT)}

_PREPARED, _NO_PREPARE = "ZMAJ_PREPARED", "ZMAJ_NO_PREPARE"


@dataclass(frozen=True)
class Machine:
    """What the settings depend on, gathered without importing jax."""

    system: str  # 'Linux', 'Darwin', ...
    arch: str  # 'x86_64', 'aarch64', ...
    cpu_flags: frozenset[str]  # instruction sets, as in /proc/cpuinfo
    glibc: tuple[int, ...] | None  # None: another libc
    huge_pages: str  # the kernel's mode: 'always', 'madvise', 'never' or 'absent'
    jaxlib: str | None  # version; None: not installed
    accelerator: str | None  # in words, when jax will pick one over the CPU


@dataclass(frozen=True)
class Settings:
    """What to set, and why each is set or left."""

    environ: dict[str, str]  # variables to change, merged with what the user had
    malloc: str  # in words
    xla: str  # in words


def prepare() -> None:
    """Start `python -m recipes.x` again with the settings its processor likes; in any other process do nothing.

    glibc reads its tunables from the environment the process was born with, so they can only be set by a second start.
    `ZMAJ_NO_PREPARE=1` switches this off. What the user set already stays as the user set it."""
    imported_by_dash_m = sys.argv[:1] == ["-m"]  # so it reads only while `python -m` looks for the module
    if not imported_by_dash_m or _PREPARED in os.environ or _switched_off(os.environ):
        return
    advice = settings(os.environ, read_machine())
    if advice.environ:
        notes = json.dumps({"malloc": advice.malloc, "xla": advice.xla})
        environ = {**os.environ, **advice.environ, _PREPARED: notes}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environ)


def settings(environ: Mapping[str, str], machine: Machine) -> Settings:
    """The settings for a machine, merged with the user's environment; a pure function, so that it can be tested."""
    if reason := _no_settings(environ, machine):
        return Settings({}, f"left alone: {reason}", f"left alone: {reason}")
    changes, malloc = {}, f"set: {MALLOC}"
    tunables = environ.get("GLIBC_TUNABLES", "")
    if reason := _no_huge_pages(machine):
        malloc = f"left alone: {reason}"
    elif "glibc.malloc.hugetlb=" in tunables:
        malloc = f"left alone: GLIBC_TUNABLES already has {tunables!r}"
    else:
        changes["GLIBC_TUNABLES"] = ":".join(filter(None, [tunables, MALLOC]))

    users = environ.get("XLA_FLAGS", "")
    release = _release(machine.jaxlib)
    if release not in XLA_FLAGS:
        xla = f"left alone: no flags are known to be valid for jaxlib {machine.jaxlib}"
    elif users.strip() and not users.strip().startswith("--"):
        xla = f"left alone: XLA_FLAGS names a file, {users!r}"
    else:
        taken = {flag.partition("=")[0] for flag in users.split()}
        ours = [flag for flag in XLA_FLAGS[release] if flag.partition("=")[0] not in taken]
        xla = f"set: {' '.join(ours)}" if ours else "left alone: XLA_FLAGS already has each of ours"
        if ours:
            changes["XLA_FLAGS"] = " ".join([*ours, *users.split()])
    return Settings(changes, malloc, xla)


def process_settings() -> dict[str, Any]:
    """What is in force in this process, and why, for the run's record.

    **Returns:**

    `malloc` and `xla_flags`: the settings the process really has, `""` for the defaults. `malloc_note` and `xla_note`:
    who set them, or why they were left alone. `prepared`: whether `prepare` started this process again."""
    prepared = os.environ.get(_PREPARED)
    if prepared:
        notes = json.loads(prepared)
    else:
        why = f"{_NO_PREPARE} is set" if _switched_off(os.environ) else "only `python -m recipes.<name>` sets it"
        advice = settings(os.environ, read_machine())
        notes = {
            "malloc": f"not set: {why}" if "GLIBC_TUNABLES" in advice.environ else advice.malloc,
            "xla": f"not set: {why}" if "XLA_FLAGS" in advice.environ else advice.xla,
        }
    return {
        "prepared": prepared is not None,
        "malloc": _tunables_at_birth(),
        "malloc_note": notes["malloc"],
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "xla_note": notes["xla"],
    }


def read_machine(root: Path = ROOT) -> Machine:
    libc, version = platform.libc_ver()
    huge_pages = _read(root / "sys/kernel/mm/transparent_hugepage/enabled")
    mode = re.search(r"\[(\w+)\]", huge_pages)
    try:
        jaxlib = metadata.version("jaxlib")
    except metadata.PackageNotFoundError:
        jaxlib = None
    return Machine(
        system=platform.system(),
        arch=platform.machine(),
        cpu_flags=_cpu_flags(root),
        glibc=_release(version) if libc == "glibc" else None,
        huge_pages=mode[1] if mode else "absent",
        jaxlib=jaxlib,
        accelerator=_accelerator(root),
    )


def _no_settings(environ: Mapping[str, str], machine: Machine) -> str | None:
    """Why this machine gets none of the CPU's settings, or None."""
    first_platform = environ.get("JAX_PLATFORMS", "").split(",")[0].strip()
    if first_platform not in ("", "cpu"):
        return f"JAX_PLATFORMS={environ['JAX_PLATFORMS']} picks another device than the CPU"
    if machine.accelerator and first_platform != "cpu":
        return f"{machine.accelerator} does the work, not the CPU"
    if (machine.system, machine.arch) != ("Linux", "x86_64"):
        return f"measured on Linux x86_64 only, this is {machine.system} {machine.arch}"
    if "avx512_bf16" not in machine.cpu_flags:
        return "measured with avx512_bf16 only, which this processor lacks"
    return None


def _no_huge_pages(machine: Machine) -> str | None:
    if machine.glibc is None or machine.glibc < (2, 35):
        found = ".".join(map(str, machine.glibc)) if machine.glibc else "none"
        return f"huge pages for malloc need glibc 2.35 or later, found {found}"
    if machine.huge_pages not in ("madvise", "always"):
        return f"the kernel's transparent_hugepage is {machine.huge_pages!r}; it must be 'madvise' or 'always'"
    return None


def _accelerator(root: Path) -> str | None:
    """The accelerator jax will pick by itself: its plugin is installed and it is attached."""
    if nvidia_attached(root) and _cuda_plugin():
        return "an NVIDIA GPU"
    if tpu_attached(root) and importlib.util.find_spec("libtpu"):
        return "a TPU"
    return None


def _switched_off(environ: Mapping[str, str]) -> bool:
    return environ.get(_NO_PREPARE, "") not in ("", "0")


def _tunables_at_birth() -> str:
    """GLIBC_TUNABLES as glibc read it when the process began; `os.environ` may have changed since."""
    try:
        entries = Path("/proc/self/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:  # not Linux
        return os.environ.get("GLIBC_TUNABLES", "")
    # Reading them, glibc writes a zero byte over each colon, so they stand here as entries of their own.
    tunables = [e.removeprefix("GLIBC_TUNABLES=") for e in entries if e.startswith(("GLIBC_TUNABLES=", "glibc."))]
    return ":".join(tunables)


def _release(version: str | None) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version or "")[:2])


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:  # absent, or not for us
        return ""


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
    return any(_read(card / "vendor").strip() == _GOOGLE and _read(card / "device").strip() in _TPU_CHIPS for card in cards)


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
    if _cuda_plugin() if platform_name == "gpu" else importlib.util.find_spec("libtpu"):
        check = {"gpu": "`nvidia-smi` shows whether its driver is well", "tpu": "another process may hold it"}[platform_name]
        return f"jax's plugin for it is installed but did not start it ({check}; see jax's own warnings); {insist}"
    return f"Install jax's plugin for it, `uv run --extra {extra} python -m recipes...`, {insist}"


def _cuda_plugin() -> str | None:
    return next((name for name in ("jax_cuda12_plugin", "jax_cuda13_plugin") if importlib.util.find_spec(name)), None)


def device_facts(device: "jax.Device | None" = None) -> dict[str, Any]:
    """Hardware and versions, for the run's record; JSON as it stands. Without `device`, of jax's first one."""
    import jax

    device = device or jax.devices()[0]
    packages = ("jax", "jaxlib", "equinox", "optax", "grain", "orbax-checkpoint", "numpy")
    interesting = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")
    flags = _cpu_flags()
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
    named = re.search(r"^model name\s*:\s*(.+)$", _read(ROOT / "proc/cpuinfo"), re.MULTILINE)
    return named[1] if named else platform.processor() or platform.machine()


def _cpu_vendor() -> str | None:
    named = re.search(r"^vendor_id\s*:\s*(.+)$", _read(ROOT / "proc/cpuinfo"), re.MULTILINE)
    return named[1] if named else None


def _cpu_flags(root: Path = ROOT) -> frozenset[str]:
    listed = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _read(root / "proc/cpuinfo"), re.MULTILINE)  # x86, ARM
    return frozenset(listed[1].split()) if listed else frozenset()


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
        while time.perf_counter() < stop:
            begin = time.perf_counter()
            dot(a, a).block_until_ready()
            speed = 2 * size**3 / (time.perf_counter() - begin)
            if speed > best:
                best, what = speed, f"{jnp.dtype(dtype).name}, {size} x {size}"
    return Peak(best, f"measured best matmul ({what})")


# ----------------------------------------------------------------------------------------------- cards that are not there


@dataclass(frozen=True)
class Card:
    """A GPU, as its compiler must know it: programs can be compiled for it where there is none (`train.plan`)."""

    device_kind: str  # jax's name for it
    capability: tuple[int, int]  # CUDA's
    memory_bytes: int  # as the driver tells
    memory_bytes_per_s: int
    cores: int  # streaming multiprocessors
    clock_ghz: float
    l2_bytes: int
    threads_per_core: int
    shared_bytes_per_core: int
    shared_bytes_per_block: int  # the most that a block can ask for

    @property
    def facts(self) -> dict[str, Any]:
        """What `device_facts` would say of it, as far as kernels are chosen by it."""
        return {"platform": "gpu", "device_kind": self.device_kind, "compute_capability": "{}.{}".format(*self.capability)}

    @property
    def target_config(self) -> str:
        """XLA's `GpuTargetConfigProto`, as text. The CUDA and cuDNN releases are those of the wheels that jax 0.10 and 0.12 take."""
        major, minor = self.capability
        extension = "feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""  # sm_90a and later have instructions of their own
        return f"""
            gpu_device_info {{
                cuda_compute_capability {{ major: {major} minor: {minor} {extension} }}
                core_count: {self.cores} fpus_per_core: 128 clock_rate_ghz: {self.clock_ghz}
                device_memory_size: {self.memory_bytes} memory_bandwidth: {self.memory_bytes_per_s} l2_cache_size: {self.l2_bytes}
                threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: {self.threads_per_core}
                registers_per_block_limit: 65536 registers_per_core_limit: 65536
                shared_memory_per_block: 49152 shared_memory_per_block_optin: {self.shared_bytes_per_block}
                shared_memory_per_core: {self.shared_bytes_per_core}
                block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
            }}
            platform_name: "CUDA"
            device_description_str: "{self.device_kind}"
            runtime_version {{ major: 12 minor: 9 patch: 0 }}
            dnn_version_info {{ major: 9 minor: 10 patch: 2 }}
        """


# The numbers are those of XLA's own list (openxla/xla, xla/backends/gpu/target_config/specs: h100_sxm, a6000).
CARDS = {
    "h100": Card("NVIDIA H100 80GB HBM3", (9, 0), 84_942_979_072, 3_352_320_000_000, 132, 1.98, 52_428_800, 2048, 233_472, 232_448),
    "a6000": Card("NVIDIA RTX A6000", (8, 6), 51_041_271_808, 768_096_000_000, 84, 1.8, 6_291_456, 1536, 102_400, 101_376),
}


def gpu_memory_share(environ: Mapping[str, str] | None = None) -> float:
    """The part of a GPU's memory that jax takes at its start, and has: three quarters, or what XLA_CLIENT_MEM_FRACTION says."""
    said = (os.environ if environ is None else environ).get("XLA_CLIENT_MEM_FRACTION", "")
    try:
        share = float(said or 0.75)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise ValueError(f"XLA_CLIENT_MEM_FRACTION must be a fraction of the GPU's memory, above 0 and at most 1, got {said!r}")
    return share


def check_gpu_compiler(*, cudnn: bool = False) -> None:
    """**Raises:** `DeviceError`, saying what to install, where nothing can be compiled for an NVIDIA GPU, or nothing of cuDNN's."""
    needed = {"plan": ["jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12"], "cuda": ["nvidia-cudnn-cu12"] if cudnn else []}
    for extra, packages in needed.items():
        if missing := [package for package in packages if not _installed(package)]:
            words = f"compiling for a GPU{' with cuDNN' if extra == 'cuda' else ''} needs {' and '.join(missing)}"
            raise DeviceError(f"{words}, not installed here: run `uv sync --extra {extra}` (Linux only)")


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


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
        kind = sha256(" ".join([_cpu_name(), *sorted(_cpu_flags())]).encode()).hexdigest()[:8]
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
