"""Config of `evaluate`."""

from __future__ import annotations

from pydantic import Field

from dpkd_offline.config.base import Folder, ModelOptions, PromptOptions, SamplingOptions, Seeds, Source


class EvaluateConfig(ModelOptions, SamplingOptions, PromptOptions):
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
