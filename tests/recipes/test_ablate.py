"""A series of short runs: what is there is not run again, and the table says what the lines say."""

import json
import math

import numpy as np
import pytest

from recipes import ablate, ablate_table
from recipes.ablate import Config, experiments, main, nested
from recipes.trial import append_line, read_lines
from train.intervals import student_t

WORDS = ["the", "of", "and", "to", "in", "is", "that", "it", "was", "for", "on", "are", "with", "his", "they", "hot", "word", "what"]
TINY = {"vocab": "290", "d_model": "16", "n_layers": "1", "n_heads": "2", "n_kv_heads": "2", "d_ff": "24", "seq": "32", "batch": "2"}


def line(name, seed, bits, *, tokens=1000, step_s=0.5, steps=10):
    facts = {"settings": "x", "parameters": 7, "device": "a card", "dtype": "bfloat16", "jax": "0"}
    return {"name": name, "seed": seed, "bits_per_byte": bits, "tokens": tokens, "fast_step_s": step_s, "steps": steps, **facts}


LINES = [
    *(line("baseline", seed, bits) for seed, bits in enumerate((2.0, 2.2, 2.1))),
    *(line("more_tokens", seed, bits, tokens=1500, steps=15) for seed, bits in enumerate((1.9, 2.1, 2.0))),
    *(line("good", seed, bits) for seed, bits in enumerate((1.91, 2.10, 1.99))),
    *(line("bad", seed, bits) for seed, bits in enumerate((2.1, 2.2, 2.0))),
]
TIMES = {"good": 2.0, "bad": 1.0}


def test_differences_are_paired_by_seed_and_minutes_are_priced_in_tokens():
    """good: -0.09, -0.10, -0.11, so -0.10 ± t · 0.01/√3. It takes twice the seconds, so ln 2 fewer e-folds of tokens, each worth
    0.1 / ln 1.5 to the baseline: -0.10 + 0.1 ln 2 / ln 1.5 = 0.0710. bad: 0.1, 0, -0.1, so 0 and not decided."""
    found = ablate_table.summed_up(LINES, TIMES)
    assert list(found) == ["good", "baseline", "bad"] or list(found) == ["good", "bad", "baseline"]
    good = found["good"]
    reach = student_t(2) * 0.01 / math.sqrt(3)
    assert tuple(good["difference"][:3]) == pytest.approx((-0.1, -0.1 - reach, -0.1 + reach))
    assert good["time"] == 2.0
    assert good["at_same_minutes"] == pytest.approx(-0.1 + 0.1 * math.log(2) / math.log(1.5))
    assert ablate_table.verdict(good["difference"]) == "better"
    assert ablate_table.verdict(found["bad"]["difference"]) == "not decided"
    assert found["bad"]["at_same_minutes"] == pytest.approx(0.0, abs=1e-12)


def test_the_words_name_the_winners_and_stand_between_the_marks(tmp_path):
    found = ablate_table.summed_up(LINES, TIMES)
    said = ablate_table.words(found, LINES, [], "stdlib")
    assert said.startswith("Measured on a card, bfloat16, jax 0: stdlib, ")
    assert "1,000 tokens a run (10 steps), 7 parameters, 0.500 s a step, 3 seeds; the baseline comes to 2.1000" in said
    assert "| `good` | -0.1000 | -0.1248 to -0.0752 | better | x 2.00 | +0.0710 |" in said
    assert "whole interval below 0: `good`. Expected to be better at the same minutes: none." in said
    page = tmp_path / "page.md"
    page.write_text(f"before\n{ablate_table.MARKS[0]}\nold\n{ablate_table.MARKS[1]}\nafter\n")
    picture = ablate_table.draw(found, tmp_path / "it.png")
    ablate_table.put(said, page, picture)
    ablate_table.put(said, page, picture)  # in the same place again
    text = page.read_text()
    assert text.count(said) == 1
    assert "old" not in text
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert picture.read_bytes().startswith(b"\x89PNG")
    page.write_text("nothing")
    with pytest.raises(ValueError, match="has no place for the table"):
        ablate_table.put(said, page, None)


def test_without_runs_of_more_tokens_no_minutes_are_told():
    found = ablate_table.summed_up([each for each in LINES if each["name"] != "more_tokens"], TIMES)
    assert math.isnan(found["good"]["at_same_minutes"])
    assert "not known" in ablate_table.words(found, LINES, [], "stdlib")


def test_every_switch_makes_an_experiment_that_can_be_and_differs_from_the_baseline():
    runs = experiments(Config(tokens=98_304))
    assert runs.keys() == ablate.SWITCHES.keys()
    dumped = {name: run.model_dump_json() for name, run in runs.items()}
    assert len(set(dumped.values())) == len(dumped)
    assert {run.steps * run.batch * run.seq for name, run in runs.items() if name != "more_tokens"} == {98_304}
    assert runs["more_tokens"].steps == 72  # half as many again of 48
    both = experiments(Config(only=("relu2+batch_half",), tokens=100_000))["relu2+batch_half"]
    assert (both.mlp, both.d_ff, both.batch, both.steps) == ("relu2", 528, 4, 97)


def test_an_unknown_switch_and_an_unknown_value_are_refused_in_words():
    with pytest.raises(ValueError, match=r"no switch is called relu3; there are baseline, more_tokens, no_qk_norm"):
        Config(only=("relu2+relu3",))
    with pytest.raises(ValueError, match="--d-modle: Extra inputs"):
        experiments(Config(base={"d_modle": "3"}))
    assert nested({"schedule.peak": "3e-3", "mlp": "relu2"}) == {"schedule": {"peak": "3e-3"}, "mlp": "relu2"}


def test_half_a_line_is_left_out_and_cut_off_before_the_next(tmp_path):
    path = tmp_path / "lines.jsonl"
    append_line(path, {"a": 1})
    with path.open("a") as file:
        file.write('{"a": 2')
    assert read_lines(path) == [{"a": 1}]
    append_line(path, {"a": 3})
    assert read_lines(path) == [{"a": 1}, {"a": 3}]
    path.write_text('{"a": 1\n{"a": 2}\n')
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        read_lines(path)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    for i in range(24):
        (folder / f"{i}.txt").write_text(" ".join(rng.choice(WORDS, 300)))
    return folder


def test_what_was_run_is_not_run_again_and_other_settings_are(texts, tmp_path, monkeypatch):
    monkeypatch.setenv("ZMAJ_CACHE_DIR", str(tmp_path / "cache"))
    how = {"data": str(texts), "file": tmp_path / "it.jsonl", "page": None, "picture": tmp_path / "it.png", "seeds": (0,)}
    found = main(Config(base=TINY, only=("relu2",), tokens=512, **how))
    lines = read_lines(tmp_path / "it.jsonl")
    runs, times = [each for each in lines if "kind" not in each], [each for each in lines if "kind" in each]
    assert [(each["name"], each["steps"]) for each in runs] == [("baseline", 8), ("more_tokens", 12), ("relu2", 8)]
    assert [(each["name"], len(each["ratios"])) for each in times] == [("relu2", 6)]
    assert found["relu2"]["time"] == np.median(times[0]["ratios"])
    assert found["baseline"]["bits_per_byte"] == lines[0]["bits_per_byte"] < 5
    assert (tmp_path / "it.png").exists()

    def refuse(*_):
        raise AssertionError("it was run again")

    monkeypatch.setattr(ablate, "run_trial", refuse)
    monkeypatch.setattr(ablate, "times_beside", refuse)
    assert main(Config(base=TINY, only=("relu2",), tokens=512, **how)) == found
    with pytest.raises(AssertionError, match="run again"):
        main(Config(base=TINY, only=("relu2",), tokens=1024, **how))
    with pytest.raises(ValueError, match="has no run of the baseline with these settings"):
        main(Config(base=TINY, only=("relu2",), tokens=1024, table_only=True, **how))
    assert json.loads((tmp_path / "it.jsonl").read_text().splitlines()[0])["seed"] == 0
