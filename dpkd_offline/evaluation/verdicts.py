"""The table of a judge's verdicts, a line each, which lasts from the moment that it came: none is paid for twice.

Verdicts are appended as they come and written to the disk one by one. A process that is killed may leave half a line,
which the next one drops. At the end the lines are put in order.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass as checked_dataclass

from dpkd_offline.common.errors import DataError, MismatchError
from dpkd_offline.common.files import as_model, disk_errors, fsync, opened, parse_json, write_atomically
from dpkd_offline.common.secrets import redacted_value

Order = Literal["a-b", "b-a", "response", "reference"]  # pairwise: who stands first; score: what is rated
VerdictKey = tuple[int, str, Order]  # seed, id of the prompt, order


@checked_dataclass(frozen=True)
class Verdict:
    """What a judge said to one question."""

    judge: str
    prompt_version: int
    seed: int
    id: str  # of the prompt
    order: Order
    text: str  # as the judge wrote it; of a model that is scored, its likeliest word
    # pairwise: how much A is preferred, a probability, or 0 or 1 where only text is known. score: the score.
    value: Annotated[float | None, Field(ge=0, le=10)] = None  # None where it failed
    probability: Annotated[float | None, Field(ge=0, le=1)] = (
        None  # of the text among the words it could be; None where unknown
    )
    failure: str | None = None  # why there is no value

    @property
    def key(self) -> VerdictKey:
        return self.seed, self.id, self.order


@dataclass
class VerdictTable:
    """The verdicts of one judge in a file, open for more of them."""

    path: Path
    verdicts: dict[VerdictKey, Verdict]
    _file: BinaryIO | None = None

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    @classmethod
    def read(cls, path: Path, judge: str, prompt_version: int) -> VerdictTable:
        """The verdicts that are there; half a line at the end is none.

        Raises:
            DataError: a line is malformed.
            MismatchError: a verdict is of another judge, or another question.
        """
        verdicts: dict[VerdictKey, Verdict] = {}
        if path.exists():
            with opened(path) as file:
                for number, line in enumerate(file, start=1):
                    if not line.endswith(b"\n"):
                        break
                    place = Path(f"{path}:{number}")
                    verdict = as_model(parse_json(line, place), place, Verdict)
                    if (verdict.judge, verdict.prompt_version) != (judge, prompt_version):
                        raise MismatchError(
                            f"{place}: a verdict of {verdict.judge}, prompt version {verdict.prompt_version}, and not "
                            f"of {judge}, version {prompt_version}; take another --output"
                        )
                    if verdicts.setdefault(verdict.key, verdict) is not verdict:
                        raise DataError(f"{place}: prompt '{verdict.id}' has a verdict before this one")
        return cls(path, verdicts)

    @contextmanager
    def appending(self) -> Iterator[None]:
        """Open the file for `add`, without the half of a line that a killed process left at its end."""
        with disk_errors(self.path):
            self._file = self.path.open("ab")
            self._file.truncate(_whole_lines(self.path))
            fsync(self.path.parent)
        try:
            yield
        finally:
            with self._lock, disk_errors(self.path):  # what comes later, from another thread, is nobody's any more
                file, self._file = self._file, None
                file.close()

    def add(self, verdict: Verdict) -> None:
        """Write a verdict to the disk, from whatever thread; it stays, whoever dies then."""
        with self._lock, disk_errors(self.path):
            if self._file is not None:
                self._file.write(_line(verdict))
                self._file.flush()
                os.fsync(self._file.fileno())
                self.verdicts[verdict.key] = verdict

    def put_in_order(self, keys: Sequence[VerdictKey]) -> str:
        """Write the file anew in the order of `keys`, those that are not among them behind; returns its SHA-256."""
        rest = sorted(self.verdicts.keys() - set(keys))
        digest = hashlib.sha256()
        write_atomically(self.path, self._lines([*(key for key in keys if key in self.verdicts), *rest], digest))
        return digest.hexdigest()

    def _lines(self, keys: Sequence[VerdictKey], digest: Any) -> Iterator[bytes]:
        for key in keys:
            line = _line(self.verdicts[key])
            digest.update(line)
            yield line


def _line(verdict: Verdict) -> bytes:
    """A verdict as JSON; an endpoint may have echoed its key."""
    row = asdict(verdict) | redacted_value({"text": verdict.text, "failure": verdict.failure})
    return (json.dumps(row, ensure_ascii=False) + "\n").encode()


def _whole_lines(path: Path) -> int:
    """How many bytes of a file are whole lines."""
    size = 0
    with opened(path) as file:
        for line in file:
            size += len(line) if line.endswith(b"\n") else 0
    return size
