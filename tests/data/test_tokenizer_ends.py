"""What a prompt begins with is the tokenizer's own rule, whatever it names as BOS."""

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, models, pre_tokenizers, processors

from data.cache import TokenCache
from data.tokenizer import Tokenizer
from data.tokenizer_ends import prefix_of


def core_of(rule: processors.PostProcessor | None) -> tokenizers.Tokenizer:
    """A tokenizer of bytes alone, with two marks behind them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = tokenizers.Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in ("<|start|>", "<|end|>")])
    if rule is not None:
        core.post_processor = rule
    return core


def begin(single: list[str]) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(single=single, special_tokens=[("<|start|>", 256), ("<|end|>", 257)])


BYTES = processors.ByteLevel(trim_offsets=False)
NAMED = {"bos_token": "<|start|>", "eos_token": "<|end|>"}
KINDS = {  # rule in tokenizer.json, tokenizer_config.json, what a prompt begins with
    "SmolLM2: names a BOS, begins with none": (BYTES, NAMED, []),
    "GPT-2: says that it begins with none": (BYTES, {"bos_token": "<|end|>", "eos_token": "<|end|>", "add_bos_token": False}, []),
    "Llama 3: begins with BOS": (processors.Sequence([BYTES, begin(["<|start|>", "$A"])]), NAMED, [256]),
    "Llama 3, unnamed": (begin(["<|start|>", "$A"]), {}, [256]),
    "Llama 2: says it in the config": (None, NAMED | {"add_bos_token": True}, [256]),
    "tokenizer.json wins, as in transformers": (begin(["<|start|>", "$A"]), NAMED | {"add_bos_token": False}, [256]),
    "only at the end": (begin(["$A", "<|end|>"]), NAMED, []),
    "two, and one behind": (begin(["<|start|>", "<|end|>", "$A", "<|end|>"]), NAMED, [256, 257]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_begins_as_the_tokenizer_says(kind, tmp_path) -> None:
    rule, config, prefix = KINDS[kind]
    core_of(rule).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.prompt_prefix == tuple(prefix)
    assert tokenizer.encode_prompt("cat").tolist() == [*prefix, *tokenizer.encode("cat")]
    assert tokenizer.encode("cat").size == 3
    assert tokenizer.opening_id == (prefix[-1] if prefix else 257)
    assert tokenizer.digest == Tokenizer(core_of(None), bos=None, eos=None, pad=None).digest  # the ids of a text are those of all others
    tokenizer.save(tmp_path / "again")
    assert Tokenizer.load(tmp_path / "again").prompt_prefix == tokenizer.prompt_prefix
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "again" / "tokenizer.json"))
    assert theirs.encode("cat").ids[: len(prefix) + 3] == tokenizer.encode_prompt("cat").tolist()


def test_an_empty_prompt_is_the_beginning_of_a_document() -> None:
    assert Tokenizer(core_of(None), bos="<|start|>", eos="<|end|>", pad=None).encode_prompt("").tolist() == [257]
    assert Tokenizer(core_of(begin(["<|start|>", "$A"])), bos=None, eos="<|end|>", pad=None).encode_prompt("").tolist() == [256]
    with pytest.raises(ValueError, match="neither BOS nor EOS for a document to begin with: a prompt needs some text"):
        Tokenizer(core_of(None), bos="<|start|>", eos=None, pad=None).encode_prompt("")


def test_one_trained_here_begins_with_bos_in_transformers_too_and_older_folders_as_well(tmp_path) -> None:
    trained = Tokenizer.train(["def f(x):\n    return x\n"], 265)
    trained.save(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    assert tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("x").ids == [0, *trained.encode("x").tolist()]
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved | {"post_processor": None}))  # as they were written before
    older = Tokenizer.load(tmp_path)
    assert older.prompt_prefix == trained.prompt_prefix == (0,)
    assert older.digest == trained.digest


def test_padding_on_the_left_is_no_prefix() -> None:
    core = core_of(begin(["<|start|>", "$A"]))
    core.enable_padding(direction="left", length=9, pad_id=257, pad_token="<|end|>")
    assert prefix_of(core) == (256,)


def test_documents_of_two_rules_have_two_caches(tmp_path) -> None:
    def cached(rule):
        tokenizer = Tokenizer(core_of(rule), bos="<|start|>", eos="<|end|>", pad=None)
        return TokenCache.build_or_open([{"text": "cat", "name": "a"}], tokenizer, tmp_path, source_digest="d", split="train")

    plain, begun = cached(None), cached(begin(["<|start|>", "$A"]))
    assert plain.folder != begun.folder
    np.testing.assert_array_equal(plain.document(0)[[0, -1]], [257, 257])
    np.testing.assert_array_equal(begun.document(0)[[0, -1]], [256, 257])
