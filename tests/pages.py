"""What a page of Markdown holds: Python cells, commands, links, headings.

Two conventions say what a cell gives, and `run` holds the page to them:

- `expression  # → value`, or `name = expression  # → value`: the value as `repr` or `str` shows it. Arrays are written as nested lists, and
  a number is right to the digits it is written with. After `; ` come words, which nobody checks.
- a `text` block right below a cell is everything that the cell prints.
"""

import ast
import contextlib
import importlib
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
ARROW = re.compile(r"\s# → (.*?)(?:; .*)?$")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]+")
RECIPE = re.compile(r"-m recipes\.(\w+)")
# Of uv, ruff, tensorboard and pytest.
TOOLS_FLAGS = {"--extra", "--python", "--fix", "--upgrade-package", "--locked", "--frozen", "--logdir", "--durations"}


@dataclass(frozen=True)
class Cell:
    page: Path
    number: int  # among the Python cells of its page, from 1
    line: int  # of the page, where its code begins
    code: str
    printed: str | None  # what the page says it prints; `None` where it says nothing

    def __str__(self) -> str:
        return f"cell {self.number} of {self.page.name} (line {self.line})"


def blocks(text: str, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def cells(page: Path) -> list[Cell]:
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", text, re.DOTALL | re.MULTILINE)
    return [Cell(page, n, text.count("\n", 0, m.start(1)) + 1, m[1], m[2]) for n, m in enumerate(found, start=1)]


def run(cell: Cell, names: dict[str, Any]) -> None:
    """Execute a cell in `names`. What it raises has a note with its place, and tracebacks show the lines of the page."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            _execute(cell, names)
        if cell.printed is not None:
            came = printed.getvalue()
            assert _stripped(came) == _stripped(cell.printed), f"it prints something else than the page says:\n{came}"
    except Exception as error:
        error.add_note(f"in {cell}")
        raise


def _execute(cell: Cell, names: dict[str, Any]) -> None:
    place = str(cell.page)
    lines = cell.code.splitlines()
    tree = ast.parse("\n" * (cell.line - 1) + cell.code, place)
    checked = 0
    for statement in tree.body:
        claim = ARROW.search(lines[(statement.end_lineno or 0) - cell.line])
        if claim is not None and isinstance(statement, ast.Expr):
            value = eval(compile(ast.Expression(statement.value), place, "eval"), names)
        else:
            exec(compile(ast.Module([statement], []), place, "exec"), names)
            if claim is None or not isinstance(statement, ast.Assign):
                continue
            value = eval(ast.unparse(statement.targets[0]), names)
        assert agrees(value, claim[1]), f"line {statement.end_lineno}: it is {value!r}, the page says {claim[1]}"
        checked += 1
    claims = sum(ARROW.search(line) is not None for line in lines)
    assert checked == claims, f"{claims - checked} of its `# → value` do not stand behind an expression or an assignment"


def _stripped(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def agrees(value: Any, claim: str) -> bool:
    """Whether `value` is what a page writes as `claim`."""
    if claim in (repr(value), str(value)):
        return True
    try:
        said = ast.parse(claim, mode="eval").body
    except SyntaxError:
        return False
    return _same(value.tolist() if hasattr(value, "tolist") else value, said, claim)


def _same(value: Any, said: ast.expr, source: str) -> bool:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(said, ast.List | ast.Tuple):
        long_enough = isinstance(value, list | tuple) and len(value) == len(said.elts)
        return long_enough and all(_same(v, s, source) for v, s in zip(value, said.elts, strict=True))
    if isinstance(said, ast.Dict):
        keys = [ast.literal_eval(key) for key in said.keys if key is not None]
        same_keys = isinstance(value, dict) and list(value) == keys
        return same_keys and all(_same(value[key], s, source) for key, s in zip(keys, said.values, strict=True))
    try:
        number = ast.literal_eval(said)
    except ValueError:
        return False
    if isinstance(number, float) and isinstance(value, int | float) and not isinstance(value, bool):
        decimals = (ast.get_source_segment(source, said) or "").partition(".")[2]
        if not decimals.isdigit():  # 1e-5
            return bool(np.isclose(value, number, rtol=0.05))
        return abs(value - number) <= 0.51 * 10.0 ** -len(decimals)
    return type(number) is type(value) and number == value


def flags_of(recipe: str) -> set[str]:
    """The flags of a recipe, those of its nested configs by their first part; switches also with `no-`."""
    module = importlib.import_module(f"recipes.{recipe}")
    parsed = {"--config"} if hasattr(module, "parse") else set()  # `recipes.command_line.parse` knows it beside the fields
    parsed = parsed.union(*map(flags_of, getattr(module, "RECIPES", ())))  # `recipes.plan` takes those of the recipe that it is of
    fields = module.Config.model_fields
    renamed = {name: [mark.name for mark in field.metadata if getattr(mark, "name", None)] for name, field in fields.items()}
    names = {name: (other or [name])[0].replace("_", "-") for name, other in renamed.items()}
    switches = {f"--no-{names[name]}" for name, field in fields.items() if field.annotation is bool}
    return {f"--{name}" for name in names.values()} | switches | {"--help"} | parsed


def unknown_flags(text: str) -> list[str]:
    """Flags that no recipe has; on the command line of one recipe, flags that it has not."""
    recipes = sorted(path.stem for path in (ROOT / "recipes").glob("*.py") if "class Config(" in path.read_text(encoding="utf-8"))
    known = set().union(TOOLS_FLAGS, *map(flags_of, recipes))
    unknown = [flag for flag in FLAG.findall(text) if flag not in known]
    for line in "".join(blocks(text, "sh")).splitlines():
        if named := RECIPE.search(line):
            command = line[named.end() :].partition(" # ")[0]
            unknown += [f"{flag} of {named[1]}" for flag in FLAG.findall(command) if flag not in flags_of(named[1])]
    return unknown


def rows_of(page: Path, heading: str) -> list[list[str]]:
    """The cells of the tables of one section, without their heads and rules."""
    section = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert section is not None, f"{page.name} has no heading {heading!r}"
    lines = re.findall(r"^\| (.+) \|$", section[1], re.MULTILINE)
    return [re.split(r" ?\| ?", line) for line in lines if line.startswith("`")]


def metrics_told() -> dict[str, str]:
    """The fields of a `metrics.jsonl` that the page on training tells of, and when it says they are there."""
    return {name.strip("`"): when for name, *_, when in rows_of(ROOT / "docs" / "training.md", "metrics.jsonl")}


def metrics_written(run: Path) -> set[str]:
    """The fields in the `metrics.jsonl` of a run, `ROLE` for each role."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {re.sub("^update_ratio/.*", "update_ratio/ROLE", name) for line in lines for name in json.loads(line)}


def prose(page: Path) -> str:
    """The page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def missing_links(page: Path) -> list[str]:
    """Files, and headings of pages, that `page` links to and that are not there."""
    missing = []
    for target in re.findall(r"\]\(([^):]+)\)", re.sub(r"`[^`\n]*`", "", prose(page))):
        name, _, heading = target.partition("#")
        file = page.parent / name if name else page
        if not file.exists() or (heading and heading not in headings(file)):
            missing.append(target)
    return missing


def headings(page: Path) -> set[str]:
    """The anchors that its headings get: small letters, dashes for spaces, no punctuation."""
    found = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}
