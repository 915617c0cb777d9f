"""`study.json`: what a study consists of and where each part lies, written before any stage runs.

    OUTPUT/
      study.json
      dataset/                       one for all; the y_s of a further start lie in dataset/students/NAME
      starts/start-1/                student-init/, student-sft/, student-warm/, as far as the recipe has them
      evaluation/teacher/, evaluation/start-1/
      students/NAME/seed-1/          a run: student/, evaluation/, judge/
      results.json, results.md       the table

The folders of the study, of each start and of each run have `stages/` and `stages.jsonl` about the stages that made
what is in them, as the folder of a single recipe has.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from dpkd_offline.common.files import find_model

STUDY = "study.json"


def _inside(path: str) -> str:
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts or not parts.parts:
        raise ValueError("expected a path inside the study's folder")
    return path


Inside = Annotated[str, AfterValidator(_inside)]  # relative to the folder of the study


class StudyRun(BaseModel):
    """A student trained with one seed."""

    model_config = ConfigDict(frozen=True)

    seed: int
    folder: Inside


class StudyStart(BaseModel):
    """What the students that start alike start from."""

    model_config = ConfigDict(frozen=True)

    folder: Inside
    before: Inside | None  # its evaluation, before training; None without evaluate
    warm: Inside | None = None  # that after the warm start, which the y_s are of
    student_name: str | None = None  # of its responses in the dataset; the first start has none
    settings: str = ""  # a hash of what the start is made of


class StudyStudent(BaseModel):
    """A student of the recipe, trained once for each seed."""

    model_config = ConfigDict(frozen=True)

    start: str
    runs: list[StudyRun] = Field(min_length=1)


class StudyLayout(BaseModel):
    """The content of study.json. All paths are relative to its folder."""

    model_config = ConfigDict(frozen=True)

    version: Literal[1] = 1
    baseline: str | None
    seeds: list[int] = Field(min_length=1)
    teacher: Inside | None  # its evaluation; None without evaluate
    paper: Literal["gpt2", "opt"] | None = None
    starts: dict[str, StudyStart]
    students: dict[str, StudyStudent]


def read_study(folder: Path) -> StudyLayout | None:
    """What a folder's study.json says; None where there is none.

    Raises:
        DataError: the file is damaged.
    """
    return find_model(folder / STUDY, StudyLayout)
