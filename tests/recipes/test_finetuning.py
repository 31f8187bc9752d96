"""The parts of fine-tuning: chat tokens for a base without, the old text, questions and calls."""

import json

import grain
import numpy as np
import pytest
import tokenizers
from tiny import logits_of, tiny

import lm
from data.chat import ChatFormat
from data.documents import Source
from data.tokenizer import Tokenizer
from recipes.finetuning import calls_in, chat_tokenizer, known_text, some_text, tool_questions
from train.publish import export


@pytest.fixture(scope="module")
def base():
    """As GPT-2: one special token, none for a chat."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=270, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
    )
    core.train_from_iterator(["the cat sat on the mat " * 9], trainer)
    tokenizer = Tokenizer(core, bos=None, eos="<|endoftext|>", pad=None)
    return tokenizer, tiny("llama", n_layers=1, vocab=tokenizer.vocab_size)


@pytest.mark.parametrize("template", ["auto", "chatml"])
def test_a_base_without_chat_tokens_grows_with_its_tokenizer_and_export(base, template, tmp_path):
    tokenizer, model = base
    chat, grown = chat_tokenizer(tokenizer, model, template)
    first = tokenizer.vocab_size
    assert (chat.vocab_size, grown.config.vocab, len(grown.embed.weight), len(grown.unembed.weight)) == (first + 2,) * 4
    form = ChatFormat(chat)
    assert form.stop_ids == (first + 1,) == (chat.eos_id,)
    np.testing.assert_array_equal(chat.encode("the cat <|im_end|>"), tokenizer.encode("the cat <|im_end|>"))
    manifest = {"corpus": {"kind": "jsonl", "train_bytes": 1, "train_documents": 1, "sha256": "0"}, "sessions": [{"device": {"cpu": "x"}}]}
    manifest |= {
        "model": {"model_type": "llama", "parameters": grown.n_params, **grown.config.model_dump()},
        "tokens": 1,
        "steps": 1,
        "seed": 0,
    }
    export(grown, chat, tmp_path / "export", manifest=manifest, results={})
    again, loaded = Tokenizer.load(tmp_path / "export"), lm.load_pretrained(tmp_path / "export")
    prompt = ChatFormat(again).prompt([{"role": "user", "content": "the cat"}])
    np.testing.assert_array_equal(prompt, form.prompt([{"role": "user", "content": "the cat"}]))
    assert prompt[0] == first
    np.testing.assert_allclose(logits_of(loaded, prompt), logits_of(grown, prompt), atol=1e-6)


def test_a_model_with_a_template_of_its_own_keeps_it(base):
    tokenizer, model = base
    with_its_own = tokenizer.changed(chat_template="x")
    assert chat_tokenizer(with_its_own, model, "auto") == (with_its_own, model)
    assert chat_tokenizer(with_its_own, model, "chatml")[0].chat_templates["default"] != "x"
    with pytest.raises(ValueError, match="--template own: this tokenizer has no chat template"):
        chat_tokenizer(tokenizer, model, "own")


def test_the_text_a_run_was_trained_on_is_found_back_to_its_beginning(tmp_path):
    for name, settings in {
        "pretrain": {"data": "stdlib"},
        "sft": {"data": "instructions", "text": "auto", "source": str(tmp_path / "pretrain")},
        "again": {"data": "x.jsonl", "text": "auto", "source": str(tmp_path / "sft")},
        "other": {"data": "x.jsonl", "text": "novels/", "source": "owner/name"},
        "pairs": {"data": "pairs.jsonl", "preference": {}, "source": str(tmp_path / "sft")},
        "rewards": {"algorithm": "grpo", "model": str(tmp_path / "pairs")},
        "fresh": {"algorithm": "grpo", "model": None},
        "distilled": {"data": "instructions", "data_kind": "conversations", "teacher": str(tmp_path / "sft")},
    }.items():
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(json.dumps(settings))
    for name in ("pretrain", "sft", "again", "pairs", "rewards", "distilled"):
        assert known_text(tmp_path / name) == "stdlib"
    assert (known_text(tmp_path / "other"), known_text(tmp_path / "fresh")) == ("novels/", None)
    assert known_text(tmp_path / "nowhere") is None


def source_of(texts):
    documents = grain.MapDataset.source([{"text": text, "name": str(i)} for i, text in enumerate(texts)])
    return Source("x", documents, documents, documents, {"sha256": "0", "held_out_bytes": 0})


def test_old_text_is_cut_to_equal_shares():
    cut = some_text(source_of(["é" * 900, "b" * 50, "c" * 2000]), 1200)
    assert [len(document["text"].encode()) for document in cut.held_out] == [400, 50, 400]
    assert cut.record["held_out_bytes"] == 850
    assert len(some_text(source_of(["a" * 900] * 9), 1000).held_out) == 5  # of 200 bytes: less says nothing


def test_tool_calls_are_read_and_compared_as_what_they_mean(base):
    one = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2]}}\n</tool_call>'
    assert calls_in(f"Let me see. {one}") == [("add", {"a": 1, "b": [2]})]
    assert calls_in(one + one.replace('{"a": 1, "b": [2]}', r'"{\"a\": 1}"'))[1] == ("add", {"a": 1})
    assert calls_in("<tool_call> add(1)") == [("", None)]
    assert calls_in("none") == []
    call = {"type": "function", "function": {"name": "add", "arguments": {"b": [2], "a": 1}}}
    row = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": [call]}]}
    form = ChatFormat(chat_tokenizer(*base, "chatml")[0])
    name, whole = tool_questions(form, source_of([json.dumps(row)]), 5)
    assert (name.task, whole.task) == ("tool name", "tool call")
    assert [question.right(one) for question in (name, whole)] == [True, True]
    assert [question.right(one.replace("[2]", "[3]")) for question in (name, whole)] == [True, False]
    assert not name.right(one + one)
