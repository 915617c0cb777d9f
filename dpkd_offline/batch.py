"""Batches: prompts with responses as padded tensors, and where the response tokens are.

Legend: S sequences, T tokens of the longest, N response tokens of all sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

PromptAndResponse = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class Batch:
    """Right-padded sequences. Response token n is `targets[n]`, predicted at [rows[n], columns[n]]."""

    input_ids: Tensor  # [S, T]
    attention_mask: Tensor  # [S, T]
    rows: Tensor  # [N], which sequence
    columns: Tensor  # [N], the position before the token
    targets: Tensor  # [N]
    lengths: Tensor  # [S], |y|: response tokens of each sequence

    def to(self, device: torch.device) -> Batch:
        return Batch(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def sum_by_sequence(self, logps: Tensor) -> Tensor:
        """log q(y|x) [S] from the log-probs of the response tokens [N]."""
        return logps.new_zeros(len(self.lengths)).index_add(0, self.rows, logps)


def pad_sequences(sequences: Sequence[Sequence[int]], side: Literal["left", "right"]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both [S, T]."""
    longest = max(map(len, sequences))
    input_ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, sequence in enumerate(sequences):
        place = slice(longest - len(sequence), None) if side == "left" else slice(len(sequence))
        input_ids[row, place] = torch.tensor(sequence)
        attention_mask[row, place] = 1
    return input_ids, attention_mask


def response_batch(items: Sequence[PromptAndResponse]) -> Batch:
    """Each prompt followed by its response. Both hold at least one token."""
    input_ids, attention_mask = pad_sequences([[*prompt, *response] for prompt, response in items], side="right")
    lengths = torch.tensor([len(response) for _, response in items])
    rows = torch.arange(len(items)).repeat_interleave(lengths)
    columns = torch.cat([torch.arange(len(p) - 1, len(p) - 1 + len(r)) for p, r in items])
    return Batch(input_ids, attention_mask, rows, columns, input_ids[rows, columns + 1], lengths)
