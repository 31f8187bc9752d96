import math

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tiny import tiny

from lm.base import leaves_by_path
from train.optimizers import OptimizerConfig, ScheduleConfig, build_optimizer, is_matrix, learning_rate, orthogonalise, scale_by_muon

MODEL = {"name": "qwen3", "attention_bias": True, "tied": False, "n_layers": 2}


def random_like(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), tree)


def directions(config, params, gradients):
    """The directions of several steps at the same parameters, as one program."""
    optimizer = build_optimizer(config)

    @jax.jit
    def run(params, gradients):
        state, out = optimizer.init(params), []
        for gradient in gradients:
            direction, state = optimizer.update(gradient, state, params)
            out.append(direction)
        return out, state

    return run(params, gradients)


# ------------------------------------------------------------------------------------------- adamw


def test_adamw_is_the_paper_s_written_out():
    """Loshchilov and Hutter 2019, algorithm 2, in float64 numpy, parameters moving."""
    config = OptimizerConfig(name="adamw", beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.3)
    rng = np.random.default_rng(0)
    params = {
        "embed": {"weight": rng.normal(size=(7, 3))},
        "blocks": ({"up": {"weight": rng.normal(size=(5, 4)), "bias": rng.normal(size=5)}},),
    }
    ours = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    optimizer = build_optimizer(config)
    state, update = optimizer.init(ours), jax.jit(optimizer.update)

    decay = {"embed": {"weight": 0.0}, "blocks": ({"up": {"weight": 0.3, "bias": 0.0}},)}
    mean = square = jax.tree.map(np.zeros_like, params)
    for step in range(1, 6):
        rate = 0.1 / step
        gradient = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape) * 0.01, params)
        mean = jax.tree.map(lambda m, g: 0.8 * m + 0.2 * g, mean, gradient)
        square = jax.tree.map(lambda v, g: 0.9 * v + 0.1 * g**2, square, gradient)
        params = jax.tree.map(
            lambda p, m, v, d, step=step, rate=rate: p - rate * (m / (1 - 0.8**step) / (np.sqrt(v / (1 - 0.9**step)) + 1e-3) + d * p),
            params, mean, square, decay,
        )  # fmt: skip
        direction, state = update(jax.tree.map(jnp.float32, gradient), state, ours)
        ours = jax.tree.map(lambda p, d, rate=rate: p - rate * d, ours, direction)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), ours, params)  # fp32 against float64


# ------------------------------------------------------------------------------------------- which leaf is whose


def matrices_by_hand():
    maps = [f"attn/{name}_proj" for name in "qkvo"] + [f"mlp/{name}_proj" for name in ("gate", "up", "down")]
    return {f"blocks/{layer}/{name}/weight" for layer in range(2) for name in maps}


def test_matrices_are_the_linear_maps_inside_blocks():
    leaves = leaves_by_path(tiny(**MODEL))
    assert {path for path, leaf in leaves.items() if is_matrix(path, leaf)} == matrices_by_hand()
    assert {"embed/weight", "unembed/weight", "norm/scale", "blocks/0/attn/q_proj/bias", "blocks/1/attn/k_norm/scale"} <= set(leaves)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weight_decay_pulls_on_the_matrices_and_nothing_else(name):
    params = tiny(**MODEL)
    zero = jax.tree.map(jnp.zeros_like, params)
    (direction,), _ = directions(OptimizerConfig(name=name, weight_decay=0.3), params, [zero])
    before = leaves_by_path(params)
    for path, leaf in leaves_by_path(direction).items():
        expected = 0.3 * before[path] if path in matrices_by_hand() else jnp.zeros_like(leaf)
        np.testing.assert_allclose(leaf, expected, rtol=1e-6, err_msg=path)


def test_muon_moves_the_matrices_and_adamw_the_rest():
    params = tiny(**MODEL)
    gradients = [random_like(params, seed) for seed in (1, 2)]
    (_, muon), state = directions(OptimizerConfig(name="muon"), params, gradients)
    (_, adamw), _ = directions(OptimizerConfig(name="adamw"), params, gradients)
    muon, adamw = leaves_by_path(muon), leaves_by_path(adamw)
    for path in muon:
        if path in matrices_by_hand():
            assert not np.allclose(muon[path], adamw[path], atol=0.1), path
        else:
            np.testing.assert_allclose(muon[path], adamw[path], rtol=1e-5, atol=1e-6, err_msg=path)
    momenta = [path for path in leaves_by_path(state) if "momentum" in path]
    assert {path[path.index("blocks/") :] for path in momenta} == matrices_by_hand()
    assert len(leaves_by_path(state)) == 14 + 2 * (len(muon) - 14) + 1  # a momentum a matrix, AdamW's two moments for the rest, its count


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


def muon_update(gradients, momentum=0.95):
    """The last update after a list of gradients."""
    optimizer = scale_by_muon(momentum)

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


# ------------------------------------------------------------------------------------------- schedules

SHAPES = ["linear", "cosine", "constant", "wsd"]


def rates(total, **settings):
    at = learning_rate(ScheduleConfig(**({"peak": 3.0} | settings)), total)
    return np.array([at(step) for step in range(total)])


@pytest.mark.parametrize("total", [1, 2, 7, 100])
@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.5, 0.99])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_rate_is_above_0_and_at_most_the_peak_and_the_peak_is_reached(shape, warmup, total):
    all_rates = rates(total, shape=shape, warmup=warmup)
    assert np.all(np.isfinite(all_rates))
    assert np.all(all_rates > 0)
    assert all_rates.max() == 3.0
    top = int(np.argmax(all_rates))
    assert np.all(np.diff(all_rates[: top + 1]) > 0)
    assert np.all(np.diff(all_rates[top:]) <= 0)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_warm_up_is_a_line_from_0_to_the_peak(shape):
    np.testing.assert_allclose(rates(100, shape=shape, warmup=0.1)[:10], 3.0 * np.arange(1, 11) / 10)


@pytest.mark.parametrize("final", [0.0, 0.25])
def test_after_the_warm_up_each_shape_is_itself(final):
    rest = {shape: rates(100, shape=shape, warmup=0.2, final=final, decay=0.3)[20:] / 3.0 for shape in SHAPES}
    np.testing.assert_array_equal(rest["constant"], 1.0)
    np.testing.assert_allclose(rest["linear"], 1 - (1 - final) * np.arange(80) / 80)
    np.testing.assert_allclose(rest["cosine"], final + (1 - final) * (1 + np.cos(np.pi * np.arange(80) / 80)) / 2)
    assert rest["cosine"][40] == pytest.approx((1 + final) / 2)
    np.testing.assert_array_equal(rest["wsd"][:51], 1.0)  # flat, and then 30 steps of falling
    np.testing.assert_allclose(rest["wsd"][50:], 1 - (1 - final) * np.arange(30) / 30)


@pytest.mark.parametrize("shape", ["linear", "cosine", "wsd"])
def test_the_last_step_is_one_short_of_the_final_rate(shape):
    at = learning_rate(ScheduleConfig(shape=shape, peak=3.0, final=0.1), 50)
    assert at(50) == pytest.approx(0.3)  # a step that is never taken
    assert 0.3 < at(49) < 0.7
