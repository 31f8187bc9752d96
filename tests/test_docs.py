"""The pages in `docs/` are true: every Python cell runs and gives what the page says (the conventions are those of `tests/pages.py`), and
every flag, file, heading and error message that they name exists."""

import ast
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from pages import ROOT, Cell, agrees, blocks, cells, missing_links, rows_of, run, unknown_flags

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
WITH_CELLS = [page for page in PAGES if cells(page)]


@pytest.mark.parametrize("page", WITH_CELLS, ids=lambda page: page.stem)
def test_every_cell_runs_in_order_and_gives_what_the_page_says(page: Path, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for cell in cells(page):
        run(cell, names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_flags_links_and_headings_exist(page: Path) -> None:
    assert not unknown_flags(page.read_text(encoding="utf-8"))
    assert not missing_links(page)


def messages_of(package: str) -> list[str]:
    """The strings of a package as a reader meets them, `…` for what is filled in."""
    found = []
    for file in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


@pytest.mark.parametrize(
    ("page", "packages"), [("data", ["data"]), ("training", ["lm", "train", "recipes"]), ("adapters", ["lm", "train", "recipes"])]
)
def test_the_errors_that_a_page_explains_are_those_of_the_code(page: str, packages: list[str]) -> None:
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    explained = [row[0].strip("`") for row in rows_of(DOCS / f"{page}.md", "Errors")]
    assert len(explained) == text.partition("## Errors")[2].count("\n| ") - 1 > 10  # every row of the table but its head
    messages = [message for package in packages for message in messages_of(package)]
    assert not [words for words in explained if not any(words in message for message in messages)]


@pytest.fixture(scope="module")
def pictures() -> dict[str, Callable[[Path], None]]:
    """Those of `docs/make_images.py`, which is a script and in no package."""
    spec = importlib.util.spec_from_file_location("make_images", DOCS / "make_images.py")
    assert spec is not None
    assert spec.loader is not None
    make_images = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_images)
    return make_images.PICTURES


def test_pictures_are_there_small_and_used(pictures) -> None:
    assert all((DOCS / "images" / f"{name}.png").stat().st_size < 150_000 for name in pictures)
    shown = {name for page in [*PAGES, ROOT / "README.md"] for name in re.findall(r"images/(\w+\.png)", page.read_text(encoding="utf-8"))}
    assert {path.name for path in (DOCS / "images").iterdir()} == shown


@pytest.mark.parametrize("name", ["masks", "mlp", "packing", "rope", "schedules", "supervision"])
def test_a_picture_can_be_drawn(name: str, pictures, tmp_path) -> None:
    """All but those for which something is trained on the standard library: tokenizers, models."""
    pictures[name](tmp_path / "it.png")
    assert (tmp_path / "it.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("value", "claim", "agree"),
    [
        ((64, 32), "(64, 32)", True),
        (0.12345, "0.123", True),
        (0.12345, "0.124", False),
        (2, "2.0", True),
        (True, "1", False),
        ("cpu", "cpu", True),
        ("cpu", "'cpu'", True),
        ([[1, 2.04]], "[[1, 2.0]]", True),
        ([[1, 2.06]], "[[1, 2.0]]", False),
        ({"a": 1}, "{'a': 1, 'b': 2}", False),
    ],
)
def test_a_claim_is_compared_by_what_it_shows(value, claim: str, agree: bool) -> None:
    assert agrees(value, claim) is agree


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("x = 1\nx + 1  # → 3\n", "line 8: it is 2, the page says 3"),
        ("x = 1\n1 / 0\n", "division by zero"),
        ("for i in range(2):\n    i  # → 1\n", "1 of its `# → value` do not stand behind"),
        ("print(2)\n", "it prints something else"),
    ],
)
def test_a_cell_that_is_not_true_is_named_with_its_page(code: str, words: str) -> None:
    with pytest.raises((AssertionError, ZeroDivisionError), match=words) as caught:
        run(Cell(Path("page.md"), 3, 7, code, "1\n"), {})
    assert caught.value.__notes__ == ["in cell 3 of page.md (line 7)"]


def test_flags_are_looked_for_where_they_are_used() -> None:
    page = "`--packing` and `--pakcing`\n```sh\nuv run python -m recipes.sample runs/x --packing pad --stop 'a'  # no --resume\n```\n"
    assert unknown_flags(page) == ["--pakcing", "--packing of sample"]
    assert unknown_flags("`--no-control`, `--no-steps`") == ["--no-steps"]  # a switch, and a number
    assert blocks(page, "sh")
