"""What must be set before a process begins: the malloc and XLA settings its processor likes.

`prepare` starts `python -m recipes.x` again with them, before jax is imported; `settings` says which they are and why, for a `Machine` as
`read_machine` finds it; `process_settings` tells, for the run's record, what is really in force.

Importing this module imports nothing but the standard library: `recipes/__init__.py` needs it before all else.
"""

import importlib.util
import json
import os
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from train.runtime import ROOT, cpu_flags, cuda_plugin, nvidia_attached, text_of, tpu_attached

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
XLA_FLAGS: dict[tuple[int, ...], tuple[str, ...]] = {(0, 10): _AVX512, (0, 12): (*_AVX512, _COMPACT)}
# A processor without those instructions was measured with jaxlib 0.10 alone: reductions kept out of YNNPACK take 8 to 12 % off a step.
PLAIN_XLA_FLAGS: dict[tuple[int, ...], tuple[str, ...]] = {(0, 10): ("--xla_cpu_experimental_ynn_fusion_type=-reduce",)}

_MEASURED = "avx512_bf16"  # the instructions of the processor on which all of these were measured
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
    known = XLA_FLAGS if _MEASURED in machine.cpu_flags else PLAIN_XLA_FLAGS
    if _MEASURED not in machine.cpu_flags:
        malloc = f"left alone: measured with {_MEASURED} only, which this processor lacks"
    elif reason := _no_huge_pages(machine):
        malloc = f"left alone: {reason}"
    elif "glibc.malloc.hugetlb=" in tunables:
        malloc = f"left alone: GLIBC_TUNABLES already has {tunables!r}"
    else:
        changes["GLIBC_TUNABLES"] = ":".join(filter(None, [tunables, MALLOC]))

    users = environ.get("XLA_FLAGS", "")
    release = _release(machine.jaxlib)
    if release not in known:
        xla = f"left alone: no flags are known to be good for jaxlib {machine.jaxlib} on this processor"
    elif users.strip() and not users.strip().startswith("--"):
        xla = f"left alone: XLA_FLAGS names a file, {users!r}"
    else:
        taken = {flag.partition("=")[0] for flag in users.split()}
        ours = [flag for flag in known[release] if flag.partition("=")[0] not in taken]
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
    huge_pages = text_of(root / "sys/kernel/mm/transparent_hugepage/enabled")
    mode = re.search(r"\[(\w+)\]", huge_pages)
    try:
        jaxlib = metadata.version("jaxlib")
    except metadata.PackageNotFoundError:
        jaxlib = None
    return Machine(
        system=platform.system(),
        arch=platform.machine(),
        cpu_flags=cpu_flags(root),
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
    if not {"avx2", _MEASURED} & machine.cpu_flags:
        return "measured with avx2 or more only, which this processor lacks"
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
    if nvidia_attached(root) and cuda_plugin():
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
