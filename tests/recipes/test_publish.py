import json
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from hub_server import serving
from hub_state import problems
from huggingface_hub import constants
from tiny import tiny

import lm
from data.tokenizer import Tokenizer
from recipes import evidence, publish
from recipes.publish import Config, main
from train.hub import Hub, open_hub
from train.lineage import given
from train.parity import our_logits
from train.publish import digests, files_of, in_dtype, leaks

TOKEN = "hf_" + "writerwriterwriterwriter"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model as a Hugging Face folder, with its tokenizer."""
    folder = tmp_path_factory.mktemp("publish") / "source"
    tokenizer = Tokenizer.train(["def f(x):\n    return x\n" * 9], 270)
    lm.save_pretrained(tiny("llama", vocab=270), folder)
    tokenizer.save(folder)
    (folder / "generation_config.json").write_text('{"temperature": 0.1}')
    return folder


@pytest.fixture
def alone(monkeypatch):
    """No other implementation is at hand."""
    monkeypatch.setattr(evidence, "can_compare", lambda python: False)


@pytest.fixture
def beside(monkeypatch):
    """Another implementation is, and it computes what ours would, from the files alone."""

    def logits(folder, tokens, python):
        return "another", our_logits(in_dtype(lm.load_pretrained(folder), "float32"), tokens) + 1e-6

    monkeypatch.setattr(evidence, "can_compare", lambda python: True)
    monkeypatch.setattr(evidence, "transformers_logits", logits)
    return logits


def test_only_the_folder_is_written_and_what_is_not_known_is_said(source, alone, tmp_path):
    assert main(Config(source=str(source), to=tmp_path / "out"))
    out = tmp_path / "out"
    card = (out / "README.md").read_text()
    assert problems(card) == []
    for words in ("not compared: no independent implementation was at hand", "Not evaluated.", "No licence given", "# out\n"):
        assert words in card
    assert json.loads((out / "lineage.json").read_text()) == [given("source")]
    kept = json.loads((out / "evidence.json").read_text())
    assert (kept["read_back_equal"], kept["passed"], kept["compared"]) == (True, True, [])
    assert kept["files"] == digests(out)
    assert leaks(out, [], [Path.home(), source, out, Path.cwd(), tmp_path]) == []
    assert Tokenizer.load(out).digest == Tokenizer.load(source).digest
    assert (out / "generation_config.json").read_text() == '{"temperature": 0.1}'  # as it came


def test_a_drawing_of_our_own_goes_out_as_a_folder_of_ours_and_the_card_says_how_to_open_it(source, beside, tmp_path):
    lm.save_native(tiny("zmaj", vocab=270), tmp_path / "mine")
    Tokenizer.load(source).save(tmp_path / "mine")
    assert main(Config(source=str(tmp_path / "mine"), to=tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert problems(card) == []
    assert "in the drawing of zmaj" in card
    assert "not compared: no other library has a model of this drawing" in card  # though one is at hand
    assert "library_name: zmaj-lm" in card
    assert "AutoModelForCausalLM" not in card
    assert "lm.load_pretrained" in card
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "zmaj"
    assert json.loads((tmp_path / "out" / "evidence.json").read_text())["read_back_equal"]


def test_it_is_compared_and_scores_and_a_licence_stand_in_the_card(source, beside, tmp_path):
    (tmp_path / "results.json").write_text('{"arc": {"metric": "accuracy", "value": 0.25, "low": 0.2, "high": 0.3, "n": 7}}')
    named = {"license": "other", "license_name": "mine", "license_link": "https://example.org/mine"}
    assert main(Config(source=str(source), to=tmp_path / "out", eval=(tmp_path / "results.json",), dtype="bfloat16", **named))
    card = (tmp_path / "out" / "README.md").read_text()
    assert problems(card) == []
    for words in (
        "passed: compared with another.",
        "| arc | accuracy | 25.0 % | 20.0 % to 30.0 % | 7 |",
        "[mine](https://example.org/mine)",
    ):
        assert words in card
    assert "stored as bfloat16" in card


def test_another_model_fails_and_nothing_is_sent(source, beside, monkeypatch, tmp_path):
    monkeypatch.setattr(evidence, "transformers_logits", lambda *given: ("another", beside(*given)[1] + 1.0))
    sent = []
    monkeypatch.setattr(publish, "open_hub", lambda: Hub(huggingface_hub.HfApi(), "", "me"))
    monkeypatch.setattr(publish, "check_free", lambda repository, hub, revision: None)
    monkeypatch.setattr(publish, "push", lambda *arguments, **settings: sent.append(arguments))
    assert not main(Config(source=str(source), to=tmp_path / "out", repo="me/mine", license="mit"))
    assert not sent
    assert "FAILED: compared with another" in (tmp_path / "out" / "README.md").read_text()


def test_the_same_again_takes_the_evidence_that_is_there(source, beside, monkeypatch, tmp_path):
    main(Config(source=str(source), to=tmp_path / "out"))
    first = digests(tmp_path / "out")
    monkeypatch.setattr(evidence, "transformers_logits", lambda *given: pytest.fail("it was compared already"))
    assert main(Config(source=str(source), to=tmp_path / "out"))
    assert digests(tmp_path / "out") == first
    with pytest.raises(pytest.fail.Exception):
        main(Config(source=str(source), to=tmp_path / "out", dtype="bfloat16"))


def test_a_dry_run_shows_every_file_and_asks_nobody(source, alone, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(publish, "open_hub", lambda: pytest.fail("the Hub was asked"))
    assert main(Config(source=str(source), to=tmp_path / "out", repo="me/mine", license="none", dry_run=True))
    told = capsys.readouterr().out
    assert all(name in told for name in files_of(tmp_path / "out"))
    assert told.count("large file (LFS)") == 1
    assert "dry run: nothing was sent" in told


def test_it_is_sent_and_comes_back_as_the_same_model(source, alone, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    huggingface_hub.close_session()
    with serving(tmp_path / "hub", {TOKEN: ("me", True)}, seconds=60) as server:
        monkeypatch.setattr(publish, "open_hub", lambda: open_hub(server.address, pauses_s=()))
        assert main(Config(source=str(source), to=tmp_path / "out", repo="mine", license="mit", private=True))
        assert capsys.readouterr().out.strip() == f"{server.address}/me/mine"
        api = huggingface_hub.HfApi(endpoint=server.address)
        back = Path(api.snapshot_download("me/mine", local_dir=tmp_path / "back"))
    huggingface_hub.close_session()
    assert 'from_pretrained("me/mine")' in (back / "README.md").read_text()
    tokens = np.arange(12, dtype=np.int32)
    assert np.array_equal(our_logits(lm.load_pretrained(back), tokens), our_logits(lm.load_pretrained(source), tokens))


def test_a_model_without_tokenizer_is_written_and_that_is_said(alone, tmp_path):
    lm.save_pretrained(tiny("llama"), tmp_path / "bare")
    assert main(Config(source=str(tmp_path / "bare"), to=tmp_path / "out"))
    assert "tokenizer.json" not in files_of(tmp_path / "out")


@pytest.mark.parametrize(
    ("wishes", "words"),
    [
        ({}, "nothing to do: say --repo to send it to the Hub, or --to to write a folder alone"),
        ({"repo": "me/mine"}, "--repo needs --license, as in --license apache-2.0; --license none"),
        ({"repo": "me/my model", "license": "mit"}, "Repo id must use alphanumeric chars"),
        ({"to": "x", "license": "other"}, "--license other needs --license-name and --license-link"),
    ],
)
def test_impossible_wishes_are_refused_in_words(wishes, words):
    with pytest.raises(ValueError, match=words):
        Config(source="x", **wishes)


def test_other_folders_and_files_of_scores_are_refused_in_words(source, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="full holds other things, not written from here: choose another folder with --to"):
        main(Config(source=str(source), to=tmp_path / "full"))
    (tmp_path / "scores.json").write_text("{")
    with pytest.raises(ValueError, match=r"scores.json is not JSON .*: expected a results.json of recipes.evaluate"):
        main(Config(source=str(source), to=tmp_path / "out", eval=(tmp_path / "scores.json",)))
    with pytest.raises(FileNotFoundError, match="does not exist: expected the folder of a model, or owner/name"):
        main(Config(source=str(tmp_path / "no" / "where" / "here"), to=tmp_path / "out"))
