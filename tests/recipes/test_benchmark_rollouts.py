"""What `recipes.benchmark_rollouts` measures and tells."""

import json

import numpy as np
import pytest

from data.tasks import TASKS
from data.tasks.problems import Task
from recipes import benchmark_rollouts, grpo_arithmetic
from recipes.benchmark_rollouts import ALONE, BATCHED, BY_PROMPT, Config, in_turns, main, ratios


def test_each_side_is_measured_and_the_figures_are_appended(tmp_path, capsys, monkeypatch):
    whole = TASKS["reversal"]()
    small = Task(**(vars(whole) | {"train": whole.train[:30], "held_out": whole.held_out[:4]}))
    monkeypatch.setitem(grpo_arithmetic.TASKS, "reversal", lambda: small)
    asked = {"task": "reversal", "prompts": 3, "n": 2, "alone": 4, "rounds": 2, "max_new_tokens": 3, "dtype": "float32"}
    config = Config(**asked, backend="reference", rl_steps=1, jsonl=tmp_path / "figures" / "them.jsonl")
    figures = main(config)
    assert set(figures["tokens_per_s"]) == {BATCHED, BY_PROMPT, ALONE}
    assert all(len(speeds) == 2 and min(speeds) > 0 for speeds in figures["tokens_per_s"].values())
    assert figures["times_alone"][ALONE] == {"min": 1, "median": 1, "max": 1}
    assert sum(figures["share_of_time"].values()) == pytest.approx(1)
    told = capsys.readouterr().out
    assert "3 prompts of reversal, 2 rounds" in told
    assert "time of 1 steps of RL: rollout" in told
    main(config.model_copy(update={"rl_steps": 0}))
    lines = [json.loads(line) for line in (tmp_path / "figures" / "them.jsonl").read_text().splitlines()]
    assert lines[0] == figures
    assert "share_of_time" not in lines[1]


class Drawn:
    def __init__(self, tokens):
        self.drawn = np.ones(tokens, bool)


def test_speeds_are_tokens_over_seconds_and_ratios_those_of_a_round(monkeypatch):
    clock = iter([0, 1, 1, 2, *[2, 4, 4, 9], *[9, 10, 10, 20]])  # a round that is not kept, then two
    monkeypatch.setattr(benchmark_rollouts.time, "perf_counter", lambda: float(next(clock)))
    numbers = []

    def draw(number):
        numbers.append(number)
        return [Drawn(6), Drawn(4)]

    side = benchmark_rollouts.Side(2, 1, draw)
    speeds = in_turns({BATCHED: side, ALONE: side}, 2)
    assert speeds == {BATCHED: [5, 10], ALONE: [2, 1]}
    assert numbers == [0, 0, 1, 1, 2, 2]
    assert ratios(speeds)[BATCHED] == {"min": 2.5, "median": 6.25, "max": 10}


def test_what_is_drawn_alone_is_what_is_asked_for(monkeypatch):
    calls = []

    class Drawing:
        def draw(self, model, problems, n, key):
            calls.append((list(problems), n))

    for alone, expected in ((5, ([("a", 2), ("b", 2)], "aabbc")), (1, ([("a", 2)], "a")), (99, ([("a", 2), ("b", 2), ("c", 2)], "aabbcc"))):
        sides = benchmark_rollouts.sides_of(Config(prompts=3, n=2, alone=alone), None, Drawing(), list("abc"))
        calls.clear()
        sides[BATCHED].draw(1)
        assert calls == [(["a", "b", "c"], 2)]
        calls.clear()
        sides[BY_PROMPT].draw(1)
        assert [(problems[0], n) for problems, n in calls] == expected[0]
        calls.clear()
        sides[ALONE].draw(1)
        assert "".join(problems[0] for problems, _ in calls) == expected[1]
        assert {n for _, n in calls} == {1}
