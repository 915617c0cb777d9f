"""`init-student`: a shallower copy of the teacher, where no small sibling model exists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from dpkd_offline.common import console
from dpkd_offline.common.errors import MismatchError
from dpkd_offline.common.files import read_json, write_json
from dpkd_offline.common.markdown import inline_code
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


@dataclass(frozen=True)
class InitStudentResult(Result):
    """The student's folder."""

    layers: int
    parameters: int  # as they are stored; shared ones count once


def init_student(config: InitStudentConfig) -> InitStudentResult:
    """Save the student that is a shallower copy of the teacher. A student that is there already is left as it is.

    Raises:
        UsageError: an unknown architecture, or not fewer layers.
        MismatchError: the folder holds another model.
    """
    info = ModelInfo.load(config.teacher, config.trust_remote_code)
    rehearse_saving(info)
    provenance = {"teacher": info.identity, "layers": config.layers}
    record = config.output / "init_student.json"
    if record.exists() and read_json(record)["made"] == provenance:
        console.info(f"{config.output}: is there already")
        return InitStudentResult(config.output, config.layers, stored_parameter_count(config.output))
    if (config.output / "config.json").exists():
        raise MismatchError(f"{config.output}: holds another model; take another --output")
    teacher = load_model(config.teacher, "auto", config.trust_remote_code)
    with torch.no_grad():
        student = shallower(teacher, config.layers)
    kept = evenly_spaced(teacher.config.num_hidden_layers, config.layers)
    save_student(student, info.tokenizer, config.output, _card(config.output.name, kept, info.identity))
    write_json(record, {"made": provenance, "config": redacted_dict(config)})
    console.info(
        f"student: {config.layers} of {teacher.config.num_hidden_layers} layers, "
        f"{parameter_count(student) / 1e6:.0f}M of {parameter_count(teacher) / 1e6:.0f}M parameters"
    )
    return InitStudentResult(config.output, config.layers, stored_parameter_count(config.output))


def _card(name: str, kept: Sequence[int], teacher: Mapping[str, str]) -> str:
    revision = inline_code(teacher["revision"][:19])
    return (
        f"---\nlibrary_name: transformers\ntags: [dpkd-offline]\n---\n\n# {name}\n\nLayers "
        f"{', '.join(map(str, kept))} of {inline_code(teacher['name'])} ({revision}), untrained since: the start of "
        f"a distillation.\n"
    )
