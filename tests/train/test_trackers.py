"""What trackers are told, read back with their own code, and how a resumed run goes on."""

import json
import math
import os
import struct
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from train.trackers import Trackers, _Memory, open_trackers

ROOT = Path(__file__).parent.parent.parent
NAMED = {"project": "zmaj", "run_name": "tuesday", "config": {"d_model": 24, "schedule": {"kind": "wsd"}}}


def run_python(source, **environment):
    """In a process of its own: these packages read the environment once, when they are imported. Returns (stdout, stderr)."""
    done = subprocess.run(
        [sys.executable, "-c", source],
        env=os.environ | {"PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"} | {name: str(value) for name, value in environment.items()},
        capture_output=True,
        stdin=subprocess.DEVNULL,
        encoding="utf-8",
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


SESSIONS = ((1, 6), (3, 8))  # two processes of one run: the first gets to step 5, the second goes on from a checkpoint of step 2
SESSION = """
import math, sys
from pathlib import Path
from loguru import logger
from train.trackers import open_trackers
logger.remove()
start, stop = {start}, {stop}
with open_trackers([{name!r}], Path({folder!r}), start_step=start, **{named!r}) as trackers:
    for step in range(start, stop):
        loss = math.nan if step == 2 else math.inf if step == 4 else start + step / 16
        trackers.log(step, {{"step": step, "loss": loss, "mfu": None}})
        trackers.log(step, {{"val_loss": 0.5}})
"""


def two_sessions(name, folder, **environment):
    words = ""
    for start, stop in SESSIONS:
        words += "".join(run_python(SESSION.format(name=name, folder=str(folder), start=start, stop=stop, named=NAMED), **environment))
    return words


def assert_same(values, expected):
    assert len(values) == len(expected)
    for value, other in zip(values, expected, strict=True):
        assert value == other or (math.isnan(value) and math.isnan(other))


def picture(path):
    import matplotlib.image
    import numpy as np

    matplotlib.image.imsave(path, np.zeros((5, 7, 3)))
    return path


# ------------------------------------------------------------------------------------------- at the door


def test_no_tracker_is_no_work(tmp_path):
    with open_trackers([], tmp_path / "run", **NAMED) as trackers:
        trackers.log(1, {"loss": 1.0})
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("names", [["tensorboard", "mlflow"], ["wandb", "wandb"]])
def test_an_unknown_or_doubled_name_is_refused_with_those_there_are(tmp_path, names):
    with pytest.raises(ValueError, match="trackers must be some of tensorboard, wandb, trackio, each once; got " + ", ".join(names)):
        open_trackers(names, tmp_path, **NAMED)


def test_all_missing_packages_are_named_with_the_command_that_installs_them():
    source = """
import sys
from pathlib import Path
sys.modules.update(tensorboardX=None, wandb=None, trackio=None)  # `import` of these says there is no such module
from train.trackers import TRACKERS, open_trackers
try:
    open_trackers(TRACKERS, Path("never"), project="p", run_name="r", config={})
except ValueError as error:
    print(error)
"""
    out, _ = run_python(source)
    assert out.strip() == (
        "tracking with tensorboard, wandb, trackio needs tensorboardX, wandb, trackio, which is not installed: "
        "run `uv sync --extra trackers`"
    )


class Recorder:
    def __init__(self, fails=False):
        self.closed, self.fails = [], fails

    def close(self, failed):
        self.closed.append(failed)
        if self.fails:
            raise OSError("disk full")


def test_a_tracker_that_cannot_close_does_not_keep_the_others_open():
    first, second = Recorder(), Recorder(fails=True)
    trackers = Trackers([first, second])
    with pytest.raises(OSError, match="disk full"):
        trackers.close()
    trackers.close()
    assert first.closed == second.closed == [False]


@pytest.mark.parametrize(("error", "failed"), [(ValueError, True), (SystemExit, False)])
def test_a_run_that_is_asked_to_stop_has_not_failed(error, failed):
    recorder = Recorder()
    with pytest.raises(error), Trackers([recorder]):
        raise error
    assert recorder.closed == [failed]


# ------------------------------------------------------------------------------------------- each of them


def events(folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator(str(folder))
    return accumulator.Reload()


def test_tensorboard_reads_each_step_of_a_resumed_run_once(tmp_path):
    pytest.importorskip("tensorboardX")
    for start, stop in SESSIONS:
        with open_trackers(["tensorboard"], tmp_path, start_step=start, **NAMED) as trackers:
            for step in range(start, stop):
                trackers.log(
                    step, {"step": step, "loss": math.nan if step == 2 else math.inf if step == 4 else start + step / 16, "mfu": None}
                )
    found = events(tmp_path / "tensorboard")
    assert found.Tags()["scalars"] == ["loss"]
    assert [event.step for event in found.Scalars("loss")] == list(range(1, 8))
    assert_same(
        [event.value for event in found.Scalars("loss")], [1 + 1 / 16, math.nan, 3 + 3 / 16, math.inf, 3 + 5 / 16, 3 + 6 / 16, 3 + 7 / 16]
    )
    assert b"wsd" in found.Tensors("config/text_summary")[0].tensor_proto.string_val[0]


def test_tensorboard_shows_pictures(tmp_path):
    pytest.importorskip("tensorboardX")
    with open_trackers(["tensorboard"], tmp_path, **NAMED) as trackers:
        trackers.image(3, "mask", picture(tmp_path / "mask.png"))
    (image,) = events(tmp_path / "tensorboard").Images("mask")
    assert (image.step, image.width, image.height) == (3, 7, 5)


def wandb_records(path):
    """A `.wandb` file: 7 bytes of its own, then LevelDB's log format: blocks of 32 KiB, in them pieces with a 7-byte header (checksum,
    length, kind: 1 whole, 2 first, 3 middle, 4 last)."""
    record_type = pytest.importorskip("wandb.proto.wandb_internal_pb2").Record
    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768  # no room for a header: filled with zeros
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield record_type.FromString(record)
            record = b""


def test_wandb_goes_on_in_one_run_offline_and_prints_nothing(tmp_path):
    pytest.importorskip("wandb")
    assert two_sessions("wandb", tmp_path) == ""
    kept = json.loads((tmp_path / "trackers.json").read_text())["wandb"]
    files = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    assert [path.name for path in files] == [f"run-{kept['id']}.wandb"] * 2
    history = []
    for path in files:
        for record in wandb_records(path):
            if record.WhichOneof("record_type") == "run":
                assert (record.run.run_id, record.run.project, record.run.display_name) == (kept["id"], "zmaj", "tuesday")
            if record.WhichOneof("record_type") == "history":
                values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                history.append((values["_step"], values["loss"], values["val_loss"]))
    assert [step for step, _, _ in history] == list(range(1, 8))
    assert_same([loss for _, loss, _ in history], [1 + 1 / 16, math.nan, 1 + 3 / 16, math.inf, 1 + 5 / 16, 3 + 6 / 16, 3 + 7 / 16])
    assert {val_loss for _, _, val_loss in history} == {0.5}


TRACKIO_READ = """
import json
from trackio.sqlite_storage import SQLiteStorage
import trackio
print(json.dumps([[run.id, run.name] for run in trackio.Api().runs("zmaj")]))
print(json.dumps(SQLiteStorage.get_logs("zmaj", "tuesday")))
"""


def test_trackio_goes_on_in_one_run_and_prints_nothing(tmp_path):
    pytest.importorskip("trackio")
    database = {"TRACKIO_DIR": tmp_path / "trackio"}
    assert two_sessions("trackio", tmp_path, **database) == ""
    kept = json.loads((tmp_path / "trackers.json").read_text())["trackio"]
    runs, logs = map(json.loads, run_python(TRACKIO_READ, **database)[0].splitlines()[-2:])
    assert runs == [[kept["id"], "tuesday"]]
    losses = [(line["step"], line["loss"]) for line in logs if "loss" in line]
    assert [step for step, _ in losses] == list(range(1, 8))
    assert_same([loss for _, loss in losses], [1 + 1 / 16, math.nan, 1 + 3 / 16, math.inf, 1 + 5 / 16, 3 + 6 / 16, 3 + 7 / 16])
    assert [line["step"] for line in logs if "val_loss" in line] == list(range(1, 8))


PICTURES = """
from pathlib import Path
from train.trackers import open_trackers
with open_trackers(["wandb", "trackio"], Path({folder!r}), **{named!r}) as trackers:
    trackers.image(1, "mask", Path({picture!r}))
"""


def test_wandb_and_trackio_keep_pictures(tmp_path):
    pytest.importorskip("wandb")
    pytest.importorskip("trackio")
    source = PICTURES.format(folder=str(tmp_path / "run"), picture=str(picture(tmp_path / "mask.png")), named=NAMED)
    run_python(source, TRACKIO_DIR=tmp_path / "trackio")
    assert len(list((tmp_path / "run/wandb").glob("offline-run-*/files/media/images/mask_*.png"))) == 1
    assert len(list((tmp_path / "trackio").rglob("*.png"))) == 1


OPEN_AND_CLOSE = """
from pathlib import Path
from train.trackers import open_trackers
try:
    open_trackers(["wandb"], Path({folder!r}), start_step=3, **{named!r}).close()
except ValueError as error:
    print(error)
"""


def test_steps_that_are_not_told_again_are_counted_in_words(tmp_path):
    pytest.importorskip("wandb")
    (tmp_path / "trackers.json").write_text('{"wandb": {"id": "abc", "project": "zmaj", "run_name": "tuesday", "last_step": 5}}')
    _, err = run_python(OPEN_AND_CLOSE.format(folder=str(tmp_path), named=NAMED))
    assert "wandb: steps 3 to 5 were logged before the run stopped and are not logged again\n" in err


def test_a_new_run_may_tell_of_step_0(tmp_path):
    memory = _Memory(tmp_path, "wandb", 0, {})
    assert memory.is_new(0)
    memory.told(0)
    resumed = _Memory(tmp_path, "wandb", 0, {})
    assert (resumed.is_new(0), resumed.is_new(1)) == (False, True)


def test_wandb_without_an_account_says_how_to_do_without(tmp_path):
    pytest.importorskip("wandb")
    without = {"WANDB_MODE": "online", "WANDB_API_KEY": "", "NETRC": tmp_path / "none", "WANDB_CONFIG_DIR": tmp_path, "HOME": tmp_path}
    out, _ = run_python(OPEN_AND_CLOSE.format(folder=str(tmp_path), named=NAMED), **without)
    assert out.startswith("wandb: ")
    assert "`wandb login`" in out
    assert out.endswith("Or keep the run on this machine, without an account: WANDB_MODE=offline\n")


def test_wandb_switched_off_says_that_nothing_is_kept(tmp_path):
    pytest.importorskip("wandb")
    _, err = run_python(OPEN_AND_CLOSE.format(folder=str(tmp_path), named=NAMED), WANDB_MODE="disabled")
    assert "wandb: nothing is kept, since WANDB_MODE=disabled" in err


def test_the_extra_brings_every_package():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"tensorboard", "tensorboardX", "trackio", "wandb"} == {requirement.split(">=")[0] for requirement in extras["trackers"]}
