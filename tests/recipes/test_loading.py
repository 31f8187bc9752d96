"""A run that trains adapters is a model too: its base, loaded anew, with the adapters of its last checkpoint merged in."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tiny import tiny

import lm
from data.tokenizer import Tokenizer
from recipes.loading import load
from train.adapters import AdapterConfig, adapted, trained_part
from train.checkpoint import Checkpoints
from train.optimizers import OptimizerConfig, build_optimizer
from train.step import init_state


def test_an_adapter_run_opens_as_its_base_with_the_adapters_merged_and_refuses_another_base(tmp_path):
    base, run = tmp_path / "base", tmp_path / "run"
    tokenizer = Tokenizer.train(["def f(x):\n    return x + 1\n" * 20], 300)
    model = tiny("llama", n_layers=1, vocab=tokenizer.vocab_size)
    lm.save_pretrained(model, base)
    tokenizer.save(base)
    tokenizer.save(run / "tokenizer")
    (run / "config.json").write_text(json.dumps({"source": str(base)}))

    config = AdapterConfig(rank=3, base="int8")
    on = adapted(model, config, key=jr.key(7))  # another key than loading has: no number of it may come from there
    on = jax.tree.map(lambda leaf, is_trained: leaf + 0.1 if is_trained else leaf, on, trained_part(on, config))
    state = init_state(on, build_optimizer(OptimizerConfig(name="adamw")), trainable=trained_part(on, config))
    record = {"model_type": "llama", "model": model.config.model_dump(mode="json"), "use_average": False}
    record |= {"base": lm.Base.of(model, base).record(), "adapter": config.model_dump(mode="json"), "also": []}
    with Checkpoints(run / "checkpoints") as checkpoints:
        checkpoints.save(2, state.items(by_reference=True), record)

    opened, _, origin = load(run)
    assert "adapters of step 2 merged into base" in origin
    assert eqx.tree_equal(opened, lm.dequantised(lm.merge(on)))  # embedding and all
    lm.save_pretrained(eqx.tree_at(lambda m: m.norm.scale, model, replace_fn=lambda scale: 2 * scale), base)
    with pytest.raises(ValueError, match="it has other weights now"):
        load(run)
    grown = jnp.asarray(np.zeros((tokenizer.vocab_size + 1, 24), np.float32))
    bigger = tiny("llama", n_layers=1, vocab=tokenizer.vocab_size + 1)
    lm.save_pretrained(eqx.tree_at(lambda m: m.embed.weight, bigger, grown), base)
    with pytest.raises(ValueError, match="arrays have other shapes"):
        load(run)


def test_a_model_opens_with_an_adapter_on_it_and_refuses_that_of_another(tmp_path):
    tokenizer = Tokenizer.train(["def f(x):\n    return x + 1\n" * 20], 300)
    for name, seed in (("base", 0), ("other", 1)):
        lm.save_pretrained(tiny("llama", seed, n_layers=1, vocab=tokenizer.vocab_size), tmp_path / name)
        tokenizer.save(tmp_path / name)
    base = lm.load_pretrained(tmp_path / "base")
    on = lm.add_lora(base, rank=3, dora=True, key=jr.key(0))
    on = jax.tree.map(lambda leaf, is_trained: leaf + 0.1 if is_trained else leaf, on, lm.trainable_filter(on))
    lm.save_adapter(on, tmp_path / "adapter", base=lm.Base.of(base, "owner/base"))

    opened, _, origin = load(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")
    assert origin.endswith(f"base with the adapter {tmp_path / 'adapter'}")
    assert eqx.tree_equal(opened, lm.merge(on))
    with pytest.raises(ValueError, match=r"trained on owner/base \(digest .*, and this model has other weights"):
        load(f"{tmp_path / 'other'}+{tmp_path / 'adapter'}")
    with pytest.raises(FileNotFoundError, match="expected the folder of an adapter"):
        load(f"{tmp_path / 'base'}+{tmp_path / 'other'}")
    with pytest.raises(ValueError, match=r"adapter is an adapter, of owner/base: name its base before it, BASE\+"):
        load(tmp_path / "adapter")
    (tmp_path / "base").rename(tmp_path / "c++")  # a plus of its own
    assert eqx.tree_equal(load(tmp_path / "c++")[0], base)
