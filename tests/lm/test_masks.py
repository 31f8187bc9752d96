import jax.numpy as jnp
import numpy as np
import pytest

from lm.masks import Facts, default_facts, mask_picture, may_attend


def test_the_rule_written_out():
    facts = Facts(jnp.array([0, 1, 2, 0, 1, 0]), jnp.array([1, 1, 1, 2, 2, 0]))
    expected = np.array(
        [
            [1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0],
            [0, 0, 0, 1, 0, 0],
            [0, 0, 0, 1, 1, 0],
            [0, 0, 0, 0, 0, 1],  # padding sees itself, so that its softmax is one of something
        ],
        bool,
    )
    np.testing.assert_array_equal(may_attend(facts, facts), expected)


def test_a_window_of_one_is_the_token_itself_and_counts_it():
    facts = default_facts(jnp.zeros(5, jnp.int32))
    np.testing.assert_array_equal(may_attend(facts, facts, 1), np.eye(5, dtype=bool))
    np.testing.assert_array_equal(may_attend(facts, facts, 2), np.eye(5, dtype=bool) | np.eye(5, k=-1, dtype=bool))


@pytest.mark.parametrize("window", [0, -3])
def test_a_window_that_shows_nothing_is_refused(window):
    facts = default_facts(jnp.zeros(5, jnp.int32))
    with pytest.raises(ValueError, match=f"at least 1 .* got {window}"):
        may_attend(facts, facts, window)


def test_unwritten_slots_are_seen_by_nobody():
    queries = Facts(jnp.array([3]), jnp.array([1]))
    slots = Facts(jnp.array([0, 1, 2, 3, 0]), jnp.array([1, 1, 1, 1, -1]))
    np.testing.assert_array_equal(may_attend(queries, slots), [[True, True, True, True, False]])


def test_the_picture_is_the_rule():
    facts = Facts(jnp.array([0, 1, 2, 0, 1, 0]), jnp.array([1, 1, 1, 2, 2, 0]))
    expected = """\
1:0 □ · · · · ·
1:1 ■ □ · · · ·
1:2 · ■ □ · · ·
2:0 · · · □ · ·
2:1 · · · ■ □ ·
0:0 · · · · · □"""
    assert mask_picture(facts, window=2) == expected
    assert mask_picture(facts).splitlines()[2] == "1:2 ■ ■ □ · · ·"
    with pytest.raises(ValueError, match="a picture is of one row"):
        mask_picture(default_facts(jnp.zeros((2, 3), jnp.int32)))
