"""Norms, MLPs and activations against their formulas, written out with numpy."""

import math

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from lm.layers import ACTIVATIONS, MLP, GatedMLP, LayerNorm, activation_named

X = np.linspace(-4, 4, 33, dtype=np.float32)
FORMULAS = {
    "gelu": lambda x: x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "gelu_fast": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu_new": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu_pytorch_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "silu": lambda x: x / (1 + np.exp(-x)),
}


def test_every_activation_has_its_formula_here():
    assert FORMULAS.keys() == ACTIVATIONS.keys()


@pytest.mark.parametrize("name", FORMULAS)
def test_activation_equals_its_formula(name):
    np.testing.assert_allclose(activation_named(name)(jnp.asarray(X)), FORMULAS[name](X), atol=2e-6)


def test_an_unknown_activation_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'swish' is not known; known are gelu, .*silu"):
        activation_named("swish")


@pytest.mark.parametrize("biased", [True, False])
def test_layer_norm_equals_its_formula(biased):
    rng = np.random.default_rng(0)
    x, scale, bias = (rng.normal(2.0, 3.0, shape).astype(np.float32) for shape in ((2, 3, 7), (7,), (7,)))
    norm = LayerNorm(jnp.asarray(scale), jnp.asarray(bias) if biased else None, 1e-2)
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-2) * scale + (bias if biased else 0)
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, atol=1e-5)
    assert norm(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16
    fresh = LayerNorm.init(7, 1e-5, bias=biased)
    assert (fresh.bias is not None) == biased


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "relu2"])
def test_mlps_equal_their_formulas(activation, bias):
    act = activation_named(activation)
    mlp = MLP.init(6, 10, std=0.3, out_std=0.2, key=jr.key(0), activation=act, bias=bias)
    mlp = jax.tree.map(lambda leaf: leaf + 0.1, mlp)  # biases of 0 would hide a forgotten one
    x = np.random.default_rng(1).normal(size=(2, 5, 6)).astype(np.float32)

    def linear(layer, x):
        return x @ np.asarray(layer.weight).T + (0 if layer.bias is None else np.asarray(layer.bias))

    expected = linear(mlp.down_proj, FORMULAS[activation](linear(mlp.up_proj, x)))
    np.testing.assert_allclose(mlp(jnp.asarray(x)), expected, atol=1e-5)
    gated = GatedMLP.init(6, 10, std=0.3, out_std=0.2, key=jr.key(0), activation=act)  # with gelu: GeGLU
    expected = linear(gated.down_proj, FORMULAS[activation](linear(gated.gate_proj, x)) * linear(gated.up_proj, x))
    np.testing.assert_allclose(gated(jnp.asarray(x)), expected, atol=1e-5)


def test_mlps_with_one_activation_are_one_structure():
    """So that blocks stack: the activation is a static field, compared as a function."""
    one, other, third = (
        MLP.init(6, 10, std=0.3, out_std=0.2, key=jr.key(0), activation=activation_named(name)) for name in ("gelu", "gelu", "relu")
    )
    assert jax.tree.structure(one) == jax.tree.structure(other) != jax.tree.structure(third)
