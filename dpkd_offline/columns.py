"""Columns of lists as numpy sees them: how long each list is, and the elements of all of them in one array."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc


def lists_of(rows: pa.Table) -> dict[str, Lists]:
    """The columns of token ids and log-probs that hold one number a token."""
    return {
        name: Lists(rows[name])
        for name in rows.column_names
        if name.endswith(("_ids", "logps")) and not pa.types.is_nested(rows.schema.field(name).type.value_type)
    }


class Lists:
    """A column of N lists of numbers, without nulls."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        array = column.combine_chunks()
        self.values: npt.NDArray[Any] = array.flatten().to_numpy()
        self.lengths: npt.NDArray[np.int64] = pc.list_value_length(array).to_numpy().astype(np.int64)  # [N]
        self.ends: npt.NDArray[np.int64] = np.cumsum(self.lengths)  # [N], of each list in values

    def row_of(self, element: int) -> int:
        """The list that holds an element of `values`."""
        return int(np.searchsorted(self.ends, element, side="right"))

    def sums(self) -> npt.NDArray[np.float64]:
        """The sum of each list [N]; 0 of an empty one."""
        sums = np.zeros(len(self.lengths))
        full = self.lengths > 0
        sums[full] = np.add.reduceat(self.values.astype(np.float64), (self.ends - self.lengths)[full])
        return sums

    def __getitem__(self, row: int) -> list[Any]:
        end = self.ends[row]
        return self.values[end - self.lengths[row] : end].tolist()  # type: ignore[no-any-return]
