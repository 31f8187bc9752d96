"""`recipes.evaluate`, in process, on a tiny random model and small files of every kind."""

import gzip
import json
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
from tiny import logits_of, tiny

import lm
import recipes.evaluate as evaluate
from data.tasks import exact_match, multiple_choice
from data.tokenizer import Tokenizer
from recipes.command_line import parse
from recipes.evaluate_open import check_specs
from recipes.evaluate_report import published_scores, with_published
from recipes.evaluate_words import Words
from train.card import check_evaluations

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def choices_file(folder, n: int = 11):
    """Questions about letters; one is far longer than the tiny model's context."""
    rng = np.random.default_rng(0)
    path = folder / "choices.jsonl.gz"
    with gzip.open(path, "wt") as file:
        for i in range(n):
            letters = [chr(97 + c) for c in rng.permutation(20)[:4]]
            query = f"Question: which one, {i}? " + ("very long " * 60 if i == 4 else "")
            file.write(json.dumps({"query": query, "choices": [letters[0] * 3, *letters[1:]], "gold": int(rng.integers(4))}) + "\n")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and a file of each kind."""
    root = tmp_path_factory.mktemp("evaluate")
    tokenizer = Tokenizer.train(["def f(x):\n    return x + 1\n" * 20, "Question: which one?\nAnswer: abcdefghijklmnopqrst\n" * 9], 330)
    tokenizer.chat_templates["default"] = TEMPLATE
    lm.save_pretrained(tiny("llama", vocab=tokenizer.vocab_size, context=192), root / "model")
    tokenizer.save(root / "model")
    choices_file(root)
    with zipfile.ZipFile(root / "pairs.zip", "w") as archive:
        for paradigm in ("one", "two"):
            lines = [json.dumps({"sentence_good": f"a b {paradigm} {i}", "sentence_bad": f"b a {paradigm} {i}"}) for i in range(5)]
            archive.writestr(f"{paradigm}.jsonl", "\n".join(lines))
    problems = [json.dumps({"question": f"What is {i} + {i}?", "answer": f"{i} twice.\n#### {2 * i}"}) for i in range(5)]
    (root / "problems.jsonl").write_text("\n".join(problems) + "\n")
    (root / "texts").mkdir()
    for i in range(6):
        (root / "texts" / f"{i}.txt").write_text(f"def f{i}(x):\n    return x + {i}\n" * (i + 1))
    return root


@pytest.fixture
def run(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "compilation_cache", lambda: None)
    monkeypatch.setenv("ZMAJ_CACHE_DIR", str(tmp_path / "cache"))

    def go(*tasks: str, name: str = "run", **settings):
        there = {"c": "choices.jsonl.gz", "p": "pairs.zip", "w": "problems.jsonl", "t": "texts"}
        specs = tuple(f"{task}={folder / there[task]}" if task in there else task for task in tasks)
        common = {"batch_tokens": 256, "device": "cpu", "dtype": "float32", "max_new_tokens": 8, "rows": 2}
        config = evaluate.Config(model=folder / "model", tasks=specs, run_dir=tmp_path / name, **(common | settings))
        evaluate.main(config)
        return json.loads((tmp_path / name / "results.json").read_text())

    return go


# ------------------------------------------------------------------------------------------- the whole


def test_every_kind_of_task_and_a_run_that_was_killed(run, tmp_path, capsys) -> None:
    """The second run is given some of the first one's answers, the last of them cut in the middle, and comes to the same results."""
    results = run("c", "p", "w", "t", published=("c=30",))
    screen = capsys.readouterr()
    assert "1 of 11 items have more than 192 tokens" in screen.err
    assert "30.0" in screen.out
    assert (results["c"]["n"], results["c"]["of"], results["c"]["chance"]) == (10, "questions", 0.25)
    assert next(iter(results["c"]["metrics"])) == "per_character"
    assert set(results["c"]["metrics"]) == set(multiple_choice.NORMALISATIONS)
    assert results["p"]["n"] == 10
    assert list(results["p"]["groups"]) == ["one", "two"]
    assert set(results["w"]["metrics"]) == {"strict", "flexible"}
    assert results["t"]["n"] == 6
    assert results["t"]["low"] <= results["t"]["value"] <= results["t"]["high"]
    assert (tmp_path / "run" / "scores.png").stat().st_size > 10_000
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["tasks"]["c"]["refused_as_too_long"] == 1
    assert str(tmp_path) not in json.dumps(results)
    assert check_evaluations(results, "results.json") == results  # a model card takes it as it is

    killed = tmp_path / "killed"
    killed.mkdir()
    for name in ("config.json", "identity.json", "p.jsonl", "w.jsonl", "t.jsonl"):
        (killed / name).write_bytes((tmp_path / "run" / name).read_bytes())
    for name in ("p", "w", "t"):
        text = (killed / f"{name}.jsonl").read_text()
        (killed / f"{name}.jsonl").write_text(text[: len(text) * 2 // 3])
    assert run("c", "p", "w", "t", name="killed", resume=True, published=("c=30",)) == results
    for name in ("c", "p", "w", "t"):
        assert evaluate.read_answers(killed / f"{name}.jsonl") == evaluate.read_answers(tmp_path / "run" / f"{name}.jsonl")

    (killed / "identity.json").write_text(json.dumps(manifest["identity"] | {"c": "another file"}))
    with pytest.raises(ValueError, match="was begun with another c: its answers do not go with these"):
        run("c", "p", "w", "t", name="killed", resume=True)
    with pytest.raises(ValueError, match="choose another --run-dir, or go on with --resume"):
        run("c", name="killed")


def test_scores_are_those_worked_out_by_hand(run, folder, tmp_path) -> None:
    """Each choice's log p as the sum over its tokens of log softmax of the logits, one sequence at a time."""
    results = run("c", "p", limit=4)
    model, tokenizer = lm.load_pretrained(folder / "model"), Tokenizer.load(folder / "model")
    records = [json.loads(line) for line in gzip.decompress((folder / "choices.jsonl.gz").read_bytes()).splitlines()]
    answers = evaluate.read_answers(tmp_path / "run" / "c.jsonl")
    asked = sorted({i for i, _ in answers})
    assert len(asked) in (3, 4)  # the long one may be among those drawn
    right = dict.fromkeys(multiple_choice.NORMALISATIONS, 0)
    for i in asked:
        scores, lengths = [], []
        for c, choice in enumerate(records[i]["choices"]):
            context = tokenizer.encode(records[i]["query"].rstrip() + "\nAnswer:")
            whole = tokenizer.encode(records[i]["query"].rstrip() + "\nAnswer: " + choice)
            scores.append(log_p(model, [tokenizer.bos_id, *whole], len(whole) - len(context)))
            lengths.append(len(whole) - len(context))
            assert answers[i, c]["log_likelihood"] == pytest.approx(scores[-1], abs=2e-4)
            assert answers[i, c]["tokens"] == lengths[-1]
        for name, choice in multiple_choice.chosen(records[i]["choices"], scores, lengths).items():
            right[name] += choice == records[i]["gold"]
    assert {name: round(each["value"] * len(asked)) for name, each in results["c"]["metrics"].items()} == right

    pairs = evaluate.read_answers(tmp_path / "run" / "p.jsonl")
    assert len(pairs) == 2 * 2 * 4  # so many of each paradigm
    ids = tokenizer.encode("a b one 0")
    assert (0, 0) not in pairs or pairs[0, 0]["log_likelihood"] == pytest.approx(log_p(model, [tokenizer.bos_id, *ids], len(ids)), abs=2e-4)


def log_p(model, tokens: list[int], scored: int) -> float:
    padded = np.asarray(tokens + [0] * (193 - len(tokens)), np.int32)
    logits = np.asarray(logits_of(model, padded[:-1]), np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return float(sum(log_probs[at - 1, tokens[at]] for at in range(len(tokens) - scored, len(tokens))))


def test_a_conversation_and_examples_change_what_is_asked(run, tmp_path) -> None:
    run("c", chat_template=True, shots=1, limit=3, system="Be brief.")
    asked = json.loads((tmp_path / "run" / "manifest.json").read_text())["tasks"]["c"]["example"]
    assert asked.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nQuestion: which one, ")
    assert asked.count("<|im_start|>assistant\n") == 2
    assert "<|im_start|>assistant\n⟦" in asked


def test_the_built_in_tasks_need_no_file(run, monkeypatch, tmp_path) -> None:
    """On a few files in the place of the standard library's."""
    library = tmp_path / "lib"
    library.mkdir()
    for i in range(60):
        lines = "".join(f"    number_{j} = {i * j} + {j}\n" for j in range(12))
        (library / f"module{i}.py").write_text(f"def function_{i}(x):\n{lines}    return x\n")
    monkeypatch.setattr("data.sources.sysconfig", SimpleNamespace(get_path=lambda name: str(library)))
    results = run("stdlib", "next_line", limit=5)
    assert results["stdlib"]["metric"] == "bits per byte"
    assert results["next_line"]["chance"] == 0.25


# ------------------------------------------------------------------------------------------- words and rules


def test_what_texts_begin_with(folder) -> None:
    tokenizer = Tokenizer.load(folder / "model")
    assert Words(tokenizer).prefix.tolist() == [tokenizer.bos_id]  # trained here: as its documents began in training
    named = Words(tokenizer, opening="<|im_start|>")
    assert named.start.tolist() == tokenizer.encode_with_specials("<|im_start|>").tolist()
    with pytest.raises(ValueError, match=r"--opening '<nothing>' is no token"):
        _ = Words(tokenizer, opening="<nothing>").prefix
    chat = Words(tokenizer, chat=True).request("<|im_start|>assistant\n", "ab")
    assert tokenizer.decode(chat.context, skip_special_tokens=False) == "<|im_start|>assistant\n"  # the line break stays with the template
    assert tokenizer.decode(chat.continuation) == "ab"


def test_normalisations_by_hand() -> None:
    """log p -6 over "a bc" (4 characters, 3 that are no space, 4 bytes, 2 tokens), -7 over "žđ" (2, 2, 4, 3 tokens)."""
    found = multiple_choice.scores(["a bc", "žđ"], [-6.0, -7.0], [2, 3])
    assert found == {
        "raw": [-6.0, -7.0],
        "per_token": [-3.0, pytest.approx(-7 / 3)],
        "per_character": [-1.5, -3.5],
        "per_byte": [-1.5, -1.75],
        "per_nonspace": [-2.0, -3.5],
    }
    chosen = multiple_choice.chosen(["a bc", "žđ"], [-6.0, -7.0], [2, 3])
    assert chosen == {"raw": 0, "per_token": 1, "per_character": 0, "per_byte": 0, "per_nonspace": 0}
    assert multiple_choice.chosen(["x", "y"], [-1.0, -1.0], [1, 1])["raw"] == 0  # of equals the first


def test_answers_that_are_equal() -> None:
    problem = exact_match.Problem("?", "1,800 in all\n#### 1,800")
    assert exact_match.matches(problem, "so #### 1800. And 5") == {"strict": True, "flexible": False}
    assert exact_match.matches(problem, "It is $1,800.00.") == {"strict": False, "flexible": True}
    assert exact_match.matches(problem, "nothing") == {"strict": False, "flexible": False}
    assert exact_match.matches(problem, "#### -1800")["strict"] is False
    plain = exact_match.Problem("?", "Paris")
    assert exact_match.matches(plain, "\nparis.\nBut then") == {"exact": True}
    assert exact_match.matches(plain, "") == {"exact": False}


def test_examples_are_drawn_by_seed_and_never_the_item_itself() -> None:
    own = [(f"q{i}", f"a{i}") for i in range(5)]
    for item in range(5):
        drawn = multiple_choice.few_shot(own, 4, seed=1, item=item, leave_out=item)
        assert sorted([*drawn, own[item]]) == own
        assert drawn == multiple_choice.few_shot(own, 4, seed=1, item=item, leave_out=item)
    with pytest.raises(ValueError, match="asked for 5 examples before each question, but there are only 4"):
        multiple_choice.few_shot(own, 5, seed=1, item=0, leave_out=0)


# ------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"query": "q", "choices": ["a", "b"], "gold": 2}', "line 1 of .*`gold` must be a whole number from 0 to 1, got 2"),
        ('{"query": "q", "choices": ["a", "b"], "gold": true}', "`gold` must be a whole number from 0 to 1, got true"),
        ('{"query": " ", "choices": ["a", "b"], "gold": 1}', '`query` must be a text that is not blank, got " "'),
        ('{"query": "q", "choices": ["a"], "gold": 0}', "`choices` must be a list of at least 2 texts"),
        ('{"query": "q", "choices": ["a", ""], "gold": 0}', "`choices` must be a list of at least 2 texts that are not blank"),
        ('{"query": "q", "gold": 0}', "has the fields gold, query, which make no task. Expected multiple choice: query, choices, gold"),
        ('{"question": "q", "answer": "a ####"}', "nothing stands behind the #### of `answer`"),
        ("[1]", "is a list: expected one object a line"),
        ("{", "line 1 of .* is not JSON"),
        ("", "has no records"),
    ],
)
def test_bad_records_are_refused_with_their_place(run, tmp_path, line: str, words: str) -> None:
    (tmp_path / "bad.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=words):
        run(f"bad={tmp_path / 'bad.jsonl'}")


@pytest.mark.parametrize(
    ("tasks", "examples", "words"),
    [
        (("hellaswag",), (), "unknown task 'hellaswag': expected NAME=PATH.*stdlib .*next_line"),
        (("a=x", "a=y"), (), "--tasks names a more than once"),
        (("a=",), (), "'a=' is not NAME=PATH"),
        (("../a=x",), (), "is not NAME=PATH, with a name of letters"),
        (("a=x",), ("b=y",), "--examples 'b=y' is not NAME=PATH with the name of a task; the tasks are a"),
    ],
)
def test_bad_names_are_refused_before_anything_is_loaded(tasks, examples, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_specs(tasks, examples)


def test_bad_input_ends_in_words(run, folder, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"'nowhere.jsonl' is no file: expected .jsonl"):
        run("a=nowhere.jsonl", name="a")
    with pytest.raises(ValueError, match="asked for 11 examples before each question, but there are only 10"):
        run("c", shots=11, name="b")
    with pytest.raises(ValueError, match=r"w: 5 of 5 items have more than 2 tokens, the context less --max-new-tokens.*Nothing is left"):
        run("w", max_new_tokens=190, name="c")
    (folder / "bare").mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        (folder / "bare" / name).write_bytes((folder / "model" / name).read_bytes())
    with pytest.raises(ValueError, match=r"no tokenizer at .*bare"):
        evaluate.main(evaluate.Config(model=folder / "bare", run_dir=tmp_path / "d"))


def test_published_figures_go_to_their_metrics() -> None:
    given = published_scores(("a=54.1", "a/raw=50"), ["a"])
    assert given == {"a": {"": 0.541, "raw": 0.5}}
    results = {"a": {"metrics": {"per_byte": {"value": 0.5}, "raw": {"value": 0.4}}}}
    assert with_published(results, given)["a"]["metrics"] == {
        "per_byte": {"value": 0.5, "published": 0.541},
        "raw": {"value": 0.4, "published": 0.5},
    }
    with pytest.raises(ValueError, match="names x of a, whose metrics are per_byte, raw"):
        with_published(results, {"a": {"x": 0.1}})
    for bad in ("a=high", "b=5", "a=541"):
        with pytest.raises(ValueError, match=f"--published '{bad}'"):
            published_scores((bad,), ["a"])


def test_resume_takes_the_settings_of_the_run(folder, tmp_path) -> None:
    config = evaluate.Config(model=folder / "model", tasks=("stdlib",), limit=3)
    evaluate.save_config(config, tmp_path / "run")
    again = parse(evaluate.Config, "", recipe="evaluate", argv=["--resume", "--run-dir", str(tmp_path / "run")])
    assert (again.model, again.tasks, again.limit, again.resume) == (folder / "model", ("stdlib",), 3, True)
    with pytest.raises(SystemExit):
        parse(evaluate.Config, "", recipe="evaluate", argv=["--resume", "--run-dir", str(tmp_path / "run"), "--limit", "4"])
