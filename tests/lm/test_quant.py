"""Packed weights: what rounding does to them, that products go through them both ways, and that a model of them generates."""

from statistics import NormalDist

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import logits_of, packed_batch, tiny

import lm
from lm.layers import Embedding, Linear
from lm.quant import INT8_MOST, NF4, DoubleScales, Int8Rows, Quantised, pack
from train.step import make_token_nats


def weight(rows=40, columns=24, dtype=jnp.float32):
    spread = np.logspace(-3, 2, rows)[:, None]  # rows of unlike size: one scale for all would lose the small ones
    return jnp.asarray(spread * np.random.default_rng(0).standard_normal((rows, columns)), dtype)


# All sizes differ; rows of 24 fill groups of 8, and not those of 10.
FORMS = [("int8", {}), ("int4", {"group": 8}), ("int4", {"group": 10}), ("nf4", {"group": 8}), ("nf4", {"group": 10, "double": True})]
each_form = pytest.mark.parametrize(("kind", "settings"), FORMS, ids=[f"{kind}{''.join(map(str, more.values()))}" for kind, more in FORMS])


def test_no_entry_moves_by_more_than_half_a_step_of_its_row():
    exact = weight()
    packed = Int8Rows.of(exact)
    step = np.abs(exact).max(axis=1, keepdims=True) / INT8_MOST
    assert (np.abs(packed.unpacked() - exact) <= 0.5001 * step).all()
    assert (np.abs(packed.values).max(axis=1) == INT8_MOST).all()  # the largest of each row uses the whole range


def test_a_row_of_zeros_stays_zero():
    packed = Int8Rows.of(weight().at[3].set(0.0))
    assert (packed.unpacked()[3] == 0).all()
    assert np.isfinite(packed.unpacked()).all()


@each_form
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rows_are_those_of_the_whole(dtype, kind, settings):
    packed = pack(weight(dtype=dtype), kind, **settings)
    assert packed.shape == (40, 24)
    tokens = jnp.asarray([[3, 39], [0, 7]])
    assert packed.rows(tokens).dtype == dtype
    np.testing.assert_array_equal(packed.rows(tokens), packed.unpacked()[tokens])


def test_int4_moves_no_entry_by_more_than_half_a_step_or_one_at_the_far_end():
    exact = np.asarray(weight())
    packed = pack(jnp.asarray(exact), "int4", group=8)
    groups = exact.reshape(40, 3, 8)
    steps = np.abs(np.asarray(packed.scales, np.float32))
    moved = np.abs(np.asarray(packed.unpacked()).reshape(groups.shape) - groups).max(axis=-1)
    assert (moved <= 1.01 * steps).all()  # what lies opposite the farthest entry may be cut off at 7 steps
    assert np.mean(moved <= 0.51 * steps) > 0.5
    assert (np.abs(groups).max(axis=-1) <= 8.05 * steps).all()


def test_int4_takes_the_better_of_two_scales():
    one_sided, even = np.array([8, 1, 2, 0, 3, 4, 5, 6.0]), np.array([7, -7, 3, -4, 1, 2, 6, -5.0])
    packed = pack(jnp.asarray([one_sided, even], jnp.float32), "int4", group=8)
    np.testing.assert_array_equal(packed.scales.astype(jnp.float32)[:, 0], [-1, 1])
    np.testing.assert_array_equal(packed.unpacked(), [one_sided, even])  # both exactly: with the other scale they would not be


def test_bytes_hold_two_halves_of_a_group():
    packed = pack(jnp.asarray([[0, 1, 2, 3, 4, 5, 7, -8]], jnp.float32), "int4", group=8)
    assert packed.scales[0, 0] == 1
    np.testing.assert_array_equal(packed.codes, [[8 | 12 << 4, 9 | 13 << 4, 10 | 15 << 4, 11 | 0 << 4]])


def test_nf4_takes_the_nearest_of_its_sixteen_numbers():
    rng = np.random.default_rng(0)
    exact = rng.standard_normal((40, 64)).astype(np.float32)
    packed = pack(jnp.asarray(exact), "nf4")
    most = np.abs(exact).max(axis=1, keepdims=True)
    nearest = NF4[np.abs(exact[..., None] / most[..., None] - NF4).argmin(axis=-1)] * most
    np.testing.assert_allclose(packed.unpacked(), nearest, rtol=1e-6)
    farthest = np.arange(40), np.abs(exact).argmax(axis=1)
    np.testing.assert_array_equal(packed.unpacked()[farthest], exact[farthest])


def test_the_sixteen_numbers_are_those_of_the_paper():
    """Quantiles of the normal law, eight on the side of 0 and above, seven below, brought to [-1, 1] (arXiv:2305.14314, appendix E; the
    offset is that of bitsandbytes, the mean of 1 - 1/30 and 1 - 1/32)."""
    quantile = np.vectorize(NormalDist().inv_cdf)
    offset = (1 - 1 / 30 + 1 - 1 / 32) / 2
    above, below = quantile(np.linspace(offset, 0.5, 9)[:-1]), -quantile(np.linspace(offset, 0.5, 8)[:-1])
    numbers = np.sort(np.concatenate([above, [0.0], below]))
    np.testing.assert_allclose(NF4, numbers / numbers.max(), atol=1e-6)


def test_double_quantisation_moves_scales_by_half_a_step_of_their_block():
    scales = jnp.asarray(np.random.default_rng(0).gamma(9.0, 0.01, (40, 13)), jnp.float32)  # 520: two blocks of 256 and a short one
    packed = DoubleScales.of(scales)
    assert packed.codes.shape == (3, 256)
    assert np.abs(packed.unpacked(scales.shape) - scales).max() <= 0.5001 * packed.factors.max()


def test_bytes_are_those_said():
    packed = {(kind, double): pack(jnp.ones((40, 64)), kind, double=double).n_bytes for kind, double in [("int4", False), ("nf4", False)]}
    assert packed == {("int4", False): 40 * 64 // 2 + 2 * 40 * 2, ("nf4", False): 40 * 64 // 2 + 4 * 40}
    assert pack(jnp.ones((512, 64)), "nf4", double=True).n_bytes == 512 * 64 // 2 + 512 + 4 * 2 + 4


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kind": "int3"}, "packed as int8, int4, nf4; got 'int3'"),
        ({"kind": "int8", "group": 32}, "one scale a row, not one for each 32"),
        ({"kind": "int4", "group": 7}, "an even number of entries"),
        ({"kind": "int4", "double": True}, "double quantisation is nf4's"),
    ],
)
def test_what_cannot_be_packed_is_said(settings, words):
    with pytest.raises(ValueError, match=words):
        pack(weight(), **settings)


# ------------------------------------------------------------------------------------------- products


@each_form
@pytest.mark.parametrize("rows", [1, 13])  # few rows have their own way on a CPU
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_products_and_their_gradients_are_those_with_the_unpacked_matrix(backend, rows, kind, settings):
    packed = pack(weight(), kind, **settings)
    x, dy = (jnp.asarray(np.random.default_rng(1).standard_normal((rows, n)), jnp.float32) for n in (24, 40))
    linear = lm.BACKENDS[backend].linear
    y, pull = jax.vjp(lambda x: linear(x, packed), x)
    matrix = np.asarray(packed.unpacked())
    np.testing.assert_allclose(y, x @ matrix.T, atol=2e-6 * np.abs(x @ matrix.T).max())
    np.testing.assert_allclose(pull(dy)[0], dy @ matrix, atol=2e-6 * np.abs(dy @ matrix).max())


def test_the_reference_can_be_differentiated_forwards():
    packed, x = pack(weight(), "nf4", group=8), jnp.ones((5, 24))
    _, pushed = jax.jvp(lambda x: lm.REFERENCE.linear(x, packed), (x,), (x,))
    np.testing.assert_allclose(pushed, x @ packed.unpacked().T, rtol=1e-4)


# ------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_a_model_of_int8_weights_is_nearly_the_model(name):
    model = tiny(name)
    packed = lm.quantised(model)
    matrices = [node for node in jax.tree.leaves(packed, is_leaf=lambda n: isinstance(n, Linear | Embedding)) if hasattr(node, "weight")]
    assert matrices
    assert all(isinstance(node.weight, Quantised) for node in matrices)
    tokens = jnp.asarray([[5, 3, 9, 11, 2]])
    exact, rounded = logits_of(model, tokens), logits_of(packed, tokens)
    deviation = float(jnp.sqrt(jnp.mean((rounded - exact) ** 2) / jnp.mean(exact**2)))
    assert 1e-4 < deviation < 0.05, deviation  # measured 0.01 to 0.02


@pytest.mark.parametrize("kind", ["int4", "nf4"])
def test_embedding_and_unembedding_keep_eight_bits(kind):
    packed = lm.quantised(tiny("llama", n_layers=1), kind, group=8, dtype=jnp.bfloat16)
    assert isinstance(packed.embed.weight, Int8Rows)
    assert isinstance(packed.unembed.weight, Int8Rows)
    assert packed.blocks[0].mlp.down_proj.weight.record() == {"kind": kind, "group": 8, "dtype": "bfloat16"} | (
        {} if kind == "int4" else {"double": False}
    )
    assert packed.n_params == tiny("llama", n_layers=1).n_params


@pytest.mark.parametrize(("kind", "backend"), [("int8", "reference"), ("int8", "cpu"), ("int4", "cpu"), ("nf4", "cpu")])
def test_it_generates_what_its_unpacked_weights_generate(kind, backend):
    packed = lm.quantised(tiny("llama", n_layers=1), kind)
    unpacked = jax.tree.map(
        lambda node: node.unpacked() if isinstance(node, Quantised) else node, packed, is_leaf=lambda node: isinstance(node, Quantised)
    )
    settings = {"max_new_tokens": 9, "ops": lm.BACKENDS[backend]}
    prompts = [[5, 3, 9], [7, 1, 2, 8, 4]]
    assert lm.generate(packed, prompts, **settings) == lm.generate(unpacked, prompts, **settings)


def test_packing_twice_changes_nothing_and_a_matrix_takes_a_quarter_of_the_bytes():
    once = lm.quantised(tiny("llama"))
    assert eqx.tree_equal(once, lm.quantised(once))
    packed = Int8Rows.of(weight())
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(packed)) == 40 * 24 + 4 * 40


def test_a_model_of_int8_weights_is_evaluated():
    model, batch = tiny("llama"), packed_batch()
    losses = []
    for each in (model, lm.quantised(model)):
        nats = make_token_nats(lm.Flight(dtype="bfloat16"), lm.BACKENDS["cpu"])(each, batch)
        losses.append(float(jnp.mean(nats)))
    assert 0 < abs(losses[1] - losses[0]) < 0.02 * losses[0], losses
