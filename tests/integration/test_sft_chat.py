"""Fine-tuning from end to end: answers are learned, the run goes on where it was cut off, and what it leaves opens elsewhere."""

import gc
import json
import random
import shutil
import signal
import time
import weakref

import jax
import numpy as np
import pytest
from integration.recipe_runs import curve_of, finish, left_at, start
from integration.recipe_runs import run as run_recipe
from loguru import logger
from pages import metrics_told, metrics_written
from tiny import tiny

import lm
from data.chat import ChatFormat
from data.tokenizer import Tokenizer
from recipes.command_line import parse
from recipes.evidence import held_out_text
from recipes.loading import load
from recipes.sft_chat import Config, main
from recipes.show_chat import Config as ShowConfig
from recipes.show_chat import main as show
from train.adapters import adapted

WORDS = ("red", "blue", "green", "white", "black", "brown", "pink", "grey")
ASK_TIME = {"type": "function", "function": {"name": "time", "arguments": {"place": "Oslo"}}}
TIME_TOOL = {"type": "function", "function": {"name": "time", "parameters": {}}}


def conversations():
    """Talk of one answer, of two, and with a call."""
    for i in range(90):
        word = WORDS[i % len(WORDS)]
        turns = [{"role": "user", "content": f"say {word} {i}"}, {"role": "assistant", "content": word}]
        if i % 5 == 0:
            turns += [{"role": "user", "content": "again"}, {"role": "assistant", "content": f"{word} {word}"}]
        if i % 9 == 0:
            called = {"role": "assistant", "content": "", "tool_calls": [ASK_TIME]}
            yield {"messages": [{"role": "user", "content": f"time {i}"}, called], "tools": [TIME_TOOL]}
        yield {"messages": turns}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, conversations, old text; caches of their own."""
    folder = tmp_path_factory.mktemp("sft")
    (folder / "old").mkdir()
    rng = np.random.default_rng(0)
    for i in range(24):
        (folder / "old" / f"{i}.txt").write_text(" ".join(rng.choice(WORDS, 60)))
    rows = [json.dumps(row) for row in conversations()]
    (folder / "talk.jsonl").write_text("\n".join(rows) + "\n")
    texts = [*rows, "user assistant system tool"]
    tokenizer = Tokenizer.train(texts, 330)
    model = tiny("qwen3", n_layers=1, vocab=tokenizer.vocab_size, context=160, init_std=0.05)
    lm.save_pretrained(model, folder / "model")
    tokenizer.save(folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZMAJ_CACHE_DIR", str(folder / "cache"))
        patch.setattr("recipes.sft_chat.instructions.source", lambda: None)
        patch.setattr("recipes.sft_chat.instruction_questions", lambda form, source, each: [])
        yield folder


SETTINGS = {"steps": 8, "save_every": 4, "validate_every": 4, "sample_every": 4, "batch": 4, "seq": 150, "validate_rows": 8}
SETTINGS |= {"backend": "reference", "prompts": ("say red 1",), "answer_tokens": 6, "questions": 4, "step": {"ratios_every": 0}}
SETTINGS |= {"optimizer": {"name": "adamw"}, "schedule": {"peak": 0.03}}


def tune(made, run_dir, **changes):
    """The recipe in this process, with the words it said."""
    said = []
    settings = {"source": made / "model", "data": str(made / "talk.jsonl"), "text": str(made / "old"), **SETTINGS, **changes}
    sink = logger.add(lambda message: said.append(message.record["message"]))
    try:
        main(Config(run_dir=run_dir, **settings))
    finally:
        logger.remove(sink)
    return "\n".join(said)


@pytest.fixture(scope="module")
def run(made):
    return made / "run", tune(made, made / "run")


def lines(folder):
    kept = ("step", "loss", "val_loss", "grad_norm", "token_accuracy", "entropy", "supervised_share", "padding_share", "epoch")
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in kept if name in line} for line in read]


def test_answers_are_learned_and_everything_is_measured_before_and_after(run):
    folder, said = run
    results = json.loads((folder / "results.json").read_text())
    assert results["loss"]["after"] < results["loss"]["before"] - 1.0
    assert results["forgotten"] == results["after"]["old"]["bits_per_byte"] - results["before"]["old"]["bits_per_byte"]
    assert set(results["tasks"]["after"]) == {"tool name", "tool call"}
    assert all(0 <= each["low"] <= each["value"] <= each["high"] <= 1 for each in results["tasks"]["after"].values())
    assert set(results["answers"]["before"]) == {"say red 1"}
    counts = results["conversations"]["train"]
    assert counts["rows"] + results["conversations"]["held_out"]["rows"] == len(list(conversations()))
    assert f"{counts['trained_tokens'] / counts['tokens']:.1%} of them trained on" in said
    for line in lines(folder):
        if "loss" in line:
            assert 0 < line["supervised_share"] < 1
            assert 0 <= line["token_accuracy"] <= 1
            assert line["entropy"] > 0
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["continued_from"]["source"] == "model"
    assert manifest["chat"]["stop_ids"] == [Tokenizer.load(folder / "export").eos_id]
    for name in ("loss.png", "tasks.png"):
        assert (folder / name).stat().st_size > 10_000


def test_whoever_publishes_it_measures_no_conversations_as_if_they_were_text(run):
    said = []
    sink = logger.add(lambda message: said.append((message.record["level"].name, message.record["message"])))
    try:
        assert held_out_text(str(run[0])) is None
    finally:
        logger.remove(sink)
    assert [(level, "learned from conversations" in words) for level, words in said] == [("INFO", True)]


def test_the_page_on_training_tells_of_every_number_written(run):
    folder, _ = run
    elsewhere = ("pretrain_small`", "continue_pretrain", "after 128 finite steps", "experts", "ratios-every")
    told = {name for name, when in metrics_told().items() if "fine-tuning" in when or not any(words in when for words in elsewhere)}
    assert metrics_written(folder) == told


def test_the_export_opens_with_its_template_and_stops_at_the_end_of_a_turn(run):
    folder, _ = run
    tokenizer = Tokenizer.load(folder / "export")
    form = ChatFormat(tokenizer)
    end = tokenizer.id_of("<|im_end|>")
    assert (form.stop_ids, tokenizer.eos_id) == ((end,), end)
    generation = json.loads((folder / "export" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == end
    model, _, origin = load(folder)
    assert origin.endswith("export")
    reply = lm.generate(model, [form.prompt([{"role": "user", "content": "say red 1"}])], max_new_tokens=6, stop_ids=form.stop_ids)[0]
    results = json.loads((folder / "results.json").read_text())
    assert tokenizer.decode(reply) == results["answers"]["after"]["say red 1"]


def test_cut_off_it_goes_on_to_the_identical_result(run, tmp_path):
    folder, _ = run
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    shutil.rmtree(again / "checkpoints" / "8")
    shutil.rmtree(again / "export")
    (again / "results.json").unlink()
    curve = curve_of(folder, tmp_path / "curves")
    curve.write_text(json.dumps(json.loads(curve.read_text()) | {"losses": [9.0] * 8}))  # what a broken change would look like
    main(parse(Config, "", recipe="sft_chat", argv=["--resume", "--run-dir", str(again), "--curve", str(curve)]))
    assert len(left_at(again)) == 1
    assert lines(again) == lines(folder)
    for a, b in zip(*(jax.tree.leaves(lm.load_pretrained(each / "export")) for each in (again, folder)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.heavy
@pytest.mark.parametrize("base_kept", ["as_is", "nf4"])
def test_an_adapter_is_trained_in_place_of_the_weights_and_goes_on_too(base_kept, made, tmp_path):
    folder = tmp_path / "lora"
    lora = {"kind": "lora", "rank": 3, "targets": ["attn.*"], "base": base_kept}
    said = tune(made, folder, adapter=lora, questions=0, text="none", sample_every=8)
    assert "what the model forgets is not measured" in said
    results = json.loads((folder / "results.json").read_text())
    assert results["loss"]["after"] < results["loss"]["before"]
    base = lm.load_pretrained(made / "model")
    kept = base if base_kept == "as_is" else lm.quantised(base, base_kept)
    by_hand = lm.dequantised(lm.merge(lm.load_adapter(kept, folder / "adapter", base=lm.Base.of(base, "model"))))
    exported = lm.load_pretrained(folder / "export")
    for a, b in zip(*map(jax.tree.leaves, (by_hand, exported)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    np.testing.assert_array_equal(exported.embed.weight, lm.dequantised(kept).embed.weight)
    shutil.rmtree(folder / "checkpoints" / "8")
    (folder / "results.json").unlink()
    main(parse(Config, "", recipe="sft_chat", argv=["--resume", "--run-dir", str(folder)]))
    for a, b in zip(*map(jax.tree.leaves, (lm.load_pretrained(folder / "export"), exported)), strict=True):
        np.testing.assert_array_equal(a, b)
    other = tiny("qwen3", seed=1, n_layers=1, vocab=base.config.vocab, context=160)
    with pytest.raises(ValueError, match="base"):
        lm.load_adapter(other, folder / "adapter")


def test_while_a_packed_base_is_trained_on_nothing_holds_what_it_was_packed_from(made, tmp_path, monkeypatch):
    matrices, alive = [], []

    def packed(model, config, *, key):
        matrices.extend(weakref.ref(leaf) for leaf in jax.tree.leaves(model) if leaf.ndim == 2)
        return adapted(model, config, key=key)

    def no_steps(*_, **__):
        gc.collect()
        alive.extend(matrix().shape for matrix in matrices if matrix() is not None)
        raise InterruptedError

    monkeypatch.setattr("recipes.sft_chat.adapted", packed)
    monkeypatch.setattr("recipes.sft_chat.steps", no_steps)
    with pytest.raises(InterruptedError):
        tune(made, tmp_path / "run", adapter={"kind": "lora", "base": "nf4"}, questions=0, text="none", prompts=())
    assert (len(matrices), alive) == (8, [])


def test_impossible_wishes_are_refused_in_words(made, tmp_path):
    with pytest.raises(ValueError, match="--seq 161 is more than the context of this model, 160"):
        tune(made, tmp_path / "a", seq=161)
    with pytest.raises(ValueError, match="--template own: this tokenizer has no chat template"):
        tune(made, tmp_path / "b", template="own")
    with pytest.raises(ValueError, match=r"targets: no linear map of the blocks is called attn\.wq; there are attn\.k_proj"):
        tune(made, tmp_path / "d", adapter={"kind": "lora", "targets": ["attn.wq"]}, text="none")
    lm.save_native(lm.quantised(lm.load_pretrained(made / "model")), tmp_path / "packed")
    Tokenizer.load(made / "model").save(tmp_path / "packed")
    with pytest.raises(ValueError, match=r"this model is packed \(int8\): train the one it was made from"):
        tune(made, tmp_path / "e", source=tmp_path / "packed", text="none")
    (tmp_path / "bad.jsonl").write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n' * 30)
    with pytest.raises(ValueError, match=r"bad.jsonl:\d+: no assistant turn among the roles \['user'\]"):
        tune(made, tmp_path / "c", data=str(tmp_path / "bad.jsonl"))


def test_conversations_are_shown_with_what_is_trained_on(made, tmp_path, capsys):
    page, picture = tmp_path / "page.html", tmp_path / "picture.png"
    show(ShowConfig(model=made / "model", data=str(made / "talk.jsonl"), count=2, html=page, png=picture))
    shown = capsys.readouterr().out
    assert "trained on (" in shown
    assert "⟦" in shown  # without colours, brackets
    assert "background-color" in page.read_text()
    assert picture.stat().st_size > 5_000
    with pytest.raises(ValueError, match=r"--row 500: the train part of .* has the rows 0 to \d+"):
        show(ShowConfig(model=made / "model", data=str(made / "talk.jsonl"), row=500))


@pytest.mark.heavy
def test_killed_at_any_moment_it_resumes_to_the_identical_result(made, run, tmp_path):
    """Kills while conversations are encoded, before the first step, in the loop, and in the report; as a user runs it."""
    flags = ["--data", made / "talk.jsonl", "--text", made / "old", "--questions", 0, "--prompts", "say red 1", "--answer-tokens", 6]
    flags += ["--steps", 30, "--save-every", 4, "--validate-every", 10, "--sample-every", 10, "--batch", 4, "--seq", 96, "--dropout", 0.1]
    status, output = run_recipe([made / "model", *flags, "--run-dir", tmp_path / "whole"], tmp_path / "cache", "sft_chat")
    assert status == 0, output
    killed, rng = tmp_path / "killed", random.Random(0)

    def logged():
        metrics = killed / "metrics.jsonl"
        return metrics.read_text().count('"loss"') if metrics.exists() else 0

    moments = [(killed / "config.json").exists, (killed / "before.json").exists, lambda: logged() >= 3, lambda: logged() >= 18]
    for moment in moments:
        resume = ["--resume"] if (killed / "config.json").exists() else [made / "model", *flags]
        process = start([*resume, "--run-dir", killed], tmp_path / "cache", "sft_chat")
        deadline = time.monotonic() + 300
        while process.poll() is None and not moment():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(rng.random() * 0.1)
        process.kill()
        status, output = finish(process)
        assert status in (0, -signal.SIGKILL), output
    status, output = run_recipe(["--resume", "--run-dir", killed], tmp_path / "cache", "sft_chat")
    assert status == 0, output
    assert lines(killed) == lines(tmp_path / "whole")
    for a, b in zip(*(jax.tree.leaves(lm.load_pretrained(each / "export")) for each in (killed, tmp_path / "whole")), strict=True):
        np.testing.assert_array_equal(a, b)
