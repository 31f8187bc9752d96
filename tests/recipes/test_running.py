"""How a run is begun."""

import pytest

import train.trackers
from recipes.running import RunConfig, check_start


def test_a_tracker_that_is_not_installed_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(train.trackers.importlib.util, "find_spec", lambda name: None)
    check_start(RunConfig(), tmp_path)
    with pytest.raises(ValueError, match=r"tracking with wandb needs wandb, which is not installed: run `uv sync --extra trackers`"):
        check_start(RunConfig(trackers=("wandb",)), tmp_path)


def test_a_new_run_needs_a_folder_of_its_own(tmp_path):
    (tmp_path / "thesis.txt").write_text("dear reader")
    with pytest.raises(ValueError, match=r"is no run, and not empty \(it has thesis.txt"):
        check_start(RunConfig(), tmp_path)
    check_start(RunConfig(resume=True), tmp_path)
