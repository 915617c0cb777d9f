"""Batches: prompts with responses as tensors, and where the response tokens are.

Legend: S rows, T tokens of a row, N response tokens of all responses, Y responses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from dpkd_offline.models.shared_prompt import Packed, pack, padded, segments_of

PromptAndResponse = tuple[Sequence[int], Sequence[int]]
PromptAndResponses = tuple[Sequence[int], Sequence[Sequence[int]]]


@dataclass(frozen=True)
class Batch:
    """Response token n, counted over all responses, is `targets[n]`, predicted at `places[n]` of the S * T places."""

    input_ids: Tensor  # [S, T]
    attention_mask: Tensor | None  # [S, T]; of right-padded rows
    position_ids: Tensor | None  # [S, T]; of a row with shared prompts
    segments: Tensor | Packed | None  # [S, 4], as attention takes them, on the CPU; of a row with shared prompts
    places: Tensor  # [N], the position before the token, counted over all rows
    targets: Tensor  # [N]
    owners: Tensor  # [N], to which of the responses the token belongs
    lengths: Tensor  # [Y], |y|: tokens of each response, on the CPU
    tokens: int  # of all rows, without padding

    def to(self, device: torch.device) -> Batch:
        """The same on a device, which need not have finished to copy it."""
        names = ("input_ids", "attention_mask", "position_ids", "places", "targets", "owners")
        tensors = {name: getattr(self, name) for name in names}
        moved: dict[str, Any] = {k: send(v, device) for k, v in tensors.items() if v is not None}
        if device.type == "cuda" and isinstance(self.segments, Tensor):
            moved["segments"] = pack(self.segments, self.input_ids.shape[1]).sent(lambda tensor: send(tensor, device))
        return replace(self, **moved)

    def sum_by_response(self, logps: Tensor) -> Tensor:
        """log q(y|x) [Y] from the log-probs of the response tokens [N]."""
        return logps.new_zeros(len(self.lengths)).index_add(0, self.owners, logps)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device, which need not have finished to copy it; a GPU does so from pinned memory alone."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


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
    """A right-padded row for each prompt followed by its response. Both hold at least one token."""
    input_ids, attention_mask = pad_sequences([[*prompt, *response] for prompt, response in items], side="right")
    lengths = torch.tensor([len(response) for _, response in items])
    width = input_ids.shape[1]
    places = torch.cat([torch.arange(len(y)) + row * width + len(x) - 1 for row, (x, y) in enumerate(items)])
    targets, tokens = input_ids.flatten()[places + 1], int(attention_mask.sum())
    return Batch(input_ids, attention_mask, None, None, places, targets, _owners(lengths), lengths, tokens)


def shared_prompt_batch(items: Sequence[PromptAndResponses]) -> Batch:
    """One row: each prompt once, then its responses, and padding at the end. All hold at least one token."""
    ids: list[int] = []
    positions: list[int] = []
    places: list[int] = []
    for prompt, responses in items:
        ids += prompt
        positions += range(len(prompt))
        last = len(ids) - 1  # of the prompt; it predicts the first token of every response
        for response in responses:
            places += [last, *range(len(ids), len(ids) + len(response) - 1)]
            ids += response
            positions += range(len(prompt), len(prompt) + len(response))
    tokens, padding = len(ids), [0] * (padded(len(ids)) - len(ids))
    ids, positions = ids + padding, positions + padding
    segments = segments_of([(len(prompt), list(map(len, responses))) for prompt, responses in items])
    targets = torch.tensor([token for _, responses in items for response in responses for token in response])
    lengths = torch.tensor([len(response) for _, responses in items for response in responses])
    row, position_ids = torch.tensor([ids]), torch.tensor([positions])
    return Batch(row, None, position_ids, segments, torch.tensor(places), targets, _owners(lengths), lengths, tokens)


def _owners(lengths: Tensor) -> Tensor:
    """To which response each token belongs."""
    return torch.arange(len(lengths)).repeat_interleave(lengths)


def pair_batch(items: Sequence[PromptAndResponses], shared: bool) -> Batch:
    """Prompts, each with all its responses: as one row where prompts are shared, else a padded row each."""
    if shared:
        return shared_prompt_batch(items)
    return response_batch([(prompt, response) for prompt, responses in items for response in responses])


def micro_batches(items: Sequence[PromptAndResponses], shared: bool, budget: int, ranks: int) -> list[list[int]]:
    """Which items go through the model together: as few and as equal micro batches as `budget` tokens each allow.

    Padding counts, so that items of one length go together. A multiple of `ranks`, some of them empty where there are
    fewer items; an item of more tokens goes alone.
    """
    order = sorted(range(len(items)), key=lambda i: (-_row_tokens(items[i]), i))

    def tokens(group: Sequence[int]) -> int:
        if shared:
            return sum(len(items[i][0]) + sum(map(len, items[i][1])) for i in group)
        return sum(len(items[i][1]) for i in group) * _row_tokens(items[group[0]])

    def within(limit: int) -> list[list[int]]:
        groups: list[list[int]] = []
        for i in order:
            if groups and tokens([*groups[-1], i]) <= limit:
                groups[-1].append(i)
            else:
                groups.append([i])
        return groups

    wanted = -(-len(within(budget)) // ranks) * ranks
    low, high = 1, max(budget, tokens(order))  # the smallest limit that leads to as many groups as wanted
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(within(middle)) <= wanted else (middle + 1, high)
    groups = within(low)
    return groups + [[] for _ in range(wanted - len(groups))]


def _row_tokens(item: PromptAndResponses) -> int:
    prompt, responses = item
    return len(prompt) + max(map(len, responses))
