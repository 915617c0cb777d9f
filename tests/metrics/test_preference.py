"""Win rates, and the length-controlled one beside an independent fit."""

from __future__ import annotations

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


def test_scores_are_compared_by_their_sums() -> None:
    responses, references = np.array([4.0, 6.0, 5.0]), np.array([8.0, 8.0, 4.0])
    means = score_means(np.arange(3), responses, references)
    assert (means["ratio_of_sums"], means["mean_score"], means["mean_reference_score"]) == (75.0, 5.0, 20 / 3)
    low, high = means["ratio_of_sums_interval"]
    assert 50 <= low < 75 < high <= 125
    assert 4 <= means["mean_score_interval"][0] < 5 < means["mean_score_interval"][1] <= 6
    same = score_means(np.arange(3), np.full(3, 6.0), np.full(3, 8.0))
    assert (same["ratio_of_sums_interval"], same["mean_score_interval"]) == ([75, 75], [6, 6])
