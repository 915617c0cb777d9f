"""The off-policy correction, where every response can be listed: the offline gradient beside Algorithm 1's."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.enumerated import LENGTHS, READ, VARIANTS, gradient, jacobian, kl, random_model, token_logps, train
from torch import Tensor

from dpkd_offline.training.losses import dpkd_loss, dpkd_sum_loss, off_policy_weights, scale_gradient

OURS = "token, at most 5"
BETA = 2.0


def expected_gradient(student: Tensor, behavior: Tensor, teacher: Tensor, corrected: bool, by_length: bool) -> Tensor:
    """Of the loss as it is trained, by autograd through its own code."""
    theta = student.clone().requires_grad_()
    q, p, b = token_logps(theta), token_logps(teacher), token_logps(behavior)
    rejected = scale_gradient(q, off_policy_weights(q, b)) if corrected else q
    y_t, y_s = torch.cartesian_prod(torch.arange(len(q)), torch.arange(len(q))).T
    pair = (q.sum(1)[y_t], rejected.sum(1)[y_s], p.sum(1)[y_t], p.sum(1)[y_s])
    losses = dpkd_loss(*pair, LENGTHS[y_t], LENGTHS[y_s], BETA) if by_length else dpkd_sum_loss(*pair, BETA)
    likely = (p.sum(1)[y_t] + b.sum(1)[y_s]).exp()
    (gradient,) = torch.autograd.grad((likely.detach() * losses).sum(), theta)
    return gradient


def moved(behavior: Tensor, teacher: Tensor) -> Tensor:
    """A student after some steps of Algorithm 1."""
    return train(behavior, teacher, BETA, None, steps=40, rate=0.5)


def test_every_response_is_there_once() -> None:
    assert token_logps(random_model(0)).sum(1).exp().sum().item() == pytest.approx(1, abs=1e-12)
    of_autograd = torch.autograd.functional.jacobian(token_logps, random_model(0))
    torch.testing.assert_close(jacobian(random_model(0)), of_autograd)


@pytest.mark.parametrize("corrected", [False, True])
def test_the_expected_gradient_of_the_loss_is_the_one_by_hand(corrected: bool) -> None:
    teacher, behavior = random_model(0), random_model(1)
    student = moved(behavior, teacher)
    by_hand, _ = gradient(student, behavior, teacher, BETA, OURS if corrected else "none")
    torch.testing.assert_close(expected_gradient(student, behavior, teacher, corrected, by_length=True), by_hand)


def test_a_weight_changes_no_value_and_has_no_gradient() -> None:
    q = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([-1.0, -1.0, -9.0], dtype=torch.float64)
    weights = off_policy_weights(q, b)
    torch.testing.assert_close(weights, torch.tensor([1, math.exp(-1), 5], dtype=torch.float64))
    scaled = scale_gradient(q, weights)
    assert torch.equal(scaled, q)
    (gradient,) = torch.autograd.grad((scaled**2).sum(), q)
    torch.testing.assert_close(gradient, 2 * q.detach() * weights)


def test_while_the_student_is_the_one_that_sampled_nothing_is_corrected() -> None:
    teacher, student = random_model(0), random_model(1)
    on_policy, _ = gradient(student, student, teacher, BETA, "none")
    torch.testing.assert_close(expected_gradient(student, student, teacher, True, by_length=True), on_policy)


def test_pushing_y_s_down_moves_nothing_on_average_whoever_sampled_it() -> None:
    student, behavior = random_model(0), random_model(0) + 0.2 * random_model(1)
    ratios = token_logps(student) - token_logps(behavior)
    assert 1 < ratios.exp().max() < 5  # none is clipped
    likely = token_logps(behavior).sum(1).exp()
    pushes = jacobian(student) * likely[:, None, None]
    assert pushes.sum((0, 1)).norm() > 0.05
    assert (pushes * off_policy_weights(token_logps(student), token_logps(behavior))[..., None]).sum(
        (0, 1)
    ).norm() < 1e-12


def test_a_student_that_is_the_teacher_stays_there() -> None:
    """The stationary point of eq. 9 with y_s of the student itself; of eq. 8 with those of any other, if corrected."""
    teacher = random_model(0)
    other = teacher + 0.2 * random_model(1)
    y = token_logps(teacher).sum(1)
    torch.testing.assert_close(dpkd_loss(y, y, y, y, LENGTHS, LENGTHS, BETA), torch.full_like(y, math.log(2)))
    assert expected_gradient(teacher, teacher, teacher, True, by_length=True).norm() < 1e-12
    assert expected_gradient(teacher, other, teacher, True, by_length=False).norm() < 1e-12
    assert expected_gradient(teacher, other, teacher, False, by_length=False).norm() > 0.05
    corrected, uncorrected = (
        expected_gradient(teacher, other, teacher, c, by_length=True).norm() for c in (True, False)
    )
    assert corrected < 0.25 * uncorrected


def test_the_correction_has_little_of_the_bias_and_little_of_the_variance() -> None:
    biases: dict[str, list[float]] = {name: [] for name in VARIANTS}
    deviations: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for seed in range(6):
        teacher, behavior = random_model(2 * seed), random_model(2 * seed + 1)
        student = moved(behavior, teacher)
        on_policy, deviation = gradient(student, student, teacher, BETA, "none")
        for name in VARIANTS:
            mean, own = gradient(student, behavior, teacher, BETA, name)
            biases[name].append(float((mean - on_policy).norm() / on_policy.norm()))
            deviations[name].append(own / deviation)
    bias = {name: sum(values) / len(values) for name, values in biases.items()}
    deviation = {name: sum(values) / len(values) for name, values in deviations.items()}
    assert bias["response, the whole pair"] < 1e-9 and deviation["response, the whole pair"] > 4  # exact and useless
    assert bias[OURS] < bias["none"] / 4
    assert bias[OURS] < bias["token, at most 1"] < bias["none"]
    assert bias[OURS] < bias["response, by length"]
    assert deviation[OURS] < 1.5
    assert all(bias[OURS] < bias[name] or deviation[OURS] < deviation[name] for name in VARIANTS if name != OURS)


def test_with_stored_responses_only_the_corrected_student_reaches_the_teacher() -> None:
    for seed in range(3):
        teacher, behavior = random_model(2 * seed), random_model(2 * seed + 1)
        start = kl(teacher, behavior)
        after = {
            variant: kl(teacher, train(behavior, teacher, BETA, variant, steps=400, rate=0.5))
            for variant in (None, OURS, "none")
        }
        assert after[None] < 0.02 * start
        assert after[OURS] < 0.05 * start
        assert after["none"] > 4 * after[OURS]


def test_the_padding_of_the_enumerated_model_counts_nothing() -> None:
    assert not token_logps(random_model(0))[~READ].any()
