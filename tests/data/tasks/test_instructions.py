"""Instructions made here: right answers, several phrasings, and nothing held out that was trained on."""

import json
import re

import pytest

from data.documents import is_held_out
from data.tasks.instructions import TASKS, holds, score, source

CODE = '''
def open_door(key: str, times=2):
    """Open the {i}th door."""
    turned{i} = key.turn(times, slowly={i})
    return turned{i}.is_open("door {i}")
'''


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("code")
    for i in range(60):
        words = " ".join(a + b + "ing" for a in "bdfgklmnprst" for b in ("ak", "el", "is", "ot")[i % 4 : i % 4 + 2])
        (root / f"file{i}.py").write_text(
            CODE.replace("Open the", f"Open {words} the").replace("{i}", str(i)).replace("open_door", f"open{i}")
        )
    return root, source(600, seed=0, root=root)


def rows_of(documents):
    return [json.loads(documents[i]["text"]) for i in range(len(documents))]


def test_the_same_seed_makes_the_same_rows(made) -> None:
    root, first = made
    assert source(600, seed=0, root=root).record["sha256"] == first.record["sha256"]
    assert source(600, seed=1, root=root).record["sha256"] != first.record["sha256"]


def test_too_few_things_to_ask_about_are_said(made) -> None:
    with pytest.raises(ValueError, match=r"hardly more than .* different questions of the task 'arguments': make fewer rows"):
        source(2000, root=made[0])


def test_every_task_is_there_and_each_question_once(made) -> None:
    rows = rows_of(made[1].train) + rows_of(made[1].held_out)
    assert {row["task"] for row in rows} == set(TASKS)
    questions = [row["messages"][0]["content"] for row in rows]
    assert len(set(questions)) == len(questions) == 600
    assert all(row["messages"][1] == {"role": "assistant", "content": row["answer"]} and row["answer"] for row in rows)


def test_sums_and_strings_are_right_and_held_out_by_what_they_are_about(made) -> None:
    trained, held_out = ([row for row in rows_of(part) if row["task"] == "arithmetic"] for part in (made[1].train, made[1].held_out))
    for row in trained + held_out:
        a, sign, b = re.search(r"(\d+) ([+-]) (\d+)", row["messages"][0]["content"]).groups()
        assert row["answer"] == str(int(a) + int(b) if sign == "+" else int(a) - int(b))
        low, high = sorted((int(a), int(b)))
        assert is_held_out(f"{low} and {high}") == (row in held_out)  # whichever stands first
    for row in rows_of(made[1].train) + rows_of(made[1].held_out):
        if row["task"] == "strings":
            word = re.search(r'"(\w+)"', row["messages"][0]["content"])[1]
            assert row["answer"] in (word[::-1], word.upper(), word[0], word[-1], str(len(word)), f"{word} {word}", "-".join(word))
            assert is_held_out(word) == (row in rows_of(made[1].held_out))


def test_code_is_held_out_by_its_file(made) -> None:
    for part, expected in ((made[1].train, False), (made[1].held_out, True)):
        for row in rows_of(part):
            if row["task"] in ("arguments", "signature", "completion"):
                number = re.search(r"(?:open|turned)(\d+)|(?:slowly=|door )(\d+)", json.dumps(row))
                if number is not None:
                    assert is_held_out(f"file{number[1] or number[2]}.py") is expected
            if row["task"] == "arguments":
                assert row["answer"] == "key, times"
            if row["task"] == "signature":
                assert re.fullmatch(r"def open\d+\(key, times=2\):", row["answer"])


def test_a_reply_is_scored_whole_or_within_words() -> None:
    assert [score(reply, "68") for reply in (" 68\n", "It is 68.")] == [True, False]
    assert [holds(reply, "68") for reply in ("It is 68.", "168")] == [True, False]
    assert holds("(key, times)", "key, times")
