from __future__ import annotations

import pytest
import torch

from dpkd_offline.models.batch import micro_batches, pad_sequences, response_batch


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
