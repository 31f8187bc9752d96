"""Advantages agree with values worked out by hand, the equation beside them."""

import numpy as np
import pytest

from train.advantages import RunningMean, dr_grpo, grpo, informative, overlong_penalty, reinforce, rloo

REWARDS = np.array([[1.0, 0.0, 0.0, 1.0], [2.0, 0.5, 0.0, 1.0]])
LEFT_OUT = np.array([[1.0, np.nan, 0.0, 0.0], [np.nan, np.nan, np.nan, 2.0]])


def test_reinforce_takes_one_baseline_from_all() -> None:
    np.testing.assert_allclose(reinforce(REWARDS, 0.25), [[0.75, -0.25, -0.25, 0.75], [1.75, 0.25, -0.25, 0.75]], atol=1e-12)


def test_the_running_mean_is_that_before_the_batch() -> None:
    baseline = RunningMean(decay=0.9)
    # First batch: its own mean, (2 + 3.5) / 8 = 0.6875.
    np.testing.assert_allclose(baseline.advantages(REWARDS), REWARDS - 0.6875, atol=1e-12)
    # Then 0.6875, and after it 0.9 · 0.6875 + 0.1 · 3 = 0.91875.
    np.testing.assert_allclose(baseline.advantages(np.full((2, 4), 3.0)), 3 - 0.6875, atol=1e-12)
    assert baseline.value == pytest.approx(0.91875, abs=1e-12)


def test_rloo_leaves_each_out_of_its_own_baseline() -> None:
    # First group: the other three of a 1 have mean 1/3, those of a 0 have 2/3.
    expected = [[1 - 1 / 3, -2 / 3, -2 / 3, 1 - 1 / 3], [2 - 1.5 / 3, 0.5 - 3 / 3, 0 - 3.5 / 3, 1 - 2.5 / 3]]
    np.testing.assert_allclose(rloo(REWARDS), expected, atol=1e-12)
    # n/(n-1) (r - mean)
    np.testing.assert_allclose(rloo(REWARDS), 4 / 3 * dr_grpo(REWARDS), atol=1e-12)


def test_grpo_divides_by_the_standard_deviation_of_the_group() -> None:
    # First group: mean 1/2, variance (4 · 1/4) / 3 = 1/3; second: mean 7/8, deviations 9/8, -3/8, -7/8, 1/8, variance (140/64) / 3.
    first, second = np.sqrt(1 / 3), np.sqrt(140 / 64 / 3)
    expected = [np.array([0.5, -0.5, -0.5, 0.5]) / (first + 1e-4), np.array([1.125, -0.375, -0.875, 0.125]) / (second + 1e-4)]
    np.testing.assert_allclose(grpo(REWARDS), expected, atol=1e-12)


def test_dr_grpo_only_centres() -> None:
    np.testing.assert_allclose(dr_grpo(REWARDS), [[0.5, -0.5, -0.5, 0.5], [1.125, -0.375, -0.875, 0.125]], atol=1e-12)


def test_what_is_left_out_takes_part_in_nothing() -> None:
    nan = np.nan
    # Of the first group 1, 0, 0 are left: mean 1/3, variance (4/9 + 1/9 + 1/9) / 2 = 1/3. The last answer of the second has no other.
    np.testing.assert_allclose(dr_grpo(LEFT_OUT), [[2 / 3, nan, -1 / 3, -1 / 3], [nan, nan, nan, 0]], atol=1e-12)
    np.testing.assert_allclose(rloo(LEFT_OUT), [[1, nan, -0.5, -0.5], [nan, nan, nan, 0]], atol=1e-12)
    scale = np.sqrt(1 / 3) + 1e-4
    np.testing.assert_allclose(grpo(LEFT_OUT), [[2 / 3 / scale, nan, -1 / 3 / scale, -1 / 3 / scale], [nan, nan, nan, 0]], atol=1e-12)


@pytest.mark.parametrize("advantages", [grpo, dr_grpo, rloo])
def test_equal_rewards_teach_nothing(advantages) -> None:
    assert not advantages(np.ones((2, 5))).any()
    assert not informative(np.array([[1.0, 1.0], [0.0, np.nan]])).any()
    assert informative(REWARDS).all()


def test_the_length_penalty_is_dapos() -> None:
    # most 10, buffer 4: up to 6 nothing; 8: (6 - 8) / 4; 10 and beyond: -1.
    np.testing.assert_allclose(overlong_penalty(np.array([1, 6, 8, 9, 10, 12]), 10, 4), [0, 0, -0.5, -0.75, -1, -1], atol=1e-12)
    with pytest.raises(ValueError, match=r"must lie in 1 … 10"):
        overlong_penalty(np.array([1]), 10, 11)
