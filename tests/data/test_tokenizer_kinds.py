"""Any `tokenizer.json` as it is: each kind gives the ids of the library it was written for, and its text back."""

import json
import os
from pathlib import Path

import pytest
import tokenizers
from conversations import CONVERSATIONS
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from data.tokenizer import StreamDecoder, Tokenizer

TEXT = [
    "Hello, world! It's 12345 o'clock; WE'LL see...\n\n\n   indented\tline  with   spaces \n",
    "naïve café — 漢字 かな 🐈‍⬛ ½ e\u0301 \u1100\u1161 Ünïcödé \u00a0 x\u200by\r\nfoo_bar(baz) = {a: 3.14}",
    " leading", "trailing  ", "", " ", "\n", "\x00\x1f\ufeff\u2028", "don'T I'M 1 22 333 4444 <s>x</s> <think>y</think>",
    "<|im_end|><|eot_id|><|endoftext|>", "ا لعربية עברית हिन्दी ไทย", "a" * 300, "ﬁ ﷺ Å ①",
]  # fmt: skip
CORPUS = ["the cat sat on the mat, the dog ate the log; 1234 and 5678 they'll say it's so\n", "Ein schöner Text, наконец. " * 2] * 5
ALPHABET = pre_tokenizers.ByteLevel.alphabet()
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level() -> tokenizers.Tokenizer:
    """As Llama 3's and Qwen's."""
    core = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(r"\p{N}{1,3}|[^\r\n\p{L}\p{N}]?\p{L}+|\s+(?!\S)|\s+"), behavior="isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=330, initial_alphabet=ALPHABET, show_progress=False))
    core.add_special_tokens(["<s>", "</s>"])
    core.add_tokens([AddedToken("<think>", normalized=False)])
    return core


def sentence_piece() -> tokenizers.Tokenizer:
    """As Llama 2's: ▁ for spaces, one before the text, bytes for characters that are no token."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    specials = ["<unk>", "<s>", "</s>", *BYTE_TOKENS]
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=340, special_tokens=specials, show_progress=False))
    merges = [tuple(merge) for merge in json.loads(trained.to_str())["model"]["merges"]]
    core = tokenizers.Tokenizer(models.BPE(trained.get_vocab(), merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = trained.normalizer
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    core.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in ("<unk>", "<s>", "</s>")])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return core


def unigram() -> tokenizers.Tokenizer:
    """As SentencePiece's other kind: the likeliest cut into pieces, bytes for the rest."""
    pieces = ["▁", "▁the", "▁cat", "▁s", "at", *"acehnost", "th", "▁mat", "ing"]
    scored = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((token, -20.0) for token in BYTE_TOKENS)]
    core = tokenizers.Tokenizer(models.Unigram([*scored, *((piece, -2.0 - 0.3 * i) for i, piece in enumerate(pieces))], 0, True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens(["<unk>", "<s>", "</s>"])
    return core


KINDS = {"byte-level": byte_level, "sentence-piece": sentence_piece, "unigram": unigram}


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_library_and_text_comes_back(kind, tmp_path) -> None:
    core = KINDS[kind]()
    core.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.digest == Tokenizer(core, bos=None, eos=None, pad=None).digest
    plain = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in TEXT:
        parsed = plain.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode_with_specials(text).tolist() == parsed
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text
        ids = tokenizer.encode(text).tolist()
        assert "<s>" not in tokenizer.tokens_of(ids)
        stream = StreamDecoder(tokenizer)
        assert "".join(stream.push(token) for token in ids) + stream.flush() == tokenizer.decode(ids)
    assert plain.token_to_id("<s>") in tokenizer.encode_with_specials("x<s>y")


@pytest.mark.parametrize("kind", ["sentence-piece", "unigram"])
def test_what_is_no_token_is_spelled_in_bytes(kind) -> None:
    tokenizer = Tokenizer(KINDS[kind](), bos=None, eos=None, pad=None)
    assert tokenizer.tokens_of(tokenizer.encode("the 猫"))[-3:] == ["<0xE7>", "<0x8C>", "<0xAB>"]
    stream = StreamDecoder(tokenizer)
    assert [stream.push(token) for token in tokenizer.encode("猫").tolist()[-3:]] == ["", "", "猫"]


# ------------------------------------------------------------------------------------------- published ones

FOLDERS = [Path(name) for name in os.environ.get("ZMAJ_TOKENIZERS", "").split(os.pathsep) if name]


@pytest.fixture(params=FOLDERS or [None], ids=str)
def folder(request) -> Path:
    """A published tokenizer, with its `tokenizer_config.json`."""
    if request.param is None:
        pytest.skip(f"needs published tokenizers: set ZMAJ_TOKENIZERS to their folders, with {os.pathsep!r} between them")
    return request.param


def test_a_published_tokenizer_gives_its_ids(folder: Path) -> None:
    tokenizer, plain = Tokenizer.load(folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in TEXT:
        assert tokenizer.encode_with_specials(text).tolist() == plain.encode(text, add_special_tokens=False).ids
        back = text if plain.normalizer is None else plain.normalizer.normalize_str(text)
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == back


@pytest.mark.parity
def test_a_published_tokenizer_is_that_of_transformers_template_included(folder: Path, tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer.load(folder)
    ours.save(tmp_path)
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXT:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode_with_specials(text).tolist() == ids
        assert saved(text, add_special_tokens=False)["input_ids"] == ids
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    for messages, given in CONVERSATIONS.values():
        rendered = theirs.apply_chat_template(messages, tokenize=False, **given)
        assert ours.render_chat(messages, **given) == rendered
        assert saved.apply_chat_template(messages, tokenize=False, **given) == rendered
        assert ours.encode_with_specials(rendered).tolist() == theirs(rendered, add_special_tokens=False)["input_ids"]
