"""A language model so small that every response can be listed: expectations over responses are sums, in float64.

A response ends with EOS (token 0) or after LONGEST tokens. Parameters are logits that depend on the token before and on
the position, so that responses share them as those of a real model do. Legend: Y responses, T positions, P parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

VOCABULARY, LONGEST = 4, 4
PARAMETERS = VOCABULARY * (VOCABULARY + LONGEST)
RESPONSES = [
    (*body, last)
    for length in range(1, LONGEST + 1)
    for body in product(range(1, VOCABULARY), repeat=length - 1)
    for last in (range(VOCABULARY) if length == LONGEST else [0])
]
LENGTHS = torch.tensor([len(y) for y in RESPONSES])  # [Y]
READ = torch.arange(LONGEST) < LENGTHS[:, None]  # [Y, T], where there is a token
TOKENS = torch.tensor([[*y, *[0] * (LONGEST - len(y))] for y in RESPONSES])  # [Y, T]
BEFORE = torch.cat([torch.zeros(len(TOKENS), 1, dtype=torch.long), TOKENS[:, :-1]], 1)  # [Y, T]; 0 starts a response
POSITIONS = torch.arange(LONGEST).expand_as(TOKENS)


def _all_logps(theta: Tensor) -> Tensor:
    """Log-probs of every token at every place: [Y, T, V]."""
    by_token, by_position = theta.view(-1, VOCABULARY).split([VOCABULARY, LONGEST])
    return (by_token[BEFORE] + by_position[POSITIONS]).log_softmax(-1)


def token_logps(theta: Tensor) -> Tensor:
    """log q(y_n | y_<n) of all responses, [Y, T]; zero behind their end."""
    return _all_logps(theta).gather(-1, TOKENS[..., None])[..., 0] * READ


def jacobian(theta: Tensor) -> Tensor:
    """The gradient of each of `token_logps`: [Y, T, P]."""
    errors = (one_hot(TOKENS, VOCABULARY) - _all_logps(theta).exp()) * READ[..., None]  # [Y, T, V]
    features = torch.cat([one_hot(BEFORE, VOCABULARY), one_hot(POSITIONS, LONGEST)], -1)  # [Y, T, V + LONGEST]
    return (features[..., None] * errors[..., None, :]).flatten(2)


def random_model(seed: int) -> Tensor:
    return torch.randn(PARAMETERS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kl(p: Tensor, q: Tensor) -> float:
    """KL(p‖q) in nats a response, of two models given by their parameters."""
    p_sums, q_sums = token_logps(p).sum(1), token_logps(q).sum(1)
    return float((p_sums.exp() * (p_sums - q_sums)).sum())


class Weights(NamedTuple):
    """How a stored pair counts."""

    token: Tensor  # [Y, T], of the gradient of each token of y_s
    pair: Tensor  # [Y], of the gradient of the pair that y_s is in
    value: Tensor  # [Y, T], of each log q of y_s in the margin


Variant = Callable[[Tensor], Weights]  # from log q/b of the tokens [Y, T]


def _tokens(weights: Callable[[Tensor], Tensor], in_value: bool = False) -> Variant:
    def variant(ratios: Tensor) -> Weights:
        token = weights(ratios).expand_as(ratios)
        return Weights(token, torch.ones(len(ratios)), token if in_value else torch.ones_like(ratios))

    return variant


def _pairs(weights: Callable[[Tensor], Tensor]) -> Variant:
    return lambda ratios: Weights(torch.ones_like(ratios), weights(ratios), torch.ones_like(ratios))


def _mean(ratios: Tensor) -> Tensor:
    """Of a response, normalised by its length: [Y, 1]."""
    return ratios.sum(1, keepdim=True) / LENGTHS[:, None]


VARIANTS: dict[str, Variant] = {
    "none": _tokens(torch.ones_like),
    "response, the whole pair": _pairs(lambda r: r.sum(1).exp()),
    "response, the whole pair, at most 1": _pairs(lambda r: r.sum(1).exp().clamp(max=1)),
    "response": _tokens(lambda r: r.sum(1, keepdim=True).exp()),
    "response, by length": _tokens(lambda r: _mean(r).exp()),
    "response, by length, at most 1": _tokens(lambda r: _mean(r).exp().clamp(max=1)),
    "all tokens so far": _tokens(lambda r: r.cumsum(1).exp()),
    "all tokens so far, at most 1": _tokens(lambda r: r.cumsum(1).exp().clamp(max=1)),
    "token": _tokens(torch.exp),
    "token, at most 5": _tokens(lambda r: r.exp().clamp(max=5)),
    "token, at most 2": _tokens(lambda r: r.exp().clamp(max=2)),
    "token, at most 1": _tokens(lambda r: r.exp().clamp(max=1)),
    "token, 0.5 to 2": _tokens(lambda r: r.exp().clamp(0.5, 2)),
    "token, 0.8 to 1.2, else 0": _tokens(lambda r: torch.where((r.exp() - 1).abs() < 0.2, r.exp(), 0.0)),
    "token, in the value too": _tokens(torch.exp, in_value=True),
    "token, at most 1, in the value too": _tokens(lambda r: r.exp().clamp(max=1), in_value=True),
}


def gradient(student: Tensor, behavior: Tensor, teacher: Tensor, beta: float, variant: str) -> tuple[Tensor, float]:
    """Of eq. 9 with y_t from the teacher and y_s from `behavior`: mean [P] and standard deviation of a pair's gradient.

    By hand, from the derivative of -log σ; the loss's own code has no part in it.
    """
    q, p, b = map(token_logps, (student, teacher, behavior))
    slopes = jacobian(student)
    weights = VARIANTS[variant](q - b)
    scale = beta / LENGTHS
    reward_chosen, reward_rejected = (scale * (y - p.sum(1)) for y in (q.sum(1), (q * weights.value).sum(1)))
    slope_chosen = scale[:, None] * slopes.sum(1)  # [Y, P]
    slope_rejected = scale[:, None] * (slopes * weights.token[..., None]).sum(1)
    wrong = torch.sigmoid(reward_rejected - reward_chosen[:, None]) * weights.pair  # [Y of y_t, Y of y_s]
    likely = p.sum(1).exp()[:, None] * b.sum(1).exp()
    first, second = likely * wrong, likely * wrong**2
    mean = first.sum(0) @ slope_rejected - first.sum(1) @ slope_chosen
    squares = second.sum(1) @ slope_chosen.square().sum(1) + second.sum(0) @ slope_rejected.square().sum(1)
    square = squares - 2 * (second * (slope_chosen @ slope_rejected.T)).sum()
    return mean, float((square - mean.square().sum()).sqrt())


def train(behavior: Tensor, teacher: Tensor, beta: float, variant: str | None, steps: int, rate: float) -> Tensor:
    """The student after steps down the expected gradient, from `behavior` on, with y_s of it for ever; without a
    `variant` y_s are the student's own at each step, as in Algorithm 1."""
    student = behavior.clone()
    for _ in range(steps):
        sampler = student if variant is None else behavior
        student = student - rate / beta * gradient(student, sampler, teacher, beta, variant or "none")[0]
    return student
