"""Rows of the formats that instruction data comes in → `Conversation`: messages with a role, checked.

    {"messages": [{"role": "user", "content": "Hi"}, ...], "tools": [...]}           OpenAI's, and Hugging Face's
    {"conversations": [{"from": "human", "value": "Hi"}, ...], "tools": "[...]"}     ShareGPT's
    {"prompt": "Hi", "response": "Hello!"}                                           pairs; also completion, question and answer
    {"instruction": "Add.", "input": "1 2", "output": "3"}                           Alpaca's; also context and response

A message is `{"role", "content"}`; an assistant's may have `tool_calls`, as OpenAI writes them, and a tool's holds the result of one.
`open_conversations` finds rows wherever `data.sources` finds texts; each document's text is then its row as JSON.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data.documents import OnInvalidUTF8, Part, Source
from data.mixture import mixed_source, parse_mixture
from data.sources import open_source
from data.tasks import instructions

ROLES = ("system", "user", "assistant", "tool")

Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """Messages in order, and the JSON schemas of the functions that the assistant may call (`None`: there is no word of functions)."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] | None = None


def open_conversations(spec: str, *, on_invalid_utf8: OnInvalidUTF8 = "error") -> Source:
    """The source that `spec` names, a row a document: `instructions` (made on this machine, `data.tasks.instructions`), a file or a folder
    of files (`.jsonl`, `.json`, `.parquet`, ...), `hf://owner/name/split`, or a mixture of such, `A:0.7,B:0.3`."""
    if (parts := parse_mixture(spec)) is not None:
        opened = [Part(name, open_conversations(name, on_invalid_utf8=on_invalid_utf8), weight) for name, weight in parts]
        return mixed_source(spec, opened)
    if spec == instructions.NAME:
        return instructions.source()
    return open_source(spec, on_invalid_utf8=on_invalid_utf8, whole_rows=True)


def read_conversation(row: str | Mapping[str, Any]) -> Conversation:
    """A conversation from a row, JSON or read already, in whichever of the formats it is.

    **Raises:** `ValueError` for a row of another shape, and for a conversation that cannot be learned from: see `checked`.
    """
    fields = json.loads(row) if isinstance(row, str) else row
    tools = _tools(fields.get("tools"))
    turns = fields.get("messages", fields.get("conversations"))
    if isinstance(turns, Sequence) and not isinstance(turns, str):
        system = [{"role": "system", "content": fields["system"]}] if isinstance(fields.get("system"), str) and fields["system"] else []
        shared = any(isinstance(turn, Mapping) and "from" in turn for turn in turns)
        messages = _from_sharegpt(turns) if shared else [_plain_message(turn, i) for i, turn in enumerate(turns)]
        return checked(Conversation((*system, *messages), tools))
    return checked(Conversation(tuple(_from_columns(fields)), tools))


def checked(conversation: Conversation) -> Conversation:
    """The conversation, if it can be learned from.

    **Raises:** `ValueError` for an unknown role, no assistant's turn, one that comes first or is empty, a tool's call that is answered by
    something else than its result, and a result that nobody called for.
    """
    messages = conversation.messages
    for i, message in enumerate(messages):
        role = message["role"]
        if role not in ROLES:
            raise ValueError(f"message {i} has the unknown role {role!r}: expected one of {', '.join(ROLES)}")
        if role != "assistant" and not isinstance(message.get("content"), str):
            raise ValueError(f"message {i}, of the {role}, has the content {message.get('content')!r}: expected a text")
        if role == "assistant" and not isinstance(message.get("content") or "", str):
            raise ValueError(f"message {i}, of the assistant, has the content {message['content']!r}: expected a text")
        if role == "assistant" and not message.get("tool_calls") and not (message.get("content") or "").strip():
            raise ValueError(f"message {i}, of the assistant, is empty and calls no tool: there is nothing to learn from it")
    spoken = [message["role"] for message in messages if message["role"] != "system"]
    if "assistant" not in spoken:
        raise ValueError(f"no assistant turn among the roles {[m['role'] for m in messages]}: there is nothing to learn")
    if spoken[0] != "user":
        raise ValueError(f"it begins with a turn of the {spoken[0]}: expected the user's, since an answer is learned from what it answers")
    _check_tools(messages)
    return conversation


def _check_tools(messages: Sequence[Message]) -> None:
    """Calls are followed by results; the last one may be left open, being itself what is learned."""
    open_calls = results = 0
    for i, message in enumerate(messages):
        if message["role"] == "tool":
            results += 1
            if results > open_calls:
                raise ValueError(f"message {i} is a tool's result, and no call is left that it could answer")
            continue
        if open_calls and not results:
            raise ValueError(
                f"a tool call (message {i - 1}) without a result: expected a message of the tool, got one of {message['role']}"
            )
        open_calls, results = len(message.get("tool_calls") or ()), 0


# ------------------------------------------------------------------------------------------- formats

_SHAREGPT_ROLES = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "observation": "tool", "tool": "tool", "function_response": "tool", "function_call": "assistant",
}  # fmt: skip
_PAIRS = (("prompt", "response"), ("prompt", "completion"), ("question", "answer"))
_ALPACA_ANSWERS = ("output", "response")
_ALPACA_INPUTS = ("input", "context")
# Alpaca's frame around an instruction (Taori et al. 2023), as some sets of pairs have it in every prompt. A chat template is a frame, too.
_ALPACA_FRAME = re.compile(
    r"\ABelow is an instruction that describes a task.*?\n+### Instruction:\n(?P<instruction>.*?)"
    r"(?:\n+### Input:\n(?P<input>.*?))?\n+### Response:\s*\Z",
    re.DOTALL,
)


def _plain_message(turn: Any, number: int) -> Message:
    if not isinstance(turn, Mapping) or "role" not in turn:
        raise ValueError(f"message {number} is {turn!r}: expected an object with role and content, or with from and value")
    message = {name: value for name, value in turn.items() if value is not None}
    if isinstance(message.get("content"), list):
        message["content"] = "".join(_text_part(part, number) for part in message["content"])
    return message


def _text_part(part: Any, number: int) -> str:
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return part["text"]
    raise ValueError(f"message {number} has a part that is no text: {part!r}")


def _from_sharegpt(turns: Sequence[Any]) -> list[Message]:
    """A function_call becomes the tool calls of an assistant's message, of the one before it if that is the assistant's."""
    messages: list[Message] = []
    for i, turn in enumerate(turns):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
            raise ValueError(f"message {i} is {turn!r}: expected an object with from and value, both texts")
        source, value = turn.get("from"), turn["value"]
        if source not in _SHAREGPT_ROLES:
            raise ValueError(f"message {i} is from {source!r}: expected one of {', '.join(_SHAREGPT_ROLES)}")
        message: Message = {"role": _SHAREGPT_ROLES[source], "content": value}
        if source == "function_call":
            message = {"role": "assistant", "content": "", "tool_calls": _calls(value, i)}
            if messages and messages[-1]["role"] == "assistant":
                before = messages.pop()
                message |= {"content": before["content"], "tool_calls": before.get("tool_calls", []) + message["tool_calls"]}
        messages.append(message)
    return messages


def _calls(value: str, number: int) -> list[dict[str, Any]]:
    try:
        found = json.loads(value)
    except ValueError as error:
        raise ValueError(f"message {number} is a function call that is not JSON ({error}): {value[:80]!r}") from error
    calls = found if isinstance(found, list) else [found]
    for call in calls:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise ValueError(f"message {number} is a function call without a name: {call!r}")
    return [{"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}} for call in calls]


def _tools(value: Any) -> tuple[dict[str, Any], ...] | None:
    """Schemas, from JSON if need be, each as `{"type": "function", "function": {...}}`. An empty list means that there are none."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except ValueError as error:
            raise ValueError(f"its tools are not JSON ({error}): {value[:80]!r}") from error
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise ValueError(f"its tools are {value!r}: expected a list of JSON schemas")
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in value)


def _from_columns(fields: Mapping[str, Any]) -> list[Message]:
    system = [{"role": "system", "content": fields["system"]}] if isinstance(fields.get("system"), str) and fields["system"] else []
    if "instruction" in fields:
        answer = next((fields[name] for name in _ALPACA_ANSWERS if name in fields), None)
        more = next((fields[name] for name in _ALPACA_INPUTS if fields.get(name)), None)
        return [*system, *_pair(_instruction(fields["instruction"], more), answer)]
    for asked, answered in _PAIRS:
        if asked in fields and answered in fields:
            prompt, answer = fields[asked], fields[answered]
            if isinstance(prompt, list) and isinstance(answer, list):  # messages in two parts, as TRL has them
                return [_plain_message(turn, i) for i, turn in enumerate([*prompt, *answer])]
            return [*system, *_pair(without_frame(prompt) if isinstance(prompt, str) else prompt, answer)]
    formats = "messages; conversations; prompt and response or completion; question and answer; instruction and output"
    raise ValueError(f"the row has the keys {sorted(fields)}: expected {formats}")


def without_frame(prompt: str) -> str:
    """The instruction in a prompt that Alpaca's frame stands around; another prompt as it is."""
    framed = _ALPACA_FRAME.match(prompt)
    return prompt if framed is None else _instruction(framed["instruction"], framed["input"])


def _instruction(instruction: Any, more: str | None) -> Any:
    return instruction if more is None else f"{instruction}\n\n{more}"


def _pair(prompt: Any, answer: Any) -> list[Message]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
