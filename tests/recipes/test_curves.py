"""Reference curves: made of runs, found by settings, and left with words."""

import json

import numpy as np
import pytest
from loguru import logger

from recipes import curves, golden
from recipes.curves import Curve, Watch, curve_for, means, read_curve, settings_of
from recipes.pretrain_small import Config

IDENTITY = {"corpus": "c", "tokenizer": "t"}


def curve(**changes):
    settings = settings_of(Config(steps=40))
    made = {"recipe": "pretrain_small", "settings": settings, "identity": IDENTITY, "seeds": (0,), "every": 2}
    return Curve(**made | {"losses": (5.0, 4.0, 3.0), "tolerances": (0.1, 0.2, 0.3), "first": (5.1, 4.9), "made_with": {}} | changes)


@pytest.fixture
def said():
    words = []
    sink = logger.add(lambda message: words.append(str(message).strip()), format="{level} {message}", level="INFO")
    yield words
    logger.remove(sink)


def test_means_are_of_whole_groups():
    assert list(means({1: 4.0, 2: 6.0, 3: 1.0, 4: 2.0, 5: 9.0}, 2)) == [(2, 5.0), (4, 1.5)]
    assert list(means({2: 6.0, 3: 1.0, 4: 2.0}, 2)) == [(4, 1.5)]


def test_a_run_that_leaves_the_band_is_told_once_and_that_it_is_back(said):
    watch = Watch(curve())
    for step, loss in enumerate([5.0, 5.1, 4.5, 4.1, 3.9, 3.2, 9.0], start=1):  # means 5.05, 4.3 (0.3 off, 0.2 allowed), 3.55 (0.55)
        watch.see(step, loss)
    assert watch.record() == {"left_reference_curve_at": [4]}
    assert [words for words in said if words.startswith("WARNING")] == [
        "WARNING step 4: the run has left its reference curve: the mean loss of 2 steps is 4.3000, expected 4.0000 ± 0.2000. Is it the "
        "change you meant, or is something broken?"
    ]
    back = Watch(curve(losses=(5.0, 4.0, 3.0), tolerances=(0.1, 0.2, 0.3)))
    for step, loss in enumerate([np.nan, 5.0, 4.0, 4.0], start=1):
        back.see(step, loss)
    assert back.left == [2]
    assert any("step 4: back on its reference curve" in words for words in said)


def test_a_resumed_run_passes_over_the_group_it_saw_in_part():
    watch = Watch(curve())
    for step, loss in ((2, 99.0), (3, 4.0), (4, 4.0)):
        watch.see(step, loss)
    assert watch.left == []
    assert Watch(None).record() == {}


@pytest.mark.parametrize(
    ("recipe", "changes", "identity", "words"),
    [
        ("speedrun", {}, {}, "it is of pretrain_small"),
        ("pretrain_small", {"steps": 41}, {}, "another steps"),
        ("pretrain_small", {"optimizer": {"name": "adamw"}}, {}, "another optimizer"),
        ("pretrain_small", {}, {"corpus": "d"}, "another corpus"),
        ("pretrain_small", {"seed": 1}, {}, "seed 0"),
        ("pretrain_small", {"data": "elsewhere/", "dtype": "float32", "report_samples": 3}, {}, None),
    ],
)
def test_a_curve_is_that_of_its_settings(recipe, changes, identity, words):
    assert curve().why_not(recipe, Config(**{"steps": 40} | changes), IDENTITY | identity) == words


def test_three_seeds_serve_any_and_settings_that_came_later_count_as_by_default():
    settings = settings_of(Config(steps=40))
    older = {name: value for name, value in settings.items() if name != "dropout"}
    found = curve(seeds=(0, 1, 2), settings=older)
    assert found.why_not("pretrain_small", Config(steps=40, seed=9), IDENTITY) is None
    assert found.why_not("pretrain_small", Config(steps=40, dropout=0.1), IDENTITY) == "another dropout"
    gone = curve(settings=settings | {"gone": 1})
    assert gone.why_not("pretrain_small", Config(steps=40), IDENTITY) == "settings that are no more: gone"


def test_it_is_found_among_those_of_the_project_or_named(tmp_path, monkeypatch, said):
    monkeypatch.setattr(curves, "CURVES", tmp_path)
    assert curve_for("pretrain_small", Config(steps=40), IDENTITY) is None
    (tmp_path / "pretrain_small-40.json").write_text(curve().model_dump_json())
    assert curve_for("pretrain_small", Config(steps=40), IDENTITY) == curve()
    assert curve_for("pretrain_small", Config(steps=50), IDENTITY) is None
    assert "no reference curve for this run: pretrain_small-40.json: another steps" in said[-1]
    with pytest.raises(ValueError, match="is not the curve of this run: another steps"):
        curve_for("pretrain_small", Config(steps=50, curve=tmp_path / "pretrain_small-40.json"), IDENTITY)
    (tmp_path / "bad.json").write_text('{"recipe": 3}')
    with pytest.raises(ValueError, match=r"bad\.json is no reference curve"):
        read_curve(tmp_path / "bad.json")


def run_folder(folder, seed, losses, **changes):
    folder.mkdir(parents=True)
    config = Config(**{"steps": len(losses), "seed": seed} | changes)
    (folder / "config.json").write_text(json.dumps(config.model_dump(mode="json", exclude={"resume", "run_dir"})))
    session = {"command": ["python", "-m", "recipes.pretrain_small"], "commit": "abc", "device": {"device_kind": "cpu"}, "ran_with": {}}
    manifest = {"sessions": [session], "identity": {**IDENTITY, "model": "m"}, "seed": seed}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": i, "loss": x}) + "\n" for i, x in enumerate(losses, start=1)))
    return folder


def test_a_curve_is_made_of_runs(tmp_path):
    """Means of two steps: 5, 3 and 5.4, 3; so 5.2, 3.0 in the mean. Spreads 0.2√2 and 0, smoothed over both √((0.08 + 0) / 2) = 0.2, four
    of them 0.8."""
    runs = run_folder(tmp_path / "a", 0, [6.0, 4.0, 3.0, 3.0, 1.0]), run_folder(tmp_path / "b", 7, [5.4, 5.4, 2.0, 4.0, 1.0])
    path = golden.main(golden.Config(runs=runs, to=tmp_path / "out", every=2, first=3, without=("model",), picture=tmp_path / "it.png"))
    assert path.name == "pretrain_small-5.json"
    found = read_curve(path)
    np.testing.assert_allclose(found.losses, [5.2, 3.0])
    np.testing.assert_allclose(found.tolerances, [0.8, 0.8])
    assert (found.first, found.seeds, found.every) == ((6.0, 4.0, 3.0), (0, 7), 2)
    assert found.why_not("pretrain_small", Config(steps=5, seed=7), IDENTITY) is None
    assert (tmp_path / "it.png").read_bytes().startswith(b"\x89PNG")
    alone = read_curve(golden.main(golden.Config(runs=runs[:1], to=tmp_path / "alone", every=2, least=0.07)))
    assert alone.tolerances == (0.07, 0.07)
    assert alone.why_not("pretrain_small", Config(steps=5), IDENTITY) == "another model"
    short = run_folder(tmp_path / "c", 3, [6.0, 4.0], steps=5)  # was stopped: the curve is of the beginning
    assert read_curve(golden.main(golden.Config(runs=(short, runs[0]), to=tmp_path / "short", every=2))).losses == (5.0,)


def test_another_number_than_the_loss_can_be_followed(tmp_path):
    run = run_folder(tmp_path / "a", 0, [6.0, 4.0])
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": i, "reward": x, "loss": 9.0}) + "\n" for i, x in enumerate((0, 0.5, 0.7)))
    )
    found = read_curve(golden.main(golden.Config(runs=(run,), to=tmp_path, every=2, metric="reward")))
    assert (found.metric, found.losses) == ("reward", (0.6,))  # what stands before the first step is none of it
    watch = Watch(found)
    for step, reward in ((1, 0.1), (2, 0.2)):
        watch.line(step, {"loss": 0.6, "reward": reward})
        watch.line(step, {"pass@1": 0.6})
    assert watch.record() == {"left_reference_curve_at": [2]}


def test_runs_that_are_not_alike_make_none(tmp_path):
    one = run_folder(tmp_path / "a", 0, [6.0, 4.0])
    with pytest.raises(ValueError, match="the runs differ in their settings: a is not like b"):
        golden.main(golden.Config(runs=(one, run_folder(tmp_path / "b", 1, [6.0, 4.0], batch=4)), to=tmp_path, every=1))
    with pytest.raises(ValueError, match=r"has no 'reward' in its metrics.jsonl: expected one of loss, step"):
        golden.main(golden.Config(runs=(one,), to=tmp_path, every=1, metric="reward"))
    older = run_folder(tmp_path / "old", 0, [6.0, 4.0])
    manifest = json.loads((older / "manifest.json").read_text())
    del manifest["identity"]
    (older / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="old does not say what it was made from"):
        golden.main(golden.Config(runs=(older,), to=tmp_path, every=1))
    with pytest.raises(ValueError, match=r"--without base: the runs have corpus, tokenizer, model"):
        golden.main(golden.Config(runs=(one,), to=tmp_path, every=1, without=("base",)))
    with pytest.raises(FileNotFoundError, match=r"manifest.json does not exist"):
        golden.main(golden.Config(runs=(tmp_path / "nowhere",), to=tmp_path))
