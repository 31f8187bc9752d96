"""Our own folders: they come back as they were, nobody else takes them for theirs, and what is wrong with one is said."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny import tiny

import lm
from lm.quant import Int8Rows, pack

FORMS = {"int8": {}, "int4": {"group": 10}, "nf4": {"group": 8, "double": True}}


def packed(kind, **changes):
    return lm.quantised(tiny("llama", n_layers=1, **changes), kind, dtype=jnp.bfloat16, **FORMS[kind])


@pytest.mark.parametrize("kind", FORMS)
def test_a_packed_model_comes_back_as_it_was(kind, tmp_path):
    model = packed(kind)
    lm.save_native(model, tmp_path, extra_config={"bos_token_id": 3})
    assert eqx.tree_equal(lm.load_pretrained(tmp_path), model)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "zmaj"  # no name that another library knows
    assert config["bos_token_id"] == 3
    assert "architectures" not in config
    assert set(config["zmaj"]["quantisation"]) == {
        *(f"attn.{name}_proj.weight" for name in "qkvo"), *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
        "embed.weight", "unembed.weight",
    }  # fmt: skip
    with safe_open(tmp_path / "model.safetensors", "np") as tensors:
        assert "blocks.0.attn.q_proj.weight.scales" in tensors.keys() or kind == "nf4"  # noqa: SIM118


def test_the_dtype_asked_for_is_that_of_norms_and_products_and_no_packed_number_changes(tmp_path):
    lm.save_native(packed("int4"), tmp_path)
    model = lm.load_pretrained(tmp_path, dtype=jnp.float16)
    assert model.norm.scale.dtype == model.embed.weight.dtype == model.blocks[0].attn.q_proj.weight.dtype == jnp.float16
    assert model.blocks[0].attn.q_proj.weight.scales.dtype == jnp.bfloat16


def test_layers_may_be_packed_in_different_ways_or_not_at_all(tmp_path):
    model = tiny("llama", n_layers=3)
    model = eqx.tree_at(lambda m: m.blocks[1].mlp.up_proj.weight, model, replace_fn=lambda w: pack(w, "nf4", group=8))
    model = eqx.tree_at(lambda m: m.blocks[2].mlp.up_proj.weight, model, replace_fn=Int8Rows.of)
    lm.save_native(model, tmp_path, max_shard_bytes=5000)  # in shards
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert eqx.tree_equal(lm.load_pretrained(tmp_path), model)
    written = json.loads((tmp_path / "config.json").read_text())["zmaj"]["quantisation"]
    assert set(written) == {"blocks/1/mlp/up_proj/weight", "blocks/2/mlp/up_proj/weight"}


def test_settings_that_transformers_has_no_keys_for_are_kept(tmp_path):
    model = tiny("llama", n_layers=3, d_ff_by_layer=(40, 44, 36), logit_softcap=5.0)
    with pytest.raises(ValueError, match=r"A folder of ours can \(lm.save_native\)"):
        lm.save_pretrained(model, tmp_path)
    lm.save_native(model, tmp_path)
    again = lm.load_pretrained(tmp_path)
    assert again.config == model.config
    assert eqx.tree_equal(again, model)


def test_no_packed_or_adapted_model_goes_into_a_folder_for_transformers(tmp_path):
    with pytest.raises(ValueError, match=r"9 of this model are Int8Rows: lm.save_native keeps them"):
        lm.save_pretrained(packed("int8"), tmp_path)
    adapted = lm.add_lora(tiny("llama", n_layers=1), targets=("mlp.up_proj",), key=jr.key(0))
    with pytest.raises(ValueError, match=r"1 of this model are LoRA: merge them"):
        lm.save_pretrained(adapted, tmp_path)
    with pytest.raises(ValueError, match="this model has adapters: merge them"):
        lm.save_native(adapted, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def folder(tmp_path):
    lm.save_native(packed("int8"), tmp_path)
    return tmp_path


def test_another_format_and_another_architecture_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    for change, words in (({"format": 2}, "in format 2; this version reads 1"), ({"architecture": "bert"}, "the architecture 'bert'")):
        (folder / "config.json").write_text(json.dumps(config | {"zmaj": config["zmaj"] | change}))
        with pytest.raises(ValueError, match=words):
            lm.load_pretrained(folder)


def test_tensors_that_are_not_those_of_the_config_are_listed(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["more"] = np.zeros(3, np.float32)
    del tensors["norm.scale"]
    tensors["embed.weight.values"] = tensors["embed.weight.values"].astype(np.float32)
    tensors["unembed.weight.scales"] = tensors["unembed.weight.scales"][:-1]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="does not hold the model") as error:
        lm.load_pretrained(folder)
    lines = str(error.value).splitlines()[1:]
    assert [line.strip() for line in lines] == [
        "embed.weight.values is F32 (97, 24), expected shape (97, 24) of int8",
        "left over: more",
        "missing: norm.scale",
        "unembed.weight.scales is F32 (96,), expected shape (97,)",
    ]


@pytest.mark.parity
def test_transformers_refuses_the_folder(folder):
    transformers = pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="zmaj"):
        transformers.AutoConfig.from_pretrained(folder)


def test_it_is_placed_as_asked(folder):
    device = jax.devices()[0]
    model = lm.load_pretrained(folder, sharding=lambda path: jax.sharding.SingleDeviceSharding(device))
    assert eqx.tree_equal(model, lm.load_pretrained(folder))
