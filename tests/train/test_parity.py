import numpy as np
import pytest

from train.parity import LIMIT, compare, compare_choices


def test_the_figures_are_those_worked_out_by_hand():
    # Two places, three tokens. Theirs are log-probabilities already; ours doubles one probability's logit and shifts the other place.
    theirs = np.log([[0.5, 0.25, 0.25], [0.2, 0.3, 0.5]])
    ours = np.log([[0.25, 0.5, 0.25], [0.2, 0.3, 0.5]]) + np.array([[0.0], [2.0]])
    found = compare("theirs", theirs, ours)
    assert found.places == 2
    assert found.max_difference == pytest.approx(2.0)
    assert found.mean_difference == pytest.approx((2 * np.log(2) + 3 * 2) / 6)
    assert found.largest_logit == pytest.approx(-np.log(0.2))
    assert found.top1_agreement == 0.5
    assert found.top5_agreement == 1.0
    # KL = 0.5 ln 2 - 0.25 ln 2 at the first place; a shift of all logits changes no probability at the second.
    assert found.kl == pytest.approx(0.25 * np.log(2) / 2)
    assert not found.passed


def test_the_limit_grows_with_logits_above_ten():
    theirs = np.array([[40.0, -1.0, 3.0]])
    assert compare("theirs", theirs, theirs + 3 * LIMIT).passed
    assert not compare("theirs", theirs, theirs + 5 * LIMIT).passed
    assert not compare("theirs", theirs / 4, theirs / 4 + 3 * LIMIT).passed


def test_what_is_no_number_is_not_compared():
    with pytest.raises(ValueError, match="the logits of ours cannot be compared: 1 of 2 are no finite number"):
        compare("theirs", np.zeros((1, 2)), np.array([[0.0, np.nan]]))


def test_choices_count_where_ours_is_clear():
    ours = np.array([[5.0, 0.0, 1.0], [0.0, 0.4, 0.1], [0.0, 3.0, 9.0]])  # clear, not clear, clear
    good = compare_choices("engine", [0, 2, 2], ours)
    assert (good.clear, good.clear_agreement, good.agreement) == (2, 1.0, pytest.approx(2 / 3))
    assert good.passed
    assert not compare_choices("engine", [0, 1, 1], ours).passed
    assert not compare_choices("engine", [1], ours[1:2]).passed  # nothing clear says nothing
