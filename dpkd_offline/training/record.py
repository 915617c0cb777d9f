"""What a run leaves for those that come after it: training.json, and validation.json of its best student."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


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
