"""What each objective makes of a micro batch: the stored numbers that it reads, and its loss. The equations: losses.py.

Legend: E examples, S responses of each that are read, N response tokens of all, K stored likeliest tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dpkd_offline.config.train import TrainConfig
from dpkd_offline.dataset.schema import CHOSEN, REJECTED, SIDES
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
        return self.batch.lengths.view_as(self.sums)

    def _stored(self, logps: Callable[[Example], Sequence[Sequence[float]]]) -> Tensor:
        found = [logps(e)[side] for e in self.examples for side in self.sides]
        return self._like(list(chain.from_iterable(found)))

    def _like(self, values: Sequence[Any]) -> Tensor:
        return torch.tensor(values, device=self.logps.device, dtype=self.logps.dtype)

    @property
    def teacher_logps(self) -> Tensor:
        """[N], of the response tokens."""
        return self._stored(lambda e: e.teacher_logps)

    @property
    def behavior_logps(self) -> Tensor:
        """[N], under the student that sampled them."""
        return self._stored(lambda e: e.behavior_logps)

    @property
    def teacher_sums(self) -> Tensor:
        """log p(y|x) [E, S]."""
        found = [[float(np.sum(e.teacher_logps[side], dtype=np.float64)) for side in self.sides] for e in self.examples]
        return self._like(found)

    @property
    def behavior_sums(self) -> Tensor:
        """log b(y_s|x) [E], under the student that sampled it."""
        return self._like([float(np.sum(e.behavior_logps[REJECTED], dtype=np.float64)) for e in self.examples])

    @property
    def teacher_top(self) -> tuple[Tensor, Tensor]:
        """The teacher's likeliest ids and their log-probs, [N, K]."""
        ids, logps = top_tensors(self.examples, self.sides, self.logps.device)
        return ids, logps.to(self.logps.dtype)

    @property
    def pair(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """log q(y_t), log q(y_s), log p(y_t), log p(y_s), |y_t|, |y_s|: all [E]."""
        return (*self.sums.unbind(1), *self.teacher_sums.unbind(1), *self.lengths.unbind(1))  # type: ignore[return-value]

    def forward_kls(self) -> Tensor:
        """[N], of the teacher from the student."""
        return losses.forward_kl(self.top_logps, self.teacher_top[1])

    def reverse_kls(self) -> Tensor:
        """[N], of the student from the teacher."""
        return losses.reverse_kl(self.top_logps, self.teacher_top[1])


def top_tensors(examples: Sequence[Example], sides: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """The teacher's likeliest ids and their log-probs at the positions of some responses, [N, K]."""
    tops = [example.top[side] for example in examples for side in sides]
    ids, logps = (np.concatenate([top[part] for top in tops]) for part in (0, 1))
    return torch.from_numpy(ids).to(device, torch.long), torch.from_numpy(logps).to(device)


@dataclass(frozen=True)
class Objective:
    """How a student is taught."""

    loss: Callable[[Scored], Tensor]  # [E] of each example, or [N] of each response token
    per: Literal["pair", "token"]  # what the loss of a batch is the mean over
    sides: tuple[int, ...]  # the responses that it reads
    data: Literal["pairs", "references", "responses"] = "pairs"  # the last of the teacher, alone
    top_k: bool = False  # whether it reads the teacher's likeliest tokens
    best: bool = False  # whether it reads the student's
    behavior: bool = False  # whether it reads log-probs under the student that sampled
    measures: bool = False  # whether its loss says how far the student is from what it is taught, in nats a token
    off_policy: bool = False  # whether the gradient of y_s is corrected by them, where they are stored


def _dpkd_sum(s: Scored) -> Tensor:
    return losses.dpkd_sum_loss(*s.pair[:4], s.config.beta)


def _ipo(s: Scored) -> Tensor:
    return losses.ipo_loss(*s.pair[:4], s.config.tau)


def _simpo(s: Scored) -> Tensor:
    return losses.simpo_loss(*s.pair[:2], *s.pair[4:], s.config.beta, s.config.gamma)


def _dpkd_token(s: Scored) -> Tensor:
    assert s.best is not None and s.best_logps is not None
    ids, logps = s.teacher_top
    of_best = losses.logps_from_top(s.best, ids, logps, s.vocab_size)
    return losses.dpkd_token_loss(s.top_logps[:, 0], s.best_logps, logps[:, 0], of_best, s.config.beta)


def _akl(s: Scored) -> Tensor:
    return losses.adaptive_kl(s.top_logps, s.teacher_top[1])


def _minillm(s: Scored) -> Tensor:
    return losses.minillm_loss(s.logps, s.behavior_logps, s.teacher_logps, s.reverse_kls(), s.batch.lengths)


PAIR, Y_T, Y_S = (CHOSEN, REJECTED), (CHOSEN,), (REJECTED,)
OBJECTIVES = {
    "dpkd": Objective(lambda s: losses.dpkd_loss(*s.pair, s.config.beta), "pair", PAIR, off_policy=True),
    "dpkd-sum": Objective(_dpkd_sum, "pair", PAIR, off_policy=True),
    "ipo": Objective(_ipo, "pair", PAIR, off_policy=True),
    "cpo": Objective(lambda s: losses.cpo_loss(*s.pair[:2], s.config.beta), "pair", PAIR, off_policy=True),
    "simpo": Objective(_simpo, "pair", PAIR, off_policy=True),
    "dpkd-token": Objective(_dpkd_token, "token", Y_T, top_k=True, best=True),
    "sft": Objective(lambda s: -s.logps, "token", Y_T, data="references", measures=True),
    "seqkd": Objective(lambda s: -s.logps, "token", Y_T, measures=True),
    "kd": Objective(Scored.forward_kls, "token", Y_T, top_k=True, measures=True),
    "rkl": Objective(Scored.reverse_kls, "token", Y_T, top_k=True, measures=True),
    "akl": Objective(_akl, "token", Y_T, top_k=True, measures=True),
    "minillm": Objective(_minillm, "token", Y_S, top_k=True, behavior=True),
}


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
    logps, best = student(batch, ids, objective.best)
    own, weights = logps[:, 0], None
    if objective.off_policy and config.off_policy == "token" and _are_sampled(examples):
        places = places_of(REJECTED, objective, batch)
        sampled = list(chain.from_iterable(e.behavior_logps[REJECTED] for e in examples))
        weights = losses.off_policy_weights(own[places], own.new_tensor(sampled))
        own = losses.scale_gradient(own, torch.ones_like(own).index_copy(0, places, weights))
    sums = batch.sum_by_response(own).view(-1, len(objective.sides))
    return Scored(
        logps=own,
        top_logps=logps[:, 1 : ids.shape[1]],
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
    """Which of the N response tokens of a batch are of one side."""
    sides = torch.tensor(objective.sides, device=batch.lengths.device)
    of_token = sides.repeat(len(batch.lengths) // len(sides)).repeat_interleave(batch.lengths)
    return (of_token == side).nonzero()[:, 0]


def rows_of(examples: Sequence[Example], objective: Objective) -> list[PromptAndResponses]:
    """What an objective reads of some examples."""
    return [(e.prompt_ids, [e.responses[side] for side in objective.sides]) for e in examples]


@torch.no_grad()
def facts_of(scored: Scored) -> StepMetrics:
    """What is worth watching of some examples, as sums over them.

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
        weights = scored.weights.split(scored.batch.lengths.view_as(scored.sums)[:, place].tolist())
        columns["weight"] = torch.stack([w.mean() for w in weights])
        columns["clipped"] = torch.stack([(w >= 1 + losses.OFF_POLICY_CLIP).float().mean() for w in weights])
    return {name: float(column.sum()) for name, column in columns.items()}


@torch.no_grad()
def word_facts_of(scored: Scored) -> StepMetrics:
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
    return {name: float(column.sum()) for name, column in columns.items()}
