"""Confidence intervals beside figures worked out by hand or known from books."""

import math

import numpy as np
import pytest

from train.intervals import Z, bootstrap_ratio, clustered_ratio, mean_of_few, mean_of_groups, student_t, wilson


def test_wilson_is_where_the_share_is_z_standard_errors_away() -> None:
    """Its defining equation: (p̂ - p)² = Z² p(1 - p) / n at both ends."""
    for right, n in ((1, 10), (541, 1000), (7, 7), (0, 5)):
        found = wilson(right, n)
        for p in (found.low, found.high):
            assert (right / n - p) ** 2 == pytest.approx(Z**2 * p * (1 - p) / n, abs=1e-12)
    assert wilson(0, 5).low == 0
    assert wilson(7, 7).high == 1


def test_wilson_by_hand() -> None:
    """8 of 10: (0.8 + 0.19207 ± 1.95996 √(0.016 + 0.0096036)) / 1.38415."""
    found = wilson(8, 10)
    assert (found.value, found.n) == (0.8, 10)
    assert found.low == pytest.approx(0.4901625, abs=1e-6)
    assert found.high == pytest.approx(0.9433178, abs=1e-6)


def test_the_mean_of_groups_counts_each_group_the_same() -> None:
    found = mean_of_groups([90, 5], [100, 10])
    assert found.value == pytest.approx(0.7)  # not 95 of 110
    error = math.sqrt(0.9 * 0.1 / 100 + 0.5 * 0.5 / 10) / 2
    assert (found.low, found.high) == pytest.approx((0.7 - Z * error, 0.7 + Z * error))
    assert found.n == 110


def test_the_bootstrap_holds_the_truth_19_times_of_20() -> None:
    """Documents whose ratio is 2 by making: the interval should miss it in 5 % of draws; 12 of 120 is three standard errors off."""
    rng = np.random.default_rng(0)
    missed = 0
    for seed in range(120):
        bytes_ = rng.integers(50, 500, 60)
        bits = bytes_ * rng.normal(2.0, 0.5, 60)
        found = bootstrap_ratio(bits, bytes_, seed=seed)
        missed += not found.low <= 2.0 <= found.high
    assert 0 < missed <= 13


def test_the_bootstrap_is_near_the_law_of_large_numbers_and_repeats() -> None:
    rng = np.random.default_rng(3)
    bytes_ = np.full(400, 100)
    bits = rng.normal(150, 30, 400)
    found = bootstrap_ratio(bits, bytes_, seed=5)
    error = bits.std() / 100 / math.sqrt(400)
    assert found.value == pytest.approx(bits.sum() / 40_000)
    assert found.high - found.low == pytest.approx(2 * Z * error, rel=0.1)
    assert found == bootstrap_ratio(bits, bytes_, seed=5)


def test_one_document_has_no_interval() -> None:
    found = bootstrap_ratio([3.0], [2.0], seed=0)
    assert (found.value, found.low, found.high, found.interval) == (1.5, None, None, "none: one document")


@pytest.mark.parametrize(("right", "n"), [(3, 2), (-1, 2), (0, 0)])
def test_counts_that_cannot_be_are_refused(right: int, n: int) -> None:
    with pytest.raises(ValueError, match="expected 0 <= right <= n"):
        wilson(right, n)


@pytest.mark.parametrize(
    ("freedom", "t"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (10, 2.228), (30, 2.042), (2000, 1.961)]
)
def test_student_s_t_is_that_of_the_tables(freedom: int, t: float) -> None:
    assert student_t(freedom) == pytest.approx(t, abs=6e-4)


def test_the_mean_of_few_knows_how_few_they_are() -> None:
    """1, 2, 6: mean 3, variance (4 + 1 + 9) / 2 = 7, so 3 ± 4.3027 √(7/3)."""
    found = mean_of_few([1.0, 2.0, 6.0])
    reach = 4.3027 * math.sqrt(7 / 3)
    assert (found.value, found.low, found.high) == pytest.approx((3.0, 3 - reach, 3 + reach), rel=1e-4)
    assert mean_of_few([2.5]).low is None
    with pytest.raises(ValueError, match="expected at least one number"):
        mean_of_few([])


def test_the_clustered_ratio_counts_documents_and_not_what_is_in_them() -> None:
    """Sums 1, 3, 5 of 1, 2, 3: r = 9/6, missed by -1/2, 0, 1/2; variance 3/2 · 1/2 / 6² = 1/48."""
    found = clustered_ratio([1, 3, 5], [1, 2, 3])
    reach = 4.3027 / math.sqrt(48)
    assert (found.value, found.low, found.high, found.n) == pytest.approx((1.5, 1.5 - reach, 1.5 + reach, 3), rel=1e-4)
    assert clustered_ratio([2.0], [4.0]).low is None
    with pytest.raises(ValueError, match="not all 0"):
        clustered_ratio([1.0], [0.0])


def test_the_clustered_ratio_holds_the_truth_19_times_of_20_though_terms_hang_together() -> None:
    """Documents of 40 tokens whose differences share a part of the document's own: the interval of independent tokens would be far too
    short (the variance of a document's sum is 40² · 1 + 40 · 1 = 1640, and not 40 · 2)."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        tokens = rng.normal(0, 1, (30, 1)) + rng.normal(0, 1, (30, 40))
        found = clustered_ratio(tokens.sum(1), np.full(30, 40.0))
        held += found.low <= 0 <= found.high
        assert (found.high - found.low) > 3 * (2 * Z * tokens.std() / math.sqrt(tokens.size))
    assert 0.92 < held / 400 < 0.98
