import json
import math
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from loguru import logger

from train.logs import RunLog, mfu, model_flops_per_token, plot_curves, read_metrics, write_json

ROOT = Path(__file__).parents[2]


def a_run(folder: Path, first: int, last: int) -> None:
    with RunLog(folder, total_steps=9, start_step=first, quiet=True) as log:
        for step in range(first, last + 1):
            log.log(step, loss=jnp.float32(10 / (step + 1)), tokens_per_s=1000.0 + step)
            if step % 3 == 0:
                log.log(step, val_loss=float("nan") if step == 3 else 2.5)


def test_a_resumed_file_equals_that_of_the_uninterrupted_run(tmp_path: Path) -> None:
    """The run got to step 7, and half a line of step 8, after its checkpoint of step 5."""
    a_run(tmp_path / "whole", 0, 9)
    a_run(tmp_path / "parts", 0, 7)
    with (tmp_path / "parts/metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    a_run(tmp_path / "parts", 6, 9)
    assert (tmp_path / "parts/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    assert "dropped 4 lines" in (tmp_path / "parts/run.log").read_text()


def test_lines_are_json_and_come_back_as_logged(tmp_path: Path) -> None:
    with RunLog(tmp_path, total_steps=2, quiet=True) as log:
        log.log(1, loss=math.nan, high=math.inf, low=-math.inf, n=np.int64(3), flag=True, note="a \N{DRAGON}", gone=None)
        log.log(2, loss=jnp.ones(1))
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text.splitlines()[0], parse_constant=pytest.fail)["loss"] == "nan"
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(first.pop("loss"))
    assert first == {"step": 1, "high": math.inf, "low": -math.inf, "n": 3, "flag": True, "note": "a \N{DRAGON}", "gone": None}
    assert second == {"step": 2, "loss": 1.0}


def test_what_cannot_be_logged_is_refused(tmp_path: Path) -> None:
    with RunLog(tmp_path, total_steps=9, start_step=4, quiet=True) as log:
        with pytest.raises(TypeError, match=r"metric 'loss' is a ndarray of shape \(3,\): log single numbers"):
            log.log(5, loss=np.zeros(3))
        with pytest.raises(ValueError, match="step 3 was logged, but this run said it would start at step 4"):
            log.log(3, loss=1.0)
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_a_broken_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_metrics(path)


def test_words_go_to_the_console_and_the_file_and_the_handlers_are_put_back(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    heard: list[str] = []
    handler = logger.add(heard.append, format="{message}")
    with RunLog(tmp_path, total_steps=3) as log:
        log.message("a {brace} and [bold]markup[/bold]")
        logger.warning("from elsewhere")
        for step in (1, 2, 3):
            log.log(step, loss=4.0, tokens_per_s=12345.6)
    logger.info("afterwards")
    logger.remove(handler)
    out = capsys.readouterr().out
    assert "a {brace} and [bold]markup[/bold]\n" in out
    assert "WARNING from elsewhere\n" in out
    assert "step 1/3  loss 4.0000  12,346 tokens/s  0:00 gone\n" in out  # no terminal: a plain line at once, and one at the end
    assert "step 2/3" not in out
    assert "step 3/3  loss 4.0000" in out
    assert "afterwards" not in out
    assert heard[-1].strip() == "afterwards"
    written = (tmp_path / "run.log").read_text()
    assert "WARNING from elsewhere" in written
    assert "afterwards" not in written


def test_quiet_shows_warnings_only(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with RunLog(tmp_path, total_steps=1, quiet=True) as log:
        log.message("hush")
        logger.warning("but this")
        log.log(1, loss=1.0)
    out = capsys.readouterr().out
    assert "hush" not in out
    assert "but this" in out


def test_an_error_that_ends_the_run_is_in_its_log(tmp_path: Path) -> None:
    with pytest.raises(KeyError), RunLog(tmp_path, total_steps=1, quiet=True):
        raise KeyError("the run's own")
    assert 'stopped by KeyError: "the run\'s own"' in (tmp_path / "run.log").read_text()


def test_write_json_replaces_whole_files_only(tmp_path: Path) -> None:
    path = tmp_path / "new" / "config.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"a": math.nan})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["config.json"]


def test_model_flops_and_mfu() -> None:
    """By hand: 6 * 1000 for the weights, 12 * 3 * 8 * 7 for attention; at 10 tokens/s, of a peak twice as high, half."""
    flops = model_flops_per_token(n_params=1000, n_layers=3, d_model=8, seq=7)
    assert flops == 8016
    assert mfu(10.0, flops, 160_320.0) == pytest.approx(0.5)
    assert mfu(10.0, flops, None) is None


def test_a_plot_is_a_real_picture(tmp_path: Path) -> None:
    with RunLog(tmp_path, total_steps=60, quiet=True) as log:
        for step in range(1, 61):
            log.log(step, loss=math.nan if step == 9 else 2 + 8 / step, learning_rate=step / 6e4, grad_norm=1 + 1 / step)
            if step % 20 == 0:
                log.log(step, val_loss=2.1 + 8 / step)
    plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png", title="tiny", references={"uniform": 9.0})
    png = (tmp_path / "curves.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(png) > 20_000


def test_a_plot_of_nothing_is_refused_and_one_of_losses_alone_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": "nan"}\n')
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_curves(path, tmp_path / "a.png", title="none")
    path.write_text('{"step": 1, "loss": 3.0}\n')
    plot_curves(path, tmp_path / "a.png", title="one point")
    assert (tmp_path / "a.png").stat().st_size > 5_000


def test_importing_logs_takes_no_display_and_no_jax() -> None:
    code = "import sys, train.logs; print(sorted({'jax', 'matplotlib'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
