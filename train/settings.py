"""`Settings`: frozen configs whose mistakes read as sentences instead of pydantic's report."""

from typing import Any, ClassVar

from pydantic import BaseModel, ValidationError


class Settings(BaseModel, frozen=True, extra="forbid"):
    """A config, or a group of fields in one. Unknown fields are refused."""

    flag_mark: ClassVar[str] = ""  # before a field in an error: two dashes where fields are flags by themselves

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ValueError(in_words(error, self.flag_mark)) from None


def in_words(error: ValidationError, flag_mark: str = "--") -> str:
    """What pydantic found, a line each: the field as a flag, what was expected, what came."""
    lines = []
    for each in error.errors(include_url=False):
        message = each["msg"].removeprefix("Value error, ")
        lines.append(f"{flag_mark}{flag(each['loc'])}: {message} (got {each['input']!r})" if each["loc"] else message)
    return "\n".join(lines)


def flag(path: tuple[Any, ...]) -> str:
    """The name of a field on the command line, without dashes before it: `step.micro-batches`."""
    return ".".join(str(part).replace("_", "-") for part in path)
