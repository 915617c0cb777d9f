"""The equations against formulas written again from the paper, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dpkd_offline.losses import dpkd_loss, implicit_reward, lm_loss

BETA = 0.3


def random_pairs(seed: int, count: int = 64) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    lengths = {name: random.integers(1, 200, count).astype(float) for name in ("t", "s")}
    logps = {f"{model}_{side}": -random.gamma(2.0, 1.5, count) * lengths[side] for model in "qp" for side in "ts"}
    return {**logps, "len_t": lengths["t"], "len_s": lengths["s"]}


def written_formula(x: dict[str, np.ndarray]) -> np.ndarray:
    """Eq. 9, term by term: -log sigmoid(h) as log(1 + exp(-h))."""
    h = BETA / x["len_t"] * (x["q_t"] - x["p_t"]) - BETA / x["len_s"] * (x["q_s"] - x["p_s"])
    return np.logaddexp(0.0, -h)


def written_gradient(x: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Eq. 11 of eq. 9 by hand: the weight is the probability of preferring the wrong response."""
    h = BETA / x["len_t"] * (x["q_t"] - x["p_t"]) - BETA / x["len_s"] * (x["q_s"] - x["p_s"])
    weight = 1.0 / (1.0 + np.exp(h))
    return -weight * BETA / x["len_t"], weight * BETA / x["len_s"]


def ours(x: dict[str, np.ndarray], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    t = {name: torch.tensor(value, dtype=dtype) for name, value in x.items()}
    q_t, q_s = t["q_t"].requires_grad_(), t["q_s"].requires_grad_()
    loss = dpkd_loss(q_t, q_s, t["p_t"], t["p_s"], t["len_t"], t["len_s"], BETA)
    return loss.losses, q_t, q_s


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_dpkd_equals_the_written_formula_and_its_gradient(seed: int, dtype: torch.dtype, tolerance: float) -> None:
    x = random_pairs(seed)
    losses, q_t, q_s = ours(x, dtype)
    losses.sum().backward()
    np.testing.assert_allclose(losses.detach(), written_formula(x), rtol=tolerance, atol=tolerance)
    for found, expected in zip((q_t.grad, q_s.grad), written_gradient(x), strict=True):
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def test_gradient_equals_autograd_of_the_formula_in_float64() -> None:
    x = random_pairs(9)
    losses, q_t, q_s = ours(x, torch.float64)
    found = torch.autograd.grad(losses.sum(), (q_t, q_s))
    t = {name: torch.tensor(value) for name, value in x.items()}
    a, b = t["q_t"].requires_grad_(), t["q_s"].requires_grad_()
    h = BETA / t["len_t"] * (a - t["p_t"]) - BETA / t["len_s"] * (b - t["p_s"])
    expected = torch.autograd.grad(torch.log1p(torch.exp(-h)).sum(), (a, b))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_teacher_equal_to_student_gives_ln_2() -> None:
    x = random_pairs(3)
    x["q_t"], x["q_s"] = x["p_t"], x["p_s"]
    losses, _, _ = ours(x, torch.float64)
    np.testing.assert_allclose(losses.detach(), math.log(2.0), rtol=1e-15)


def test_a_better_chosen_response_lowers_the_loss() -> None:
    x = random_pairs(4)
    before, _, _ = ours(x, torch.float64)
    after, _, _ = ours({**x, "q_t": x["q_t"] + 1.0}, torch.float64)
    assert (after < before).all()


def test_rewards_are_those_of_eq_29_by_length_and_carry_no_gradient() -> None:
    x = {name: torch.tensor(value) for name, value in random_pairs(5).items()}
    loss = dpkd_loss(x["q_t"].requires_grad_(), x["q_s"], x["p_t"], x["p_s"], x["len_t"], x["len_s"], BETA)
    torch.testing.assert_close(loss.chosen_rewards, BETA * (x["q_t"] - x["p_t"]).detach() / x["len_t"])
    torch.testing.assert_close(loss.rejected_rewards, implicit_reward(x["q_s"], x["p_s"], x["len_s"], BETA))
    assert not loss.chosen_rewards.requires_grad
    assert loss.losses.requires_grad


def test_lm_loss_is_the_mean_negative_log_prob() -> None:
    logps = torch.tensor([-1.0, -2.0, -6.0])
    assert lm_loss(logps).item() == pytest.approx(3.0)
