"""A program compiled for a device that is not there, and the memory that it would take.

The compiler is the one that would run on the card: jax's CUDA plugin, which needs neither card nor driver to compile. It allocates nothing,
and its plan of the memory is that of a run, but for two things. It cannot try kernels out, so it takes Triton's matrix products where a run
may take cuBLAS's, whose work space is a little larger or smaller; and what the allocator loses between buffers is not in it.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from data.pipeline import Batch
from train.gpus import CARDS, check_gpu_compiler


@dataclass(frozen=True)
class Memory:
    """Bytes on one device while a program runs."""

    arguments: int
    outputs: int  # beside the arguments: those that take the place of a donated one are not counted
    temporaries: int  # all in between

    @property
    def peak(self) -> int:
        return self.arguments + self.outputs + self.temporaries


def target_device(target: str) -> jax.Device:
    """The device to compile for: a name of `train.gpus.CARDS`, or `cpu` for the processor of this machine.

    **Raises:** `DeviceError`, saying what to install, for a card whose compiler is not there.
    """
    if target == "cpu":
        return jax.devices("cpu")[0]
    check_gpu_compiler()
    config = CARDS[target].target_config
    return topologies.get_topology_desc(platform="cuda", target_config=config, topology="1x1x1").devices[0]


def compile_for(target: str, program: Any, *arguments: Any) -> Memory:
    """What a program takes on a device.

    **Arguments:**

    - `target`: as for `target_device`.
    - `program`: anything with `lower(*arguments)`: a `train.step.CompiledStep`, or a function under `jax.jit`.
    - `arguments`: trees of arrays, which may be abstract.
    """
    sharding = SingleDeviceSharding(target_device(target))
    placed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), arguments)
    found = program.lower(*placed).compile().memory_analysis()
    outputs = found.output_size_in_bytes - found.alias_size_in_bytes
    return Memory(found.argument_size_in_bytes, outputs, found.temp_size_in_bytes)


def abstract_batch(batch: int, seq: int) -> Batch:
    """The shapes of a batch, as `data.pipeline` makes them."""
    ids: Any = jax.ShapeDtypeStruct((batch, seq), jnp.int32)
    weights: Any = jax.ShapeDtypeStruct((batch, seq), jnp.float32)
    return Batch(tokens=ids, targets=ids, positions=ids, segments=ids, loss_weights=weights)
