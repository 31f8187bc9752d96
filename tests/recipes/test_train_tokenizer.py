"""Facts about `recipes.train_tokenizer` and `data.tokenizer_report`."""

import json

import numpy as np
import pytest
from integration.recipe_runs import run_here

from data.tokenizer import Tokenizer
from data.tokenizer_report import measure, visible, vocabulary_use
from recipes.train_tokenizer import COLUMNS, Config, laid_out, main, some_texts

TEXT = "the cat sat on the mat, the dog ate the log\n"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT * 9], 283)


def test_figures_follow_from_the_tokens(tokenizer) -> None:
    texts = [TEXT * 2, "unheard words", "漢😀"]
    figures, use = measure(tokenizer, texts, worst=3)
    tokens = [tokenizer.encode(text) for text in texts]
    assert figures["tokens"] == sum(map(len, tokens)) == use.sum()
    assert figures["bytes"] == sum(len(text.encode()) for text in texts)
    assert figures["bytes_per_token"] == figures["bytes"] / figures["tokens"]
    words = " ".join(texts).split()
    lengths = [len(tokenizer.encode(f" {word}")) for word in words]
    assert figures["words"] == len(words)
    assert figures["fertility"] == pytest.approx(np.mean(lengths))
    assert figures["words_in_one_token"] == pytest.approx(np.mean(np.array(lengths) == 1))
    cost = {word: sum(n - 1 for w, n in zip(words, lengths, strict=True) if w == word) for word in words}
    assert [word["word"] for word in figures["worst_words"]] == sorted(cost, key=lambda word: (-cost[word], word))[:3]
    assert figures["documents_not_restored"] == 0
    used = vocabulary_use(use)
    assert used["size"] == tokenizer.vocab_size
    assert used["used"] == len(set(np.concatenate(tokens).tolist()))
    assert 1 < used["effective_size"] <= used["used"]


def test_a_tokenizer_that_changes_texts_is_found_out(tokenizer) -> None:
    from tokenizers import normalizers

    tokenizer._core.normalizer = normalizers.Lowercase()
    try:
        assert measure(tokenizer, ["lower", "Upper"])[0]["documents_not_restored"] == 1
    finally:
        tokenizer._core.normalizer = None


def test_pictures_show_every_character_once_and_break_lines() -> None:
    assert visible("a\tb\r\n") == "a⇥b←↵\n"
    cells = list(laid_out(["x" * (COLUMNS + 3), "y↵\n", "z"]))
    assert [cell[:3] for cell in cells[-6:]] == [(1, 0, 0), (1, 1, 0), (1, 2, 0), (1, 3, 1), (1, 4, 1), (2, 0, 2)]
    assert len(cells) == COLUMNS + 3 + 2 + 1


def test_the_whole_report_of_a_mixture_beside_another_tokenizer(tmp_path, tokenizer, capsys) -> None:
    (tmp_path / "one.txt").write_text(TEXT * 60)
    (tmp_path / "two.txt").write_text("漢字 and $dollars$ [bold] <b>\n" * 80)
    tokenizer.save(tmp_path / "other")
    data = f"{tmp_path}/one.txt:0.5,{tmp_path}/two.txt:0.5"
    folder = main(Config(data=data, vocab=290, compare=(tmp_path / "other",), run_dir=tmp_path / "run", report_mb=60e-6))
    results = json.loads((folder / "results.json").read_text())
    assert set(results["tokenizers"]) == {"trained here", str(tmp_path / "other")}
    for one in results["tokenizers"].values():
        assert set(one["sources"]) == {f"{tmp_path}/one.txt", f"{tmp_path}/two.txt"}
        for part, figures in zip(results["corpus"]["parts"], one["sources"].values(), strict=True):
            assert 57 <= figures["bytes"] <= 60  # a character of three bytes may be cut
            assert figures["bytes"] + figures["bytes_left_out"] == part["held_out_bytes"]
    assert Tokenizer.load(folder / "tokenizer").digest == results["tokenizers"]["trained here"]["digest"]
    assert (folder / "tokens.png").read_bytes()[:4] == b"\x89PNG"
    said = capsys.readouterr().out
    assert "fertility" in said
    assert "costliest words" in said
    with pytest.raises(ValueError, match="already holds a run"):
        main(Config(data=data, run_dir=folder))


def test_mistakes_are_said_before_the_work(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer at '.*nowhere': expected a tokenizer.json file"):
        main(Config(compare=(tmp_path / "nowhere",), run_dir=tmp_path / "run"))
    (tmp_path / "one.txt").write_text(TEXT * 60)
    with pytest.raises(ValueError, match=r"vocab_size \(12\) must be at least 265"):
        main(Config(data=str(tmp_path / "one.txt"), vocab=12, run_dir=tmp_path / "run"))
    status, output = run_here(["--data", "nowhere.txt", "--run-dir", tmp_path / "other"], "train_tokenizer")
    assert status == 2
    assert "error: 'nowhere.txt' does not exist" in output
    status, output = run_here(["--help"], "train_tokenizer")
    assert status == 0
    assert "--picture-characters" in output


def test_no_more_text_is_taken_than_asked_for(tmp_path) -> None:
    class OfTwo:
        held_out = ({"text": "漢漢"}, {"text": "abc"})

    assert list(some_texts(OfTwo, 4)) == ["漢"]
    assert list(some_texts(OfTwo, 8)) == ["漢漢", "ab"]
    assert list(some_texts(OfTwo, 99)) == ["漢漢", "abc"]
