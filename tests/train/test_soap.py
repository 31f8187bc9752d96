"""SOAP: Adam, turned."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from train.soap import scale_by_soap


def test_soap_is_the_paper_s_written_out():
    """Vyas et al. 2024, algorithms 3 and 4, in float64 numpy: the first gradient only gives the basis, which is followed every third
    step. (A basis whose columns have other signs gives the same update.)"""
    rng = np.random.default_rng(0)
    gradients = [rng.normal(size=(5, 3)) for _ in range(8)]
    optimizer = scale_by_soap(0.8, 0.9, 1e-3, every=3)
    state, update = optimizer.init({"w": jnp.zeros((5, 3))}), jax.jit(optimizer.update)
    mean, square, left, right = np.zeros((5, 3)), np.zeros((5, 3)), np.zeros((5, 5)), np.zeros((3, 3))
    for step, g in enumerate(gradients):
        ours, state = update({"w": jnp.asarray(g, jnp.float32)}, state)
        expected = np.zeros((5, 3))
        if step > 0:
            mean, square = 0.8 * mean + 0.2 * g, 0.9 * square + 0.1 * (ql.T @ g @ qr) ** 2
            turned = (ql.T @ mean @ qr) / (1 - 0.8**step) / (np.sqrt(square / (1 - 0.9**step)) + 1e-3)
            expected = ql @ turned @ qr.T
        left, right = 0.9 * left + 0.1 * g @ g.T, 0.9 * right + 0.1 * g.T @ g
        if step == 0:
            # Of a single gradient the left side has two eigenvalues of 0, and any basis of their plane is as good: take the one found.
            ql, qr = np.asarray(state.left_basis["w"], float), np.asarray(state.right_basis["w"], float)
            np.testing.assert_allclose(ql.T @ left @ ql, np.diag(np.linalg.eigvalsh(left)), atol=1e-5)
            np.testing.assert_allclose(qr.T @ right @ qr, np.diag(np.linalg.eigvalsh(right)), atol=1e-5)
        elif step % 3 == 0:
            ql, qr = np.linalg.qr(left @ ql)[0], np.linalg.qr(right @ qr)[0]
        np.testing.assert_allclose(ours["w"], expected, rtol=1e-3, atol=1e-3)


def test_soap_takes_the_experts_of_a_leaf_each_alone():
    gradients = [jr.normal(jr.key(step), (2, 5, 3)) for step in range(3)]
    soap = scale_by_soap(0.9, 0.95, 1e-3, every=1)

    @jax.jit
    def last(gradients):
        state = soap.init(gradients[0])
        for gradient in gradients:
            update, state = soap.update(gradient, state)
        return update

    together = last([{"w": g} for g in gradients])["w"]
    for e in range(2):
        np.testing.assert_allclose(together[e], last([{"w": g[e]} for g in gradients])["w"], rtol=1e-3, atol=1e-3)
