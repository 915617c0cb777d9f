"""MiniLLM's surrogate: its gradient token by token, and against the exact one over all responses of a tiny language."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from dpkd_offline.training.losses import CLIP, minillm_loss, reverse_kl

LENGTHS = (5, 1, 2, 40, 1, 17)


def random_logps(seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student's, behavior's and teacher's log-probs, and reverse KLs, all [N]."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(4, sum(LENGTHS), generator=generator, dtype=torch.float64)
    student = -noise[0].abs() * 2 - 0.1
    behavior, teacher = student + 0.3 * noise[1], student + 1.5 * noise[2]
    student, behavior, teacher, kls = (x.to(dtype) for x in (student, behavior, teacher, noise[3].abs()))
    return student.requires_grad_(), behavior, teacher, kls.requires_grad_()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_gradient_equals_the_paper_s_token_by_token(dtype: torch.dtype, tolerance: float) -> None:
    clip = CLIP + 0.1
    student, behavior, teacher, kls = random_logps(1, dtype)
    loss = minillm_loss(student, behavior, teacher, kls, torch.tensor(LENGTHS), clip)
    assert loss.shape == student.shape
    assert loss.dtype == dtype
    gradients = torch.autograd.grad(loss.sum(), (student, kls))
    logps, clipped, start = [], 0, 0
    q, b, p = (x.tolist() for x in (student, behavior, teacher))
    for length in LENGTHS:
        for t in range(start, start + length):
            later = [p[i] - q[i] for i in range(t + 1, start + length)]
            r = sum(later) / len(later) if later else 0.0
            rho = math.exp(q[t] - b[t])
            clipped += rho > 1 + clip
            logps.append((-r * rho if rho <= 1 + clip else 0.0, min(rho, 1 + clip)))
        start += length
    assert 5 < clipped < len(logps) - 5
    for gradient, expected in zip(gradients, torch.tensor(logps, dtype=torch.float64).T, strict=True):
        torch.testing.assert_close(gradient.double(), expected, rtol=tolerance, atol=tolerance)


def test_short_responses_at_the_end_of_a_long_batch_keep_their_returns_in_float32() -> None:
    count = 40_000
    teacher = torch.full((count,), -0.1)
    teacher[-2:] = torch.tensor([-3.0, -2.0017])
    student = torch.full((count,), -1.0, requires_grad=True)
    lengths = torch.tensor([count - 2, 2])
    loss = minillm_loss(student, student.detach(), teacher, torch.zeros(count), lengths)
    gradient = torch.autograd.grad(loss.sum(), student)[0]
    torch.testing.assert_close(gradient[-2:], torch.tensor([1.0017, 0.0]), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(gradient[0].item(), -0.9, rtol=1e-5, atol=0.0)


def test_surrogate_is_finite_where_the_student_left_what_it_sampled() -> None:
    student = torch.tensor([-0.1, -200.0, -1.0], requires_grad=True)
    behavior, teacher = torch.tensor([-300.0, -0.1, -1.0]), torch.tensor([-1.0, -90.0, -2.0])
    loss = minillm_loss(student, behavior, teacher, torch.ones(3), torch.tensor([3]))
    assert torch.isfinite(loss).all()
    assert torch.isfinite(torch.autograd.grad(loss.sum(), student)[0]).all()


# --- A language of three tokens, 0 its end, whose responses can all be written down ---

TOKENS, END = 3, 0


def all_responses(longest: int) -> list[tuple[int, ...]]:
    """Those that end, and those that are cut at `longest` tokens."""
    return [
        (*start, last)
        for length in range(longest)
        for start in product(range(1, TOKENS), repeat=length)
        for last in (range(TOKENS) if length == longest - 1 else [END])
    ]


class Language:
    """A model: a row of free logits per context, float64."""

    def __init__(self, seed: int, longest: int) -> None:
        contexts = [start for length in range(longest) for start in product(range(1, TOKENS), repeat=length)]
        self.row = {context: n for n, context in enumerate(contexts)}
        generator = torch.Generator().manual_seed(seed)
        self.logits = torch.randn(len(contexts), TOKENS, generator=generator, dtype=torch.float64, requires_grad=True)

    def distributions(self, responses: list[tuple[int, ...]]) -> Tensor:
        """Log-probs of all tokens at each token of the responses: [N, 3]."""
        rows = [self.row[y[:t]] for y in responses for t in range(len(y))]
        return self.logits.log_softmax(-1)[rows]


def token_logps(distributions: Tensor, responses: list[tuple[int, ...]]) -> Tensor:
    return distributions.gather(-1, torch.tensor([[token] for y in responses for token in y])).squeeze(-1)


def response_logps(model: Language, responses: list[tuple[int, ...]]) -> Tensor:
    parts = token_logps(model.distributions(responses), responses).split([len(y) for y in responses])
    return torch.stack([part.sum() for part in parts])


def exact_gradient(student: Language, teacher: Language, responses: list[tuple[int, ...]]) -> Tensor:
    """Of KL(q‖p) = Σ_y q(y) log q(y)/p(y), by autograd."""
    q, p = response_logps(student, responses), response_logps(teacher, responses).detach()
    assert q.exp().sum().item() == pytest.approx(1.0)
    return torch.autograd.grad((q.exp() * (q - p)).sum(), student.logits)[0]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("longest", [1, 2])
def test_expected_gradient_is_that_of_the_reverse_kl_where_length_normalisation_does_nothing(
    seed: int, longest: int
) -> None:
    """With at most one later token, its mean is its sum, and the expectation over all responses is exact."""
    student, teacher = Language(seed, longest), Language(seed + 100, longest)
    responses = all_responses(longest)
    lengths = torch.tensor([len(y) for y in responses])
    q, p = student.distributions(responses), teacher.distributions(responses).detach()
    q_t, p_t = token_logps(q, responses), token_logps(p, responses)
    surrogate = minillm_loss(q_t, q_t.detach(), p_t, reverse_kl(q, p), lengths)
    probs = response_logps(student, responses).exp().detach().repeat_interleave(lengths)
    gradient = torch.autograd.grad((probs * surrogate).sum(), student.logits)[0]
    torch.testing.assert_close(gradient, exact_gradient(student, teacher, responses), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_single_step_and_long_part_without_normalisation_are_the_gradient_of_the_reverse_kl(seed: int) -> None:
    """The decomposition as it is read here, with the sum in place of the mean, on responses of up to three tokens."""
    student, teacher = Language(seed, 3), Language(seed + 100, 3)
    responses = all_responses(3)
    total = torch.zeros((), dtype=torch.float64)
    for y, prob in zip(responses, response_logps(student, responses).exp().tolist(), strict=True):
        q, p = student.distributions([y]), teacher.distributions([y]).detach()
        q_t, p_t = token_logps(q, [y]), token_logps(p, [y])
        for t in range(len(y)):
            r = (p_t - q_t)[t + 1 :].sum().detach()
            total = total + prob * ((q[t].exp() * (q[t] - p[t])).sum() - r * q_t[t])
    gradient = torch.autograd.grad(total, student.logits)[0]
    torch.testing.assert_close(gradient, exact_gradient(student, teacher, responses), rtol=1e-9, atol=1e-12)


def test_weights_correct_for_a_student_that_is_no_longer_the_one_that_sampled() -> None:
    """Responses of one token from a nearby student: the weighted expectation is the gradient of the trained one."""
    student, teacher, sampler = Language(1, 1), Language(101, 1), Language(1, 1)
    with torch.no_grad():
        sampler.logits += torch.tensor([[0.05, -0.1, 0.02]])
    responses = all_responses(1)
    q, p = student.distributions(responses), teacher.distributions(responses).detach()
    q_t, p_t = token_logps(q, responses), token_logps(p, responses)
    b_t = token_logps(sampler.distributions(responses), responses).detach()
    assert 1e-3 < (q_t - b_t).abs().max() < math.log(1 + CLIP)
    surrogate = minillm_loss(q_t, b_t, p_t, reverse_kl(q, p), torch.ones(len(responses), dtype=torch.long))
    gradient = torch.autograd.grad((b_t.exp() * surrogate).sum(), student.logits)[0]
    torch.testing.assert_close(gradient, exact_gradient(student, teacher, responses), rtol=1e-9, atol=1e-12)
