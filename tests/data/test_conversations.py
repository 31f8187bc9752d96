"""Rows of every format become the same conversation; what cannot be learned from is refused in words."""

import functools
import gzip
import json

import pytest

from data.conversations import open_conversations, read_conversation, without_frame
from data.tasks import instructions

USER, ANSWER = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "4"}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ANSWER]},
        {"messages": [{**USER, "name": None, "content": [{"type": "text", "text": "2 + "}, {"type": "text", "text": "2?"}]}, ANSWER]},
        {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}], "tools": "[]"},
        {"conversations": [USER, ANSWER]},
        {"prompt": "2 + 2?", "response": "4"},
        {"prompt": [USER], "completion": [ANSWER]},
        {"question": "2 + 2?", "answer": "4", "system": ""},
        {"instruction": "2 + 2?", "input": "", "output": "4"},
        {"instruction": "2 + 2?", "context": "", "response": "4"},
    ],
)
def test_every_format_gives_the_same_conversation(row) -> None:
    found = read_conversation(json.dumps(row))
    assert (list(found.messages), found.tools) == ([USER, ANSWER], None)


def test_what_a_format_has_beside_is_kept() -> None:
    found = read_conversation({"instruction": "Add.", "input": "1 2", "output": "3", "system": "Be terse."})
    assert [message["content"] for message in found.messages] == ["Be terse.", "Add.\n\n1 2", "3"]
    call = json.dumps({"name": "add", "arguments": {"a": 2}})
    shared = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "Let me see."}, {"from": "function_call", "value": call}]
    shared += [{"from": "observation", "value": "4"}, {"from": "gpt", "value": "It is 4."}]
    found = read_conversation({"conversations": shared, "tools": json.dumps([TOOL["function"]]), "system": "Be terse."})
    assert [message["role"] for message in found.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert found.messages[2] == {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL]}  # one message, not two
    assert found.tools == (TOOL,)


def test_alpacas_frame_is_taken_off_a_prompt() -> None:
    frame = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    assert without_frame(f"{frame}### Instruction:\nwhat is tea?\n\n### Response:\n") == "what is tea?"
    assert without_frame(f"{frame}### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n") == "Add.\n\n1 2"
    assert without_frame("### Instruction: no frame") == "### Instruction: no frame"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": [USER]}, r"no assistant turn among the roles \['user'\]: there is nothing to learn"),
        ({"messages": [USER, {"role": "critic", "content": "x"}]}, "message 1 has the unknown role 'critic': expected one of system, user"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "message 0 is from 'bot': expected one of system, human"),
        ({"messages": [ANSWER]}, "it begins with a turn of the assistant"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "is empty and calls no tool"),
        ({"messages": [USER, {"role": "assistant", "content": 4}]}, "message 1, of the assistant, has the content 4: expected a text"),
        ({"messages": [{"role": "user"}, ANSWER]}, "message 0, of the user, has the content None"),
        (
            {"messages": [USER, CALLED, ANSWER]},
            r"a tool call \(message 1\) without a result: expected a message of the tool, got one of assi",
        ),
        ({"messages": [USER, RESULT, ANSWER]}, "message 1 is a tool's result, and no call is left"),
        ({"messages": [USER, CALLED, RESULT, RESULT, ANSWER]}, "message 3 is a tool's result, and no call is left"),
        ({"messages": ["Hi"]}, "message 0 is 'Hi': expected an object with role and content"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "message 0 has a part that is no text"),
        ({"conversations": [{"from": "function_call", "value": "add(2)"}]}, "message 0 is a function call that is not JSON"),
        ({"conversations": [{"from": "function_call", "value": "{}"}]}, "message 0 is a function call without a name"),
        ({"messages": [USER, ANSWER], "tools": "x"}, "its tools are not JSON"),
        ({"text": "Hi"}, r"the row has the keys \['text'\]: expected messages; conversations; prompt and response"),
    ],
)
def test_what_cannot_be_learned_from_is_refused_in_words(row, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_conversation(row)


def test_a_call_at_the_end_needs_no_result() -> None:
    assert read_conversation({"messages": [USER, CALLED]}).messages[1] == CALLED


def test_rows_come_from_the_files_that_texts_come_from(tmp_path, monkeypatch) -> None:
    rows = [{"messages": [USER, {**ANSWER, "content": f"4, of course ({i}) \U0001f642"}]} for i in range(45)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(lines)
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "list.json").write_text(json.dumps(rows))
    for name in ("rows.jsonl", "packed.jsonl.gz", "list.json"):
        source = open_conversations(str(tmp_path / name))
        documents = [*source.train, *source.held_out]
        assert sorted((json.loads(document["text"]) for document in documents), key=str) == sorted(rows, key=str)
        assert documents[0]["name"].startswith(f"{name}:")
        assert read_conversation(documents[0]["text"]).messages[0] == USER
    (tmp_path / "readme.md").write_text("about")
    whole = open_conversations(str(tmp_path))
    assert whole.record["documents"] == 135
    assert whole.record["left_out"] == {"*.md": 1}
    (tmp_path / "code.py").write_text(
        "".join(f'def f{i}(a):\n    """Some words of it."""\n    return a.some_value({i}, a)\n' for i in range(50))
    )
    made = functools.partial(instructions.source, 40, root=tmp_path)
    monkeypatch.setattr(instructions, "source", made)
    mixed = open_conversations(f"{tmp_path / 'rows.jsonl'}:0.5,instructions:0.5")
    assert [part.source.record["kind"] for part in mixed.parts] == ["jsonl", "instructions"]


def test_files_that_hold_no_rows_are_refused_in_words(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("Hi")
    (tmp_path / "b.json").write_text('{"messages": []}')
    (tmp_path / "c.json").write_text('{"a": 1}\n{"a": 2}\n')
    (tmp_path / "d.jsonl").write_text('{"a": 1}\n[1]\n')
    with pytest.raises(ValueError, match=r"is no file of conversations. Accepted: hf://"):
        open_conversations(str(tmp_path / "a.txt"))
    with pytest.raises(ValueError, match="holds dict: expected a JSON list of objects"):
        open_conversations(str(tmp_path / "b.json"))
    with pytest.raises(ValueError, match=r"is not JSON.* If it holds one object a line, name it .jsonl"):
        open_conversations(str(tmp_path / "c.json"))
    with pytest.raises(ValueError, match=r"line 2 of .* has a list: expected an object, one a line"):
        open_conversations(str(tmp_path / "d.jsonl"))
    with pytest.raises(ValueError, match=r"'nowhere' does not exist\. Accepted: hf://"):
        open_conversations("nowhere")
