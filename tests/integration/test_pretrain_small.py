"""The main job, run as a user runs it."""

import fcntl
import json
import random
import re
import shutil
import signal
import time
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from integration.recipe_runs import SMALL, corpus, finish, run, run_here, start
from pages import metrics_told, metrics_written
from safetensors.numpy import load_file

import lm
from data.sources import open_source
from data.tokenizer import Tokenizer

STEPS = 30


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Corpus and caches for all runs here, and the uninterrupted run the others are held against."""
    folder = tmp_path_factory.mktemp("pretrain")
    arguments = [*SMALL, "--data", corpus(folder / "corpus"), "--steps", STEPS, "--save-every", 4, "--validate-every", 8]
    status, output = run([*arguments, "--run-dir", folder / "whole"], folder / "cache")
    assert status == 0, output
    return folder, arguments, output


def losses(run_folder):
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line.get("loss"), line.get("val_loss")) for line in lines]


def test_the_run_folder_holds_all_that_was_promised(shared):
    folder, _, output = shared
    whole = folder / "whole"
    for name in ("config.json", "manifest.json", "metrics.jsonl", "results.json", "samples.txt", "loss.png", "run.log", "checkpoints"):
        assert (whole / name).exists(), name
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "README.md"):
        assert (whole / "export" / name).exists(), name
    assert [step for step, loss, _ in losses(whole) if loss is not None] == list(range(1, STEPS + 1))
    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["steps"] == STEPS
    assert manifest["sessions"][0]["ran_with"]["kernels"]
    assert manifest["corpus"]["train_documents"] + manifest["corpus"]["held_out_documents"] == manifest["corpus"]["documents"]
    for words in ("bits per byte", "tokens/s", "MFU", "xz -9"):
        assert words in output
    assert str(folder) not in (whole / "export" / "README.md").read_text()


def test_the_page_on_training_tells_of_every_number_written(shared):
    folder, _, _ = shared
    elsewhere = {
        name
        for name, when in metrics_told().items()
        if any(words in when for words in ("continue_pretrain", "each step, fine-tuning", "after 128 finite steps", "experts"))
    }
    assert metrics_written(folder / "whole") == metrics_told().keys() - elsewhere
    fine_tuning = {"token_accuracy", "entropy", "tokens_read", "supervised_share", "padding_share", "truncated", "dropped"}
    assert elsewhere == {"sigmas", "old_val_loss", "router_balance", "router_z", *fine_tuning}
    at_each_step = {name for name, when in metrics_told().items() if when.startswith(("always", "each step"))} - fine_tuning
    lines = [json.loads(line) for line in (folder / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert len(at_each_step) > 10
    assert all(at_each_step <= line.keys() for line in lines if "loss" in line)


def test_the_loss_falls_and_bits_per_byte_follow_from_the_exported_model(shared):
    """The figure of the report, computed again from nothing but the export and the held-out files, a document at a time."""
    folder, _, _ = shared
    whole = folder / "whole"
    course = [loss for _, loss, _ in losses(whole) if loss is not None]
    assert course[-1] < course[0] - 0.7
    results = json.loads((whole / "results.json").read_text())
    model, tokenizer = lm.load_pretrained(whole / "export"), Tokenizer.load(whole / "export")

    log_probs = eqx.filter_jit(lambda model, tokens: jax.nn.log_softmax(model(tokens)))
    seq, stride, nats, text_bytes = 64, 32, 0.0, 0
    for document in open_source(str(folder / "corpus")).held_out:
        tokens = np.array([tokenizer.bos_id, *tokenizer.encode(document["text"]), tokenizer.eos_id], np.int32)
        text_bytes += len(document["text"].encode())
        counted = 0
        for begin in range(0, max(1, len(tokens) - 1 - (seq - stride)), stride):
            window = tokens[begin : begin + seq + 1]
            padded = np.pad(window, (0, seq + 1 - len(window)))
            table = np.asarray(log_probs(model, jnp.asarray(padded[:-1])))
            for place in range(counted - begin, len(window) - 1):
                nats -= table[place, window[place + 1]]
            counted = begin + len(window) - 1
        assert counted == len(tokens) - 1
    assert text_bytes == results["held_out_bytes"]
    # The run measured with bf16 operands, this with fp32.
    assert nats / np.log(2) / text_bytes == pytest.approx(results["bits_per_byte"], rel=2e-3)


def until(process, condition, seconds=300):
    """Look again and again until the condition holds or the process has ended."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def kill_and_resume(arguments, run_folder, cache, moments, rng):
    """Start, kill at a moment, and again; then let it end. Returns the number of kills and the steps it went on from."""
    kills, outputs = 0, []
    for moment in moments:
        resume = ["--resume"] if (run_folder / "config.json").exists() else []
        process = start([*arguments, "--run-dir", run_folder, *resume], cache)
        until(process, moment)
        time.sleep(rng.random() * 0.1)
        if process.poll() is None:
            process.kill()
            kills += 1
        status, output = finish(process)
        assert status in (0, -signal.SIGKILL), output
        outputs.append(output)
    status, output = run([*arguments, "--run-dir", run_folder, "--resume"], cache)
    assert status == 0, output
    return kills, [int(step) for each in outputs for step in re.findall(r"going on after step (\d+)", each)]


def logged(run_folder):
    metrics = run_folder / "metrics.jsonl"
    return metrics.read_text().count('"loss"') if metrics.exists() else 0


def logged_at_least(run_folder, lines):
    return logged(run_folder) >= lines


def assert_same_run(one, other):
    assert losses(one) == losses(other)
    tensors, expected = (load_file(each / "export" / "model.safetensors") for each in (one, other))
    assert tensors.keys() == expected.keys()
    for name in tensors:
        np.testing.assert_array_equal(tensors[name], expected[name])


def test_stopped_asked_again_and_killed_it_resumes_to_the_identical_result(shared):
    """Ctrl-C first, then SIGTERM, which save and say the same, then SIGKILL in the middle of a checkpoint."""
    folder, arguments, _ = shared
    run_folder = folder / "stopped"
    arguments = [*arguments, "--run-dir", run_folder, "--save-every"]
    for number, after, more in ((signal.SIGINT, 5, [1000]), (signal.SIGTERM, 12, [1000, "--resume"])):
        process = start([*arguments, *more], folder / "cache")
        until(process, lambda after=after: logged(run_folder) >= after)
        process.send_signal(number)
        status, output = finish(process)
        assert status == 128 + number, output
        assert f"--resume --run-dir {run_folder}" in output
        assert "Traceback" not in output
    begun = logged(run_folder)
    process = start([*arguments, 2, "--resume"], folder / "cache")
    until(process, lambda: logged(run_folder) > begun and any((run_folder / "checkpoints").glob("*.orbax-checkpoint-tmp*")))
    process.kill()
    status, output = finish(process)
    assert status == -signal.SIGKILL, output
    status, output = run([*arguments, 4, "--resume"], folder / "cache")
    assert status == 0, output
    assert STEPS > int(re.findall(r"going on after step (\d+)", output)[0]) >= begun
    assert_same_run(run_folder, folder / "whole")


@pytest.mark.heavy
def test_killed_at_any_moment_it_resumes_to_the_identical_result(shared):
    """Seven kills: while the tokenizer is written, before the first step, in the loop, in the middle of a checkpoint, in the report."""
    folder, arguments, _ = shared
    run_folder = folder / "killed"
    moments = [
        (run_folder / "tokenizer").exists,
        (run_folder / "config.json").exists,
        lambda: logged(run_folder) >= 2,
        lambda: any((run_folder / "checkpoints").glob("*.orbax-checkpoint-tmp*")),
        lambda: logged(run_folder) >= 14,
        lambda: logged(run_folder) >= STEPS - 3,
        (run_folder / "loss.png").exists,
    ]
    kills, resumed_from = kill_and_resume(arguments, run_folder, folder / "cache", moments, random.Random(0))
    assert kills >= 5
    assert any(0 < step < STEPS for step in resumed_from), resumed_from
    assert_same_run(run_folder, folder / "whole")


@pytest.mark.heavy
def test_the_1m_preset_on_the_default_corpus_killed_at_random_moments(tmp_path):
    """The preset as it is, 60 steps, killed six times at random."""
    arguments = ["--preset", "1m", "--steps", 60, "--save-every", 7, "--report-samples", 4]
    status, output = run([*arguments, "--run-dir", tmp_path / "whole"], tmp_path / "cache")
    assert status == 0, output
    rng = random.Random()
    run_folder = tmp_path / "killed"
    moments = [partial(logged_at_least, run_folder, rng.randrange(1, 60)) for _ in range(6)]
    kills, _ = kill_and_resume(arguments, run_folder, tmp_path / "cache", moments, rng)
    assert kills >= 5
    assert_same_run(run_folder, tmp_path / "whole")


def test_settings_changed_on_resume_are_kept_by_the_next_resume(shared):
    """Prolonged to far more steps, and stopped: it knows where to end from then on."""
    folder, _, _ = shared
    run_folder = folder / "prolonged"
    shutil.copytree(folder / "whole", run_folder)
    process = start(["--resume", "--run-dir", run_folder, "--steps", 5000], folder / "cache")
    until(process, lambda: logged(run_folder) >= STEPS + 4)
    process.terminate()
    status, output = finish(process)
    assert status == 128 + signal.SIGTERM, output
    assert f"5000 steps instead of {STEPS}" in output
    assert json.loads((run_folder / "config.json").read_text())["steps"] == 5000
    status, output = run_here(["--resume", "--run-dir", run_folder, "--steps", 3])
    assert status == 2
    assert f"the run has done {logged(run_folder)} steps already" in output
    manifest = json.loads((run_folder / "manifest.json").read_text())
    assert (manifest["steps"], len(manifest["sessions"])) == (5000, 2)  # the refused one left nothing


def test_two_processes_do_not_share_a_run_folder(shared):
    folder, _, _ = shared
    with (folder / "whole" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        status, output = run_here(["--resume", "--run-dir", folder / "whole"])
    assert status == 2
    assert "another process is at work" in output


def test_sample_continues_from_run_export_and_checkpoint(shared, tmp_path):
    folder, _, _ = shared
    (tmp_path / "unfinished").mkdir()
    for part in ("checkpoints", "tokenizer"):
        (tmp_path / "unfinished" / part).symlink_to(folder / "whole" / part)
    arguments = ["--prompt", "import ", "--max-new-tokens", 12, "--temperature", 0]
    texts = []
    for source in (folder / "whole", folder / "whole" / "export", tmp_path / "unfinished"):
        status, output = run_here([source, *arguments], "sample")
        assert status == 0, output
        texts.append(output[output.index("import ") :].rsplit("\n[", 1)[0])
    assert f"checkpoint of step {STEPS}" in output
    assert len(set(texts)) == 1


def test_a_damaged_checkpoint_is_noticed_and_the_one_before_it_used(shared, tmp_path):
    folder, arguments, _ = shared
    run_folder = tmp_path / "damaged"
    shutil.copytree(folder / "whole", run_folder)
    shutil.rmtree(run_folder / "export")
    data = max((run_folder / "checkpoints" / str(STEPS) / "model").rglob("*"), key=lambda f: f.stat().st_size if f.is_file() else 0)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    status, output = run([*arguments, "--run-dir", run_folder, "--resume"], folder / "cache")
    assert status == 0, output
    assert f"step {STEPS}" in output
    assert "damaged" in output.lower()
    assert (run_folder / "export" / "model.safetensors").read_bytes() == (folder / "whole" / "export" / "model.safetensors").read_bytes()


def test_a_mistake_leaves_with_status_2_and_words_but_no_traceback(shared, tmp_path):
    folder, good, _ = shared
    status, output = run([*good, "--run-dir", tmp_path / "run", "--data", tmp_path / "missing.txt"], folder / "cache")
    assert status == 2, output
    assert "missing.txt" in output
    assert "Traceback" not in output
