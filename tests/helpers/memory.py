"""Datasets at memory:// URLs."""

from __future__ import annotations

from pathlib import Path

import fsspec


def in_memory(folder: Path, name: str) -> str:
    """The URL of a copy of a folder in fsspec's memory."""
    files = fsspec.filesystem("memory")
    if files.exists(f"/{name}"):
        files.rm(f"/{name}", recursive=True)
    files.put(str(folder), f"/{name}", recursive=True)
    return f"memory://{name}"
