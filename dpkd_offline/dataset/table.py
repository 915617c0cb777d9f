"""Tables of a dataset directory: Parquet shards of a fixed plan, and manifests that say what is committed.

    <table>/_table.json                                 who produced the table, with what
    <table>/<name>-00000-of-00004.parquet               shard 0
    <table>/_manifest/<name>-00000-of-00004.json        shard 0 is committed: sha256, bytes, rows, schema version, facts

Row k of every table's shard i is the same prompt. A shard without a valid manifest entry does not exist, so a stage
resumes by skipping what is committed. Every file appears whole, by one atomic link or rename, manifests after data; of
several writers of a shard the first wins. Provenance lies
beside its table, not in dataset.json, so that producers of different tables never write the same file.
"""

from __future__ import annotations

import io
import json
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from dpkd_offline.common.console import progress
from dpkd_offline.common.errors import DataError, MismatchError
from dpkd_offline.common.files import find_json, write_atomically, write_json
from dpkd_offline.common.hashing import sha256
from dpkd_offline.common.locations import Location, RemotePath
from dpkd_offline.dataset.columns import ShardStats
from dpkd_offline.dataset.provenance import FOR_PEOPLE, first_fault, flat, provenance_model
from dpkd_offline.dataset.schema import SCHEMA_VERSION, Prompt, R, from_table, schema_fault, to_table

T = TypeVar("T")
ENTRIES_AT_ONCE = 16  # manifest entries that are asked for
WRITES_BEHIND = 4  # shards that wait to be written
ROW_GROUP_ROWS = 256  # at most; and at most so many bytes, uncompressed, since the Hub's viewer reads whole row groups
ROW_GROUP_BYTES = 32 << 20


@dataclass(frozen=True)
class ShardPlan:
    """How the prompts are cut into shards, fixed when they enter."""

    rows: int
    shard_size: int

    @property
    def count(self) -> int:
        return -(-self.rows // self.shard_size)

    def rows_of(self, shard: int) -> int:
        return min(self.shard_size, self.rows - shard * self.shard_size)


class Table(Generic[R]):
    """One table of a dataset directory: shards of one record type."""

    def __init__(self, root: Location, name: str, record: type[R], plan: ShardPlan) -> None:
        self.root, self.name, self.plan = root, name, plan
        self.record: type[R] = record
        self.folder = root / name
        self._remote = isinstance(root, RemotePath)
        self._entries: dict[int, dict[str, Any]] = {}  # at a URL, those that were read

    @property
    def kind(self) -> str:
        """prompts, responses, pairs or top_k, whosever it is."""
        parts = self.name.split("/")
        return parts[2] if parts[0] == "students" else parts[0]

    def _stem(self, shard: int) -> str:
        return f"{self.kind}-{shard:05d}-of-{self.plan.count:05d}"

    def path(self, shard: int) -> Location:
        return self.folder / f"{self._stem(shard)}.parquet"

    def entry_path(self, shard: int) -> Location:
        return self.folder / "_manifest" / f"{self._stem(shard)}.json"

    def entry(self, shard: int) -> dict[str, Any] | None:
        """What the manifest says of a shard, or None where it is not committed.

        At a URL each is asked for once, and only when it is read does it show whether the shard is there.
        """
        if shard in self._entries:
            return self._entries[shard]
        path = self.entry_path(shard)
        entry = find_json(path)
        if entry is None or not (self._remote or self.path(shard).exists()):
            return None
        if entry.get("schema_version") != SCHEMA_VERSION:
            raise MismatchError(
                f"{path}: schema version {entry.get('schema_version')}, this program reads {SCHEMA_VERSION}"
            )
        if self._remote:
            self._entries[shard] = entry
        return entry

    def committed(self) -> list[int]:
        with ThreadPoolExecutor(ENTRIES_AT_ONCE) as threads:  # each may be a request
            entries = threads.map(self.entry, range(self.plan.count))
            return [shard for shard, entry in enumerate(entries) if entry]

    def pending(self, shard_index: int = 0, num_shards: int = 1) -> list[int]:
        """The shards that worker `shard_index` of `num_shards` has yet to make."""
        done = set(self.committed())
        return [shard for shard in range(shard_index, self.plan.count, num_shards) if shard not in done]

    def require_complete(self, made_by: str) -> None:
        """Raise DataError, naming the first missing shard and the command that makes it."""
        missing = self.pending()
        if missing:
            raise DataError(
                f"{self.path(missing[0])}: not committed ({len(missing)} of {self.plan.count} shards of {self.name} "
                f"are missing); run `{made_by}` first"
            )

    def provenance(self) -> dict[str, Any] | None:
        """Who made this table, or None where nobody has said so; a DataError where a key of it is missing."""
        made = find_json(self.folder / "_table.json")
        if made is not None:
            self.check_provenance(made)
        return made

    def check_provenance(self, made: Mapping[str, Any]) -> None:
        """Raise DataError where a key that `_table.json` must have is missing or wrong."""
        try:
            provenance_model(self.record, made).model_validate(made)
        except ValidationError as error:
            raise DataError(f"{self.folder / '_table.json'}: {first_fault(error)}") from error

    def require_provenance(self) -> dict[str, Any]:
        """As `provenance`, and a DataError where there is none."""
        made = self.provenance()
        if made is None:
            raise DataError(f"{self.folder / '_table.json'}: no such file; it says who made {self.name}")
        return made

    def claim(self, provenance: Mapping[str, Any]) -> None:
        """Say who produces this table, or raise MismatchError if somebody else does."""
        path = self.folder / "_table.json"
        shards = any(self.folder.glob("*.parquet"))  # looked for first: whoever made one had claimed the table
        if shards and not path.exists():
            raise MismatchError(f"{path}: no such file, but shards stand beside it; delete {self.folder}")
        write_json(path, provenance, exclusive=True)
        self.check_claim(provenance)

    def check_claim(self, provenance: Mapping[str, Any]) -> None:
        """Raise MismatchError if the table was begun by another producer.

        `versions`, `config` and `license` are for people and may differ between the workers of a table; all else must
        agree.
        """
        path = self.folder / "_table.json"
        if (said := find_json(path)) is None:
            return
        there, here = flat(said), flat(json.loads(json.dumps(provenance)))
        differing = [k for k in here if not set(FOR_PEOPLE) & set(k.split(".")) and there.get(k) != here[k]]
        if differing:
            key = differing[0]
            raise MismatchError(
                f"{path}: {self.name} was made with {key}={there.get(key)}, this command has {key}={here.get(key)}; "
                f"repeat the command as it was, or take another --dataset, --round or "
                f"--student-name"
            )

    def write(self, shard: int, rows: Sequence[R]) -> None:
        """Commit one shard. Of several writers the first wins, and all of them vouch for its file."""
        assert len(rows) == self.plan.rows_of(shard), (len(rows), self.plan.rows_of(shard))
        table, buffer = to_table(rows, self.record.schema), io.BytesIO()
        facts = ShardStats.of(table)
        group = max(1, min(ROW_GROUP_ROWS, ROW_GROUP_BYTES * len(rows) // facts.arrow_bytes))
        pq.write_table(table, buffer, compression="zstd", row_group_size=group, write_page_checksum=True)
        data, path = buffer.getvalue(), self.path(shard)
        if not write_atomically(path, data, exclusive=True):
            # Another writer's, or of one that died before its manifest entry. A file is whole when it has its name.
            data = self._bytes(path)
            there = self.parse(shard, data)
            if self.record is Prompt and not there.equals(table):
                raise DataError(f"{path}: of other prompts, which never entered whole; delete {self.folder} and repeat")
            if there["id"].to_pylist() != [row.id for row in rows]:
                raise DataError(f"{path}: column 'id': these are not the rows of this shard; delete it and repeat")
            facts = ShardStats.of(there)
        entry = {
            "file": path.name,
            "sha256": sha256(data),
            "bytes": len(data),
            "rows": len(rows),
            "schema_version": SCHEMA_VERSION,
            "facts": facts.model_dump(),
        }
        write_json(self.entry_path(shard), entry, exclusive=True)

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
        data = self._bytes(path)
        if sha256(data) != entry.get("sha256"):
            how = "damaged on its way, or changed there" if self._remote else "delete both and repeat the command"
            raise MismatchError(f"{path}: its sha256 is not the one in {self.entry_path(shard)}; {how}")
        return self.parse(shard, data, columns)

    def _bytes(self, path: Location) -> bytes:
        try:
            return path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error

    def parse(self, shard: int, data: bytes, columns: list[str] | None = None) -> pa.Table:
        """A shard's bytes as a table of the record's schema and the plan's rows, or a DataError."""
        path = self.path(shard)
        try:
            with pq.ParquetFile(pa.BufferReader(_for_arrow(data)), page_checksum_verification=True) as file:
                whole = file.schema_arrow.equals(self.record.schema)
                table = file.read(columns if whole else None)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: not a readable Parquet file: {' '.join(str(error).split())}") from error
        if fault := None if whole else schema_fault(table, self.record.schema):
            raise DataError(f"{path}: {fault}")
        if table.num_rows != self.plan.rows_of(shard):
            raise DataError(f"{path}: {table.num_rows} rows, the shard plan says {self.plan.rows_of(shard)}")
        return table

    def commit(
        self,
        shards: Mapping[int, int],
        results: Iterable[tuple[tuple[int, int], T]],
        write: Callable[[int, list[T]], None],
        *,
        label: str,
    ) -> None:
        """Collect results, in whatever order they come, and commit each shard as soon as it is whole.

        Rows are made and written beside the engine's work. Whatever ends the run, a shard that is whole is committed.

        Args:
            shards: how many results each of them waits for; those that wait for none are written first.
            results: ((shard, row), result), one for each row that is waited for.
            write: commits a shard from all its results, in order; called in a thread of its own.
            label: what the progress is called.
        """
        collected: dict[int, dict[int, T]] = {shard: {} for shard, rows in shards.items() if rows}
        done = self.plan.rows - sum(shards.values())

        with progress(label, self.plan.rows, "row", done) as shown, ThreadPoolExecutor(1) as writer:
            writes: deque[Future[None]] = deque()
            for shard in (shard for shard in shards if shard not in collected):
                writes.append(writer.submit(write, shard, []))
                _settle(writes, WRITES_BEHIND)
            for (shard, row), result in results:
                collected[shard][row] = result
                shown.advance()
                if len(collected[shard]) == shards[shard]:
                    whole = collected.pop(shard)
                    writes.append(writer.submit(write, shard, [whole[row] for row in sorted(whole)]))
                _settle(writes, WRITES_BEHIND)
            _settle(writes, 0)
        assert not collected, f"no results for shards {sorted(collected)}"


def _for_arrow(data: bytes) -> pa.Buffer:
    """The same bytes in memory of Arrow's own.

    The threads that Arrow reads Parquet with may keep it a moment longer than the call that they read for. If it were
    Python's, they would need the interpreter to let go of it, and one that is ending takes the process down with it.
    """
    buffer = pa.allocate_buffer(len(data))
    memoryview(buffer).cast("B")[:] = data
    return buffer


def _settle(writes: deque[Future[None]], left: int) -> None:
    """Forget the writes that are done, wait until so many are left at most, and raise what one of them raised."""
    while writes and (writes[0].done() or len(writes) > left):
        writes.popleft().result()
