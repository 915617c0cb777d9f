"""What a dataset holds, as the small files beside its shards say: no shard is read, but for the schema of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ValidationError

from dpkd_offline.dataset import Dataset
from dpkd_offline.errors import DataError
from dpkd_offline.facts import Facts
from dpkd_offline.files import find_json, read_json
from dpkd_offline.shards import ENTRIES_AT_ONCE, Count, Provenance, first_fault

M = TypeVar("M", bound=BaseModel)
KINDS = {  # of tables, by what `load_dataset` calls them: the folders of each
    "pairs": "pairs/*",
    "prompts": "prompts",
    "student_prompts": "prompts/student",
    "teacher_responses": "responses/teacher",
    "student_responses": "responses/student/*",
    "top_k": "top_k/*",
}


class Entry(BaseModel):
    """What is read of a shard's manifest entry."""

    file: str
    bytes: Count
    rows: Count
    facts: Facts


@dataclass(frozen=True)
class Held:
    """A table that has been begun, as the files beside its shards say."""

    kind: str
    config: str  # what `load_dataset` calls this table, and other rounds of it
    files: str  # the pattern of their shards
    name: str  # its own folder in the dataset
    folder: Path
    made: Mapping[str, Any]  # `_table.json`; empty of the prompts
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

    def schema(self) -> pa.Schema:
        path = self.folder / self.entries[0].file
        try:
            return pq.read_schema(path)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}: not a readable Parquet file: {' '.join(str(error).split())}") from error


def held_tables(dataset: Dataset, root: Path) -> list[Held]:
    """Those of the dataset, and below `students/` those of further students."""
    found = []
    for owner in (root, *sorted(folder for folder in root.glob("students/*") if folder.is_dir())):
        for kind, where in KINDS.items():
            config = kind if owner == root else f"{kind}-{owner.name}"
            files = (owner.relative_to(root) / where / "*.parquet").as_posix()
            for folder in sorted(owner.glob(where)):
                if (folder / "_table.json").exists() or any(folder.glob("*.parquet")):
                    name = folder.relative_to(root).as_posix()
                    found.append(Held(kind, config, files, name, folder, *_read(folder), dataset.plan.count))
    return found


def _read(folder: Path) -> tuple[dict[str, Any], list[Entry]]:
    """Who made a table, and the manifest entries of the shards that are there; a DataError where a key is missing."""
    path = folder / "_table.json"
    if (made := find_json(path)) is not None:
        _checked(Provenance, path, made)
    with ThreadPoolExecutor(ENTRIES_AT_ONCE) as threads:
        paths = sorted(folder.glob("_manifest/*.json"))
        entries = [_checked(Entry, *found) for found in zip(paths, threads.map(read_json, paths), strict=True)]
    return made or {}, [entry for entry in entries if (folder / entry.file).exists()]


def _checked(model: type[M], path: Path, value: object) -> M:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise DataError(f"{path}: {first_fault(error)}") from error
