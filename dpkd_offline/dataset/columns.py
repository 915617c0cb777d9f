"""Columns as numpy sees them, and the sums over them that a shard's manifest entry holds."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field

from dpkd_offline.common.errors import MismatchError
from dpkd_offline.common.locations import Location
from dpkd_offline.dataset.schema import COLUMNS, HALF_TOP_LOGPS, Kind, columns_of
from dpkd_offline.dataset.top_k import rounding


def lists_of(rows: pa.Table) -> dict[str, Lists]:
    """The columns of token ids and log-probs, which hold one number a token."""
    return {name: Lists(rows[name]) for name in columns_of(rows.column_names, Kind.TOKEN_IDS, Kind.LOGPS)}


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


KINDS_OF_SUMS = {
    "tokens": (Kind.TOKEN_IDS,),
    "truncated": (Kind.FINISH_REASON,),
    "exact": (Kind.EXACT,),
    "row_means": (Kind.LOGPS, Kind.TOP_MASS),
    **dict.fromkeys(("halves", "rounding_max", "rounding_sum"), (Kind.TOP_LOGPS,)),
}
NOT_OF_ALL = ("row_means", "halves", "rounding_max", "rounding_sum")  # there is none of lists that are empty, or exact


class ShardStats(BaseModel):
    """Sums over the rows of a shard or of a table, by column."""

    model_config = ConfigDict(extra="allow")  # so that two are equal only if they agree on all that a file says

    arrow_bytes: int  # of all columns as Arrow lays them out, which `datasets` needs on the disk
    tokens: dict[str, int]  # of a column of token ids: how many there are
    truncated: dict[str, int]  # of a column of finish reasons: the responses that were cut off
    exact: dict[str, int]  # of a column that says whether tokens are exact: the rows in which they are
    row_means: dict[str, float]  # of a column of numbers, one a token: the sum of every row's mean
    # of a column of log-probs in half precision: how many there are, and by how many nats rounding may have moved the
    # one that is furthest off, and all of them together; absent where there is no such column
    halves: dict[str, int] = Field({}, exclude_if=lambda value: not value)
    rounding_max: dict[str, float] = Field({}, exclude_if=lambda value: not value)
    rounding_sum: dict[str, float] = Field({}, exclude_if=lambda value: not value)

    @classmethod
    def of(cls, rows: pa.Table) -> ShardStats:
        """Those of a shard: the same, to the last bit, wherever they are taken."""
        tokens, truncated, exact, row_means = {}, {}, {}, {}
        halves, rounding_max, rounding_sum = {}, {}, {}
        for name in rows.column_names:
            kind, column = COLUMNS[name].kind, rows[name]
            if kind is Kind.FINISH_REASON:
                truncated[name] = pc.sum(pc.equal(column, "length"), min_count=0).as_py()
            elif kind is Kind.EXACT:
                exact[name] = pc.sum(column, min_count=0).as_py()
            elif kind is Kind.TOKEN_IDS:
                tokens[name] = len(Lists(column).values)
            elif kind in (Kind.LOGPS, Kind.TOP_MASS):
                lists = Lists(column)
                if len(lists.values):  # none in the log-probs of a teacher that sampled
                    row_means[name] = _sum_of_means(lists)
            elif column.type == HALF_TOP_LOGPS:
                off = rounding(column.combine_chunks().flatten().flatten().to_numpy())
                halves[name] = len(off)
                rounding_max[name], rounding_sum[name] = float(off.max()), float(off.sum())  # exact: powers of two
        size = sum(arrow_bytes(column.combine_chunks()) for column in rows.columns)
        return cls(
            arrow_bytes=size,
            tokens=tokens,
            truncated=truncated,
            exact=exact,
            row_means=row_means,
            halves=halves,
            rounding_max=rounding_max,
            rounding_sum=rounding_sum,
        )

    def check_columns(self, path: Location, columns: Sequence[str]) -> None:
        """Raise MismatchError where the sums in a manifest entry are not of the columns of its table."""
        for key, kinds in KINDS_OF_SUMS.items():
            known, names = set(columns_of(columns, *kinds)), getattr(self, key).keys()
            wrong = names - known if key in NOT_OF_ALL else names ^ known
            if wrong:
                what = "is missing" if min(wrong) in known else "is of no column of its table"
                raise MismatchError(f"{path}: facts.{key}.{min(wrong)} {what}")

    @classmethod
    def together(cls, parts: Sequence[ShardStats]) -> ShardStats:
        """Those of a table, from those of its shards in their order."""
        return cls(
            arrow_bytes=sum(part.arrow_bytes for part in parts),
            tokens=_added([part.tokens for part in parts], sum),
            truncated=_added([part.truncated for part in parts], sum),
            exact=_added([part.exact for part in parts], sum),
            row_means=_added([part.row_means for part in parts], math.fsum),
            halves=_added([part.halves for part in parts], sum),
            rounding_max=_added([part.rounding_max for part in parts], max),
            rounding_sum=_added([part.rounding_sum for part in parts], math.fsum),
        )


def _sum_of_means(lists: Lists) -> float:
    """By sums that are rounded once, and so do not depend on their order, nor on who adds."""
    ends = zip(lists.ends.tolist(), lists.lengths.tolist(), strict=True)
    return math.fsum(math.fsum(lists.values[end - length : end].tolist()) / length for end, length in ends if length)


def arrow_bytes(array: pa.Array) -> int:
    """Lengths or offsets, numbers and text; not what marks nulls, which pyarrow makes or leaves out as it likes."""
    if pa.types.is_dictionary(array.type):  # as the texts that it stands for
        lengths = pc.binary_length(array.dictionary).cast(pa.int64()).take(array.indices)
        return 4 * len(array) + int(pc.sum(lengths, min_count=0).as_py())
    if pa.types.is_struct(array.type):
        return sum(map(arrow_bytes, array.flatten()))
    if pa.types.is_list(array.type):
        return 4 * len(array) + arrow_bytes(array.flatten())
    if pa.types.is_string(array.type):
        text: int = pc.sum(pc.binary_length(array), min_count=0).as_py()
        return 4 * len(array) + text
    return -(-len(array) * int(array.type.bit_width) // 8)


def _added(parts: Sequence[Mapping[str, Any]], add: Callable[[Iterable[Any]], Any]) -> dict[str, Any]:
    return {name: add(part.get(name, 0) for part in parts) for name in dict.fromkeys(n for part in parts for n in part)}


OF_A_PAIR = re.compile(r"(?:::pair-[0-9a-z]+)+$")  # behind a prompt's id, where a prompt has several pairs


def draws_of(ids: pa.ChunkedArray) -> npt.NDArray[np.float64]:
    """A number in [0, 1) for each id, evenly spread and a function of its prompt: those below a share are held out.

    So a prompt is held out in every round, process and objective or in none, with all of its pairs, and a larger share
    holds out more.
    """
    return _spread([OF_A_PAIR.sub("", id) for id in ids.to_pylist()])


def draws_of_rows(ids: pa.ChunkedArray) -> npt.NDArray[np.float64]:
    """The same of the whole id: by these the pairs of one prompt are apart. Of a prompt's only pair it is its draw."""
    return _spread(ids.to_pylist())


def _spread(texts: Sequence[str]) -> npt.NDArray[np.float64]:
    first = b"".join(hashlib.sha256(text.encode()).digest()[:6] for text in texts)
    return (np.frombuffer(first, np.uint8).reshape(-1, 6) @ 256.0 ** np.arange(5, -1, -1)) / 2.0**48
