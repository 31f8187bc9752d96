import json
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import tiny, tiny_config

import lm


@pytest.fixture(params=["llama", "qwen3"])
def model(request):
    """Those whose keys the tests below name; what gpt2's files ask for beyond that is in test_gpt2.py."""
    return tiny(request.param)


def same(one, other):
    return all(
        a.dtype == b.dtype and np.array_equal(np.asarray(a), np.asarray(b))
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )


@pytest.mark.parametrize("tied", [True, False])
def test_saved_and_loaded_is_the_same_bit_for_bit(model, tied, tmp_path):
    model = tiny(model.config.model_type, tied=tied, attention_bias=True)
    lm.save_pretrained(model, tmp_path)
    loaded = lm.load_pretrained(tmp_path)
    assert loaded.config == model.config
    assert jax.tree.structure(loaded) == jax.tree.structure(model)
    assert same(loaded, model)


def test_dtype_can_be_changed_on_the_way_out_and_in(model, tmp_path):
    lm.save_pretrained(model, tmp_path, dtype=jnp.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(lm.load_pretrained(tmp_path)))
    wide = lm.load_pretrained(tmp_path, dtype=jnp.float32)
    assert same(wide, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), model))


def test_missing_left_over_and_misshapen_tensors_are_listed_together(model, tmp_path):
    lm.save_pretrained(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["model.layers.7.mlp.up_proj.weight"] = np.ones((3, 2), np.float32)
    tensors["model.embed_tokens.weight"] = np.ones((4, 24), np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="does not hold the model") as caught:
        lm.load_pretrained(tmp_path)
    for words in (
        "missing: model.norm.weight (24,)",
        "left over: model.layers.7.mlp",
        "shape: model.embed_tokens.weight is (4, 24), expected (97, 24)",
    ):
        assert words in str(caught.value)


def test_a_truncated_file_is_named(model, tmp_path):
    lm.save_pretrained(model, tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        lm.load_pretrained(tmp_path)


def test_a_full_disk_is_said(model, tmp_path):
    """A limit on file size stands in for a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
    try:
        with pytest.raises(OSError, match=r"model.safetensors could not be written .*: is the disk full\?"):
            lm.save_pretrained(model, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize(("content", "words"), [("{", "is not whole JSON .*cut short"), ("[]", "holds a list: expected a JSON object")])
def test_json_that_is_none_is_named(name, content, words, tmp_path):
    lm.save_pretrained(tiny("llama"), tmp_path, max_shard_bytes=10_000)
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name} {words}"):
        lm.load_pretrained(tmp_path)


def test_a_tied_model_may_be_kept_with_its_unembedding_if_that_is_the_embedding(model, tmp_path):
    model = tiny(model.config.model_type, tied=True)
    lm.save_pretrained(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, tmp_path / "model.safetensors")
    assert same(lm.load_pretrained(tmp_path), model)
    tensors["lm_head.weight"][3, 5] += 1e-3
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head.weight is not equal to model.embed_tokens.weight, though config.json says"):
        lm.load_pretrained(tmp_path)


@pytest.mark.parametrize(("kind", "words"), [("float8_e4m3fn", "F8_E4M3"), ("int8", "I8"), ("float64", "F64")])
def test_dtypes_we_do_not_take_are_named(kind, words, tmp_path):
    lm.save_pretrained(tiny("llama"), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(jnp.dtype(kind))
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"dtype: model.norm.weight is {words}, expected one of F32, F16, BF16"):
        lm.load_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_each_dtype_of_a_file_loads_as_it_is_and_as_another(kind, tmp_path):
    model = jax.tree.map(lambda leaf: leaf.astype(kind), tiny("llama"))
    lm.save_pretrained(model, tmp_path)
    assert same(lm.load_pretrained(tmp_path), model)
    assert same(lm.load_pretrained(tmp_path, dtype=jnp.bfloat16), jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model))


def test_saving_in_another_dtype_than_weights_have_in_files_is_refused(tmp_path):
    with pytest.raises(ValueError, match="would be written as int8, expected one of float32, float16, bfloat16"):
        lm.save_pretrained(tiny("llama"), tmp_path / "out", dtype=jnp.int8)
    assert not (tmp_path / "out").exists()


def test_what_was_loaded_may_be_donated(tmp_path):
    """Arrays take over the memory they were read into."""
    lm.save_pretrained(tiny("llama"), tmp_path)
    loaded, before = lm.load_pretrained(tmp_path), tiny("llama")
    for _ in range(3):
        loaded = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)(loaded)
    assert same(loaded, jax.tree.map(lambda leaf: leaf + 1 + 1 + 1, before))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth", "model.pt"])
def test_pickles_are_refused_and_nothing_of_them_is_opened(name, tmp_path):
    lm.save_pretrained(tiny("llama"), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(ValueError, match=rf"as pickles only \({name}\). Opening a pickle runs code .*save_pretrained\(OUT\)"):
        lm.load_pretrained(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=r"holds neither model\.safetensors nor model\.safetensors\.index\.json"):
        lm.load_pretrained(tmp_path)


def test_quantised_weights_are_refused_by_the_name_of_their_method(tmp_path):
    lm.save_pretrained(tiny("llama"), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "awq", "bits": 4}}))
    with pytest.raises(ValueError, match="packed by 'awq', which our llama does not unpack"):
        lm.load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("hidden_act", "gelu", "hidden_act = 'gelu'"),
        ("rope_scaling", {"rope_type": "longrope", "factor": 4.0}, "'longrope'; known are default, linear"),
        ("attention_multiplier", 0.5, "attention_multiplier"),
        ("model_type", "mamba", "known are gpt2, .*llama, .*qwen3"),
    ],
)
def test_config_keys_that_change_the_function_are_refused(key, value, words, tmp_path):
    lm.save_pretrained(tiny("llama"), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=words):
        lm.load_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_configs_go_out_and_come_back(name):
    config = tiny_config(name, rope_base=12_345.0, norm_eps=3e-4, attention_bias=True)
    assert type(config).from_hf(config.to_hf()) == config
    modern = config.to_hf()
    modern["rope_parameters"] = {"rope_type": "default", "rope_theta": modern.pop("rope_theta")}  # transformers 5
    assert type(config).from_hf(modern) == config


def test_presets_have_the_published_number_of_parameters():
    import equinox as eqx

    published = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168}
    published |= {"smollm2-135m": 134_515_008, "tinyllama-1.1b": 1_100_048_384, "qwen3-0.6b": 596_049_920, "qwen3-1.7b": 1_720_574_976}
    published |= {"mixtral-8x7b": 46_702_792_704, "qwen3-30b-a3b": 30_532_122_624, "olmoe-1b-7b": 6_919_161_856}
    published |= {"gpt-oss-20b": 20_914_757_184}
    counted = {}
    for architecture in lm.ARCHITECTURES.values():
        for name, config in architecture.presets.items():
            skeleton = eqx.filter_eval_shape(lambda key, a=architecture, c=config: a.model.init(c, key=key), jax.random.key(0))
            counted[name] = sum(leaf.size for leaf in jax.tree.leaves(skeleton))
    assert counted == published
