"""Hashes of bytes, files and JSON values."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from dpkd_offline.common.files import opened


def sha256(data: bytes | memoryview) -> str:
    """Of bytes, or of anything that gives them without a copy."""
    return hashlib.sha256(data).hexdigest()


def fingerprint(value: Any) -> str:
    """A stable hash of anything JSON can hold."""
    return sha256(json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode())


def file_sha256(path: Path) -> str:
    """Of a regular file; a DataError where there is none."""
    with opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
