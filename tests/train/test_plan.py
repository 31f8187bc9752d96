"""Compiling for a device that is not there."""

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
import pytest
from targets import skip_without_compiler
from tiny import packed_batch, tiny

import lm
from lm.flight import Flight
from train.gpus import check_gpu_compiler
from train.optimizers import OptimizerConfig, build_optimizer
from train.plan import abstract_batch, compile_for
from train.runtime import DeviceError
from train.step import StepConfig, init_state, make_step

BATCH, SEQ = 2, 13


@pytest.fixture(params=["cpu", "h100", "a6000"])
def target(request):
    skip_without_compiler(request.param)
    return request.param


def adamw_step():
    optimizer = build_optimizer(OptimizerConfig(name="adamw"))
    state = jax.eval_shape(lambda: init_state(tiny("llama"), optimizer))
    return state, make_step(optimizer, StepConfig(), Flight(), lm.REFERENCE, jr.key(0))


def test_an_abstract_batch_has_the_shapes_of_a_real_one():
    told, real = abstract_batch(BATCH, SEQ), packed_batch(BATCH, SEQ)
    assert [(leaf.shape, leaf.dtype) for leaf in told] == [(leaf.shape, leaf.dtype) for leaf in real]


def test_arguments_are_twelve_bytes_a_parameter_and_the_batch_and_outputs_take_their_place(target):
    state, step = adamw_step()
    memory = compile_for(target, step, state, abstract_batch(BATCH, SEQ))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.trainable))
    batch = 5 * BATCH * SEQ * 4
    rest = memory.arguments - 12 * parameters - batch
    statistics = sum(leaf.nbytes for leaf in jax.tree.leaves(eqx.filter(state.stats, lambda leaf: hasattr(leaf, "nbytes"))))
    assert 0 <= rest - statistics <= 64 + 0.02 * memory.arguments, "counters, rates, and what the compiler adds to round sizes up"
    assert memory.outputs < 12 * parameters / 4, "the new state is written over the old one"
    assert memory.peak == memory.arguments + memory.outputs + memory.temporaries


def test_temporaries_grow_with_the_batch_and_shrink_with_recomputing(target):
    optimizer = build_optimizer(OptimizerConfig(name="adamw"))
    state = jax.eval_shape(lambda: init_state(tiny("llama"), optimizer))

    def temporaries(batch: int, remat: str) -> int:
        step = make_step(optimizer, StepConfig(), Flight(layers="scan", remat=remat), lm.BACKENDS["xla"], jr.key(0))
        return compile_for(target, step, state, abstract_batch(batch, 64)).temporaries

    small, large, recomputed = temporaries(2, "none"), temporaries(32, "none"), temporaries(32, "full")
    assert small < large
    assert recomputed < large


def test_a_program_is_compiled_but_not_run_for_the_target(target):
    array = jax.ShapeDtypeStruct((1 << 20, 1 << 12), np.float32)  # 17 GB
    memory = compile_for(target, jax.jit(lambda x: x.sum(axis=0)), array)
    assert memory.arguments == 4 << 32
    assert memory.outputs == 4 << 12
    assert memory.temporaries < 1 << 28


def test_a_card_without_its_compiler_says_what_to_install(monkeypatch):
    monkeypatch.setattr("train.gpus._installed", lambda package: package != "nvidia-cuda-nvcc-cu12")
    with pytest.raises(DeviceError, match="needs nvidia-cuda-nvcc-cu12, not installed here: run `uv sync --extra plan`"):
        compile_for("h100", jax.jit(lambda x: x), np.zeros(3))
    monkeypatch.setattr("train.gpus._installed", lambda package: package != "nvidia-cudnn-cu12")
    with pytest.raises(DeviceError, match="with cuDNN needs nvidia-cudnn-cu12, not installed here: run `uv sync --extra cuda`"):
        check_gpu_compiler(cudnn=True)
