"""What the function of a command returns: the path of what it made, and numbers about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Result:
    """Something that a command made. Printed, or taken as a path, it is the folder or file; subclasses add numbers."""

    path: Path
    # What a person should hear about, a sentence each. It follows from what is stored, not from how it came about.
    warnings: tuple[str, ...] = field(default=(), kw_only=True)

    def __str__(self) -> str:
        return str(self.path)

    def __fspath__(self) -> str:
        return str(self.path)
