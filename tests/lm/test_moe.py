"""Experts: who is sent where, that nobody is dropped, and what keeps the router fair."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tiny import facts_of, packed_batch, tiny

import lm
from lm.flight import cast_linears
from lm.kernels import with_ops
from lm.moe import BALANCE, ROUTER_Z, ClampedSwiGLU, Experts, MoE, Router, router_losses, swiglu

EXPERTS, D_MODEL, D_FF = 5, 12, 14
KERNELS = ["reference", "cpu"]
ROUNDING = 3e-6  # fp32 sums of 14 numbers in another order, as a fraction of the largest


def moe(*, top_k=2, normalised=True, bias=False, glu=swiglu, seed=0):
    """All arrays random, biases too."""
    router = Router.init(D_MODEL, EXPERTS, top_k, normalised=normalised, bias=bias, std=0.5, key=jr.key(0))
    experts = Experts.init(D_MODEL, D_FF, EXPERTS, std=0.5, out_std=0.5, bias=bias, glu=glu, key=jr.key(1))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(0.5 * rng.standard_normal(leaf.shape), jnp.float32), MoE(router, experts))


@jax.jit
def output(layer, x, segments):
    """As one program: one operation after another, each would be compiled for each shape."""
    return layer(x, segments)


def every_expert(layer, x):
    """The definition: each expert computes each token, and what the router did not choose counts 0."""
    logits = x @ layer.router.weight.T + (0 if layer.router.bias is None else layer.router.bias)
    chosen = logits >= jnp.sort(logits, axis=-1)[..., -layer.router.top_k, None]
    weights = jnp.where(chosen, jax.nn.softmax(logits, axis=-1), 0)
    if layer.router.normalised:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)

    def of_all(linear, x):  # ... experts d_in -> ... experts d_out
        return jnp.einsum("...ei,eoi->...eo", x, linear.weight) + (0 if linear.bias is None else linear.bias)

    x = jnp.broadcast_to(x[..., None, :], (*x.shape[:-1], EXPERTS, x.shape[-1]))
    up = layer.experts.glu(of_all(layer.experts.gate_proj, x), of_all(layer.experts.up_proj, x))
    return jnp.sum(weights[..., None] * of_all(layer.experts.down_proj, up), axis=-2)


def assert_near(got, expected, fraction=ROUNDING):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=fraction * max(1e-3, float(jnp.abs(other).max())))


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(
    "changes",
    [{}, {"top_k": 1, "normalised": False}, {"top_k": 5}, {"top_k": 3, "normalised": False, "bias": True, "glu": ClampedSwiGLU(limit=0.8)}],
    ids=str,
)
def test_output_and_gradients_are_those_of_every_expert_weighted(changes, kernels):
    layer, x, weights = moe(**changes), *jr.normal(jr.key(2), (2, 2, 7, D_MODEL))

    def sent(layer, x):
        return jnp.sum(weights * with_ops(layer, lm.BACKENDS[kernels])(x, jnp.ones((7,), jnp.int32))[0])

    def all_of_them(layer, x):
        return jnp.sum(weights * every_expert(layer, x))

    got, expected = (jax.jit(jax.value_and_grad(run, (0, 1)))(layer, x) for run in (sent, all_of_them))
    assert_near(got, expected, 10 * ROUNDING)


SIZES = [(3, 1, 5, 0, 4), (13, 0, 0, 0, 0), (0, 0, 0, 0, 13), (0, 0, 0, 0, 0), (0, 2, 0, 1, 0), (1, 0, 0, 0, 0), (0, 0, 12, 1, 0)]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("rows", [13, 41])  # all of them sent, and some left over
def test_no_row_is_dropped_however_they_are_sent(rows, kernels):
    x, weight, dy = (np.asarray(jr.normal(jr.key(i), shape)) for i, shape in enumerate([(rows, 6), (5, 9, 6), (rows, 9)]))

    @jax.jit
    def run(x, weight, dy, sizes):
        y, back = jax.vjp(lambda x, weight: lm.BACKENDS[kernels].expert_linear(x, weight, sizes), x, weight)
        return y, *back(dy)

    for sizes in SIZES:
        y, dx, d_weight = np.zeros((rows, 9)), np.zeros((rows, 6)), np.zeros((5, 9, 6))
        for row, expert in enumerate(np.repeat(np.arange(5), sizes)):
            y[row], dx[row] = weight[expert] @ x[row], weight[expert].T @ dy[row]
            d_weight[expert] += np.outer(dy[row], x[row])
        assert_near(run(x, weight, dy, jnp.asarray(sizes)), (y, dx, d_weight))


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("rows", [1, 4])
def test_fewer_rows_than_experts(rows, kernels):
    layer, x = with_ops(moe(), lm.BACKENDS[kernels]), jr.normal(jr.key(rows), (rows, D_MODEL))
    assert_near(output(layer, x, jnp.ones(rows, jnp.int32))[0], jax.jit(every_expert)(layer, x))


def test_in_bf16_the_kernel_is_no_worse_than_the_reference():
    sizes = jnp.asarray([30, 2, 0, 50, 18])
    x, weight, dy = (jr.normal(jr.key(i), shape).astype(jnp.bfloat16) for i, shape in enumerate([(100, 24), (5, 40, 24), (100, 40)]))

    def run(ops, dtype):
        @jax.jit
        def both(x, weight, dy):
            y, back = jax.vjp(lambda x, w: ops.expert_linear(x, w, sizes), x, weight)
            return y, *back(dy)

        return [np.float32(each) for each in both(*(each.astype(dtype) for each in (x, weight, dy)))]

    exact = run(lm.REFERENCE, jnp.float32)
    plain, fast = (
        [np.abs(a - b).max() / np.abs(b).max() for a, b in zip(run(ops, jnp.bfloat16), exact, strict=True)]
        for ops in (lm.REFERENCE, lm.BACKENDS["cpu"])
    )
    assert min(plain) > 1e-4  # else this test compares nothing
    assert all(f < 1.5 * p for f, p in zip(fast, plain, strict=True)), (fast, plain)


def test_padding_is_sent_nowhere_and_counted_nowhere():
    layer, x = moe(), jr.normal(jr.key(3), (2, 7, D_MODEL))
    segments = jnp.asarray([[1, 1, 2, 2, 2, 0, 0], [0, 0, 0, 1, 1, 1, 1]])
    y, aux = output(layer, x, segments)
    other, other_aux = output(layer, jnp.where(segments[..., None] > 0, x, 1e3), segments)
    assert_near(other, y)
    assert_near(other_aux, aux)
    assert np.all(np.asarray(y)[np.asarray(segments) == 0] == 0)
    assert aux[BALANCE][1] == aux[ROUTER_Z][1] == 9
    alone, aux_alone = output(layer, x[segments > 0], jnp.ones(9, jnp.int32))
    assert_near(y[segments > 0], alone)
    assert_near(aux, aux_alone)


def test_the_tree_at_rest_is_differentiated_twice_and_mapped():
    layer, x = moe(), jr.normal(jr.key(4), (3, 7, D_MODEL))
    ones = jnp.ones(7, jnp.int32)
    assert_near(jax.jit(jax.vmap(lambda row: layer(row, ones)[0]))(x), output(layer, x, ones)[0])

    def loss(x):
        return jnp.sum(jnp.square(layer(x, ones)[0]))

    step = 1e-3 * jr.normal(jr.key(5), x.shape)

    def expected_loss(x):
        return jnp.sum(jnp.square(every_expert(layer, x)))

    slope, expected = (jax.jit(lambda x, step, f=f: jax.jvp(jax.grad(f), (x,), (step,))[1])(x, step) for f in (loss, expected_loss))
    assert_near(slope, expected, 1e-4)


# ------------------------------------------------------------------------------------------- what the router is to keep small


def test_the_balance_is_n_times_share_times_probability_and_z_is_log_z_squared():
    rng = np.random.default_rng(0)
    logits, real = rng.standard_normal((11, 5)).astype(np.float32), np.arange(11) % 4 != 2
    chosen = np.argsort(-logits, axis=1)[:, :2]
    aux = jax.jit(router_losses)(*map(jnp.asarray, (logits, chosen, real)))
    shares = np.array([np.mean([expert in row for row in chosen[real]]) for expert in range(5)])
    z = np.log(np.exp(logits).sum(1))[real]
    probabilities = (np.exp(logits[real]) / np.exp(z)[:, None]).mean(0)
    assert aux[BALANCE][1] == aux[ROUTER_Z][1] == real.sum()
    np.testing.assert_allclose(aux[BALANCE][0] / real.sum(), 5 * np.sum(shares * probabilities), rtol=1e-5)
    np.testing.assert_allclose(aux[ROUTER_Z][0], np.sum(z**2), rtol=1e-5)


def test_the_balance_is_least_where_all_experts_get_alike():
    even = jnp.zeros((6, 3)), jnp.asarray([[0, 1], [1, 2], [2, 0]] * 2)
    uneven = jnp.tile(jnp.asarray([9.0, 8.0, 0.0]), (6, 1)), jnp.asarray([[0, 1]] * 6)
    balances = [total / count for total, count in (router_losses(*each, jnp.ones(6, bool))[BALANCE] for each in (even, uneven))]
    np.testing.assert_allclose(balances[0], 2, rtol=1e-6)
    assert balances[1] > 2.9


def test_following_the_balance_alone_makes_the_router_fair():
    layer, x = moe(top_k=1), 1 + 0.5 * jr.normal(jr.key(6), (200, D_MODEL))  # a common part, which sends most tokens one way
    segments = jnp.ones(200, jnp.int32)

    @jax.jit
    @jax.value_and_grad
    def balance(router):
        total, count = MoE(router, layer.experts)(x, segments)[1][BALANCE]
        return total / count

    router = layer.router
    first, slope = balance(router)
    assert float(jnp.abs(slope.weight).max()) > 0
    for _ in range(60):
        last, slope = balance(router)
        router = jax.tree.map(lambda w, g: w - 0.1 * g, router, slope)
    assert first > 1.5
    assert last < 1 + 0.4 * (first - 1)


# ------------------------------------------------------------------------------------------- precision


def test_experts_are_cast_and_the_router_stays_fp32():
    model = tiny("gpt_oss")
    for changed in (lm.cast(model, jnp.bfloat16).blocks, cast_linears(model.blocks, jnp.bfloat16)):
        layer = changed[0].mlp
        assert {linear.weight.dtype for linear in (layer.experts.gate_proj, layer.experts.up_proj, layer.experts.down_proj)} == {
            jnp.dtype("bfloat16")
        }
        assert layer.experts.down_proj.bias.dtype == layer.router.weight.dtype == layer.router.bias.dtype == jnp.float32
        assert changed[0].attn.sinks.dtype == jnp.float32


def test_int8_refuses_experts_in_words():
    with pytest.raises(
        ValueError, match="holds the matrices of 5 experts in one leaf, and only single ones can be packed: cast the model to bf16 instead"
    ):
        lm.quantised(tiny("mixtral"))


def test_top_k_past_the_experts_is_refused():
    with pytest.raises(ValueError, match=r"top_k must lie between 1 and the number of experts \(5\), got 6"):
        moe(top_k=6)


def test_a_model_reports_its_routers_over_all_layers():
    model, batch = tiny("mixtral"), packed_batch()
    _, _, aux = jax.jit(lambda model: model.hidden(jnp.asarray(batch.tokens), facts_of(batch)))(model)
    assert set(aux) == set(model.aux_weights) == {BALANCE, ROUTER_Z}
    assert aux[BALANCE][1] == 3 * np.sum(batch.segments > 0)
    assert 2 <= aux[BALANCE][0] / aux[BALANCE][1] < 5


def test_active_parameters_leave_out_the_experts_a_token_is_not_sent_to():
    model = tiny("mixtral")
    per_expert = 3 * 24 * 28
    assert model.n_params - model.n_active_params == 3 * (5 - 2) * per_expert
    assert tiny("llama").n_active_params == tiny("llama").n_params
