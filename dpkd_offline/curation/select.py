"""Selects the rows of a new dataset: those that `merge` keeps, and those that satisfy the rules of `subset`."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from dpkd_offline.common.console import progress
from dpkd_offline.common.errors import DataError, MismatchError
from dpkd_offline.common.hashing import fingerprint
from dpkd_offline.config.data import SubsetConfig
from dpkd_offline.dataset.catalog import related_table
from dpkd_offline.dataset.columns import Lists, draws_of
from dpkd_offline.dataset.dataset import Dataset, PromptDigest
from dpkd_offline.dataset.layout import PAIRS, STUDENT_PROMPTS
from dpkd_offline.dataset.row_checks import Mask, check_rows, check_same
from dpkd_offline.dataset.schema import SIDES, Kind, PreferencePair, Prompt, Record, Response, columns_of, from_table
from dpkd_offline.dataset.scratch import KeyIndex
from dpkd_offline.dataset.table import Table

Tables = dict[str, Table[Any]]


def _judged_columns(record: type[Record]) -> list[str]:
    """What the rules about responses read: ids, tokens, how they end; of a pair also text, exactness, the teacher."""
    names = record.schema.names
    of_pair = columns_of(names, Kind.TEXT, Kind.EXACT, Kind.LOGPS, sides=SIDES) if record is PreferencePair else []
    own = columns_of(names, Kind.TOKEN_IDS, Kind.FINISH_REASON, sides=("response", *SIDES))
    return ["id", *own, *(name for name in of_pair if record.columns[name].model != "behavior")]


@dataclass(frozen=True)
class Piece:
    """Some rows of one shard of one dataset."""

    part: int
    shard: int
    rows: npt.NDArray[np.int64]


class Selection:
    """The rows of a new dataset, in order, and where they are in the parts. Iterating over it reads their prompts.

    A shard of each table is in memory at a time.
    """

    def __init__(self, parts: Sequence[Dataset], carried: Sequence[Tables]) -> None:
        """`carried` are, of each part, the tables of the new dataset but its prompts."""
        self.parts, self.carried, self.digest = parts, carried, PromptDigest()
        self._pieces: list[Piece] = []
        self._ends: list[int] = []  # how many rows there are up to the end of each piece
        self._last: dict[str, tuple[tuple[int, int], pa.Table]] = {}  # by table: new shards may share one of a part

    def add(self, part: int, shard: int, rows: npt.NDArray[np.int64], prompts: pa.Table) -> None:
        """Select rows of the next shard, whose prompts are these."""
        if len(rows):
            self.digest.update(prompts.take(rows))
            self._ends.append(len(self) + len(rows))
            self._pieces.append(Piece(part, shard, rows))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def rows_of(self, part: int) -> int:
        return sum(len(piece.rows) for piece in self._pieces if piece.part == part)

    def __iter__(self) -> Iterator[Prompt]:
        for piece in self._pieces:
            yield from from_table(self.parts[piece.part].prompts.read_arrow(piece.shard).take(piece.rows), Prompt)

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
            places = piece.rows[first : first + len(ids) - len(rows)]
            table = self.carried[piece.part][name]
            more = from_table(self._shard(table, piece).take(places), table.record)
            for row, place, id_ in zip(more, places, ids[len(rows) :], strict=False):
                if row.id != id_:
                    path = table.path(piece.shard)
                    raise DataError(f"{path}: row {place}: column 'id' is not that of the prompt in this row")
            rows += more
        return rows

    def _shard(self, table: Table[Any], piece: Piece) -> pa.Table:
        place = piece.part, piece.shard
        if table.name not in self._last or self._last[table.name][0] != place:
            self._last[table.name] = place, table.read_arrow(piece.shard)
        return self._last[table.name][1]


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
                    if not contents.add([fingerprint(prompt)], [number + row]):
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


def _place(parts: Sequence[Dataset], number: int) -> str:
    """Where a row stands, of all rows of the parts."""
    for part in parts:
        if number < part.plan.rows:
            shard, row = divmod(number, part.plan.shard_size)
            return f"{part.prompts.path(shard)}, row {row}"
        number -= part.plan.rows
    raise AssertionError("no part has so many rows")


# --- subset ---------------------------------------------------------------------------------------------------------


def select_satisfying(selection: Selection, config: SubsetConfig) -> None:
    """Select the rows of the one dataset that satisfy all rules, up to the limit.

    Raises:
        DataError: a value cannot be, a rule is about tables that are not there, or no row satisfies the rules.
    """
    (dataset,), (carried,) = selection.parts, selection.carried
    judged = _judged(dataset, carried.values(), config)
    most = dataset.plan.rows if config.limit is None else config.limit
    dropped: Counter[str] = Counter()  # by the first rule that a row does not satisfy
    with progress("subset: rules", dataset.plan.rows, "row") as shown:
        for shard in range(dataset.plan.count):
            if len(selection) == most:
                break
            prompts = dataset.prompts.read_arrow(shard)
            kept = np.ones(len(prompts), dtype=np.bool_)
            for rule, satisfied in _rules(judged, shard, prompts, dataset, carried, config):
                dropped[rule] += int((kept & ~satisfied).sum())
                kept &= satisfied
            selection.add(0, shard, np.flatnonzero(kept)[: most - len(selection)], prompts)
            shown.advance(len(prompts))
    if not len(selection):
        by_rule = ", ".join(f"{count} by --{rule}" for rule, count in dropped.items() if count)
        raise DataError(
            f"{dataset.root}: no row satisfies the rules: {dropped.total()} of {dataset.plan.rows} dropped: {by_rule}"
        )


def _judged(dataset: Dataset, carried: Iterable[Table[Any]], config: SubsetConfig) -> list[Table[Any]]:
    """The tables that the rules are about, or a DataError where there are none."""
    margins = config.min_margin is not None or config.max_margin is not None
    of_pairs = config.drop_identical or config.drop_inexact or margins
    if not of_pairs and not config.drop_truncated and config.max_tokens is None:
        return []
    judged = [table for table in carried if table.record in (Response, PreferencePair)]
    if not judged or (of_pairs and not any(table.kind is PAIRS for table in judged)):
        what, command = ("pairs", "score-teacher") if of_pairs else ("responses", "generate")
        raise DataError(f"{dataset.root / what}: a rule is about {what}, and none are whole; run `{command}` first")
    return judged


def _rules(
    judged: Iterable[Table[Any]],
    shard: int,
    prompts: pa.Table,
    dataset: Dataset,
    carried: Tables,
    config: SubsetConfig,
) -> Iterator[tuple[str, Mask]]:
    """Each rule, and which rows [N] of a shard satisfy it."""
    if config.share is not None:
        # Not by the id alone: `train --holdout` draws by that, and would hold out all of a small share.
        seeded = pa.chunked_array([[f"{config.seed}:{id_}" for id_ in prompts["id"].to_pylist()]])
        yield "share", draws_of(seeded) < config.share
    for table in judged:
        rows, path = table.read_arrow(shard, _judged_columns(table.record)), table.path(shard)
        check_same(rows, "id", prompts["id"], path, "the prompt in this row")
        provenance = table.require_provenance()
        check_rows(rows, path, by_text=provenance.get("scored") == "text")
        if config.max_tokens is not None:
            asked = prompts  # in the tokens of the responses
            if not dataset.shares_tokenizer(provenance["tokenizer_fingerprint"]):
                asked = carried[related_table(table, STUDENT_PROMPTS)].read_arrow(shard, ["prompt_ids"])
            tokens = [Lists(rows[name]).lengths for name in columns_of(rows.column_names, Kind.TOKEN_IDS)]
            yield "max-tokens", Lists(asked["prompt_ids"]).lengths + np.max(tokens, axis=0) <= config.max_tokens
        if config.drop_truncated:
            for name in columns_of(rows.column_names, Kind.FINISH_REASON):
                yield "drop-truncated", pc.not_equal(rows[name], "length").to_numpy()
        if table.kind is PAIRS:
            yield from _rules_of_pairs(rows, config)


def _rules_of_pairs(rows: pa.Table, config: SubsetConfig) -> Iterator[tuple[str, Mask]]:
    """The same of the rules that are about pairs alone."""
    if config.drop_identical:
        yield "drop-identical", pc.not_equal(rows["chosen"], rows["rejected"]).to_numpy()
    if config.drop_inexact:
        for side in SIDES:
            yield "drop-inexact", rows[f"{side}_exact"].to_numpy()
    logps = [Lists(rows[f"teacher_{side}_logps"]) for side in SIDES]
    chosen, rejected = (of.sums() / of.lengths for of in logps)
    if config.min_margin is not None:
        yield "min-margin", chosen - rejected >= config.min_margin
    if config.max_margin is not None:
        yield "max-margin", chosen - rejected <= config.max_margin
