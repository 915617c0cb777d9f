"""Rows of JSONL and Parquet files, of folders of these, and of `datasets`, each with its place."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dpkd_offline.common.errors import DataError, UnavailableError, UsageError
from dpkd_offline.common.locations import Location

HALF_CHARACTER = re.compile("[\\ud800-\\udfff]")  # JSON can say it, UTF-8 cannot


@dataclass(frozen=True)
class Row:
    """One row of a source, and where it stands."""

    place: str  # file:line
    columns: dict[str, Any]


def read_rows(source: str | Location) -> Iterator[Row]:
    """The rows of a JSONL or Parquet file, of a directory of these, or of a `datasets` NAME[@CONFIG][:SPLIT]."""
    path = Path(source) if isinstance(source, str) else source
    if path.is_dir():
        files = sorted((f for f in path.iterdir() if f.suffix in (".jsonl", ".parquet")), key=str)
        if not files:
            raise DataError(f"{source}: no .jsonl or .parquet file in this directory")
        for file in files:
            yield from read_rows(file)
    elif path.suffix == ".jsonl":
        yield from _jsonl(path)
    elif path.suffix == ".parquet":
        yield from _parquet(path)
    elif path.exists():
        raise UsageError(f"{source}: expected a .jsonl or .parquet file, a directory, or the name of a dataset")
    elif isinstance(source, str):
        yield from _named(source)
    else:
        raise DataError(f"{source}: no such file")


def source_name(source: str | Location) -> str:
    """What a source is called, without where it lies."""
    return source if isinstance(source, str) and not Path(source).exists() else Path(str(source)).name


def _jsonl(path: Location) -> Iterator[Row]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    columns = json.loads(line.rstrip())
                except json.JSONDecodeError as error:
                    raise DataError(f"{path}:{number}:{error.colno}: invalid JSON: {error.msg}") from error
                except UnicodeDecodeError as error:
                    raise DataError(f"{path}:{number}:{error.start + 1}: not UTF-8 text: {error.reason}") from error
                if not isinstance(columns, dict):
                    raise DataError(f"{path}:{number}:1: expected a JSON object")
                if b"\\u" in line and (half := HALF_CHARACTER.search(json.dumps(columns, ensure_ascii=False))):
                    raise DataError(f"{path}:{number}: \\u{ord(half[0]):x} is half a character")
                yield Row(f"{path}:{number}", columns)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error


def _parquet(path: Location) -> Iterator[Row]:
    number = 0
    try:
        # In this thread alone: one of Arrow's that still has to do with a file of Python's when the interpreter ends
        # takes the process down with it, and what comes first may be an error in a row.
        with path.open("rb") as opened, pq.ParquetFile(opened, pre_buffer=False) as file:
            for batch in file.iter_batches(1024, use_threads=False):
                for columns in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}:{number}", columns)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {' '.join(str(error).split())}") from error


def _named(source: str) -> Iterator[Row]:
    import datasets

    name, _, split = source.partition(":")
    name, _, config = name.partition("@")
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UnavailableError(f"'{source}': neither a file nor a dataset that can be loaded: {reason}") from error
    for number, columns in enumerate(rows, start=1):
        yield Row(f"{source}:{number}", columns)


def text_in(row: Row, column: str) -> str | None:
    value = row.columns.get(column)
    if value is not None and not isinstance(value, str):
        raise DataError(f"{row.place}: column '{column}' must be a string, it is {type(value).__name__}")
    return value


def read_texts(source: str | Location, column: str = "text") -> Iterator[str]:
    """The texts of a corpus: the same kinds of source, one column."""
    for row in read_rows(source):
        text = text_in(row, column)
        if text is None:
            raise DataError(f"{row.place}: column '{column}' is missing")
        yield text
