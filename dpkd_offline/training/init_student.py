"""`init-student`: a shallower copy of the teacher, where no small sibling model exists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from pydantic import BaseModel

from dpkd_offline.common import console
from dpkd_offline.common.files import find_model, write_json
from dpkd_offline.common.hashing import fingerprint
from dpkd_offline.common.markdown import inline_code
from dpkd_offline.common.ownership import output_folder
from dpkd_offline.common.results import Result
from dpkd_offline.config.base import redacted_dict
from dpkd_offline.config.train import InitStudentConfig
from dpkd_offline.models.info import ModelInfo
from dpkd_offline.models.loading import (
    load_model,
    parameter_count,
    rehearse_saving,
    save_student,
    stored_parameter_count,
)
from dpkd_offline.training.shallower import evenly_spaced, shallower

RECORD = "init_student.json"  # in the student's folder; written last


class Made(BaseModel):
    """What a student is made of."""

    teacher: dict[str, str]
    layers: int

    @property
    def run(self) -> str:
        return fingerprint(self.model_dump())


class Record(BaseModel):
    """init_student.json."""

    made: Made


@dataclass(frozen=True)
class InitStudentResult(Result):
    """The student's folder."""

    layers: int
    parameters: int  # as they are stored; shared ones count once


def init_student(config: InitStudentConfig) -> InitStudentResult:
    """Save the student that is a shallower copy of the teacher. A student that is there already is left as it is.

    Raises:
        UsageError: an unknown architecture, or not fewer layers; or the folder holds something else.
        MismatchError: the folder holds another model.
        OutputBusy: another command writes it now.
        StorageError: the disk is full or fails; the same call goes on.
    """
    with output_folder(config.output, "initial student", "init-student", known=(RECORD,)) as output:
        info = ModelInfo.load(config.teacher, config.trust_remote_code)
        rehearse_saving(info)
        made = Made(teacher=info.identity, layers=config.layers)
        record = find_model(config.output / RECORD, Record)
        output.claim(made.run, known=lambda: record.made.run if record else None, begun=record is not None)
        if record is not None:
            console.info(f"{config.output}: is there already")
        else:
            _make(config, info, made)
    return InitStudentResult(config.output, config.layers, stored_parameter_count(config.output))


def _make(config: InitStudentConfig, info: ModelInfo, made: Made) -> None:
    """Write the student, and then what says that it is whole."""
    teacher = load_model(config.teacher, "auto", config.trust_remote_code)
    with torch.no_grad():
        student = shallower(teacher, config.layers)
    kept = evenly_spaced(teacher.config.num_hidden_layers, config.layers)
    save_student(student, info.tokenizer, config.output, _card(config.output.name, kept, info.identity))
    write_json(config.output / RECORD, {"made": made.model_dump(), "config": redacted_dict(config)})
    console.info(
        f"student: {config.layers} of {teacher.config.num_hidden_layers} layers, "
        f"{parameter_count(student) / 1e6:.0f}M of {parameter_count(teacher) / 1e6:.0f}M parameters"
    )


def _card(name: str, kept: Sequence[int], teacher: Mapping[str, str]) -> str:
    revision = inline_code(teacher["revision"][:19])
    return (
        f"---\nlibrary_name: transformers\ntags: [dpkd-offline]\n---\n\n# {name}\n\nLayers "
        f"{', '.join(map(str, kept))} of {inline_code(teacher['name'])} ({revision}), untrained since: the start of "
        f"a distillation.\n"
    )
