"""Conversations → token ids, and which of them are trained on.

`ChatFormat` renders a conversation with the model's own chat template, or with `CHATML`, and takes the text apart again where the assistant
begins and ends to speak. That is found by rendering, not by markers in the template: what the assistant says in turn k is what rendering
the messages up to k adds to rendering those before it, opened for an answer. Trained on are the assistant's text, its tool calls and the
token that ends its turn; everything else is only read.

    <|im_start|>user⏎2 + 2?<|im_end|>⏎<|im_start|>assistant⏎  4<|im_end|>  ⏎
    ──────────────────────── read ────────────────────────  ── trained ──

The pieces are encoded one by one, so the ids before an answer are those that the model is given when it is asked. Special tokens come from
the template alone: `<|im_end|>` inside a message is ordinary text.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np

from data.conversations import Conversation, Message
from data.tokenizer import Tokenizer

Turns = Literal["together", "apart"]

CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")

# ChatML with tools as Hermes and Qwen write them. It never looks ahead, so rendering some messages is a prefix of rendering more. BOS comes
# first where a tokenizer has one that is not ChatML's own.
CHATML = """\
{%- if bos_token is defined and bos_token and bos_token != '<|im_start|>' %}{{ bos_token }}{% endif %}
{%- set own = messages and messages[0].role == 'system' %}
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if own %}{{ messages[0].content + '\\n\\n' }}{% endif %}
    {{- 'You may call these functions:\\n<tools>' }}
    {%- for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}
    {{- '\\n</tools>\\nTo call one, answer with <tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call>.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if not (tools and own and loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
        {%- for call in message.tool_calls or [] %}
            {%- set call = call.function if call.function else call %}
            {%- if message.content or not loop.first %}{{ '\\n' }}{% endif %}
            {{- '<tool_call>\\n{"name": ' + (call.name | tojson) + ', "arguments": ' }}
            {{- call.arguments if call.arguments is string else (call.arguments | tojson) }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""


class Piece(NamedTuple):
    """A stretch of a rendered conversation, all of it trained on or nothing."""

    text: str
    tokens: np.ndarray  # int32
    trained: bool


class Example(NamedTuple):
    """What one row, or a part of it, is made of."""

    tokens: np.ndarray  # int32
    trained: np.ndarray  # bool, of each token

    @staticmethod
    def of(pieces: Sequence[Piece]) -> "Example":
        marks = [np.full(len(piece.tokens), piece.trained) for piece in pieces]
        return Example(np.concatenate([piece.tokens for piece in pieces]).astype(np.int32), np.concatenate(marks))


@dataclass(frozen=True)
class ChatFormat:
    """How a tokenizer and its chat template write conversations."""

    tokenizer: Tokenizer
    turns: Turns = "together"  # one example a conversation, or one for each of the assistant's turns, with what came before it

    def __post_init__(self) -> None:
        """**Raises:** `ValueError` for a template that does not end a turn, or writes it otherwise than it opens it."""
        assert self.stop_ids  # its own errors say what is wrong with a template

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end the assistant's turn, in the middle of a conversation and at its end, and EOS: where generating stops."""
        asked, answered = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
        probe = Conversation((asked, answered, asked, answered))
        turns = [self._turn(probe, k) for k in (1, 3)]
        ends = [int(self._piece(said, trained=True, after=before).tokens[-1]) for before, said in turns]
        return tuple(dict.fromkeys([*ends, *([] if self.tokenizer.eos_id is None else [self.tokenizer.eos_id])]))

    def encode(self, conversation: Conversation) -> list[Example]:
        """The examples of a conversation: one, or with turns apart as many as the assistant has turns.

        **Raises:** `ValueError` for a template that cannot write it, or not so that its parts can be told.
        """
        return [Example.of(pieces) for pieces in self.pieces(conversation)]

    def prompt(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None) -> np.ndarray:
        """The ids that ask for an answer: everything before what the model would say. In training they are the same."""
        asked = Conversation(tuple(map(dict, messages)), None if tools is None else tuple(map(dict, tools)))
        conversation = _with_stand_ins(self._stand_ins, asked)
        return self._piece(self._rendered(conversation, len(messages), asking=True), trained=False).tokens

    def pieces(self, conversation: Conversation) -> list[list[Piece]]:
        """The rendered text of each example, taken apart where the assistant begins and ends to speak."""
        safe = _with_stand_ins(self._stand_ins, conversation)
        whole = self._rendered(safe, len(safe.messages))
        found: list[Piece] = []
        apart: list[list[Piece]] = []
        at = 0
        for k, message in enumerate(safe.messages):
            if message["role"] != "assistant":
                continue
            before, said = self._turn(safe, k)
            if self.turns == "apart":
                apart.append([self._piece(before, trained=False), self._piece(said, trained=True, after=before)])
                continue
            if not whole.startswith(before + said):
                raise ValueError(
                    f"{_broken(before + said, whole, f'messages 0 to {k}', 'all of them')}. What is said later changes what was said "
                    "before, so one text cannot teach all turns: take turns apart (an example for each of the assistant's), or the "
                    "built-in template"
                )
            found += [self._piece(whole[at : len(before)], trained=False), self._piece(said, trained=True, after=before)]
            at = len(before) + len(said)
        if self.turns == "apart":
            return apart
        if at < len(whole):
            found.append(self._piece(whole[at:], trained=False))
        return [found]

    def _turn(self, conversation: Conversation, k: int) -> tuple[str, str]:
        """The text before the assistant's message k, opened for an answer, and what the message adds to it, to the end of the turn."""
        before, after = self._rendered(conversation, k, asking=True), self._rendered(conversation, k + 1)
        if not after.startswith(before):
            what = f"messages 0 to {k - 1} and the opening of an answer"
            raise ValueError(
                f"{_broken(before, after, what, f'messages 0 to {k}')}. A model asked with the one would not be where it was trained to "
                "answer: take the built-in template"
            )
        if k + 1 < len(conversation.messages):
            after = self._without_end_of_text(after, self._rendered(conversation, k + 2))
        said = after[len(before) :]
        ends = [match.end() for match in self._special.finditer(said)]
        if not ends or said[ends[-1] :].strip():
            raise ValueError(
                f"the chat template ends the assistant's turn with {said[-20:]!r}, and not with a special token: a model trained on it "
                f"would not learn to stop. Expected an end such as {CHATML_TOKENS[1]}, as the built-in template has it"
            )
        said = said[: ends[-1]]
        for words in _said_in(conversation.messages[k]):
            if words not in said:
                raise ValueError(
                    f"the chat template leaves out what the assistant says in message {k}: {words[:60]!r} is not in {said[:60]!r}"
                )
        return before, said

    def _without_end_of_text(self, text: str, longer: str) -> str:
        """Phi-3's template closes with EOS, which is gone when the talk goes on."""
        stripped = text.rstrip()
        shorter = next((stripped[: -len(name)] for name in self.tokenizer.special_tokens if stripped.endswith(name)), text)
        ends_text = self.tokenizer.id_of(stripped[len(shorter) :]) == self.tokenizer.eos_id
        return shorter if ends_text and not longer.startswith(text) and longer.startswith(shorter) else text

    def _rendered(self, conversation: Conversation, messages: int, *, asking: bool = False) -> str:
        tools = None if conversation.tools is None else list(conversation.tools)
        some = list(conversation.messages[:messages])
        if not some:
            raise ValueError("the assistant speaks first: expected a user's turn before")
        text = self.tokenizer.render_chat(some, tools, add_generation_prompt=asking)
        for tool in tools or ():
            if (name := str(tool["function"]["name"])) not in text:
                raise ValueError(f"the chat template does not tell the model of the function {name!r}; the built-in template does")
        if _MARK_AS_JSON in text:
            raise ValueError(
                f"the chat template spells a character of the messages as {_MARK_AS_JSON}: expected tojson with ensure_ascii=false"
            )
        return text

    # ------------------------------------------------------------------------------------- special tokens

    def _piece(self, text: str, *, trained: bool, after: str = "") -> Piece:
        """Special tokens that the template wrote are ids; those that stood in a message are back, and spelled out. `after`: what stands
        before this piece."""
        parts: list[np.ndarray] = []
        at = self._space_added_again(text, after)
        for match in self._special.finditer(text):
            parts += [self._plain(text[at : match.start()]), np.array([self.tokenizer.id_of(match[0].strip())])]
            at = match.end()
        parts.append(self._plain(text[at:]))
        return Piece(self._stand_ins.undone(text), np.concatenate(parts).astype(np.int32), trained)

    def _plain(self, text: str) -> np.ndarray:
        return self.tokenizer.encode(self._stand_ins.undone(text)) if text else np.empty(0, np.int32)

    def _space_added_again(self, text: str, after: str) -> int:
        """How many spaces to leave out at the start of a piece: 1 where the tokenizer, as Llama 2's, puts one before every text, and the
        piece goes on where another was cut.

        **Raises:** `ValueError` where there is no space to leave out: what is encoded would not be what was written.
        """
        begins_anew = any(match.end() == len(after) for match in self._special.finditer(after)) or self._special.match(text)
        if not after or begins_anew or self.tokenizer.tokens_of(self.tokenizer.encode("a")) == ["a"]:
            return 0
        if not text.startswith(" "):
            raise ValueError(
                f"this tokenizer puts a space before every text, and the chat template has none between the opening {after[-20:]!r} and "
                f"the answer {text[:20]!r}: the two cannot be encoded apart. Expected a special token or a space there, or a byte-level "
                "tokenizer"
            )
        return 1

    @cached_property
    def _special(self) -> re.Pattern[str]:
        """Each special token of the tokenizer, with the white space that it takes along."""
        tokens = sorted(self.tokenizer.special_tokens.values(), key=lambda token: -len(token.content))
        space = r"\s*"
        names = [space * token.lstrip + re.escape(token.content) + space * token.rstrip for token in tokens]
        return re.compile("|".join(names) or "(?!)")

    @cached_property
    def _stand_ins(self) -> "_StandIns":
        return _StandIns(self.tokenizer.special_tokens)


# U+FDD0 and U+FDD1 are characters that Unicode keeps for a program's own use.
_MARK, _CLOSE = "\ufdd0", "\ufdd1"
_MARK_AS_JSON = "\\ufdd0"


class _StandIns:
    """Names of special tokens inside messages, out of the way while a template is at work: `<|im_end|>` ↔ U+FDD0, its number, U+FDD1."""

    def __init__(self, tokens: Iterable[str]) -> None:
        self._names = [_MARK, *sorted(tokens, key=lambda name: -len(name))]
        self._number = {name: i for i, name in enumerate(self._names)}
        self._pattern = re.compile("|".join(map(re.escape, self._names)))

    def done(self, value: Any) -> Any:
        """In all texts of a piece of JSON."""
        if isinstance(value, str):
            return self._pattern.sub(lambda match: f"{_MARK}{self._number[match[0]]}{_CLOSE}", value)
        if isinstance(value, Mapping):
            return {self.done(name): self.done(entry) for name, entry in value.items()}
        return [self.done(entry) for entry in value] if isinstance(value, list | tuple) else value

    def undone(self, text: str) -> str:
        return re.sub(f"{_MARK}([0-9]+){_CLOSE}", lambda match: self._names[int(match[1])], text)


def _with_stand_ins(stand_ins: _StandIns, conversation: Conversation) -> Conversation:
    tools = conversation.tools
    return Conversation(tuple(map(stand_ins.done, conversation.messages)), None if tools is None else tuple(map(stand_ins.done, tools)))


def _said_in(message: Message) -> list[str]:
    """What must be found again in the text of an assistant's message. Reasoning may be left out, and the space around is the template's."""
    content = (message.get("content") or "").rpartition("</think>")[2].strip()
    calls = [call.get("function", call)["name"] for call in message.get("tool_calls") or ()]
    return [words for words in (content, *calls) if words]


def _broken(short: str, long: str, what: str, than: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(short, long, strict=False)) if a != b), min(len(short), len(long)))
    start = max(0, at - 20)
    return (
        f"the chat template breaks the prefix property at character {at}: rendering {what} gives {short[start : at + 20]!r} there, "
        f"rendering {than} gives {long[start : at + 20]!r}"
    )
