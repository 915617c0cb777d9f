from __future__ import annotations

import torch

from dpkd_offline.models.batch import pad_sequences, response_batch


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
    for n, target in enumerate(batch.targets.tolist()):
        row, column = divmod(int(batch.places[n]), batch.input_ids.shape[1])
        prompt, response = items[row]
        assert [*prompt, *response][column + 1] == target
        assert column >= len(prompt) - 1


def test_sums_by_response() -> None:
    batch = response_batch([([1], [2, 3]), ([1, 1], [4])])
    assert batch.sum_by_response(torch.tensor([0.5, 0.25, 8.0])).tolist() == [0.75, 8.0]
