"""Config of `evaluate`."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import BeforeValidator, Field

from dpkd_offline.config.base import Config, Folder, ModelOptions, PromptOptions, SamplingOptions, Seeds, Source


def _names(value: object) -> object:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


class TaskOptions(Config):
    """Which benchmarks are run beside the prompts."""

    panel: ClassVar[str] = "Benchmarks"

    tasks: Annotated[tuple[str, ...], BeforeValidator(_names)] = Field(
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
    """Measure a model's responses: Rouge-L and exact match.

    Samples a response to each prompt for each seed and compares it with the references. With --teacher also the
    teacher's NLL of the responses, and their implicit reward.
    """

    model: str = Field(description="Model folder or Hub name.")
    prompts: Source = Field(
        description="Prompts with references: JSON, CSV or Parquet file, folder[:SPLIT], or datasets "
        "NAME[@CONFIG][:SPLIT]."
    )
    output: Folder = Field(description="Folder of results.json and responses.jsonl.")
    seeds: Seeds = Field((10, 20, 30, 40, 50), description="Comma-separated seeds; a response per prompt and seed.")
    teacher: str | None = Field(
        None, description="Also report this model's NLL of the responses, and their implicit reward."
    )
    teacher_tensor_parallel_size: int | None = Field(
        None, gt=0, description="GPUs that share one copy of the teacher (vLLM); by default tensor-parallel-size."
    )
    beta: float = Field(2.0, gt=0, description="β of the implicit reward.")
