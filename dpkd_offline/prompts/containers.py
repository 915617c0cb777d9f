"""Rows of one file, by the kind that its name says: JSON, CSV, Parquet, Arrow; text may be compressed.

Text is read and unpacked piece by piece, so that memory does not grow with the file. A row that is wrong comes out as
a DataError in its turn, and the rows behind it go on; what ends a whole file is raised.

A new kind of file is a function from a path to its rows and an entry in TEXT_READERS or TABLE_READERS.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from dpkd_offline.common.errors import DataError, first_line
from dpkd_offline.common.locations import Location

HALF_CHARACTER = re.compile("[\\ud800-\\udfff]")  # JSON can say it, UTF-8 cannot
LARGEST_ROW = 32 << 20  # bytes of text, as it is stored
PIECE = 1 << 20
ROWS_AT_ONCE = 1024
BLANK = " \t\r\n"
LFS_POINTER = b"version https://git-lfs"

Columns = dict[str, Any]
Rows = Iterator[tuple[int, Columns | DataError]]  # each with its line, or its number from 1


def printable(path: Location) -> str:
    """A path as messages and files can hold it: a name in other bytes than UTF-8's has these escaped."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def reader_of(path: Location) -> Callable[[Location], Rows] | None:
    """What reads a file of this name, or None where no kind of file is called so."""
    *_, kind, packing = ["", "", *path.name.lower().split(".")[1:]]
    if packing in UNPACKERS and kind in TEXT_READERS:
        return partial(TEXT_READERS[kind], unpack=UNPACKERS[packing])
    return (TEXT_READERS | TABLE_READERS).get(packing)


# --- text -----------------------------------------------------------------------------------------------------------


def _gunzip(file: BinaryIO) -> BinaryIO:
    return cast(BinaryIO, gzip.GzipFile(fileobj=file))


def _unpack_zstd(file: BinaryIO) -> BinaryIO:
    return io.BufferedReader(pa.CompressedInputStream(file, "zstd"), PIECE)


Unpack = Callable[[BinaryIO], Any]  # of packed bytes, a file of the bytes in them
UNPACKERS: dict[str, Unpack] = {"gz": _gunzip, "zst": _unpack_zstd, "bz2": bz2.BZ2File, "xz": lzma.LZMAFile}


@contextmanager
def _opened(path: Location, unpack: Unpack | None = None) -> Iterator[Any]:
    """A file to read, unpacked; what goes wrong with it meanwhile is a DataError."""
    name = printable(path)
    try:
        with path.open("rb") as file:
            if isinstance(path, Path):
                if file.read(len(LFS_POINTER)) == LFS_POINTER:
                    raise DataError(f"{name}: a pointer of Git LFS, not the file; run `git lfs pull` in the clone")
                file.seek(0)
            yield file if unpack is None else unpack(file)
    except FileNotFoundError as error:
        raise DataError(f"{name}: no such file") from error
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{name}: cannot be unpacked: {error}") from error
    except OSError as error:
        raise DataError(f"{name}: {error.strerror or first_line(error)}") from error


def _lines(file: Any, name: str) -> Iterator[tuple[int, bytes]]:
    number = 0
    while line := file.readline(LARGEST_ROW + 1):
        number += 1
        if len(line) > LARGEST_ROW:
            raise DataError(f"{name}:{number}: a line of more than {LARGEST_ROW >> 20} MiB")
        yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def _not_text(place: str, error: UnicodeDecodeError) -> DataError:
    return DataError(f"{place}:{error.start + 1}: not UTF-8 text: {error.reason}; save it as UTF-8")


# --- JSON -----------------------------------------------------------------------------------------------------------


def _once(pairs: list[tuple[str, Any]]) -> Columns:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} stands there twice")
    return value


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no JSON; write null, or leave the key out")


DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_no_number)


def _json(path: Location, unpack: Unpack | None = None) -> Rows:
    """The objects on the lines of a file, or those in its array."""
    with _opened(path, unpack) as file:
        is_array = file.peek(PIECE).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
        yield from (_array if is_array else _json_lines)(file, printable(path))


def _json_lines(file: Any, name: str) -> Rows:
    for number, line in _lines(file, name):
        if number == 1 and line.strip() == b"{":
            raise DataError(f"{name}:1: an object on several lines; write each on one line, or all of them in an array")
        if line.strip():
            try:
                yield number, _line_of_json(line.rstrip(), f"{name}:{number}")
            except DataError as error:
                yield number, error


def _line_of_json(line: bytes, place: str) -> Columns:
    try:
        value = DECODER.decode(line.decode())  # not loads(), which takes halves of characters, or UTF-16, for text
        half = _half_character(value) if b"\\u" in line else None
    except json.JSONDecodeError as error:
        raise DataError(f"{place}:{error.colno}: invalid JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise _not_text(place, error) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: invalid JSON: {_in_words(error)}") from error
    if not isinstance(value, dict):
        raise DataError(f"{place}:1: expected a JSON object, this is {_kind(value)}")
    if half:
        raise DataError(f"{place}: {half}")
    return value


def _half_character(value: object) -> str | None:
    """What is wrong with text that has an escape of one half of a character."""
    half = HALF_CHARACTER.search(json.dumps(value, ensure_ascii=False))
    return f"\\u{ord(half[0]):x} is half a character" if half else None


def _in_words(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "lists or objects too deep within each other"
    return first_line(error).partition(";")[0] if "digits" in str(error) else first_line(error)


def _kind(value: object) -> str:
    names = {list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


class _Pieces:
    """The text of a file, of which as much is in memory as is being parsed."""

    def __init__(self, file: Any, name: str) -> None:
        self._file, self._name = file, name
        self._decode = codecs.getincrementaldecoder("utf-8-sig")()
        self._bytes = 0
        self.text, self.at, self.ended = "", 0, False

    def more(self) -> None:
        """Read on, in pieces that grow with what is parsed, so that parsing it again costs no more than once."""
        piece = self._file.read(max(PIECE, len(self.text) - self.at))
        try:
            self.text = self.text[self.at :] + self._decode.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            place = f"{self._name}: byte {self._bytes + error.start + 1}"
            raise DataError(f"{place}: not UTF-8 text: {error.reason}; save it as UTF-8") from error
        self._bytes += len(piece)
        self.at, self.ended = 0, not piece

    def next_mark(self) -> str:
        """The next character that is not blank, which stays; "" at the end."""
        while True:
            rest = self.text[self.at : self.at + PIECE]
            if mark := rest.lstrip(BLANK)[:1]:
                self.at += len(rest) - len(rest.lstrip(BLANK))
                return mark
            self.at += len(rest)
            if self.at == len(self.text):
                if self.ended:
                    return ""
                self.more()

    def row(self, place: str) -> Columns | DataError:
        """The value that begins here; a DataError in its place where one cannot be used but the next begins."""
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
                half = _half_character(value) if "\\u" in self.text[self.at : end] else None
                self.at = end
                if not isinstance(value, dict):
                    return DataError(f"{place}: expected a JSON object, this is {_kind(value)}")
                return DataError(f"{place}: {half}") if half else value
            except json.JSONDecodeError as error:
                if self.ended:
                    raise DataError(f"{place}: invalid JSON: {error.msg}") from error
                if len(self.text) - self.at > LARGEST_ROW:
                    raise DataError(f"{place}: invalid JSON, or more than {LARGEST_ROW >> 20} MiB") from error
                self.more()
            except (ValueError, RecursionError) as error:
                raise DataError(f"{place}: invalid JSON: {_in_words(error)}") from error


def _array(file: Any, name: str) -> Rows:
    """The objects in an array, one by one. One that is no JSON ends it: nobody knows where the next begins."""
    pieces, number = _Pieces(file, name), 0
    assert pieces.next_mark() == "["
    pieces.at += 1
    mark = pieces.next_mark()
    while mark != "]":
        number += 1
        yield number, pieces.row(f"{name}:{number}")
        mark = pieces.next_mark()
        if mark == ",":
            pieces.at += 1
            pieces.next_mark()
            mark = ""  # a row must follow
        elif mark != "]":
            raise DataError(f"{name}:{number}: invalid JSON: expected ',' or ']' behind this row")
    pieces.at += 1
    if pieces.next_mark():
        raise DataError(f"{name}: more text behind the array")


# --- CSV ------------------------------------------------------------------------------------------------------------


def _separated(path: Location, unpack: Unpack | None = None, *, comma: str) -> Rows:
    """The rows of a table as text, whose first line names the columns. An empty cell says nothing."""
    name = printable(path)
    csv.field_size_limit(LARGEST_ROW)
    with _opened(path, unpack) as file:
        cells = csv.reader(_decoded(file, name), delimiter=comma, strict=True)
        header = next(_wrong_as_errors(cells, name), (1, []))[1]
        if isinstance(header, DataError):
            raise header
        check_names(header, f"{name}:1")
        if len(header) == 1 and (mark := next((mark for mark in ";\t|," if mark in header[0]), None)):
            raise DataError(f"{name}:1: columns are parted by {mark!r}; save it with commas, or with tabs as .tsv")
        for number, row in _wrong_as_errors(cells, name):
            if isinstance(row, DataError):
                yield number, row
            elif len(row) != len(header):
                yield number, DataError(f"{name}:{number}: {len(row)} cells, and the first line has {len(header)}")
            else:
                yield number, {column: cell or None for column, cell in zip(header, row, strict=True)}


def _decoded(file: Any, name: str) -> Iterator[str]:
    for number, line in _lines(file, name):
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            raise _not_text(f"{name}:{number}", error) from error


def _wrong_as_errors(cells: Any, name: str) -> Iterator[tuple[int, list[str] | DataError]]:
    """The rows that are not blank, each with the line on which it begins."""
    while True:
        number = cells.line_num + 1
        try:
            row = next(cells)
        except StopIteration:
            return
        except csv.Error as error:
            yield number, DataError(f"{name}:{number}: invalid CSV: {error}")
        else:
            if row:
                yield number, row


def check_names(names: Sequence[str], place: str) -> None:
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(f"{place}: column '{twice[0]}' stands there twice")


# --- Arrow ----------------------------------------------------------------------------------------------------------

# In this thread alone: one of Arrow's that still has to do with a file of Python's when the interpreter ends takes the
# process down with it, and what comes first may be an error in a row.


def _parquet(path: Location) -> Rows:
    with _read_by_arrow(path, "Parquet") as opened, pq.ParquetFile(opened, pre_buffer=False) as file:
        yield from _numbered(file.iter_batches(ROWS_AT_ONCE, use_threads=False), printable(path))


def _arrow(path: Location) -> Rows:
    """A file of Arrow, as `datasets` saves its tables, or of Feather."""
    options = pa.ipc.IpcReadOptions(use_threads=False)
    with _read_by_arrow(path, "Arrow") as opened, _in_memory(path, opened) as file:
        with_footer = file.read(6) == b"ARROW1"
        file.seek(0)
        yield from _numbered(_batches(file, options, with_footer), printable(path))


def _in_memory(path: Location, opened: Any) -> Any:
    """A file of this machine as Arrow maps it, so that a table as large as the file takes no memory."""
    return pa.memory_map(os.fsencode(path)) if isinstance(path, Path) else opened


def _batches(opened: Any, options: pa.ipc.IpcReadOptions, with_footer: bool) -> Iterator[pa.RecordBatch]:
    if with_footer:
        file = pa.ipc.open_file(opened, options=options)
        batches = (file.get_batch(number) for number in range(file.num_record_batches))
    else:
        batches = iter(pa.ipc.open_stream(opened, options=options))
    for batch in batches:
        batch.validate(full=True)  # what is not checked here may be read from anywhere
        yield from (batch.slice(first, ROWS_AT_ONCE) for first in range(0, len(batch), ROWS_AT_ONCE))


@contextmanager
def _read_by_arrow(path: Location, kind: str) -> Iterator[Any]:
    try:
        with _opened(path) as opened:
            yield opened
    except (pa.ArrowException, UnicodeDecodeError, MemoryError) as error:  # the latter where a damaged file claims much
        raise DataError(f"{printable(path)}: not a readable {kind} file: {first_line(error)}") from error


def _numbered(batches: Iterator[pa.RecordBatch], name: str) -> Rows:
    number = 0
    for batch in batches:
        check_names(batch.schema.names, name)
        numbers = [field.name for field in batch.schema if pa.types.is_floating(field.type)]
        for columns in batch.to_pylist():
            number += 1
            yield number, columns | {name: None for name in numbers if columns[name] != columns[name]}  # pandas' NaN


# By the end of the name.
TEXT_READERS: dict[str, Any] = {
    "jsonl": _json,
    "ndjson": _json,
    "json": _json,
    "csv": partial(_separated, comma=","),
    "tsv": partial(_separated, comma="\t"),
}
TABLE_READERS: dict[str, Any] = {"parquet": _parquet, "arrow": _arrow, "feather": _arrow}
