"""Two models on the same text: the figures are those of each alone, and the verdict follows from documents."""

import json
import math

import grain
import numpy as np
import pytest
from tiny import tiny

import lm
from data.cache import TokenCache
from data.sources import open_source
from data.tokenizer import Tokenizer
from lm.flight import Flight
from recipes.compare import Config, Said, compared, courses, main
from recipes.report import bits_of, nats_of
from train.step import make_token_nats

WORDS = ["the", "of", "and", "to", "in", "is", "that", "it", "was", "for", "on", "are", "with", "his", "they", "hot", "word", "what"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Texts, two models with one tokenizer, and a third with another."""
    root = tmp_path_factory.mktemp("compare")
    rng = np.random.default_rng(0)
    (root / "texts").mkdir()
    for i in range(30):
        (root / "texts" / f"{i}.txt").write_text(" ".join(rng.choice(WORDS, 30)))
    texts = [file.read_text() for file in sorted((root / "texts").iterdir())]
    for name, family, vocab in (("one", "qwen3", 280), ("other", "zmaj", 280), ("third", "qwen3", 290)):
        tokenizer = Tokenizer.train(texts, vocab)
        lm.save_native(tiny(family, n_layers=2, vocab=tokenizer.vocab_size, window_by_layer=None, init_std=0.1), root / name)
        tokenizer.save(root / name)
    return root


def asked(place, a, b, run_dir, **changes):
    settings = {
        "data": str(place / "texts"),
        "whole": True,
        "documents": 6,
        "seq": 32,
        "batch": 4,
        "backend": "reference",
        "dtype": "float32",
    }
    return main(Config(a=place / a, b=place / b, run_dir=run_dir, **(settings | changes)))


def test_figures_are_those_of_each_model_alone(place, tmp_path, monkeypatch):
    monkeypatch.setenv("ZMAJ_CACHE_DIR", str(tmp_path / "cache"))
    found = asked(place, "one", "other", tmp_path / "run")
    assert (found["documents"], found["same_tokens"]) == (6, True)
    source = open_source(str(place / "texts"))
    everything = [source.train[i] for i in range(len(source.train))] + [source.held_out[i] for i in range(len(source.held_out))]
    every = len(everything) // 6
    documents = everything[: 6 * every : every]

    tokenizer = Tokenizer.load(place / "one")
    cache = TokenCache.build_or_open(grain.MapDataset.source(documents), tokenizer, tmp_path, source_digest="x", split="held_out")
    for side, name in (("a", "one"), ("b", "other")):
        nats, _ = nats_of(make_token_nats(Flight(), lm.REFERENCE), lm.load_pretrained(place / name), cache, batch=4, seq=32)
        assert found["bits_per_byte"][side] == pytest.approx(bits_of(cache, nats, range(6)), rel=1e-5)
    difference = found["bits_per_byte"]["a"] - found["bits_per_byte"]["b"]
    assert found["difference"]["value"] == pytest.approx(difference, abs=1e-9)
    tokens = found["tokens"]
    assert tokens["n"] == cache.total_tokens - 6
    assert tokens["difference"]["value"] * tokens["n"] == pytest.approx(difference * found["bytes"], rel=1e-6)
    assert tokens["a_better"] + tokens["b_better"] == pytest.approx(1.0)
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == found
    assert (tmp_path / "run" / "differences.png").read_bytes().startswith(b"\x89PNG")


def test_other_tokenizers_are_compared_by_documents_and_a_model_with_itself_is_a_draw(place, tmp_path, monkeypatch):
    monkeypatch.setenv("ZMAJ_CACHE_DIR", str(tmp_path / "cache"))
    found = asked(place, "one", "third", tmp_path / "run")
    assert not found["same_tokens"]
    assert "tokens" not in found
    same = asked(place, "one", "one", tmp_path / "again")
    assert (same["difference"]["value"], same["verdict"]) == (0.0, "not decided")


def test_the_verdict_follows_from_documents():
    """Differences of 1 bit in each of four documents of 2 bytes are certain; of +3, -1, +3, -1 they are not."""

    def of(per_document):
        bits = np.asarray(per_document, float)
        places = np.repeat(np.arange(4), 2)
        return Said(bits, np.repeat(bits / 2, 2), places)

    text_bytes = np.full(4, 2.0)
    sure = compared(of([5, 4, 6, 7]), of([4, 3, 5, 6]), text_bytes, same_tokens=True)
    assert (sure["difference"]["value"], sure["verdict"]) == (0.5, "B is better")
    assert sure["tokens"]["b_better"] == 1.0
    assert compared(of([4, 3, 5, 6]), of([5, 4, 6, 7]), text_bytes, same_tokens=False)["verdict"] == "A is better"
    open_ = compared(of([7, 4, 7, 4]), of([4, 5, 4, 5]), text_bytes, same_tokens=True)
    assert (open_["difference"]["value"], open_["verdict"]) == (0.5, "not decided")
    assert open_["tokens"]["standard_error_if_independent"] == pytest.approx(np.std([1.5, -0.5] * 4, ddof=1) / math.sqrt(8))


def test_runs_of_one_order_are_paired_by_step(tmp_path):
    for name, shift, seed in (("a", 0.0, 3), ("b", 0.5, 3), ("c", 0.0, 4)):
        run = tmp_path / name
        (run / "export").mkdir(parents=True)
        (run / "config.json").write_text(json.dumps({"batch": 2, "seq": 8, "seed": seed, "packing": "concat"}))
        (run / "manifest.json").write_text(json.dumps({"corpus": {"sha256": "x"}, "tokenizer": {"digest": "y"}}))
        lines = [{"step": s, "loss": 3 - s / 40 + shift, "step_s": 0.1 * (1 + shift)} for s in range(1, 41)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = courses(tmp_path / "a", tmp_path / "b")
    assert found["same_order"]
    assert found["step_s"] == pytest.approx({"a": 0.1, "b": 0.15})
    assert found["last_losses"]["steps"] == 4
    assert found["last_losses"]["difference"]["value"] == pytest.approx(-0.5)
    assert "last_losses" not in courses(tmp_path / "a", tmp_path / "c")
    assert courses(tmp_path / "a", tmp_path / "nowhere") == {}


def test_without_a_text_it_is_asked_for(place, tmp_path):
    with pytest.raises(ValueError, match="neither is a run whose corpus is known: say --data TEXT"):
        asked(place, "one", "other", tmp_path, data=None)
