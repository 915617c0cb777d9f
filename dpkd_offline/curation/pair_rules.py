"""Pairs by rule, of the samples of a dataset: which y_t goes with which y_s, and the rows that they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dpkd_offline.common import console
from dpkd_offline.common.errors import DataError, MismatchError
from dpkd_offline.config.data import PairRule, SubsetConfig
from dpkd_offline.curation.scores import ROLES, Scores, read_scores
from dpkd_offline.dataset.catalog import begun_tables, is_begun
from dpkd_offline.dataset.columns import Lists
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.dataset.integrity import check_provenance
from dpkd_offline.dataset.layout import (
    KINDS,
    PAIRS,
    PROMPTS,
    STUDENT_RESPONSES,
    TEACHER_RESPONSES,
    TOP_K,
    TableKind,
)
from dpkd_offline.dataset.provenance import flat
from dpkd_offline.dataset.row_checks import check_rows, check_same
from dpkd_offline.dataset.schema import COLUMNS
from dpkd_offline.dataset.table import Table

Samples = npt.NDArray[np.int64]
RESPONSES: dict[str, TableKind[Any]] = {"teacher": TEACHER_RESPONSES, "student": STUDENT_RESPONSES}
SCORED = ["id", "chosen_ids", "rejected_ids", "teacher_chosen_logps", "teacher_rejected_logps"]
ALIKE = (  # keys of `_table.json` in which the samples may not differ: any two of them may become one row
    *("model.revision", "student.revision", "engine", "dtype", "scored", "tokenizer_fingerprint", "eos_token_ids"),
    *("top_k", "columns"),
)


@dataclass(frozen=True)
class Pairs:
    """Some pairs [N] of responses to the prompts of a shard, in the order of these."""

    rows: Samples  # of the prompts, in the shard
    y_t: Samples  # the sample of each
    y_s: Samples
    gap: npt.NDArray[np.float64]  # the score of y_t minus that of y_s; nan where they have none

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, which: slice | npt.NDArray[np.int64]) -> Pairs:
        return Pairs(self.rows[which], self.y_t[which], self.y_s[which], self.gap[which])


def each(y_t: npt.NDArray[np.float64], y_s: npt.NDArray[np.float64]) -> tuple[Samples, Samples, Samples]:
    """Every y_t with every y_s: rows, samples of y_t and of y_s, from scores [samples, rows]."""
    (teacher, rows), student = y_t.shape, len(y_s)
    row, t, s = np.indices((rows, teacher, student)).reshape(3, -1)
    return row, t, s


def best(y_t: npt.NDArray[np.float64], y_s: npt.NDArray[np.float64]) -> tuple[Samples, Samples, Samples]:
    """The y_t of the highest score with the y_s of sample 0, which nothing selects; of equal ones the first."""
    return np.arange(y_t.shape[1]), y_t.argmax(0), np.zeros(y_t.shape[1], np.int64)


def best_worst(y_t: npt.NDArray[np.float64], y_s: npt.NDArray[np.float64]) -> tuple[Samples, Samples, Samples]:
    """The y_t of the highest score with the y_s of the lowest; of equal ones the first."""
    return np.arange(y_t.shape[1]), y_t.argmax(0), y_s.argmin(0)


RULES: dict[PairRule, Callable[..., tuple[Samples, Samples, Samples]]] = {
    "each": each,
    "best": best,
    "best-worst": best_worst,
}


class Pairing:
    """The samples of a dataset, and the pairs that a rule makes of them.

    A shard of each table of each sample is in memory at a time.
    """

    def __init__(
        self, dataset: Dataset, rule: PairRule, tables: Mapping[str, Sequence[Table[Any]]], scores: Scores | None
    ) -> None:
        """`tables` are those of all samples, by the name of sample 0's."""
        self.dataset, self.rule, self.tables, self.scores = dataset, rule, tables, scores
        self.samples = {role: len(tables[kind.path(dataset.student, 0)]) for role, kind in RESPONSES.items()}
        self.several = rule == "each" and self.samples["teacher"] * self.samples["student"] > 1  # pairs of a prompt
        self._last: dict[str, tuple[int, list[pa.Table]]] = {}  # by table: the shards that were read last

    @classmethod
    def open(cls, dataset: Dataset, config: SubsetConfig) -> Pairing:
        """The samples of the dataset's student in round 0, which has to be whole.

        Raises:
            DataError: a table is not complete, or a score is wrong.
            MismatchError: the samples were not made in one way.
            UsageError: there is no such student.
        """
        assert config.pairs is not None
        dataset.require_student()
        tables = _tables(dataset)
        scores, samples = None, sample_counts(dataset)
        if config.scores is not None:
            needed = {"teacher": samples["teacher"]} if config.pairs != "each" or config.min_gap is not None else {}
            if config.pairs == "best-worst" or config.min_gap is not None:
                needed |= {"student": 1 if config.pairs == "best" else samples["student"]}
            if config.min_score is not None:
                needed |= {"teacher": samples["teacher"]}
            scores = read_scores(config.scores, dataset, samples, needed)
        return cls(dataset, config.pairs, tables, scores)

    @property
    def carried(self) -> dict[str, Table[Any]]:
        """The tables of the new dataset but its prompts, as sample 0 has them."""
        return {name: tables[0] for name, tables in self.tables.items() if tables[0].kind is not PROMPTS}

    def pairs(self, shard: int) -> Pairs:
        """All pairs that the rule makes of the responses to the prompts of a shard.

        Raises:
            DataError, MismatchError: as when a shard is read, and where a log-prob of the teacher cannot be.
        """
        if self.scores is not None:
            by_role = [self.scores.of_shard(role, self.dataset, shard) for role in ROLES]
        else:
            by_role = self._teacher_logps(shard)
        rows, y_t, y_s = RULES[self.rule](*by_role)
        return Pairs(rows, y_t, y_s, by_role[0][y_t, rows] - by_role[1][y_s, rows])

    def _teacher_logps(self, shard: int) -> list[npt.NDArray[np.float64]]:
        """Its log-prob per token of every y_t and y_s [samples, rows], in nats."""
        name = PAIRS.path(self.dataset.student, 0)
        by_text = self.tables[name][0].require_provenance()["scored"] == "text"
        shards = self._read(name, shard, SCORED)
        for table, rows in zip(self.tables[name], shards, strict=True):
            check_rows(rows, table.path(shard), by_text=by_text)
        means = []
        for side, role in (("chosen", "teacher"), ("rejected", "student")):
            logps = [Lists(rows[f"teacher_{side}_logps"]) for rows in shards[: self.samples[role]]]
            means.append(np.stack([of.sums() / of.lengths for of in logps]))
        return means

    def take(self, table: Table[Any], shard: int, pairs: Pairs, columns: list[str] | None = None) -> pa.Table:
        """A row for each pair: what is of y_t from its sample, the rest from that of y_s, the id from the rule.

        Args:
            table: the one of sample 0.
            columns: which to read; by default all.
        """
        shards = self._read(table.name, shard, columns)
        rows, height = pa.concat_tables(shards), len(shards[0])
        of_y_t, of_y_s = (pa.array(sample * height + pairs.rows) for sample in (pairs.y_t, pairs.y_s))
        taken = []
        for name in rows.column_names:
            if not table.kind.samples:
                places = pa.array(pairs.rows)
            else:
                is_of_y_t = table.kind is TEACHER_RESPONSES or COLUMNS[name].side == "chosen"
                places = of_y_t if is_of_y_t else of_y_s
            taken.append(rows[name].take(places))
        if self.several and "id" in rows.column_names:
            place = rows.column_names.index("id")
            numbers = zip(taken[place].to_pylist(), pairs.y_t.tolist(), pairs.y_s.tolist(), strict=True)
            taken[place] = pa.chunked_array([pa.array([f"{id_}::pair-t{t}s{s}" for id_, t, s in numbers], pa.string())])
        return pa.table(taken, schema=rows.schema)

    def _read(self, name: str, shard: int, columns: list[str] | None) -> list[pa.Table]:
        """The shard of every sample of a table, which all have the same prompts in the same rows."""
        if columns is None and name in self._last and self._last[name][0] == shard:
            return self._last[name][1]
        tables = self.tables[name]
        shards = [table.read_arrow(shard, columns) for table in tables]
        if "id" in shards[0].column_names:
            for table, rows in zip(tables[1:], shards[1:], strict=True):
                check_same(rows, "id", shards[0]["id"], table.path(shard), "the prompt in this row")
        if columns is None:
            self._last[name] = shard, shards
        return shards

    def origins(self, name: str, counts: Counter[tuple[str, int]]) -> list[dict[str, Any]]:
        """What `_table.json` says of the samples that the rows of a table are from.

        Args:
            counts: how many rows have their response of a role from a sample.
        """
        kind = self.tables[name][0].kind
        role = "teacher" if kind is TEACHER_RESPONSES else "student"
        parts = []
        for sample, table in enumerate(self.tables[name]):
            part = {"dataset": self.dataset.prompt_set.id, "sample": sample, "rows": counts[role, sample]}
            if kind in (PAIRS, TOP_K):  # whose rows are of two samples
                part["rows_of_y_t"] = counts["teacher", sample]
            parts.append({**part, "made": table.require_provenance()})
        return parts


def sample_counts(dataset: Dataset) -> dict[str, int]:
    """How many samples of round 0 each role has, for the student as which the dataset is opened."""
    return {role: len(_begun(dataset, kind)) for role, kind in RESPONSES.items()}


def _begun(dataset: Dataset, kind: TableKind[Any]) -> list[Table[Any]]:
    """The tables of a kind of all samples that have been begun."""
    views = dataset.samples() if kind.samples else [dataset]
    tables = [view.table(kind, 0) for view in views]
    return [table for table in tables if kind is PROMPTS or is_begun(table)]


def _tables(dataset: Dataset) -> dict[str, list[Table[Any]]]:
    """The tables of the new dataset, of all samples, by their names in sample 0; says which are left out.

    Raises:
        DataError: responses or pairs are missing.
        MismatchError: the samples were not made in one way.
    """
    begun = {kind: _begun(dataset, kind) for kind in KINDS}
    score = "dpkd-offline score-teacher"
    for kind, command in (*((kind, "dpkd-offline generate") for kind in RESPONSES.values()), (PAIRS, score)):
        for sample, table in enumerate(begun[kind]):
            if table.sample != sample:
                raise DataError(f"{table.folder}: sample {sample} is missing; run `{command}` for all samples first")
            table.require_complete(command)
    most = max(len(begun[kind]) for kind in RESPONSES.values())
    for kind in (*RESPONSES.values(), PAIRS):
        if len(begun[kind]) < (most if kind is PAIRS else 1):
            missing = dataset.of_sample(len(begun[kind])).table(kind, 0)
            command = score if kind is PAIRS else "dpkd-offline generate"
            raise DataError(f"{missing.folder}: not there, and pairs by rule are made of it; run `{command}` first")
    begun[PAIRS] = begun[PAIRS][:most]
    whole = [table for table in begun[TOP_K] if not table.pending()]
    begun[TOP_K] = whole if len(whole) == most else []
    for kind in (kind for kind in KINDS if not kind.samples):
        begun[kind] = [table for table in begun[kind] if not table.pending()]
    tables = {of[0].name: of for of in begun.values() if of}
    used = {table.name for of in tables.values() for table in of}
    if others := [table.name for table in begun_tables(dataset) if table.name not in used]:
        console.info(f"left out, since pairs are made of what all samples of round 0 have: {', '.join(others)}")
    _check_made_alike(dataset, tables)
    return tables


def _check_made_alike(dataset: Dataset, tables: Mapping[str, Sequence[Table[Any]]]) -> None:
    all_tables = [table for of in tables.values() for table in of if table.kind is not PROMPTS]
    provenances = {table.name: table.require_provenance() for table in all_tables}
    for table in all_tables:
        check_provenance(table, provenances, dataset)
    for name, of in tables.items():
        for table in of[1:]:
            own, first = (flat({"columns": None, **provenances[n]}) for n in (table.name, name))
            keys = (key for key in {**first, **own} if key.startswith(ALIKE) and own.get(key) != first.get(key))
            if (key := next(keys, None)) is not None:
                raise MismatchError(
                    f"{table.provenance_path}: {key} is {own.get(key)}, that of sample 0 is {first.get(key)}; pairs "
                    f"by rule are of samples that were made and scored in one way"
                )
