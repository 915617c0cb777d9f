"""Files that are whole or absent, and files of others: atomic writes, bounded reads, JSON.

What is read may be of somebody who wishes us ill. A file is opened once, and must be a regular one; how much of it is
read is bounded before; JSON becomes a model, whose keys have the types that they are used as.
"""

from __future__ import annotations

import io
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from pydantic import TypeAdapter, ValidationError

from dpkd_offline.common.errors import DataError, StorageError
from dpkd_offline.common.locations import Location
from dpkd_offline.common.secrets import redacted_value

M = TypeVar("M")
LARGEST_JSON_BYTES = 4 << 20  # of a file; as objects of Python it may take some fifty times as much
MOST_NESTED = 256  # objects and lists within each other; a table made by many merges nests its provenance


def fsync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """What the disk does while `path` is written, as a StorageError.

    Libraries in Rust report it in words, as errors of their own kinds or of none.
    """
    try:
        yield
    except Exception as error:
        in_words = re.search(r"\(os error (\d+)\)", str(error))
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
        elif in_words:
            reason = os.strerror(int(in_words[1]))
        else:
            raise
        raise StorageError(
            f"{path}: cannot be written: {reason}; what is committed is whole, and the same command goes on once this "
            f"is mended"
        ) from error


def write_atomically(path: Location, data: bytes | Iterable[bytes | memoryview], *, exclusive: bool = False) -> bool:
    """All of `data` at `path`, or nothing, whatever dies in between: also where the pieces that it comes in end with
    an error.

    With `exclusive` a file that is there stays as it is, so that of several writers one wins. Returns whether the file
    is ours.

    Raises:
        StorageError: the disk is full or fails. What was at `path` is there still.
    """
    assert isinstance(path, Path), f"{path}: what is at a URL is read only"
    temporary, ours = path.with_name(f".{path.name}.{uuid4().hex}.tmp"), True
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                for piece in (data,) if isinstance(data, bytes) else data:
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            if exclusive:
                os.link(temporary, path)
            else:
                temporary.replace(path)
        except FileExistsError:
            ours = False
        except FileNotFoundError:
            if not path.exists():
                raise
            ours = False  # another writer of this file was first, and swept ours away
        finally:
            temporary.unlink(missing_ok=True)
        fsync(path.parent)
        for stale in path.parent.glob(f".{path.name}.*.tmp"):  # of writers that died, or lost
            stale.unlink(missing_ok=True)
    return ours


def sweep_folder(folder: Path) -> None:
    """Remove what dead writers have left anywhere in a folder, beside files that others have written since."""
    for stale in folder.rglob(".*.tmp"):
        if stale.with_name(stale.name[1:].rsplit(".", 2)[0]).exists():
            stale.unlink(missing_ok=True)


def write_json(path: Location, value: Any, *, exclusive: bool = False) -> bool:
    """Write what JSON can hold, without secrets, and with `?` for what is no text in names that are not UTF-8.

    Otherwise as `write_atomically`.
    """
    text = json.dumps(redacted_value(value), indent=2, ensure_ascii=False) + "\n"
    return write_atomically(path, text.encode(errors="replace"), exclusive=exclusive)


# --- reading --------------------------------------------------------------------------------------------------------


@contextmanager
def opened(path: Location) -> Iterator[io.BufferedReader]:
    """A regular file, to read bytes from.

    It is opened once, so that what was checked is what is read; and opening a named pipe does not wait for a writer.

    Raises:
        DataError: there is none, it cannot be read, or something else has its name: a folder, a pipe, a device.
    """
    try:
        with _regular(path) if isinstance(path, Path) else path.open("rb") as file:
            yield file
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _regular(path: Path) -> io.BufferedReader:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(mode := os.fstat(descriptor).st_mode):
            raise DataError(f"{path}: {'a folder' if stat.S_ISDIR(mode) else 'a pipe or a device'}, not a file")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bounded(path: Location, limit: int) -> bytes:
    """All of a regular file, which must not be longer than `limit` bytes.

    Raises:
        DataError: as `opened`, and where the file is longer: no more of it is read.
    """
    if isinstance(path, Path):
        with opened(path) as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read(limit + 1) if size <= limit else b""
    else:
        try:
            data = path.read_bytes(limit + 1)
        except FileNotFoundError as error:
            raise DataError(f"{path}: no such file") from error
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
        size = len(data)
    if max(size, len(data)) > limit:
        raise DataError(f"{path}: longer than {limit:,} bytes, which is the most that is read of it")
    return data


def parse_json(data: bytes, path: Location, *, finite: bool = False) -> dict[str, Any]:
    """The object that a file holds.

    Args:
        finite: refuse NaN and numbers beyond a double, which JSON does not have, but sums of damaged values are.

    Raises:
        DataError: it holds something else, says a key of an object twice, or nests deeper than is sensible.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            keys = [key for key, _ in pairs]
            raise DataError(f"{path}: key {next(key for key in keys if keys.count(key) > 1)!r} stands there twice")
        return value

    try:
        value = json.loads(data.decode(), object_pairs_hook=once)
        if (depth := _nesting(value)) > MOST_NESTED:
            raise DataError(f"{path}: invalid JSON: {depth} objects and lists within each other")
        # No half of a surrogate pair, which could not be written again.
        json.dumps(value, ensure_ascii=False, allow_nan=not finite).encode()
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}:{error.colno}: invalid JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except DataError:
        raise
    except (ValueError, RecursionError) as error:  # and no thousands of digits, or of brackets within each other
        raise DataError(f"{path}: invalid JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}:1:1: expected a JSON object")
    return value


def _nesting(value: Any) -> int:
    """How many objects and lists stand within each other at most."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        level = [child for item in level for child in (item.values() if isinstance(item, dict) else item)]
    return depth


def find_json(path: Location, *, finite: bool = False) -> dict[str, Any] | None:
    """The object in a file, or None where there is no such file; otherwise as `parse_json`."""
    try:
        return parse_json(read_bounded(path, LARGEST_JSON_BYTES), path, finite=finite)
    except DataError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise


def read_json(path: Location) -> dict[str, Any]:
    """As `find_json`, and a DataError where there is no such file."""
    value = find_json(path)
    if value is None:
        raise DataError(f"{path}: no such file")
    return value


def find_model(path: Location, model: type[M]) -> M | None:
    """The object in a file as a model; None where there is no such file.

    A model is pydantic's, a dataclass, or a TypedDict of typing_extensions.

    Raises:
        DataError: it is no JSON object, or a key is missing or wrong; names file and key.
    """
    value = find_json(path)
    return None if value is None else as_model(value, path, model)


def read_model(path: Location, model: type[M]) -> M:
    """As `find_model`, and a DataError where there is no such file."""
    return as_model(read_json(path), path, model)


def as_model(value: Any, path: Location, model: type[M]) -> M:
    """What the file at `path` said, as a model; raises as `find_model` does."""
    try:
        return TypeAdapter(model).validate_python(value)
    except ValidationError as error:
        raise DataError(f"{path}: {first_fault(error)}") from error


def first_fault(error: ValidationError) -> str:
    """The first key that is missing or wrong, and why, in one line."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    return f"key '{'.'.join(map(str, first['loc']))}' is missing or wrong: {first['msg'].lower()}"
