"""Chat templates: the Jinja text that comes with a model and turns messages into the one text it was trained on.

Rendered as `transformers` renders them (`tests/data/test_chat_template.py` compares): in a sandbox, since a template is a program by a
stranger, with blocks trimmed, and with the few functions that templates count on.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"  # NAME.jinja, where there are several

Templates = dict[str, str]  # by name; one without a name is "default"


def render(
    templates: Mapping[str, str],
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    **extra: Any,
) -> str:
    """The text of a conversation.

    **Arguments:**

    - `templates`: by name. `tool_use` is taken where there are tools and it is there, else `default`.
    - `messages`: each with a `role` and what the template reads of it, mostly `content`; an entry that is `None` counts as absent.
      Reasoning may stand under `reasoning_content`, `thinking` or `reasoning`.
    - `tools`: JSON schemas.
    - `add_generation_prompt`: end with the opening of the assistant's turn.
    - `extra`: further names the template reads, such as `enable_thinking` or `bos_token`.

    **Raises:** `ValueError` for no template, one that is no Jinja, one that refuses these messages, and a name it needs and was not given.
    """
    if not messages:
        raise ValueError("a conversation needs at least one message; got none")
    for tool in tools or ():
        if not isinstance(tool, Mapping):
            raise ValueError(f"tools are JSON schemas (objects with name, description and parameters); got {tool!r}")
    template = _compiled(_chosen(templates, tools))
    given = {"documents": None, **{name: _plain(value) for name, value in extra.items()}}
    try:
        return template.render(
            given,
            messages=[_message(message, i) for i, message in enumerate(messages)],
            tools=None if tools is None else _plain(tools),
            add_generation_prompt=add_generation_prompt,
        )
    except jinja2.UndefinedError as error:
        raise ValueError(
            f"the chat template needs something that is not there: {error}. Give it as an argument, or in the messages and tools"
        ) from error
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template refuses this conversation: {error}") from error
    except TypeError as error:  # of an operator inside the template, mostly a content that is no text
        raise ValueError(f"the chat template cannot work with these messages: {error}. Is a content of another kind?") from error


def read(folder: Path, config: Mapping[str, Any]) -> Templates:
    """The templates of a folder: its files, else `chat_template` of its `tokenizer_config.json`: a text, or a list of named ones."""
    files = {"default": folder / TEMPLATE_FILE} | {file.stem: file for file in sorted(folder.glob(f"{TEMPLATE_FOLDER}/*.jinja"))}
    found = {name: file.read_text(encoding="utf-8") for name, file in files.items() if file.is_file()}
    said = config.get("chat_template")
    if found or said is None:
        return found
    if isinstance(said, str):
        return {"default": said}
    try:
        return {entry["name"]: entry["template"] for entry in said}
    except (TypeError, KeyError) as error:
        place = folder / "tokenizer_config.json"
        raise ValueError(f"chat_template in '{place}' is neither a text nor a list of objects with name and template") from error


def write(folder: Path, templates: Mapping[str, str]) -> None:
    """The files that `read` reads; those of templates that are not among these are removed."""
    places = {name: folder / (TEMPLATE_FILE if name == "default" else f"{TEMPLATE_FOLDER}/{name}.jinja") for name in templates}
    for name, file in places.items():
        if name != "default" and not name.replace("-", "_").isidentifier():
            raise ValueError(f"a chat template is named {name!r}, which is no name for a file: expected letters, digits, _ and -")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(templates[name], encoding="utf-8")
    for file in [folder / TEMPLATE_FILE, *folder.glob(f"{TEMPLATE_FOLDER}/*.jinja")]:
        if file not in places.values():
            file.unlink(missing_ok=True)


def _chosen(templates: Mapping[str, str], tools: Sequence[Any] | None) -> str:
    names = ["tool_use", "default"] if tools is not None else ["default"]
    for name in names:
        if name in templates:
            return templates[name]
    if templates:
        raise ValueError(f"none of the chat templates is named 'default': there are {', '.join(templates)}")
    raise ValueError(
        f"this tokenizer has no chat template: a base model has none. Otherwise put it beside tokenizer.json as {TEMPLATE_FILE}"
    )


# ------------------------------------------------------------------------------------------- what a template sees

_REASONING = ("reasoning_content", "thinking", "reasoning")


def _message(message: Mapping[str, Any], number: int) -> dict[str, Any]:
    """A message of plain data, its reasoning under the names that templates look for."""
    if not isinstance(message, Mapping):
        raise ValueError(f"message {number} is {message!r}: expected an object with role and content")
    seen = {key: value for key, value in _plain(message).items() if value is not None}
    reasoning = next((seen[name] for name in _REASONING if name in seen), None)
    return seen if reasoning is None else {"thinking": reasoning, **seen, "reasoning_content": reasoning}


def _plain(value: Any) -> Any:
    """JSON's types and nothing else: methods of other objects would be open to the template."""
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(entry) for entry in value)
    raise ValueError(f"a chat template sees texts, numbers, lists and objects only; got {type(value).__name__}: {value!r}")


# ------------------------------------------------------------------------------------------- environment


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`: marks what the assistant said. Here it is a block like any other."""

    tags = {"generation"}  # noqa: RUF012  (jinja2's own convention)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class _Namespace(Namespace):
    """`namespace(...)`, which is writable: without names that lead into Python."""

    def __init__(*args: Any, **names: Any) -> None:
        self, args = args[0], args[1:]
        first = dict(*args, **names)
        for name in first:
            _check_name(name)
        Namespace.__init__(self, first)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"names in a namespace may not begin with an underscore; got {name!r}")


def _dict(*args: Any, **names: Any) -> dict[Any, Any]:
    """In place of the class, which has more to it than a template needs."""
    return dict(*args, **names)


def _refuse(words: str) -> None:
    raise jinja2.TemplateError(words)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None, sort_keys: bool = False
) -> str:
    """Jinja's own filter would write `<` as `\\u003c`."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


@functools.lru_cache(maxsize=32)
def _compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _now, "namespace": _Namespace, "dict": _dict}
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template is not valid Jinja: {error.message} (line {error.lineno})") from error
