"""What the configs of all commands are made of: options that several have, and kinds of values.

A field said in a config is YAML key, flag and help at once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, InstanceOf, PlainSerializer, model_validator

from dpkd_offline.common.files import write_atomically
from dpkd_offline.common.locations import RemotePath, is_url
from dpkd_offline.config.engines import ENGINES, EngineName

Dtype = Literal["float32", "bfloat16", "float16"]
ObjectiveName = Literal[
    "dpkd", "dpkd-sum", "ipo", "cpo", "simpo", "dpkd-token", "sft", "seqkd", "kd", "rkl", "akl", "minillm"
]
Template = Literal["auto", "chat", "alpaca", "none"]


class Config(BaseModel):
    """Base of the commands' configs."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), hide_input_in_errors=True)


C = TypeVar("C", bound=Config)


def _split(value: object) -> object:
    return [part for part in value.split(",") if part.strip()] if isinstance(value, str) else value


Seeds = Annotated[tuple[int, ...], BeforeValidator(_split), Field(min_length=1)]
STUDENT_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
StudentName = Annotated[str | None, Field(pattern=f"^{STUDENT_NAME}$", max_length=64)]
Urls = Annotated[tuple[str, ...], BeforeValidator(_split)]
Trackers = Annotated[tuple[Literal["tensorboard", "wandb", "trackio"], ...], BeforeValidator(_split)]


def _remote(value: object) -> object:
    return RemotePath(str(value)) if is_url(value) else value


def _on_this_machine(value: object) -> object:
    if URL_OR_ITS_PATH.match(str(value)):
        raise ValueError("a folder on this machine is needed; from URLs there is only reading")
    return value


URL_OR_ITS_PATH = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/|.+::.+:/")  # pathlib makes one slash of two
Remote = InstanceOf[RemotePath]
SHOWN = PlainSerializer(str, when_used="json")  # as text: without what a URL hides
Folder = Annotated[Path, BeforeValidator(_on_this_machine)]
DatasetPlace = Annotated[Path | Remote, BeforeValidator(_remote), SHOWN]
Source = Annotated[str | Remote, BeforeValidator(_remote), SHOWN]


class ModelOptions(Config):
    """How an engine loads and runs a model."""

    engine: EngineName = Field(
        "auto", description="What runs the model. auto: http with --url, else vLLM where installed."
    )
    url: Urls = Field((), description="Base URLs of vLLM servers of the model, comma-separated (http engine).")
    concurrency: int = Field(64, gt=0, description="Requests in flight at each URL (http engine).")
    cluster: Literal["none", "ray"] = Field("none", description="ray: a worker with an engine on every node or GPU.")
    tensor_parallel_size: int = Field(1, gt=0, description="GPUs that share one copy of the model (vLLM).")
    dtype: Dtype = Field("bfloat16", description="Precision of the model's weights and products; a server has its own.")
    batch_size: int = Field(32, gt=0, description="Sequences at once (transformers engine; vLLM plans its own).")
    max_length: int = Field(1024, gt=1, description="Longest prompt plus response, in tokens.")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model.")

    @model_validator(mode="after")
    def _cluster_of_engines(self) -> Self:
        if self.cluster == "ray" and self.engine != "auto" and ENGINES[self.engine].served:
            raise ValueError(
                f"cluster 'ray' is for engines that it starts; with engine '{self.engine}' the servers run already"
            )
        return self


class PromptOptions(Config):
    """Which prompts are taken from a source, and how they are rendered."""

    template: Template = Field("auto", description="auto: the model's chat template, or Alpaca's if it has none.")
    max_prompt_tokens: int = Field(256, gt=0, description="Drop prompts of more tokens than this.")
    min_reference_words: int = Field(0, ge=0, description="Drop shorter references; the paper trains with 11. 0: off.")
    limit: int | None = Field(None, gt=0, description="Take only the first N rows of the source.")


class SamplingOptions(Config):
    """How responses are sampled. The defaults are the paper's."""

    max_new_tokens: int = Field(256, gt=0, description="Longest response, in tokens.")
    temperature: float = Field(1.0, gt=0, description="Sampling temperature.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus sampling: keep this much probability.")


class ShardOptions(Config):
    """Which shards this process takes, where several share the work."""

    shard_index: int = Field(
        0, ge=0, description="This worker takes the shards i with i mod num-shards = this. In a SLURM array: its place."
    )
    num_shards: int = Field(1, gt=0, description="How many workers share the shards. In a SLURM array: its size.")

    @model_validator(mode="after")
    def _index_below_number(self) -> Self:
        if self.shard_index >= self.num_shards:
            raise ValueError(f"shard_index {self.shard_index} must be below num_shards {self.num_shards}")
        return self


def redacted_dict(config: Config) -> dict[str, Any]:
    """The resolved config as JSON and YAML can hold it, without what is nobody's business where outputs are shared: of
    a URL or an absolute path only the last name stays, and of servers and a worker's share nothing."""
    plain = config.model_dump(mode="json", exclude={"url", "shard_index", "num_shards"})

    def elsewhere(key: str, value: object) -> bool:
        return isinstance(getattr(config, key), RemotePath) or (isinstance(value, str) and Path(value).is_absolute())

    return {k: Path(v).name if elsewhere(k, v) else v for k, v in plain.items()}


def write_yaml(path: Path, data: Mapping[str, Any]) -> None:
    """The resolved config beside an output."""
    write_atomically(path, yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True).encode())
