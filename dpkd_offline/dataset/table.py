"""Tables of a dataset directory: Parquet shards of a fixed plan, and manifests that say what is committed.

    <table>/_table.json                                 who produced the table, with what
    <table>/<name>-00000-of-00004.parquet               shard 0
    <table>/_manifest/<name>-00000-of-00004.json        shard 0 is committed: sha256, bytes, rows, schema version, facts

Row k of every table's shard i is the same prompt. A shard without a valid manifest entry does not exist, so a stage
resumes by skipping what is committed. Provenance lies beside its table, not in dataset.json, so that producers of
different tables never write the same file. Here tables are read, on the disk or at a URL; `writing.py` writes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic

import pyarrow as pa

from dpkd_offline.common.errors import DataError, MismatchError
from dpkd_offline.common.files import as_model, find_json
from dpkd_offline.common.hashing import sha256
from dpkd_offline.common.locations import Location, RemotePath
from dpkd_offline.dataset.layout import TableKind
from dpkd_offline.dataset.manifest import ManifestEntry
from dpkd_offline.dataset.parquet import in_arrow, largest_file, parse_shard, read_buffer
from dpkd_offline.dataset.provenance import Audit, check_keys
from dpkd_offline.dataset.schema import R, from_table, schema_with

ENTRIES_AT_ONCE = 16  # manifest entries that are asked for


@dataclass(frozen=True)
class ShardPlan:
    """How the prompts are cut into shards, the same in every table; fixed when the dataset is created."""

    rows: int
    shard_size: int

    @property
    def count(self) -> int:
        return -(-self.rows // self.shard_size)

    def rows_of(self, shard: int) -> int:
        return min(self.shard_size, self.rows - shard * self.shard_size)


class Table(Generic[R]):
    """One table of a dataset directory: where its files are, and what they hold."""

    def __init__(
        self,
        root: Location,
        kind: TableKind[R],
        plan: ShardPlan,
        student: str | None = None,
        round: int | None = None,
        sample: int = 0,
        columns: Mapping[str, str] | None = None,
    ) -> None:
        """`student`, `round` and `sample` are those that the table belongs to, where its kind has a table for each.

        Args:
            columns: see `schema_with`; by default what `_table.json` says.
        """
        self.root, self.plan = root, plan
        self.kind: TableKind[R] = kind
        self.record: type[R] = kind.record
        self.student = student if kind.of_student else None
        self.round = round if kind.rounds else None
        self.sample = sample if kind.samples else 0
        self.name = kind.path(student, round, sample)
        self.folder = root / self.name
        self.provenance_path = self.folder / "_table.json"
        self._columns = columns
        self._remote = isinstance(root, RemotePath)
        self._entries: dict[int, ManifestEntry] = {}  # at a URL, those that were read
        self._provenance: dict[str, Any] | None = None  # the same

    def at(self, root: Location, plan: ShardPlan | None = None) -> Table[R]:
        """The table of the same kind, student, round and sample of another dataset."""
        return Table(root, self.kind, plan or self.plan, self.student, self.round, self.sample, self._columns)

    @cached_property
    def schema(self) -> pa.Schema:
        """That of its shards, once the table has been claimed; a DataError where `columns` says what cannot be."""
        columns, path = self._columns, self.root / "dataset.json"
        if columns is None:
            columns, path = (self.provenance() or {}).get("columns", {}), self.provenance_path
        try:
            return schema_with(self.record, columns)
        except ValueError as error:
            raise DataError(f"{path}: {error}") from error

    def _stem(self, shard: int) -> str:
        return f"{self.kind.stem}-{shard:05d}-of-{self.plan.count:05d}"

    def path(self, shard: int) -> Location:
        return self.folder / f"{self._stem(shard)}.parquet"

    def entry_path(self, shard: int) -> Location:
        return self.folder / "_manifest" / f"{self._stem(shard)}.json"

    # --- what is committed ------------------------------------------------------------------------------------------

    def entry(self, shard: int) -> ManifestEntry | None:
        """The manifest entry of a shard, or None where it is not committed.

        At a URL each entry is read once, and whether its shard is there shows when that is read.

        Raises:
            MismatchError: as ManifestEntry.parse, and where it has other rows than the plan.
        """
        if shard in self._entries:
            return self._entries[shard]
        path = self.entry_path(shard)
        value = find_json(path)
        if value is None or not (self._remote or self.path(shard).exists()):
            return None
        entry = ManifestEntry.parse(value, path)
        entry.check(path, {"rows": self.plan.rows_of(shard)})
        entry.facts.check_columns(path, self.schema.names)
        if self._remote:
            self._entries[shard] = entry
        return entry

    def entries(self) -> dict[int, ManifestEntry]:
        """The manifest entries of all committed shards, by shard."""
        with ThreadPoolExecutor(ENTRIES_AT_ONCE) as threads:  # each may be a request
            entries = threads.map(self.entry, range(self.plan.count))
            return {shard: entry for shard, entry in enumerate(entries) if entry is not None}

    def check_count(self) -> None:
        """Raise DataError, naming the first, where manifest entries are missing of a table that must be complete.

        A plan may say anything: no more of it is gone through than is there.
        """
        present = {path.name for path in (self.folder / "_manifest").glob(f"{self.kind.stem}-*.json")}
        missing = (shard for shard in range(self.plan.count) if self.entry_path(shard).name not in present)
        if (first := next(missing, None)) is not None:
            raise DataError(
                f"{self.path(first)}: not committed; the plan of {self.root / 'dataset.json'} has {self.plan.count} "
                f"shards, and {len(present)} manifest entries are in {self.name}"
            )

    def pending(self, shard_index: int = 0, num_shards: int = 1) -> list[int]:
        """The shards that worker `shard_index` of `num_shards` has yet to make."""
        committed = self.entries()
        return [shard for shard in range(shard_index, self.plan.count, num_shards) if shard not in committed]

    def require_complete(self, made_by: str) -> None:
        """Raise DataError, naming the first missing shard and the command that makes it."""
        missing = self.pending()
        if missing:
            raise DataError(
                f"{self.path(missing[0])}: not committed ({len(missing)} of {self.plan.count} shards of {self.name} "
                f"are missing); run `{made_by}` first"
            )

    def provenance(self) -> dict[str, Any] | None:
        """Who made this table, as `_table.json` says; None where there is none, DataError where a key is missing.

        At a URL it is read once.
        """
        if self._provenance is not None:
            return self._provenance
        provenance = find_json(self.provenance_path, finite=True)
        if provenance is not None:
            check_keys(self.record, provenance, self.provenance_path)
        if self._remote:
            self._provenance = provenance
        return provenance

    def require_provenance(self) -> dict[str, Any]:
        """As `provenance`, and a DataError where there is none."""
        provenance = self.provenance()
        if provenance is None:
            raise DataError(f"{self.provenance_path}: no such file; it says who made {self.name}")
        return provenance

    def audit(self) -> Audit | None:
        """How far the table's log-probs are off, where somebody has measured it; DataError where a key is wrong."""
        value = find_json(self.folder / "_audit.json", finite=True)
        return None if value is None else as_model(value, self.folder / "_audit.json", Audit)

    # --- rows -------------------------------------------------------------------------------------------------------

    def read(self, shard: int) -> list[R]:
        """The rows of one committed shard; raises as `read_arrow` does."""
        return from_table(self.read_arrow(shard), self.record)

    def read_arrow(self, shard: int, columns: list[str] | None = None) -> pa.Table:
        """One committed shard, verified against its manifest entry, the schema and the shard plan.

        Args:
            columns: which to read; by default all.

        Raises:
            DataError: the shard is missing or has another schema.
            MismatchError: its bytes are not those of its manifest entry.
        """
        path, entry = self.path(shard), self.entry(shard)
        if entry is None:
            raise DataError(f"{path}: not committed")
        data = self.read_bytes(shard)
        if sha256(data) != entry.sha256:
            how = "damaged on its way, or changed there" if self._remote else "delete both and repeat the command"
            raise MismatchError(f"{path}: its sha256 is not the one in {self.entry_path(shard)}; {how}")
        return self.parse(shard, data, columns)

    def read_bytes(self, shard: int) -> pa.Buffer:
        """The file of a shard as it is, committed or not, or a DataError."""
        return read_buffer(self.path(shard), largest_file(self.plan.rows_of(shard)))

    def parse(self, shard: int, data: bytes | pa.Buffer, columns: list[str] | None = None) -> pa.Table:
        """A shard's bytes as a table of the record's schema and the plan's rows, or a DataError."""
        return parse_shard(
            in_arrow(data) if isinstance(data, bytes) else data,
            self.path(shard),
            self.schema,
            self.plan.rows_of(shard),
            columns,
        )
