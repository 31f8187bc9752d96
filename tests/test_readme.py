"""What the README promises can be typed."""

import re

from integration.recipe_runs import run
from pages import ROOT, blocks, missing_links, unknown_flags

README = (ROOT / "README.md").read_text()
SHELL = blocks(README, "sh")


def test_the_ipython_session_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (session,) = blocks(README, "python")
    names: dict = {}
    exec(session, names)
    assert names["logits"].shape == (10, 300)
    assert (tmp_path / "runs" / "mine" / "model.safetensors").is_file()
    assert len([line for line in session.splitlines() if line.strip()]) <= 12


def test_command_1_trains_on_the_default_corpus(tmp_path):
    """As written, but on this interpreter and for twenty steps of the smallest preset."""
    command = SHELL[0].strip().split("uv run python -m recipes.")[1]
    assert command == "pretrain_small"
    status, output = run(["--steps", 20, "--preset", "1m", "--run-dir", tmp_path / "run", "--report-samples", 4], tmp_path / "cache")
    assert status == 0, output
    assert "bits per byte" in output
    assert (tmp_path / "run" / "export" / "model.safetensors").is_file()


def test_command_2_is_the_one_ci_runs():
    assert SHELL[1].strip() == ".tools/bin/uv run pytest"
    assert re.search(r"\.ci/uv run \"\$@\" pytest", (ROOT / ".ci" / "run").read_text())


def test_every_flag_named_in_the_readme_exists():
    assert "--preset" in README
    assert not unknown_flags(README)


def test_files_the_readme_links_to_exist():
    assert "](docs/" in README
    assert not missing_links(ROOT / "README.md")
