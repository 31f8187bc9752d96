"""Going on with a model on other text: what is learned, what is forgotten, and where the run goes on after it was cut off."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from hub_state import problems
from integration.recipe_runs import corpus, curve_of, left_at
from loguru import logger
from pages import metrics_told, metrics_written
from tiny import tiny

import lm
from data.sources import open_source
from data.tokenizer import Tokenizer
from recipes.command_line import parse
from recipes.continue_pretrain import Config, main
from recipes.publish import Config as Publish
from recipes.publish import main as publish
from train.publish import leaks


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Python as the old text, English as the new, a GPT-2 with dropout as the model, and its tokenizer."""
    folder = tmp_path_factory.mktemp("continue")
    corpus(folder / "old")
    (folder / "new").mkdir()
    rng = np.random.default_rng(0)
    words = ["the", "of", "and", "to", "in", "is", "that", "it", "was", "for", "on", "are", "with", "his", "they", "hot", "word", "what"]
    for i in range(24):
        (folder / "new" / f"{i}.txt").write_text(" ".join(rng.choice(words, 700)))
    source = open_source(str(folder / "old"))
    tokenizer = Tokenizer.train((document["text"] for document in source.train), 400)
    model = tiny("gpt2", vocab=400, dropout=0.1, embed_dropout=0.1, attention_dropout=0.1, init_std=0.05)
    lm.save_pretrained(model, folder / "model")
    tokenizer.save(folder / "model")
    return folder


def go_on(texts, run_dir, **changes):
    """The recipe in this process, with the words it said."""
    settings = {
        "steps": 6,
        "save_every": 3,
        "validate_every": 3,
        "sample_every": 5,
        "batch": 4,
        "replay": str(texts / "old"),
        "dropout": 0.1,
    }
    settings |= {"replay_share": 0.25, "average": {"name": "ema", "decay": 0.7}, "seq": 48, "validate_rows": 16, "backend": "reference"}
    settings |= {"step": {"ratios_every": 3}}
    settings |= {"schedule": {"peak": 0.01}, "packing": "best_fit"} | changes
    said = []
    config = Config(source=texts / "model", data=str(texts / "new"), run_dir=run_dir, **settings)
    sink = logger.add(lambda message: said.append(message.record["message"]))
    try:
        main(config)
    finally:
        logger.remove(sink)
    return "\n".join(said)


@pytest.fixture(scope="module")
def run(texts, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZMAJ_CACHE_DIR", str(texts / "cache"))
        said = go_on(texts, texts / "run")
        yield texts / "run", said


def lines(run_dir):
    kept = ("step", "loss", "val_loss", "old_val_loss", "grad_norm")
    read = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in kept if name in line} for line in read]


def test_the_new_text_is_learned_and_what_is_forgotten_is_measured(run):
    folder, said = run
    results = json.loads((folder / "results.json").read_text())
    before, after = results["before"], results["after"]
    assert after["new"]["bits_per_byte"] < before["new"]["bits_per_byte"] - 0.3
    assert results["forgotten"] == after["old"]["bits_per_byte"] - before["old"]["bits_per_byte"]
    shares = [part["token_share"] for part in results["mixture"].values()]
    assert shares == pytest.approx([0.75, 0.25], abs=0.06)  # 24 rows
    assert [name.split(":")[0] for name in results["mixture"]] == ["new text", "old text"]
    assert "dropout of the model: {'dropout': 0.1, 'embed_dropout': 0.1, 'attention_dropout': 0.1}" not in said  # only what differs is said
    assert "'attention_dropout': 0.1}; now {'attention_dropout': 0.0}" in said
    looks = [line for line in lines(folder) if "old_val_loss" in line]
    assert [line["step"] for line in looks] == [0, 3, 6]
    assert (folder / "forgetting.png").stat().st_size > 10_000


def test_the_page_on_training_tells_of_every_number_written(run):
    folder, _ = run
    elsewhere = {
        name
        for name, when in metrics_told().items()
        if any(words in when for words in ("pretrain_small", "fine-tuning", "after 128 finite steps", "experts"))
    }
    assert metrics_written(folder) == metrics_told().keys() - elsewhere


def test_the_export_is_the_average_and_measures_what_the_report_says(run, texts):
    """Bits per byte of the new text, a document at a time, from nothing but the export."""
    folder, _ = run
    model, tokenizer = lm.load_pretrained(folder / "export"), Tokenizer.load(folder / "export")
    results = json.loads((folder / "results.json").read_text())
    nats, text_bytes = 0.0, 0
    log_probs = jax.jit(lambda tokens: jax.nn.log_softmax(model(tokens)))
    for document in open_source(str(texts / "new")).held_out:
        tokens = np.array([tokenizer.bos_id, *tokenizer.encode(document["text"]), tokenizer.eos_id], np.int32)
        text_bytes += len(document["text"].encode())
        counted = 0
        for begin in range(0, len(tokens) - 1 - 24, 24):
            window = tokens[begin : begin + 49]
            table = np.asarray(log_probs(np.pad(window, (0, 49 - len(window)))[:-1]))
            for place in range(counted - begin, len(window) - 1):
                nats -= table[place, window[place + 1]]
            counted = begin + len(window) - 1
        assert counted == len(tokens) - 1
    expected = results["after"]["new"]["bits_per_byte"]
    assert nats / np.log(2) / text_bytes == pytest.approx(expected, rel=5e-3)  # the run may measure with bf16 operands
    card = (folder / "export" / "README.md").read_text()
    assert "made from model, whose making is not recorded here; trained with zmaj-lm (continue_pretrain)" in card
    assert f"| held-out old text, before | bits per byte | {results['before']['old']['bits_per_byte']:.4f} |" in card
    assert str(texts) not in card


def test_published_it_tells_its_stages_and_its_measure_and_no_place_of_this_machine(run, texts, tmp_path):
    folder, _ = run
    assert publish(Publish(source=str(folder), to=tmp_path / "out"))
    stages = json.loads((tmp_path / "out" / "lineage.json").read_text())
    assert stages == json.loads((folder / "export" / "lineage.json").read_text())
    assert [stage["stage"] for stage in stages] == ["given", "continue_pretrain"]
    assert (stages[0]["source"], stages[1]["began_with"]["source"]) == ("model", "model")
    assert stages[1]["settings"]["data"] == "new"
    assert leaks(tmp_path / "out", [], [texts, folder, tmp_path, Path.home(), Path.cwd()]) == []
    measured = json.loads((tmp_path / "out" / "evidence.json").read_text())["measured"]["held-out text"]
    assert measured["value"] == pytest.approx(json.loads((folder / "results.json").read_text())["after"]["new"]["bits_per_byte"], rel=0.02)
    assert measured["low"] < measured["value"] < measured["high"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert problems(card) == []
    assert "forgetting.png" in card
    assert "| old text: old |" in card  # of the mixture as it came out


def test_cut_off_it_goes_on_to_the_identical_result(run, texts, tmp_path):
    folder, _ = run
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    shutil.rmtree(again / "checkpoints" / "6")
    for name in ("results.json", "forgetting.png"):
        (again / name).unlink()
    shutil.rmtree(again / "export")
    curve = curve_of(folder, tmp_path / "curves")
    config = parse(Config, "", recipe="continue_pretrain", argv=["--resume", "--run-dir", str(again), "--curve", str(curve)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZMAJ_CACHE_DIR", str(texts / "cache"))
        main(config)
    assert left_at(again) == []
    assert lines(again) == lines(folder)
    one, other = (jax.tree.leaves(lm.load_pretrained(each / "export")) for each in (again, folder))
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)
    changed = parse(Config, "", recipe="continue_pretrain", argv=["--resume", "--run-dir", str(again)])
    other_model = tmp_path / "other"
    shutil.copytree(texts / "model", other_model)
    lm.save_pretrained(tiny("gpt2", seed=1, vocab=400, dropout=0.1, init_std=0.05), other_model)
    changed = changed.model_copy(update={"source": other_model, "curve": None})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZMAJ_CACHE_DIR", str(texts / "cache"))
        with pytest.raises(ValueError, match=r"this run was trained on .*'model': .*; now they are"):
            main(changed)


def test_impossible_wishes_are_refused_in_words(texts, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ZMAJ_CACHE_DIR", str(texts / "cache"))
    with pytest.raises(ValueError, match="--seq 65 is more than the context of this model, 64"):
        go_on(texts, tmp_path / "a", seq=65)
    with pytest.raises(ValueError, match=r"frozen: nothing here is called wte; the roles are .*embed\.weight"):
        go_on(texts, tmp_path / "b", optimizer={"frozen": ["wte"]})
    with pytest.raises(ValueError, match=r"is no run and no model: expected a folder with model\.safetensors"):
        main(Config(source=tmp_path, data=str(texts / "new"), run_dir=tmp_path / "c"))
    with pytest.raises(SystemExit):
        parse(Config, "", recipe="continue_pretrain", argv=[str(texts / "model")])
    assert "--data" in "".join(capsys.readouterr())
