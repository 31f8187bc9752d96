"""Rotary kinds against their papers' formulas. That they are those of transformers is shown by the golden models."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import logits_of, tiny, tiny_config

import lm
from lm import rope

HEAD_DIM, BASE = 16, 10_000.0
PLAIN = BASE ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
LLAMA3 = rope.Llama3(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=512)
YARN = rope.Yarn(factor=4.0, original_context=512)
SHORT, LONG = (1.0, 1.1, 1.3, 1.7), (1.2, 2.0, 3.5, 5.0)  # for heads of 8
LONGROPE = rope.LongRope(short_factor=SHORT, long_factor=LONG, original_context=16, factor=4.0)
KINDS = [
    rope.LinearScaling(factor=3.0),
    rope.NTK(factor=3.0),
    rope.DynamicNTK(factor=2.0, original_context=64, length=200),
    LLAMA3,
    YARN,
    LONGROPE,
    rope.NoPositions(),
]


def wavelengths(scaling, fraction=1.0):
    inverse, factor = rope.rotary(HEAD_DIM, BASE, scaling, fraction)
    return np.asarray(inverse), factor


def test_linear_divides_every_frequency():
    np.testing.assert_allclose(wavelengths(rope.LinearScaling(factor=3.0))[0], PLAIN / 3, rtol=1e-5)


def test_ntk_keeps_the_fastest_pair_and_slows_the_slowest_by_its_factor():
    inverse, _ = wavelengths(rope.NTK(factor=3.0))
    np.testing.assert_allclose(inverse[[0, -1]], [PLAIN[0], PLAIN[-1] / 3], rtol=1e-5)


def test_dynamic_ntk_is_plain_within_its_context_and_ntk_of_the_grown_factor_beyond():
    kind = rope.DynamicNTK(factor=2.0, original_context=64, length=64)
    np.testing.assert_allclose(wavelengths(kind)[0], PLAIN, rtol=1e-5)
    grown, _ = wavelengths(kind.model_copy(update={"length": 128}))
    np.testing.assert_allclose(grown, wavelengths(rope.NTK(factor=2 * 128 / 64 - 1))[0], rtol=1e-5)


def test_llama3_leaves_fast_pairs_divides_slow_ones_and_blends_between():
    turns = 512 * PLAIN / (2 * math.pi)
    inverse, _ = wavelengths(LLAMA3)
    np.testing.assert_allclose(inverse[turns > 4], PLAIN[turns > 4], rtol=1e-5)
    np.testing.assert_allclose(inverse[turns < 1], PLAIN[turns < 1] / 8, rtol=1e-5)
    between = (turns >= 1) & (turns <= 4)
    assert between.sum() == 1
    keep = (turns[between] - 1) / 3
    np.testing.assert_allclose(inverse[between], (keep + (1 - keep) / 8) * PLAIN[between], rtol=1e-5)


def test_yarn_goes_from_plain_to_interpolated_and_sharpens_scores():
    inverse, factor = wavelengths(YARN)
    assert factor == pytest.approx(0.1 * math.log(4) + 1)
    turns = 512 * PLAIN / (2 * math.pi)
    np.testing.assert_allclose(inverse[turns > 32], PLAIN[turns > 32], rtol=1e-5)
    np.testing.assert_allclose(inverse[turns < 0.2], PLAIN[turns < 0.2] / 4, rtol=1e-5)
    assert np.all((inverse <= PLAIN * 1.00001) & (inverse >= PLAIN / 4.00001))
    assert wavelengths(YARN.model_copy(update={"attention_factor": 1.5}))[1] == 1.5
    deepseek = YARN.model_copy(update={"mscale": 1.0, "mscale_all_dim": 0.5})
    assert wavelengths(deepseek)[1] == pytest.approx((0.1 * math.log(4) + 1) / (0.05 * math.log(4) + 1))
    cos, sin = rope.tables(jnp.arange(5), *rope.rotary(HEAD_DIM, BASE, YARN))
    np.testing.assert_allclose(cos**2 + sin**2, factor**2, rtol=1e-5)


def test_longrope_divides_each_pair_by_its_own_number_and_sharpens_scores():
    plain = BASE ** (-np.arange(0, 8, 2) / 8)
    for length, numbers in ((16, SHORT), (17, LONG)):
        inverse, factor = rope.rotary(8, BASE, LONGROPE.model_copy(update={"length": length}))
        np.testing.assert_allclose(inverse, plain / np.array(numbers), rtol=1e-5)
        assert factor == pytest.approx(math.sqrt(1 + math.log(4) / math.log(16)))
    assert rope.longrope_attention_factor(LONGROPE.model_copy(update={"attention_factor": 1.5})) == 1.5
    assert rope.longrope_attention_factor(LONGROPE.model_copy(update={"factor": 1.0})) == 1.0


def test_longrope_goes_by_the_last_position_of_each_row_or_by_a_fixed_length():
    def table(positions, **changes):
        return rope.tables_of(positions, 8, BASE, LONGROPE.model_copy(update=changes), 1.0)[0]

    rows = jnp.stack([jnp.arange(5), jnp.arange(12, 17)])
    within, beyond = table(rows[0], length=16), table(rows[1], length=17)
    np.testing.assert_allclose(table(rows), jnp.stack([within, beyond]), rtol=1e-6)
    assert not np.allclose(table(rows[0], length=17), within, atol=1e-2)


def test_a_cache_in_which_longrope_would_change_is_refused():
    """At the length the texts will have, cached and uncached agree; test_dense_families.py decodes so."""
    model = tiny("qwen3", rope_scaling=LONGROPE)
    assert model.empty_cache((), 16)[0].slots == 16
    with pytest.raises(ValueError, match=r"a cache of 17 slots is longer than the original context of LongRoPE \(16\)"):
        model.empty_cache((), 17)


def test_longrope_wants_a_number_for_each_pair():
    with pytest.raises(ValueError, match="short_factor has 4 numbers, expected 5: one for each pair"):
        tiny_config("llama", head_dim=10, rope_scaling=LONGROPE)


def test_partial_rotation_turns_the_first_part_of_a_head_only():
    model = tiny("llama", rope_fraction=0.5)
    facts = lm.Facts(jnp.arange(7), jnp.ones(7, jnp.int32))
    cos, sin = rope.tables_of(facts.positions, 8, BASE, None, 0.5)
    assert cos.shape == (7, 4)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 8)), jnp.float32)
    turned = model.blocks[0].attn._rotated(x, cos, sin)
    np.testing.assert_array_equal(turned[..., 4:], x[..., 4:])
    np.testing.assert_allclose(turned[..., :4], lm.REFERENCE.rotate(x[..., :4], cos, sin), rtol=1e-6)
    with pytest.raises(ValueError, match="even"):
        tiny_config("llama", rope_fraction=0.4)  # 3 of 8


def test_without_positions_the_order_of_earlier_tokens_is_not_known():
    """In the first layer; deeper ones can tell it by the causal mask, as the paper says."""
    tokens = jnp.array([3, 14, 15, 9])
    swapped = tokens[jnp.array([1, 0, 2, 3])]
    for scaling, known in ((rope.NoPositions(), False), (None, True)):
        model = tiny("llama", n_layers=1, rope_scaling=scaling)
        assert known != np.allclose(logits_of(model, tokens)[3], logits_of(model, swapped)[3], atol=1e-5)


def test_sinusoidal_positions_are_those_of_the_paper():
    table = rope.sinusoidal(jnp.arange(9), 6)
    angles = np.arange(9)[:, None] / 10_000 ** (np.arange(0, 6, 2) / 6)
    np.testing.assert_allclose(table[:, 0::2], np.sin(angles), atol=1e-6)
    np.testing.assert_allclose(table[:, 1::2], np.cos(angles), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
def test_every_kind_changes_the_function_and_survives_json(kind):
    config = tiny_config("qwen3", rope_scaling=kind, rope_base=BASE)
    assert type(config).model_validate_json(config.model_dump_json()) == config
    plain, other = (logits_of(tiny("qwen3", rope_base=BASE, rope_scaling=scaling), jnp.arange(20)) for scaling in (None, kind))
    assert not np.allclose(plain, other, atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "kind", [KINDS[0], rope.DynamicNTK(factor=2.0, original_context=64, length=64), LLAMA3, YARN, LONGROPE], ids=lambda k: k.kind
)
def test_kinds_known_to_transformers_go_out_and_come_back(name, kind):
    config = tiny_config(name, rope_scaling=kind)
    written = config.to_hf()
    assert written["rope_scaling"]["rope_type"] == kind.kind
    assert type(config).from_hf(written) == config
    parameters = written.pop("rope_scaling") | {"rope_theta": written.pop("rope_theta")}
    assert type(config).from_hf(written | {"rope_parameters": parameters}) == config  # as transformers 5 writes it


def test_static_ntk_is_written_as_the_base_that_it_is():
    written = tiny_config("llama", rope_scaling=rope.NTK(factor=3.0)).to_hf()
    assert written["rope_theta"] == pytest.approx(10_000 * 3 ** (8 / 6))
    assert "rope_scaling" not in written


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_scaling": rope.NoPositions()}, "no key for rope_scaling"),
        ({"rope_scaling": rope.DynamicNTK(factor=2.0, original_context=16, length=64)}, "fixed at length 64"),
        ({"rope_fraction": 0.5}, "cannot rotate a part"),
        ({"rope_scaling": LONGROPE.model_copy(update={"length": 64})}, "fixed for length 64"),
    ],
)
def test_what_transformers_would_not_compute_is_not_written(changes, words):
    with pytest.raises(ValueError, match=words):
        tiny_config("llama", **changes).to_hf()


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"rope_type": "linear", "factor": 2.0, "beta": 1}, r"do not know for type 'linear': \['beta'\]"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5, which the llama of transformers"),
        ({"rope_type": "linear"}, "factor"),
    ],
)
def test_rope_parameters_we_do_not_compute_are_refused(parameters, words):
    config = tiny_config("llama")
    with pytest.raises(ValueError, match=words):
        type(config).from_hf(config.to_hf() | {"rope_parameters": parameters})
