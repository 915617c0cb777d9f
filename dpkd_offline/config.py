"""One frozen, typed config per command. A field said here is YAML key, flag and help at once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    InstanceOf,
    PlainSerializer,
    model_validator,
)

from dpkd_offline.files import write_atomically
from dpkd_offline.remote import RemotePath, is_url

EngineName = Literal["auto", "vllm", "transformers", "http"]
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
        if self.cluster == "ray" and self.engine == "http":
            raise ValueError("cluster 'ray' is for engines that it starts; with engine 'http' the servers run already")
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


class GenerateConfig(ShardOptions, ModelOptions, SamplingOptions, PromptOptions):
    """Sample responses of the teacher or student.

    One response per prompt. The first call lets the prompts enter the dataset; a repeated one goes on.
    """

    dataset: Folder = Field(description="The dataset directory; the first run creates it.")
    role: Literal["teacher", "student"] = Field(description="Whose responses these are.")
    model: str = Field(description="Model folder or Hub name.")
    prompts: Source | None = Field(
        None,
        description="JSONL or Parquet file, directory, or datasets NAME[@CONFIG][:SPLIT]. Only the first run needs it.",
    )
    license: str | None = Field(
        None, min_length=1, description="Licence of the prompts, for the card, best as the Hub calls it: cc-by-4.0."
    )
    round: int = Field(0, ge=0, description="Round of the student's responses.")
    share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of the prompts to answer anew, drawn by seed; the others keep the response of the round "
        "before.",
    )
    student_name: StudentName = Field(None, description="Add a further student to the dataset, under this name.")
    seed: int = Field(0, ge=0, description="Seed; with it each row is repeatable.")
    shard_size: int = Field(256, gt=0, description="Prompts a shard, fixed when the prompts enter.")

    @model_validator(mode="after")
    def _name_of_a_student(self) -> Self:
        if self.student_name is not None and self.role == "teacher":
            raise ValueError("student_name is for role 'student': all students have the same teacher")
        return self

    @model_validator(mode="after")
    def _round_before(self) -> Self:
        if self.share < 1 and (self.role == "teacher" or self.round == 0):
            raise ValueError(
                "share below 1 is for role 'student' from round 1 on: the others keep that of the round before"
            )
        return self


class ScoreTeacherConfig(ShardOptions, ModelOptions):
    """Add the teacher's log-probs of all responses.

    Per token, of both responses of each prompt, by prefill with one engine: the pairs that train reads.
    """

    dataset: Folder = Field(description="The dataset directory.")
    model: str = Field(description="The teacher: model folder or Hub name.")
    student: str | None = Field(
        None, description="The student, if its tokenizer is another: its text is scored, pairs are in its tokens."
    )
    student_name: StudentName = Field(None, description="Which of the dataset's further students to score.")
    round: int = Field(0, ge=0, description="Round of the student's responses.")
    top_k: int = Field(
        0, ge=0, description="Also store the teacher's K likeliest tokens at each position, for word-level objectives."
    )
    audit: int = Field(0, ge=0, description="Score N rows again with transformers in float32 and record the gap.")


class ImportConfig(PromptOptions):
    """Make a dataset of a preference set: chosen and rejected text becomes responses, for score-teacher to score.

    Columns chosen, rejected, and prompt, as text or as messages, or messages that begin with the same ones.
    """

    source: Source = Field(description="JSONL or Parquet file, directory, or datasets NAME[@CONFIG][:SPLIT].")
    dataset: Folder = Field(description="The dataset directory to make.")
    model: str = Field(description="Teacher or student, whose common tokenizer and template make the token ids.")
    template: Template = Field(
        "auto", description="auto: the model's, or Alpaca's, but a 'prompt' that is text stays as it is."
    )
    max_length: int = Field(1024, gt=1, description="Drop pairs with more tokens of prompt plus response.")
    license: str | None = Field(
        None, min_length=1, description="Licence of the preference set, for the card, best as the Hub calls it."
    )
    shard_size: int = Field(256, gt=0, description="Pairs a shard.")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model.")


class ExportConfig(Config):
    """Write scored pairs for other programs: Parquet for TRL's DPOTrainer, or a line of JSON a pair."""

    dataset: DatasetPlace = Field(description="The dataset directory, or the URL of one.")
    output: Folder = Field(description="A new folder (trl), or a file or - for standard output (jsonl).")
    format: Literal["trl", "jsonl"] = Field("trl", description="What to write.")
    student_name: StudentName = Field(None, description="Whose pairs, of the dataset's further students.")
    round: int | None = Field(None, ge=0, description="Round of pairs; by default the latest.")
    truncated: Literal["keep", "drop"] = Field("keep", description="Pairs with a response cut off by its length.")

    @model_validator(mode="after")
    def _folders_are_no_stream(self) -> Self:
        if self.format == "trl" and str(self.output) == "-":
            raise ValueError("format 'trl' is a folder; only 'jsonl' goes to standard output")
        return self


PAIRWISE = ("dpkd", "dpkd-sum", "ipo", "cpo", "simpo")  # which compare y_t and y_s
SUMS = ("dpkd-sum", "cpo", "dpkd-token")  # whose β is not of means over tokens


class TrainConfig(Config):
    """Train a student, without the teacher.

    DPKD (eq. 9) on the pairs of a dataset, its variants, or the baselines of the paper on the same data.
    """

    dataset: DatasetPlace = Field(description="The dataset directory, or the URL of one (s3://, gs://, hf://, ...).")
    student: str = Field(description="Model folder or Hub name to start from.")
    output: Folder = Field(description="Folder of the trained model, metrics and checkpoints.")
    objective: ObjectiveName = Field("dpkd", description="What is minimised; the README says what each is.")
    beta: float = Field(
        2.0,
        gt=0,
        description="β of the objective and of the rewards in metrics.jsonl; for dpkd-sum, cpo and dpkd-token 0.1.",
    )
    tau: float = Field(0.1, gt=0, description="τ of ipo: the logratios of a pair are drawn to a gap of 1/(2τ) nats.")
    gamma: float = Field(0.5, ge=0, description="γ of simpo: the margin that it asks for, β times nats per token.")
    responses: Literal["pairs", "teacher"] = Field(
        "pairs", description="What seqkd reads: pairs, or y_t alone, as soon as generate has sampled it."
    )
    off_policy: Literal["token", "none"] = Field(
        "token",
        description="token: weight the gradient of each token of y_s by min(q/b, 5), q the student now and b the one "
        "that sampled it, so that stored y_s stand for new ones. none: as if they were new.",
    )
    chosen_nll_weight: float = Field(
        1.0,
        ge=0,
        description="Weight of -log q(y_t)/|y_t| beside an objective of pairs; for cpo, which has such a term, 0.",
    )
    lm_corpus: Source | None = Field(None, description="Text of the language-modelling loss: JSONL or Parquet, 'text'.")
    lm_weight: float = Field(0.5, ge=0, description="λ, the weight of the language-modelling loss on lm-corpus.")
    lm_length: int = Field(256, gt=1, description="Tokens a block of lm-corpus.")
    lm_batch_size: int = Field(4, gt=0, description="Blocks of lm-corpus an optimiser step.")
    epochs: int = Field(3, gt=0, description="Passes over the data.")
    max_steps: int | None = Field(None, gt=0, description="Number of optimiser steps, instead of epochs.")
    batch_size: int = Field(8, gt=0, description="Pairs an optimiser step, of all processes together.")
    micro_batch_tokens: int = Field(
        640, gt=0, description="Most tokens a forward pass; memory grows with it. On a GPU take as many as fit."
    )
    gradient_checkpointing: bool = Field(
        False, description="Make each layer's activations again in the backward pass: less memory, a third more time."
    )
    compile: bool = Field(
        False, description="Compile the layers with torch.compile: a minute first, then less time and memory a step."
    )
    learning_rate: float = Field(5e-5, gt=0, description="Peak of the cosine schedule.")
    warmup_ratio: float = Field(0.05, ge=0, lt=1, description="Share of the steps that warm up linearly.")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's, on matrices only.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradient clipping.")
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="Precision of the products; master weights and reductions are float32 in either."
    )
    lora_rank: int = Field(
        0, ge=0, description="Train LoRA adapters of this rank and leave the model as it is; 0: train the model."
    )
    lora_alpha: float = Field(16, gt=0, description="What the adapters add is scaled by lora-alpha / lora-rank.")
    lora_targets: str = Field(
        "all-linear", description="Layers that get adapters: all-linear (but the head), or names such as q_proj,v_proj."
    )
    lora_output: Literal["merged", "adapter"] = Field(
        "merged", description="merged: a model like any other. adapter: the adapters alone, for PEFT."
    )
    seed: int = Field(0, ge=0, description="Seed of the order of the pairs, and of the first adapters.")
    student_name: StudentName = Field(None, description="Whose pairs, of the dataset's further students.")
    round: int | None = Field(None, ge=0, description="Round of pairs; by default the latest.")
    truncated: Literal["keep", "drop"] = Field("keep", description="Pairs with a response cut off by its length.")
    max_length: int = Field(1024, gt=1, description="Drop pairs with more tokens of prompt plus response.")
    holdout: float = Field(
        0.05, ge=0, lt=1, description="Share of the prompts, chosen by their ids, that is kept for validation alone."
    )
    validate_every: int | None = Field(
        None, gt=0, description="Steps between validations; by default an epoch. Also before the first and at the end."
    )
    validate_limit: int = Field(256, gt=0, description="Most held-out pairs that a validation reads.")
    validate_rouge: int = Field(
        0, ge=0, description="Held-out prompts to answer greedily, for Rouge-L with their references; 0: none."
    )
    validate_max_new_tokens: int = Field(256, gt=0, description="Longest answer, in tokens.")
    validate_responses: int = Field(
        16, ge=0, description="Held-out prompts to answer greedily, to see whether responses end or repeat; 0: none."
    )
    stop_when_ruined: bool = Field(
        False, description="Stop where held-out prompts say that the student got worse; the best one is the result."
    )
    regenerate_every: int | None = Field(
        None, gt=0, description="Steps between rounds of the student's responses: then it waits for the next one."
    )
    regenerate_epochs: int | None = Field(None, gt=0, description="The same in epochs.")
    regenerate_above: float | None = Field(
        None, gt=0, description="The same where the drift is larger: KL from the student that sampled, nats a token."
    )
    regenerate_rounds: int = Field(3, gt=0, description="At most so many rounds after the first.")
    replay: float = Field(0.0, ge=0, lt=1, description="Share of the pairs that come from earlier rounds.")
    drift_every: int | None = Field(
        None, gt=0, description="Steps between measures of the drift; by default 20 where there are rounds, else none."
    )
    drift_pairs: int = Field(64, gt=1, description="Pairs on which the drift is measured, always the same ones.")
    track: Trackers = Field((), description="Also log to these, comma-separated: tensorboard, wandb, trackio.")
    save_every: int = Field(100, gt=0, description="Steps between checkpoints.")
    save_minutes: float = Field(30, gt=0, description="Also a checkpoint where the last is this old.")
    resume: bool = Field(True, description="Go on from the output's checkpoint, if there is one.")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model.")

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_objective(cls, values: dict[str, Any]) -> dict[str, Any]:
        objective = values.get("objective", "dpkd")
        own: dict[str, Any] = {"beta": 0.1} if objective in SUMS else {}
        if objective == "cpo" or objective not in PAIRWISE:
            own["chosen_nll_weight"] = 0.0
        if objective not in PAIRWISE:
            own["off_policy"] = "none"
        return {**own, **values}

    @model_validator(mode="after")
    def _what_only_pairs_have(self) -> Self:
        if self.objective not in PAIRWISE and (self.chosen_nll_weight or self.off_policy != "none"):
            raise ValueError(
                f"objective '{self.objective}' does not compare y_t with y_s, so that it has no off_policy and no "
                f"chosen_nll_weight"
            )
        return self

    @model_validator(mode="after")
    def _something_to_validate_on(self) -> Self:
        if not self.holdout and (self.validate_rouge or self.validate_every or self.stop_when_ruined):
            raise ValueError("validation needs held-out prompts: set holdout, such as to 0.05")
        return self

    @property
    def due(self) -> Path:
        """Where `train` says which round it waits for: its `round`, the `step` where that begins, and the `student`,
        a folder beside this file, that is to answer the prompts."""
        return self.output / "rounds" / "due.json"

    @property
    def regenerates(self) -> bool:
        """Whether later rounds of the student's responses are waited for."""
        return any((self.regenerate_every, self.regenerate_epochs, self.regenerate_above))

    @model_validator(mode="after")
    def _one_reason_for_rounds(self) -> Self:
        given = (self.regenerate_every, self.regenerate_epochs, self.regenerate_above)
        if sum(value is not None for value in given) > 1:
            raise ValueError("give one of regenerate_every, regenerate_epochs and regenerate_above")
        if self.responses == "teacher" and self.objective != "seqkd":
            raise ValueError(f"objective '{self.objective}' needs pairs; seqkd alone reads the teacher's responses")
        if (self.objective == "sft" or self.responses == "teacher") and (self.regenerates or self.drift_every):
            raise ValueError("without y_s there is no drift and no round of them")
        if self.regenerates and self.lora_output == "adapter":
            raise ValueError("rounds need a model that generates: take lora_output 'merged'")
        return self


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


class InitStudentConfig(Config):
    """Cut a shallower student from the teacher.

    Evenly spaced layers stay, with embeddings and head: where a user without a small sibling model starts.
    """

    teacher: str = Field(description="Model folder or Hub name.")
    output: Folder = Field(description="Folder of the new student.")
    layers: int = Field(gt=0, description="Layers to keep; the first and the last always stay.")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model.")


class Regeneration(Config):
    """Section `regenerate` of a recipe: when the student answers the prompts anew, and how many of them."""

    when: Literal["steps", "epochs", "drift"] = Field("steps", description="What makes a round due.")
    every: int | None = Field(None, gt=0, description="Steps or epochs a round; of drift, the steps between measures.")
    above: float | None = Field(None, gt=0, description="The drift, in nats a token, above which a round is due.")
    rounds: int = Field(3, gt=0, description="At most so many rounds after the first.")
    share: float = Field(1.0, gt=0, le=1, description="Share of the prompts that a round answers, drawn by seed.")
    replay: float = Field(0.0, ge=0, lt=1, description="Share of the pairs of training that are of earlier rounds.")

    @model_validator(mode="after")
    def _when_and_how_much(self) -> Self:
        if self.when == "drift" and self.above is None:
            raise ValueError("when: drift needs above, such as 0.1 nats a token")
        if self.when != "drift" and (self.every is None or self.above is not None):
            raise ValueError(f"when: {self.when} needs every, and no above")
        return self

    def for_train(self) -> dict[str, Any]:
        """What `train` has to know of it."""
        name = {"steps": "regenerate_every", "epochs": "regenerate_epochs", "drift": "drift_every"}[self.when]
        given = {name: self.every, "regenerate_above": self.above, "regenerate_rounds": self.rounds}
        return {key: value for key, value in given.items() if value is not None} | {"replay": self.replay}


class MergeConfig(Config):
    """Join datasets into a new one.

    The prompts of all, in the order given, with the tables that each has whole: of one template, tokenizer and
    teacher, and in each round one student. A prompt that an earlier dataset has, too, is left out.
    """

    output: Folder = Field(description="The new dataset directory.")
    parts: tuple[DatasetPlace, ...] = Field(min_length=1, description="Dataset directories, or URLs of them.")
    shard_size: int = Field(256, gt=0, description="Prompts a shard of the new dataset.")


class SubsetConfig(Config):
    """Take the rows of a dataset that satisfy every rule given into a new one.

    In their order, with all tables that are whole. Rules about responses are about those of every student and round.
    """

    dataset: DatasetPlace = Field(description="The dataset directory, or the URL of one.")
    output: Folder = Field(description="The new dataset directory.")
    max_tokens: int | None = Field(None, gt=0, description="At most N tokens of prompt plus its longest response.")
    drop_truncated: bool = Field(False, description="No response that was cut off by its length.")
    drop_identical: bool = Field(False, description="Chosen and rejected response are not the same text.")
    drop_inexact: bool = Field(
        False, description="Both responses were scored as the tokens sampled, or as tokens that give the same text."
    )
    min_margin: float | None = Field(
        None,
        allow_inf_nan=False,
        description="The teacher's margin, its log-prob per token of y_t minus that of y_s, is at least X nats.",
    )
    max_margin: float | None = Field(None, allow_inf_nan=False, description="The teacher's margin is at most X nats.")
    share: float | None = Field(
        None, gt=0, le=1, description="This share of the prompts, by a hash of their ids and the seed."
    )
    seed: int = Field(0, ge=0, description="Another seed takes another share.")
    limit: int | None = Field(None, gt=0, description="The first N rows that satisfy the other rules.")

    @model_validator(mode="after")
    def _rules(self) -> Self:
        rules = {name: field.default for name, field in type(self).model_fields.items() if not field.is_required()}
        if all(getattr(self, name) == default for name, default in rules.items() if name != "seed"):
            raise ValueError(f"give a rule: {', '.join('--' + r.replace('_', '-') for r in rules if r != 'seed')}")
        if self.min_margin is not None and self.max_margin is not None and self.min_margin > self.max_margin:
            raise ValueError(f"min_margin {self.min_margin} must not be above max_margin {self.max_margin}")
        return self


class Recipe(Config):
    """A whole experiment for `distill`: what is shared, and a section per stage."""

    teacher: str = Field(description="Model folder or Hub name.")
    student: str | None = Field(None, description="Where the student starts; not needed with init_student.")
    output: Folder = Field(description="Folder of everything the run makes.")
    init_student: dict[str, Any] | None = Field(None, description="Section of init-student, if the student is cut.")
    sft: dict[str, Any] | None = Field(None, description="Section of train for the student's initial fine-tuning.")
    warm_start: dict[str, Any] | None = Field(
        None, description="Section of train for a short seqkd on y_t, before the student answers the prompts."
    )
    generate: dict[str, Any] = Field(description="Section of generate, for teacher and student.")
    generate_teacher: dict[str, Any] | None = Field(None, description="Section of generate, in its place, for y_t.")
    generate_student: dict[str, Any] | None = Field(None, description="Section of generate, in its place, for y_s.")
    score_teacher: dict[str, Any] = Field(default_factory=dict, description="Section of score-teacher.")
    train: dict[str, Any] = Field(default_factory=dict, description="Section of train.")
    regenerate: Regeneration | None = Field(None, description="When the student answers anew: rounds.")
    evaluate: dict[str, Any] | None = Field(None, description="Section of evaluate, for every model of the run.")

    @model_validator(mode="after")
    def _one_student(self) -> Self:
        if (self.student is None) == (self.init_student is None):
            raise ValueError("give either student (a model) or init_student (layers of the teacher)")
        return self


def as_plain(config: Config) -> dict[str, Any]:
    """The resolved config as JSON and YAML can hold it, without what is nobody's business where outputs are shared: of
    a URL or an absolute path only the last name stays, and of servers and a worker's share nothing."""
    plain = config.model_dump(mode="json", exclude={"url", "shard_index", "num_shards"})

    def elsewhere(key: str, value: object) -> bool:
        return isinstance(getattr(config, key), RemotePath) or (isinstance(value, str) and Path(value).is_absolute())

    return {k: Path(v).name if elsewhere(k, v) else v for k, v in plain.items()}


def write_yaml(path: Path, data: Mapping[str, Any]) -> None:
    """The resolved config beside an output."""
    write_atomically(path, yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True).encode())
