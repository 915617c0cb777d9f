"""Reads what others wrote as if they wished us ill: names follow from the shard plan, contents must have their hash."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from dpkd_offline.common.errors import DataError, MismatchError
from dpkd_offline.common.files import LARGEST_JSON_BYTES, as_model, opened, parse_json, read_bounded
from dpkd_offline.common.locations import READ_AHEAD_BYTES, Location
from dpkd_offline.dataset.columns import ShardStats
from dpkd_offline.dataset.integrity import check_links
from dpkd_offline.dataset.manifest import ManifestEntry
from dpkd_offline.dataset.parquet import largest_file
from dpkd_offline.dataset.provenance import Audit
from dpkd_offline.dataset.table import Table


def check_whole(table: Table[Any]) -> None:
    """Raise unless somebody's table has the shards of the plan and their entries, and no others."""
    check_links(table)
    entries = {path.name for path in (table.folder / "_manifest").glob("*.json")}
    shards = {path.name for path in table.folder.glob("*.parquet")}
    if min(len(entries), len(shards)) < table.plan.count:  # asked first: a plan may say anything
        raise DataError(
            f"{table.folder}: not whole: {len(shards)} shards and {len(entries)} manifest entries of "
            f"{table.plan.count}; perhaps somebody is storing them now"
        )
    planned = {path(shard).name for path in (table.path, table.entry_path) for shard in range(table.plan.count)}
    if different := sorted((entries | shards) ^ planned):
        raise DataError(f"{table.folder}: {different[0]!r} is {'missing' if different[0] in planned else 'not of it'}")


def read_entry(table: Table[Any], shard: int, data: bytes) -> ManifestEntry:
    """A manifest entry, held against the plan."""
    path = table.entry_path(shard)
    entry = ManifestEntry.parse(parse_json(data, path), path)
    entry.check(path, {"file": table.path(shard).name, "rows": table.plan.rows_of(shard)})
    if entry.bytes > (most := largest_file(table.plan.rows_of(shard))):
        raise DataError(f"{path}: bytes is {entry.bytes}; a shard of these rows has {most} at most")
    return entry


def pieces(table: Table[Any], shard: int, entry: ManifestEntry) -> Iterator[bytes]:
    """The bytes of a shard, a piece at a time; after the last one, MismatchError unless they are those of its entry."""
    path, digest, left = table.path(shard), hashlib.sha256(), entry.bytes
    with opened(path) as file:
        while left >= 0 and (piece := file.read(READ_AHEAD_BYTES)):
            digest.update(piece)
            left -= len(piece)
            yield piece
    if left or digest.hexdigest() != entry.sha256:
        raise MismatchError(
            f"{path}: its sha256 is not the one in {table.entry_path(shard)}; damaged on its way, or changed there"
        )


def check_shard_stats(table: Table[Any], shard: int, data: pa.Buffer, entry: ManifestEntry) -> None:
    """Raise unless a shard has the columns of its table, the rows of the plan, and what its entry says of them."""
    if ShardStats.of(table.parse(shard, data)) != entry.facts:
        raise MismatchError(f"{table.entry_path(shard)}: its facts are not those of the rows in {table.path(shard)}")


def read_audit(path: Location) -> bytes:
    """An audit, with all that cards take from it."""
    data = read_small(path)
    as_model(parse_json(data, path, finite=True), path, Audit)
    return data


def read_small(path: Location) -> bytes:
    """A file of JSON, as it is."""
    return read_bounded(path, LARGEST_JSON_BYTES)
