"""What is committed: nothing of the machine it was made on, one version, and the agreed folders."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {".ci", "data", "docs", "lm", "recipes", "tests", "train"}

# In pieces, so that this file does not find itself.
NEEDLES = tuple(
    "".join(pieces)
    for pieces in (
        ("/wo", "rk/"),
        ("/ro", "ot/"),
        ("/ho", "me/"),
        ("/Us", "ers/"),
        ("py", "pi.org"),
        ("python", "hosted"),
        ("download.", "pytorch"),
        ("ana", "conda.org"),
        ("gh", "cr.io"),
        ("index", "-url"),
    )
)


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    """The paths git knows, the lock excepted: its committed text has tests of its own (test_portable_lock.py)."""
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, encoding="utf-8")
    except FileNotFoundError:
        pytest.skip("needs git")
    paths = [path for path in listed.stdout.split("\0") if path and path != "uv.lock" and (ROOT / path).is_file()]
    if not paths:
        pytest.skip("not a git checkout, or nothing is tracked")
    return paths


def places(text: str) -> list[str]:
    """`line: needle` for every machine path and registry host in a text."""
    return [f"{n}: {x}" for n, line in enumerate(text.splitlines(), 1) for x in NEEDLES if x in line]


def test_no_file_names_a_machine_or_a_registry(tracked: list[str]) -> None:
    found = []
    for path in tracked:
        content = (ROOT / path).read_bytes()
        if b"\0" not in content[:8192]:
            found += [f"{path}:{place}" for place in places(content.decode(errors="replace"))]
    assert not found, "\n" + "\n".join(found)


def test_a_machine_path_is_found_with_its_line() -> None:
    assert places("import lm\nruns = '" + NEEDLES[0] + "runs'\n") == [f"2: {NEEDLES[0]}"]
    assert places("a framework/work tree at https://example.org/networks/") == []


def test_the_top_level_folders_are_the_agreed_ones(tracked: list[str]) -> None:
    assert {path.split("/")[0] for path in tracked if "/" in path} == FOLDERS


def test_tests_is_a_folder_and_not_a_package(tracked: list[str]) -> None:
    # With --import-mode=importlib an __init__ here would name the tests after the packages they test.
    assert [path for path in tracked if re.fullmatch(r"tests/(.*/)?__init__\.py", path)] == []


def test_the_citation_has_the_version_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.findall(r'^version: "?([^"\n]+)"?$', citation, re.MULTILINE) == [project["version"]]
    assert re.findall(r'^license: "?([^"\n]+)"?$', citation, re.MULTILINE) == [project["license"]]
