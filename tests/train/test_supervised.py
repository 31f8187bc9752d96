"""The loss over supervised tokens: conversations side by side are conversations alone, pieces of a batch are the batch, and what is masked
teaches nothing."""

import json
from functools import lru_cache

import equinox as eqx
import grain
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from tiny import facts_of, logits_of, tiny

import lm
from data.chat import CHATML, ChatFormat
from data.chat_cache import chat_cache
from data.pipeline import batch_at
from data.rows import training_rows
from data.tokenizer import Tokenizer
from lm.flight import Flight
from train.losses import next_token
from train.step import StepConfig, init_state, make_step

SEQ = 61
# Keeps the gradient it was given, to be looked at, and changes nothing.
RECORDER = optax.GradientTransformationExtraArgs(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda gradient, state, params, *, learning_rate: (jax.tree.map(jnp.zeros_like, gradient), gradient),
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Nine conversations with answers of very different lengths."""
    tokenizer = Tokenizer.train(["what is the word for user assistant of \n"], 284).changed(chat_template=CHATML)
    talks = [[("what is " + "the " * (i % 3), "word" * (1 + 5 * (i % 2)))] * (1 + i % 2) for i in range(9)]
    rows = [
        {"messages": [m for q, a in talk for m in ({"role": "user", "content": q}, {"role": "assistant", "content": a})]} for talk in talks
    ]
    documents = grain.MapDataset.source([{"text": json.dumps(row), "name": str(i)} for i, row in enumerate(rows)])
    form = ChatFormat(tokenizer)
    return chat_cache(documents, form, tmp_path_factory.mktemp("cache"), source_digest="", split="train", seq=SEQ, overlong="truncate")


@pytest.fixture(scope="module")
def model():
    return tiny("llama", n_layers=1, vocab=284)


def whole_epoch(cache, packing):
    rows = training_rows(cache, seq=SEQ, seed=0, packing=packing).rows_per_epoch
    return batch_at(cache, 0, batch=rows, seq=SEQ, seed=0, packing=packing)


@lru_cache  # one step compiles once for all tests
def step_for(micro_batches, measured):
    config = StepConfig(micro_batches=micro_batches, clip_norm=1e9, ratios_every=0)
    return make_step(RECORDER, config, Flight(), lm.REFERENCE, jr.key(0), donate=False, measured=measured)


def gradient_and_metrics(model, batch, micro_batches=1, measured=True):
    state, metrics = step_for(micro_batches, measured)(init_state(model, RECORDER), batch, 0.0)
    return state.optimizer, metrics


def assert_close(one, other, rtol):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * float(np.abs(b).max()))


@pytest.fixture(scope="module")
def packed(cache, model):
    batch = whole_epoch(cache, "best_fit")
    return batch, *gradient_and_metrics(model, batch)


def test_conversations_that_share_a_row_teach_what_they_teach_alone(cache, model, packed) -> None:
    batch, gradient, metrics = packed
    alone = whole_epoch(cache, "pad")
    assert batch.segments.max() > 1 == alone.segments.max()
    assert len(batch.tokens) < len(alone.tokens) == 9
    other, told = gradient_and_metrics(model, alone)
    assert_close(gradient, other, 1e-5)  # fp32 sums in another order
    for name in ("loss", "tokens", "token_accuracy", "entropy", "tokens_read", "supervised_share"):
        np.testing.assert_allclose(metrics[name], told[name], rtol=1e-5, err_msg=name)
    assert told["padding_share"] > metrics["padding_share"] > 0


def test_micro_batches_of_unequal_answers_are_the_whole_batch(model, packed) -> None:
    batch, _, _ = packed
    rows = len(batch.tokens) // 2 * 2
    batch = jax.tree.map(lambda field: field[:rows], batch)
    halves = batch.loss_weights.reshape(2, -1).sum(axis=1)
    assert halves[0] != halves[1]  # a mean of means would be another
    one, two = (gradient_and_metrics(model, batch, k) for k in (1, 2))
    assert_close(two[0], one[0], 1e-5)
    assert_close(two[1], one[1], 1e-5)


def test_what_is_not_trained_on_has_no_gradient(model, packed) -> None:
    batch, gradient, _ = packed
    masked = batch.loss_weights == 0
    assert 0.3 < masked.mean() < 0.95
    others = batch._replace(targets=np.where(masked, (batch.targets + 7) % 284, batch.targets))
    assert_close(gradient_and_metrics(model, others)[0], gradient, 0)

    def total(hidden):
        return next_token(hidden, model.unembedding, jnp.asarray(batch.targets), jnp.asarray(batch.loss_weights), ops=lm.REFERENCE).total

    hidden = jr.normal(jr.key(0), (*batch.tokens.shape, 24))
    by_place = np.abs(jax.grad(total)(hidden)).sum(axis=-1)
    np.testing.assert_array_equal(by_place > 0, ~masked)


def test_accuracy_and_entropy_are_those_of_the_logits(model, packed) -> None:
    batch, gradient, metrics = packed
    log_probs = jax.nn.log_softmax(logits_of(model, jnp.asarray(batch.tokens), facts_of(batch)))
    counted = batch.loss_weights > 0
    entropy = -np.sum(np.exp(log_probs) * log_probs, axis=-1)[counted].mean()
    right = (np.argmax(log_probs, axis=-1) == batch.targets)[counted].mean()
    np.testing.assert_allclose(metrics["entropy"], entropy, rtol=1e-5)
    np.testing.assert_allclose(metrics["token_accuracy"], right, rtol=1e-6)
    assert metrics["supervised_share"] == pytest.approx(counted.sum() / (batch.segments > 0).sum())
    plain, told = gradient_and_metrics(model, batch, measured=False)
    assert_close(plain, gradient, 0)  # measuring changes nothing
    assert "entropy" not in told
    assert eqx.tree_equal(told["loss"], metrics["loss"])
