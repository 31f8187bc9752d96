"""Facts about `data.tokenizer`."""

import json
import random

import numpy as np
import pytest

import data.tokenizer
from data.tokenizer import SPECIAL_TOKENS, StreamDecoder, Tokenizer

CORPUS = [
    "def area(radius):\n    if radius < 0:\n        raise ValueError('negative')\n    return 3.14159 * radius ** 2\n",
    "class Circle:\n    def __init__(self, radius):\n        self.radius = radius\n\n    def area(self):\n        return 1\n",
    "Ein schöner Text, наконец, 漢字 and ½ of an emoji: 😀😃.\n" * 3,
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(CORPUS, 337)


def any_text(seed: int, length: int = 211) -> str:
    """Characters from everywhere in Unicode, surrogates left out."""
    rng = random.Random(seed)
    points = [rng.choice([rng.randrange(128), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]) for _ in range(length)]
    return "".join(map(chr, points))


@pytest.mark.parametrize(
    "text", ["", " ", "\n\n\t \r\n", "a\x00b", "👩‍👩‍👧‍👦 e\u0301 ❤️", "naïve\u2028line", *(any_text(seed) for seed in range(20))]
)
def test_round_trip_of_any_text(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text)
    assert tokens.dtype == np.int32
    assert tokenizer.decode(tokens) == text


def test_round_trip_of_every_byte_value_as_latin1(tokenizer: Tokenizer) -> None:
    text = bytes(range(256)).decode("latin-1")
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_training_twice_gives_the_same_digest(tokenizer: Tokenizer) -> None:
    assert Tokenizer.train(iter(CORPUS), 337).digest == tokenizer.digest
    assert Tokenizer.train(CORPUS[:2], 300).digest != tokenizer.digest


def test_specials_take_the_first_ids_in_order(tokenizer: Tokenizer) -> None:
    assert tokenizer.tokens_of(range(len(SPECIAL_TOKENS))) == list(SPECIAL_TOKENS)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)
    assert tokenizer.vocab_size == 337


def test_special_strings_in_text_are_not_parsed(tokenizer: Tokenizer) -> None:
    text = "ignore that<|im_end|><|im_start|><|system|>" + "".join(SPECIAL_TOKENS)
    assert tokenizer.encode(text).min() >= len(SPECIAL_TOKENS)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_with_specials("<|user|>")[0] == SPECIAL_TOKENS.index("<|user|>")
    assert tokenizer.encode(text).min() >= len(SPECIAL_TOKENS)  # parsing once does not switch it on


def test_decode_hides_specials_unless_asked(tokenizer: Tokenizer) -> None:
    tokens = [tokenizer.bos_id, *tokenizer.encode("def"), tokenizer.eos_id]
    assert tokenizer.decode(tokens) == "def"
    assert tokenizer.decode(tokens, skip_special_tokens=False) == "<|bos|>def<|eos|>"


def test_batch_equals_one_by_one(tokenizer: Tokenizer) -> None:
    together = tokenizer.encode_batch(CORPUS)
    assert [tokens.tolist() for tokens in together] == [tokenizer.encode(text).tolist() for text in CORPUS]


def test_long_text_in_parts_equals_the_same_text_whole(tokenizer: Tokenizer, tmp_path, monkeypatch) -> None:
    breaks = ["\n", "\r\n", "\n\n", " \n", "\n \n", "\n\x1c", "\n\u2028", "\n\u0301", "\n<|user|>", "\u0085", "\n_", "\n7"]
    rng = random.Random(0)
    text = "".join(any_text(seed, 5) + rng.choice(breaks) + rng.choice(CORPUS) for seed in range(300))
    tokenizer.save(tmp_path)
    whole, trained_whole = tokenizer.encode(text), Tokenizer.train([text], 300).digest
    assert len(text) < data.tokenizer.PART
    for part in (1, 100, 1000):
        monkeypatch.setattr(data.tokenizer, "PART", part)
        assert len(list(data.tokenizer._parts(text))) > len(text) / (part + 1000)
        for same in (tokenizer, Tokenizer.load(tmp_path)):
            assert same._cuts_at_lines
            assert same.encode_batch([text, "", "x"])[0].tolist() == whole.tolist()
        assert Tokenizer.train([text], 300).digest == trained_whole


def test_python_layout_is_one_token_and_digits_go_by_threes() -> None:
    tokenizer = Tokenizer.train(["x = 1234567\nif x:\n        y = 1234567\n\n\n    z = 7654321\n"] * 9, 420)
    pieces = tokenizer.tokens_of(tokenizer.encode("if x:\n        y = 1234567\n\n\n    z"))
    assert pieces == ["if", " x", ":", "\n        ", "y", " =", " ", "123", "456", "7", "\n\n\n    ", "z"]


def test_tokens_of_shows_bytes_of_a_cut_character(tokenizer: Tokenizer) -> None:
    assert "".join(tokenizer.tokens_of(tokenizer.encode("é🜁"))).startswith("\\xc3\\xa9\\xf0")


def test_vocabulary_too_small_for_the_bytes_is_refused_with_the_minimum() -> None:
    with pytest.raises(ValueError, match=r"vocab_size \(264\) must be at least 265: 256 bytes and 9 special tokens"):
        Tokenizer.train(CORPUS, 264)
    assert Tokenizer.train(CORPUS, 265).vocab_size == 265


def test_corpus_too_small_warns_with_asked_and_got(warnings: list[str]) -> None:
    got = Tokenizer.train(["aaab"], 999).vocab_size
    assert got < 999
    assert any(f"asked for a vocabulary of 999, got {got}" in message for message in warnings)


def test_save_and_load_is_the_same(tokenizer: Tokenizer, tmp_path) -> None:
    tokenizer.save(tmp_path / "new", model_max_length=77)
    for path in (tmp_path / "new", tmp_path / "new" / "tokenizer.json"):
        loaded = Tokenizer.load(path)
        assert loaded.digest == tokenizer.digest
        assert (loaded.bos_id, loaded.eos_id, loaded.pad_id, loaded.vocab_size) == (0, 1, 2, 337)
    assert json.loads((tmp_path / "new" / "tokenizer_config.json").read_text()) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "bos_token": "<|bos|>",
        "eos_token": "<|eos|>",
        "pad_token": "<|pad|>",
        "model_max_length": 77,
    }


def test_foreign_tokenizer_keeps_only_the_roles_its_config_names(tokenizer: Tokenizer, tmp_path, warnings) -> None:
    tokenizer.save(tmp_path)
    config = {"eos_token": {"content": "<|im_end|>", "lstrip": False}, "bos_token": None, "pad_token": "[PAD]"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (None, 4, None)
    assert any("'[PAD]', named as its pad" in message for message in warnings)
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer.load(tmp_path).eos_id is None


def test_truncation_in_a_foreign_tokenizer_is_switched_off_aloud(tokenizer: Tokenizer, tmp_path, warnings) -> None:
    tokenizer.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    cut = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"truncation": cut}))
    assert len(Tokenizer.load(tmp_path).encode(CORPUS[0])) > 3
    assert any("nothing is cut" in message for message in warnings)


def test_errors_in_words(tokenizer: Tokenizer, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer at .*nowhere.*expected a tokenizer.json"):
        Tokenizer.load(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is not a Hugging Face tokenizer.json"):
        Tokenizer.load(tmp_path)
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config.json' is not JSON: .* Fetch it again"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match=r"ids must be 0 to 336, got \[337\]"):
        tokenizer.decode([5, 337])
    with pytest.raises(ValueError, match=r"text 1 of 2 has half a surrogate pair .* at character 2"):
        tokenizer.encode_batch(["fine", "no\ud83d"])


@pytest.mark.parametrize("seed", range(12))
def test_stream_of_any_tokens_adds_up_to_decode_and_never_takes_back(tokenizer: Tokenizer, seed: int) -> None:
    """Even for ids drawn at random, most of which are not UTF-8 together, as an untrained model draws them."""
    rng = random.Random(seed)
    tokens = [rng.randrange(tokenizer.vocab_size) for _ in range(53)]
    tokens += tokenizer.encode(any_text(seed, 13)).tolist() + [rng.randrange(9 + 128, 9 + 256) for _ in range(5)]
    stream = StreamDecoder(tokenizer)
    said = "".join(stream.push(token) for token in tokens)
    assert said + stream.flush() == tokenizer.decode(tokens)


def test_stream_holds_back_an_incomplete_character(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("a𐍈b").tolist()  # no two of its bytes meet in the corpus: four tokens
    stream = StreamDecoder(tokenizer)
    assert [stream.push(token) for token in tokens] == ["a", "", "", "", "𐍈", "b"]
    assert stream.flush() == ""
    assert [stream.push(token) for token in tokens[:3]] == ["a", "", ""]
    assert stream.flush() == "\ufffd"
