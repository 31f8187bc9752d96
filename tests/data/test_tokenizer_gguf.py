"""Tokenizers out of GGUF metadata give the ids of the tokenizer that the metadata were made from."""

import json
import sys
from itertools import pairwise

import numpy as np
import pytest
import tokenizers
from tiny_gguf import write
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from data.tokenizer import Tokenizer
from data.tokenizer_gguf import BYTE, CONTROL, NORMAL, PRE_TOKENIZERS, UNKNOWN, UNUSED, USER_DEFINED, from_metadata

TEXT = [
    "Hello, world! It's 12345 o'clock; WE'LL see...\n\n\n   indented\tline  with   spaces \n",
    "naïve café — 漢字 かな 🐈‍⬛ ½ e\u0301 \u1100\u1161 Ünïcödé \u00a0 x\u200by\r\nfoo_bar(baz) = {a: 3.14}",
    " leading", "trailing  ", "", " ", "\n", "don'T I'M 1 22 333 4444 <|im_start|>x<think>y</think>",
]  # fmt: skip
CORPUS = [*TEXT, "the cat sat on the mat, the dog ate the log; 1234 and 5678 they'll say it's so\n" * 5]
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace("{1,3}", "")
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    """As in the published tokenizer.json."""
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior="isolated"), BYTES])


CUTS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    "llama-bpe": split(LLAMA3),
    "qwen2": split(QWEN2),
}


def byte_level(pre: str) -> tokenizers.Tokenizer:
    """A small tokenizer as its family publishes it."""
    core = tokenizers.Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    core.normalizer = normalizers.NFC() if pre == "qwen2" else None
    core.pre_tokenizer, core.decoder = CUTS[pre], decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=380, initial_alphabet=alphabet, show_progress=False))
    core.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in ("<|im_start|>", "<|im_end|>")])
    core.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    return core


def metadata_of(core: tokenizers.Tokenizer, **said) -> dict:
    """As llama.cpp's converter writes a byte-level tokenizer."""
    ids, added = core.get_vocab(with_added_tokens=True), core.get_added_tokens_decoder()
    tokens = sorted(ids, key=ids.__getitem__)
    types = [NORMAL if i not in added else CONTROL if added[i].special else USER_DEFINED for i in range(len(tokens))]
    merges = [" ".join(merge) for merge in json.loads(core.to_str())["model"]["merges"]]
    found = {"model": "gpt2", "tokens": tokens, "token_type": types, "merges": merges} | said
    return {f"tokenizer.ggml.{key}": value for key, value in found.items() if value is not None}


def loaded(folder, metadata: dict) -> Tokenizer:
    return Tokenizer.load(write(folder / "it.gguf", "llama", metadata, {"x": np.ones(3, np.float32)}))


@pytest.mark.parametrize("pre", CUTS)
def test_byte_level_ids_are_those_of_the_original(pre, tmp_path) -> None:
    core = byte_level(pre)
    ours = loaded(tmp_path, metadata_of(core, pre=pre))
    for text in TEXT:
        assert ours.encode_with_specials(text).tolist() == core.encode(text, add_special_tokens=False).ids
        assert ours.decode(ours.encode(text)) == (text if pre != "qwen2" else core.normalizer.normalize_str(text))
    assert len({str(ours.encode(text).tolist()) for text in TEXT}) == len(TEXT)


def test_cuts_differ_so_that_the_wrong_one_would_be_seen() -> None:
    pieces = {pre: [piece for piece, _ in cut.pre_tokenize_str(TEXT[0])] for pre, cut in CUTS.items()}
    assert len({str(cut) for cut in pieces.values()}) == len(CUTS)


def test_llama_cpps_default_cut() -> None:
    """Punctuation, then words, runs of digits, threes of digits: each inside the pieces of those before (llama-vocab.cpp)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = from_metadata({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "default", "tokenizer.ggml.tokens": alphabet}, "x").core
    pieces = [piece.replace("Ġ", " ") for piece, _ in made.pre_tokenizer.pre_tokenize_str("a, it's 1234567 $x")]
    assert pieces == ["a", ",", " it", "'", "s", " ", "123", "456", "7", " ", "$", "x"]


def test_roles_template_and_ends_go_into_the_saved_folder(tmp_path) -> None:
    core = byte_level("smollm")
    start, end = core.token_to_id("<|im_start|>"), core.token_to_id("<|im_end|>")
    said = metadata_of(
        core, pre="smollm", bos_token_id=start, eos_token_id=end, padding_token_id=end, unknown_token_id=3, add_bos_token=True
    )
    said |= {"tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}", "tokenizer.chat_template.tool_use": "tools"}
    tokenizer = loaded(tmp_path, said)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (start, end, end)
    tokenizer.save(tmp_path / "folder")
    again = Tokenizer.load(tmp_path / "folder")
    assert (again.bos_id, again.eos_id, again.pad_id, again.digest) == (start, end, end, tokenizer.digest)
    assert again.render_chat([{"role": "user", "content": "Hi"}]) == "<|im_start|>Hi"
    assert again.render_chat([{"role": "user", "content": "Hi"}], tools=[{}]) == "tools"
    assert json.loads((tmp_path / "folder" / "tokenizer_config.json").read_text())["unk_token"] == core.id_to_token(3)
    # What transformers will put before a text; ours is put there by who builds the document.
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "folder" / "tokenizer.json"))
    assert theirs.encode("cat").ids == [start, *again.encode("cat").tolist()]


# ------------------------------------------------------------------------------------------- SentencePiece

PIECES = [*"▁abcthesr", "▁t", "he", "▁the", "th", "ca", "cat", "▁cat", "at", "▁c", "er", "her", "▁s", "sa", "▁sat", "▁▁"]


def sentence_piece(**said) -> dict:
    """A small SentencePiece model: each piece as good as it comes early."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES, "<|x|>", "<spare>"]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(PIECES), USER_DEFINED, UNUSED]
    scores = [0.0] * 259 + [-float(i) for i in range(len(PIECES))] + [0.0, 0.0]
    found = {"model": "llama", "tokens": tokens, "token_type": types, "scores": scores, "bos_token_id": 1, "eos_token_id": 2} | said
    return {f"tokenizer.ggml.{key}": value for key, value in found.items() if value is not None}


def by_the_book(text: str, *, prefix: bool) -> list[str]:
    """SentencePiece's BPE (Kudo and Richardson 2018, arXiv:1808.06226): over and over the best union of neighbours, the first of equals."""
    scores = {piece: -i for i, piece in enumerate(PIECES)}
    parts = list((("▁" if prefix and text else "") + text).replace(" ", "▁"))
    while True:
        unions = [(scores[a + b], -i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in scores]
        if not unions:
            break
        at = -max(unions)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [piece for part in parts for piece in ([part] if part in scores else [f"<0x{byte:02X}>" for byte in part.encode()])]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentence_piece_merges_the_best_union_and_spells_the_rest_in_bytes(prefix, tmp_path) -> None:
    tokenizer = loaded(tmp_path, sentence_piece(add_space_prefix=prefix))
    for text in ["the cat sat", "  the  catcher here", "sat the", "thé 漢 cats\n", "", " ", "hehehe the the"]:
        assert tokenizer.tokens_of(tokenizer.encode(text)) == by_the_book(text, prefix=prefix)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.tokens_of(tokenizer.encode("the")) == (["▁the"] if prefix else ["t", "he"])


def test_sentence_piece_knows_its_special_tokens(tmp_path) -> None:
    tokenizer = loaded(tmp_path, sentence_piece())
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, None)
    assert tokenizer.encode_with_specials("<s>").tolist() == [1]
    assert 1 not in tokenizer.encode("<s>")
    assert tokenizer.tokens_of(tokenizer.encode("the<|x|>"))[-1] == "<|x|>"
    tokenizer.save(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs.encode("cat").tokens == ["<s>", "▁cat"]  # llama.cpp begins such texts with BOS unless told not to


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"model": "bert"}, r"a tokenizer of kind 'bert'; known are gpt2, llama. Take the model's own tokenizer.json"),
        ({"model": None}, r"has no tokenizer: expected tokenizer.ggml.model"),
        ({"pre": "tekken"}, r"cuts text by tokenizer.ggml.pre = 'tekken'; known are gpt-2, smollm"),
        ({"pre": None}, r"cuts text by tokenizer.ggml.pre = None; known"),
        ({"model": "llama"}, r"has no tokenizer.ggml.scores, one for each token"),
        ({"tokens": ["a", "b", "a"], "token_type": [1, 1, 1]}, r"has tokens with two ids: \['a'\]"),
    ],
)
def test_what_is_not_known_is_refused_by_name(said, words, tmp_path) -> None:
    with pytest.raises(ValueError, match=words):
        loaded(tmp_path, metadata_of(byte_level("smollm"), **({"pre": "smollm"} | said)))


def test_foreign_and_cut_files_are_named(tmp_path, monkeypatch) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer at .*none.gguf': expected a GGUF file"):
        Tokenizer.load(tmp_path / "none.gguf")
    loaded(tmp_path, sentence_piece())
    file = tmp_path / "it.gguf"
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"it.gguf' is not a whole GGUF file .*cut short"):
        Tokenizer.load(file)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"needs the gguf package, which is not installed: run `uv sync --extra gguf`"):
        Tokenizer.load(file)


def test_every_cut_that_is_known_can_be_made() -> None:
    assert set(CUTS) | {"default", "starcoder", "refact", "deepseek-r1-qwen"} == set(PRE_TOKENIZERS)


def test_a_gguf_file_begins_as_it_or_else_llama_cpp_says(tmp_path) -> None:
    smol, llama = byte_level("smollm"), byte_level("llama-bpe")
    start = smol.token_to_id("<|im_start|>")
    assert loaded(tmp_path, metadata_of(smol, pre="smollm", bos_token_id=start, add_bos_token=False)).prompt_prefix == ()
    assert loaded(tmp_path, metadata_of(smol, pre="smollm", bos_token_id=start)).prompt_prefix == ()
    assert loaded(tmp_path, metadata_of(smol, pre="smollm", bos_token_id=start, add_bos_token=True)).prompt_prefix == (start,)
    start = llama.token_to_id("<|im_start|>")
    assert loaded(tmp_path, metadata_of(llama, pre="llama-bpe", bos_token_id=start)).prompt_prefix == (start,)
    assert loaded(tmp_path, sentence_piece()).prompt_prefix == (1,)
    assert loaded(tmp_path, sentence_piece(add_bos_token=False)).prompt_prefix == ()
