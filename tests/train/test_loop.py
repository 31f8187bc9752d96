import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tiny import packed_batch, tiny

import lm
from data.pipeline import Batch
from lm.flight import Flight
from train.loop import bits_per_byte, nats_by_document, steps
from train.optimizers import OptimizerConfig, ScheduleConfig, build_optimizer, learning_rate
from train.step import StepConfig, TrainState, init_state, make_step


def after(steps_done):
    return TrainState(None, None, None, jnp.array(steps_done, jnp.int32), jnp.array(0, jnp.int32))


def counting_step(state, batch, rate):
    """The state counts steps; the loss says which batch and which state it saw."""
    metrics = {
        "loss": batch.tokens[0, 0] + 100.0 * state.step,
        "grad_norm": jnp.float32(rate),
        "tokens": jnp.float32(8),
        "skipped": state.skipped,
    }
    return after(state.step + 1), metrics


def numbered(start, stop):
    for i in range(start, stop):
        yield Batch(*(np.full((2, 4), i) for _ in Batch._fields))


def run(start, stop, **settings):
    return list(steps(counting_step, after(start), numbered(start, stop), lambda index: 0.5**index, start=start, stop=stop, **settings))


def arrivals(run):
    """done → the steps whose metrics came with it."""
    return {done: [metrics["step"] for metrics in arrived] for done, _, arrived in run}


# ------------------------------------------------------------------------------------------- steps


def test_metrics_come_one_step_late_and_the_last_ones_at_once():
    assert arrivals(run(0, 5)) == {1: [], 2: [1], 3: [2], 4: [3], 5: [4, 5]}
    assert arrivals(run(7, 9)) == {8: [], 9: [8, 9]}
    assert arrivals(run(0, 1)) == {1: [1]}
    assert run(3, 3) == []


def test_at_a_pause_no_metrics_are_outstanding():
    assert arrivals(run(0, 7, pause=lambda done: done in (3, 4))) == {1: [], 2: [1], 3: [2, 3], 4: [4], 5: [], 6: [5], 7: [6, 7]}
    assert arrivals(run(0, 4, pause=lambda done: True)) == {1: [1], 2: [2], 3: [3], 4: [4]}


@pytest.mark.parametrize("every", [1, 2, 3, 100])
def test_no_metrics_are_lost_or_doubled_and_each_are_of_their_step(every):
    done_states = run(2, 9, pause=lambda done: done % every == 0)
    assert [(done, int(state.step)) for done, state, _ in done_states] == [(done, done) for done in range(3, 10)]
    arrived = [metrics for *_, new in done_states for metrics in new]
    assert [metrics["step"] for metrics in arrived] == list(range(3, 10))
    for metrics in arrived:
        index = metrics["step"] - 1
        assert metrics["loss"] == index + 100 * index  # batch `index`, state of `index` steps
        assert metrics["learning_rate"] == 0.5**index == metrics["grad_norm"]
        assert metrics["step_s"] > 0
        assert metrics["tokens_per_s"] == pytest.approx(8 / metrics["step_s"])
        assert metrics["wait_s"] >= 0
        assert all(isinstance(value, int | float) for value in metrics.values())


def test_no_batch_is_taken_before_it_is_needed():
    batches = numbered(0, 9)
    for done, *_ in steps(counting_step, after(0), batches, lambda index: 1.0, start=0, stop=4):
        assert done <= 4
    assert next(batches).tokens[0, 0] == 4


def test_the_caller_s_time_at_a_pause_is_no_step_s(monkeypatch):
    now = [0.0]

    def clock():
        now[0] += 0.001  # time passes, a little
        return now[0]

    monkeypatch.setattr("train.loop.time.perf_counter", clock)

    def slow_step(state, batch, rate):
        now[0] += 1.0
        return counting_step(state, batch, rate)

    times = {}
    for done, _, arrived in steps(slow_step, after(0), numbered(0, 6), lambda index: 1.0, start=0, stop=6, pause=lambda done: done == 3):
        times |= {metrics["step"]: metrics["step_s"] for metrics in arrived}
        if done == 3:
            now[0] += 50.0  # an evaluation
    assert 6.0 < sum(times.values()) < 6.1


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_resumed_equals_uninterrupted_bit_for_bit(name):
    optimizer = build_optimizer(OptimizerConfig(name=name))
    step = make_step(optimizer, StepConfig(), Flight(), lm.REFERENCE, jr.key(5))
    rate = learning_rate(ScheduleConfig(peak=0.02, warmup=0.3), 5)
    batches = [packed_batch(seed=seed) for seed in range(5)]
    saved, whole = None, {}
    for done, state, arrived in steps(step, init_state(tiny("llama", n_layers=1, dropout=0.3), optimizer), batches, rate, start=0, stop=5):
        whole |= {metrics["step"]: metrics["loss"] for metrics in arrived}
        if done == 2:
            saved = jax.tree.map(np.array, state)

    rest = {}
    for _, resumed, arrived in steps(step, jax.tree.map(jnp.array, saved), batches[2:], rate, start=2, stop=5):  # noqa: B007
        rest |= {metrics["step"]: metrics["loss"] for metrics in arrived}
    assert rest == {number: whole[number] for number in (3, 4, 5)}
    jax.tree.map(np.testing.assert_array_equal, resumed, state)


# ------------------------------------------------------------------------------------------- evaluation


def test_nats_by_document_are_the_sums_over_its_counted_tokens():
    rng = np.random.default_rng(0)

    def example():
        documents = rng.choice([-1, 3, 4, 11], (2, 7))
        batch = packed_batch(seq=7 + 6)
        batch = Batch(*(field[:, :7] for field in batch))
        weights = np.where(documents >= 0, rng.integers(0, 2, (2, 7)), 0).astype(np.float32)  # 0 also within a document: context
        return batch._replace(loss_weights=weights), documents

    examples = [example() for _ in range(3)]
    nats = {id(batch): rng.uniform(0, 9, (2, 7)).astype(np.float32) for batch, _ in examples}
    told = []
    totals, counts = nats_by_document(lambda model, batch: nats[id(batch)], None, examples, told.append)
    for document in (3, 4, 11):
        chosen = [nats[id(batch)][(documents == document) & (batch.loss_weights == 1)] for batch, documents in examples]
        assert totals[document] == pytest.approx(sum(float(np.sum(each, dtype=np.float64)) for each in chosen))
        assert counts[document] == sum(each.size for each in chosen)
    assert set(totals) == set(counts) == {3, 4, 11}
    assert told == [1, 2, 3]


def test_bits_per_byte_of_a_guess_among_256_bytes_is_8():
    assert bits_per_byte(10 * np.log(256), 10) == pytest.approx(8)
    assert bits_per_byte(5.0, 4) == pytest.approx(5.0 / np.log(2) / 4)
