from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import combinations, pairwise

import pytest
import torch
from torch import Tensor

from dpkd_offline.models import batch as batches
from dpkd_offline.models.batch import (
    PromptAndResponses,
    micro_batches,
    pad_sequences,
    response_batch,
    shared_prompt_batch,
)
from dpkd_offline.models.shared_prompt import Packed


def test_padding_on_either_side() -> None:
    left, mask = pad_sequences([[1, 2, 3], [4]], side="left")
    assert left.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    right, mask = pad_sequences([[1, 2, 3], [4]], side="right")
    assert right.tolist() == [[1, 2, 3], [4, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_response_tokens_are_predicted_from_the_position_before() -> None:
    items = [([10, 11], [12, 13, 1]), ([20], [1]), ([30, 31, 32], [33, 34])]
    batch = response_batch(items)
    assert batch.targets.tolist() == [12, 13, 1, 1, 33, 34]
    assert batch.lengths.tolist() == [3, 1, 2]
    assert batch.tokens == 12
    for n, target in enumerate(batch.targets.tolist()):
        row, column = divmod(int(batch.places[n]), batch.input_ids.shape[1])
        prompt, response = items[row]
        assert [*prompt, *response][column + 1] == target
        assert column >= len(prompt) - 1


SHARED = [([10, 11], [[12, 1], [13]]), ([20], [[21, 22, 1]])]


def test_a_row_of_shared_prompts() -> None:
    batch = shared_prompt_batch(SHARED)
    assert batch.input_ids.tolist() == [[10, 11, 12, 1, 13, 20, 21, 22, 1] + [0] * 55]
    assert batch.position_ids is not None and batch.position_ids.tolist() == [[0, 1, 2, 3, 2, 0, 1, 2, 3] + [0] * 55]
    assert batch.places.tolist() == [1, 2, 1, 5, 6, 7]
    assert batch.targets.tolist() == [12, 1, 13, 21, 22, 1]
    assert batch.owners.tolist() == [0, 0, 1, 2, 2, 2]
    assert batch.lengths.tolist() == [2, 1, 3]
    assert batch.tokens == 9


@pytest.mark.parametrize(("tokens", "width"), [(63, 64), (64, 64), (65, 128)])
def test_a_row_of_shared_prompts_ends_at_a_multiple_of_64(tokens: int, width: int) -> None:
    assert shared_prompt_batch([([1] * 60, [[1] * (tokens - 60)])]).input_ids.shape == (1, width)


def test_what_a_model_reads_goes_to_its_device_and_what_is_counted_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    there = response_batch([([1], [2, 3])]).to(torch.device("meta"))
    moved = {name for name, value in vars(there).items() if isinstance(value, Tensor) and value.device.type == "meta"}
    assert moved == {"input_ids", "attention_mask", "places", "targets", "owners"}
    here = shared_prompt_batch(SHARED)
    assert here.to(torch.device("cpu")).segments is here.segments

    def send(tensor: Tensor, device: torch.device) -> Tensor:
        assert device.type == "cuda"
        return tensor.to("meta")

    monkeypatch.setattr(batches, "send", send)
    packed = here.to(torch.device("cuda")).segments  # as a GPU's kernel takes them
    assert isinstance(packed, Packed) and packed.segments is here.segments
    assert {tensor.device.type for tensor in packed[1:7] if isinstance(tensor, Tensor)} == {"meta"}
    # Four segments, of 4, 1, 4 tokens and the padding, with the two tokens of the first prompt once more.
    shapes = [tuple(tensor.shape) for tensor in packed[1:7] if isinstance(tensor, Tensor)]
    assert shapes == [(5,), (5,), (66,), (64,), (2,), (2,)]


def test_sums_by_response() -> None:
    batch = response_batch([([1], [2, 3]), ([1, 1], [4])])
    assert batch.sum_by_response(torch.tensor([0.5, 0.25, 8.0])).tolist() == [0.75, 8.0]


def item(prompt: int, *responses: int) -> tuple[list[int], list[list[int]]]:
    """A prompt and responses of so many tokens."""
    return [1] * prompt, [[1] * length for length in responses]


@pytest.mark.parametrize(
    ("shared", "budget", "ranks", "expected"),
    [
        # Rows of 9, 5, 5 and 2 tokens, a response each. Two micro batches as equal as they can be: 9 and 15 places.
        (False, 20, 1, [[1], [0, 2, 3]]),
        (False, 18, 1, [[1], [0, 2, 3]]),
        (False, 36, 1, [[1, 0, 2, 3]]),
        (False, 4, 1, [[1], [0], [2], [3]]),
        (False, 36, 6, [[1], [0], [2], [3], [], []]),
        (True, 21, 1, [[1, 0, 2, 3]]),
        (True, 20, 1, [[1], [0, 2, 3]]),
    ],
)
def test_micro_batches_are_few_and_equal(shared: bool, budget: int, ranks: int, expected: list[list[int]]) -> None:
    items = [item(3, 2), item(4, 5), item(4, 1), item(1, 1)]
    assert micro_batches(items, shared, budget, ranks) == expected


def together(group: Sequence[PromptAndResponses], shared: bool) -> int:
    """The places of a micro batch of several items; none of one, which may be as long as it is."""
    rows = [len(prompt) + len(response) for prompt, responses in group for response in responses]
    once = sum(len(prompt) + sum(map(len, responses)) for prompt, responses in group)
    return 0 if len(group) < 2 else once if shared else len(rows) * max(rows)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("shared", [False, True])
def test_no_other_micro_batches_are_fewer_or_more_equal(shared: bool, ranks: int) -> None:
    """Of all ways to cut the items, the longest first."""
    draw = random.Random(ranks)
    for _ in range(40):
        items = [item(draw.randint(1, 9), *(draw.randint(1, 9) for _ in range(2))) for _ in range(draw.randint(1, 7))]
        longest = [len(prompt) + max(map(len, responses)) for prompt, responses in items]
        order = [i for _, i in sorted((-length, i) for i, length in enumerate(longest))]
        ordered = [items[i] for i in order]
        most = []  # places of the largest of one micro batch, of two, ...
        for count in range(1, len(items) + 1):
            cuts = [(0, *ends, len(items)) for ends in combinations(range(1, len(items)), count - 1)]
            most.append(min(max(together(ordered[a:b], shared) for a, b in pairwise(cut)) for cut in cuts))
        budget = draw.randint(10, 150)
        fewest = next(count for count, places in enumerate(most, start=1) if places <= budget)
        groups = micro_batches(items, shared, budget, ranks)
        assert [i for group in groups for i in group] == order
        assert len(groups) == -(-fewest // ranks) * ranks
        largest = max(together([items[i] for i in group], shared) for group in groups)
        assert largest == most[min(len(groups), len(items)) - 1]
