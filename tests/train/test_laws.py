"""Laws are found where they hold, and intervals hold what comes."""

import numpy as np
import pytest

from train.laws import Law, chosen, exponent, fit, foretold, valley

SIZES = [1e5, 2e5, 5e5, 1e6]


def test_a_law_is_found_from_points_on_it():
    """L = 1.2 + 30 / N^0.35."""
    found = fit(SIZES, Law("offset", 1.2, 30.0, 0.35).at(SIZES))
    np.testing.assert_allclose(found[1:], [1.2, 30.0, 0.35], rtol=1e-3)
    np.testing.assert_allclose(found.at(1e7), 1.2 + 30 / 1e7**0.35, rtol=1e-5)
    power = fit(SIZES, Law("power", 0.0, 5.0, 0.08).at(SIZES), "power")
    np.testing.assert_allclose(power[1:], [0.0, 5.0, 0.08], rtol=1e-3)


def test_neither_number_is_below_0():
    rising = fit(SIZES, [1.0, 1.1, 1.2, 1.3])
    assert (rising.scale, rising.floor) == (0.0, pytest.approx(1.15))
    straight = fit(SIZES, Law("power", 0.0, 5.0, 0.08).at(SIZES) - 0.0)
    assert straight.floor >= 0


def test_the_law_that_foretells_the_next_is_taken():
    for law in (Law("offset", 1.2, 300.0, 0.5), Law("power", 0.0, 5.0, 0.08)):
        found, off = chosen([5e4, *SIZES], law.at([5e4, *SIZES]))
        assert off[law.name] < 1e-4
        np.testing.assert_allclose(found.at(1e7), law.at(1e7), rtol=1e-3)
    few, off = chosen(SIZES[:2], [2.0, 1.9])
    assert (few.name, off) == ("power", {})


def test_the_interval_holds_what_comes_about_19_times_of_20():
    """A law with noise of 0.01, three runs at each of five sizes; 30 times a run at three times the largest is foretold."""
    law, rng, held, sizes = Law("offset", 1.2, 300.0, 0.5), np.random.default_rng(0), 0, np.repeat([5e4, *SIZES], 3)
    for trial in range(30):
        losses = law.at(sizes) + 0.01 * rng.normal(size=len(sizes))
        told = foretold(fit(sizes, losses), sizes, losses, 3e6, seed=trial)
        held += told.low <= law.at(3e6) + 0.01 * rng.normal() <= told.high
    assert 25 <= held <= 30


def test_too_few_sizes_are_refused_and_too_few_runs_give_no_interval():
    with pytest.raises(ValueError, match="a law offset has 3 numbers: expected losses of at least 3 different sizes"):
        fit([1e5, 1e5, 2e5], [2.0, 2.0, 1.9])
    told = foretold(fit(SIZES[:3], [2.0, 1.9, 1.8]), SIZES[:3], [2.0, 1.9, 1.8], 1e6)
    assert (told.low, told.interval) == (None, "none: 3 runs for 3 numbers")


def test_the_best_place_is_the_bottom_of_the_valley():
    """(log₂ x - 0.3)² has its bottom at 2^0.3, whatever three points of it are known; at an end there is no valley."""
    places = [2.0**k for k in (-2, -1, 0, 1, 2)]
    assert valley(places, [(k - 0.3) ** 2 for k in (-2, -1, 0, 1, 2)]) == pytest.approx(2**0.3)
    assert valley(places[::-1], [(k - 0.3) ** 2 for k in (2, 1, 0, -1, -2)]) == pytest.approx(2**0.3)
    assert valley(places, [1, 2, 3, 4, 5]) == pytest.approx(0.25)
    assert exponent({64: 0.02, 256: 0.01, 1024: 0.005}) == pytest.approx(-0.5)
