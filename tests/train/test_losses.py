"""The losses made in chunks are the plain formulas, gradients included, without the array that the plain formulas make."""

import math
import re
from functools import lru_cache

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

import lm
from train.losses import next_token, token_log_probs

VOCAB, D_MODEL = 31, 24
RUNS_HERE = ["reference", "xla", "cpu"]  # cudnn needs an NVIDIA card
CLOSE = {"rtol": 2e-5, "atol": 2e-6}  # fp32 sums in another order; entries are of order 1


def example(batch=(5,), seq=7, d_model=D_MODEL, vocab=VOCAB):
    """Hidden states, unembedding, targets and weights; some weights 0, some fractions."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(*batch, seq, d_model)).astype(np.float32)
    unembedding = (2 / math.sqrt(d_model) * rng.normal(size=(vocab, d_model))).astype(np.float32)
    targets = rng.integers(0, vocab, (*batch, seq)).astype(np.int32)
    weights = np.maximum(rng.uniform(-0.5, 1.0, (*batch, seq)), 0.0).astype(np.float32)
    return tuple(map(jnp.asarray, (hidden, unembedding, targets, weights)))


def plain_log_probs(hidden, unembedding, targets):
    log_p = jax.nn.log_softmax(hidden @ unembedding.T, axis=-1)
    return jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]


def plain_total(hidden, unembedding, targets, weights, z_loss):
    log_z = jax.nn.logsumexp(hidden @ unembedding.T, axis=-1)
    return jnp.sum(weights * (z_loss * log_z**2 - plain_log_probs(hidden, unembedding, targets)))


def value_and_gradients(loss, hidden, unembedding, *rest):
    return jax.jit(jax.value_and_grad(loss, (0, 1)))(hidden, unembedding, *rest)


def worst(one, other):
    """Largest error of any array, over its largest entry."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    # np.max, not max, lets a NaN through; a gradient may be all zeros (an unembedding nobody used).
    return np.max([np.abs(np.subtract(a, b)).max() / (np.abs(b).max() or 1.0) for a, b in pairs])


def assert_close(one, other):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), one, other)


# ------------------------------------------------------------------------------------------- next_token


@pytest.mark.parametrize("chunk", [64, 16])
def test_soft_capped_logits_are_those_of_the_plain_formula(chunk):
    """Gemma 2: c tanh(x / c). Logits here reach 6, so that a cap of 1.5 bends them."""
    arrays = example()

    def plain(hidden, unembedding, targets, weights):
        logits = 1.5 * jnp.tanh(hidden @ unembedding.T / 1.5)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        log_p = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] - log_z
        return jnp.sum(weights * (0.03 * log_z**2 - log_p)), jnp.sum(weights * log_p)

    def chunked(hidden, unembedding, targets, weights):
        settings = {"ops": lm.REFERENCE, "softcap": 1.5, "chunk": chunk}
        log_p = token_log_probs(hidden, unembedding, targets, **settings)
        return next_token(hidden, unembedding, targets, weights, z_loss=0.03, **settings).total, jnp.sum(weights * log_p)

    for i in range(2):
        got, expected = (value_and_gradients(lambda *a, run=run, i=i: run(*a)[i], *arrays) for run in (chunked, plain))
        assert worst(got, expected) < 2e-5


@pytest.mark.parametrize(
    ("batch", "seq", "chunk", "z_loss"),
    [((5,), 7, 1024, 0.03), ((2, 3), 4, 12, 0.03), ((5,), 7, 16, 0.03), ((5,), 7, 16, 0.0), ((), 9, 4, 0.03), ((1,), 1, 1, 0.03)],
    ids=["one chunk", "two chunks, two batch axes", "a last chunk of 3 of 16", "no z-loss", "no batch axis", "one token"],
)
def test_chunked_equals_plain_gradients_included(batch, seq, chunk, z_loss):
    arrays = example(batch, seq)

    def chunked(*arrays):
        return next_token(*arrays, ops=lm.REFERENCE, z_loss=z_loss, chunk=chunk).total

    assert_close(value_and_gradients(chunked, *arrays), value_and_gradients(lambda *a: plain_total(*a, z_loss), *arrays))


def test_the_three_sums_are_what_they_say():
    hidden, unembedding, targets, weights = example()
    loss = next_token(hidden, unembedding, targets, weights, ops=lm.REFERENCE, z_loss=0.03, chunk=16)
    np.testing.assert_allclose(loss.total, plain_total(hidden, unembedding, targets, weights, 0.03), **CLOSE)
    np.testing.assert_allclose(loss.cross_entropy, plain_total(hidden, unembedding, targets, weights, 0.0), **CLOSE)
    np.testing.assert_allclose(loss.count, np.sum(weights), **CLOSE)
    assert loss.total > loss.cross_entropy + 1e-3


def test_the_sums_with_and_without_a_gradient_are_equal():
    """They come from two functions: evaluation makes no gradient on the way."""
    arrays = example()

    def sums(*arrays):
        loss = next_token(*arrays, ops=lm.REFERENCE, z_loss=0.03, chunk=16)
        return loss.total, loss

    _, with_gradient = jax.jit(jax.grad(sums, has_aux=True))(*arrays)
    assert_close(with_gradient, jax.jit(sums)(*arrays)[1])


def test_the_cotangent_is_honoured():
    hidden, unembedding, targets, weights = example()

    def total(h, u):
        return next_token(h, u, targets, weights, ops=lm.REFERENCE, z_loss=0.03, chunk=16).total

    def plain(h, u):
        return plain_total(h, u, targets, weights, 0.03)

    scaled = jax.jit(jax.grad(lambda h, u: 3.7 * total(h, u), (0, 1)))(hidden, unembedding)
    assert_close(scaled, jax.tree.map(lambda g: 3.7 * g, jax.grad(plain, (0, 1))(hidden, unembedding)))

    def within(loss):  # both arrays reach the result by other ways too, the loss twice
        return lambda h, u: jnp.sin(loss(h, u) / 40) * jnp.sum(u**2) / 50 + loss(jnp.tanh(h), u) / 20 + jnp.sum(h**3) / 100

    assert_close(value_and_gradients(within(total), hidden, unembedding), value_and_gradients(within(plain), hidden, unembedding))


def test_the_reported_cross_entropy_and_the_weights_carry_no_gradient():
    arrays = example()
    reported = jax.grad(lambda *a: next_token(*a, ops=lm.REFERENCE).cross_entropy, (0, 1))(*arrays)
    by_weight = jax.grad(lambda *a: next_token(*a, ops=lm.REFERENCE).total, 3)(*arrays)
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves((reported, by_weight)))


def test_a_token_of_weight_0_counts_nowhere_whatever_its_target():
    hidden, unembedding, targets, weights = example()
    silent = np.asarray(weights) == 0
    assert 5 < silent.sum() < 30

    def sums(targets):
        def loss(h, u):
            loss = next_token(h, u, targets, weights, ops=lm.REFERENCE, z_loss=0.03, chunk=16)
            return loss.total, loss

        return jax.grad(loss, (0, 1), has_aux=True)(hidden, unembedding)

    gradients, loss = sums(targets)
    assert not np.any(np.asarray(gradients[0])[silent])
    assert np.all(np.any(np.asarray(gradients[0])[~silent], axis=-1))
    for garbage in (-1, VOCAB, 2**31 - 1):
        jax.tree.map(np.testing.assert_array_equal, sums(jnp.where(silent, garbage, targets)), (gradients, loss))


# ------------------------------------------------------------------------------------------- token_log_probs


@pytest.mark.parametrize(("batch", "seq", "chunk"), [((5,), 7, 1024), ((2, 3), 4, 12), ((5,), 7, 16), ((), 9, 4)])
def test_token_log_probs_are_log_softmax_at_the_target(batch, seq, chunk):
    hidden, unembedding, targets, _ = example(batch, seq)
    cotangents = jr.normal(jr.key(9), targets.shape)  # as a policy gradient would send them: any sign

    def loss_of(log_probs):
        return lambda h, u: (jnp.vdot(cotangents, log_probs(h, u)), log_probs(h, u))

    def run(log_probs):
        return jax.jit(jax.grad(loss_of(log_probs), (0, 1), has_aux=True))(hidden, unembedding)

    chunked = run(lambda h, u: token_log_probs(h, u, targets, ops=lm.REFERENCE, chunk=chunk))
    assert_close(chunked, run(lambda h, u: plain_log_probs(h, u, targets)))
    assert chunked[1].shape == targets.shape


def test_the_two_losses_agree():
    hidden, unembedding, targets, weights = example()
    log_probs = token_log_probs(hidden, unembedding, targets, ops=lm.REFERENCE, chunk=16)
    loss = next_token(hidden, unembedding, targets, weights, ops=lm.REFERENCE, chunk=16)
    np.testing.assert_allclose(loss.cross_entropy, -jnp.sum(weights * log_probs), **CLOSE)


# ------------------------------------------------------------------------------------------- backends and precision

SIZES = {
    "two chunks, wide": (64, 40, 97),
    "one chunk, wide": (128, 40, 97),
    "two chunks, narrow": (64, 72, 31),
    "one chunk, narrow": (128, 72, 31),
}


def losses_and_gradients(backend, dtype, chunk, arrays):
    """Both losses with the gradients of each."""
    *_, targets, weights = arrays
    settings = {"ops": lm.BACKENDS[backend], "dtype": dtype, "chunk": chunk}

    def run(h, u):
        cross_entropy = jax.value_and_grad(lambda h, u: next_token(h, u, targets, weights, z_loss=0.03, **settings).total, (0, 1))
        log_probs = jax.value_and_grad(lambda h, u: jnp.vdot(weights, token_log_probs(h, u, targets, **settings)), (0, 1))
        return cross_entropy(h, u), log_probs(h, u)

    return jax.jit(run)(*arrays[:2])


@lru_cache
def exact_and_rounded(d_model, vocab):
    """What `losses_and_gradients` should give, and what plain JAX gives on bf16 operands with all else in fp32."""
    *arrays, targets, weights = example((2,), 64, d_model, vocab)

    def run(dtype):
        def losses(h, u):
            logits = jax.lax.dot_general(h.astype(dtype), u.astype(dtype), (((2,), (1,)), ((), ())), preferred_element_type=jnp.float32)
            log_z = jax.nn.logsumexp(logits, axis=-1)
            target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
            return jnp.sum(weights * (log_z - target + 0.03 * log_z**2)), jnp.vdot(weights, target - log_z)

        return jax.jit(lambda h, u: tuple(jax.value_and_grad(lambda h, u, i=i: losses(h, u)[i], (0, 1))(h, u) for i in range(2)))(*arrays)

    return run(jnp.float32), run(jnp.bfloat16)


@pytest.mark.parametrize("case", SIZES)
@pytest.mark.parametrize("backend", RUNS_HERE)
def test_every_backend_computes_both_losses_and_bf16_costs_no_more_than_it_must(backend, case):
    """The narrower side is transposed in a weight gradient, so vocab above and below d_model; a loop of one chunk is no loop once compiled,
    and the layouts of its products are chosen anew ("DotThunk" in `lm/kernels_cpu.py`)."""
    chunk, d_model, vocab = SIZES[case]
    arrays = example((2,), 64, d_model, vocab)
    exact, plain = exact_and_rounded(d_model, vocab)
    assert worst(losses_and_gradients(backend, jnp.float32, chunk, arrays), exact) < 2e-5  # fp32 rounding
    assert worst(plain, exact) > 1e-4  # else nothing is compared
    assert worst(losses_and_gradients(backend, jnp.bfloat16, chunk, arrays), exact) < 1.5 * worst(plain, exact)


# ------------------------------------------------------------------------------------------- memory


def sizes_in(jaxpr):
    """Elements of every array a program makes, those of its inner programs included."""
    for equation in jaxpr.eqns:
        yield from (math.prod(variable.aval.shape) for variable in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from sizes_in(inner)


def largest(program, *arrays):
    """Elements of the largest array in the program as traced and as compiled."""
    compiled = jax.jit(program).lower(*arrays).compile().as_text()
    shapes = re.findall(r"\b(?:f32|bf16|s32|pred)\[([\d,]+)\]", compiled)
    return max(sizes_in(jax.make_jaxpr(program)(*arrays).jaxpr)), max(math.prod(map(int, shape.split(","))) for shape in shapes)


@pytest.mark.parametrize("name", ["next_token", "next_token, no gradient", "token_log_probs"])
def test_logits_of_all_tokens_never_stand_together(name):
    tokens, chunk, d_model, vocab = 60, 20, 8, 97
    hidden, unembedding, targets, weights = example((5,), 12, d_model, vocab)
    settings = {"ops": lm.REFERENCE, "chunk": chunk}
    total = {
        "next_token": lambda h, u: next_token(h, u, targets, weights, z_loss=0.03, **settings).total,
        "next_token, no gradient": lambda h, u: next_token(h, u, targets, weights, z_loss=0.03, **settings).total,
        "token_log_probs": lambda h, u: jnp.vdot(weights, token_log_probs(h, u, targets, **settings)),
    }[name]
    program = total if "no gradient" in name else jax.grad(total, (0, 1))
    assert largest(program, hidden, unembedding) == (chunk * vocab, chunk * vocab)
    plain = jax.grad(lambda h, u: plain_total(h, u, targets, weights, 0.0), (0, 1))
    assert min(largest(plain, hidden, unembedding)) >= tokens * vocab  # the measure sees such an array where there is one
