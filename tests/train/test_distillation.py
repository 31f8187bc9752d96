"""Distillation: divergences agree with values worked out by hand; coarsened ones are true divergences; the chunked loss is the plain one,
with its gradient; pieces of a batch are the batch; the teacher is neither trained nor given away."""

import math
from functools import lru_cache

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from stepping import RECORDER, assert_close, copied, small
from tiny import facts_of, logits_of, packed_batch, tiny

import lm
from lm.flight import Flight
from train.chunked import over_chunks
from train.distillation import (
    Distillation,
    DistillationConfig,
    TaughtBatch,
    Teacher,
    coarsened,
    forward_kl,
    jensen_shannon,
    make_comparison,
    make_top_k,
    reverse_kl,
)
from train.step import StepConfig, init_state, make_step

BATCH = packed_batch(batch=4)
TOKENS, FACTS, TARGETS = jnp.asarray(BATCH.tokens), facts_of(BATCH), jnp.asarray(BATCH.targets)
KINDS = [{"kind": "forward"}, {"kind": "reverse"}, {"kind": "jsd", "beta": 0.3}]


def close(value, expected, atol=1e-6) -> None:
    np.testing.assert_allclose(value, expected, atol=atol)


# ------------------------------------------------------------------------------------------- divergences

P, Q = jnp.log(jnp.array([0.5, 0.25, 0.25])), jnp.log(jnp.array([0.25, 0.5, 0.25]))  # teacher, student


def test_divergences_by_hand() -> None:
    # KL(p‖q) = ½ log 2 + ¼ log ½ + 0
    close(forward_kl(Q, P), 0.25 * math.log(2))
    lopsided = jnp.log(jnp.array([0.9, 0.05, 0.05]))
    forward = 0.5 * math.log(0.5 / 0.9) + 2 * 0.25 * math.log(0.25 / 0.05)
    reverse = 0.9 * math.log(0.9 / 0.5) + 2 * 0.05 * math.log(0.05 / 0.25)
    close(forward_kl(lopsided, P), forward)
    close(reverse_kl(lopsided, P), reverse)
    # β = ¼: m = ¼ p + ¾ q = (5, 7, 4) / 16
    p, q, m = (0.5, 0.25, 0.25), (0.25, 0.5, 0.25), (5 / 16, 7 / 16, 4 / 16)
    kl = [sum(x * math.log(x / y) for x, y in zip(of, m, strict=True)) for of in (p, q)]
    close(jensen_shannon(Q, P, 0.25), 0.25 * kl[0] + 0.75 * kl[1])


def test_the_jensen_shannon_divergence_lies_between_the_two() -> None:
    rng = np.random.default_rng(0)
    student, teacher = (jax.nn.log_softmax(jnp.asarray(rng.normal(size=(5, 11)))) for _ in range(2))
    close(jensen_shannon(student, teacher, 0.5), jensen_shannon(teacher, student, 0.5))
    close(jensen_shannon(student, teacher, 1e-3) / 1e-3, forward_kl(student, teacher), atol=5e-3)
    close(jensen_shannon(student, teacher, 1 - 1e-3) / 1e-3, reverse_kl(student, teacher), atol=5e-3)
    close(jensen_shannon(student, student, 0.3), 0)


def test_k_tokens_and_the_rest_by_hand() -> None:
    logits = jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3]])) + 7  # any constant
    close(jnp.exp(coarsened(logits, jnp.array([[1, 3]]))), [[0.4, 0.3, 0.3]])


def test_a_coarsened_divergence_grows_to_the_whole_one() -> None:
    """Never negative, never above the whole one (data processing), equal to it where one token is left for the rest."""
    rng = np.random.default_rng(1)
    student, teacher = (jnp.asarray(rng.normal(size=(6, 9))) * 2 for _ in range(2))
    whole = forward_kl(jax.nn.log_softmax(student), jax.nn.log_softmax(teacher))
    found = []
    for k in (1, 4, 8):
        ids = jax.lax.top_k(teacher, k)[1]
        found.append(forward_kl(coarsened(student, ids), coarsened(teacher, ids)))
    assert (found[0] >= 0).all()
    assert (found[0] < found[1]).all()
    assert (found[1] < found[2]).all()
    close(found[2], whole, atol=1e-5)


def test_the_gradient_keeps_its_size_as_the_temperature_rises() -> None:
    """T² times KL at T: in the limit ½ Σ (z - v)² of logits without their means, over the vocabulary (arXiv:1503.02531, section 2.1)."""
    z, v = jnp.array([0.5, -1.0, 0.5]), jnp.array([1.0, 0.0, -1.0])
    slope = jax.grad(lambda x: 50.0**2 * forward_kl(jax.nn.log_softmax(x / 50), jax.nn.log_softmax(v / 50)))(z)
    close(slope, (z - v) / 3, atol=0.02)


# ------------------------------------------------------------------------------------------- the objective


# Of another family than the student, with a softcap of its own, and one that is packed.
TEACHER = Teacher(tiny("gemma2", seed=3, logit_softcap=4.0), Flight(), lm.REFERENCE)
PACKED = Teacher(lm.quantised(tiny("llama", seed=4, n_layers=1), "int8"), Flight(), lm.REFERENCE)


def distillation(teacher, *, chunk=1024, **config) -> Distillation:
    return Distillation(teacher, DistillationConfig(**config), Flight(), lm.REFERENCE, chunk)


def plainly(student, config: DistillationConfig):
    """The same from whole logits, by the definition."""
    z, v = (model(TOKENS, FACTS) for model in (student, TEACHER.model))
    log_q, log_p = (jax.nn.log_softmax(x / config.temperature, axis=-1) for x in (z, v))
    middle = jnp.log(config.beta * jnp.exp(log_p) + (1 - config.beta) * jnp.exp(log_q))

    def kl(a, b):
        return jnp.sum(jnp.exp(a) * (a - b), axis=-1)

    divergence = {
        "forward": lambda: kl(log_p, log_q),
        "reverse": lambda: kl(log_q, log_p),
        "jsd": lambda: config.beta * kl(log_p, middle) + (1 - config.beta) * kl(log_q, middle),
    }[config.kind]()
    value = (1 - config.next_token) * config.temperature**2 * divergence + config.next_token * nats(z)
    return jnp.sum(value * BATCH.loss_weights)


def nats(logits):
    """-log p(target)."""
    return -jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), TARGETS[..., None], axis=-1)[..., 0]


@pytest.mark.parametrize("settings", [KINDS[0] | {"next_token": 0.25}, KINDS[2]], ids=lambda each: each["kind"])
def test_the_chunked_loss_is_the_plain_one_with_its_gradient(settings) -> None:
    student = small()
    settings = settings | {"temperature": 2.0}
    objective = distillation(TEACHER, chunk=7, **settings)  # 52 tokens: 7 chunks and a half
    arrays, static = eqx.partition(student, eqx.is_inexact_array)

    @jax.jit
    def both(arrays):
        ours = jax.value_and_grad(lambda a: objective(eqx.combine(a, static), BATCH, None).loss.total)(arrays)
        theirs = jax.value_and_grad(lambda a: plainly(eqx.combine(a, static), objective.config))(arrays)
        return ours, theirs

    (total, gradient), (expected, expected_gradient) = both(arrays)
    close(total / expected, 1, atol=1e-5)
    assert_close(gradient, expected_gradient, 1e-4)


def test_the_gradient_of_a_frozen_unembedding_is_not_computed() -> None:
    def total(hidden, unembedding):
        def scores(logits, known, shared):
            return logits[:, 0] * known, {}

        weights = jnp.ones(5)
        return over_chunks(scores, hidden, unembedding, weights, weights, ops=lm.REFERENCE, chunk=3)[0]

    hidden, unembedding = jnp.ones((5, 24)), jnp.ones((97, 24))
    for trained, there in (((0, 1), True), ((0,), False)):
        program = str(jax.make_jaxpr(jax.grad(total, argnums=trained))(hidden, unembedding))
        assert (":f32[97,24] = dot_general" in program) is there


def test_a_student_that_is_the_teacher_has_nothing_to_learn() -> None:
    student = small()
    for settings in KINDS:
        told = eqx.filter_jit(distillation(Teacher(student, Flight(), lm.REFERENCE), **settings))(student, BATCH, None)
        close(told.loss.total / told.loss.count, 0, atol=1e-6)
        assert float(told.means["agreement"][0]) == float(told.loss.count) == BATCH.loss_weights.sum()


@lru_cache
def recorded(teacher="TEACHER", micro_batches=1, **config):
    """A step that hands out its gradient."""
    objective = distillation(teacher and globals()[teacher], **config)
    return make_step(
        RECORDER, StepConfig(micro_batches=micro_batches, clip_norm=1e9), Flight(), lm.REFERENCE, jr.key(5), objective=objective
    )


def gradient(step, batch):
    state, metrics = step(init_state(copied(small()), RECORDER), batch, 0.0)
    return state.optimizer, metrics


def test_pieces_of_a_batch_are_the_batch() -> None:
    whole, told = gradient(recorded(), BATCH)
    pieces, told_of_pieces = gradient(recorded(micro_batches=4), BATCH)
    assert_close(pieces, whole, 1e-5)
    for name in ("loss", "divergence", "next_token", "agreement", "tokens"):
        close(told_of_pieces[name], told[name], atol=1e-5)


def test_packed_is_alone() -> None:
    """Each document of the packed rows in a row of its own."""
    alone = [np.zeros((12, 13), field.dtype) for field in BATCH]
    row = 0
    for packed in range(4):
        for document in (1, 2, 3):
            there = BATCH.segments[packed] == document
            for field, of in zip(alone, BATCH, strict=True):
                field[row, : there.sum()] = of[packed, there]
            alone[3][row, : there.sum()] = 1
            row += 1
    together, told = gradient(recorded(), BATCH)
    apart, told_apart = gradient(recorded(), type(BATCH)(*alone))
    assert_close(apart, together, 1e-5)
    close(told_apart["loss"], told["loss"])


def test_the_teacher_stays_as_it_was_and_may_be_packed() -> None:
    before = copied(PACKED)
    gradient(recorded("PACKED"), BATCH)
    assert eqx.tree_equal(before, PACKED)  # and its arrays are still there


# ------------------------------------------------------------------------------------------- k tokens, kept


def taught(teacher, k, temperature=1.0) -> TaughtBatch:
    return TaughtBatch(*BATCH, *make_top_k(k, temperature, 97, chunk=7)(teacher, BATCH))


def test_what_is_kept_is_what_the_teacher_says() -> None:
    batch = taught(TEACHER, 5, temperature=2.0)
    log_p = jax.nn.log_softmax(logits_of(TEACHER.model, TOKENS, FACTS) / 2.0, axis=-1)
    ids = jax.lax.top_k(log_p, 5)[1]
    np.testing.assert_array_equal(batch.ids, ids)
    rest = jnp.log1p(-jnp.sum(jnp.exp(jnp.take_along_axis(log_p, ids, axis=-1)), axis=-1))
    close(batch.log_probs[..., :5], jnp.take_along_axis(log_p, ids, axis=-1), atol=4e-3)  # fp16 has 11 bits, and these numbers are below 8
    close(batch.log_probs[..., 5], rest, atol=4e-3)
    assert batch.log_probs.dtype == np.float16


def test_all_tokens_but_one_kept_are_the_teacher_itself() -> None:
    online, _ = gradient(recorded(), BATCH)
    offline, _ = gradient(recorded(None), taught(TEACHER, 96))
    assert_close(offline, online, 5e-3)  # fp16


def test_few_tokens_kept_teach_less_but_the_same_way() -> None:
    _, told = gradient(recorded(), BATCH)
    _, told_by_few = gradient(recorded(None), taught(TEACHER, 8))
    assert 0 < told_by_few["divergence"] < told["divergence"]
    close(told_by_few["agreement"], told["agreement"])
    close(told_by_few["next_token"], told["next_token"], atol=1e-5)


def test_a_teacher_and_what_it_said_are_not_given_together() -> None:
    for teacher, batch in ((TEACHER, taught(TEACHER, 2)), (None, BATCH)):
        with pytest.raises(ValueError, match="give either a teacher and a Batch, or a TaughtBatch"):
            distillation(teacher)(small(), batch, None)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": 0.0}, "temperature: .*greater than 0"),
        ({"kind": "jsd", "beta": 1.0}, "beta: .*less than 1"),
        ({"next_token": 1.0}, "next_token: .*less than 1"),
    ],
)
def test_impossible_settings_are_refused(settings, words) -> None:
    with pytest.raises(ValueError, match=words):
        DistillationConfig(**settings)


def test_k_must_leave_a_rest() -> None:
    with pytest.raises(ValueError, match="top-k must be from 1 to one less than the vocabulary, 96; got 97"):
        make_top_k(97, 1.0, 97)


def test_a_comparison_counts_what_the_models_say() -> None:
    student = small()
    found = make_comparison(Flight(), lm.REFERENCE, chunk=7)(student, TEACHER, BATCH)
    z, v = (logits_of(model, TOKENS, FACTS) for model in (student, TEACHER.model))
    log_q, log_p = (jax.nn.log_softmax(x, axis=-1) for x in (z, v))
    close(found["kl"], jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1), atol=1e-5)
    close(found["nats"], nats(z), atol=1e-5)
    close(found["teacher_nats"], nats(v), atol=1e-5)
    close(found["agreement"], log_q.argmax(-1) == log_p.argmax(-1))
