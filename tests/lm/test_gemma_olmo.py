"""Gemma 1 to 3, OLMo 2 and 3, beside their golden models: caches, packing, flights and kernels where kinds of layers take turns; their
files, old and new."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tiny import facts_of, logits_of, packed_batch, tiny, tiny_config

import lm
from lm.flight import Chain, Flight, Stack, put_on_flight
from lm.layers import RMSNorm
from lm.rope import LinearScaling
from train.losses import next_token

S, F = "sliding_attention", "full_attention"
# The window is shorter than the texts, both kinds of layers are there, and turns are left over at the end: what stacking has to do with.
# SHORT is the same with a layer of each kind.
FAMILIES = {
    "gemma": {"rope_base": 50.0},
    "gemma2": {"n_layers": 5, "window": 3, "query_pre_attn_scalar": 11, "attention_softcap": 2.0, "logit_softcap": 3.0},
    "gemma3_text": {"n_layers": 8, "window": 3, "layer_types": (S, S, F, S, S, F, S, S), "rope_base": 50.0, "rope_base_local": 7.0},
    "olmo2": {"rope_base": 50.0},
    "olmo3": {"n_layers": 5, "window": 3, "layer_types": (S, F, S, F, S), "rope_base": 50.0, "rope_base_local": 7.0},
}
CLOSE = {"rtol": 2e-5, "atol": 2e-5}  # fp32 sums in another order; logits are of order 1 to 10
SHORT = {
    family: settings | {"n_layers": 2} | ({"layer_types": (S, F)} if "window" in settings else {}) for family, settings in FAMILIES.items()
}
each_family = pytest.mark.parametrize("family", FAMILIES)


@each_family
def test_cached_decode_equals_full_forward(family):
    model = tiny(family, **SHORT[family])
    tokens = jr.randint(jr.key(5), (2, 11), 0, 97)

    @eqx.filter_jit
    def step(model, tokens, cache):
        hidden, cache, _ = model.hidden(tokens, cache=cache)
        return model.logits(hidden), cache

    first, cache = step(model, tokens[:, :6], model.empty_cache((2,), 17))  # a prefill of six, then one at a time
    pieces = [first]
    for place in range(6, 11):
        logits, cache = step(model, tokens[:, place : place + 1], cache)
        pieces.append(logits)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), logits_of(model, tokens), **CLOSE)


@each_family
def test_packed_documents_equal_documents_alone_and_the_cpu_kernels_the_reference(family):
    model, batch = tiny(family, **SHORT[family]), packed_batch()
    together = logits_of(model, jnp.asarray(batch.tokens), facts_of(batch))
    for row, document in ((0, 2), (1, 1)):
        places = np.flatnonzero(batch.segments[row] == document)
        np.testing.assert_allclose(together[row, places], logits_of(model, jnp.asarray(batch.tokens[row, places])), **CLOSE)
    by_cpu = logits_of(lm.with_ops(model, lm.BACKENDS["cpu"]), jnp.asarray(batch.tokens), facts_of(batch))
    written = batch.segments > 0
    np.testing.assert_allclose(by_cpu[written], together[written], **CLOSE)


def gradient(model, flight, ops=lm.REFERENCE, key=None):
    batch = packed_batch()

    @jax.jit
    def run(model):
        def loss(model):
            flying = put_on_flight(model, flight, ops)
            hidden, _, _ = flying.hidden(jnp.asarray(batch.tokens), facts_of(batch), key=key)
            targets, weights = jnp.asarray(batch.targets), jnp.asarray(batch.loss_weights)
            return next_token(hidden, flying.unembedding, targets, weights, softcap=flying.logit_softcap, ops=ops).total

        return jax.grad(loss)(model)

    return jax.tree.leaves(run(model))


@each_family
def test_stacked_turns_learn_what_the_loop_does(family):
    model = tiny(family, attention_dropout=0.3, **FAMILIES[family])
    looped = gradient(model, Flight(), key=jr.key(7))
    for one, other in zip(gradient(model, Flight(layers="scan", remat="full"), key=jr.key(7)), looped, strict=True):
        np.testing.assert_allclose(one, other, atol=5e-5 * np.abs(other).max() + 1e-7)  # fp32 sums in another order, through eight layers
    if family == "gemma2":  # what the hand-written backward passes do with soft-caps and the norms' offset
        looped = gradient(model, Flight())
        for one, other in zip(gradient(model, Flight(layers="scan"), lm.BACKENDS["cpu"]), looped, strict=True):
            np.testing.assert_allclose(one, other, atol=3e-5 * np.abs(other).max() + 1e-7)


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("gemma2", [(Stack, Chain, 4), (None, None, 1)]),
        ("gemma3_text", [(Stack, Chain, 6), (Stack, None, 2)]),
        ("olmo2", [(Stack, None, 3)]),
    ],
)
def test_layers_that_take_turns_are_stacked_by_the_turn(family, expected):
    flying = put_on_flight(tiny(family, **FAMILIES[family]), Flight(layers="scan"), lm.REFERENCE)
    assert [block.depth for block in flying.blocks] == [depth for _, _, depth in expected]
    for block, (outer, inner, _) in zip(flying.blocks, expected, strict=True):
        assert (type(block) is Stack) == (outer is Stack)
        assert outer is None or (type(block.blocks) is Chain) == (inner is Chain)


def test_gemma_3_of_26_layers_is_four_turns_of_six_and_two_layers():
    config = lm.ARCHITECTURES["gemma3_text"].presets["gemma-3-1b"]
    assert config.layer_types == (S, S, S, S, S, F) * 4 + (S, S)
    skeleton = tiny("gemma3_text", n_layers=26)
    flying = jax.eval_shape(lambda model: put_on_flight(model, Flight(layers="scan"), lm.REFERENCE), skeleton)
    assert [(block.n, block.depth) for block in flying.blocks] == [(4, 24), (2, 2)]


def test_stacked_turns_fill_their_caches_as_the_layers_would():
    model = tiny("gemma3_text", **FAMILIES["gemma3_text"])
    stacked = put_on_flight(model, Flight(layers="scan"), lm.REFERENCE)
    tokens = jnp.arange(6)[None]
    filled = eqx.filter_jit(lambda model: model.hidden(tokens, cache=model.empty_cache((1,), 9)))
    hidden, cache, _ = filled(model)
    stacked_hidden, stacked_cache, _ = filled(stacked)
    np.testing.assert_allclose(stacked_hidden, hidden, **CLOSE)
    np.testing.assert_allclose(stacked_cache[0][2].keys[1], cache[5].keys, **CLOSE)  # the second turn's third layer


@each_family
def test_a_new_model_starts_with_norms_of_one_and_learns(family):
    model = lm.build(tiny_config(family, **SHORT[family]), key=jr.key(0))
    norms = [node for node in jax.tree.leaves(model, is_leaf=lambda node: isinstance(node, RMSNorm)) if isinstance(node, RMSNorm)]
    assert len(norms) == 1 + len(model.blocks) * {"gemma": 2, "gemma2": 4, "gemma3_text": 6, "olmo2": 4, "olmo3": 4}[family]
    assert all(np.all(norm.scale + norm.offset == 1) for norm in norms)
    tokens = jnp.asarray(packed_batch().tokens)

    @jax.jit
    def step(model):
        def loss(model):
            return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(model(tokens[:, :-1])), tokens[:, 1:, None], axis=-1))

        value, slope = jax.value_and_grad(loss)(model)
        return value, jax.tree.map(lambda p, g: p - 0.1 * g, model, slope)

    losses = []
    for _ in range(6):
        value, model = step(model)
        losses.append(float(value))
    assert losses[-1] < losses[0] - 0.3


# ------------------------------------------------------------------------------------------- arithmetic


def test_an_offset_is_added_in_fp32_whatever_the_scale_is_kept_in():
    scale = jnp.array([0.001953125, -0.5], jnp.bfloat16)  # 1 + 2^-9 is no bf16 number
    np.testing.assert_array_equal(RMSNorm(scale, eps=0.0, offset=1.0)(jnp.ones(2)), [1.001953125, 0.5])


@pytest.mark.parametrize(("dtype", "root"), [(jnp.float32, 24**0.5), (jnp.bfloat16, 4.90625)])
def test_embeddings_are_scaled_by_the_root_of_the_width_rounded_to_their_dtype(dtype, root):
    model = tiny("gemma2", n_layers=1)
    model = eqx.tree_at(lambda m: m.embed.weight, model, jnp.eye(97, 24, dtype=dtype))
    model = eqx.tree_at(lambda m: (m.blocks, m.norm), model, ((), lambda x: x), is_leaf=lambda node: node is model.blocks)
    hidden, _, _ = model.hidden(jnp.arange(3))
    assert hidden.dtype == dtype
    np.testing.assert_allclose(jnp.diagonal(hidden), root, rtol=1e-7)


def test_windows_bases_and_soft_caps_are_heeded():
    """Each setting changes the function: none is read and forgotten."""
    tokens = jr.randint(jr.key(3), (9,), 0, 97)
    plain = logits_of(tiny("olmo3", **SHORT["olmo3"]), tokens)
    for name, value in {"window": 2, "rope_base": 9.0, "rope_base_local": 9.0, "rope_scaling": LinearScaling(factor=4)}.items():
        assert np.abs(logits_of(tiny("olmo3", **SHORT["olmo3"] | {name: value}), tokens) - plain).max() > 1e-2, name


# ------------------------------------------------------------------------------------------- files

COMMON = {"attention_bias": False, "attention_dropout": 0.0, "initializer_range": 0.02, "rms_norm_eps": 1e-06, "use_cache": True}
TOKENS = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "torch_dtype": "bfloat16", "transformers_version": "4.42.4"}
OLD = COMMON | TOKENS
# As published, with the keys of the transformers of their time.
PUBLISHED = {
    "gemma-2b": {
        **OLD, "architectures": ["GemmaForCausalLM"], "head_dim": 256, "hidden_act": "gelu", "hidden_activation": None, "hidden_size": 2048,
        "intermediate_size": 16384, "max_position_embeddings": 8192, "model_type": "gemma", "num_attention_heads": 8,
        "num_hidden_layers": 18, "num_key_value_heads": 1, "rope_scaling": None, "rope_theta": 10000.0, "vocab_size": 256000,
    },
    "gemma-2-27b": {
        **OLD, "architectures": ["Gemma2ForCausalLM"], "attn_logit_softcapping": 50.0, "cache_implementation": "hybrid",
        "final_logit_softcapping": 30.0, "head_dim": 128, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 4608, "intermediate_size": 36864, "max_position_embeddings": 8192, "model_type": "gemma2",
        "num_attention_heads": 32, "num_hidden_layers": 46, "num_key_value_heads": 16, "query_pre_attn_scalar": 144,
        "rope_theta": 10000.0, "sliding_window": 4096, "sliding_window_size": 4096, "vocab_size": 256000,
    },
    "gemma-3-1b": {
        **OLD, "architectures": ["Gemma3ForCausalLM"], "attn_logit_softcapping": None, "cache_implementation": "hybrid",
        "final_logit_softcapping": None, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152,
        "intermediate_size": 6912, "max_position_embeddings": 32768, "model_type": "gemma3_text", "num_attention_heads": 4,
        "num_hidden_layers": 26, "num_key_value_heads": 1, "query_pre_attn_scalar": 256, "rope_local_base_freq": 10000,
        "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6, "vocab_size": 262144,
    },
    "gemma-3-270m": {
        **OLD, "_sliding_window_pattern": 6, "architectures": ["Gemma3ForCausalLM"], "attn_logit_softcapping": None,
        "final_logit_softcapping": None, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 640,
        "intermediate_size": 2048, "layer_types": [S, S, S, S, S, F] * 3, "max_position_embeddings": 32768,
        "model_type": "gemma3_text", "num_attention_heads": 4, "num_hidden_layers": 18, "num_key_value_heads": 1,
        "query_pre_attn_scalar": 256, "rope_local_base_freq": 10000.0, "rope_scaling": None, "rope_theta": 1000000.0,
        "sliding_window": 512, "use_bidirectional_attention": False, "vocab_size": 262144,
    },
    "olmo-2-1b": {
        **OLD, "architectures": ["Olmo2ForCausalLM"], "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 8192,
        "max_position_embeddings": 4096, "model_type": "olmo2", "num_attention_heads": 16, "num_hidden_layers": 16,
        "num_key_value_heads": 16, "rope_scaling": None, "rope_theta": 500000, "tie_word_embeddings": False, "vocab_size": 100352,
    },
    "olmo-3-7b": {
        **OLD, "architectures": ["Olmo3ForCausalLM"], "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 11008,
        "layer_types": [S, S, S, F] * 8, "max_position_embeddings": 65536, "model_type": "olmo3", "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 32, "rope_theta": 500000, "sliding_window": 4096,
        "rope_scaling": {
            "attention_factor": 1.2079441541679836, "beta_fast": 32, "beta_slow": 1, "factor": 8.0,
            "original_max_position_embeddings": 8192, "rope_type": "yarn",
        },
        "tie_word_embeddings": False, "vocab_size": 100278,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_are_read_as_their_presets(name):
    architecture = lm.ARCHITECTURES[PUBLISHED[name]["model_type"]]
    assert architecture.config.from_hf(PUBLISHED[name]) == architecture.presets[name]


def test_absent_soft_caps_of_gemma_2_are_the_published_ones_and_null_is_none():
    published = {name: value for name, value in PUBLISHED["gemma-2-27b"].items() if "softcapping" not in name}
    read = lm.ARCHITECTURES["gemma2"].config.from_hf
    assert (read(published).attention_softcap, read(published).logit_softcap) == (50.0, 30.0)
    without = read(published | {"attn_logit_softcapping": None, "final_logit_softcapping": None})
    assert (without.attention_softcap, without.logit_softcap) == (None, None)
    assert without.to_hf()["attn_logit_softcapping"] is None


@pytest.mark.parametrize("family", ["gemma3_text", "olmo3"])
def test_both_ways_to_write_two_kinds_of_rope_are_one(family):
    """transformers 4 keeps bases and scaling at the top level, transformers 5 under the kinds of layers."""
    base = PUBLISHED["gemma-3-1b" if family == "gemma3_text" else "olmo-3-7b"]
    scaling = {"rope_type": "linear", "factor": 8.0}
    old = base | {"rope_scaling": scaling}
    new = {name: value for name, value in base.items() if name not in ("rope_theta", "rope_scaling", "rope_local_base_freq")}
    new["rope_parameters"] = {
        F: scaling | {"rope_theta": base["rope_theta"]},
        S: {"rope_type": "default", "rope_theta": base.get("rope_local_base_freq", base["rope_theta"])},
    }
    read = lm.ARCHITECTURES[family].config.from_hf
    assert read(old) == read(new)
    assert read(old).rope_scaling == LinearScaling(factor=8.0)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("gemma-2b", {"hidden_act": "silu"}, "hidden_act = 'silu'; our gemma computes"),
        ("gemma-2-27b", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True; our gemma2 computes"),
        ("gemma-2-27b", {"hidden_activation": "silu"}, "hidden_activation = 'silu'; our gemma2 computes"),
        ("gemma-2-27b", {"layer_types": [F]}, "layer_types must name 46 kinds, one for each of n_layers; it names 1"),
        ("gemma-3-1b", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0; our gemma3_text computes"),
        ("gemma-3-1b", {"rope_parameters": {"rope_type": "default"}}, "must be given for full_attention and sliding_attention; it has"),
        ("gemma-3-1b", {"rope_parameters": {S: {"rope_type": "linear", "factor": 2.0}}}, "scales RoPE in sliding layers"),
        ("olmo-2-1b", {"hidden_act": "gelu"}, "hidden_act = 'gelu'; our olmo2 computes"),
        ("olmo-2-1b", {"clip_qkv": 8.0}, "keys we do not know: {'clip_qkv': 8.0}"),
        ("olmo-3-7b", {"rope_theta": 10_000.0}, "rope_theta = 10000.0 and no base for sliding layers"),
    ],
)
def test_what_would_be_another_function_is_refused_by_name(name, changes, words):
    with pytest.raises(ValueError, match=words.replace("{", r"\{")):
        lm.ARCHITECTURES[PUBLISHED[name]["model_type"]].config.from_hf(PUBLISHED[name] | changes)


@pytest.mark.parametrize(
    ("family", "name"),
    [("gemma", "logit_softcap"), ("gemma3_text", "attention_softcap"), ("olmo2", "logit_softcap"), ("olmo3", "attention_softcap")],
)
def test_what_transformers_has_no_key_for_is_not_exported(family, name):
    config = tiny_config(family, **{name: 2.0})
    with pytest.raises(ValueError, match=f"transformers has no {family} with {name} = 2.0"):
        config.to_hf()
    assert type(config).model_validate_json(config.model_dump_json()) == config
