"""What can be asked of a chat beside messages: lines that begin with a slash."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from recipes.chat_config import Config
from recipes.conversation import Conversation, Message
from train.logs import write_json

ROLES = ("system", "user", "assistant", "tool")
SETTABLE = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens", "seed", "stop")


class Chat(Protocol):
    """What commands need of `recipes.chat.Chat`."""

    config: Config
    talk: Conversation

    def say(self, words: str) -> None: ...
    def answer(self, text: str) -> None: ...


def run(chat: Chat, line: str) -> None:
    """Do what a line such as `/set temperature 0.5` asks.

    **Raises:** `ValueError` for a command that is not known, and where what it asks cannot be done.
    """
    name, _, argument = line[1:].strip().partition(" ")
    if name not in COMMANDS:
        raise ValueError(f"no command /{name}: /help lists them all. A message that begins with a slash is written with two: //{name}")
    COMMANDS[name](chat, argument.strip())


def help_(chat: Chat, argument: str) -> None:
    """this list"""
    for name, command in COMMANDS.items():
        chat.say(f"  /{name:9} {command.__doc__}")
    chat.say("  a line that ends in a backslash goes on in the next; a message that begins with a slash is written with two")
    chat.say("  Ctrl-C stops a reply, Ctrl-D leaves")


def exit_(chat: Chat, argument: str) -> None:
    """leave (or Ctrl-D)"""
    raise EOFError


def reset(chat: Chat, argument: str) -> None:
    """forget all messages; the system prompt stays"""
    chat.talk.reset(system=chat.talk.system)
    chat.say("all messages are forgotten")


def system(chat: Chat, argument: str) -> None:
    """show the system prompt; `/system TEXT` gives another, `/system none` none; the messages stay"""
    if argument:
        if chat.talk.completes:
            raise ValueError("this model has no chat template, and so no system prompt")
        chat.talk.reset(chat.talk.messages, None if argument == "none" else argument)
    chat.say(f"system prompt: {chat.talk.system}" if chat.talk.system else "no system prompt of yours (the template may have its own)")


def undo(chat: Chat, argument: str) -> None:
    """take back your last message and the reply to it"""
    message = chat.talk.undo()
    chat.say("there is nothing to take back" if message is None else f"taken back: {_short(message['content'])}")


def retry(chat: Chat, argument: str) -> None:
    """draw another reply to your last message"""
    before = list(chat.talk.messages)
    message = chat.talk.undo()
    if message is None:
        raise ValueError("there is no message to reply to")
    try:
        chat.answer(message["content"])
    except ValueError:
        chat.talk.messages = before
        raise


def history(chat: Chat, argument: str) -> None:
    """show the messages; those that the model does not see any more are marked"""
    if chat.talk.system is not None:
        chat.say(f"system: {chat.talk.system}")
    for i, message in enumerate(chat.talk.messages):
        chat.say(f"{'(dropped) ' if i < chat.talk.dropped else ''}{message['role']}: {message['content']}")


def save(chat: Chat, argument: str) -> None:
    """write messages, system prompt and settings to a JSON file: `/save talk.json`"""
    path = _path(argument, "save")
    existed = path.exists()
    settings = {name: getattr(chat.config, name) for name in SETTABLE}
    write_json(path, {"model": f"{chat.config.model}", "system": chat.talk.system, "messages": chat.talk.messages, "settings": settings})
    chat.say(f"{len(chat.talk.messages)} messages written to {path}{', in place of what was there' if existed else ''}")


def load(chat: Chat, argument: str) -> None:
    """go on from what /save has written, or from a JSON list of messages; settings stay as they are"""
    path = _path(argument, "load")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}): expected what /save writes") from None
    found = content.get("messages") if isinstance(content, dict) else content
    system, messages = split_system(checked(found, str(path)))
    if system is None and isinstance(content, dict) and isinstance(content.get("system"), str):
        system = content["system"]
    chat.talk.reset(messages, system)
    chat.say(f"{len(messages)} messages read from {path}{'' if system is None else ', and a system prompt'}")


def set_(chat: Chat, argument: str) -> None:
    """show the settings; `/set temperature 0.5` changes one, `/set top_k none` takes one away, `/set stop A B` gives strings"""
    if argument:
        name, *values = argument.split()
        name = name.replace("-", "_")
        if name not in SETTABLE:
            raise ValueError(f"no setting {name!r}: expected one of {', '.join(SETTABLE)}")
        if not values:
            raise ValueError(f"/set {name} needs a value, or none")
        value: Any = None if values == ["none"] else values[0]
        if name == "stop":
            value = () if values == ["none"] else tuple(values)
        elif len(values) > 1:
            raise ValueError(f"/set {name} takes one value, got {' '.join(values)}")
        chat.config = type(chat.config)(**(chat.config.model_dump() | {name: value}))
    chat.say(", ".join(f"{name} {getattr(chat.config, name)}" for name in SETTABLE))


def tokens(chat: Chat, argument: str) -> None:
    """how many tokens the conversation has, how many are read, and how many there is room for"""
    talk = chat.talk
    count = len(talk.ids()) if talk.messages else 0
    chat.say(
        f"{count:,} tokens up to the next reply, {talk.memory.known(talk.ids()) if count else 0:,} of them read; "
        f"{talk.memory.slots:,} in the context; {talk.dropped} of {len(talk.messages)} messages dropped"
    )


Command = Callable[[Chat, str], None]
COMMANDS: dict[str, Command] = {
    "help": help_,
    "exit": exit_,
    "reset": reset,
    "system": system,
    "undo": undo,
    "retry": retry,
    "history": history,
    "save": save,
    "load": load,
    "set": set_,
    "tokens": tokens,
}


def checked(messages: Any, where: str) -> list[Message]:
    """Messages from a file.

    **Raises:** `ValueError` for what is no list of objects with role and content.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: expected a list of messages with at least one in it, got {_short(json.dumps(messages))}")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ROLES or not isinstance(message.get("content"), str):
            raise ValueError(
                f"{where}: message {i} is {_short(json.dumps(message))}; expected an object with a content that is a text and a role among "
                f"{', '.join(ROLES)}"
            )
    return messages


def split_system(messages: list[Message]) -> tuple[str | None, list[Message]]:
    """The system prompt, where the first message is one, and the others."""
    return (messages[0]["content"], messages[1:]) if messages[0]["role"] == "system" else (None, messages)


def _path(argument: str, command: str) -> Path:
    if not argument:
        raise ValueError(f"/{command} needs the name of a file, as in /{command} talk.json")
    return Path(argument).expanduser()


def _short(text: str, most: int = 60) -> str:
    return text if len(text) <= most else f"{text[:most]}…"
