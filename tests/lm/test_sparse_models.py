"""The families with experts: what is true of every model is true of them, and what their files may say."""

from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import facts_of, logits_of, packed_batch, tiny, tiny_config

import lm
from lm.flight import Flight, Stack, put_on_flight
from lm.models import gpt_oss, mixtral, olmoe, qwen3_moe
from lm.quant import from_mxfp4
from train.optimizers import OptimizerConfig, build_optimizer
from train.step import StepConfig, init_state, make_step

# Two layers a family where more would only compile longer.
FAMILIES = {
    "gpt_oss": {"n_layers": 2, "sliding": (True, False)},
    "mixtral": {"n_layers": 2, "window": 5},
    "olmoe": {"n_layers": 2, "clip": 1.5},
    "qwen3_moe": {"n_layers": 2},
}
each_family = pytest.mark.parametrize("family", FAMILIES)


@each_family
def test_cached_greedy_decoding_equals_the_full_forward(family):
    model = tiny(family, **FAMILIES[family])
    drawn = lm.generate(model, [[5, 17, 3], [60]], max_new_tokens=7)[0]  # past the windows; one prompt is padded
    row = [5, 17, 3, *drawn]
    logits = logits_of(model, jnp.array(row))
    assert drawn == [int(jnp.argmax(logits[i])) for i in range(2, len(row) - 1)]


@each_family
def test_documents_packed_into_a_row_are_as_if_alone(family):
    model, batch = tiny(family, **FAMILIES[family]), packed_batch()
    packed = logits_of(model, jnp.asarray(batch.tokens), facts_of(batch))
    for row, document in ((0, 1), (1, 2)):
        places = batch.segments[row] == document
        alone = logits_of(model, jnp.asarray(batch.tokens[row][places]))
        np.testing.assert_allclose(packed[row][places], alone, atol=2e-5 * float(jnp.abs(alone).max()))


def gradient_of(model, batch, flight, backend):
    @eqx.filter_jit
    @jax.grad
    def gradient(model):
        hidden, _, aux = put_on_flight(model, flight, lm.BACKENDS[backend]).hidden(jnp.asarray(batch.tokens), facts_of(batch))
        told = sum(total / count for total, count in aux.values())
        return jnp.sum(jnp.square(hidden) * batch.loss_weights[..., None]) + told

    return jax.tree.leaves(gradient(model))


@each_family
def test_scan_rematerialisation_and_the_cpu_kernels_learn_what_the_loop_does(family):
    alike = {"gpt_oss": {"sliding": (True, True)}, "qwen3_moe": {"dense_layers": ()}}
    model, batch = tiny(family, **(FAMILIES[family] | alike.get(family, {}))), packed_batch()
    flight = Flight(layers="scan", remat="full")
    assert isinstance(put_on_flight(model, flight, lm.REFERENCE).blocks[0], Stack)
    got, expected = gradient_of(model, batch, flight, "cpu"), gradient_of(model, batch, Flight(), "reference")
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=5e-5 * float(jnp.abs(other).max()) + 1e-7)


@each_family
def test_a_few_steps_in_bf16_lower_the_loss(family):
    model, batch = lm.build(tiny_config(family, **FAMILIES[family]), key=jr.key(0)), packed_batch()
    optimizer = build_optimizer(OptimizerConfig(name="muon" if family == "qwen3_moe" else "adamw"))  # muon compiles twice as long
    step = make_step(optimizer, StepConfig(), Flight(dtype="bfloat16"), lm.BACKENDS["cpu"], jr.key(1))
    state, losses = init_state(model, optimizer), []
    for _ in range(8):
        state, metrics = step(state, batch, 0.02)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 1
    assert 2 <= metrics["router_balance"] < 5
    assert metrics["router_z"] > 0


@each_family
def test_a_model_survives_its_folder(family, tmp_path):
    model = tiny(family, **FAMILIES[family])
    lm.save_pretrained(model, tmp_path)
    again = lm.load_pretrained(tmp_path)
    assert again.config.model_copy(update={"router_z": model.config.router_z}) == model.config  # which their files have no key for
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(one, other)


# ------------------------------------------------------------------------------------------- config.json

# As published, but for ids, dtype and version.
PUBLISHED = {
    "mixtral-8x7b": {
        "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "num_experts_per_tok": 2, "num_local_experts": 8,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": None,
        "router_aux_loss_coef": 0.02, "output_router_logits": False, "hidden_act": "silu", "initializer_range": 0.02,
        "attention_dropout": 0.0, "tie_word_embeddings": False,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
        "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "attention_bias": False,
        "max_position_embeddings": 40960, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "rope_scaling": None, "sliding_window": None,
        "use_sliding_window": False, "max_window_layers": 48, "router_aux_loss_coef": 0.001, "output_router_logits": False,
        "hidden_act": "silu", "initializer_range": 0.02, "attention_dropout": 0.0, "tie_word_embeddings": False,
    },
    "olmoe-1b-7b": {
        "model_type": "olmoe", "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16,
        "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": False,
        "clip_qkv": None, "attention_bias": False, "max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
        "rope_scaling": None, "router_aux_loss_coef": 0.01, "output_router_logits": False, "hidden_act": "silu",
        "initializer_range": 0.02, "attention_dropout": 0.0, "tie_word_embeddings": False,
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss", "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32, "num_experts_per_tok": 4,
        "experts_per_token": 4, "attention_bias": True, "sliding_window": 128, "swiglu_limit": 7.0, "initial_context_length": 4096,
        "layer_types": ["sliding_attention", "full_attention"] * 12, "max_position_embeddings": 131072, "rms_norm_eps": 1e-05,
        "rope_theta": 150000,
        "rope_scaling": {
            "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096, "rope_type": "yarn",
            "truncate": False,
        },
        "quantization_config": {"modules_to_not_convert": ["model.layers.*.self_attn"], "quant_method": "mxfp4"},
        "router_aux_loss_coef": 0.9, "output_router_logits": False, "hidden_act": "silu", "initializer_range": 0.02,
        "attention_dropout": 0.0, "tie_word_embeddings": False,
    },
}  # fmt: skip
PRESETS = gpt_oss.PRESETS | mixtral.PRESETS | olmoe.PRESETS | qwen3_moe.PRESETS


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_the_preset_of_its_name(name):
    preset = PRESETS[name]
    assert type(preset).from_hf(PUBLISHED[name]) == preset
    assert type(preset).from_hf(preset.to_hf()) == preset


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise = 0.1; our mixtral computes router_jitter_noise = 0.0 only"),
        ("mixtral", {"hidden_act": "gelu"}, "hidden_act = 'gelu'; our mixtral computes hidden_act = 'silu' only"),
        ("mixtral", {"num_experts_per_tok": 9}, r"top_k \(9\) must not pass n_experts \(8\)"),
        ("olmoe", {"head_dim": 64}, r"head_dim \(64\) must be d_model / n_heads \(2048 / 16\)"),
        ("olmoe", {"num_shared_experts": 1}, "keys we do not know: {'num_shared_experts': 1}"),
        ("gpt_oss", {"layer_types": ["full_attention"]}, "sliding must be 24 of True and False"),
        ("gpt_oss", {"layer_types": ["chunked_attention"] * 24}, "those of a gpt_oss are sliding_attention, full_attention"),
        ("gpt_oss", {"quantization_config": {"quant_method": "awq"}}, "those with quant_method mxfp4 are read"),
        ("gpt_oss", {"experts_per_token": 2}, "experts_per_token = 2; our gpt_oss computes experts_per_token = 4 only"),
    ],
)
def test_a_config_of_another_function_is_refused_by_name(family, changes, words):
    raw = next(config for config in PUBLISHED.values() if config["model_type"] == family)
    with pytest.raises(ValueError, match=words):
        lm.ARCHITECTURES[family].config.from_hf(raw | changes)


def test_layers_without_experts_are_those_listed_and_those_between():
    model = tiny("qwen3_moe", n_layers=4, dense_layers=(1,), sparse_step=2)
    assert ["router" in block.mlp.__dataclass_fields__ for block in model.blocks] == [False, False, False, True]


# ------------------------------------------------------------------------------------------- MXFP4


def test_mxfp4_is_thirty_two_numbers_of_four_bits_times_a_power_of_two():
    """The numbers of the specification's table, written out here, each code once in the lower and once in the upper half of a byte."""
    numbers = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    numbers += [-number for number in numbers]
    blocks = np.array([[[low | (15 - low) << 4 for low in range(16)]] * 3], np.uint8)  # 1 row of 3 blocks
    got = from_mxfp4(blocks, np.array([[127, 130, 120]], np.uint8))
    assert got.shape == (1, 96)
    assert got.dtype == jnp.bfloat16
    for block, scale in enumerate((1.0, 8.0, 2.0**-7)):
        expected = [scale * number for low in range(16) for number in (numbers[low], numbers[15 - low])]
        assert got[0, 32 * block : 32 * block + 32].tolist() == expected


def test_mxfp4_is_what_transformers_makes_of_it():
    with np.load(Path(__file__).parent / "golden" / "mxfp4.npz") as golden:
        got = from_mxfp4(golden["blocks"], golden["scales"])
        np.testing.assert_array_equal(got.astype(np.float32).swapaxes(-1, -2), golden["numbers"])  # theirs lie (in, out)


def test_a_scale_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="1 of 2 MXFP4 scales are NaN"):
        from_mxfp4(np.zeros((2, 1, 16), np.uint8), np.array([[255], [127]], np.uint8))


def test_a_file_of_blocks_and_scales_is_the_model_of_their_numbers_and_is_saved_dense(tmp_path):
    model = tiny("gpt_oss", d_model=32, d_ff=64)
    for name in ("dense", "packed"):
        lm.save_pretrained(model, tmp_path / name, dtype=jnp.bfloat16)
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    rng, packed = np.random.default_rng(0), dict(dense)
    for key in [key for key in dense if key.endswith(("gate_up_proj", "down_proj"))]:
        experts, d_in, d_out = packed.pop(key).shape
        blocks = rng.integers(0, 256, (experts, d_out, d_in // 32, 16), np.uint8)
        scales = rng.integers(122, 126, blocks.shape[:-1], np.uint8)
        packed |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
        dense[key] = np.ascontiguousarray(from_mxfp4(blocks, scales).swapaxes(1, 2))
    save_file(dense, tmp_path / "dense" / "model.safetensors")
    save_file(packed, tmp_path / "packed" / "model.safetensors")
    one, other = (lm.load_pretrained(tmp_path / name) for name in ("packed", "dense"))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)
    lm.save_pretrained(one, tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == dense.keys()
    assert all(np.array_equal(again[key], dense[key]) and again[key].dtype == jnp.bfloat16 for key in dense)


def test_plain_rope_of_a_gpt_oss_is_said_since_silence_means_yarn():
    config = tiny("gpt_oss").config
    written = config.to_hf()
    assert written["rope_parameters"] == {"rope_type": "default", "rope_theta": config.rope_base}
    again = gpt_oss.GptOssConfig.from_hf(written)
    assert (again.rope_scaling, again.rope_base) == (None, config.rope_base)
    del written["rope_parameters"]
    with pytest.raises(ValueError, match="neither rope_parameters nor rope_scaling, where transformers would take YaRN by 32"):
        gpt_oss.GptOssConfig.from_hf(written)
