"""Adapters in PEFT's files: those of `peft` compute here what they compute there, ours are written as it writes them, and only the base
they belong to takes them. The golden file comes from `make_peft_golden.py`; numbers are drawn by name on both sides."""

import json
from functools import lru_cache
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from golden_cases import GOLDEN
from golden_weights import draw
from safetensors.numpy import load_file, save_file
from tiny import logits_of, tiny

import lm

CASES = ("lora", "patterns", "rslora", "dora", "saved", "conv1d", "conv1d_dora")
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


@lru_cache
def golden():
    with np.load(GOLDEN / "peft.npz") as file:
        return dict(file)


def drawn(shapes, file):
    save_file({name: draw(name, tuple(shape)) for name, shape in json.loads(str(shapes)).items()}, file)


def folders_of(case: str, folder: Path) -> tuple[Path, Path]:
    """The base as `transformers` would have written it, the adapter as `peft` would."""
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir(parents=True)
    adapter.mkdir()
    (base / "config.json").write_text(str(golden()[f"{case}.config"]))
    drawn(golden()[f"{case}.shapes"], base / "model.safetensors")
    (adapter / CONFIG).write_text(str(golden()[f"{case}.adapter_config"]))
    drawn(golden()[f"{case}.adapter_shapes"], adapter / TENSORS)
    return base, adapter


def test_there_is_a_golden_file_of_each_case():
    assert {name.partition(".")[0] for name in golden()} == set(CASES)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_peft_merged_and_not_and_the_files_come_back(case, tmp_path):
    base, adapter = folders_of(case, tmp_path)
    model = lm.load_pretrained(base)
    adapted = lm.load_adapter(model, adapter)
    tokens = jnp.asarray(golden()[f"{case}.tokens"])
    # fp32 on both sides, sums in another order; logits are of order 1.
    np.testing.assert_allclose(logits_of(adapted, tokens), golden()[f"{case}.logits"], atol=2e-5, rtol=0)
    np.testing.assert_allclose(logits_of(lm.merge(adapted), tokens), golden()[f"{case}.merged"], atol=2e-5, rtol=0)
    assert np.abs(logits_of(model, tokens) - golden()[f"{case}.logits"]).max() > 0.1

    also = ("embed.weight", "unembed.weight", "*norm.scale") if case == "saved" else ()
    lm.save_adapter(adapted, tmp_path / "again", base=lm.Base.of(model, f"tiny-{model.config.model_type}"), also=also)
    theirs, ours = load_file(adapter / TENSORS), load_file(tmp_path / "again" / TENSORS)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name])
    config, written = (json.loads((folder / CONFIG).read_text()) for folder in (adapter, tmp_path / "again"))
    same = {"peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "bias"}
    assert {name: written[name] for name in same} == {name: config[name] for name in same}
    assert written.keys() <= config.keys()  # nothing peft would not know


@pytest.mark.parametrize("family", ["gpt2", "phi3", "gpt_neox"])
def test_adapters_of_fused_tensors_are_one_in_the_file(family, tmp_path):
    model = tiny(family, n_layers=1)
    adapted = lm.add_lora(model, rank=5, alpha=11.0, targets=("attn.q_proj", "attn.v_proj"), key=jr.key(0))
    ups = np.random.default_rng(0)
    adapted = jax.tree.map(
        lambda leaf, is_trained: leaf + ups.standard_normal(leaf.shape).astype(np.float32) if is_trained else leaf,
        adapted,
        lm.trainable_filter(adapted),
    )
    lm.save_adapter(adapted, tmp_path, base=lm.Base.of(model, "a-tiny-one"))
    tensors = load_file(tmp_path / TENSORS)
    assert sorted(array.shape for array in tensors.values()) == sorted(
        [(10, 24), (sum(getattr(model.blocks[0].attn, f"{n}_proj").weight.shape[0] for n in "qkv"), 10)]
    )
    assert json.loads((tmp_path / CONFIG).read_text())["lora_alpha"] == 22.0  # over twice the rank
    back = lm.load_adapter(model, tmp_path)
    assert isinstance(back.blocks[0].attn.k_proj, lm.LoRA)  # whose rows of `up` are 0
    tokens = jnp.asarray([[5, 3, 9, 11]])
    np.testing.assert_allclose(logits_of(back, tokens), logits_of(adapted, tokens), atol=1e-4)


# ------------------------------------------------------------------------------------------- the base


@lru_cache
def _adapted(**settings):
    return lm.add_lora(tiny("llama", n_layers=1), rank=5, key=jr.key(0), **settings)


def test_the_digest_is_of_the_numbers_whatever_their_dtype_and_of_no_adapter(tmp_path):
    model = lm.cast(tiny("llama", n_layers=1), jnp.bfloat16)
    base = lm.Base.of(model, "some/name")
    assert base == lm.Base.of(lm.cast(model, jnp.float32), "some/name") == lm.Base.of(lm.add_lora(model, key=jr.key(0)), "some/name")
    assert base.digest != lm.Base.of(eqx.tree_at(lambda m: m.norm.scale, model, replace_fn=lambda scale: 1.01 * scale), "").digest
    assert lm.Base.of(model, tmp_path).name == tmp_path.name  # no path of this machine


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: tiny("llama", n_layers=1, seed=1), r"trained on the/base \(digest [0-9a-f]{12}\), and this model has other weights"),
        (
            lambda: tiny("llama", n_layers=1, d_ff=44),
            r"trained on the/base, is not one for this model:\n.*lora_A.weight has shape \(5, 40\)",
        ),
        (lambda: tiny("gpt2", n_layers=1), "this model has no such module"),
    ],
)
def test_another_base_is_refused(other, words, tmp_path):
    lm.save_adapter(_adapted(), tmp_path, base=lm.Base.of(tiny("llama", n_layers=1), "the/base"))
    with pytest.raises(ValueError, match=words):
        lm.load_adapter(other(), tmp_path)


def test_a_base_that_was_rounded_since_is_vouched_for_by_what_it_was(tmp_path):
    model = tiny("llama", n_layers=1)
    base = lm.Base.of(model, "the/base")
    lm.save_adapter(_adapted(), tmp_path, base=base)
    packed = lm.quantised(model)
    with pytest.raises(ValueError, match="load first and cast then"):
        lm.load_adapter(packed, tmp_path)
    assert eqx.tree_equal(lm.load_adapter(packed, tmp_path, base=base), lm.quantised(_adapted()))


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"peft_type": "IA3"}, "adapter of type 'IA3'; only LORA"),
        ({"init_lora_weights": "pissa"}, r"settings we do not compute: {'init_lora_weights': 'pissa'}"),
        ({"lora_bias": True}, "'lora_bias': True"),
        ({"bias": "all"}, "'bias': 'all'"),
    ],
)
def test_settings_of_another_function_are_refused(setting, words, tmp_path):
    lm.save_adapter(_adapted(), tmp_path, base=lm.Base.of(tiny("llama", n_layers=1), "x"))
    (tmp_path / CONFIG).write_text(json.dumps(json.loads((tmp_path / CONFIG).read_text()) | setting))
    with pytest.raises(ValueError, match=words):
        lm.load_adapter(tiny("llama", n_layers=1), tmp_path)


def test_what_is_no_adapter_is_said(tmp_path):
    model = tiny("llama", n_layers=1)
    with pytest.raises(FileNotFoundError, match="expected the folder of an adapter"):
        lm.load_adapter(model, tmp_path)
    lm.save_adapter(_adapted(), tmp_path, base=lm.Base.of(model, "x"))
    with pytest.raises(ValueError, match="has adapters already"):
        lm.load_adapter(_adapted(), tmp_path)
    (tmp_path / TENSORS).write_bytes((tmp_path / TENSORS).read_bytes()[:-7])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        lm.load_adapter(model, tmp_path)
    (tmp_path / TENSORS).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="as a pickle"):
        lm.load_adapter(model, tmp_path)


# ------------------------------------------------------------------------------------------- peft itself


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_peft_loads_what_we_write_and_merges_it_to_the_same(family, kind, tmp_path):
    torch, transformers, peft = pytest.importorskip("torch"), pytest.importorskip("transformers"), pytest.importorskip("peft")
    model = tiny(family)
    adapted = lm.add_lora(model, rank=5, alpha=11.0, key=jr.key(0), **({} if kind == "lora" else {kind: True}))
    rng = np.random.default_rng(0)
    also = ("norm.scale",) if family == "llama" else ()
    adapted = jax.tree.map(
        lambda leaf, is_trained: leaf + 0.1 * rng.standard_normal(leaf.shape).astype(np.float32) if is_trained else leaf,
        adapted,
        lm.trainable_filter(adapted, also),
    )
    lm.save_pretrained(model, tmp_path / "base")
    lm.save_adapter(adapted, tmp_path / "adapter", base=lm.Base.of(model, tmp_path / "base"), also=also)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    tokens = np.random.default_rng(1).integers(0, 97, (2, 13))
    ours = logits_of(adapted, jnp.asarray(tokens))
    for each in (theirs, theirs.merge_and_unload()):
        with torch.no_grad():
            np.testing.assert_allclose(each(torch.from_numpy(tokens)).logits.numpy(), ours, atol=1e-4, rtol=0)
