from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from dpkd_offline.dataset.columns import Lists
from dpkd_offline.dataset.schema import LOGPS

VALUES = [[0.5, 1.0], [], [2.0], [], [], [3.0, 4.0, 5.0], []]
WHOLE = pa.chunked_array([pa.array(VALUES, LOGPS)])
COLUMNS = {
    "whole": WHOLE,
    "in chunks": pa.chunked_array([pa.array(VALUES[:2], LOGPS), pa.array(VALUES[2:], LOGPS)]),
    "a slice": pa.chunked_array([pa.array([[9.0], [9.0], *VALUES, [9.0]], LOGPS).slice(2, 7)]),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_lists_of_any_length_however_they_lie(name: str) -> None:
    lists = Lists(COLUMNS[name])
    assert [lists[row] for row in range(7)] == VALUES
    assert lists.lengths.tolist() == [2, 0, 1, 0, 0, 3, 0]
    assert lists.sums().tolist() == [1.5, 0, 2, 0, 0, 12, 0]
    assert [lists.row_of(element) for element in range(6)] == [0, 0, 2, 5, 5, 5]


def test_sums_are_numpys_in_float64() -> None:
    random = np.random.default_rng(0)
    values = [(-random.exponential(2, length)).astype(np.float32) for length in random.integers(1, 300, 200)]
    sums = Lists(pa.chunked_array([pa.array(values, LOGPS)])).sums()
    np.testing.assert_allclose(sums, [v.astype(np.float64).sum() for v in values], rtol=1e-14)


def test_an_empty_column_has_no_lists() -> None:
    assert Lists(pa.chunked_array([], LOGPS)).sums().tolist() == []
