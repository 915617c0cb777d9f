"""What a recipe can say, for people: a commented recipe to start from, and its keys as a table."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic.fields import FieldInfo

from dpkd_offline.common.markdown import markdown_table
from dpkd_offline.config.base import Config, RoundOptions, ShardOptions
from dpkd_offline.config.data import GenerateConfig, ScoreTeacherConfig, SubsetConfig
from dpkd_offline.config.evaluate import EvaluateConfig
from dpkd_offline.config.judge import JudgeConfig
from dpkd_offline.config.recipe import Recipe, Regeneration
from dpkd_offline.config.train import InitStudentConfig, TrainConfig

WIDTH = 110
HEAD = """\
A recipe of dpkd-offline. Run it by `dpkd-offline distill FILE`; add --dry-run to see what that will do.
Fill in the keys that have no # before them. To set another key, take away the # before it and before its section.
The values of keys are their defaults.
"""


@dataclass(frozen=True)
class Section:
    """A section of a recipe: the options of a command, but for those that `distill` sets itself."""

    config: type[Config]
    set_by_distill: Collection[str] = ()
    required: Collection[str] = ()  # besides those that the command requires
    like: str = ""  # the section that lists the same keys

    def keys(self) -> dict[str, FieldInfo]:
        return {name: field for name, field in self.config.fields_in_order().items() if name not in self.set_by_distill}


ROUNDS = {*RoundOptions.model_fields, *ShardOptions.model_fields}
GENERATE = Section(GenerateConfig, {"dataset", "role", "model", "share", *ROUNDS}, required=("prompts",))
TRAIN = Section(
    TrainConfig,
    {"dataset", "student", "output", "round", "student_name", "replay"}
    | {name for name in TrainConfig.model_fields if name.startswith("regenerate_")},
)
SECTIONS = {
    "init_student": Section(InitStudentConfig, {"teacher", "output"}),
    "sft": Section(TrainConfig, {*TRAIN.set_by_distill, "objective"}, like="train"),
    "warm_start": Section(TrainConfig, {*TRAIN.set_by_distill, "objective", "responses"}, like="train"),
    "generate": GENERATE,
    "generate_teacher": Section(GENERATE.config, GENERATE.set_by_distill, like="generate"),
    "generate_student": Section(GENERATE.config, {*GENERATE.set_by_distill, "prompts"}, like="generate"),
    "score_teacher": Section(ScoreTeacherConfig, {"dataset", "model", "student", *ROUNDS}),
    "subset": Section(SubsetConfig, {"dataset", "output", "student_name"}),
    "train": TRAIN,
    "regenerate": Section(Regeneration),
    "evaluate": Section(EvaluateConfig, {"model", "teacher", "output"}),
    "judge": Section(JudgeConfig, {"a", "b", "output", "dry_run"}),
}
OF_A_STUDY = {  # its keys, each with an example
    "students": "{sft: {train: {objective: sft}}, dpkd: {}, dpkd-no-lm: {train: {lm_corpus: null}}}",
    "seeds": "[1, 2, 3]",
    "baseline": "sft",
    "paper": "gpt2",
}
DEFAULTS = {"stop_when_ruined": True}  # of distill, where they are not the command's


def recipe_keys() -> list[tuple[str, str]]:
    """Every key of a recipe, with its help; of `regenerate`, which is no command's, its own keys too."""
    keys = []
    for name, field in Recipe.model_fields.items():
        keys.append((name, field.description or ""))
        if name == "regenerate":
            keys += [(f"{name}.{key}", part.description or "") for key, part in Regeneration.model_fields.items()]
    return keys


def recipe_keys_table() -> str:
    """The same as a Markdown table."""
    return markdown_table(["key", "what it holds"], [(f"`{name}`", text) for name, text in recipe_keys()])


def recipe_template() -> str:
    """A recipe with every key, its default and its help. Required keys are blank, the others commented out."""
    lines = _comment(HEAD)
    for name, field in Recipe.model_fields.items():
        lines += ["", *_comment(field.description or ""), *_key(name, field)]
    return "\n".join([*lines, ""])


def _key(name: str, field: FieldInfo) -> Iterator[str]:
    """A key of the recipe: a blank, or a section with its own keys, which is commented out unless it is required."""
    if name in OF_A_STUDY:
        yield f"#{name}: {OF_A_STUDY[name]}"
        return
    section, required = SECTIONS.get(name), field.is_required()
    if not (section or required or field.default is None):
        yield f"#{name}: {_as_yaml(field.default)}"
        return
    off = "#" if section and not required else ""
    yield f"{off}{name}:"
    if section and section.like:
        yield f"{off}  # Takes the keys of {section.like}."
    elif section:
        for key, field in section.keys().items():
            yield from (f"{off}  {line}" for line in _comment(field.description or ""))
            needed = field.is_required() or key in section.required
            value = "" if needed else _as_yaml(DEFAULTS.get(key, field.default))
            yield f"{off}  {'' if needed or off else '#'}{key}:{value and ' '}{value}"


def _as_yaml(value: Any) -> str:
    """A value in one line; nothing for None."""
    if value is None:
        return ""
    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump([plain], default_flow_style=True, width=1000).strip()[1:-1]


def _comment(text: str) -> list[str]:
    return [f"# {line}" for paragraph in text.splitlines() for line in textwrap.wrap(paragraph, WIDTH)]
