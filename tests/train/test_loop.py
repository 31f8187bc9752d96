from dataclasses import replace

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from loguru import logger
from tiny import packed_batch, tiny

import lm
from data.pipeline import Batch
from lm.flight import Flight
from train.averages import AverageConfig, average_rate
from train.loop import SpikeError, bits_per_byte, nats_by_document, steps
from train.optimizers import OptimizerConfig, ScheduleConfig, build_optimizer, learning_rate
from train.step import Stats, StepConfig, TrainState, init_state, make_step


def after(steps_done):
    return TrainState(None, None, None, None, jnp.array(steps_done, jnp.int32), Stats.empty())


def counting_step(state, batch, rate, average_rate=0.0):
    """The state counts steps; the loss says which batch and which state it saw."""
    metrics = {
        "loss": batch.tokens[0, 0] + 100.0 * state.step,
        "grad_norm": jnp.float32(rate),
        "tokens": jnp.float32(8),
        "skipped": state.stats.skipped,
        "spikes": state.stats.spikes,
        "sigmas": jnp.where(batch.tokens[0, 0] % 2 == 0, 1.5, jnp.nan),
        "update_ratio": {"embed.weight": jnp.where(batch.tokens[0, 0] % 2 == 0, 0.001, jnp.nan)},
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
        measured = {"sigmas": 1.5, "update_ratio/embed.weight": pytest.approx(0.001)} if index % 2 == 0 else {}
        assert {name: value for name, value in metrics.items() if name == "sigmas" or "ratio" in name} == measured


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

    def slow_step(state, batch, rate, average_rate):
        now[0] += 1.0
        return counting_step(state, batch, rate)

    times = {}
    for done, _, arrived in steps(slow_step, after(0), numbered(0, 6), lambda index: 1.0, start=0, stop=6, pause=lambda done: done == 3):
        times |= {metrics["step"]: metrics["step_s"] for metrics in arrived}
        if done == 3:
            now[0] += 50.0  # an evaluation
    assert 6.0 < sum(times.values()) < 6.1


@pytest.mark.parametrize("name", ["adamw", "muon", "schedule_free"])
def test_resumed_equals_uninterrupted_bit_for_bit(name):
    optimizer = build_optimizer(OptimizerConfig(name=name))
    step = make_step(optimizer, StepConfig(), Flight(), lm.REFERENCE, jr.key(5))
    rate = learning_rate(ScheduleConfig(peak=0.02, warmup=0.3), 5)
    batches = [packed_batch(seed=seed) for seed in range(5)]
    saved, whole = None, {}
    fresh = init_state(tiny("llama", n_layers=1, dropout=0.3), optimizer, frozen=["norm.scale"], average=True)
    averages = {"average_rate": average_rate(AverageConfig(name="swa", start=0.3), 5), "stop": 5}
    for done, state, arrived in steps(step, fresh, batches, rate, start=0, **averages):
        whole |= {metrics["step"]: metrics["loss"] for metrics in arrived}
        if done == 2:
            saved = jax.tree.map(np.array, state)

    rest = {}
    for _, resumed, arrived in steps(step, jax.tree.map(jnp.array, saved), batches[2:], rate, start=2, **averages):  # noqa: B007
        rest |= {metrics["step"]: metrics["loss"] for metrics in arrived}
    assert rest == {number: whole[number] for number in (3, 4, 5)}
    jax.tree.map(np.testing.assert_array_equal, resumed, state)


def broken_step(nonfinite=(), jumps=()):
    """Counts as `make_step` does at the steps named."""

    def step(state, batch, rate, average_rate):
        index = int(state.step)
        done, metrics = counting_step(state, batch, rate)
        stats = replace(state.stats, skipped=state.stats.skipped + int(index in nonfinite), spikes=state.stats.spikes + int(index in jumps))
        return replace(done, stats=stats), metrics | {"skipped": stats.skipped, "spikes": stats.spikes, "sigmas": jnp.float32(7.25)}

    return step


def test_what_is_wrong_with_a_step_is_said_with_its_batch():
    said = []
    sink = logger.add(lambda message: said.append(message.record["message"]))
    try:
        step = broken_step(nonfinite=[1, 4], jumps=[3])
        describe = "rows {0} of books".format
        list(steps(step, after(0), numbered(0, 6), lambda index: 1.0, start=0, stop=6, describe=describe))
    finally:
        logger.remove(sink)
    assert said == [
        "step 2: loss or gradient is not finite; nothing was changed (step 1 of this kind); rows 1 of books",
        "step 4: loss 303.0000 or gradient norm 1 is 7.2 standard deviations above those of the last steps (jump 1 of this run); "
        "rows 3 of books",
        "step 5: loss or gradient is not finite; nothing was changed (step 2 of this kind); rows 4 of books",
    ]


def test_a_run_told_to_stop_at_a_jump_does():
    batches = numbered(0, 9)
    with pytest.raises(SpikeError, match=r"stopped at step 3: loss 202\.0000 .* 7\.2 standard deviations .*; batch 2"):
        list(steps(broken_step(jumps=[2]), after(0), batches, lambda index: 1.0, start=0, stop=9, stop_at_spike=True))
    assert next(batches).tokens[0, 0] == 4  # the jump is known one step late


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
