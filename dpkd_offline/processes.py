"""Several processes that train one student: who this one is, and sums over all of them. Accelerate starts them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from accelerate import PartialState
from torch import Tensor, distributed


class Processes:
    """All processes of a run; one where nothing else was asked for."""

    def __init__(self) -> None:
        state = PartialState()
        self.rank: int = state.process_index
        self.count: int = state.num_processes
        self.device: torch.device = state.device

    @property
    def first(self) -> bool:
        """Whether this one writes."""
        return self.rank == 0

    def sum_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Replace each by its sum over the processes."""
        if self.count > 1:
            for gradient in gradients:
                distributed.all_reduce(gradient)

    def sum(self, facts: Mapping[str, float]) -> dict[str, float]:
        """The sum of each number over the processes; all of them must have the same names."""
        if self.count == 1:
            return dict(facts)
        values = torch.tensor(list(facts.values()), dtype=torch.float64, device=self.device)
        distributed.all_reduce(values)
        return dict(zip(facts, values.tolist(), strict=True))
