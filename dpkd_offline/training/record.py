"""What a run leaves for those that come after it: training.json, validation.json of its best student, metrics.jsonl."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from dpkd_offline.common.errors import DataError
from dpkd_offline.common.files import opened

LINE = TypeAdapter(dict[str, Any])
LONGEST_LINE = 1 << 20  # bytes


class Warning(BaseModel):
    """After which step the student got worse, and in what."""

    step: int
    warning: str


class TrainingRecord(BaseModel):
    """training.json, which is written when a run is done; what the run was made of stands there, too."""

    run: str
    steps: int
    best: dict[str, Any] | None = None
    ruined: str | None = None  # why it stopped early
    warnings: list[Warning] = []


class BestRecord(BaseModel):
    """validation.json: the numbers `val_…` of the best student so far."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float] = Field(init=False)

    run: str
    step: int
    by: str  # the number that decides

    @model_validator(mode="after")
    def _has_what_decides(self) -> Self:
        if self.by not in self.__pydantic_extra__:
            raise ValueError(f"there is no {self.by}, by which it is the best")
        return self


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, as `metrics_lines` gives them."""
    return list(metrics_lines(path))


def metrics_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a `metrics.jsonl` one by one, without one that was cut off; none where there is no file.

    Raises:
        DataError: a line is not what a run writes.
    """
    if not path.exists():
        return
    with opened(path) as file:
        number = 0
        while line := file.readline(LONGEST_LINE):
            number += 1
            if line.endswith(b"\n") or len(line) == LONGEST_LINE:
                yield _parsed(line, f"{path}:{number}")


def _parsed(line: bytes, place: str) -> dict[str, Any]:
    try:
        values = LINE.validate_json(line)
    except ValidationError as error:
        raise DataError(f"{place}: not a JSON object; delete this line, or train with --no-resume") from error
    numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
    if "step" not in numbers or len(numbers) < len(values):
        raise DataError(f"{place}: a line has a step, and numbers; delete this line, or train with --no-resume")
    return values
