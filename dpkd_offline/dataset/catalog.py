"""Which tables a dataset has, which belong together, and what the small files beside their shards say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dpkd_offline.common.errors import MismatchError
from dpkd_offline.dataset.columns import ShardStats
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.dataset.layout import KINDS, PROMPTS, TableKind
from dpkd_offline.dataset.manifest import ManifestEntry
from dpkd_offline.dataset.provenance import teachers_of
from dpkd_offline.dataset.schema import Response
from dpkd_offline.dataset.table import Table


def begun_tables(dataset: Dataset) -> Iterator[Table[Any]]:
    """The tables that have been begun: those of all students, then those of each, in the order in which they are made;
    and then the same of each further sample.

    A table comes after those that it is made of.
    """
    for of_sample in dataset.samples():
        yield from _begun(of_sample, of_student=False)
        for of_student in of_sample.students():
            yield from _begun(of_student, of_student=True)


def _begun(dataset: Dataset, of_student: bool) -> Iterator[Table[Any]]:
    for kind in (kind for kind in KINDS if kind.of_student is of_student and (kind.samples or not dataset.sample)):
        if kind.rounds:
            yield from (dataset.table(kind, round) for round in dataset.rounds(kind))
        elif kind is PROMPTS or dataset.table(kind).folder.exists():
            yield dataset.table(kind)


def require_one_teacher(dataset: Dataset) -> None:
    """Raise MismatchError where rows of a dataset are of several teachers, so that no model may add to them."""
    for table in begun_tables(dataset):
        if (provenance := table.provenance() or {}).get("teachers"):
            names = " and ".join(teachers_of(provenance).values())
            raise MismatchError(
                f"{table.provenance_path}: its rows are of several teachers ({names}), so that nothing can be sampled, "
                f"scored or paired for all of them; do that in the datasets of one teacher, and merge these again"
            )


def is_begun(table: Table[Any]) -> bool:
    """Whether somebody has claimed a table."""
    return table.provenance() is not None


def responses_of(dataset: Dataset, role: str, round: int) -> Table[Response]:
    """The responses of a role in a sample, or in the first one where the role has fewer samples."""
    table = dataset.responses(role, round)
    return table if not dataset.sample or is_begun(table) else dataset.of_sample(0).responses(role, round)


def samples_of_pairs(provenance: Mapping[str, Any]) -> tuple[int, int]:
    """The samples that y_t and y_s are of, as the `_table.json` of pairs or of the teacher's likeliest tokens says."""
    return provenance.get("teacher_sample", 0), provenance.get("student_sample", 0)


def only_the_first(dataset: Dataset) -> str | None:
    """What to say where the first of several samples is read; None where there are no others."""
    if (count := len(dataset.samples())) == 1:
        return None
    return (
        f"{dataset.root}: has {count} samples of responses, of which the first is read; `dpkd-offline subset --pairs` "
        f"makes pairs of all of them"
    )


def related_table(table: Table[Any], kind: TableKind[Any]) -> str:
    """The name of the table of that kind of the same student, round and sample."""
    return kind.path(table.student, table.round, table.sample)


def previous_round(table: Table[Any]) -> str:
    """The name of the table of the same kind, student and sample in the round before."""
    return table.kind.path(table.student, (table.round or 0) - 1, table.sample)


@dataclass(frozen=True)
class TableSummary:
    """A table that has been begun, as the files beside its shards say."""

    table: Table[Any]
    provenance: Mapping[str, Any]  # empty for the prompts, which have no `_table.json`
    entries: Sequence[ManifestEntry]  # of the shards that are committed

    @property
    def name(self) -> str:
        return self.table.name

    @property
    def config(self) -> str:
        """What `load_dataset` calls this table, and other rounds of it."""
        sample = f"sample-{self.table.sample}" if self.table.sample else None
        return "-".join(filter(None, (self.table.kind.name, self.table.student, sample)))

    @property
    def complete(self) -> bool:
        return len(self.entries) == self.table.plan.count

    @property
    def rows(self) -> int:
        return sum(entry.rows for entry in self.entries)

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.entries)

    @cached_property
    def stats(self) -> ShardStats:
        return ShardStats.together([entry.facts for entry in self.entries])


def summarize_tables(dataset: Dataset) -> list[TableSummary]:
    """The tables that have been begun, in the order of `begun_tables`.

    Raises:
        DataError, MismatchError: a file beside the shards is not what it should be.
    """
    summaries = []
    for table in begun_tables(dataset):
        provenance, entries = table.provenance(), list(table.entries().values())
        if provenance is not None or entries:
            summaries.append(TableSummary(table, provenance or {}, entries))
    return summaries
