"""Which tables a dataset has, what they are to each other, and what the small files beside their shards say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from dpkd_offline.common.errors import DataError
from dpkd_offline.common.files import find_json, read_json
from dpkd_offline.dataset.columns import ShardStats
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.dataset.provenance import Count, first_fault, provenance_model
from dpkd_offline.dataset.schema import PreferencePair, Prompt, Record, Response, TopK
from dpkd_offline.dataset.table import ENTRIES_AT_ONCE, Table

M = TypeVar("M", bound=BaseModel)
KINDS: dict[str, tuple[str, type[Record]]] = {  # of tables, by what `load_dataset` calls them: the folders of each
    "pairs": ("pairs/*", PreferencePair),
    "prompts": ("prompts", Prompt),
    "student_prompts": ("prompts/student", Prompt),
    "teacher_responses": ("responses/teacher", Response),
    "student_responses": ("responses/student/*", Response),
    "top_k": ("top_k/*", TopK),
}


class Entry(BaseModel):
    """What is read of a shard's manifest entry."""

    file: str
    sha256: str
    bytes: Count
    rows: Count
    facts: ShardStats


@dataclass(frozen=True)
class TableSummary:
    """A table that has been begun, as the files beside its shards say."""

    kind: str
    record: type[Record]
    config: str  # what `load_dataset` calls this table, and other rounds of it
    files: str  # the pattern of their shards
    name: str  # its own folder in the dataset
    folder: Path
    made: Mapping[str, Any]  # `_table.json`; empty of the prompts that entered
    entries: Sequence[Entry]  # of the shards that are committed
    shards: int  # that it is going to have

    @property
    def complete(self) -> bool:
        return len(self.entries) == self.shards

    @property
    def rows(self) -> int:
        return sum(entry.rows for entry in self.entries)

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.entries)

    @cached_property
    def facts(self) -> ShardStats:
        return ShardStats.together([entry.facts for entry in self.entries])


def summarize_tables(dataset: Dataset, root: Path) -> list[TableSummary]:
    """Those of the dataset, and below `students/` those of further students."""
    found = []
    for student in (of_student.student for of_student in dataset.students()):
        owner = root if student is None else root / "students" / student
        for kind, (where, record) in KINDS.items():
            config = kind if student is None else f"{kind}-{student}"
            files = (owner.relative_to(root) / where / "*.parquet").as_posix()
            for folder in sorted(owner.glob(where)):
                if (folder / "_table.json").exists() or any(folder.glob("*.parquet")):
                    name = folder.relative_to(root).as_posix()
                    made, entries = _read(folder, record)
                    found.append(
                        TableSummary(kind, record, config, files, name, folder, made, entries, dataset.plan.count)
                    )
    return found


def _read(folder: Path, record: type[Record]) -> tuple[dict[str, Any], list[Entry]]:
    """Who made a table, and the manifest entries of the shards that are there; a DataError where a key is missing."""
    path = folder / "_table.json"
    if (made := find_json(path)) is not None:
        _checked(provenance_model(record, made), path, made)
    with ThreadPoolExecutor(ENTRIES_AT_ONCE) as threads:
        paths = sorted(folder.glob("_manifest/*.json"))
        entries = [_checked(Entry, *found) for found in zip(paths, threads.map(read_json, paths), strict=True)]
    return made or {}, [entry for entry in entries if (folder / entry.file).exists()]


def _checked(model: type[M], path: Path, value: object) -> M:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise DataError(f"{path}: {first_fault(error)}") from error


TEACHER = "responses/teacher"
COMMAND_OF = {"responses": "generate", "pairs": "score-teacher", "top_k": "score-teacher --top-k"}


def begun_tables(dataset: Dataset) -> Iterator[Table[Any]]:
    """The tables that have been begun."""
    yield dataset.prompts
    if dataset.responses("teacher", 0).folder.exists():
        yield dataset.responses("teacher", 0)
    for of_student in dataset.students():
        if (of_student.student_prompts.folder / "_table.json").exists():
            yield of_student.student_prompts
        for round in of_student.rounds("responses/student"):
            yield of_student.responses("student", round)
        for round in of_student.rounds():
            yield of_student.pairs(round)
        for round in of_student.rounds("top_k"):
            yield of_student.top_k(round)


def related_table(table: Table[Any], kind: str) -> str:
    """The table of that kind of the same student and round: prompts/student, responses/student, pairs."""
    whose = table.name.split("/")[:2] if table.name.startswith("students/") else []
    return "/".join([*whose, kind, *([] if kind == "prompts/student" else [table.folder.name])])


def previous_round(table: Table[Any]) -> str:
    """The table of the same kind and student in the round before."""
    return f"{table.name.rpartition('/')[0]}/round-{(round_of(table) or 0) - 1:03d}"


def round_of(table: Table[Any]) -> int | None:
    """The round that a table's folder names."""
    named = str(table.folder.name)
    return int(named.removeprefix("round-")) if named.startswith("round-") else None
