"""What the function of a command returns: the path of what it made, and numbers about it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Result:
    """Something that a command made. Printed, or taken as a path, it is the folder or file; subclasses add numbers."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def __fspath__(self) -> str:
        return str(self.path)
