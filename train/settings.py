"""Settings whose mistakes read as sentences, a line each, instead of pydantic's report."""

from typing import Any

from pydantic import BaseModel, ValidationError


class Settings(BaseModel, frozen=True, extra="forbid"):
    """A frozen group of settings that knows its fields, and refuses others.

    **Raises:** `ValueError` with a line for each mistake: the field, what was expected, what came.
    """

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ValueError(in_words(error)) from None


def in_words(error: ValidationError, name: Any = lambda path: ".".join(map(str, path))) -> str:
    """What pydantic found, a line each; `name` writes the path of a field."""
    lines = []
    for each in error.errors(include_url=False):
        message = each["msg"].removeprefix("Value error, ")
        got = "" if each["type"] == "missing" else f" (got {each['input']!r})"  # the input then is all that was not missing
        lines.append(f"{name(each['loc'])}: {message}{got}" if each["loc"] else message)
    return "\n".join(lines)
