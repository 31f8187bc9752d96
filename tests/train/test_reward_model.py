"""Rewards learned from preferences: the loss by hand, one number a text however the rows are laid out, learning, and the files."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from stepping import RECORDER, assert_close, copied
from tiny import tiny

import lm
from lm.base import leaves_by_path
from lm.flight import Flight
from train.optimizers import OptimizerConfig, build_optimizer
from train.reward_model import (
    HEAD_FILE,
    RewardBatch,
    RewardConfig,
    RewardModel,
    last_tokens,
    load_reward_model,
    make_rewards,
    pair_metrics,
    reward_objective,
    save_reward_model,
    text_rewards,
    write_head,
)
from train.step import StepConfig, init_state, make_step


def rewarding(name="llama", seed=0, **changes):
    """A reward model whose head is not zero."""
    model = RewardModel.of(tiny(name, **({"n_layers": 1} | changes)))
    return replace(model, head=jr.normal(jr.key(seed), model.head.shape))


def rows(texts, width, gap=0):
    """A row a text, padded on the right."""
    tokens, positions, segments = (np.zeros((len(texts), width + gap), np.int32) for _ in range(3))
    for row, text in enumerate(texts):
        tokens[row, : len(text)], positions[row, : len(text)], segments[row, : len(text)] = text, np.arange(len(text)), 1
    return RewardBatch(tokens, positions, segments)


def packed(texts, width):
    """Two texts a row, one behind the other."""
    batch = rows([np.concatenate(texts[i : i + 2]) for i in range(0, len(texts), 2)], width)
    for row, (first, second) in enumerate(zip(texts[::2], texts[1::2], strict=True)):
        end = len(first) + len(second)
        batch.positions[row, len(first) : end] = np.arange(len(second))
        batch.segments[row, len(first) : end] = 2
    return batch


TEXTS = [np.random.default_rng(3).integers(1, 97, length) for length in (5, 3, 2, 6, 4, 4)]

# ------------------------------------------------------------------------------------------- the loss


class Given:
    """In the place of a model: the value at each token is known."""

    def __init__(self, values):
        self.given, self.aux_weights = jnp.asarray(values, jnp.float32), {}

    @property
    def base(self):
        return self

    def hidden(self, tokens, facts, key=None):
        return self.given[..., None], None, {}

    def values(self, hidden):
        return hidden[..., 0]


# Pairs (1, -0.5) and (0.25, 0.75); 9 stands where a value must not count: before the end of a text, and in padding.
A_ROW_A_TEXT = [[9, 1, 9], [9, 9, -0.5], [0.25, 9, 9], [9, 0.75, 9]], [[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 0]]
PACKED = [[9, 1, 9, 9, -0.5, 9, 9], [0.25, 9, 0.75, 9, 9, 9, 9]], [[1, 1, 2, 2, 2, 0, 0], [1, 2, 2, 0, 0, 0, 0]]


@pytest.mark.parametrize("layout", [A_ROW_A_TEXT, PACKED])
def test_the_loss_of_a_batch_by_hand(layout) -> None:
    values, segments = layout
    segments = np.asarray(segments, np.int32)
    objective = reward_objective(RewardConfig(margin=0.25, centre=0.5))
    told = objective(Given(values), RewardBatch(segments, segments, segments), jr.key(0))
    # -log σ(r_w - r_l - m) + λ (r_w + r_l)²
    expected = -math.log(1 / (1 + math.exp(-1.25))) - math.log(1 / (1 + math.exp(0.75))) + 0.5 * (0.5**2 + 1.0**2)
    np.testing.assert_allclose(told.loss.total, expected, atol=1e-6)
    assert told.loss.count == 2
    means = {name: float(total / count) for name, (total, count) in told.means.items()}
    assert means == pytest.approx({"accuracy": 0.5, "margin": 0.5, "rewards_chosen": 0.625, "rewards_rejected": 0.125}, abs=1e-6)


def test_equal_rewards_are_half_right() -> None:
    told = pair_metrics(jnp.array([1.0, 2.0, 0.0]), jnp.array([1.0, 1.0, 3.0]))
    assert told["accuracy"].tolist() == [0.5, 1, 0]


def test_texts_are_found_in_reading_order() -> None:
    segments = jnp.array([[1, 1, 2, 0, 0], [1, 2, 3, 3, 3], [0, 0, 0, 0, 0]])
    assert np.argwhere(last_tokens(segments)).tolist() == [[0, 1], [0, 2], [1, 0], [1, 1], [1, 4]]
    rewards, there = text_rewards(jnp.arange(15.0).reshape(3, 5), segments)
    assert len(rewards) == 16  # 15 tokens, made even: chosen and rejected ones are every other
    assert rewards[there].tolist() == [1, 2, 5, 6, 9]


# ------------------------------------------------------------------------------------------- one number a text


def test_a_text_is_worth_the_same_alone_padded_and_packed() -> None:
    model, rewards = rewarding(), make_rewards(Flight(), lm.REFERENCE)
    alone = np.concatenate([rewards(model, rows([text], len(text))) for text in TEXTS])
    assert np.std(alone) > 0.1  # else nothing could be told
    for batch in (rows(TEXTS, 6), rows(TEXTS, 6, gap=7), packed(TEXTS, 11), packed(TEXTS, 13)):
        np.testing.assert_allclose(rewards(model, batch), alone, atol=1e-5)
    assert len(rewards(model, RewardBatch(*(np.zeros((2, 5), np.int32) for _ in range(3))))) == 0


def test_every_flight_gives_the_same_number_and_the_head_stays_fp32() -> None:
    model, batch = rewarding(n_layers=3), packed(TEXTS, 11)
    plain = make_rewards(Flight(), lm.REFERENCE)(model, batch)
    np.testing.assert_allclose(make_rewards(Flight(layers="scan", remat="full"), lm.REFERENCE)(model, batch), plain, atol=1e-5)
    rounded = make_rewards(Flight(dtype="bfloat16"), lm.REFERENCE)(model, batch)
    assert rounded.dtype == np.float32
    assert 0 < np.max(np.abs(rounded - plain)) < 0.1 * np.max(np.abs(plain))


def test_a_fresh_head_knows_nothing_and_the_loss_is_log_2() -> None:
    model = RewardModel.of(tiny("qwen3", n_layers=1))
    told = reward_objective(RewardConfig())(model, rows(TEXTS, 6), jr.key(0))
    np.testing.assert_allclose(told.loss.total / told.loss.count, math.log(2), atol=1e-6)


# ------------------------------------------------------------------------------------------- learning


def step_of(optimizer, **config):
    return make_step(
        optimizer, StepConfig(**config), Flight(), lm.REFERENCE, jr.key(0), objective=reward_objective(RewardConfig(centre=0.1))
    )


def test_micro_batches_and_packing_give_the_gradient_of_the_whole_batch() -> None:
    """A mean over three pairs, taken one by one, and two texts to a row."""
    gradients = []
    for batch, pieces in ((rows(TEXTS, 6), 1), (rows(TEXTS, 6), 3), (packed(TEXTS, 11), 1)):
        state, metrics = step_of(RECORDER, micro_batches=pieces, clip_norm=1e6)(init_state(rewarding(), RECORDER), batch, 0.1)
        assert metrics["tokens"] == 3  # pairs
        gradients.append(state.optimizer)
    for other in gradients[1:]:
        assert_close(
            {"blocks": other.base.blocks, "head": other.head}, {"blocks": gradients[0].base.blocks, "head": gradients[0].head}, 1e-4
        )


def test_it_learns_which_of_two_texts_has_the_word_that_is_liked() -> None:
    """Token 5 somewhere in the chosen text, token 6 in the rejected one, other tokens at random: chance at first, then all are told apart,
    also pairs never seen."""
    rng = np.random.default_rng(0)

    def pairs(count):
        texts = rng.integers(10, 97, (2 * count, 6)).astype(np.int32)
        texts[np.arange(2 * count), rng.integers(0, 6, 2 * count)] = np.tile([5, 6], count)
        return rows(list(texts), 6)

    optimizer = build_optimizer(OptimizerConfig(name="adamw", weight_decay=0.0))
    model = RewardModel.of(tiny("llama", n_layers=1))
    step, unseen, rewards = step_of(optimizer), pairs(32), make_rewards(Flight(), lm.REFERENCE)
    assert pair_metrics(*(jnp.asarray(rewards(model, unseen)[i::2]) for i in (0, 1)))["accuracy"].mean() == 0.5
    state = init_state(copied(model), optimizer, trainable=model.trained())
    assert not any("unembed" in path for path in leaves_by_path(state.trainable))
    for _ in range(30):
        state, metrics = step(state, pairs(16), 0.01)
    assert metrics["loss"] < 0.2
    found = rewards(state.model, unseen)
    assert np.mean(found[::2] > found[1::2]) > 0.95
    np.testing.assert_array_equal(state.model.base.unembed.weight, model.base.unembed.weight)


def test_only_adapters_and_the_head_are_trained_where_asked() -> None:
    model = RewardModel.of(lm.add_lora(tiny("llama", n_layers=1), rank=2, alpha=4.0, targets=("attn.q_proj",), key=jr.key(0)))
    state = init_state(model, RECORDER, trainable=model.trained(lm.trainable_filter(model.base)))
    assert {path.rpartition("/")[2] for path in leaves_by_path(state.trainable)} == {"down", "up", "head"}


# ------------------------------------------------------------------------------------------- files


def test_what_is_saved_comes_back_exactly(tmp_path) -> None:
    model, rewards = rewarding("qwen3"), make_rewards(Flight(), lm.REFERENCE)
    save_reward_model(model, tmp_path / "it")
    again = load_reward_model(tmp_path / "it")
    assert jax.tree.structure(again) == jax.tree.structure(model)
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(rewards(again, rows(TEXTS, 6)), rewards(model, rows(TEXTS, 6)))
    assert load_file(tmp_path / "it" / HEAD_FILE)["score.weight"].shape == (1, 24)
    save_reward_model(model, tmp_path / "half", dtype=jnp.bfloat16)
    half = load_reward_model(tmp_path / "half", dtype=jnp.float32)
    assert half.base.embed.weight.dtype == half.head.dtype == jnp.float32
    np.testing.assert_array_equal(half.head, model.head)


def test_a_head_that_is_missing_torn_or_anothers_is_refused_in_words(tmp_path) -> None:
    model = rewarding("qwen3")
    lm.save_pretrained(model.base, tmp_path / "it")
    with pytest.raises(FileNotFoundError, match=r"reward_head\.safetensors does not exist: expected the folder of a reward model"):
        load_reward_model(tmp_path / "it")
    write_head(model.head, tmp_path / "it")
    whole = (tmp_path / "it" / HEAD_FILE).read_bytes()
    (tmp_path / "it" / HEAD_FILE).write_bytes(whole[:-8])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        load_reward_model(tmp_path / "it")
    save_file({"score.weight": np.zeros((1, 7), np.float32)}, tmp_path / "it" / HEAD_FILE)
    with pytest.raises(ValueError, match=r"has shape \(1, 7\); the model beside it has a width of 24"):
        load_reward_model(tmp_path / "it")
    save_file({"weight": np.zeros((1, 24), np.float32)}, tmp_path / "it" / HEAD_FILE)
    with pytest.raises(ValueError, match=r"holds weight; expected score\.weight"):
        load_reward_model(tmp_path / "it")
    (tmp_path / "it" / HEAD_FILE).write_bytes(whole)
    lm.save_pretrained(tiny("qwen3", seed=1, n_layers=1), tmp_path / "it")
    with pytest.raises(ValueError, match="was trained on other weights than those beside it"):
        load_reward_model(tmp_path / "it")


def test_a_head_is_whole_or_not_there(tmp_path, monkeypatch) -> None:
    model = rewarding("qwen3")
    save_reward_model(model, tmp_path)
    before = (tmp_path / HEAD_FILE).read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("train.reward_model.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_head(model.head + 1, tmp_path)
    assert (tmp_path / HEAD_FILE).read_bytes() == before
    assert not list(tmp_path.glob(".*"))
