import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tiny import logits_of, tiny

import lm
from lm.generate import Sampler


@pytest.fixture(params=["gpt2", "llama", "qwen3"])
def model(request):
    return tiny(request.param, n_layers=2)  # of many programs here, each layer is in each


PROMPTS = [[5], [17, 3, 60, 4, 9], [1, 2, 3]]


def greedy_by_full_forward(model, prompt, n):
    tokens = list(prompt)
    for _ in range(n):
        row = jnp.array(tokens + [0] * (16 - len(tokens)))  # one length, one program: a token does not see later ones (test_model)
        tokens.append(int(jnp.argmax(logits_of(model, row)[len(tokens) - 1])))
    return tokens[len(prompt) :]


def test_greedy_decoding_equals_the_full_forward_on_a_ragged_batch(model):
    together = lm.generate(model, PROMPTS, max_new_tokens=8)
    assert together == [greedy_by_full_forward(model, prompt, 8) for prompt in PROMPTS]


def test_a_stream_gives_what_generate_gives(model):
    sampler = Sampler(temperature=0.8, top_k=20)
    whole = lm.generate(model, [PROMPTS[1]], max_new_tokens=11, sampler=sampler, key=jr.key(3))[0]
    assert list(lm.stream(model, PROMPTS[1], max_new_tokens=11, sampler=sampler, key=jr.key(3), chunk=4)) == whole
    assert lm.generate(model, [PROMPTS[1]], max_new_tokens=11, sampler=sampler, key=jr.key(4))[0] != whole


def test_rows_end_at_their_stop_id_and_the_others_go_on(model):
    free = lm.generate(model, PROMPTS, max_new_tokens=8)
    stop = free[1][3]
    stopped = lm.generate(model, PROMPTS, max_new_tokens=8, stop_ids=[stop])
    for whole, cut in zip(free, stopped, strict=True):
        assert cut == (whole[: whole.index(stop)] if stop in whole else whole)
    assert len(stopped[1]) <= 3
    assert list(lm.stream(model, PROMPTS[1], max_new_tokens=8, stop_ids=[stop])) == stopped[1]


def test_samples_follow_the_truncated_distribution():
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.15, 0.06, 0.04]]))
    keys = jr.split(jr.key(0), 4000)

    def frequencies(sampler):
        drawn = jax.jit(jax.vmap(lambda key: sampler(logits, key[None])[0]))(keys)
        return np.bincount(np.asarray(drawn), minlength=5) / len(keys)

    # Three standard deviations of a frequency near 0.5 over 4,000 draws are 0.024.
    np.testing.assert_allclose(frequencies(Sampler()), [0.5, 0.25, 0.15, 0.06, 0.04], atol=0.03)
    np.testing.assert_allclose(frequencies(Sampler(top_k=2)), [2 / 3, 1 / 3, 0, 0, 0], atol=0.03)
    np.testing.assert_allclose(frequencies(Sampler(top_p=0.8)), [5 / 9, 2.5 / 9, 1.5 / 9, 0, 0], atol=0.03)
    squared = np.array([0.5, 0.25, 0.15, 0.06, 0.04]) ** 2
    np.testing.assert_allclose(frequencies(Sampler(temperature=0.5)), squared / squared.sum(), atol=0.03)
    np.testing.assert_allclose(frequencies(Sampler(min_p=0.25)), [5 / 9, 2.5 / 9, 1.5 / 9, 0, 0], atol=0.03)  # 0.125 and more
    np.testing.assert_allclose(
        frequencies(Sampler(logit_bias=((0, -np.inf), (3, np.log(2))))), np.array([0, 25, 15, 12, 4]) / 56, atol=0.03
    )
    assert frequencies(Sampler(temperature=0.0))[0] == 1
    assert frequencies(Sampler(temperature=0.0, logit_bias=((4, 10.0),)))[4] == 1
    assert frequencies(Sampler(top_p=0.01))[0] == 1  # never fewer than one token


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"prompts": [[1], []]}, "at least one token"),
        ({"prompts": [[1, 97]]}, r"0 … 96"),
        ({"max_new_tokens": 64}, "context of 64"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"sampler": Sampler()}, "needs key"),
        ({"sampler": Sampler(0.0, logit_bias=((97, 1.0),))}, r"logit_bias names tokens outside 0 … 96.*97"),
        ({"n": 0}, "n .continuations of each prompt. must be at least 1"),
        ({"seeds": [1, 2]}, "one for each of the 1 rows"),
    ],
)
def test_bad_requests_are_refused_in_words(call, words):
    arguments = {"prompts": [[1]], "max_new_tokens": 4} | call
    with pytest.raises(ValueError, match=words):
        lm.generate(tiny("llama"), arguments.pop("prompts"), **arguments)


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"logit_bias": ((3, float("nan")),)},
        {"logit_bias": ((3, float("inf")),)},
    ],
)
def test_impossible_samplers_are_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        Sampler(**setting)


def test_a_penalty_makes_seen_tokens_less_likely_whatever_their_sign():
    logits, seen = jnp.array([[2.0, 2.0, -1.0, -1.0]]), jnp.array([[True, False, True, False]])
    np.testing.assert_allclose(Sampler(repetition_penalty=2.0).adjusted(logits, seen), [[1.0, 2.0, -2.0, -1.0]])


def test_a_penalty_sees_the_prompt_and_what_was_drawn_but_no_padding():
    model = tiny("llama")
    sampler = Sampler(temperature=0.0, repetition_penalty=1e4)  # a seen token is as good as forbidden
    drawn = lm.generate(model, PROMPTS, max_new_tokens=20, sampler=sampler)
    for prompt, row in zip(PROMPTS, drawn, strict=True):
        assert len({*prompt, *row}) == len(prompt) + 20
    # The prompts are padded with token 0, and it is not in them: it may be drawn.
    padded = lm.generate(model, [[5]], max_new_tokens=1, sampler=Sampler(0.0, repetition_penalty=1e4, logit_bias=((0, 1e4),)))
    assert padded == [[0]]


def test_several_samples_of_a_prompt_are_those_drawn_one_by_one():
    model, sampler = tiny("qwen3"), Sampler(temperature=0.9, repetition_penalty=1.3)
    together = lm.generate(model, PROMPTS[:2], max_new_tokens=7, sampler=sampler, key=jr.key(3), n=3)
    assert len(together) == 6
    assert len({tuple(row) for row in together[:3]}) == 3
    for i, row in enumerate(together):
        alone = lm.generate(model, [PROMPTS[i // 3]], max_new_tokens=7, sampler=sampler, key=jr.key(3), seeds=[i])
        assert alone == [row]
    assert list(lm.stream(model, PROMPTS[1], max_new_tokens=7, sampler=sampler, key=jr.key(3), seed=4)) == together[4]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_every_backend_draws_the_same_tokens(name):
    """One row goes through products made for few rows, nine rows through those made for many; prompts of unlike lengths."""
    model = tiny(name, n_layers=1)
    for prompts in ([[5, 3, 9]], [list(range(1, 3 + i)) for i in range(9)]):
        drawn = [lm.generate(model, prompts, max_new_tokens=6, ops=lm.BACKENDS[backend]) for backend in ("reference", "cpu", "xla")]
        assert drawn[0] == drawn[1] == drawn[2]
        assert all(len(row) == 6 for row in drawn[0])


def test_a_fresh_cache_is_one_nothing_was_written_to():
    model = tiny("llama", n_layers=1)
    cache = model.empty_cache((1,), 16)
    assert cache[0].fresh
    _, cache, _ = model.hidden(jnp.asarray([[1, 2, 3]]), cache=cache)
    assert not cache[0].fresh
