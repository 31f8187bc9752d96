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
