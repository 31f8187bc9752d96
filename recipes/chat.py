"""Talk to any model that can be loaded: in the terminal, from a pipe, or a file of prompts at once.

python -m recipes.chat my_export/                                        # /help lists what else can be asked
python -m recipes.chat owner/name --system 'Answer in one sentence.' --temperature 0
echo 'What is the capital of France?' | python -m recipes.chat model.gguf --seed 3
python -m recipes.chat model.gguf --prompts questions.jsonl --out answers.jsonl

A conversation is written as the model's own chat template says and read into the caches of its layers, in chunks; at each turn only what is
new is read. When it outgrows the context, the oldest exchanges are dropped, which is said. A model without a template is no chat model:
then each line is a text that the model goes on with, and an empty line asks for more.

A file of prompts has a JSON object a line, `{"prompt": "..."}` or `{"messages": [...]}`, and is answered in batches. Answers are
appended to `--out` as soon as their batch is done; a run that was stopped goes on there.
"""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType
from typing import Any

import tyro

from data.tokenizer import Tokenizer
from lm.base import AbstractLM
from lm.decoding import CHUNKS
from recipes import chat_commands
from recipes.chat_batch import answer_all
from recipes.chat_config import Config
from recipes.command_line import fail
from recipes.conversation import Conversation
from recipes.generating import ready
from recipes.memory import Memory
from train.checkpoint import CheckpointError
from train.logs import plain_messages, progress
from train.runtime import DeviceError


def main(config: Config) -> int:
    """Talk, or answer a file of prompts. The exit status: 1 where a message from a pipe or a file could not be answered."""
    plain_messages()
    model, tokenizer, words = ready(config.model, config)
    slots = config.context_of(model.config.context)
    print(f"[{words}; context of {slots:,} tokens]", file=sys.stderr)
    if config.prompts is not None and config.out is not None:
        return answer_all(config, model, tokenizer, slots)
    chat = Chat(config, model, tokenizer, slots)
    return chat.run()


class Chat:
    """Lines in, replies out. Replies go to stdout; all other words to stderr, in brackets."""

    def __init__(self, config: Config, model: AbstractLM, tokenizer: Tokenizer, slots: int) -> None:
        self.config = config
        self.talk = Conversation(tokenizer, Memory(model, slots), self.say, config.system, config.template_names())
        self.at_terminal = sys.stdin.isatty()
        self.failed = False

    def run(self) -> int:
        if self.talk.completes:
            self.say("this model has no chat template: it goes on with each text as it stands; an empty line asks for more of it")
        if self.at_terminal:
            import readline  # noqa: F401  (from here on `input` knows the arrow keys; not on Windows, and not wanted in a pipe)

            self.say("/help for what can be asked, Ctrl-C stops a reply, Ctrl-D leaves")
        while True:
            try:
                line = self.read_line()
                if line.startswith("/") and not line.startswith("//"):
                    chat_commands.run(self, line)
                elif line or (self.talk.completes and self.talk.messages):
                    self.answer(line.removeprefix("/") if line.startswith("//") else line)
            except EOFError:
                return int(self.failed and not self.at_terminal)
            except KeyboardInterrupt:  # while nothing was drawn: a line half typed, or a second Ctrl-C
                print(file=sys.stderr)
                self.say("Ctrl-D or /exit leaves")
            except (ValueError, OSError) as error:
                self.failed = True
                print(f"error: {error}", file=sys.stderr)

    def read_line(self) -> str:
        """A message: a line, and those after it while they end in a backslash."""
        whole = ""
        while True:
            if self.at_terminal:
                line = input("... " if whole else "> ")
            elif not (read := sys.stdin.readline()):
                raise EOFError
            else:
                line = read.removesuffix("\n")
            if not line.endswith("\\"):
                return whole + line
            whole += line.removesuffix("\\") + "\n"

    def answer(self, text: str) -> None:
        """Add a message and show the reply, or take the message back where none came of it. Without a template: go on with a text."""
        talk, before = self.talk, list(self.talk.messages)
        if talk.completes and text:
            talk.reset()
        if text:
            talk.messages.append({"role": "user", "content": text})
        try:
            with stopping() as stopped:
                turn = talk.reply(self.config.draw(), show, reading=reading, stopped=stopped)
        except ValueError:
            talk.messages = before
            raise
        print(flush=True)
        if turn.drawn == 0 and stopped():
            talk.messages = before
            self.say(f"{turn.ended}; the message was taken back")
        else:
            self.say(turn.in_words(talk.memory.slots))

    def say(self, words: str) -> None:
        print(words if words.startswith("  ") else f"[{words}]", file=sys.stderr, flush=True)


def show(piece: str) -> None:
    print(piece, end="", flush=True)


def reading(total: int) -> AbstractContextManager[Callable[[int], None]]:
    """A bar, where there is more than one chunk to wait for."""
    return progress("tokens read", total) if total > CHUNKS[-1] else nullcontext(lambda done: None)


@contextmanager
def stopping() -> Iterator[Any]:
    """Inside, the first Ctrl-C is an answer to what this yields: whether to stop. The second is a Ctrl-C."""
    asked: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    chosen = tyro.cli(Config, description=__doc__, prog="python -m recipes.chat")
    try:
        status = main(chosen)
    except (ValueError, OSError, CheckpointError, DeviceError) as error:
        fail(str(error))
    sys.exit(status)
