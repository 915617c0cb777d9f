"""What each objective makes of a micro batch: the stored numbers that it reads, and its loss.

Joins an entry of config/objectives.py with its equation in losses.py by the names of the equation's parameters.

Legend: E examples, S responses of each that are read, N response tokens of all, K stored likeliest tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from inspect import Parameter, signature
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpkd_offline.config import objectives as registry
from dpkd_offline.config.train import TrainConfig
from dpkd_offline.dataset.schema import CHOSEN, REJECTED, SIDES
from dpkd_offline.dataset.top_k import NOT_STORED
from dpkd_offline.models.batch import Batch, PromptAndResponses, pair_batch
from dpkd_offline.training import losses
from dpkd_offline.training.stream import Example
from dpkd_offline.training.student import Student

StepMetrics = dict[str, float]


@dataclass(frozen=True)
class Scored:
    """A micro batch, with the log-probs of student and teacher side by side. In nats."""

    logps: Tensor  # [N] of the response tokens, with a gradient
    top_logps: Tensor  # [N, K] of the teacher's likeliest tokens, with a gradient; K = 0 where they are not read
    best: Tensor | None  # [N], the student's likeliest ids
    best_logps: Tensor | None  # [N]
    sums: Tensor  # [E, S], log q(y|x)
    batch: Batch
    examples: Sequence[Example]
    sides: tuple[int, ...]
    config: TrainConfig
    vocab_size: int
    weights: Tensor | None = None  # of the tokens of y_s, where their gradient is corrected for who sampled them

    @property
    def lengths(self) -> Tensor:
        """|y| [E, S], in tokens."""
        return self._here(self.batch.lengths).view_as(self.sums)

    def of_side(self, side: int, values: Tensor) -> Tensor:
        """[E] of one side, of `values` [E, S]."""
        return values[:, self.sides.index(side)]

    def means_of(self, side: int, values: Tensor) -> Tensor:
        """[E], the mean of `values`, a number for each token of one side, over each of its responses."""
        lengths = self.batch.lengths.view_as(self.sums)[:, self.sides.index(side)]
        owners = self._here(torch.arange(len(lengths)).repeat_interleave(lengths))
        return values.new_zeros(len(lengths)).index_add(0, owners, values) / self._here(lengths)

    def _stored(self, logps: Callable[[Example], Sequence[Sequence[float]]]) -> Tensor:
        per_response = [logps(e)[side] for e in self.examples for side in self.sides]
        return self._like(list(chain.from_iterable(per_response)))

    def _like(self, values: Sequence[Any]) -> Tensor:
        return self._here(torch.tensor(values, dtype=self.logps.dtype))

    def _here(self, values: Tensor) -> Tensor:
        return values.to(self.logps.device, non_blocking=True)

    @cached_property
    def teacher_logps(self) -> Tensor:
        """[N], of the response tokens."""
        return self._stored(lambda e: e.teacher_logps)

    @cached_property
    def behavior_logps(self) -> Tensor:
        """[N], under the student that sampled them."""
        return self._stored(lambda e: e.behavior_logps)

    @cached_property
    def teacher_sums(self) -> Tensor:
        """log p(y|x) [E, S]."""
        sums = [[float(np.sum(e.teacher_logps[side], dtype=np.float64)) for side in self.sides] for e in self.examples]
        return self._like(sums)

    @property
    def behavior_sums(self) -> Tensor:
        """log b(y_s|x) [E], under the student that sampled it."""
        return self._like([float(np.sum(e.behavior_logps[REJECTED], dtype=np.float64)) for e in self.examples])

    @cached_property
    def teacher_top(self) -> tuple[Tensor, Tensor]:
        """The teacher's likeliest ids and their log-probs, [N, K]."""
        ids, logps = top_tensors(self.examples, self.sides, self.logps.device)
        return ids, logps.to(self.logps.dtype)

    def teacher_logps_of_best(self) -> Tensor:
        """[N], of the student's likeliest tokens."""
        assert self.best is not None
        return losses.logps_from_top(self.best, *self.teacher_top, self.vocab_size)

    def forward_kls(self) -> Tensor:
        """[N], of the teacher from the student."""
        return losses.forward_kl(self.top_logps, self.teacher_top[1])

    def reverse_kls(self) -> Tensor:
        """[N], of the student from the teacher."""
        return losses.reverse_kl(self.top_logps, self.teacher_top[1])

    def top_masses(self) -> Tensor:
        """[N], how much of p the teacher's likeliest tokens have."""
        return self.teacher_top[1].exp().sum(-1)

    def acceptances(self) -> Tensor:
        """[N], how likely the teacher accepts what the student drafts."""
        return losses.acceptance(self.top_logps, self.teacher_top[1])


# What an equation can read of a micro batch, by the name of its parameter.
TENSORS: dict[str, Callable[[Scored], Tensor | None]] = {
    # of each response of one side [E]; log-probs are sums over tokens
    "student_chosen_logps": lambda s: s.of_side(CHOSEN, s.sums),
    "student_rejected_logps": lambda s: s.of_side(REJECTED, s.sums),
    "teacher_chosen_logps": lambda s: s.of_side(CHOSEN, s.teacher_sums),
    "teacher_rejected_logps": lambda s: s.of_side(REJECTED, s.teacher_sums),
    "chosen_lengths": lambda s: s.of_side(CHOSEN, s.lengths),
    "rejected_lengths": lambda s: s.of_side(REJECTED, s.lengths),
    # of each response that is read [E · S], in tokens
    "lengths": lambda s: s.lengths.flatten(),
    # of each response token [N]
    "student_logps": lambda s: s.logps,
    "teacher_logps": lambda s: s.teacher_logps,
    "behavior_logps": lambda s: s.behavior_logps,
    "reverse_kls": lambda s: s.reverse_kls(),
    # of the teacher's likeliest tokens at each of them [N, K]
    "student_top_logps": lambda s: s.top_logps,
    "teacher_top_logps": lambda s: s.teacher_top[1],
    # of the likeliest token of either model at each of them [N]
    "student_logps_of_teacher_token": lambda s: s.top_logps[:, 0],
    "student_logps_of_student_token": lambda s: s.best_logps,
    "teacher_logps_of_teacher_token": lambda s: s.teacher_top[1][:, 0],
    "teacher_logps_of_student_token": lambda s: s.teacher_logps_of_best(),
}


def top_tensors(examples: Sequence[Example], sides: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """The teacher's likeliest ids and their log-probs at the positions of some responses, [N, K].

    Where a position has fewer, the id is -1, and the log-prob that of no probability.
    """
    tops = [example.top[side] for example in examples for side in sides]
    ids, logps = (np.concatenate([top[part] for top in tops]) for part in (0, 1))
    tensors = torch.from_numpy(ids).long(), torch.from_numpy(logps)
    return tensors[0].to(device, non_blocking=True), tensors[1].to(device, non_blocking=True)


class Objective(registry.ObjectiveInfo):
    """How a student is taught: an entry of the registry with its equation."""

    def loss(self, scored: Scored) -> Tensor:
        """[E] of each example, or [N] of each response token, in nats."""
        equation = getattr(losses, self.equation)
        read = [name for name, p in signature(equation).parameters.items() if p.default is Parameter.empty]
        loss: Tensor = equation(
            *(getattr(scored.config, name) if name in self.settings else TENSORS[name](scored) for name in read)
        )
        return loss


PAIR, Y_S = registry.PAIR, registry.Y_S
OBJECTIVES = {name: Objective(**vars(info)) for name, info in registry.OBJECTIVES.items()}


def objective_of(config: TrainConfig) -> Objective:
    """The objective of a run."""
    objective = OBJECTIVES[config.objective]
    return replace(objective, data="responses") if config.responses == "teacher" else objective


def score(student: Student, objective: Objective, examples: Sequence[Example], config: TrainConfig) -> Scored:
    """A forward pass over some examples."""
    batch = pair_batch(rows_of(examples, objective), student.shares).to(student.device)
    ids = batch.targets[:, None]
    if objective.top_k:
        ids = torch.cat([ids, top_tensors(examples, objective.sides, student.device)[0]], dim=1)
    logps, best = student(batch, ids.clamp(min=0), objective.best)
    own, weights = logps[:, 0], None
    top_logps = logps[:, 1 : ids.shape[1]].masked_fill(ids[:, 1:] < 0, NOT_STORED)
    if objective.off_policy and config.off_policy == "token" and _are_sampled(examples):
        places = places_of(REJECTED, objective, batch).to(own.device, non_blocking=True)
        sampled = list(chain.from_iterable(e.behavior_logps[REJECTED] for e in examples))
        behavior = torch.tensor(sampled, dtype=own.dtype).to(own.device, non_blocking=True)
        weights = losses.off_policy_weights(own[places], behavior)
        own = losses.scale_gradient(own, torch.ones_like(own).index_copy(0, places, weights))
    sums = batch.sum_by_response(own).view(-1, len(objective.sides))
    return Scored(
        logps=own,
        top_logps=top_logps,
        best=best,
        best_logps=logps[:, -1] if objective.best else None,
        sums=sums,
        batch=batch,
        examples=examples,
        sides=objective.sides,
        config=config,
        vocab_size=student.vocab_size,
        weights=weights,
    )


def _are_sampled(examples: Sequence[Example]) -> bool:
    """Whether it is known how likely every y_s was under the student that sampled it; of imported ones it is not."""
    return all(len(e.behavior_logps) > REJECTED and len(e.behavior_logps[REJECTED]) for e in examples)


def places_of(side: int, objective: Objective, batch: Batch) -> Tensor:
    """Which of the N response tokens of a batch are of one side, on the CPU."""
    sides = torch.tensor(objective.sides)
    of_token = sides.repeat(len(batch.lengths) // len(sides)).repeat_interleave(batch.lengths)
    return (of_token == side).nonzero()[:, 0]


def rows_of(examples: Sequence[Example], objective: Objective) -> list[PromptAndResponses]:
    """What an objective reads of some examples."""
    return [(e.prompt_ids, [e.responses[side] for side in objective.sides]) for e in examples]


@torch.no_grad()
def facts_of(scored: Scored) -> dict[str, Tensor]:
    """What is worth watching of some examples, as sums over them; where they are computed, so that nothing waits.

    log q(y|x) per token, and where teacher log-probs are stored the implicit rewards of eq. 9; of a pair also its
    margin and whether the chosen response has the larger reward, and of y_s how much less likely it is per token than
    under the student that sampled it; where its gradient is corrected for that, the mean weight of its tokens and how
    many of them are clipped.
    """
    lengths = scored.lengths
    columns = {
        f"logps_{SIDES[side]}": column for side, column in zip(scored.sides, (scored.sums / lengths).T, strict=True)
    }
    if scored.examples[0].teacher_logps:
        rewards = losses.implicit_reward(scored.sums, scored.teacher_sums, lengths, scored.config.beta)
        columns |= {f"reward_{SIDES[side]}": column for side, column in zip(scored.sides, rewards.T, strict=True)}
        if len(scored.sides) == 2:
            margins = rewards[:, 0] - rewards[:, 1]
            columns |= {"margin": margins, "accuracy": (margins > 0).float()}
    if REJECTED in scored.sides and _are_sampled(scored.examples):
        place = scored.sides.index(REJECTED)
        columns["drift"] = (scored.behavior_sums - scored.sums[:, place]) / lengths[:, place]
    if scored.weights is not None:
        columns["weight"] = scored.means_of(REJECTED, scored.weights)
        columns["clipped"] = scored.means_of(REJECTED, (scored.weights >= 1 + losses.OFF_POLICY_CLIP).float())
    return {name: column.sum() for name, column in columns.items()}


@torch.no_grad()
def word_facts_of(scored: Scored) -> dict[str, Tensor]:
    """What is worth watching of response tokens whose teacher's likeliest tokens are read, as sums over the tokens.

    Both KL, whichever is trained. Of dpkd-token where the student's likeliest token is the teacher's, so that there is
    no gradient, and where it is among the stored ones, so that its log p is known. Of minillm the weights, where they
    are clipped, and log b/q: how far the student is from the one that sampled.
    """
    if not scored.top_logps.shape[1]:
        return {}
    columns = {"forward_kl": scored.forward_kls(), "reverse_kl": scored.reverse_kls()}
    if scored.best is not None:
        is_stored = scored.teacher_top[0] == scored.best[:, None]
        columns |= {"argmax_same": is_stored[:, 0], "argmax_stored": is_stored.any(-1)}
    if scored.sides == Y_S:
        ratios = scored.logps - scored.behavior_logps
        weights = losses.importance_weights(scored.logps, scored.behavior_logps)
        columns |= {"weight": weights, "clipped": ratios > math.log1p(losses.CLIP), "behavior_kl": -ratios}
    return {name: column.sum() for name, column in columns.items()}
