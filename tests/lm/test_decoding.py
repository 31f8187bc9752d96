"""A state that is kept: read on, drawn from, taken back, it stands where one that reads everything at once would."""

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tiny import logits_of, tiny

import lm
from lm import decoding
from lm.decoding import begin, draw, extend, read, rewind, with_key
from lm.sampling import GREEDY, Sampler

TOKENS = np.random.default_rng(5).integers(0, 97, 47).tolist()
SLOTS = 61


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(decoding, "CHUNKS", (4, 16))


def all_read(model, state, tokens, room, ops=None):
    return list(read(model, state, tokens, room, ops))[-1][0]


def all_drawn(*arguments, **options):
    pieces = list(draw(*arguments, **options))
    return pieces[-1][0], [token for _, tokens in pieces for token in tokens]


WINDOWED = {"n_layers": 2, "window": 5, "layer_types": ("sliding_attention", "full_attention")}
KINDS = {"gpt2": {"n_layers": 2}, "gemma3_text": WINDOWED, "gpt_oss": {"n_layers": 2, "window": 4, "sliding": (True, False)}}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_read_in_chunks_taken_back_and_read_on_equals_the_full_forward(name, backend):
    """Two of them have layers with windows, shorter here than what is read at once, and full ones between."""
    model, ops = tiny(name, **KINDS[name]), lm.BACKENDS[backend]
    full = logits_of(model, jnp.asarray(TOKENS))
    state = all_read(model, begin(model, 1, SLOTS), TOKENS[:26], SLOTS, ops)  # 16 + 10 of 16
    np.testing.assert_allclose(state.logits[0], full[25], atol=2e-5)
    state = all_read(model, state, TOKENS[9:26], SLOTS - 26, ops)  # what is to be forgotten
    state = rewind(state, jnp.asarray(17))
    assert (int(state.positions[0]), int(state.cache[0].filled)) == (26, 26)
    state = all_read(model, state, TOKENS[26:29], SLOTS - 26, ops)
    np.testing.assert_allclose(state.logits[0], full[28], atol=2e-5)
    state = all_read(model, state, TOKENS[29:], SLOTS - 29, ops)
    np.testing.assert_allclose(state.logits[0], full[46], atol=2e-5)


def test_many_slots_are_read_block_by_block(monkeypatch):
    """The processor's own way through caches of more than two blocks; windows, and a chunk that begins inside a block."""
    monkeypatch.setattr(lm.kernels.kernels_cpu_attention, "SLOTS", 8)
    model = tiny("gemma3_text", **WINDOWED)
    full = logits_of(model, jnp.asarray(TOKENS))
    state = begin(model, 1, SLOTS)
    for first, last in ((0, 16), (16, 27), (27, 47)):
        state = all_read(model, state, TOKENS[first:last], SLOTS - first, lm.BACKENDS["cpu"])
        np.testing.assert_allclose(state.logits[0], full[last - 1], atol=2e-5)


def test_a_reply_goes_on_from_what_was_read_and_the_next_from_the_reply():
    model = tiny("llama", n_layers=2)
    whole = lm.generate(model, [TOKENS[:11]], max_new_tokens=9)[0]
    state = all_read(model, begin(model, 1, 64), TOKENS[:11], 64)
    state, drawn = all_drawn(model, state, GREEDY, 9)
    assert drawn == whole
    asked = [*TOKENS[:11], *whole, *TOKENS[20:25]]
    state = all_read(model, state, TOKENS[20:25], 64 - 20)
    _, again = all_drawn(model, state, GREEDY, 5)
    assert again == lm.generate(model, [asked], max_new_tokens=5)[0]


def test_drawing_ends_at_a_stop_id_which_is_read_and_reading_on_starts_anew():
    model = tiny("llama", n_layers=2)
    free = lm.generate(model, [TOKENS[:11]], max_new_tokens=9)[0]
    stop = free[5]
    state = all_read(model, begin(model, 1, 64), TOKENS[:11], 64)
    state, drawn = all_drawn(model, state, GREEDY, 9, stop_ids=[stop])
    assert drawn == free[: free.index(stop)]
    assert int(state.positions[0]) == 11 + len(drawn) + 1
    assert bool(state.done[0])
    state = all_read(model, state, [3], 20)
    assert not bool(state.done[0])
    np.testing.assert_allclose(state.logits[0], logits_of(model, jnp.asarray([*TOKENS[:11], *drawn, stop, 3]))[-1], atol=2e-5)


def test_a_penalty_sees_what_is_read_but_no_padding():
    model = tiny("llama", n_layers=2)
    state = with_key(begin(model, 1, 64), jr.key(0), penalised=[9, 8])
    state = extend(model, state, jnp.asarray([[5, 6, 0, 0]], jnp.int32), jnp.asarray(2))
    assert np.flatnonzero(state.seen[0]).tolist() == [5, 6, 8, 9]


def test_too_much_or_nothing_to_read_is_refused():
    model = tiny("llama", n_layers=2)
    for tokens, room in (([], 5), ([1, 2, 3], 2)):
        with pytest.raises(ValueError, match=f"{len(tokens)} tokens to read: expected at least 1, and no more than the {room}"):
            next(read(model, begin(model, 1, 8), tokens, room))


def test_a_cache_can_be_filled_to_its_last_slot():
    """There the last chunk has a length of its own."""
    model = tiny("llama", n_layers=2)
    state = all_read(model, begin(model, 1, 21), TOKENS[:18], 21)
    state = all_read(model, state, TOKENS[18:21], 3)
    np.testing.assert_allclose(state.logits[0], logits_of(model, jnp.asarray(TOKENS[:21]))[-1], atol=2e-5)


def test_samples_of_a_kept_state_follow_its_keys():
    model, sampler = tiny("llama", n_layers=2), Sampler(temperature=0.9)
    whole = lm.generate(model, [TOKENS[:9]], max_new_tokens=8, sampler=sampler, key=jr.key(3), seeds=[6])[0]
    state = all_read(model, begin(model, 1, 64), TOKENS[:9], 64)
    state = with_key(state, jr.fold_in(jr.key(3), 6))
    assert all_drawn(model, state, sampler, 8)[1] == whole
