"""What the README promises can be typed."""

import re

from integration.recipe_runs import SMALL, run
from pages import ROOT, blocks, missing_links, unknown_flags

from data.sources import open_source
from recipes.corpus import fewer_held_out
from train.logs import write_json

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
    """As written, but on this interpreter, for three steps of a smaller model, and with the figures of xz at hand."""
    command = SHELL[0].strip().split("uv run python -m recipes.")[1]
    assert command == "pretrain_small"
    corpus = fewer_held_out(open_source("stdlib"), 8)
    write_json(tmp_path / "cache" / "xz" / f"{corpus.record['sha256']}.json", {"xz": 2.0, "xz_primed": 1.5})
    shorter = ["--steps", 3, "--held-out-documents", 8, "--tokenizer-documents", 40]
    status, output = run([*SMALL, *shorter, "--run-dir", tmp_path / "run"], tmp_path / "cache")
    assert status == 0, output
    assert "corpus stdlib" in output
    assert "bits per byte" in output
    assert "compressing" not in output
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
