"""Keys that were met before, kept outside memory."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

CACHE_KIB = 16 * 1024

Place = str | int


class Seen:
    """Keys and the place where each stood first, in a private file on disk that ends with the object."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("")  # no name: a temporary file, and only once the cache is full
        for setting in ("journal_mode = OFF", f"cache_size = -{CACHE_KIB}"):
            self._database.execute(f"PRAGMA {setting}")
        self._database.execute("CREATE TABLE seen (key TEXT PRIMARY KEY, place) WITHOUT ROWID")

    def add(self, keys: Sequence[str], places: Sequence[Place]) -> tuple[int, Place] | None:
        """Remember keys, each at a place of its own.

        Returns the index of the first one that was there before, or earlier in `keys`, and where; None if all are new.
        """
        rows = zip(keys, places, strict=True)
        if self._database.executemany("INSERT OR IGNORE INTO seen VALUES (?, ?)", rows).rowcount == len(keys):
            return None
        for index, (key, place) in enumerate(zip(keys, places, strict=True)):
            (first,) = self._database.execute("SELECT place FROM seen WHERE key = ?", (key,)).fetchone()
            if first != place:
                return index, first
        raise AssertionError("a key was refused that stands nowhere")
