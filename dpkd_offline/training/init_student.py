"""`init-student`: a shallower copy of the teacher, where no small sibling model exists."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from dpkd_offline.common import console
from dpkd_offline.common.errors import MismatchError, UsageError
from dpkd_offline.common.files import read_json, write_json
from dpkd_offline.common.markdown import inline_code
from dpkd_offline.common.results import Result
from dpkd_offline.config.base import redacted_dict
from dpkd_offline.config.train import InitStudentConfig
from dpkd_offline.models.info import ModelInfo
from dpkd_offline.models.loading import load_model, parameter_count, save_student, stored_parameter_count

# Where the architectures that we know keep their stack of layers.
LAYERS = {
    "gpt2": "transformer.h",
    "opt": "model.decoder.layers",
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text", "smollm3"), "model.layers"),
}
PER_LAYER_LISTS = ("layer_types", "no_rope_layers")  # of a config, an entry a layer


def evenly_spaced(teacher_layers: int, layers: int) -> list[int]:
    """Which layers stay: the first, the last, and the others at equal distances.

    Raises:
        UsageError: the student would not be shallower.
    """
    if not 0 < layers < teacher_layers:
        raise UsageError(f"layers: the teacher has {teacher_layers}, the student needs 1 to {teacher_layers - 1}")
    if layers == 1:
        return [0]
    return [round(i * (teacher_layers - 1) / (layers - 1)) for i in range(layers)]


def shallower(teacher: PreTrainedModel, layers: int) -> PreTrainedModel:
    """A copy of the teacher with evenly spaced layers of it, everything else whole."""
    kind = teacher.config.model_type
    if kind not in LAYERS:
        raise UsageError(f"init-student knows {', '.join(LAYERS)}; the teacher is a {kind}")
    stack = teacher.get_submodule(LAYERS[kind])
    assert isinstance(stack, nn.ModuleList)
    kept = evenly_spaced(len(stack), layers)
    config = teacher.config.__class__.from_dict(teacher.config.to_dict())
    for name in PER_LAYER_LISTS:
        if isinstance(getattr(config, name, None), list):
            setattr(config, name, [getattr(config, name)[i] for i in kept])
    config.num_hidden_layers = layers
    student: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=teacher.dtype)
    pattern = re.compile(re.escape(LAYERS[kind]) + r"\.(\d+)\.")
    weights = {}
    for name, tensor in teacher.state_dict().items():
        layer = pattern.match(name)
        if layer is None:
            weights[name] = tensor
        elif int(layer[1]) in kept:
            weights[f"{LAYERS[kind]}.{kept.index(int(layer[1]))}.{name[layer.end() :]}"] = tensor
    student.load_state_dict(weights)
    student.generation_config = teacher.generation_config
    return student


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
