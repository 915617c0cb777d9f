"""Config of `evaluate`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import BeforeValidator, Field, model_validator

from dpkd_offline.common.locations import is_url
from dpkd_offline.config.base import (
    Config,
    Folder,
    ModelOptions,
    PromptOptions,
    SamplingOptions,
    Seeds,
    Source,
    Urls,
)

SET_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]*"


def _sets(value: object) -> object:
    """`a=SOURCE,b=SOURCE` as a mapping; a file may have such a name, too."""
    if not isinstance(value, str) or is_url(value) or Path(value).exists():
        return value
    parts = [part.partition("=") for part in value.split(",")]
    if all(mark and re.fullmatch(SET_NAME, name.strip()) for name, mark, _ in parts):
        return {name.strip(): source for name, _, source in parts}
    return value


def _split(value: object) -> object:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


SetName = Annotated[str, Field(pattern=f"^{SET_NAME}$", max_length=64)]
Sources = Annotated[dict[SetName, Source] | Source, BeforeValidator(_sets)]
Borders = Annotated[tuple[Annotated[int, Field(gt=0)], ...], BeforeValidator(_split)]


class TaskOptions(Config):
    """Which benchmarks are run beside the prompts."""

    panel: ClassVar[str] = "Benchmarks"

    tasks: Annotated[tuple[str, ...], BeforeValidator(_split)] = Field(
        (),
        description="Benchmarks of lm-evaluation-harness, comma-separated: its names, such as gsm8k,ifeval, or YAML "
        "files of your own, or folders of them. Needs `pip install 'dpkd-offline[lm-eval]'`.",
    )
    task_limit: int | None = Field(None, gt=0, description="Ask only the first N questions of each benchmark.")
    task_max_length: int | None = Field(
        None,
        gt=1,
        description="Longest prompt plus response of a benchmark, in tokens; the model's context if not set.",
    )


class EvaluateConfig(ModelOptions, SamplingOptions, PromptOptions, TaskOptions):
    """Measure a model's responses: Rouge-L and exact match, with intervals, and by length.

    Samples a response to each prompt for each seed and compares it with the references. With --teacher also the
    teacher's NLL of the responses, and their implicit reward. With --against how far another evaluation is from it.
    """

    model: str = Field(description="Model folder or Hub name.")
    prompts: Sources = Field(
        description="Prompts with references: JSON, CSV or Parquet file, folder[:SPLIT], or datasets "
        "NAME[@CONFIG][:SPLIT]. Several sets: NAME=SOURCE,NAME=SOURCE."
    )
    output: Folder = Field(description="Folder of results.json and responses.jsonl; of several sets a folder each.")
    seeds: Seeds = Field((10, 20, 30, 40, 50), description="Comma-separated seeds; a response per prompt and seed.")
    temperature: float = Field(1.0, ge=0, description="Sampling temperature. 0: the likeliest tokens, for one seed.")
    teacher: str | None = Field(
        None, description="Also report this model's NLL of the responses, and their implicit reward."
    )
    teacher_url: Urls = Field((), description="Base URLs of vLLM servers that hold the teacher, comma-separated.")
    teacher_tensor_parallel_size: int | None = Field(
        None, gt=0, description="GPUs that share one copy of the teacher (vLLM); by default tensor-parallel-size."
    )
    beta: float = Field(2.0, gt=0, description="β of the implicit reward.")
    against: Folder | None = Field(
        None, description="Folder of an earlier evaluation of the same prompts: also say how far this one is from it."
    )
    length_borders: Borders = Field(
        (30, 70), description="Words of a reference that divide the results by length; the paper's."
    )
    thinking_end: str | None = Field(
        None,
        description="Text that ends a model's thoughts, which are not scored; by default </think>, where the tokenizer "
        "has it.",
    )

    @property
    def prompt_sets(self) -> Mapping[str, Any]:
        """The sources of prompts by their names; of a single one without a name, that is empty."""
        return self.prompts if isinstance(self.prompts, dict) else {"": self.prompts}

    @property
    def draw_seeds(self) -> tuple[int, ...]:
        """The seeds of responses that differ: of the likeliest tokens there is one."""
        return self.seeds if self.temperature else self.seeds[:1]

    @model_validator(mode="after")
    def _rising_borders(self) -> Self:
        if list(self.length_borders) != sorted(set(self.length_borders)):
            raise ValueError(f"length_borders rise, such as 30,70; not {','.join(map(str, self.length_borders))}")
        return self

    @model_validator(mode="after")
    def _a_teacher_behind_its_url(self) -> Self:
        if self.teacher_url and self.teacher is None:
            raise ValueError("teacher_url needs the teacher's name or folder, too: set teacher")
        return self
