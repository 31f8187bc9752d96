"""What GPT-2 has that the others have not: transposed and fused tensors, old files, tables of positions."""

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import logits_of, tiny, tiny_config

import lm


def test_queries_keys_and_values_lie_fused_and_transposed_in_the_file(tmp_path):
    model = tiny("gpt2")
    lm.save_pretrained(model, tmp_path)
    tensors, attn = load_file(tmp_path / "model.safetensors"), model.blocks[1].attn
    fused = tensors["transformer.h.1.attn.c_attn.weight"]
    assert fused.shape == (24, 72)
    np.testing.assert_array_equal(fused[:, 24:48], attn.k_proj.weight.T)
    np.testing.assert_array_equal(tensors["transformer.h.1.attn.c_attn.bias"][48:], attn.v_proj.bias)
    assert tensors["transformer.h.1.mlp.c_fc.weight"].shape == (24, 40)
    np.testing.assert_array_equal(lm.load_pretrained(tmp_path).blocks[1].attn.q_proj.weight, attn.q_proj.weight)


def test_files_of_before_the_prefix_load_and_their_masks_are_left(tmp_path):
    model = tiny("gpt2")
    lm.save_pretrained(model, tmp_path)
    tensors = {key.removeprefix("transformer."): value for key, value in load_file(tmp_path / "model.safetensors").items()}
    tensors["h.0.attn.bias"] = np.ones((1, 1, 64, 64), np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    tokens = jnp.arange(7)
    np.testing.assert_array_equal(logits_of(lm.load_pretrained(tmp_path), tokens), logits_of(model, tokens))


def test_a_fused_tensor_of_another_shape_is_named(tmp_path):
    lm.save_pretrained(tiny("gpt2"), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["transformer.h.1.attn.c_attn.weight"] = np.ones((24, 71), np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"shape: transformer.h.1.attn.c_attn.weight is \(24, 71\), expected \(24, 72\)"):
        lm.load_pretrained(tmp_path)


def test_configs_go_out_and_come_back():
    config = tiny_config("gpt2", tied=False, activation="relu", embed_dropout=0.1, dropout=0.2, attention_dropout=0.3, norm_eps=3e-4)
    assert type(config).from_hf(config.to_hf()) == config


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        ({"scale_attn_weights": False}, "scale_attn_weights = False"),
        ({"activation_function": "mish"}, "'mish' is not known; known are gelu"),
        ({"n_head": 5}, r"d_model \(24\) must be a multiple of n_heads \(5\)"),
        ({"alibi": True}, "alibi"),
    ],
)
def test_keys_that_change_the_function_are_refused(keys, words):
    config = tiny_config("gpt2")
    with pytest.raises(ValueError, match=words):
        type(config).from_hf(config.to_hf() | keys)


def test_sinusoidal_positions_need_no_table_and_are_not_exported(tmp_path):
    model = tiny("gpt2", positions="sinusoidal")
    assert tiny("gpt2").n_params - model.n_params == 64 * 24
    assert not np.allclose(logits_of(model, jnp.array([5, 5, 5]))[1], logits_of(model, jnp.array([5, 5, 5]))[2])
    with pytest.raises(ValueError, match="no gpt2 with positions = 'sinusoidal'"):
        lm.save_pretrained(model, tmp_path / "export")
    assert not (tmp_path / "export").exists()
    assert len(lm.generate(model, [[1, 2], [3]], max_new_tokens=4)[0]) == 4
