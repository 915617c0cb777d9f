"""What a dataset holds, as the small files beside its shards say; no shard is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from dpkd_offline.dataset import Dataset
from dpkd_offline.errors import DataError
from dpkd_offline.facts import Facts
from dpkd_offline.files import find_json, read_json
from dpkd_offline.records import PreferencePair, Prompt, Record, Response, TopK
from dpkd_offline.shards import ENTRIES_AT_ONCE, Count, first_fault, provenance_model

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
    facts: Facts


@dataclass(frozen=True)
class Held:
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
    def facts(self) -> Facts:
        return Facts.together([entry.facts for entry in self.entries])


def held_tables(dataset: Dataset, root: Path) -> list[Held]:
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
                    found.append(Held(kind, record, config, files, name, folder, made, entries, dataset.plan.count))
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
