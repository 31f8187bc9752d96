"""A conversation with a model: messages, the ids they are read as, replies as they are drawn, and what is dropped when the context is full.

A tokenizer without a chat template has a base model's; its text is simply gone on with (`Conversation.completes`).
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import jax.random as jr
import numpy as np

from data.tokenizer import StreamDecoder, Tokenizer
from lm.sampling import Sampler
from recipes.generating import compile_clock
from recipes.memory import Memory
from recipes.stop_strings import StopStrings

Message = dict[str, str]
Reading = Callable[[int], AbstractContextManager[Callable[[int], None]]]  # such as `train.logs.progress` with its title


@dataclass(frozen=True)
class Draw:
    """How a reply is drawn."""

    sampler: Sampler
    most: int  # tokens
    stop: tuple[str, ...] = ()
    seed: int = 0


class Stopwatch:
    """Seconds of work; those of compiling are counted apart."""

    def __init__(self) -> None:
        self._clock = compile_clock()
        self._at, self._compiled, self.compiling = time.perf_counter(), self._clock(), 0.0

    def lap(self) -> float:
        """Since the last one."""
        now, compiled = time.perf_counter(), self._clock()
        whole, spent = now - self._at, compiled - self._compiled
        self._at, self._compiled, self.compiling = now, compiled, self.compiling + spent
        return max(whole - spent, 1e-9)


@dataclass
class Turn:
    """What one reply took."""

    prompt: int  # tokens
    known: int  # of them, read before
    read_s: float = 0.0  # without compiling, as draw_s
    drawn: int = 0  # tokens
    draw_s: float = 0.0
    compile_s: float = 0.0
    ended: str = ""  # by what

    def in_words(self, slots: int) -> str:
        new = self.prompt - self.known
        words = f"{self.prompt} tokens read" if not self.known else f"{self.known} tokens known, {new} read"
        words += f" at {new / self.read_s:,.0f}/s"
        if self.drawn:
            words += f" · {self.drawn} drawn at {self.drawn / self.draw_s:,.0f}/s"
        if self.compile_s > 0.1:
            words += f" · {self.compile_s:.1f} s of compiling"
        return f"{words} · {self.prompt + self.drawn:,} of {slots:,} · {self.ended}"


@dataclass
class Conversation:
    """Messages, and what the model sees of them."""

    tokenizer: Tokenizer
    memory: Memory
    say: Callable[[str], None]  # words for the user that are no reply
    system: str | None = None
    template_names: dict[str, Any] = field(default_factory=dict)  # further names that the template reads
    messages: list[Message] = field(default_factory=list)  # without the system's
    dropped: int = 0  # of `messages`, the first ones, which the model does not see any more
    replies: int = 0  # drawn so far: each has draws of its own
    read_before: int = 0  # tokens of the prompt that this one should go on from; 0 where messages were taken back, dropped or replaced

    def __post_init__(self) -> None:
        self.completes = not self.tokenizer.chat_templates
        self.stop_ids = turn_ends(self.tokenizer, self.template_names, self.system)
        if self.completes and self.system is not None:
            raise ValueError("a system prompt needs a chat template, which this model's tokenizer has not: leave it out")

    # --------------------------------------------------------------------------------------- what the model sees

    def ids(self) -> np.ndarray:
        """The messages that are not dropped as ids, up to where the assistant is to begin."""
        if self.completes:
            return self.tokenizer.encode_prompt("".join(message["content"] for message in self.messages[self.dropped :]))
        messages = [*_as_system(self.system), *self.messages[self.dropped :]]
        return self.tokenizer.encode_with_specials(self.tokenizer.render_chat(messages, add_generation_prompt=True, **self.template_names))

    def make_room(self, most: int) -> np.ndarray:
        """The ids, after the oldest exchanges were dropped if they left less room than `most` tokens, or than a quarter of the context.

        Then so many go that what is left fills at most half of the context: it is read anew, which is not to happen at every turn.
        The system prompt stays, and so does the last message.

        **Raises:** `ValueError` where these two alone leave no such room.
        """
        slots = self.memory.slots
        reply = min(most, slots // 4)
        ids, before = self.ids(), self.dropped
        if len(ids) + reply <= slots:
            return ids
        while len(ids) > slots // 2 and (later := [i for i in self._beginnings() if i > self.dropped]):
            self.dropped = later[0]
            ids = self.ids()
        if len(ids) + reply > slots:
            self.dropped = before
            raise ValueError(
                f"the message{'' if self.system is None else ' and the system prompt'} alone would be {len(ids):,} tokens; the context of "
                f"{slots:,} has {slots - reply:,} for them beside a reply of {reply:,}. Shorten it, or see --context and --max-new-tokens"
            )
        self.read_before, gone = 0, self.dropped - before
        self.say(
            f"the context of {slots:,} tokens is full: the oldest {gone} messages were dropped, the rest is read anew ({len(ids):,} tokens)"
        )
        return ids

    # --------------------------------------------------------------------------------------- replies

    def reply(
        self,
        draw: Draw,
        show: Callable[[str], None],
        *,
        reading: Reading = lambda total: nullcontext(lambda done: None),
        stopped: Callable[[], bool] = bool,
    ) -> Turn:
        """Read what is new, draw a reply, and add it to the messages.

        **Arguments:**

        - `show`: called with each piece of the reply's text.
        - `reading`: asked, with the tokens there are to read, for what is to be told how many of them are.
        - `stopped`: asked now and then whether to leave off.

        **Raises:** `ValueError` where the conversation cannot be rendered, or does not fit into the context.
        """
        ids = self.make_room(draw.most)
        turn = Turn(len(ids), self.memory.known(ids))
        if turn.known < self.read_before - 1:
            self.say(f"the template now writes earlier messages otherwise: from token {turn.known:,} on the conversation is read anew")
        self.read_before = len(ids)
        clock = Stopwatch()
        with reading(turn.prompt - turn.known) as told:
            whole = self.memory.read(ids, told=told, stopped=stopped)
        turn.read_s = clock.lap()
        if not whole:
            turn.prompt, turn.ended = len(self.memory.ids), "stopped while reading, nothing was drawn"
            return turn
        text = ""
        for piece in self._pieces(draw, turn, stopped):
            text += piece
            show(piece)
        turn.draw_s, turn.compile_s = clock.lap(), clock.compiling
        self.messages.append({"role": "assistant", "content": text})
        return turn

    def _pieces(self, draw: Draw, turn: Turn, stopped: Callable[[], bool]) -> Iterator[str]:
        """The text of a reply as it comes. What was drawn, and by what it ended, goes into `turn`."""
        decoder, until = StreamDecoder(self.tokenizer), StopStrings(draw.stop)
        most = min(draw.most, self.memory.room)
        turn.ended = "context is full" if most < draw.most else "max-new-tokens"
        key = jr.fold_in(jr.key(draw.seed), self.replies)
        self.replies += 1
        for token in self.memory.draw(draw.sampler, key, most, self.stop_ids):
            turn.drawn += 1
            yield until.push(decoder.push(token))
            if until.met is not None or stopped():
                break
        yield until.push(decoder.flush()) + until.flush()
        if until.met is not None:
            turn.ended = f"stop string {until.met!r}"
        elif stopped():
            turn.ended = "stopped"
        elif turn.drawn < most:
            turn.ended = "end"

    # --------------------------------------------------------------------------------------- going back

    def undo(self) -> Message | None:
        """Take the last exchange back: the last message of the user, which is returned, and what came after it."""
        beginnings = self._beginnings()
        if not beginnings:
            return None
        message = self.messages[beginnings[-1]]
        del self.messages[beginnings[-1] :]
        self.dropped, self.read_before = min(self.dropped, len(self.messages)), 0
        return message

    def reset(self, messages: Sequence[Message] = (), system: str | None = None) -> None:
        """Other messages, or none, under a system prompt or none.

        **Raises:** `ValueError` where the template refuses them; nothing is then changed.
        """
        before = self.system, self.messages
        self.system, self.messages = system, list(messages)
        try:
            turn_ends(self.tokenizer, self.template_names, system)
            if messages:
                self.ids()
        except ValueError:
            self.system, self.messages = before
            raise
        self.dropped = self.read_before = 0

    def _beginnings(self) -> list[int]:
        """Where exchanges begin: the places of the user's messages."""
        return [i for i, message in enumerate(self.messages) if message["role"] == "user"]


def turn_ends(tokenizer: Tokenizer, template_names: Mapping[str, Any], system: str | None = None) -> list[int]:
    """Where a reply ends: EOS, and the special token that the template puts behind a reply, since the model was trained to end with it,
    whatever its tokenizer calls EOS.

    **Raises:** `ValueError` where the template refuses a conversation of a question and an answer, and the system prompt if there is one.
    """
    found = set() if tokenizer.eos_id is None else {tokenizer.eos_id}
    if tokenizer.chat_templates:
        probe = "Yes."
        messages = [*_as_system(system), {"role": "user", "content": "Well?"}, {"role": "assistant", "content": probe}]
        text = tokenizer.render_chat(messages, **template_names)
        behind = tokenizer.encode_with_specials(text[text.rindex(probe) + len(probe) :])
        if len(behind) and not tokenizer.decode(behind[:1]):  # what decodes to nothing is special
            found.add(int(behind[0]))
    return sorted(found)


def _as_system(text: str | None) -> list[Message]:
    return [] if text is None else [{"role": "system", "content": text}]
