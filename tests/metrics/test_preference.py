"""Win rates, and the length-controlled one beside an independent fit."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from dpkd_offline.metrics.preference import (
    RIDGE,
    Array,
    Comparison,
    fit_length_regression,
    score_means,
    warnings_of,
    win_rates,
)

Lengths = tuple[list[int], list[int]]


def comparison(first: Array, second: Array | None = None, length_a: object = 9, length_b: object = 9) -> Comparison:
    count = len(first)
    lengths = [np.broadcast_to(np.asarray(length), count) for length in (length_a, length_b)]
    return Comparison(np.arange(count), first, first if second is None else second, *lengths)


def lengths_of(count: int, seed: int) -> tuple[Array, Array]:
    """Characters of two models' responses, of which the first writes more: it does in four of five pairs."""
    draw = np.random.default_rng(seed)
    return draw.normal(420, 90, count).round(), draw.normal(300, 80, count).round()


def test_a_win_is_one_in_both_orders_and_a_tie_counts_half() -> None:
    first = np.array([0.9, 0.8, 0.2, 0.5, 1.0, 0.2, 0.1, 0.3])
    second = np.array([0.6, 0.4, 0.1, 0.9, 0.0, 0.5, 0.2, 0.9])
    rates = win_rates(comparison(first, second))
    assert (rates["wins"], rates["losses"], rates["ties"]) == pytest.approx((12.5, 25, 62.5))
    assert rates["win_rate"] == pytest.approx(43.75)
    assert rates["order_disagreement"] == pytest.approx(37.5)
    assert rates["preference"] == pytest.approx(100 * np.mean([0.75, 0.6, 0.15, 0.7, 0.5, 0.35, 0.15, 0.6]))
    low, high = rates["win_rate_interval"]
    assert low < 43.75 < high
    assert win_rates(comparison(first, second)) == rates
    assert win_rates(comparison(first[:1]))["win_rate_interval"] is None  # of a single prompt


def test_a_judge_that_cannot_tell_gives_no_win() -> None:
    first, second = np.repeat([0.2, 0.5, 0.8], 3), np.tile([0.2, 0.5, 0.8], 3)
    assert comparison(first, second).outcome.tolist() == [0, *[0.5] * 7, 1]


def test_two_prompts_have_an_interval() -> None:
    """Their resamples are of one alone, or of both."""
    assert win_rates(comparison(np.array([1.0, 0.0])))["win_rate_interval"] == [0, 100]


def test_responses_to_a_prompt_are_drawn_together() -> None:
    """Ten seeds of one prompt say no more than one of them does, if they say the same."""
    outcomes = np.array([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    alone = win_rates(comparison(outcomes))["win_rate_interval"]
    ten = Comparison(np.repeat(np.arange(6), 10), *(np.repeat(outcomes, 10),) * 2, *(np.full(60, 9),) * 2)
    assert win_rates(ten)["win_rate_interval"] == alone


@pytest.mark.parametrize("seed", range(3))
def test_the_regression_is_that_of_another_optimiser(seed: int) -> None:
    draw = np.random.default_rng(seed)
    x, weights = draw.uniform(-1, 1, 80), draw.integers(0, 4, (3, 80)).astype(float)
    y = 1 / (1 + np.exp(-(0.7 + 1.5 * x + draw.normal(0, 1, 80))))
    y[::3] = y[::3].round()
    ours = fit_length_regression(x, y, weights)
    for row, fit in zip(weights, ours, strict=True):
        theirs = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([theirs], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

        def loss(row: Array = row, theirs: torch.Tensor = theirs) -> torch.Tensor:
            z = theirs[0] + theirs[1] * torch.from_numpy(x)
            bce = torch.nn.functional.binary_cross_entropy_with_logits
            total = bce(z, torch.from_numpy(y), weight=torch.from_numpy(row), reduction="sum")
            return total + (torch.from_numpy(RIDGE) * theirs**2).sum() / 2

        def closure(loss=loss, optimizer=optimizer):  # type: ignore[no-untyped-def]
            optimizer.zero_grad()
            value = loss()
            value.backward()
            return value

        optimizer.step(closure)
        assert fit == pytest.approx(theirs.detach().numpy(), abs=1e-5)
    assert fit_length_regression(x, y, weights, start=np.array([3.0, -9.0])) == pytest.approx(ours, abs=1e-8)


def test_each_fit_ends_where_it_would_alone_wherever_it_starts() -> None:
    """Few pairs that are won or lost: a whole step of Newton's goes too far."""
    for seed in range(3):
        draw = np.random.default_rng(seed)
        x, y, weights = draw.uniform(-1, 1, 7), draw.integers(0, 2, 7), draw.integers(1, 4, (3, 7)).astype(float)
        alone = [fit_length_regression(x, y, row[None])[0] for row in weights]
        for start in (None, *map(np.array, itertools.product((-20.0, -5.0, 5.0, 20.0), repeat=2))):
            assert fit_length_regression(x, y, weights, start) == pytest.approx(np.array(alone), abs=1e-8)


@pytest.mark.parametrize(
    ("a", "b", "preference", "is_decided"),
    [
        ([9, 5, 8], [3, 6, 2], [1, 0, 1], True),
        ([9, 5, 8], [3, 6, 2], [0, 1, 0], True),  # by the shorter
        ([9, 5, 8], [3, 6, 8], [1, 0, 0.5], True),
        ([9, 5, 8], [3, 6, 8], [1, 0, 1], False),
        ([9, 5, 8], [3, 6, 2], [1, 0, 0], False),
        ([9, 5, 8], [3, 6, 2], [0.9, 0.1, 0.9], False),
        ([9, 8, 8], [3, 6, 2], [1, 1, 1], False),  # or by the model
        ([3, 6, 2], [9, 8, 8], [0, 0, 0], False),
    ],
)
def test_whether_length_decides(a: list[int], b: list[int], preference: list[float], is_decided: bool) -> None:
    assert comparison(np.array(preference), length_a=a, length_b=b).is_decided_by_length is is_decided


def test_a_length_difference_is_in_standard_deviations() -> None:
    def difference(a: list[int]) -> list[float]:
        return comparison(np.ones(2), length_a=a, length_b=10).length_difference.tolist()  # type: ignore[no-any-return]

    assert difference([10, 11]) == pytest.approx([0, math.tanh(2)])  # of half a character
    assert difference([30, 50]) == pytest.approx([math.tanh(2), math.tanh(4)])
    assert difference([10, 10]) == [0, 0]
    assert np.isnan(difference([12, 12])).all()


def test_what_length_alone_explains_is_taken_out() -> None:
    """A judge that prefers the longer response, and two that do so with doubts that grow with the difference."""
    for seed in range(3):
        a, b = lengths_of(300, seed)
        certain = (1 + np.sign(a - b)) / 2
        difference = np.tanh((a - b) / (a - b).std())
        unsure = [1 / (1 + np.exp(-slope * difference)) for slope in (3, 20)]
        for first in (certain, *unsure):
            pairs = comparison(first, length_a=a, length_b=b)
            rates = win_rates(pairs)
            assert rates["win_rate"] > 80
            assert rates["controlled_win_rate"] == pytest.approx(50, abs=0.5)
            assert any("length" in warning for warning in warnings_of(pairs, rates))


def test_what_length_does_not_explain_stays() -> None:
    a, b = lengths_of(400, 0)
    draw = np.random.default_rng(1)
    better = comparison((draw.random(400) < 0.75).astype(float), length_a=a, length_b=b)
    rates = win_rates(better)
    assert rates["controlled_win_rate"] == pytest.approx(75, abs=7)
    low, high = rates["controlled_win_rate_interval"]
    assert low < rates["controlled_win_rate"] < high < low + 20
    assert warnings_of(better, rates) == []


def test_odd_cases_have_numbers_or_none() -> None:
    ones = np.ones(50)
    a, b = lengths_of(50, 0)
    assert win_rates(comparison(ones, length_a=a, length_b=b))["win_rate_interval"] == [100, 100]
    even = win_rates(comparison(0.5 * ones, length_a=a, length_b=b))
    assert [even["controlled_win_rate"], *even["controlled_win_rate_interval"]] == pytest.approx([50] * 3, abs=1e-6)
    assert 95 < win_rates(comparison(ones, length_a=a, length_b=b))["controlled_win_rate"] <= 100
    assert win_rates(comparison(ones))["controlled_win_rate"] > 95  # of equal lengths always
    shifted = comparison(ones, length_a=12, length_b=9)
    rates = win_rates(shifted)
    assert (rates["controlled_win_rate"], rates["controlled_win_rate_interval"]) == (None, None)
    assert "nothing is said of equal lengths" in warnings_of(shifted, rates)[0]
    lopsided = comparison(ones, length_a=b + 500, length_b=b - a % 7)
    assert any("longer in 100% of all pairs" in text for text in warnings_of(lopsided, win_rates(lopsided)))
    doubts = comparison(np.full(50, 0.55), length_a=a, length_b=b)
    (warning,) = warnings_of(doubts, win_rates(doubts))
    assert warning.startswith("the judge is unsure: A wins 100.0 %") and "55.0 %" in warning
    by_order = comparison(ones, 0 * ones, length_a=a, length_b=b)
    (warning,) = warnings_of(by_order, win_rates(by_order))
    assert warning.startswith("the judge goes by the order: in 100 % of the pairs")


EVEN: Lengths = ([9] * 20, [9] * 20)
ORDER = (
    "the judge goes by the order: in 50 % of the pairs it prefers whichever response stands first, or whichever "
    "stands second. They count as ties; a larger judge may do better"
)
BY_LENGTH = "length alone decides every pair: the judge says nothing of anything else"
SHIFTED = "the lengths of A and B always differ by the same, so that nothing is said of equal lengths"
MUCH = (
    "length decides much here: A wins {}, and 50.0 % where both are equally long; {} gains by its lengths (mean 120 "
    "characters of A, 80 of B). Trust the second number"
)
UNSURE = (
    "the judge is unsure: A wins 60.5 %, which counts a verdict however likely it is, but the judge prefers A by "
    "55.0 % on average, and by 50.0 % where both are equally long"
)
LONGER = "the responses of {} are longer in 95% of all pairs: what is said of equal lengths is hardly seen in them"


@pytest.mark.parametrize(
    ("rates", "lengths", "sentences"),
    [
        ({"order_disagreement": 49.9}, EVEN, []),
        ({"order_disagreement": 50.0}, EVEN, [ORDER]),
        ({"controlled_win_rate": None}, EVEN, [SHIFTED]),
        ({"preference": 60.0, "win_rate": 60.0}, EVEN, []),
        ({"preference": 60.5, "win_rate": 75.0}, EVEN, [MUCH.format("75.0 %", "A")]),
        ({"preference": 39.5, "win_rate": 30.0}, EVEN, [MUCH.format("30.0 %", "B")]),
        ({"preference": 55.0, "win_rate": 60.5}, EVEN, [UNSURE]),
        ({}, ([12] * 18 + [9] * 2, [9] * 20), []),
        ({}, ([12] * 19 + [9], [9] * 20), [LONGER.format("A")]),
        ({}, ([9] * 20, [12] * 19 + [9]), [LONGER.format("B")]),
        ({"controlled_win_rate": None}, ([12] * 20, [9] * 20), [SHIFTED]),
    ],
)
def test_what_is_said_of_win_rates_and_lengths(rates: dict[str, Any], lengths: Lengths, sentences: list[str]) -> None:
    """With a judge that is half sure of all pairs, whatever the rates say."""
    even = {"win_rate": 50.0, "preference": 50.0, "controlled_win_rate": 50.0, "order_disagreement": 0.0}
    a, b = lengths
    pairs = comparison(np.full(20, 0.75), length_a=a, length_b=b)
    assert warnings_of(pairs, {**even, "mean_length": {"a": 120.0, "b": 80.0}, **rates}) == sentences


def test_it_is_said_where_length_decides_every_pair() -> None:
    a, b = np.array([90, 20, 70, 20]), np.array([50, 60, 30, 60])
    pairs = comparison((1 + np.sign(a - b)) / 2, length_a=a, length_b=b)
    assert warnings_of(pairs, win_rates(pairs)) == [BY_LENGTH]


def test_scores_are_compared_by_their_sums() -> None:
    responses, references = np.array([4.0, 6.0, 5.0]), np.array([8.0, 8.0, 4.0])
    means = score_means(np.arange(3), responses, references)
    assert (means["ratio_of_sums"], means["mean_score"], means["mean_reference_score"]) == (75.0, 5.0, 20 / 3)
    low, high = means["ratio_of_sums_interval"]
    assert 50 <= low < 75 < high <= 125
    assert 4 <= means["mean_score_interval"][0] < 5 < means["mean_score_interval"][1] <= 6
    same = score_means(np.arange(3), np.full(3, 6.0), np.full(3, 8.0))
    assert (same["ratio_of_sums_interval"], same["mean_score_interval"]) == ([75, 75], [6, 6])
