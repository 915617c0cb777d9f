"""What each objective makes of a micro batch: the stored numbers that it reads, and its loss.

Joins an entry of config/objectives.py with its equation in losses.py by the names of the equation's parameters.

Legend: E examples, S responses of each that are read, N response tokens of all, K stored likeliest tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
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
from dpkd_offline.models.batch import Batch, PromptAndResponses, pair_batch, send
from dpkd_offline.training import losses
from dpkd_offline.training.stream import Example
from dpkd_offline.training.student import Student

StepMetrics = dict[str, float]


@dataclass(frozen=True)
class MicroBatch:
    """Some examples, and what is stored of them, as tensors where the student is. In nats."""

    examples: Sequence[Example]
    batch: Batch
    lengths: Tensor  # [E, S], |y| in tokens
    teacher_logps: Tensor  # [N], of the response tokens; none where they are not stored
    teacher_sums: Tensor  # [E, S], log p(y|x)
    behavior_logps: Tensor  # of the tokens of y_s, under the student that sampled them; none where it is not known
    behavior_sums: Tensor  # [E], log b(y_s|x)
    behavior_places: Tensor  # which of the N the tokens of y_s are
    top_ids: Tensor  # [N, K], the teacher's likeliest; -1 where a position has fewer
    top_logps: Tensor  # [N, K]
    padding: int

    def to(self, device: torch.device) -> MicroBatch:
        """The same on a device, which need not have finished to copy it."""
        moved: dict[str, Any] = {k: send(v, device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, batch=self.batch.to(device), **moved)


def collate(objective: Objective, examples: Sequence[Example], student: Student) -> MicroBatch:
    """What an objective reads of some examples, laid out as the student takes it, and sent to its device."""
    sides, dtype = objective.sides, student.precise
    batch = pair_batch(rows_of(examples, objective), student.shares)
    stored = bool(examples[0].teacher_logps)
    sampled = REJECTED in sides and _are_sampled(examples)

    def values(parts: Iterable[Sequence[float]]) -> Tensor:
        return torch.tensor(list(chain.from_iterable(parts)), dtype=dtype)

    def sums(parts: Iterable[Sequence[float]]) -> Tensor:
        return torch.tensor([float(np.sum(part)) for part in parts], dtype=dtype)

    teacher = [e.teacher_logps[side] for e in examples for side in sides] if stored else []
    behavior = [e.behavior_logps[REJECTED] for e in examples] if sampled else []
    top_ids, top_logps = torch.empty(len(batch.targets), 0, dtype=torch.long), torch.empty(len(batch.targets), 0)
    if objective.top_k:
        top_ids, top_logps = top_tensors(examples, sides)
    return MicroBatch(
        examples,
        batch,
        batch.lengths.view(-1, len(sides)),
        values(teacher),
        sums(teacher).view(-1, len(sides)),
        values(behavior),
        sums(behavior),
        places_of(REJECTED, objective, batch),
        top_ids,
        top_logps.to(dtype),
        batch.input_ids.numel() - batch.tokens,
    ).to(student.device)


@dataclass(frozen=True)
class Scored:
    """A micro batch, with the log-probs of student and teacher side by side. In nats."""

    micro: MicroBatch
    logps: Tensor  # [N] of the response tokens, with a gradient
    top_logps: Tensor  # [N, K] of the teacher's likeliest tokens, with a gradient; K = 0 where they are not read
    best: Tensor | None  # [N], the student's likeliest ids
    best_logps: Tensor | None  # [N]
    sums: Tensor  # [E, S], log q(y|x)
    sides: tuple[int, ...]
    config: TrainConfig
    vocab_size: int
    weights: Tensor | None = None  # of the tokens of y_s, where their gradient is corrected for who sampled them

    @property
    def batch(self) -> Batch:
        return self.micro.batch

    @property
    def examples(self) -> Sequence[Example]:
        return self.micro.examples

    @property
    def lengths(self) -> Tensor:
        """|y| [E, S], in tokens."""
        return self.micro.lengths

    def of_side(self, side: int, values: Tensor) -> Tensor:
        """[E] of one side, of `values` [E, S]."""
        return values[:, self.sides.index(side)]

    def means_of_sampled(self, values: Tensor) -> Tensor:
        """[E], the mean of `values`, a number for each token of y_s whose sampler is known, over each of them."""
        owners = self.batch.owners[self.micro.behavior_places] // len(self.sides)
        return values.new_zeros(len(self.sums)).index_add(0, owners, values) / self.of_side(REJECTED, self.lengths)

    @property
    def teacher_logps(self) -> Tensor:
        """[N], of the response tokens."""
        return self.micro.teacher_logps

    @property
    def behavior_logps(self) -> Tensor:
        """[N], under the student that sampled them, where no others are read."""
        return self.micro.behavior_logps

    @property
    def teacher_sums(self) -> Tensor:
        """log p(y|x) [E, S]."""
        return self.micro.teacher_sums

    @property
    def behavior_sums(self) -> Tensor:
        """log b(y_s|x) [E], under the student that sampled it."""
        return self.micro.behavior_sums

    @property
    def teacher_top(self) -> tuple[Tensor, Tensor]:
        """The teacher's likeliest ids and their log-probs, [N, K]."""
        return self.micro.top_ids, self.micro.top_logps

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


def top_tensors(examples: Sequence[Example], sides: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The teacher's likeliest ids and their log-probs at the positions of some responses, [N, K].

    Where a position has fewer, the id is -1, and the log-prob that of no probability.
    """
    tops = [example.top[side] for example in examples for side in sides]
    ids, logps = (np.concatenate([top[part] for top in tops]) for part in (0, 1))
    return torch.from_numpy(ids).long(), torch.from_numpy(logps)


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
    return score_collated(student, objective, collate(objective, examples, student), config)


def score_collated(student: Student, objective: Objective, micro: MicroBatch, config: TrainConfig) -> Scored:
    """A forward pass over a micro batch."""
    batch, count = micro.batch, micro.top_ids.shape[1]
    ids = torch.cat([batch.targets[:, None], micro.top_ids.clamp(min=0)], dim=1)
    logps, best = student(batch, ids, objective.best)
    own, weights = logps[:, 0], None
    top_logps = logps[:, 1 : count + 1].masked_fill(micro.top_ids < 0, NOT_STORED)
    if objective.off_policy and config.off_policy == "token" and len(micro.behavior_sums):
        weights = losses.off_policy_weights(own[micro.behavior_places], micro.behavior_logps)
        own = losses.scale_gradient(own, torch.ones_like(own).index_copy(0, micro.behavior_places, weights))
    return Scored(
        micro=micro,
        logps=own,
        top_logps=top_logps,
        best=best,
        best_logps=logps[:, -1] if objective.best else None,
        sums=batch.sum_by_response(own).view(-1, len(objective.sides)),
        sides=objective.sides,
        config=config,
        vocab_size=student.vocab_size,
        weights=weights,
    )


def _are_sampled(examples: Sequence[Example]) -> bool:
    """Whether it is known how likely every y_s was under the student that sampled it; of imported ones it is not."""
    return all(e.behavior_logps and e.behavior_logps[REJECTED] for e in examples)


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
    if len(scored.behavior_sums):
        place = scored.sides.index(REJECTED)
        columns["drift"] = (scored.behavior_sums - scored.sums[:, place]) / lengths[:, place]
    if scored.weights is not None:
        ratios = scored.logps[scored.micro.behavior_places] - scored.behavior_logps
        columns["weight"] = scored.means_of_sampled(scored.weights)
        columns["clipped"] = scored.means_of_sampled((ratios > math.log1p(losses.OFF_POLICY_CLIP)).to(ratios.dtype))
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
