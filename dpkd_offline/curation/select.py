"""Selects the rows of a new dataset: those that `merge` keeps, and those that satisfy the rules of `subset`."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dpkd_offline.common.console import progress
from dpkd_offline.common.errors import DataError, MismatchError
from dpkd_offline.common.hashing import fingerprint
from dpkd_offline.curation.pair_rules import Pairing, Pairs
from dpkd_offline.curation.rules import Rules
from dpkd_offline.dataset.dataset import Dataset, PromptDigest
from dpkd_offline.dataset.schema import Prompt, from_table
from dpkd_offline.dataset.scratch import KeyIndex
from dpkd_offline.dataset.table import Table

Tables = dict[str, Table[Any]]


@dataclass(frozen=True)
class Piece:
    """Some rows of one shard of one dataset."""

    part: int
    shard: int
    rows: npt.NDArray[np.int64]
    pairs: Pairs | None = None  # which these are, where a rule makes pairs of samples


class Selection:
    """The rows of a new dataset, in order, and where they are in the parts. Iterating over it reads their prompts.

    A shard of each table is in memory at a time.
    """

    def __init__(self, parts: Sequence[Dataset], carried: Sequence[Tables], pairing: Pairing | None = None) -> None:
        """
        Args:
            carried: of each part the tables of the new dataset but its prompts.
            pairing: what makes pairs of the samples of the one part, where its rows are not taken as they are.
        """
        self.parts, self.carried, self.pairing, self.digest = parts, carried, pairing, PromptDigest()
        self._pieces: list[Piece] = []
        self._ends: list[int] = []  # how many rows there are up to the end of each piece
        self._last: dict[str, tuple[tuple[int, int], pa.Table]] = {}  # by table: new shards may share one of a part

    def add(
        self, part: int, shard: int, rows: npt.NDArray[np.int64], prompts: pa.Table, pairs: Pairs | None = None
    ) -> None:
        """Select rows of the next shard, whose prompts are these; or of the pairs that are made of it."""
        if len(rows):
            self._ends.append(len(self) + len(rows))
            of_rows = None if pairs is None else pairs[rows]
            self._pieces.append(Piece(part, shard, rows if of_rows is None else of_rows.rows, of_rows))
            self.digest.update(prompts.take(rows), self._seen_by_teacher(self._pieces[-1]))

    def _seen_by_teacher(self, piece: Piece) -> pa.Table | None:
        """The prompts of a piece as the teacher sees them, where it sees others than the students."""
        dataset = self.parts[piece.part]
        if dataset.prompt_set.teacher_prompts is None:
            return None
        return self._taken(dataset.prompts_seen_by("teacher"), piece, slice(None))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def prompts_of(self, part: int) -> int:
        """How many prompts of a part have rows."""
        return sum(len(np.unique(piece.rows)) for piece in self._pieces if piece.part == part)

    def origins(self, name: str) -> list[dict[str, Any]]:
        """What `_table.json` says of where the rows of a table are from: of each part, or of each sample."""
        if self.pairing is not None:
            counts: Counter[tuple[str, int]] = Counter()
            for pairs in filter(None, (piece.pairs for piece in self._pieces)):
                counts.update(("teacher", sample) for sample in pairs.y_t.tolist())
                counts.update(("student", sample) for sample in pairs.y_s.tolist())
            return self.pairing.origins(name, counts)
        return [
            {"dataset": part.prompt_set.id, "rows": self.prompts_of(n), "made": tables[name].require_provenance()}
            for n, (part, tables) in enumerate(zip(self.parts, self.carried, strict=True))
        ]

    def rows_among(self, part: int, ends: Sequence[int]) -> list[int]:
        """How many rows of a part are selected of each of its ranges, which end before these rows of it."""
        size, counts = self.parts[part].plan.shard_size, np.zeros(len(ends), dtype=np.int64)
        for piece in (piece for piece in self._pieces if piece.part == part):
            ranges = np.searchsorted(ends, piece.shard * size + piece.rows, side="right")
            counts += np.bincount(ranges, minlength=len(ends))
        return [int(count) for count in counts]

    def __iter__(self) -> Iterator[Prompt]:
        for piece in self._pieces:
            yield from from_table(self._taken(self.parts[piece.part].prompts, piece, slice(None)), Prompt)

    def read(self, name: str, start: int, ids: Sequence[str]) -> list[Any]:
        """Rows of a table from number `start` of the selection on, which are of the prompts with these ids.

        Raises:
            DataError, MismatchError: as when a shard is read, and where a row is of another prompt.
        """
        rows: list[Any] = []
        for number in range(bisect_right(self._ends, start), len(self._pieces)):
            if len(rows) == len(ids):
                break
            piece = self._pieces[number]
            first = start + len(rows) - (self._ends[number] - len(piece.rows))
            span = slice(first, first + len(ids) - len(rows))
            table = self.carried[piece.part][name]
            more = from_table(self._taken(table, piece, span), table.record)
            for row, place, id_ in zip(more, piece.rows[span], ids[len(rows) :], strict=False):
                if row.id != id_:
                    path = table.path(piece.shard)
                    raise DataError(f"{path}: row {place}: column 'id' is not that of the prompt in this row")
            rows += more
        return rows

    def _taken(self, table: Table[Any], piece: Piece, span: slice) -> pa.Table:
        if piece.pairs is not None and self.pairing is not None:
            return self.pairing.take(table, piece.shard, piece.pairs[span])
        place = piece.part, piece.shard
        if table.name not in self._last or self._last[table.name][0] != place:
            self._last[table.name] = place, table.read_arrow(piece.shard)
        return self._last[table.name][1].take(piece.rows[span])


# --- merge ----------------------------------------------------------------------------------------------------------


def select_new(selection: Selection) -> int:
    """Select of each part the prompts that no earlier one has; returns how many are left out.

    Raises:
        MismatchError: an id stands on two different prompts.
    """
    parts, ids, contents, number = selection.parts, KeyIndex(), KeyIndex(), 0
    with progress("merge: prompts", sum(part.plan.rows for part in parts), "row") as shown:
        for index, part in enumerate(parts):
            for shard in range(part.plan.count):
                rows, new = part.prompts.read_arrow(shard), []
                for row, prompt in enumerate(rows.to_pylist()):
                    if not contents.add([fingerprint(_without_nulls(prompt))], [number + row]):
                        if twice := ids.add([prompt["id"]], [number + row]):
                            raise MismatchError(
                                f"{part.prompts.path(shard)}: row {row}: column 'id': '{prompt['id']}' is another "
                                f"prompt in {_place(parts, int(twice[1]))}"
                            )
                        new.append(row)
                selection.add(index, shard, np.array(new, dtype=np.int64), rows)
                number += len(rows)
                shown.advance(len(rows))
    return number - len(selection)


def _without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """A row as it is where its table has no column for what it does not say."""
    return {name: value for name, value in row.items() if value is not None}


def _place(parts: Sequence[Dataset], number: int) -> str:
    """Where a row stands, of all rows of the parts."""
    for part in parts:
        if number < part.plan.rows:
            shard, row = divmod(number, part.plan.shard_size)
            return f"{part.prompts.path(shard)}, row {row}"
        number -= part.plan.rows
    raise AssertionError("no part has so many rows")


# --- subset ---------------------------------------------------------------------------------------------------------


def select_satisfying(selection: Selection, rules: Rules, limit: int | None) -> None:
    """Select the rows of the one dataset, or the pairs of its samples, that satisfy all rules, up to the limit.

    Raises:
        DataError: a value cannot be, or no row satisfies the rules.
    """
    (dataset,), pairing = selection.parts, selection.pairing
    dropped: Counter[str] = Counter()  # by the first rule that a row does not satisfy
    seen = 0
    with progress("subset: rules", dataset.plan.rows, "row") as shown:
        for shard in range(dataset.plan.count):
            if len(selection) == limit:
                break
            pairs = None if pairing is None else pairing.pairs(shard)
            prompts = rules.read(dataset.prompts, shard, pairs)
            kept = np.ones(len(prompts), dtype=np.bool_)
            for rule, satisfied in rules.of_shard(shard, prompts, pairs):
                dropped[rule] += int((kept & ~satisfied).sum())
                kept &= satisfied
            places = np.flatnonzero(kept)
            selection.add(0, shard, places if limit is None else places[: limit - len(selection)], prompts, pairs)
            seen += len(prompts)
            shown.advance(dataset.plan.rows_of(shard))
    if not len(selection):
        by_rule = ", ".join(f"{count} by --{rule}" for rule, count in dropped.items() if count)
        what = "row" if pairing is None else "pair"
        raise DataError(
            f"{dataset.root}: no {what} satisfies the rules: {dropped.total()} of {seen} dropped: {by_rule}"
        )
