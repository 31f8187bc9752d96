"""How a run is begun."""

import pytest

import train.trackers
from recipes.running import RunConfig, check_start, choose_flight


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


@pytest.mark.parametrize(
    ("platform", "n_layers", "remat", "layers"),
    [("cpu", 12, "none", "loop"), ("cpu", 13, "none", "scan"), ("cpu", 4, "full", "scan"), ("gpu", 4, "full", "loop")],
)
def test_blocks_are_scanned_where_they_are_many_or_a_loop_would_undo_remat(platform, n_layers, remat, layers):
    facts = {"platform": platform, "device_kind": "some device", "cpu_flags": ["avx512_bf16"]}
    _, flight = choose_flight(RunConfig(remat=remat), facts, n_layers=n_layers, head_dim=64, seq=128)
    assert flight.layers == layers
    assert choose_flight(RunConfig(remat=remat, layers="loop"), facts, n_layers=n_layers, head_dim=64, seq=128)[1].layers == "loop"
