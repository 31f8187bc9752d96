"""Does written Python parse? A cheap, unforgiving measure of samples from a model trained on code.

A sample stops somewhere in the middle of a statement. It is cut back to its last complete top-level statement, and what is left must be
accepted by `ast.parse`. Real files, cut at the same length, show what a perfect writer would get.
"""

import ast
import re
import warnings

_OPEN, _CLOSE = "([{", ")]}"
_STRING = re.compile(r"[rbuf]{0,2}(\"\"\"|'''|\"|')", re.IGNORECASE)
_CONTINUES = re.compile(r"(else|elif|except|finally)\b|[)\]}]")  # a line at the margin that belongs to the statement before it


def statement_starts(text: str) -> list[int]:
    """Offsets at which a new top-level statement (or comment) begins: lines at the margin, outside brackets and strings.

    A decorator and what it decorates are one statement. The text may be broken; the scan then finds what it can.
    """
    starts, depth, place, decorated = [], 0, 0, False
    while place < len(text):
        at_line_start = place == 0 or text[place - 1] == "\n"
        if at_line_start and depth == 0 and not text[place].isspace() and not _CONTINUES.match(text, place):
            if not decorated:
                starts.append(place)
            decorated = text[place] == "@" or (decorated and text[place] == "#")
        if text[place] == "#":
            place = _line_end(text, place)
        elif string := _STRING.match(text, place):
            place = _string_end(text, string.end(), string.group(1))
        else:
            depth += (text[place] in _OPEN) - (text[place] in _CLOSE)
            depth = max(depth, 0)
            word = re.compile(r"\w+|.", re.DOTALL).match(text, place)  # whole words, so that the f of `def"` is no string prefix
            place = word.end() if word else place + 1
    return starts


def complete_statements(text: str, *, after: int = 0, finished: bool = False) -> str:
    """The text up to the end of its last complete top-level statement.

    **Arguments:**

    - `after`: length of the prompt. Where nothing past it is complete, the result is empty: a prompt alone is no sample.
    - `finished`: the writer ended by itself, so the last statement counts as complete.
    """
    if finished:
        return text
    starts = [start for start in statement_starts(text) if start > after]
    return text[: starts[-1]] if starts else ""


def parses(text: str) -> bool:
    """True for non-empty Python source. Warnings about odd escapes do not count."""
    if not text.strip():
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # ValueError: null bytes; the last two: nesting without end
        return False
    return True


def _line_end(text: str, place: int) -> int:
    end = text.find("\n", place)
    return len(text) if end < 0 else end


def _string_end(text: str, place: int, quote: str) -> int:
    """Just past the closing quote; a one-line string that is never closed ends with its line."""
    while place < len(text):
        if text[place] == "\\":
            place += 2
        elif text.startswith(quote, place):
            return place + len(quote)
        elif len(quote) == 1 and text[place] == "\n":
            return place
        else:
            place += 1
    return len(text)
