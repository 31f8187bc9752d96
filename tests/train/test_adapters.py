"""Training adapters: only they are trained, stored and differentiated, and what is frozen stays as it was, packed if it is packed."""

import re
from functools import lru_cache
from importlib import metadata

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tiny import packed_batch, tiny

import lm
from lm.base import leaves_by_path, role
from lm.flight import Flight
from train.adapters import AdapterConfig, abstract_adapted, adapted, trained_part
from train.checkpoint import Checkpoints
from train.optimizers import OptimizerConfig, build_optimizer
from train.process import XLA_FLAGS
from train.step import StepConfig, init_state, make_step

ADAMW = build_optimizer(OptimizerConfig(name="adamw"))


DORA = AdapterConfig(kind="dora", rank=5, base="nf4", dropout=0.1)
STEP = make_step(ADAMW, StepConfig(ratios_every=1), Flight(), lm.BACKENDS["cpu"], jr.key(5))  # one program, for one kind of state


def state_of(config, also=(), **options):
    model = adapted(tiny("llama", n_layers=1), config, key=jr.key(0))
    state = init_state(model, ADAMW, trainable=trained_part(model, config, also), **options)
    return jax.device_put(state, jax.devices()[0])  # committed to it, as what a checkpoint gives is: else the step is compiled twice


def run(state, steps):
    told = []
    for _ in range(steps):
        state, metrics = STEP(state, packed_batch(), 0.02)
        told.append(jax.device_get(metrics))
    return state, told


def test_a_batch_is_learned_by_adapters_over_a_base_that_stays():
    state = state_of(DORA, average=True)
    before = jax.tree.map(np.asarray, state.frozen)
    state, told = run(state, 30)
    assert told[-1]["loss"] < 0.8 * told[0]["loss"]
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(state.frozen), strict=True):
        np.testing.assert_array_equal(old, new)
    ratios = [metrics["update_ratio"] for metrics in told]
    assert set(ratios[0]) == {role(path) for path in leaves_by_path(state.trainable)}
    assert np.isnan(ratios[0]["attn.q_proj.up"])  # of an adapter that is nothing yet
    assert np.isfinite([ratios[0]["attn.q_proj.down"], ratios[1]["attn.q_proj.up"]]).all()


def test_the_optimizer_holds_nothing_of_what_is_frozen():
    state = state_of(AdapterConfig(rank=5, targets=("attn.q_proj",)), also=("norm.scale",))
    moments = {role(path.split("mu/")[1]) for path in leaves_by_path(state.optimizer) if "mu/" in path}
    assert moments == {"attn.q_proj.down", "attn.q_proj.up", "norm.scale"}
    assert len(jax.tree.leaves(state_of(AdapterConfig(kind="none")).frozen)) == 0


def test_what_cannot_be_trained_is_said():
    with pytest.raises(ValueError, match=r"packed \(Int8Rows\), and packed numbers are not trained: put adapters on"):
        init_state(lm.quantised(tiny("llama", n_layers=1)), ADAMW)
    with pytest.raises(ValueError, match="base 'nf4' is for weights that are not trained"):
        adapted(tiny("llama", n_layers=1), AdapterConfig(kind="none", base="nf4"), key=jr.key(0))


# ------------------------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_by_reference_holds_the_adapters_and_goes_on_as_if_nothing_had_been(tmp_path):
    state, _ = run(state_of(DORA, average=True), 2)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, state.items(by_reference=True), {"base": "named"})
        whole = state.items()
        on, told = run(jax.tree.map(jnp.array, state), 2)
        checkpoints.wait()
        fresh = state_of(DORA, average=True)  # its base made anew
        found = checkpoints.restore(jax.eval_shape(lambda each: each.items(by_reference=True), fresh))
        resumed, again = run(fresh.with_items(found.items, found.step), 2)
    assert [metrics["loss"] for metrics in again] == [metrics["loss"] for metrics in told]
    assert eqx.tree_equal(resumed, on)
    held = sum(leaf.size for leaf in jax.tree.leaves(found.items["trainable"]))
    assert held == sum(leaf.size for leaf in jax.tree.leaves(state.trainable)) < 0.5 * state.model.n_params
    assert "model" not in found.items
    assert eqx.tree_equal(fresh.with_items(whole, 2), state)  # a checkpoint with everything in it serves as well


# ------------------------------------------------------------------------------------------- the compiled program

WIDE = {"vocab": 61, "d_model": 96, "n_heads": 6, "n_kv_heads": 6, "head_dim": 16, "d_ff": 208, "context": 64}
RELEASE = tuple(map(int, metadata.version("jaxlib").split(".")[:2]))
ORDER = dict(flag.removeprefix("--").split("=") for flag in XLA_FLAGS.get(RELEASE, ()) if "scheduler" in flag)
LAYER_BYTES = 4 * (4 * 96 * 96 + 3 * 96 * 208)  # of its matrices, in fp32 as they are multiplied here


def abstract_state(config, n_layers):
    skeleton = eqx.filter_eval_shape(lambda: tiny("llama", n_layers=n_layers, **WIDE))
    model = abstract_adapted(skeleton, config)
    trained = trained_part(model, config)
    return eqx.filter_eval_shape(lambda model: init_state(model, ADAMW, trainable=trained), model)


@lru_cache
def compiled(config, n_layers, backend="cpu", layers="loop"):
    """The step for a state without numbers, its operations in the order that users have."""
    step = make_step(ADAMW, StepConfig(ratios_every=0), Flight(layers=layers), lm.BACKENDS[backend], jr.key(5))
    return step.lower(abstract_state(config, n_layers), packed_batch(vocab=61)).compile(compiler_options=ORDER)


def extra(kind, base, n_layers, **flight):
    """Temporary bytes of a step over a packed base beyond those of the same step with nothing to unpack."""
    steps = (compiled(AdapterConfig(kind=kind, rank=3, base=each), n_layers, **flight) for each in (base, "as_is"))
    packed, plain = (step.memory_analysis().temp_size_in_bytes for step in steps)
    return packed - plain


HEAVY = [
    pytest.param(kind, base, backend, layers, marks=pytest.mark.heavy)
    for kind, base in (("lora", "nf4"), ("lora", "int8"), ("dora", "nf4"), ("dora", "int8"))
    for backend, layers in (("reference", "loop"), ("cpu", "scan"), ("reference", "scan"))
]


@pytest.mark.parametrize(
    ("kind", "base", "backend", "layers"),
    [("lora", "nf4", "cpu", "loop"), ("lora", "int8", "cpu", "loop"), ("dora", "nf4", "cpu", "loop"), *HEAVY],
)
def test_a_packed_base_is_never_unpacked_whole(kind, base, backend, layers):
    found = extra(kind, base, 3, backend=backend, layers=layers)
    assert found < 2 * LAYER_BYTES, (found, LAYER_BYTES)  # two layers' matrices at most


@pytest.mark.heavy
@pytest.mark.parametrize(("kind", "base"), [("lora", "nf4"), ("lora", "int8"), ("dora", "nf4")])
def test_unpacking_takes_no_more_for_more_layers(kind, base):
    few, many = extra(kind, base, 3), extra(kind, base, 9)
    assert many - few < 2 * LAYER_BYTES, (few, many, LAYER_BYTES)


def products(config):
    """The shapes of weights among those of all products of a step's program, the right way up or transposed."""
    shapes = {"96,96", "96,208", "208,96", "61,96"}
    found = re.findall(r"= \w+\[([\d,]+)\]\S* (?:dot|custom-call)\(", compiled(config, 1).as_text())
    return shapes & {*found, *(",".join(reversed(shape.split(","))) for shape in found)}


@pytest.mark.parametrize(
    ("kind", "base"), [("lora", "as_is"), ("rslora", "as_is"), ("dora", "as_is"), ("lora", "int8"), ("lora", "nf4"), ("dora", "nf4")]
)
def test_no_gradient_of_a_frozen_weight_is_computed(kind, base):
    """Such a gradient is a product of the weight's shape; full training, the control, has one for each shape."""
    assert products(AdapterConfig(kind="none")) == {"96,96", "96,208", "208,96", "61,96"}
    found = products(AdapterConfig(kind=kind, rank=3, base=base))
    assert not found, found


def test_what_a_step_is_given_shrinks_with_what_is_trained_and_how_the_rest_is_kept():
    def n_bytes(**config):
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract_state(AdapterConfig(rank=3, **config), 3)))

    full, lora, half, int8, nf4 = [n_bytes(kind="none"), *(n_bytes(base=base) for base in ("as_is", "bfloat16", "int8", "nf4"))]
    assert full > 2.2 * lora > 1.5 * 2.2 * half > 1.5 * 2.2 * 1.2 * int8 > 1.5 * 2.2 * 1.2 * 1.05 * nf4
