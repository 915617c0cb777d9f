"""Files that are whole or absent: atomic writes, hashes, JSON."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

from dpkd_offline.errors import DataError


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def fingerprint(value: Any) -> str:
    """A stable hash of anything JSON can hold."""
    return sha256(json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode())


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, data: bytes, *, exclusive: bool = False) -> bool:
    """All of `data` at `path`, or nothing, whatever dies in between.

    With `exclusive` an existing file stays as it is. Returns whether the file is ours: of two writers one wins.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if exclusive:
            try:
                os.link(temporary, path)
            except (FileExistsError, FileNotFoundError):  # another was first; it may have swept ours away
                return False
        else:
            try:
                temporary.replace(path)
            except FileNotFoundError:  # another writer committed this file and swept ours away
                return False
        fsync_folder(path.parent)
        for stale in path.parent.glob(f".{path.name}.*.tmp"):  # of writers that died
            stale.unlink(missing_ok=True)
        return True
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any, *, exclusive: bool = False) -> bool:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    return write_atomically(path, text.encode(), exclusive=exclusive)


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}:{error.colno}: invalid JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}:1:1: expected a JSON object")
    return value
