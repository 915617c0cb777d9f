"""Configs of the commands that make, check, share, combine and convert datasets."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from dpkd_offline.config.base import (
    CodeOptions,
    Config,
    DatasetPlace,
    Folder,
    ModelOptions,
    PairOptions,
    PromptOptions,
    RoundOptions,
    SamplingOptions,
    ShardOptions,
    Source,
    Template,
    in_words,
)
from dpkd_offline.config.objectives import OBJECTIVES


class SeededSampling(SamplingOptions):
    """How responses are sampled that can be sampled again."""

    max_new_tokens: int = Field(
        256, gt=0, description="Longest response, in tokens. A student's may by default be as long as the teacher's."
    )
    seed: int = Field(0, ge=0, description="Seed. The same one gives a row the same response again.")


class SharedRounds(RoundOptions):
    """Whose responses are sampled, and for how many of the prompts."""

    share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of the prompts, drawn by seed, that get a new response. The others keep that of the round "
        "before.",
    )


class GenerateConfig(ShardOptions, ModelOptions, SeededSampling, SharedRounds, PromptOptions):
    """Sample responses of the teacher or the student.

    Samples one response per prompt. The first call also reads --prompts into the dataset. A repeated call goes on
    where the last one stopped.
    """

    dataset: Folder = Field(description="The dataset directory; the first call creates it.")
    role: Literal["teacher", "student"] = Field(description="Whose responses these are.")
    model: str = Field(description="Model folder or Hub name.")
    prompts: Source | None = Field(
        None,
        description="Prompts: JSON, CSV or Parquet file, folder[:SPLIT], or datasets NAME[@CONFIG][:SPLIT]. Only the "
        "first call needs them.",
    )
    license: str | None = Field(
        None,
        min_length=1,
        description="Licence of the prompts, for the dataset's card, best by its name on the Hub, such as cc-by-4.0.",
    )
    shard_size: int = Field(256, gt=0, description="Prompts per shard. The first call fixes it.")

    @model_validator(mode="after")
    def _name_of_a_student(self) -> Self:
        if self.student_name is not None and self.role == "teacher":
            raise ValueError("student_name is for role 'student': all students have the same teacher")
        if self.round and self.role == "teacher":
            raise ValueError("round is for role 'student': the teacher answers once, for all rounds")
        return self

    @model_validator(mode="after")
    def _round_before(self) -> Self:
        if self.share < 1 and (self.role == "teacher" or self.round == 0):
            raise ValueError(
                "share below 1 is for role 'student' from round 1 on: the others keep that of the round before"
            )
        return self

    def with_limits(self, max_new_tokens: int, max_length: int) -> Self:
        """The same with the teacher's longest response, and as much room as that had, where these are not set."""
        limits = {"max_new_tokens": max_new_tokens, "max_length": max(max_length, self.max_length)}
        return self.model_copy(update={k: v for k, v in limits.items() if k not in self.model_fields_set})


class ScoreTeacherConfig(ShardOptions, ModelOptions, RoundOptions):
    """Add the teacher's log-probs of all responses.

    Scores each token of both responses to each prompt, by prefill with one engine, and writes the pairs that train
    reads.
    """

    dataset: Folder = Field(description="The dataset directory.")
    model: str = Field(description="The teacher: model folder or Hub name.")
    student: str | None = Field(
        None,
        description="The student, if its tokenizer is not the teacher's. Then the teacher scores the text of "
        "responses, and pairs are in the student's tokens.",
    )
    top_k: int = Field(
        0,
        ge=0,
        description="Also store the teacher's K likeliest tokens at each position. "
        f"{in_words([name for name, info in OBJECTIVES.items() if info.top_k])} need them.",
    )
    audit: int = Field(
        0, ge=0, description="Score N rows again with transformers in float32, and record how far the numbers differ."
    )


class ImportConfig(CodeOptions, PromptOptions):
    """Make a dataset of a preference set.

    Chosen and rejected texts become responses, for score-teacher to score. Reads columns chosen and rejected, and
    prompt if there is one; their values are text or messages. Without prompt, the two share their first messages.
    """

    source: Source = Field(
        description="The preference set: JSON, CSV or Parquet file, folder[:SPLIT], or datasets NAME[@CONFIG][:SPLIT]."
    )
    dataset: Folder = Field(description="The dataset directory to make.")
    model: str = Field(
        description="Model folder or Hub name of the teacher or the student; its tokenizer and template give the ids."
    )
    template: Template = Field(
        "auto", description="auto: the model's chat template, or Alpaca's; a column prompt of text stays as it is."
    )
    max_length: int = Field(1024, gt=1, description="Drop pairs with more tokens of prompt plus response.")
    license: str | None = Field(
        None, min_length=1, description="Licence of the preference set, for the card, best by its name on the Hub."
    )
    shard_size: int = Field(256, gt=0, description="Pairs per shard.")


class ExportConfig(PairOptions):
    """Write scored pairs for other programs.

    Writes Parquet for TRL's DPOTrainer, or a line of JSON per pair.
    """

    dataset: DatasetPlace = Field(description="The dataset directory, or the URL of one.")
    output: Folder = Field(description="A new folder (trl); a file, or - for standard output (jsonl).")
    format: Literal["trl", "jsonl"] = Field("trl", description="What to write.")

    @model_validator(mode="after")
    def _folders_are_no_stream(self) -> Self:
        if self.format == "trl" and str(self.output) == "-":
            raise ValueError("format 'trl' is a folder; only 'jsonl' goes to standard output")
        return self


class MergeConfig(Config):
    """Join datasets into a new one.

    Takes the prompts of all in the order of PARTS, and every table that each part has whole. The parts must have one
    template, tokenizer and teacher, and in each round one student. Leaves out prompts that an earlier part has, too.
    """

    output: Folder = Field(description="The new dataset directory.")
    parts: tuple[DatasetPlace, ...] = Field(min_length=1, description="Dataset directories, or URLs of them.")
    shard_size: int = Field(256, gt=0, description="Prompts per shard of the new dataset.")


class SubsetRules(Config):
    """Which rows a subset takes: those that satisfy every given rule."""

    panel: ClassVar[str] = "A row stays if"

    max_tokens: int | None = Field(
        None, gt=0, description="The prompt and its longest response have at most N tokens together."
    )
    drop_truncated: bool = Field(False, description="No response was cut off by its length.")
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
        None, gt=0, le=1, description="The prompt is in this share of all, drawn by a hash of its id and the seed."
    )
    seed: int = Field(0, ge=0, description="Seed of --share: another seed draws another share.")
    limit: int | None = Field(None, gt=0, description="The row is one of the first N that satisfy the other rules.")


class SubsetConfig(SubsetRules):
    """Copy the rows that satisfy every given rule into a new dataset.

    Keeps their order, and every table that is whole. A rule about responses holds for those of every student and round.
    """

    dataset: DatasetPlace = Field(description="The dataset directory, or the URL of one.")
    output: Folder = Field(description="The new dataset directory.")

    @model_validator(mode="after")
    def _rules(self) -> Self:
        rules = {name: field.default for name, field in type(self).model_fields.items() if not field.is_required()}
        if all(getattr(self, name) == default for name, default in rules.items() if name != "seed"):
            raise ValueError(f"give a rule: {', '.join('--' + r.replace('_', '-') for r in rules if r != 'seed')}")
        if self.min_margin is not None and self.max_margin is not None and self.min_margin > self.max_margin:
            raise ValueError(f"min_margin {self.min_margin} must not be above max_margin {self.max_margin}")
        return self


class VerifyConfig(Config):
    """Check that a dataset is whole.

    Checks hashes, schemas and every value, and that prompts, responses and pairs belong together.
    """

    dataset: DatasetPlace = Field(description="The dataset directory, or the URL of one.")


class InspectConfig(Config):
    """Show what a dataset holds.

    Shows counts, lengths, truncation, the teacher's log-probs and margin, and who made each table.
    """

    dataset: DatasetPlace = Field(description="The dataset directory, or the URL of one.")
    samples: int = Field(0, ge=0, description="Also show N of the latest pairs, drawn at random, always the same.")


class PushConfig(Config):
    """Copy a dataset to where other teams read it.

    Copies only what the target does not have; what is committed there stays. On the Hub all of it is one commit.
    """

    dataset: Folder = Field(description="The dataset directory.")
    to: str = Field(description="hf://datasets/OWNER/NAME[@BRANCH], s3://, gs://, ... or a folder.")
    private: bool = Field(False, description="If the Hub has no repository of that name, make a private one.")


class PullConfig(Config):
    """Copy a dataset of another team to this machine.

    Copies all of it, or some tables with what they need. Checks every shard against its hash before it takes its place.
    """

    url: str = Field(description="hf://datasets/OWNER/NAME[@REVISION], s3://, gs://, ... or a folder.")
    dataset: Folder = Field(description="The dataset directory; it may hold a part already.")
    table: tuple[str, ...] = Field((), description="A table, such as pairs or responses/teacher; may be repeated.")
    round: int | None = Field(None, description="Of tables that have rounds, only this one.")
