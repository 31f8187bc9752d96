"""The sampler is the trainer: what it drew has the same log-probabilities there, with padding, stops and tools in between."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tiny import tiny

from lm.flight import Flight
from lm.generate import Sampler
from lm.kernels import BACKENDS, REFERENCE
from train.rl import GapError, check_gap, describe, gap_of, make_log_probs, parts_of, policy_batch
from train.rollout import Rollouts, ToolCalls, roll_out

PROMPTS = [np.array([5, 1, 44], np.int32), np.array([9], np.int32), np.array([3, 3, 60, 2, 17], np.int32)]
STOP, CALL = 11, 7
OFTEN = Sampler(logit_bias=((STOP, 3.0), (CALL, 3.5)))  # so that a tiny random model stops and calls


@pytest.fixture(scope="module")
def model():
    return tiny("qwen3")


def drawn_from(model, sampler: Sampler, tool: ToolCalls | None = None, **changes) -> Rollouts:
    how = {"n": 4, "width": 6, "max_new_tokens": 9, "stop_ids": [STOP], "key": jr.key(0), "flight": Flight(), "ops": REFERENCE}
    return roll_out(model, PROMPTS, sampler=sampler, tool=tool, **(how | changes))


def with_trainers(model, rollouts: Rollouts, sampler: Sampler, seq: int = 24, ops=REFERENCE):
    batch = policy_batch(rollouts, np.ones(len(rollouts)), seq=seq)
    return batch._replace(old_log_probs=make_log_probs(Flight(), ops, sampler, rows=4)(model, batch))


@pytest.fixture(scope="module")
def plain(model) -> Rollouts:
    return drawn_from(model, OFTEN)


def test_the_trainer_finds_the_log_probs_of_the_sampler(model, plain) -> None:
    batch = with_trainers(model, plain, OFTEN)
    assert np.sum(batch.loss_weights) == np.sum(plain.drawn)
    assert gap_of(batch).largest < 1e-5
    assert np.all(batch.sampler_log_probs[batch.loss_weights > 0] < 0)


def test_so_it_does_of_a_truncated_distribution_and_with_other_kernels(model) -> None:
    sampler = Sampler(temperature=0.8, top_k=7, top_p=0.9, min_p=0.02, logit_bias=OFTEN.logit_bias)
    rollouts = drawn_from(model, sampler, ops=BACKENDS["cpu"])
    assert gap_of(with_trainers(model, rollouts, sampler, ops=BACKENDS["cpu"])).largest < 1e-4
    assert gap_of(with_trainers(model, rollouts, Sampler(logit_bias=OFTEN.logit_bias), ops=BACKENDS["cpu"])).largest > 0.01


def test_answers_end_with_the_stop_id_or_are_cut_off(plain) -> None:
    assert plain.ended.any()
    for row in range(len(plain)):
        tokens = plain.tokens[row, : plain.length_of(row)]
        assert (tokens[:-1] != STOP).all()
        assert bool(tokens[-1] == STOP) == bool(plain.ended[row])
        assert plain.ended[row] or len(tokens) == 9
        assert STOP not in plain.answer(row)
        assert not plain.drawn[row, len(tokens) :].any()


def test_the_same_key_draws_the_same_and_another_does_not(model, plain) -> None:
    assert (drawn_from(model, OFTEN).tokens == plain.tokens).all()
    assert (drawn_from(model, OFTEN, key=jr.key(1)).tokens != plain.tokens).any()


def test_entropies_are_of_the_distribution_drawn_from(model, plain) -> None:
    logits = model(jnp.asarray(PROMPTS[1]))[-1]
    log_p = jax.nn.log_softmax(OFTEN.adjusted(logits[None], None)[0])
    assert plain.entropies[4:8, 0] == pytest.approx(float(-jnp.sum(jnp.exp(log_p) * log_p)), abs=1e-5)


def test_a_tools_reply_is_read_and_not_learned_from(model) -> None:
    replies: list[tuple[list[int], list[int]]] = []

    def reply(call: np.ndarray) -> np.ndarray:
        replies.append((call.tolist(), said := [20 + len(call), *[50] * (len(call) % 3)]))
        return np.asarray(said)

    rollouts = drawn_from(model, OFTEN, ToolCalls(CALL, reply, max_calls=2, max_tokens=3))
    assert len(replies) > 4
    calls = []
    for row in range(len(rollouts)):
        tokens, drawn = rollouts.tokens[row, : rollouts.length_of(row)], rollouts.drawn[row, : rollouts.length_of(row)]
        assert drawn.sum() <= 9
        begin = 0
        while (~drawn[begin:]).any():
            first = begin + int(np.argmin(drawn[begin:]))
            length = int(np.argmax(np.append(drawn[first:], True)))
            assert tokens[first - 1] == CALL
            calls.append((tokens[begin : first - 1].tolist(), tokens[first : first + length].tolist()))
            begin = first + length
    assert sorted(calls) == sorted(replies)
    batch = with_trainers(model, rollouts, OFTEN)
    assert np.sum(batch.loss_weights) == np.sum(rollouts.drawn)
    assert gap_of(batch).largest < 1e-5  # behind a reply, too: the cache holds what the trainer's row holds


def test_what_cannot_be_drawn_is_refused(model) -> None:
    with pytest.raises(ValueError, match="a prompt has 5 tokens, more than the 4 kept for prompts"):
        drawn_from(model, OFTEN, width=4)
    with pytest.raises(ValueError, match="pass the model's context of 64"):
        drawn_from(model, OFTEN, max_new_tokens=60)
    with pytest.raises(ValueError, match="greedy"):
        drawn_from(model, Sampler(temperature=0.0))
    with pytest.raises(ValueError, match="repetition penalty"):
        drawn_from(model, Sampler(repetition_penalty=1.1))


def test_another_model_is_noticed_and_the_token_shown(model, plain) -> None:
    def names(tokens: np.ndarray) -> list[str]:
        return [f"<{t}>" for t in tokens]

    check_gap(with_trainers(model, plain, OFTEN), 1e-4, names)
    with pytest.raises(GapError, match=r"sampler and trainer disagree: token '<\d+>' \(row \d+, after '(<\d+>)+'\)"):
        check_gap(with_trainers(tiny("qwen3", seed=1), plain, OFTEN), 1e-4, names)
    batch = with_trainers(model, plain, OFTEN)
    with pytest.raises(GapError, match="nan"):
        check_gap(batch._replace(old_log_probs=batch.old_log_probs * np.nan), 1e-4, names)


def test_a_left_out_answer_carries_no_weight(plain) -> None:
    advantages = np.ones(len(plain))
    advantages[3] = np.nan
    batch = policy_batch(plain, advantages, seq=20)
    assert not batch.loss_weights[3].any()
    assert not batch.advantages[3].any()
    with pytest.raises(ValueError, match="more than a row of 4 targets holds"):
        policy_batch(plain, advantages, seq=4)


def test_parts_hold_every_row_once(plain) -> None:
    batch = policy_batch(plain, np.arange(12.0), seq=20)
    parts = list(parts_of(batch, 3, (0, 1)))
    assert [len(part.tokens) for part in parts] == [4, 4, 4]
    assert sorted(part.advantages.max() for part in parts for part in [part]) == sorted(part.advantages.max() for part in parts)
    rows = np.concatenate([part.advantages.max(axis=1) for part in parts])
    assert sorted(rows) == list(range(12))


def test_a_batch_is_described() -> None:
    tokens = np.array([[4, 4, 9], [4, 9, -1], [4, 9, -1], [4, 4, 4], [9, -1, -1], [9, -1, -1]], np.int32)
    drawn = tokens >= 0
    rollouts = Rollouts(PROMPTS, 2, tokens, drawn, -1.0 * drawn, 0.5 * drawn, np.array([1, 1, 1, 0, 1, 1], bool))
    rewards = np.array([1.0, 1.0, 0.0, np.nan, 0.0, 1.0])
    told = describe(rollouts, rewards, {"right": rewards}, best=1.0)
    expected = {"reward": 0.6, "reward_std": np.sqrt(0.24), "groups_all_right": 1 / 3, "groups_all_wrong": 1 / 3, "left_out": 1 / 6}
    expected |= {"length": 2.0, "length_min": 1, "length_max": 3, "truncated": 1 / 6, "entropy": 0.5, "tokens_generated": 12}
    assert told == pytest.approx(expected | {"length_terminated": 9 / 5, "reward/right": 0.6})
