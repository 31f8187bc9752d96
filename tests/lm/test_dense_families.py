"""Families beside GPT-2, Llama and Qwen3, which `conftest.model` takes through everything: here once each, on the settings that make them
what they are. That they are the models of `transformers` is shown in test_golden.py."""

from functools import lru_cache

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tiny import SIZES, facts_of, logits_of, packed_batch, tiny, tiny_config

import lm
from lm import rope
from lm.flight import Flight, Stack, put_on_flight
from train.losses import next_token

CLOSE = {"rtol": 2e-5, "atol": 2e-5}  # fp32 sums in another order
FACTORS = {"short_factor": (1.0, 1.1, 1.3), "long_factor": (1.2, 2.0, 3.5), "original_context": 8, "factor": 8.0}
FAMILIES = {
    "gpt_neox": {"rope_fraction": 0.5},
    "gpt_neox sequential": {"rope_fraction": 1.0, "parallel": False, "attention_bias": False},
    "granite": {"embed_multiplier": 3.0, "attention_multiplier": 0.5, "residual_multiplier": 0.3, "logit_divisor": 2.0, "mlp_bias": True},
    "mistral": {"window_by_layer": (4,) * 3},
    "phi3": {"rope_fraction": 0.75, "rope_scaling": rope.LongRope(**FACTORS, length=17)},
    "qwen2": {"window_by_layer": (None, None, 4)},
    "qwen3": {"window_by_layer": (None, 4, 4)},
    "smollm3": {"window_by_layer": (3, None, None), "rope_by_layer": (False, True, True), "mlp_bias": True},
}
each_family = pytest.mark.parametrize("family", FAMILIES)


def model_of(family):
    return tiny(family.split()[0], **FAMILIES[family])


@each_family
def test_cached_decode_equals_full_forward(family):
    model = model_of(family)
    tokens = jr.randint(jr.key(5), (2, 9), 0, SIZES["vocab"])

    @eqx.filter_jit
    def step(model, tokens, cache):
        hidden, cache, _ = model.hidden(tokens, cache=cache)
        return model.logits(hidden), cache

    first, cache = step(model, tokens[:, :6], model.empty_cache((2,), 17))  # a prefill of six, then one at a time
    pieces = [first]
    for place in range(6, 9):
        logits, cache = step(model, tokens[:, place : place + 1], cache)
        pieces.append(logits)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), logits_of(model, tokens), **CLOSE)


@each_family
def test_packed_documents_equal_documents_alone(family):
    model, batch = model_of(family), packed_batch()
    together = logits_of(model, jnp.asarray(batch.tokens), facts_of(batch))
    places = np.flatnonzero(batch.segments[0] == 2)
    np.testing.assert_allclose(together[0, places], logits_of(model, jnp.asarray(batch.tokens[0, places])), **CLOSE)


@lru_cache
def loss_and_gradient(family, flight, backend):
    """One program for each; the weights are its argument."""
    batch, ops = packed_batch(), lm.BACKENDS[backend]

    def loss(model):
        flying = put_on_flight(model, flight, ops)
        hidden, _, _ = flying.hidden(jnp.asarray(batch.tokens), facts_of(batch))
        return next_token(hidden, flying.unembedding, jnp.asarray(batch.targets), jnp.asarray(batch.loss_weights), ops=ops).total

    return jax.jit(jax.value_and_grad(loss))


@each_family
def test_scan_and_the_cpu_kernels_learn_what_the_plain_loop_learns(family):
    model, scan = model_of(family), Flight(layers="scan", remat="dots")
    assert any(type(block) is Stack for block in put_on_flight(model, scan, lm.REFERENCE).blocks)
    _, expected = loss_and_gradient(family, Flight(), "reference")(model)
    _, gradient = loss_and_gradient(family, scan, "cpu")(model)
    for got, want in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, atol=3e-5 * float(jnp.abs(want).max()) + 1e-7)


@each_family
def test_a_new_model_learns(family):
    model = lm.build(model_of(family).config, key=jr.key(0))  # not as a program of its own: its pieces are compiled once for all families
    losses = []
    for _ in range(8):
        loss, gradient = loss_and_gradient(family, Flight(), "reference")(model)
        norm = float(np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(gradient))))
        model = jax.tree.map(lambda weight, slope, norm=norm: weight - 0.5 / norm * slope, model, gradient)
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]


# ------------------------------------------------------------------------------------------- configs


@each_family
def test_configs_survive_json_and_the_way_out_and_in(family):
    config = model_of(family).config
    assert type(config).model_validate_json(config.model_dump_json()) == config
    if isinstance(config.rope_scaling, rope.LongRope):
        config = config.model_copy(update={"rope_scaling": rope.LongRope(**FACTORS)})  # with a fixed length it is not written
    assert type(config).from_hf(config.to_hf()) == config


@pytest.mark.parametrize("model_type", lm.ARCHITECTURES)
def test_every_config_answers_what_training_and_recipes_ask(model_type):
    for config in lm.ARCHITECTURES[model_type].presets.values():
        assert config.model_type == model_type
        for name in ("vocab", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "context"):
            assert getattr(config, name) >= 1, name
        for name in ("dropout", "attention_dropout"):
            assert 0 <= getattr(config, name, 0.0) < 1, name  # not every family drops on its branches
        # The model card is written from the numbers kept in the record of a run.
        assert {"n_layers", "d_model", "n_heads", "d_ff", "vocab", "context"} <= config.model_dump().keys()


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("llama", {"attention_bias": True, "attention_out_bias": False}, "no llama with attention_out_bias = False"),
        ("llama", {"rope_by_layer": (True, False, True)}, "no llama with rope_by_layer"),
        ("mistral", {"attention_bias": True}, "no mistral with attention_bias = True"),
        ("mistral", {"window_by_layer": (None, 4, 4)}, "mistral of transformers has one window for all layers, or none"),
        ("phi3", {"mlp_bias": True}, "no phi3 with mlp_bias = True"),
        ("phi3", {"window_by_layer": (3, 4, 4)}, "phi3 of transformers has one window for all layers, or none"),
        ("phi3", {"rope_scaling": rope.LinearScaling(factor=2.0)}, "default and longrope only"),
        ("qwen2", {"attention_bias": False}, "no qwen2 with attention_bias = False"),
        ("qwen2", {"attention_out_bias": True}, "no qwen2 with attention_out_bias = True"),
        ("qwen2", {"window_by_layer": (3, None, 4)}, r"one window for all layers that slide; these have \[3, 4\]"),
        ("qwen3", {"window_by_layer": (3, None, 4)}, r"one window for all layers that slide; these have \[3, 4\]"),
        ("smollm3", {"n_heads_by_layer": (6, 2, 2)}, "no smollm3 with n_heads_by_layer"),
        ("granite", {"attention_softcap": 5.0}, "no granite with attention_softcap = 5.0"),
        ("gpt_neox", {"rope_fraction": 0.5, "logit_softcap": 5.0}, "no gpt_neox with logit_softcap = 5.0"),
    ],
)
def test_what_transformers_has_no_key_for_is_not_written(family, changes, words):
    with pytest.raises(ValueError, match=words):
        tiny_config(family, **changes).to_hf()


@pytest.mark.parametrize(
    ("family", "keys", "words"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu'; our llama computes hidden_act = 'silu' only"),
        ("mistral", {"layer_types": ["full_attention"] * 3}, "keys we do not know: .'layer_types'"),
        ("mistral", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5, which the mistral of transformers does not compute"),
        ("phi3", {"attention_bias": True}, "attention_bias = True"),
        ("phi3", {"embd_pdrop": 0.1}, "embd_pdrop = 0.1; our phi3 computes embd_pdrop = 0.0 only"),
        ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "default and longrope only"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "sliding_attention, but no sliding_window, or use_sliding_window"),
        ("qwen3", {"layer_types": ["full_attention"] * 2}, "expected 3 of full_attention or sliding_attention"),
        ("smollm3", {"layer_types": ["chunked_attention"] * 3}, "expected 3 of full_attention or sliding_attention"),
        ("gpt_neox", {"is_decoder": True}, "is_decoder = True"),
        ("gpt_neox", {"hidden_act": "swish7"}, "activation 'swish7' is not known"),
    ],
)
def test_keys_that_change_the_function_are_refused(family, keys, words):
    changes = {"rope_fraction": 0.5} if family == "gpt_neox" else {}
    config = tiny_config(family, **changes)
    with pytest.raises(ValueError, match=words):
        type(config).from_hf(config.to_hf() | keys)


def without(keys, *names):
    return {name: value for name, value in keys.items() if name not in names}


def test_a_mistral_that_says_nothing_of_its_window_has_the_one_of_the_first_and_null_is_none():
    config = tiny_config("mistral")
    silent = without(config.to_hf(), "sliding_window")
    assert type(config).from_hf(silent).window_by_layer == (4096,) * 3
    assert type(config).from_hf(silent | {"sliding_window": None}).window_by_layer is None


def test_windows_of_a_qwen_without_layer_types_begin_at_max_window_layers():
    config = tiny_config("qwen2", window_by_layer=(None, 4, 4))
    written = config.to_hf()
    assert written["max_window_layers"] == 1
    assert type(config).from_hf(without(written, "layer_types")) == config
    assert type(config).from_hf(written | {"use_sliding_window": False, "layer_types": None}).window_by_layer is None


def test_layers_of_a_smollm3_without_a_list_lose_their_positions_at_each_interval():
    config = tiny_config("smollm3")
    silent = without(config.to_hf(), "no_rope_layers")
    assert type(config).from_hf(silent | {"no_rope_layer_interval": 2}).rope_by_layer == (True, False, True)
    assert type(config).from_hf(silent).rope_by_layer is None  # every fourth, of three


@pytest.mark.parametrize("kind", ["su", "yarn", "longrope"])
def test_longrope_of_a_phi3_goes_by_three_names_and_takes_its_context_from_the_top(kind):
    config = tiny_config("phi3", rope_fraction=0.75, rope_scaling=rope.LongRope(**FACTORS))
    written = config.to_hf()
    assert set(written["rope_scaling"]) == {"type", "short_factor", "long_factor"}  # all that older versions know
    assert written["original_max_position_embeddings"] == 8
    assert type(config).from_hf(written | {"rope_scaling": written["rope_scaling"] | {"type": kind}}) == config


def test_files_of_pythia_and_of_the_first_llamas_hold_what_is_no_weight():
    for model_type, extra in (
        ("gpt_neox", ["gpt_neox.layers.0.attention.bias", "gpt_neox.layers.3.attention.masked_bias"]),
        ("gpt_neox", ["gpt_neox.layers.0.attention.rotary_emb.inv_freq"]),
        ("llama", ["model.layers.1.self_attn.rotary_emb.inv_freq"]),
    ):
        current_key = lm.ARCHITECTURES[model_type].current_key
        assert [current_key(key) for key in extra] == [None] * len(extra)
    assert lm.ARCHITECTURES["gpt_neox"].current_key("gpt_neox.layers.0.attention.dense.bias") == "gpt_neox.layers.0.attention.dense.bias"
