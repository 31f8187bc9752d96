"""What a user sees of input that cannot be used, and of a mixture, which goes through every stage."""

import json

import pytest
from integration.recipe_runs import SMALL, run, run_here


def write_jsonl(path, word, documents):
    path.write_text(
        "".join(json.dumps({"text": f"{word} {i}: " + "the cat sat on the mat, " * (3 + i % 7)}) + "\n" for i in range(documents))
    )
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One for all runs here: they compile the same programs."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("packing", ["concat", "pad"])
def test_a_mixture_is_trained_on_and_measured_part_by_part(tmp_path, cache, packing):
    large, small = write_jsonl(tmp_path / "large.jsonl", "many", 200), write_jsonl(tmp_path / "small.jsonl", "few", 40)
    small.write_text(small.read_text() + "\n\n")
    arguments = [*SMALL, "--data", f"{large}:0.7,{small}:0.3", "--packing", packing, "--steps", 12, "--report-samples", 0]
    status, output = run([*arguments, "--run-dir", tmp_path / "run"], cache)
    assert status == 0, output
    assert "2 blank lines" in output
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert set(results["bits_per_byte_by_source"]) == {str(large), str(small)}
    assert sum(part["rows"] for part in results["mixture"].values()) == 12 * 4
    # A row more or less than its share, of some 14.
    assert results["mixture"][str(small)]["token_share"] == pytest.approx(0.3, abs=1 / 14)


def test_a_bad_line_ends_the_command_in_words(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "fine"}\n' + "[" * 100_000 + "\n")
    status, output = run_here([*SMALL, "--data", tmp_path / "rows.jsonl", "--run-dir", tmp_path / "run"])
    assert status == 2
    assert "error: line 2 of '" in output
    assert "Traceback" not in output
    assert not (tmp_path / "run" / "config.json").exists()
