"""GPUs that are not there, as their compiler must know them: programs can be compiled for them all the same (`train.plan`)."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from train.runtime import DeviceError


@dataclass(frozen=True)
class Card:
    """A GPU, as its compiler must know it."""

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
