"""Any family is trained further by `recipes.continue_pretrain`: the loss falls, and what it exports is loaded again."""

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import logits_of, tiny

import lm
from data.tokenizer import Tokenizer
from lm.models import NATIVE
from recipes.continue_pretrain import Config, main, prepared
from train.logs import read_metrics

IN_SHORT = ("gpt_oss",)  # which differs most from the models trained here; the others are minutes together
LAYERS = {"gpt_oss": {"n_layers": 2, "sliding": (True, False)}}  # one of each kind
OTHERS = sorted(set(lm.ARCHITECTURES) - {*IN_SHORT})
WORDS = ["the", "of", "and", "to", "in", "is", "that", "it", "was", "for", "on", "are", "with", "his", "they", "hot", "word", "what"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    for i in range(24):
        (folder / f"{i}.txt").write_text(" ".join(rng.choice(WORDS, 700)))
    return folder


@pytest.mark.parametrize("family", [*IN_SHORT, *(pytest.param(name, marks=pytest.mark.heavy) for name in OTHERS)])
def test_a_loaded_model_learns_and_its_export_is_loaded_again(family, texts, tmp_path):
    tokenizer = Tokenizer.train([file.read_text() for file in sorted(texts.iterdir())], 300)
    save = lm.save_native if family in NATIVE else lm.save_pretrained
    save(tiny(family, vocab=tokenizer.vocab_size, init_std=0.05, **LAYERS.get(family, {})), tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    main(
        Config(
            source=tmp_path / "model",
            data=str(texts),
            replay="none",
            run_dir=tmp_path / "run",
            steps=12,
            batch=4,
            seq=48,
            validate_rows=8,
            save_every=12,
            sample_every=100,
            backend="reference",
            schedule={"peak": 0.01},
        )
    )
    entries = [entry for entry in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in entry]
    losses = [entry["loss"] for entry in entries]
    has_experts = family in ("gpt_oss", "mixtral", "olmoe", "qwen3_moe")
    assert all(("router_balance" in entry and "router_z" in entry) is has_experts for entry in entries)
    assert losses[-1] < 0.9 * losses[0]
    again = lm.load_pretrained(tmp_path / "run" / "export")
    assert type(again.config).model_type == family
    assert np.isfinite(logits_of(again, jnp.arange(9))).all()


def test_dropout_that_a_family_has_no_place_for_is_refused():
    with pytest.raises(ValueError, match=r"--dropout 0.1: a gemma2 has no dropout on its branches; leave it out"):
        prepared(tiny("gemma2"), 0.1)
    assert prepared(tiny("llama"), 0.1).config.dropout == 0.1
