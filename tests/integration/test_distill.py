"""Distillation from end to end: at each step, from what was kept, on the student's own words; the control; going on from the middle; what
does not fit together."""

import json
import shutil

import jax.random as jr
import numpy as np
import pytest
from integration.recipe_runs import curve_of, left_at
from loguru import logger
from safetensors.numpy import load_file
from tiny import tiny

import lm
from data.chat import CHATML
from data.tokenizer import Tokenizer
from recipes import distilling
from recipes.command_line import parse
from recipes.distill import Config, main
from recipes.distilling import student_of
from recipes.finetuning import known_text
from recipes.loading import load
from train.lineage import read

WORDS = ["red", "green", "blue", "lamp", "door", "tree", "stone", "river", "cloud", "bird"]
SEQ = 40
SETTINGS = {"steps": 6, "save_every": 3, "validate_every": 3, "sample_every": 100, "batch": 4, "seq": SEQ, "validate_rows": 8}
SETTINGS |= {
    "backend": "reference",
    "dtype": "float32",
    "step": {"ratios_every": 0},
    "optimizer": {"name": "adamw"},
    "schedule": {"peak": 0.02},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A teacher that holds a strong opinion, a student that holds another, texts and conversations; tokens are bytes."""
    folder = tmp_path_factory.mktemp("distill")
    tokenizer = Tokenizer.train([], 265).changed(chat_template=CHATML)
    for name, seed in (("teacher", 0), ("student", 1)):
        lm.save_pretrained(
            tiny("qwen3", seed=seed, n_layers=1, vocab=265, context=160, init_std=0.1 + 0.3 * (name == "teacher")), folder / name
        )
        tokenizer.save(folder / name)
    (folder / "texts").mkdir()
    rng = np.random.default_rng(0)
    for i in range(40):
        (folder / "texts" / f"{i}.txt").write_text(" ".join(rng.choice(WORDS, 30)))
    talk = [{"messages": [{"role": "user", "content": w}, {"role": "assistant", "content": w[::-1]}]} for w in rng.choice(WORDS, 60)]
    (folder / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talk))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZMAJ_CACHE_DIR", str(folder / "cache"))
        yield folder


def distil(made, run_dir, **changes):
    """The recipe in this process, with the words it said, and its results."""
    said = []
    settings = {"student": str(made / "student"), "data": str(made / "texts"), **SETTINGS, **changes}
    sink = logger.add(lambda message: said.append(message.record["message"]))
    try:
        main(Config(teacher=made / "teacher", run_dir=run_dir, **settings))
    finally:
        logger.remove(sink)
    return json.loads((run_dir / "results.json").read_text()), "\n".join(said)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_student_comes_nearer_to_its_teacher_and_all_is_told(made):
    folder = made / "online"
    results, said = distil(made, folder, loss={"kind": "jsd", "temperature": 2.0, "next_token": 0.1}, sample_every=5)
    before, after = results["before"], results["after"]
    assert after["kl"] < 0.8 * before["kl"]
    assert 0 <= after["agreement"] <= 1
    assert after["teacher"] == before["teacher"]
    assert before["loss"] * before["tokens"] == pytest.approx(before["bits_per_byte"] * np.log(2) * before["held_out_bytes"])
    assert "step 5, continuing a held-out document" in said
    assert "jsd divergence from the teacher at temperature 2, 10% next-token loss" in said
    told = lines(folder)
    assert [line["step"] for line in told if "val_kl" in line] == [0, 3, 6]
    assert {"loss", "divergence", "next_token", "agreement", "tokens", "tokens_per_s"} <= next(
        line for line in told if "loss" in line
    ).keys()
    assert (folder / "distillation.png").stat().st_size > 10_000
    stage = read(folder / "export" / "lineage.json")[-1]
    assert (stage["teacher"]["source"], stage["began_with"]["source"]) == ("teacher", "student")
    model, tokenizer, _ = load(folder)
    assert tokenizer.digest == Tokenizer.load(made / "teacher").digest
    assert lm.generate(model, [[1, 2]], max_new_tokens=2)
    assert known_text(folder) == str(made / "texts")


def test_from_what_was_kept_it_learns_alike_and_goes_on_after_a_cut_and_damage(made, tmp_path):
    folder = tmp_path / "kept"
    results, said = distil(made, folder, top_k=6)
    assert results["after"]["kl"] < 0.8 * results["before"]["kl"]
    assert "asking the teacher about 24 rows, 1 of 1 parts" in said
    assert all("val_kl" not in line for line in lines(folder))  # the teacher is not at hand

    again = tmp_path / "again"
    shutil.copytree(folder, again)
    shutil.rmtree(again / "checkpoints" / "6")
    (again / "results.json").unlink()
    (part,) = (made / "cache" / "teachers").glob("top6-*/rows-00000000")
    (part / "log_probs.bin").write_bytes(b"gone")
    curve = curve_of(folder, tmp_path / "curves")
    main(parse(Config, "", recipe="distill", argv=["--resume", "--run-dir", str(again), "--curve", str(curve)]))
    assert left_at(again) == []
    whole, resumed = (load_file(each / "export" / "model.safetensors") for each in (folder, again))
    for name in whole:
        np.testing.assert_array_equal(whole[name], resumed[name])


def test_on_its_own_answers_to_what_is_asked(made, tmp_path):
    changes = {"data": str(made / "talk.jsonl"), "data_kind": "conversations", "on_policy": True, "loss": {"kind": "reverse"}}
    results, said = distil(made, tmp_path / "own", prompt_tokens=30, max_new_tokens=8, **changes)
    assert results["after"]["kl"] < results["before"]["kl"]
    assert "bits_per_byte" not in results
    assert "on the student's own words" in said
    steps = [line for line in lines(tmp_path / "own") if "divergence" in line]
    assert all(4 <= line["tokens"] <= 4 * 8 for line in steps)
    assert results["tokens_learned"] == sum(line["tokens"] for line in steps)


def test_the_control_learns_from_the_text(made, tmp_path):
    results, said = distil(made, tmp_path / "control", control=True, steps=3)
    assert results["after"]["loss"] < results["before"]["loss"]
    assert "the next-token loss alone (control)" in said
    assert all("divergence" not in line for line in lines(tmp_path / "control"))
    assert any("val_kl" in line for line in lines(tmp_path / "control"))


def test_prompts_are_pieces_of_text_and_what_was_asked(made):
    tokenizer = Tokenizer.load(made / "teacher")
    how = {"flight": None, "ops": None, "sampler": None, "seed": 0, "stop_ids": (), "count": 50, "max_new_tokens": 3}
    opened = {"seq": SEQ, "overlong": "split", "on_bad_row": "error"}
    text = distilling.texts_of("text", str(made / "texts"), tokenizer, **opened).train
    every = [text.document(i).tobytes() for i in range(len(text))]
    prompts = distilling.OnPolicy(text, prompt_tokens=9, **how).prompts(2)
    assert all(len(prompt) == 9 and any(prompt.tobytes() in document for document in every) for prompt in prompts)
    assert all(not any(document.endswith(prompt.tobytes()) for document in every) for prompt in prompts)  # something comes after it
    talk = distilling.texts_of("conversations", str(made / "talk.jsonl"), tokenizer, **opened).train
    asked = [
        tokenizer.decode(prompt, skip_special_tokens=False) for prompt in distilling.OnPolicy(talk, prompt_tokens=60, **how).prompts(0)
    ]
    assert all(words.endswith("<|im_start|>assistant\n") for words in asked)
    with pytest.raises(ValueError, match="no document gives a prompt of 1 to 4 tokens: allow longer ones with --prompt-tokens"):
        distilling.OnPolicy(talk, prompt_tokens=4, **how)


def test_a_fresh_student_has_the_sizes_asked_for_and_its_teachers_vocabulary(made):
    teacher, tokenizer, _ = load(made / "teacher")
    student, words, came_from = student_of("1m", teacher, tokenizer, seq=None, dropout=0.0, key=jr.key(0))
    assert (student.config.vocab, student.config.d_model, student.config.n_layers) == (265, 128, 4)
    assert student.config.context == 160  # the teacher's is shorter than that of the preset
    assert (words, came_from) == ("a fresh one of the sizes 1m", None)


def test_models_that_do_not_fit_together_are_refused(made, tmp_path):
    lm.save_pretrained(tiny("qwen3", n_layers=1, vocab=270), tmp_path / "other")
    Tokenizer.train(["abab" * 9], 270).save(tmp_path / "other")
    with pytest.raises(
        ValueError, match=r"the student has another tokenizer \(.*\) than its teacher \(265 tokens, digest .*\), so what one"
    ):
        distil(made, tmp_path / "a", student=str(tmp_path / "other"))
    Tokenizer.load(made / "teacher").save(tmp_path / "other")
    with pytest.raises(ValueError, match="the student's embedding has 270 rows and the teacher's 265, so their distributions"):
        distil(made, tmp_path / "b", student=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="top-k must be from 1 to one less than the vocabulary, 264; got 265"):
        distil(made, tmp_path / "c", top_k=265)
    with pytest.raises(ValueError, match="--seq 161 is more than the context of the student, 160"):
        distil(made, tmp_path / "d", seq=161)
    with pytest.raises(ValueError, match=r"what .*teacher was trained on is not known: name some text with --data"):
        distil(made, tmp_path / "e", data="auto")
    with pytest.raises(ValueError, match=r"--prompt-tokens and --max-new-tokens \(30 \+ 30\) are more than a row of 40 tokens"):
        distil(made, tmp_path / "f", on_policy=True, prompt_tokens=30, max_new_tokens=30)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"control": True, "top_k": 3}, "leave out --top-k and --on-policy"),
        ({"on_policy": True, "top_k": 3}, "nobody can keep what the teacher says of a text that is not written yet"),
        ({"on_policy": True, "loss": {"next_token": 0.5}}, "leave out --loss.next-token"),
        ({"step": {"z_loss": 1e-4}}, "z_loss belongs to the next-token loss"),
        ({"data_kind": "conversations", "packing": "concat"}, "take best_fit or pad"),
        ({"loss": {"temperature": 0.0}}, "temperature: .*greater than 0"),
        ({"draw_temperature": 0.0}, "draw-temperature: .*greater than 0"),
        ({"batch": 3, "step": {"micro_batches": 2}}, "must be a multiple of step.micro_batches"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        Config(teacher="x", **changes)
