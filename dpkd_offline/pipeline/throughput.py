"""How fast stages ran here: `stages.jsonl` of earlier runs, and the hours that they lead one to expect."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, PositiveInt, ValidationError

from dpkd_offline.common import console
from dpkd_offline.common.errors import DataError
from dpkd_offline.common.files import disk_errors, read_bounded

RECORD = "stages.jsonl"
LARGEST_RECORD = 1 << 24  # bytes


@dataclass(frozen=True)
class Workload:
    """What decides how long a stage takes.

    `tokens` are counted as a dry run counts them, responses as long as they may become: real ones are shorter, by about
    the same factor in every run of one kind.
    """

    command: str
    objective: str | None  # of train
    engine: str | None  # of the others
    parameters: int  # of the model that it runs
    sequences: int
    tokens: int
    parts: int = 1  # copies of the model, or processes, that share them

    @property
    def kind(self) -> tuple[object, ...]:
        """Equal for workloads that run equally fast."""
        return self.command, self.objective, self.engine, self.parameters


def record_stage(
    output: Path, title: str, seconds: float, exit_code: int, peak_memory: int, workload: Workload | None
) -> None:
    """Add a line about a stage that has run.

    Args:
        peak_memory: the most that its processes were seen to hold, in bytes, without that of a GPU; 0 if not seen.
        workload: what it did; None if it went on from an earlier call, or nobody knows.

    Raises:
        StorageError: the disk is full or fails.
    """
    line: dict[str, Any] = {"stage": title, "seconds": round(seconds, 1), "exit_code": exit_code}
    line["peak_memory"] = peak_memory
    if workload is not None and exit_code == 0:
        line |= asdict(workload)
    path = output / RECORD
    with disk_errors(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


class Throughput:
    """Tokens a second of each kind of stage, from the runs in a folder and in those beside it."""

    def __init__(self, output: Path) -> None:
        self._largest: dict[tuple[object, ...], tuple[int, float]] = {}  # tokens and seconds of its longest run
        for pattern in ("*", "*/starts/*", "*/students/*/*"):  # of a study each start and each run has its own
            for path in sorted(output.absolute().parent.glob(f"{pattern}/{RECORD}")):
                for line in _lines(path):
                    self._add(line)

    def _add(self, line: _Line) -> None:
        workload = Workload(**line.model_dump(exclude={"seconds"}))
        tokens, _ = self._largest.get(workload.kind, (0, 0.0))
        if workload.tokens > tokens:  # a short run is mostly its start
            self._largest[workload.kind] = workload.tokens, line.seconds * workload.parts

    def seconds(self, workload: Workload) -> float | None:
        """About how long it takes; None where nothing of this kind has run here."""
        if workload.kind not in self._largest:
            return None
        tokens, seconds = self._largest[workload.kind]
        return seconds * workload.tokens / tokens / workload.parts


class _Line(BaseModel):
    """A line about a stage that says what it did."""

    command: str
    objective: str | None
    engine: str | None
    parameters: int
    sequences: int
    tokens: PositiveInt
    parts: PositiveInt = 1
    seconds: float


def _lines(path: Path) -> Iterator[_Line]:
    try:
        data = read_bounded(path, LARGEST_RECORD)
    except DataError as error:
        console.info(f"warning: no time is expected from earlier runs: {error}")
        return
    for line in data.splitlines():
        try:
            yield _Line.model_validate_json(line)
        except ValidationError:  # of a stage that went on, or cut off, by a process that was killed
            continue
