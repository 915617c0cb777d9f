"""Config of `evaluate`."""

from __future__ import annotations

from pydantic import Field

from dpkd_offline.config.base import Folder, ModelOptions, PromptOptions, SamplingOptions, Seeds, Source


class EvaluateConfig(ModelOptions, SamplingOptions, PromptOptions):
    """Rouge-L and exact match of a model's responses.

    Samples responses to prompts with references, once per seed. With a teacher also its NLL of them and the reward.
    """

    model: str = Field(description="Model folder or Hub name.")
    prompts: Source = Field(description="Prompt source with references.")
    output: Folder = Field(description="Folder of results.json and responses.jsonl.")
    seeds: Seeds = Field((10, 20, 30, 40, 50), description="Comma-separated; one response per prompt and seed.")
    teacher: str | None = Field(None, description="Also report this model's NLL of the responses, and the reward.")
    beta: float = Field(2.0, gt=0, description="β of the implicit reward (with teacher).")
