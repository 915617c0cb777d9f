from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from dpkd_offline.metrics.intervals import Difference, interval_of_mean, interval_over_seeds

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


@pytest.mark.parametrize("n", [3, 9, 40])
def test_an_interval_is_of_percentiles_of_2000_means_as_far_out_as_students_t(n: int) -> None:
    values = np.random.default_rng(n).exponential(2.0, n)
    drawn = np.random.default_rng(0).integers(0, n, (2000, n))
    beyond = float(stats.norm.sf(math.sqrt(n / (n - 1)) * stats.t.isf(0.025, n - 1)))
    expected = np.quantile(values[drawn].mean(1), [beyond, 1 - beyond])
    assert interval_of_mean(values) == pytest.approx(tuple(expected), rel=1e-12)


def test_an_interval_of_two_values_is_from_one_to_the_other() -> None:
    assert interval_of_mean([3.0, 1.0]) == (1.0, 3.0)
    assert interval_of_mean([True, False]) == (0.0, 1.0)


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


def test_an_interval_over_seeds_and_prompts_holds_the_mean_as_often_as_it_says() -> None:
    """Where seeds differ more and less than prompts; that over prompts alone fails where they do."""
    draw = np.random.default_rng(0)
    for seeds, between_seeds, between_prompts, noise in ((2, 1.0, 0.2, 0.5), (3, 0.3, 1.0, 1.0), (5, 0.0, 0.2, 1.0)):
        held = over_prompts = 0
        for _ in range(60):
            values = between_seeds * draw.normal(size=(seeds, 1)) + noise * draw.normal(size=(seeds, 40))
            values += between_prompts * (draw.exponential(size=(1, 40)) - 1)
            low, high = interval_over_seeds(values) or (0.0, 0.0)
            held += low <= 0 <= high
            low, high = interval_of_mean(values.mean(0)) or (0.0, 0.0)
            over_prompts += low <= 0 <= high
        assert held >= 50, (seeds, between_seeds, held)
        if between_seeds == 1.0:
            assert over_prompts < 30


def test_an_interval_over_seeds_and_prompts_is_of_their_variances() -> None:
    """On a balanced normal sample it is mean ± t √(V seeds + V prompts), with Satterthwaite's degrees of freedom."""
    draw = np.random.default_rng(1)
    values = draw.normal(size=(6, 1)) + draw.normal(size=(1, 300)) + draw.normal(size=(6, 300))
    of_seeds, of_prompts = (float(np.var(np.mean(values, axis=a), ddof=1)) / n for a, n in ((1, 6), (0, 300)))
    freedom = (of_seeds + of_prompts) ** 2 / (of_seeds**2 / 5 + of_prompts**2 / 299)
    reach = float(stats.t.ppf(0.975, freedom)) * math.sqrt(of_seeds + of_prompts)
    low, high = interval_over_seeds(values) or (0.0, 0.0)
    assert (high - low) / 2 == pytest.approx(reach, rel=0.15)
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.3 * reach)
    assert interval_over_seeds(values[:1]) == interval_of_mean(values[0])
    assert interval_over_seeds(np.full((3, 5), 2.0)) == (2.0, 2.0)
    difference = Difference.of(values[0], values + 3)
    assert difference.prompts == 300 and difference.word(1) == "better"


def test_where_only_prompts_or_only_seeds_differ_the_interval_is_wide_by_their_variance(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ten zeros and ones, half and half. A mean of ten draws is below 0.2 in 1.1 % of resamples, and 0.2 or below in
    5.5 %, so that 0.2 and 0.8 are the percentiles. The variance of a resample's mean is 0.5² / 10, that of the mean
    0.5² / 9, and t of 9 degrees of freedom is 2.262 where a normal distribution has 1.960."""
    monkeypatch.setattr("dpkd_offline.metrics.intervals.RESAMPLES", 50_000)
    halves = np.array([0.0, 1.0] * 5)
    reach = 0.3 * math.sqrt(10 / 9) * 2.2622 / 1.9600
    for values in (np.tile(halves, (4, 1)), np.tile(halves[:, None], (1, 4))):
        assert interval_over_seeds(values) == pytest.approx((0.5 - reach, 0.5 + reach), abs=0.003)


def test_an_interval_over_seeds_is_always_the_same_and_of_one_prompt_that_of_its_values() -> None:
    values = np.random.default_rng(3).normal(size=(3, 8))
    assert interval_over_seeds(values) == interval_over_seeds(values)
    assert interval_over_seeds(values[:, :1]) == interval_of_mean(values[:, 0])


def test_the_interval_of_a_share_stays_within_0_and_1() -> None:
    shares = np.repeat([[0.02], [0.3]], 40, axis=1)  # two seeds that are far apart
    shares[:, 0], shares[:, 1] = 0, 1
    assert interval_over_seeds(shares) == (0, 1)


def test_an_interval_that_ends_at_zero_tells_nothing() -> None:
    signs = {(0.0, 2.0): 0, (-2.0, 0.0): 0, (-1.0, 1.0): 0, (0.1, 2.0): 1, (-2.0, -0.1): -1}
    assert {interval: Difference(0.0, interval, 9).sign for interval in signs} == signs
