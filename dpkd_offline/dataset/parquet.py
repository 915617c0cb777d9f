"""The Parquet file of a shard: how much it may hold is seen in its footer, before a page is read.

A file of a few kilobytes may hold gigabytes: of text that is repeated, of lists of one number, of rows. What it may
hold is bounded by its rows, which the shard plan knows, and by its own bytes, so that who sends much pays for it.
"""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dpkd_offline.common.errors import DataError
from dpkd_offline.common.files import opened, read_bounded
from dpkd_offline.common.locations import Location
from dpkd_offline.dataset.columns import arrow_bytes
from dpkd_offline.dataset.schema import schema_fault

ALWAYS_ALLOWED = 128 << 20  # bytes that a shard may hold in memory, however small its file
ROW_BYTES = 4 << 20  # of a row, where that is more: 500,000 of the teacher's likeliest tokens
LARGEST_RATIO = 64  # bytes in memory for one in the file, where that is more; real rows have about 4
VALUE_BYTES = 8  # of a number or a place in a list, with what tells the lists apart
SMALLEST_FOOTER_LIMIT = 4 << 20
MAGIC = b"PAR1"


def largest_file(rows: int) -> int:
    """The most bytes that the file of a shard of so many rows may have."""
    return max(ALWAYS_ALLOWED, rows * ROW_BYTES)


def read_buffer(path: Location, limit: int) -> pa.Buffer:
    """A file in memory of Arrow's own.

    The threads that Arrow reads Parquet with may keep it a moment longer than the call that they read for. If it were
    Python's, they would need the interpreter to let go of it, and one that is ending takes the process down with it.

    Raises:
        DataError: there is no such file, it is not a regular one, or it is longer than `limit` bytes.
    """
    if not isinstance(path, Path):
        return in_arrow(read_bounded(path, limit))
    with opened(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > limit:
            raise DataError(f"{path}: {size:,} bytes; a shard of these rows has {limit:,} at most")
        buffer = pa.allocate_buffer(size)
        read = file.readinto(memoryview(buffer).cast("B")) if size else 0
    return buffer if read == size else buffer.slice(0, read)


def in_arrow(data: bytes) -> pa.Buffer:
    """The same bytes in memory of Arrow's own."""
    buffer = pa.allocate_buffer(len(data))
    memoryview(buffer).cast("B")[:] = data
    return buffer


def check_written(data: pa.Buffer, arrow_bytes: int, path: Location, rows: int) -> None:
    """Raise DataError for a shard of ours that nobody would read."""
    try:
        _check_metadata(pq.read_metadata(pa.BufferReader(data)), len(data), path, rows)
        _check_size(arrow_bytes, path, _most_bytes(rows, len(data)))
    except DataError as error:
        raise DataError(f"{error}; take a smaller --shard-size") from error


def parse_shard(
    data: pa.Buffer, path: Location, schema: pa.Schema, rows: int, columns: list[str] | None = None
) -> pa.Table:
    """A shard's file as a table.

    Args:
        data: the file, in memory of Arrow's own.
        schema: the one that it must have.
        rows: as many as it must have.
        columns: which to read; by default all.

    Raises:
        DataError: it is no Parquet file, has another schema or other rows, or would be far larger in memory than rows
            of ours can be.
    """
    try:
        limits = {"thrift_string_size_limit": _footer_limit(data), "thrift_container_size_limit": max(1000, rows)}
        _check_footer_size(data, path)
        with pq.ParquetFile(pa.BufferReader(data), **limits) as file:
            metadata, stored = file.metadata, file.schema_arrow
            _check_metadata(metadata, len(data), path, rows)
        strings = [c.path for c in map(metadata.schema.column, range(metadata.num_columns)) if c.physical_type == TEXT]
        options = {**limits, "metadata": metadata, "page_checksum_verification": True}
        with pq.ParquetFile(pa.BufferReader(data), read_dictionary=strings, **options) as file:
            fits = stored.equals(schema)
            table = _read(file, stored, columns if fits else None, path, _most_bytes(rows, len(data)))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {' '.join(str(error).split())}") from error
    if fault := None if fits else schema_fault(table, schema):
        raise DataError(f"{path}: {fault}")
    if table.num_rows != rows:
        raise DataError(f"{path}: {table.num_rows} rows, the shard plan says {rows}")
    return table


TEXT = "BYTE_ARRAY"


def _most_bytes(rows: int, file_bytes: int) -> int:
    """What a shard may hold in memory."""
    return max(ALWAYS_ALLOWED, min(rows * ROW_BYTES, LARGEST_RATIO * file_bytes))


def _footer_limit(data: pa.Buffer) -> int:
    return max(SMALLEST_FOOTER_LIMIT, len(data) // 2)


def _check_footer_size(data: pa.Buffer, path: Location) -> None:
    tail = data.slice(max(0, len(data) - 8)).to_pybytes()
    if tail[4:] == MAGIC and (footer := int.from_bytes(tail[:4], "little")) > _footer_limit(data):
        raise DataError(f"{path}: not a readable Parquet file: a footer of {footer:,} bytes in a file of {len(data):,}")


def _check_metadata(metadata: pq.FileMetaData, file_bytes: int, path: Location, rows: int) -> None:
    """Raise DataError unless the footer tells of as many rows, and of no more than these may hold."""
    if metadata.num_rows != rows:
        raise DataError(f"{path}: {metadata.num_rows} rows, the shard plan says {rows}")
    if metadata.num_row_groups > rows:
        raise DataError(f"{path}: {metadata.num_row_groups} row groups of {rows} rows")
    size = 0
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for chunk in map(group.column, range(group.num_columns)):
            size += max(chunk.num_values * VALUE_BYTES, chunk.total_uncompressed_size, 0)
    _check_size(size, path, _most_bytes(rows, file_bytes))


def _check_size(size: int, path: Location, most: int) -> None:
    if size > most:
        raise DataError(
            f"{path}: {size:,} bytes or more when it is unpacked; one of its rows and length has {most:,} at most"
        )


def _read(file: pq.ParquetFile, stored: pa.Schema, columns: list[str] | None, path: Location, most: int) -> pa.Table:
    """The row groups of a file whose texts are read as numbers into a list of distinct ones.

    So what a text that stands there once and is repeated a million times will take is known before it takes it.
    """
    schema = stored if columns is None else pa.schema([stored.field(name) for name in columns])
    size, groups = 0, []
    for number in range(file.num_row_groups):
        group = file.read_row_group(number, columns)
        size += sum(arrow_bytes(chunk) for column in group.columns for chunk in column.chunks)
        _check_size(size, path, most)
        groups.append(group.select(schema.names).cast(schema) if columns is not None else group.cast(schema))
    return pa.concat_tables(groups)
