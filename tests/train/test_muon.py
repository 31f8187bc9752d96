"""Muon and NorMuon: what they make of matrices."""

import math

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tiny import tiny

from lm.base import leaves_by_path
from train.muon import orthogonalise, scale_by_muon
from train.optimizers import matrices

# ------------------------------------------------------------------------------------------- muon


def with_singular_values(values, columns, seed):
    rng = np.random.default_rng(seed)
    u, _ = np.linalg.qr(rng.normal(size=(len(values), len(values))))
    v, _ = np.linalg.qr(rng.normal(size=(columns, len(values))))
    return (u * values) @ v.T, u @ v.T


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e5])
@pytest.mark.parametrize(
    ("values", "columns"),
    [(np.linspace(1, 3, 12), 12), (np.linspace(0.5, 3, 9), 40), (np.geomspace(1, 1e-2, 10), 17), (np.ones(1), 5)],
    ids=["square", "wide", "ill-conditioned", "a row"],
)
def test_orthogonalise_brings_singular_values_near_1_and_keeps_the_directions(values, columns, scale):
    x, nearest = with_singular_values(values, columns, seed=3)
    y = np.asarray(jax.jit(orthogonalise)(jnp.asarray(scale * x, jnp.float32)[None])[0])
    found = np.linalg.svd(y, compute_uv=False)
    assert 0.6 < found.min() <= found.max() < 1.3, found
    # With exact directions the error is that of the singular values, at most 0.4 a direction; bf16 products add a little.
    assert np.linalg.norm(y - nearest) < 0.4 * math.sqrt(len(values))
    cosine = np.sum(y * nearest) / np.linalg.norm(y) / np.linalg.norm(nearest)
    assert cosine > 0.95


def test_orthogonalise_makes_nothing_of_nothing():
    np.testing.assert_array_equal(orthogonalise(jnp.zeros((2, 3, 5))), 0.0)


def muon_update(gradients, momentum=0.95, beta2=None):
    """The last update after a list of gradients."""
    optimizer = scale_by_muon(momentum, beta2=beta2)

    @jax.jit
    def run(gradients):
        state = optimizer.init(gradients[0])
        for gradient in gradients:
            update, state = optimizer.update(gradient, state)
        return update

    return run(gradients)


# Products have bf16 operands (8 bits), and five Newton-Schulz steps multiply a last-bit difference about tenfold.
BF16 = {"atol": 0.03, "rtol": 0.03}


def test_matrices_stacked_by_shape_move_as_each_alone():
    shapes = {"a": (6, 10), "b": (10, 6), "c": (6, 10), "d": (7, 7), "e": (3, 20)}
    gradients = [{name: jr.normal(jr.fold_in(jr.key(step), ord(name)), shape) for name, shape in shapes.items()} for step in range(2)]
    together = muon_update(gradients)
    for name, shape in shapes.items():
        assert together[name].shape == shape
        np.testing.assert_allclose(together[name], muon_update([{name: g[name]} for g in gradients])[name], **BF16)


@pytest.mark.parametrize("shape", [(3, 6, 10), (4, 10, 6)])
def test_experts_stacked_in_one_leaf_move_as_each_alone(shape):
    gradients = [{"experts": jr.normal(jr.key(step), shape), "same": jr.normal(jr.key(step + 5), (6, 10))} for step in range(2)]
    together = muon_update(gradients)["experts"]
    assert together.shape == shape
    for e in range(shape[0]):
        np.testing.assert_allclose(together[e], muon_update([{"w": g["experts"][e]} for g in gradients])["w"], **BF16)


def test_experts_are_matrices_and_their_biases_are_not():
    model = tiny("gpt_oss")
    found = {path.removeprefix("blocks/0/") for path, is_one in leaves_by_path(matrices(model)).items() if is_one and "blocks/0" in path}
    maps = {f"attn/{name}_proj/weight" for name in "qkvo"} | {f"mlp/experts/{name}_proj/weight" for name in ("gate", "up", "down")}
    assert found == maps | {"mlp/router/weight"}


def test_a_matrix_transposed_has_its_update_transposed():
    g = jr.normal(jr.key(0), (6, 15))
    np.testing.assert_allclose(muon_update([{"w": g.T}])["w"].T, muon_update([{"w": g}])["w"], **BF16)


def test_muon_s_update_is_as_large_as_adamw_s_in_every_shape():
    """Root mean square 0.2 (arXiv:2502.16982), less or more as singular values miss 1: 0.7 … 1.2."""
    for shape in [(6, 10), (30, 4), (16, 16)]:
        rms = jnp.sqrt(jnp.mean(muon_update([{"w": 100 * jr.normal(jr.key(1), shape)}])["w"] ** 2))
        assert 0.2 * 0.7 < rms < 0.2 * 1.2, shape


def test_muon_s_momentum_is_nesterov_s():
    first, second = jr.normal(jr.key(0), (6, 10)), jr.normal(jr.key(1), (6, 10))
    looked_ahead = second + 0.7 * (second + 0.7 * first)
    expected = 0.2 * math.sqrt(10) * orthogonalise(looked_ahead[None])[0]
    np.testing.assert_allclose(muon_update([{"w": first}, {"w": second}], momentum=0.7)["w"], expected, **BF16)


# ------------------------------------------------------------------------------------------- normuon


def test_normuon_is_the_paper_s_written_out_with_our_momentum():
    """Li et al. 2025, algorithm 1: O = NS(momentum), v = β₂ v + (1 - β₂) mean of O² a row, O / √v at root mean square 0.2."""
    gradients = [jr.normal(jr.key(step), (10, 4)) for step in range(3)]
    update = muon_update([{"w": g} for g in gradients], momentum=0.7, beta2=0.9)["w"]
    velocity, squares = jnp.zeros((10, 4)), np.zeros((10, 1))
    for gradient in gradients:
        velocity = 0.7 * velocity + gradient
        direction = np.asarray(orthogonalise((gradient + 0.7 * velocity).T[None])[0].T)
        squares = 0.9 * squares + 0.1 * np.mean(direction**2, axis=1, keepdims=True)
    even = direction / np.sqrt(squares)
    np.testing.assert_allclose(update, 0.2 * even / np.sqrt(np.mean(even**2)), **BF16)


@pytest.mark.parametrize("shape", [(10, 4), (3, 10, 4)])
def test_normuon_s_first_update_is_as_large_in_every_neuron(shape):
    """v is then (1 - β₂) times the row's own mean square, so every row has the root mean square of the whole: 0.2."""
    update = muon_update([{"w": jr.normal(jr.key(0), shape)}], beta2=0.95)["w"]
    np.testing.assert_allclose(np.sqrt(np.mean(np.square(update), axis=-1)), 0.2, rtol=1e-3)
    plain = muon_update([{"w": jr.normal(jr.key(0), shape)}])["w"]
    assert np.ptp(np.sqrt(np.mean(np.square(plain), axis=-1))) > 0.02


def test_the_experts_of_a_leaf_are_normalised_apart():
    first, second = jr.normal(jr.key(0), (10, 4)), 100 * jr.normal(jr.key(1), (10, 4))
    together = muon_update([{"w": jnp.stack([first, second])}], beta2=0.95)["w"]
    np.testing.assert_allclose(together[1], muon_update([{"w": second}], beta2=0.95)["w"], **BF16)
