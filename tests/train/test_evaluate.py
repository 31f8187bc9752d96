"""Log-likelihoods from packed rows are those of each request run by itself."""

import jax
import numpy as np
import pytest
from tiny import logits_of, tiny

import lm
from data.requests import Request, RequestPlan
from lm.flight import Flight
from train.evaluate import Scorer, Speed


def requests_with_shared_contexts(vocab: int = 97) -> list[Request]:
    rng = np.random.default_rng(0)
    made = []
    for group in range(9):
        context = rng.integers(0, vocab, 1 + 3 * (group % 4)).astype(np.int32)
        made += [Request(context, rng.integers(0, vocab, 1 + i + group % 2).astype(np.int32)) for i in range(1 + group % 3)]
    return made


def alone(model, request: Request) -> tuple[float, bool]:
    """Σ log softmax(logits)[target] of one sequence, by hand."""
    tokens = np.append(request.context, request.continuation)
    padded = np.pad(tokens[:-1], (0, 25 - len(tokens)))  # what comes later changes nothing, and one length is one program
    logits = np.asarray(logits_of(model, padded))[len(request.context) - 1 : len(tokens) - 1]
    log_probs = np.asarray(jax.nn.log_softmax(logits))
    return float(log_probs[np.arange(len(request.continuation)), request.continuation].sum()), bool(
        (logits.argmax(axis=1) == request.continuation).all()
    )


@pytest.mark.parametrize(("family", "ops"), [("llama", "cpu"), ("gpt2", "reference"), ("gemma3_text", "cpu")])
def test_packed_is_one_at_a_time(family: str, ops: str) -> None:
    """Also with windows (Gemma 3), learned positions (GPT-2), and both ways attention is computed."""
    model = tiny(family)
    requests = requests_with_shared_contexts()
    context = requests[-1].context
    greedy = int(np.asarray(logits_of(model, np.pad(context, (0, 24 - len(context)))))[len(context) - 1].argmax())
    requests.append(Request(context, np.asarray([greedy], np.int32)))  # one that greedy decoding writes
    plan = RequestPlan(requests, batch_tokens=600)
    scorer, speed = Scorer(model, Flight(), lm.BACKENDS[ops], chunk=100), Speed()
    found = {}
    for i in range(len(plan)):
        found |= scorer(plan[i], speed)
    assert sorted(found) == list(range(len(requests)))
    for i, request in enumerate(requests):
        expected, likeliest = alone(model, request)
        assert found[i].log_likelihood == pytest.approx(expected, abs=2e-4)  # fp32, sums of up to four terms of about 5
        assert (found[i].tokens, found[i].greedy) == (len(request.continuation), likeliest)
    assert found[len(requests) - 1].greedy
    assert speed.tokens == sum(plan[i].real_tokens for i in range(len(plan)))
    assert 0 < speed.record()["real_share"] < 1


def test_rows_without_heads_are_scored_alike() -> None:
    model = tiny("llama")
    requests = [Request(np.asarray([3], np.int32), np.asarray(tokens, np.int32)) for tokens in ([5, 6, 7], [8], [5, 9])]
    plan = RequestPlan(requests, batch_tokens=256)
    assert plan[0].heads is None
    found = Scorer(model, Flight(), lm.BACKENDS["cpu"])(plan[0])
    for i, request in enumerate(requests):
        assert found[i].log_likelihood == pytest.approx(alone(model, request)[0], abs=2e-4)


def test_the_speed_leaves_out_what_compiled() -> None:
    speed = Speed()
    speed.add("a", 100, 200, 10.0)
    speed.add("a", 100, 200, 1.0)
    speed.add("b", 100, 100, 9.0)
    speed.add("b", 50, 100, 1.0)
    told = speed.record()
    assert told["tokens_per_s"] == 75.0
    assert told["tokens_per_s_with_compilation"] == pytest.approx(350 / 21)
    assert told["real_share"] == pytest.approx(350 / 600)
    assert Speed().record()["tokens_per_s"] is None
