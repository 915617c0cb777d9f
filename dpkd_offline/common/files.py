"""Files that are whole or absent: atomic writes and JSON."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from dpkd_offline.common.errors import DataError, StorageError
from dpkd_offline.common.locations import Location


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


def write_atomically(path: Location, data: bytes | Iterable[bytes], *, exclusive: bool = False) -> bool:
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
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    return write_atomically(path, text.encode(), exclusive=exclusive)


def parse_json(data: bytes, path: Location) -> dict[str, Any]:
    """The object that a file holds; a DataError where it holds something else, or says a key of an object twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            keys = [key for key, _ in pairs]
            raise DataError(f"{path}: key {next(key for key in keys if keys.count(key) > 1)!r} stands there twice")
        return value

    try:
        value = json.loads(data.decode(), object_pairs_hook=once)
        json.dumps(value, ensure_ascii=False).encode()  # no half of a surrogate pair, which could not be written again
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


def find_json(path: Location) -> dict[str, Any] | None:
    """The object in a file, or None where there is no such file; a DataError where it holds something else."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    return parse_json(data, path)


def read_json(path: Location) -> dict[str, Any]:
    """As `find_json`, and a DataError where there is no such file."""
    value = find_json(path)
    if value is None:
        raise DataError(f"{path}: no such file")
    return value
