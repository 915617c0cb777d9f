"""What the configs of all commands are made of: options that several have, and kinds of values.

A field of a config is YAML key, flag, Python keyword and help at once. Fields that belong together are a class of their
own, whose `panel` is their heading in the help."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

import regex
import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    InstanceOf,
    JsonValue,
    PlainSerializer,
    model_validator,
)
from pydantic.fields import FieldInfo

from dpkd_offline.common.files import write_atomically
from dpkd_offline.common.locations import RemotePath, is_url
from dpkd_offline.common.precision import fast_dtype
from dpkd_offline.common.secrets import redacted_value, remember_secrets
from dpkd_offline.config.engines import ENGINES, EngineName

Dtype = Literal["float32", "bfloat16", "float16"]
ColumnName = Literal[
    "instruction",
    "input",
    "messages",
    "teacher_messages",
    "prompt",
    "system",
    "tools",
    "reference",
    "id",
    "chosen",
    "rejected",
]


class Config(BaseModel):
    """Base of the commands' configs."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), hide_input_in_errors=True, allow_inf_nan=False
    )
    panel: ClassVar[str] = "What it works on"

    @classmethod
    def panel_of(cls, name: str) -> str:
        """The heading of a field in the help: that of the class which has it; a command's own are what it works on."""
        groups = [base for base in reversed(cls.__mro__) if issubclass(base, Config)]
        owner = next(group for group in groups if name in group.model_fields)
        return Config.panel if owner is cls else owner.panel

    @classmethod
    def fields_in_order(cls) -> dict[str, FieldInfo]:
        """The fields in the order of the help: what it works on before all others, required ones first."""
        fields = cls.model_fields.items()
        return dict(sorted(fields, key=lambda f: (cls.panel_of(f[0]) != Config.panel, not f[1].is_required())))


C = TypeVar("C", bound=Config)


def in_words(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _split(value: object) -> object:
    """`a,b` as a list; of one number YAML makes no list, and no text either."""
    if isinstance(value, int) and not isinstance(value, bool):
        return [value]
    return [part for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _split_urls(value: object) -> object:
    remember_secrets(str(value))
    return _split(value)


def _names(value: object) -> object:
    """`a=b,c=d` as a mapping."""
    if not isinstance(value, str):
        return value
    pairs = [part.partition("=") for part in value.split(",") if part.strip()]
    if wrong := [name for name, mark, _ in pairs if not mark]:
        raise ValueError(f"{wrong[0]!r}: write NAME=COLUMN, such as instruction=question,reference=answer")
    return {name.strip(): column.strip() for name, _, column in pairs}


def _each_once(values: tuple[int, ...]) -> tuple[int, ...]:
    if twice := [value for n, value in enumerate(values) if value in values[:n]]:
        raise ValueError(f"{twice[0]} stands there twice: its responses would be counted twice")
    return values


def _known_scripts(values: tuple[str, ...]) -> tuple[str, ...]:
    for value in values:
        try:
            regex.compile(rf"\p{{Script={value}}}" if re.fullmatch("[A-Za-z_]+", value) else "(")
        except regex.error as error:
            raise ValueError(f"{value!r} is no script of Unicode, such as Latin, Cyrillic, Arabic or Han") from error
    return values


Scripts = Annotated[tuple[str, ...], BeforeValidator(_split), AfterValidator(_known_scripts)]
Seed = Annotated[int, Field(ge=0)]
Seeds = Annotated[tuple[Seed, ...], BeforeValidator(_split), AfterValidator(_each_once), Field(min_length=1)]
STUDENT_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"


def _not_a_sample(name: str | None) -> str | None:
    if name is not None and re.fullmatch(r"sample-\d+", name):
        raise ValueError(f"'{name}' is what `load_dataset` calls the tables of a sample; take another name")
    return name


StudentName = Annotated[str | None, Field(pattern=f"^{STUDENT_NAME}$", max_length=64), AfterValidator(_not_a_sample)]
CHAT_ARGUMENTS = ("messages", "conversations", "tools", "chat_template", "add_generation_prompt")  # not the user's


def _json_object(value: object) -> object:
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise ValueError(f"expected a JSON object such as '{{\"enable_thinking\": false}}': {error.msg}") from error
    if isinstance(value, dict) and (taken := [name for name in value if name in CHAT_ARGUMENTS]):
        raise ValueError(f"'{taken[0]}' is not for the user to say")
    return value


TEMPLATES = ("auto", "chat", "alpaca", "none")


def _name_or_file(value: str) -> str:
    if value not in TEMPLATES and not Path(value).is_file():
        raise ValueError(f"{value!r} is neither {', '.join(TEMPLATES[:-1])} or {TEMPLATES[-1]}, nor a file")
    return value


Template = Annotated[str, AfterValidator(_name_or_file)]


def _engine_args(value: object) -> object:
    """A JSON object, without what the command itself tells the engine."""
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise ValueError(f"expected a JSON object such as '{{\"max_num_seqs\": 256}}': {error.msg}") from error
    for name, instead in ((n, i) for traits in ENGINES.values() for n, i in traits.ours.items()):
        if isinstance(value, dict) and name in value:
            raise ValueError(f"'{name}' is not for the user to say: {instead}")
    return value


def _auto_or_count(value: object) -> object:
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    if value != "auto" and (type(number) is not int or number < 1):
        raise ValueError(f"{value!r}: expected auto, or a number from 1 on")
    return number


AutoOrCount = Annotated[Literal["auto"] | int, BeforeValidator(_auto_or_count)]
EngineArgs = Annotated[dict[str, JsonValue] | None, BeforeValidator(_engine_args)]
TemplateArgs = Annotated[dict[str, JsonValue] | None, BeforeValidator(_json_object)]
Urls = Annotated[tuple[str, ...], BeforeValidator(_split_urls)]
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


class CodeOptions(Config):
    """Whether code that comes with a model may run."""

    panel: ClassVar[str] = "Model"

    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model.")


class ModelOptions(CodeOptions):
    """How an engine loads and runs a model."""

    engine: EngineName = Field(
        "auto", description="What runs the model. auto: http with --url; else vLLM, where it is installed."
    )
    url: Urls = Field((), description="Base URLs of vLLM servers that hold the model, comma-separated (http engine).")
    concurrency: int | None = Field(
        None,
        gt=0,
        description="Requests in flight at each URL (http engine). By default as many as a vLLM server says that it "
        "runs; 64 where it says nothing.",
    )
    cluster: Literal["none", "ray"] = Field(
        "none", description="ray: start a worker with an engine on every node or GPU of a Ray cluster."
    )
    tensor_parallel_size: int = Field(1, gt=0, description="GPUs that share one copy of the model (vLLM).")
    replicas: AutoOrCount = Field(
        "auto",
        exclude_if=lambda value: value == "auto",
        description="Copies of the model on this machine, each in a process of its own, which share the shards. auto: "
        "one on every GPU, or on every tensor-parallel-size of them; on a CPU one (vllm and transformers engines).",
    )
    dtype: Literal["auto"] | Dtype = Field(
        "auto",
        description="Precision of the model's weights and products. auto: bfloat16, or float32 on a machine that is "
        "slow in it. A server of --url has its own.",
    )
    quantization: str | None = Field(
        None,
        pattern="^[a-z0-9_-]+$",
        exclude_if=lambda value: value is None,
        description="How the engine quantises the model's weights, such as fp8, or reads quantised ones, such as "
        "awq_marlin. By default as the model's config says (vLLM).",
    )
    engine_args: EngineArgs = Field(
        None,
        exclude_if=lambda value: not value,
        description="Options of the engine's own, as a JSON object such as '{\"max_num_seqs\": 256}' (vLLM).",
    )
    batch_size: int = Field(32, gt=0, description="Sequences in a batch (transformers engine; vLLM plans its own).")
    max_length: int = Field(1024, gt=1, description="Longest prompt plus response, in tokens.")

    @model_validator(mode="after")
    def _split_by_engines_that_can(self) -> Self:
        if self.tensor_parallel_size > 1 and self.engine != "auto" and not ENGINES[self.engine].splits_model:
            able = in_words([name for name, traits in ENGINES.items() if traits.splits_model])
            raise ValueError(f"tensor_parallel_size is for engine {able}; '{self.engine}' does not split a model")
        return self

    @model_validator(mode="after")
    def _options_of_engines_that_have_some(self) -> Self:
        if self.engine != "auto" and (fault := self.options_fault(self.engine)):
            raise ValueError(fault)
        return self

    def options_fault(self, engine: str) -> str | None:
        """What is wrong with options of its own for an engine, in a line; None if nothing is."""
        named = [name for name in ("quantization", "engine_args") if getattr(self, name)]
        if not named or ENGINES[engine].takes_args:
            return None
        able = in_words([name for name, traits in ENGINES.items() if traits.takes_args])
        why = "its servers were started with theirs" if ENGINES[engine].served else "it has none"
        return f"{named[0]} is for engine {able}, not '{engine}': {why}"

    @model_validator(mode="after")
    def _replicas_of_engines_that_run_here(self) -> Self:
        served = self.url or (self.engine != "auto" and ENGINES[self.engine].served)
        if self.replicas not in ("auto", 1) and (served or self.cluster != "none"):
            where = "servers hold the model" if served else f"cluster '{self.cluster}' has a copy on every node or GPU"
            raise ValueError(f"replicas are copies of the model on this machine, and {where}; leave replicas out")
        return self

    @property
    def precision(self) -> Dtype:
        """`dtype`; where that is auto what this machine is fast in, and of a Ray cluster's machines bfloat16."""
        if self.dtype != "auto":
            return self.dtype
        return "bfloat16" if self.cluster == "ray" else fast_dtype()

    @property
    def gpus_of_a_copy(self) -> int:
        """How many GPUs hold one copy of the model, where there are GPUs."""
        parallel = (self.engine_args or {}).get("pipeline_parallel_size", 1)
        return self.tensor_parallel_size * (parallel if isinstance(parallel, int) else 1)

    @model_validator(mode="after")
    def _cluster_of_engines(self) -> Self:
        if self.cluster == "ray" and self.engine != "auto" and ENGINES[self.engine].served:
            raise ValueError(
                f"cluster 'ray' is for engines that it starts; with engine '{self.engine}' the servers run already"
            )
        return self


class PromptOptions(Config):
    """Which prompts are taken from a source, and how they are rendered."""

    panel: ClassVar[str] = "Prompts"

    template: Template = Field(
        "auto",
        description="auto: the model's chat template, or Alpaca's if the model has none. none: the bare text. Or chat, "
        "alpaca, or a file with a chat template (Jinja).",
    )
    system: str | None = Field(
        None,
        min_length=1,
        exclude_if=lambda value: not value,
        description="A system turn for rows that have none, by the chat template.",
    )
    columns: Annotated[dict[ColumnName, str] | None, BeforeValidator(_names)] = Field(
        None,
        description="What columns of the source are, where their names do not say it: instruction=question,"
        "reference=answer. Other columns are then not read.",
    )
    on_bad_row: Literal["stop", "skip"] = Field(
        "stop", description="What a malformed row leads to: an error, or that it is left out and counted."
    )
    template_args: TemplateArgs = Field(
        None,
        exclude_if=lambda value: not value,
        description="What the chat template is told besides, a JSON object such as '{\"enable_thinking\": false}'.",
    )
    max_prompt_tokens: int = Field(256, gt=0, description="Drop prompts of more tokens than this.")
    min_reference_words: int = Field(
        0, ge=0, description="Drop prompts whose reference has fewer words. The paper trains with 11."
    )
    limit: int | None = Field(None, gt=0, description="Take only the first N rows of the source.")


class SamplingOptions(Config):
    """How responses are sampled. The defaults are the paper's."""

    panel: ClassVar[str] = "Sampling"

    max_new_tokens: int = Field(256, gt=0, description="Longest response, in tokens.")
    temperature: float = Field(1.0, gt=0, description="Sampling temperature.")
    top_p: float = Field(
        1.0, gt=0, le=1, description="Nucleus sampling: sample from the likeliest tokens that hold this probability."
    )


class RoundOptions(Config):
    """Whose responses are made or scored, where a dataset has several students and rounds."""

    panel: ClassVar[str] = "Rounds and students"

    round: int = Field(0, ge=0, description="Round of the student's responses.")
    student_name: StudentName = Field(
        None, description="Name of a further student in the dataset. The first student has none."
    )


class PairOptions(Config):
    """Which pairs of a dataset are read."""

    panel: ClassVar[str] = "Which pairs"

    student_name: StudentName = Field(
        None, description="Read the pairs of the dataset's further student of this name, not those of the first."
    )
    round: int | None = Field(None, ge=0, description="Read the pairs of this round; by default of the latest.")
    truncated: Literal["keep", "drop"] = Field(
        "keep", description="Whether to keep pairs with a response that was cut off by its length."
    )


class ShardOptions(Config):
    """Which shards this process takes, where several share the work."""

    panel: ClassVar[str] = "Several workers"

    shard_index: int = Field(
        0,
        ge=0,
        description="Number of this worker, from 0. It takes every num-shards-th shard. A SLURM array sets it.",
    )
    num_shards: int = Field(1, gt=0, description="How many workers share the shards. A SLURM array sets it.")

    @model_validator(mode="after")
    def _index_below_number(self) -> Self:
        if self.shard_index >= self.num_shards:
            raise ValueError(f"shard_index {self.shard_index} must be below num_shards {self.num_shards}")
        return self


OF_THIS_MACHINE = {"url", "teacher_url", "audit_url", "shard_index", "num_shards", "replicas"}


def redacted_dict(config: Config) -> dict[str, Any]:
    """The resolved config as JSON and YAML can hold it, without what is private where outputs are shared.

    Of a URL or an absolute path only the last name stays; the servers, the worker's number and how many share the work
    are left out.
    """
    plain = config.model_dump(mode="json", exclude=OF_THIS_MACHINE)

    def public(value: Any, given: Any) -> Any:
        if isinstance(value, list):
            return [public(item, part) for item, part in zip(value, given, strict=True)]
        if isinstance(value, dict) and isinstance(given, Mapping):
            return {key: public(item, given[key]) for key, item in value.items()}
        private = isinstance(given, RemotePath) or (isinstance(value, str) and Path(value).is_absolute())
        return Path(value).name if private else value

    return {key: public(value, getattr(config, key)) for key, value in plain.items()}


def write_yaml(path: Path, data: Mapping[str, Any]) -> None:
    """Write a mapping, such as a resolved config, in the order of its keys, and without secrets."""
    write_atomically(path, yaml.safe_dump(redacted_value(data), sort_keys=False, allow_unicode=True).encode())
