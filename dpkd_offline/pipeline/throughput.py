"""How fast stages ran here: `stages.jsonl` of earlier runs, and the hours that they lead one to expect."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dpkd_offline.common.files import disk_errors

RECORD = "stages.jsonl"


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

    @property
    def kind(self) -> tuple[object, ...]:
        """Equal for workloads that run equally fast."""
        return self.command, self.objective, self.engine, self.parameters


def record_stage(output: Path, title: str, seconds: float, exit_code: int, workload: Workload | None) -> None:
    """Add a line about a stage that has run.

    Args:
        workload: what it did; None if it went on from an earlier call, or nobody knows.

    Raises:
        StorageError: the disk is full or fails.
    """
    line: dict[str, Any] = {"stage": title, "seconds": round(seconds, 1), "exit_code": exit_code}
    if workload is not None and exit_code == 0:
        line |= asdict(workload)
    path = output / RECORD
    with disk_errors(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


class Throughput:
    """Tokens a second of each kind of stage, from the runs in a folder and in those beside it."""

    def __init__(self, output: Path) -> None:
        self._largest: dict[tuple[object, ...], tuple[int, float]] = {}  # tokens and seconds of its longest run
        for path in sorted(output.absolute().parent.glob(f"*/{RECORD}")):
            for line in _lines(path):
                self._add(line)

    def _add(self, line: dict[str, Any]) -> None:
        names = Workload.__dataclass_fields__
        if not names.keys() <= line.keys():  # of a stage that went on, or of an older version
            return
        workload = Workload(**{name: line[name] for name in names})
        tokens, _ = self._largest.get(workload.kind, (0, 0.0))
        if workload.tokens > tokens:  # a short run is mostly its start
            self._largest[workload.kind] = workload.tokens, line["seconds"]

    def seconds(self, workload: Workload) -> float | None:
        """About how long it takes; None where nothing of this kind has run here."""
        if workload.kind not in self._largest:
            return None
        tokens, seconds = self._largest[workload.kind]
        return seconds * workload.tokens / tokens


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:  # cut off, by a process that was killed
            continue
