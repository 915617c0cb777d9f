"""Configs of the commands that make, combine and convert datasets."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from dpkd_offline.config.base import (
    Config,
    DatasetPlace,
    Folder,
    ModelOptions,
    PromptOptions,
    SamplingOptions,
    ShardOptions,
    Source,
    StudentName,
    Template,
)


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
