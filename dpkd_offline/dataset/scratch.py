"""Rows and keys outside memory, in files that end with the process."""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Generic

import pyarrow as pa

from dpkd_offline.common.files import disk_errors
from dpkd_offline.dataset.schema import R, from_table

CACHE_KIB = 16 * 1024
Place = str | int


class KeyIndex:
    """Keys and the place where each stood first, in a private file on disk that is gone when the object is."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("")  # no name: a temporary file, and only once the cache is full
        for setting in ("journal_mode = OFF", f"cache_size = -{CACHE_KIB}"):
            self._database.execute(f"PRAGMA {setting}")
        self._database.execute("CREATE TABLE seen (key TEXT PRIMARY KEY, place) WITHOUT ROWID")

    def add(self, keys: Sequence[str], places: Sequence[Place]) -> tuple[int, Place] | None:
        """Add keys, each with a place of its own.

        Returns the index of the first key that was added before, also earlier in `keys`, and the place where it stood;
        None if all keys are new.
        """
        rows = zip(keys, places, strict=True)
        if self._database.executemany("INSERT OR IGNORE INTO seen VALUES (?, ?)", rows).rowcount == len(keys):
            return None
        for index, (key, place) in enumerate(zip(keys, places, strict=True)):
            (first,) = self._database.execute("SELECT place FROM seen WHERE key = ?", (key,)).fetchone()
            if first != place:
                return index, first
        raise AssertionError("a key was refused that stands nowhere")

    def place(self, key: str) -> Place | None:
        """Where a key stood first; None where it was never added."""
        row = self._database.execute("SELECT place FROM seen WHERE key = ?", (key,)).fetchone()
        return None if row is None else row[0]


# In one thread: none of Arrow's own is to hold what it read from a file of Python's when the interpreter ends.
WRITE, READ = pa.ipc.IpcWriteOptions(compression="zstd", use_threads=False), pa.ipc.IpcReadOptions(use_threads=False)


class Spool(Generic[R]):
    """Rows in a file without a name, so that nothing is left of it, however the process ends.

    The file lies in the dataset's folder, or in the nearest one above it that exists. First add rows, then read them.
    """

    def __init__(self, root: Path, record: type[R]) -> None:
        self._record: type[R] = record
        self._folder = next(folder for folder in (root, *root.parents) if folder.is_dir())
        self._open: tuple[IO[bytes], Any] | None = None  # the file and its writer, from the first row on
        self._rows = 0

    def add(self, rows: pa.Table) -> None:
        """Some more rows, all in one schema of the record."""
        if self._open is None:
            with disk_errors(self._folder):
                file = tempfile.TemporaryFile(dir=self._folder)
            self._open = file, pa.ipc.new_stream(file, rows.schema, options=WRITE)
        with disk_errors(self._folder):
            self._open[1].write_table(rows)
        self._rows += len(rows)

    def __len__(self) -> int:
        return self._rows

    def __iter__(self) -> Iterator[R]:
        """The rows in the order in which they were added; no more can be added."""
        if self._open is None:
            return
        file, writer = self._open
        writer.close()
        file.seek(0)
        with pa.ipc.open_stream(file, options=READ) as batches:
            for batch in batches:
                yield from from_table(pa.Table.from_batches([batch]), self._record)

    def __enter__(self) -> Spool[R]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._open is not None:
            self._open[0].close()
