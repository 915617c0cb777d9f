from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from dpkd_offline.metrics.intervals import Difference, interval_of_mean

Draw = Callable[[np.random.Generator, int], npt.NDArray[np.float64]]
SHAPES: dict[str, tuple[Draw, float]] = {  # and the mean that they are drawn with
    "normal": (lambda rng, n: rng.normal(5.0, 2.0, n), 5.0),
    "like Rouge-L, most of it low": (lambda rng, n: 100 * rng.beta(0.8, 5.0, n), 100 * 0.8 / 5.8),
}


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_intervals_hold_the_mean_as_often_as_they_say(shape: str) -> None:
    """Of 63 prompts, as the demo has: 1,000 times, where the mean is known."""
    draw, mean = SHAPES[shape]
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(1000):
        low, high = interval_of_mean(draw(rng, 63)) or (0.0, 0.0)
        held += low <= mean <= high
    assert 930 <= held <= 970


@pytest.mark.slow
def test_a_difference_that_is_not_there_is_seldom_called_one() -> None:
    rng = np.random.default_rng(1)
    called = 0
    for _ in range(1000):
        easy = rng.normal(0, 10, 63)  # some prompts are, for both models
        before, after = (easy + 100 * rng.beta(0.8, 5.0, 63) for _ in range(2))
        called += Difference.of(before, after).sign != 0
    assert called <= 60


def test_an_interval_is_about_that_of_students_t_and_always_the_same() -> None:
    for n in (10, 63, 3000):
        values = np.random.default_rng(2).normal(1.0, 3.0, n)
        expected = stats.t.interval(0.95, n - 1, values.mean(), stats.sem(values))
        interval = interval_of_mean(values)
        assert interval == pytest.approx(expected, abs=0.15 * (expected[1] - expected[0]))
        assert interval_of_mean(list(values)) == interval


def test_what_has_no_interval() -> None:
    assert interval_of_mean([3.0]) is None
    assert interval_of_mean([3.0, 3.0, 3.0]) == (3.0, 3.0)
    assert Difference.of([1.0], [2.0]).word(1) == "cannot tell on 1 prompts"


def test_a_difference_is_paired_and_said_in_a_word() -> None:
    rng = np.random.default_rng(3)
    before = rng.normal(20, 15, 63)  # prompts differ far more than the models do
    after = before + rng.normal(1, 1, 63)
    difference = Difference.of(before, after)
    assert difference.mean == pytest.approx(float((after - before).mean()))
    assert difference.interval is not None and difference.interval[0] > 0
    assert (difference.word(1), difference.word(-1)) == ("better", "worse")
    assert Difference.of(after, before).word(1) == "worse"
    assert Difference.of(before, before + rng.normal(0, 1, 63)).word(1) == "cannot tell on 63 prompts"
