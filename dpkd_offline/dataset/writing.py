"""Writes tables: claims one for its producer, and commits its shards.

Every file appears whole, by one atomic link or rename, and a manifest entry after its shard. Of several writers of a
shard the first wins.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from dpkd_offline.common.console import progress
from dpkd_offline.common.errors import DataError, MismatchError
from dpkd_offline.common.files import disk_errors, find_json, write_atomically, write_json
from dpkd_offline.common.hashing import sha256
from dpkd_offline.common.ownership import CLAIM, Claim, OutputFolder, claim_of, output_folder, require_ours
from dpkd_offline.dataset.columns import ShardStats
from dpkd_offline.dataset.layout import KINDS, SAMPLES
from dpkd_offline.dataset.manifest import ManifestEntry
from dpkd_offline.dataset.parquet import check_written
from dpkd_offline.dataset.provenance import FOR_PEOPLE, flat
from dpkd_offline.dataset.schema import HALF_TOP_LOGPS, Prompt, R, to_table
from dpkd_offline.dataset.table import ShardPlan, Table

T = TypeVar("T")
DATASET = "dataset"  # what its folder is
KNOWN = (
    "dataset.json",
    SAMPLES,
    *dict.fromkeys(kind.folder.split("/")[0] for kind in KINDS),
)  # what tells it from others
WRITES_BEHIND = 4  # shards that wait to be written
ROW_GROUP_ROWS = 256  # at most; and at most so many bytes, uncompressed, since the Hub's viewer reads whole row groups
ROW_GROUP_BYTES = 32 << 20


def require_dataset_folder(root: Path) -> None:
    """Raise UsageError or MismatchError where a folder is neither free nor a dataset, or the beginning of one."""
    require_ours(root, DATASET, KNOWN)


def dataset_output(root: Path, command: str) -> AbstractContextManager[OutputFolder]:
    """A dataset's folder for a command that alone makes all of it; see `output_folder`. `generate` and `score-teacher`
    share a folder, by claims of tables and shards."""
    return output_folder(root, DATASET, command, known=KNOWN)


@contextmanager
def creation(root: Path, identity: str) -> Iterator[None]:
    """While the first files of a dataset are written: of commands with other prompts one at most gets here.

    Raises:
        MismatchError: a command with other prompts began a dataset in this folder.
    """
    mine = Claim(kind=DATASET, run=identity)
    write_json(root / CLAIM, mine.model_dump(), exclusive=True)
    if claim_of(root) not in (mine, None):  # None: another worker with these prompts has just ended
        raise MismatchError(
            f"{root}: another command began a dataset of other prompts here; repeat that one, or delete the folder"
        )
    yield
    end_creation(root)


def end_creation(root: Path) -> None:
    """Remove the claim on a new dataset: dataset.json says it from now on. Where a command ended between the two, the
    next one that writes to the dataset does this.

    Raises:
        StorageError: the disk fails.
    """
    with disk_errors(root):
        (root / CLAIM).unlink(missing_ok=True)


def claim(table: Table[Any], provenance: Mapping[str, Any]) -> None:
    """Write `_table.json`, which says who produces a table; or raise MismatchError if somebody else does."""
    path = table.provenance_path
    shards = any(table.folder.glob("*.parquet"))  # looked for first: whoever made one had claimed the table
    if shards and not path.exists():
        raise MismatchError(f"{path}: no such file, but shards stand beside it; delete {table.folder}")
    write_json(path, provenance, exclusive=True)
    check_claim(table, provenance)


def check_claim(table: Table[Any], provenance: Mapping[str, Any]) -> None:
    """Raise MismatchError if the table was begun by another producer.

    `versions`, `config` and `license` are for people and may differ between the workers of a table; all else must
    agree.
    """
    if (stored := find_json(table.provenance_path)) is None:
        return
    before, now = flat(stored), flat(json.loads(json.dumps(provenance)))
    if differing := differing_keys(stored, provenance):
        key = differing[0]
        raise MismatchError(
            f"{table.provenance_path}: {table.name} was made with {key}={before.get(key)}, this command has "
            f"{key}={now.get(key)}; repeat the command as it was, or take another --dataset, --round or --student-name"
        )


def differing_keys(stored: Mapping[str, Any], provenance: Mapping[str, Any]) -> list[str]:
    """The keys in which a `_table.json` is not of this producer, but for those that are for people."""
    before, now = flat(stored), flat(json.loads(json.dumps(provenance)))
    keys = {**now, **before}  # what few tables have may be in one of them alone
    return [k for k in keys if not set(FOR_PEOPLE) & set(k.split(".")) and before.get(k) != now.get(k)]


def write_shard(table: Table[R], shard: int, rows: Sequence[R]) -> None:
    """Commit one shard. Of several writers the first wins, and the others write the entry for its file.

    Raises:
        DataError: the shard's file is there, and holds other rows; or these are more than one may hold.
        StorageError: the disk is full or fails.
    """
    assert len(rows) == table.plan.rows_of(shard), (len(rows), table.plan.rows_of(shard))
    new, path = to_table(rows, table.schema), table.path(shard)
    stats = ShardStats.of(new)
    data = _parquet(new, stats.arrow_bytes)
    check_written(data, stats.arrow_bytes, path, len(rows))
    if not write_atomically(path, [memoryview(data)], exclusive=True):
        # Another writer's, or of one that died before its manifest entry. A file is whole when it has its name.
        data = table.read_bytes(shard)
        stored = table.parse(shard, data)
        if table.record is Prompt and not stored.equals(new):
            raise DataError(
                f"{path}: holds other prompts, of a command that did not finish; delete {table.folder} and repeat"
            )
        if not stored["id"].equals(new["id"]):
            raise DataError(f"{path}: column 'id': these are not the rows of this shard; delete it and repeat")
        stats = ShardStats.of(stored)
    entry = ManifestEntry(file=path.name, sha256=sha256(data), bytes=len(data), rows=len(rows), facts=stats)
    write_json(table.entry_path(shard), entry.model_dump(), exclusive=True)


def _parquet(rows: pa.Table, arrow_bytes: int) -> pa.Buffer:
    """A shard's file, in memory of Arrow's own; a function of its rows."""
    group = max(1, min(ROW_GROUP_ROWS, ROW_GROUP_BYTES * len(rows) // arrow_bytes))
    buffer = pa.BufferOutputStream()
    options = _compact_options(rows.schema)
    pq.write_table(rows, buffer, compression="zstd", row_group_size=group, write_page_checksum=True, **options)
    return buffer.getvalue()


def _compact_options(schema: pa.Schema) -> dict[str, Any]:
    """How a table with numbers in half precision is written: first bytes of all numbers, then second ones and so on.

    So what is alike stands together for zstd: exponents, and the ids' upper bytes, which are small in a vocabulary that
    is in order of frequency. The others, of float32 or without such numbers, keep their bytes.
    """
    if HALF_TOP_LOGPS not in schema.types:
        return {}
    split = {name: "BYTE_STREAM_SPLIT" for name in map(_leaf, schema) if name is not None}
    texts = [field.name for field in schema if _leaf(field) is None]
    return {"column_encoding": split, "use_dictionary": texts, "compression_level": 6}


def _leaf(field: pa.Field) -> str | None:
    """What Parquet calls the numbers in the lists of a column; None of another column."""
    type_, path = field.type, [field.name]
    while pa.types.is_list(type_):
        type_, path = type_.value_type, [*path, "list", "element"]
    return ".".join(path) if pa.types.is_integer(type_) or pa.types.is_floating(type_) else None


def commit_results(
    plan: ShardPlan,
    shards: Mapping[int, int],
    results: Iterable[tuple[tuple[int, int], T]],
    write: Callable[[int, list[T]], None],
    *,
    label: str,
    tables: int = 1,
) -> None:
    """Collect results, in whatever order they come, and commit each shard as soon as it is whole.

    Rows are made and written beside the engine's work. Whatever ends the run, a shard that is whole is committed.

    Args:
        shards: how many results each of them waits for; those that wait for none are written first.
        results: ((shard, row), result), one for each row that is waited for.
        write: commits a shard from all its results, in order; called in a thread of its own.
        label: what the progress is called.
        tables: of how many there are results, a row of each one.
    """
    collected: dict[int, dict[int, T]] = {shard: {} for shard, rows in shards.items() if rows}
    rows = tables * plan.rows
    with progress(label, rows, "row", rows - sum(shards.values())) as shown, ThreadPoolExecutor(1) as writer:
        writes: deque[Future[None]] = deque()
        for shard in (shard for shard in shards if shard not in collected):
            writes.append(writer.submit(write, shard, []))
            _settle(writes, WRITES_BEHIND)
        for (shard, row), result in results:
            collected[shard][row] = result
            shown.advance()
            if len(collected[shard]) == shards[shard]:
                of_shard = collected.pop(shard)
                writes.append(writer.submit(write, shard, [of_shard[row] for row in sorted(of_shard)]))
            _settle(writes, WRITES_BEHIND)
        _settle(writes, 0)
    assert not collected, f"no results for shards {sorted(collected)}"


def _settle(writes: deque[Future[None]], left: int) -> None:
    """Forget the writes that are done, wait until so many are left at most, and raise what one of them raised."""
    while writes and (writes[0].done() or len(writes) > left):
        writes.popleft().result()
