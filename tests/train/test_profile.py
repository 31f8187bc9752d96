"""The real profiler around a small program: what is traced, what is passed through, and what the table says."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest
from loguru import logger

from train.profile import Operation, latest_trace, longest_operations, profiled, table


@jax.jit
def product(x):
    return jnp.tanh(x @ x)


def training(stop, fails_at=None):
    state = jnp.full((24, 24), 0.01)
    for done in range(1, stop + 1):
        if done == fails_at:
            raise FloatingPointError("poisoned")
        state = product(state)
        yield done, state, [{"step": done}]


@pytest.fixture
def said():
    lines = []
    sink = logger.add(lambda message: lines.append(str(message)), format="{message}")
    yield lines
    logger.remove(sink)


def tracing():
    """Whether a trace is running: only one may at a time."""
    try:
        jax.profiler.stop_trace()
    except RuntimeError:
        return False
    return True


def times_of(folder):
    return {operation.name: operation.times for operation in longest_operations(latest_trace(folder))}


def test_the_steps_asked_for_are_traced_and_all_pass_through(tmp_path, said):
    items = list(profiled(training(6), tmp_path, first=2, count=3))
    assert [(done, metrics) for done, _, metrics in items] == [(done, [{"step": done}]) for done in range(1, 7)]
    for (_, state, _), (_, expected, _) in zip(items, training(6), strict=True):
        assert jnp.array_equal(state, expected)
    path = latest_trace(tmp_path)
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert any(event.get("args", {}).get("hlo_module") == "jit_product" for event in events)
    assert set(times_of(tmp_path).values()) == {3}  # each operation of `product` once a step
    words = "".join(said)
    assert "tracing 3 steps after step 2" in words
    assert str(path) in words
    assert "https://ui.perfetto.dev" in words
    assert "ms a step" in words


def test_a_trace_may_follow_another(tmp_path):
    for folder in ("one", "other"):
        list(profiled(training(3), tmp_path / folder, first=1, count=1))
        assert set(times_of(tmp_path / folder).values()) == {1}


def test_a_run_that_ends_early_keeps_what_was_traced_and_says_so(tmp_path, said):
    assert len(list(profiled(training(4), tmp_path, first=2, count=9))) == 4
    assert set(times_of(tmp_path).values()) == {2}
    assert "2 of 9 steps were traced: the run ended before the others" in "".join(said)


def test_nothing_is_traced_where_the_run_ends_before_the_first(tmp_path, said):
    assert len(list(profiled(training(3), tmp_path, first=5, count=1))) == 3
    assert list(tmp_path.iterdir()) == []
    assert "nothing was traced: the run ended after 3 steps, before the 5 that were to go first" in "".join(said)


def test_the_trace_ends_with_a_caller_that_leaves(tmp_path):
    steps = profiled(training(6), tmp_path, first=1, count=4)
    for done, _, _ in steps:
        if done == 3:
            break
    steps.close()
    assert not tracing()
    assert set(times_of(tmp_path).values()) == {2}


def test_the_trace_ends_with_an_error(tmp_path):
    with pytest.raises(FloatingPointError, match="poisoned"):
        list(profiled(training(6, fails_at=4), tmp_path, first=1, count=4))
    assert not tracing()
    assert set(times_of(tmp_path).values()) == {2}


@pytest.mark.parametrize(("first", "count"), [(0, 1), (1, 0)])
def test_a_trace_of_nothing_is_refused(tmp_path, first, count):
    with pytest.raises(ValueError, match=f"first is {first}.*count is {count}"):
        list(profiled(training(2), tmp_path, first=first, count=count))


def test_self_time_leaves_out_what_stands_inside(tmp_path):
    def event(name, start, duration, thread=1):
        return {"ph": "X", "pid": 7, "tid": thread, "ts": start, "dur": duration, "name": name, "args": {"hlo_op": name}}

    inside = [
        event("while.3", 0, 100),
        event("dot.1", 10, 30),
        event("dot.2.4", 40, 20),
        event("add", 100, 5),
        event("dot.1", 0, 7, thread=2),
    ]
    other = {"ph": "X", "pid": 7, "tid": 1, "ts": 12, "dur": 9, "name": "end: dot.1"}
    path = tmp_path / "trace.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": [*inside, other, {"ph": "M"}, {}]}).encode()))
    found = longest_operations(path)
    assert [(each.name, each.times) for each in found] == [("dot", 3), ("while", 1), ("add", 1)]
    assert [each.self_s for each in found] == pytest.approx([57e-6, 50e-6, 5e-6])


def test_the_table_shows_shares_per_step_and_counts_the_rest():
    lines = table([Operation("dot", 6, 0.06), *[Operation(f"kind{i}", 2, 0.003) for i in range(13)]], n_steps=2).splitlines()
    assert lines[1].split() == ["30.00", "60.6%", "3", "dot"]
    assert lines[-1].split() == ["3.00", "6.1%", "2", "other", "kinds"]
    assert len(lines) == 14
    assert table([], n_steps=1) == "  no operation is named in it"


def test_a_folder_without_a_trace_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="holds no trace"):
        latest_trace(tmp_path)
