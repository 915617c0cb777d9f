"""The objectives of Direct Preference Knowledge Distillation (arXiv 2406.19774), on tensors and nothing else.

p is the teacher, q the student that is trained, y_t the teacher's response (chosen), y_s the student's (rejected).
Log-probs are in nats. B is the number of pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class PreferenceLoss(NamedTuple):
    """A preference loss per pair, with the implicit rewards that it compares."""

    losses: Tensor  # [B]
    chosen_rewards: Tensor  # [B], of y_t
    rejected_rewards: Tensor  # [B], of y_s


def implicit_reward(student_logps: Tensor, teacher_logps: Tensor, lengths: Tensor, beta: float) -> Tensor:
    """r̂(x, y) = β/|y| · log q(y|x)/p(y|x): eq. 29, divided by the response's length as eq. 9 does. All [B]."""
    return beta * (student_logps - teacher_logps) / lengths


def dpkd_loss(
    student_chosen_logps: Tensor,
    student_rejected_logps: Tensor,
    teacher_chosen_logps: Tensor,
    teacher_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float,
) -> PreferenceLoss:
    """DPKD, eq. 9: L = -log σ( β/|y_t| log q(y_t)/p(y_t) - β/|y_s| log q(y_s)/p(y_s) ).

    The log-probs are sums over the tokens of each response, the lengths their numbers of tokens (EOS included where
    it was sampled); all are [B]. Only the student's log-probs carry a gradient.
    """
    chosen_rewards = implicit_reward(student_chosen_logps, teacher_chosen_logps, chosen_lengths, beta)
    rejected_rewards = implicit_reward(student_rejected_logps, teacher_rejected_logps, rejected_lengths, beta)
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards)
    return PreferenceLoss(losses, chosen_rewards.detach(), rejected_rewards.detach())


def lm_loss(logps: Tensor) -> Tensor:
    """L_pt and SFT: mean negative log-prob per token of `logps` [N], a scalar."""
    return -logps.mean()
