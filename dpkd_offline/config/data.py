"""Configs of the commands that make, check, share, combine and convert datasets."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from dpkd_offline.config.base import (
    CodeOptions,
    Config,
    DatasetPlace,
    Dtype,
    Folder,
    ModelOptions,
    PairOptions,
    PromptOptions,
    RoundOptions,
    SamplingOptions,
    Scripts,
    ShardOptions,
    Source,
    StudentName,
    Template,
    Urls,
    in_words,
)
from dpkd_offline.config.objectives import OBJECTIVES

MOST_SAMPLES = 1000  # responses per prompt: their folders have three digits


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

    Samples a response per prompt, or several. The first call also reads --prompts into the dataset. A repeated call
    goes on where the last one stopped.
    """

    dataset: Folder = Field(description="The dataset directory; the first call creates it.")
    role: Literal["teacher", "student"] = Field(description="Whose responses these are.")
    model: str = Field(description="Model folder or Hub name.")
    prompts: Source | None = Field(
        None,
        description="Prompts: JSON, CSV or Parquet file, folder[:SPLIT], or datasets NAME[@CONFIG][:SPLIT]. Only the "
        "first call needs them.",
    )
    teacher_system: str | None = Field(
        None,
        min_length=1,
        exclude_if=lambda value: value is None,
        description="What the teacher alone is told: a system turn in front of its conversations, which no student "
        "sees. With the first call.",
    )
    license: str | None = Field(
        None,
        min_length=1,
        description="Licence of the prompts, for the dataset's card, best by its name on the Hub, such as cc-by-4.0.",
    )
    shard_size: int = Field(256, gt=0, description="Prompts per shard. The first call fixes it.")
    samples: int = Field(
        1,
        gt=0,
        le=MOST_SAMPLES,
        description="Responses per prompt. A larger number later adds to those that are there.",
    )

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

    @model_validator(mode="after")
    def _samples_are_drawn_anew(self) -> Self:
        if self.samples > 1 and self.share < 1:
            raise ValueError(
                "samples above 1 is for share 1: prompts that are not drawn keep their one response of the round before"
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
    top_mass: float | None = Field(
        None,
        gt=0,
        lt=1,
        exclude_if=lambda value: value is None,
        description="Store at each position only as few of the K as cover this share of the probability, such as 0.99.",
    )
    audit: int = Field(
        0, ge=0, description="Score N rows again with transformers in float32, and record how far the numbers differ."
    )
    audit_engine: Literal["vllm", "transformers"] | None = Field(
        None,
        exclude_if=lambda value: value is None,
        description="Audit against this engine, where the teacher does not fit into memory in float32.",
    )
    audit_dtype: Dtype | None = Field(
        None, exclude_if=lambda value: value is None, description="Precision of --audit-engine; by default float32."
    )
    audit_url: Urls = Field(
        (),
        exclude_if=lambda value: not value,
        description="Audit against the vLLM servers at these URLs, which hold the teacher too, comma-separated.",
    )

    @model_validator(mode="after")
    def _audited_by_one(self) -> Self:
        named = [name for name in ("audit_engine", "audit_dtype", "audit_url") if getattr(self, name)]
        if named and not self.audit:
            raise ValueError(f"{named[0]} says what an audit compares with; give --audit N, the rows that it takes")
        if self.audit_dtype and not self.audit_engine:
            raise ValueError("audit_dtype is that of --audit-engine, vllm or transformers; servers have their own")
        if self.audit_engine and self.audit_url:
            raise ValueError("audit_engine and audit_url are two things to compare with; give one of them")
        return self

    @model_validator(mode="after")
    def _share_of_some_tokens(self) -> Self:
        if self.top_mass is not None and not self.top_k:
            raise ValueError("top_mass is a share that some of the top_k tokens cover; give --top-k, such as 64")
        return self


class ImportConfig(CodeOptions, PromptOptions):
    """Make a dataset of responses that exist as text.

    Chosen and rejected texts of a preference set become responses, for score-teacher to score. Reads columns chosen and
    rejected, and prompt if there is one; their values are text or messages. Without prompt, the two share their first
    messages. Of rows with one response, that is the teacher's, and generate makes the student's.
    """

    source: Source = Field(
        description="Pairs, or prompts with a response: JSON, CSV or Parquet file, folder[:SPLIT], or datasets "
        "NAME[@CONFIG][:SPLIT]."
    )
    dataset: Folder = Field(description="The dataset directory to make.")
    model: str = Field(
        description="Model folder or Hub name of the teacher or the student; its tokenizer and template give the ids."
    )
    template: Template = Field(
        "auto",
        description="auto: the model's chat template, or Alpaca's; a column prompt of text stays as it is. Or chat, "
        "alpaca, none, or a file with a chat template (Jinja).",
    )
    max_length: int = Field(1024, gt=1, description="Drop rows with more tokens of prompt plus response.")
    license: str | None = Field(
        None, min_length=1, description="Licence of the source, for the card, best by its name on the Hub."
    )
    shard_size: int = Field(256, gt=0, description="Rows per shard.")


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
    several_teachers: bool = Field(
        False,
        description="The parts may be of different teachers: each row says whose it is, in a column 'teacher'. "
        f"{in_words([name for name, info in OBJECTIVES.items() if info.top_k])} do not train on that.",
    )
    shard_size: int = Field(256, gt=0, description="Prompts per shard of the new dataset.")


PairRule = Literal["each", "best", "best-worst"]
NO_RULES = ("dataset", "output", "seed", "scores", "student_name")  # but what rules need to know


def _is_none(value: object) -> bool:
    return value is None


def _is_empty(value: tuple[str, ...]) -> bool:
    return not value


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
    max_repetition: float | None = Field(
        None,
        ge=0,
        lt=1,
        exclude_if=_is_none,
        description="Of no response more than this share of the 4-grams stood in it before.",
    )
    script: Scripts = Field(
        (),
        exclude_if=_is_empty,
        description="Nine of ten letters of y_t are of this Unicode script, such as Latin, or of these: "
        "Han,Hiragana,Katakana.",
    )
    known_to: str | None = Field(
        None,
        exclude_if=_is_none,
        description="The embedding of this model, folder or Hub name, has all of the row's token ids.",
    )
    min_score: float | None = Field(
        None, exclude_if=_is_none, description="The score of y_t in --scores is at least X."
    )
    min_gap: float | None = Field(
        None,
        exclude_if=_is_none,
        description="Of --pairs: the score of y_t is by at least X above that of y_s, in that by which pairs are made.",
    )
    share: float | None = Field(
        None, gt=0, le=1, description="The prompt is in this share of all, drawn by a hash of its id and the seed."
    )
    seed: int = Field(0, ge=0, description="Seed of --share: another seed draws another share.")
    limit: int | None = Field(None, gt=0, description="The row is one of the first N that satisfy the other rules.")


class PairsBySample(SubsetRules):
    """Which pairs a subset makes, where a dataset has several samples."""

    panel: ClassVar[str] = "Pairs of several samples"

    pairs: PairRule | None = Field(
        None,
        exclude_if=_is_none,
        description="each: each y_t with each y_s. best: the best y_t with y_s of sample 0. best-worst: the best y_t "
        "with the worst y_s. Best is the highest score of --scores, or else the teacher's log-prob per token.",
    )
    scores: Path | None = Field(
        None,
        exclude_if=_is_none,
        description="File of scores, JSON, CSV or Parquet: columns id, sample, score and role (teacher or student).",
    )
    student_name: StudentName = Field(
        None, exclude_if=_is_none, description="Make pairs of the dataset's further student of this name."
    )


class SubsetConfig(PairsBySample):
    """Copy the rows that satisfy every given rule into a new dataset.

    Keeps their order, and every table that is whole. A rule about responses holds for those of every student and round.
    With --pairs the rows are pairs of the responses to a prompt that the dataset has, and the rules are about these.
    """

    dataset: DatasetPlace = Field(description="The dataset directory, or the URL of one.")
    output: Folder = Field(description="The new dataset directory.")

    @model_validator(mode="after")
    def _rules(self) -> Self:
        rules = {n: field.default for n, field in type(self).model_fields.items() if n not in NO_RULES}
        if all(getattr(self, name) == default for name, default in rules.items()):
            raise ValueError(f"give a rule: {', '.join('--' + r.replace('_', '-') for r in rules)}")
        if self.min_margin is not None and self.max_margin is not None and self.min_margin > self.max_margin:
            raise ValueError(f"min_margin {self.min_margin} must not be above max_margin {self.max_margin}")
        return self

    @model_validator(mode="after")
    def _of_pairs_and_scores(self) -> Self:
        for name in ("min_gap", "student_name"):
            if getattr(self, name) is not None and self.pairs is None:
                raise ValueError(f"{name} is for pairs that a rule makes of several samples: give pairs, too")
        if self.min_score is not None and self.scores is None:
            raise ValueError("min_score needs scores, a file of them")
        compares = self.min_gap is not None or self.pairs in ("best", "best-worst")
        if self.scores is not None and self.min_score is None and not compares:
            raise ValueError("scores are for pairs best or best-worst, min_gap or min_score: give one of these")
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
