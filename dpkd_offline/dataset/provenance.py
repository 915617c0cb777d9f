"""The keys of a `_table.json`, which says who made a table, with what."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from dpkd_offline.common.files import as_model
from dpkd_offline.common.hashing import fingerprint
from dpkd_offline.common.locations import Location
from dpkd_offline.dataset.schema import PreferencePair, Prompt, Response, TopK

LARGEST_COUNT = 2**53  # which every reader of JSON knows exactly
Count = Annotated[int, Field(strict=True, gt=0, le=LARGEST_COUNT)]
Round = Annotated[int, Field(strict=True, ge=0, le=LARGEST_COUNT)]


class Model(BaseModel):
    """Who a model is."""

    name: str
    revision: str


class Teacher(Model):
    """One of several teachers of a table, and how many of the next rows are its."""

    rows: Annotated[int, Field(strict=True, gt=0, le=LARGEST_COUNT)]


class Sampling(BaseModel):
    """How responses were sampled."""

    max_new_tokens: Count


class ScoresFile(BaseModel):
    """Scores that others gave responses."""

    file: str
    sha256: str


class Rule(BaseModel):
    """What is read of the rules of a subset: how it made pairs of several samples, if it did."""

    pairs: str | None = None
    samples: dict[str, Count] = {}  # by role, how many there were
    scores: ScoresFile | None = None  # which were best and worst, where it was not the teacher's log-prob per token


class ForPeople(BaseModel):
    """Keys that every `_table.json` may have, besides others, and that cards repeat."""

    versions: dict[str, str] = {}
    license: str | None = None
    config: dict[str, Any] = {}
    sampling: Sampling | dict[str, Any] | None = None
    column: str | None = None
    source: str | None = None
    columns: dict[str, str] = {}  # that not every table of its kind has, or of other types: see schema.py
    share: Annotated[float, Field(gt=0, le=1)] | None = None  # of the prompts that were answered anew
    reused_from: Round | None = None  # the round that log-probs were taken over from
    reused_student: str | None = None  # of round 0: the student whose they were; of the first one it is empty
    rule: Rule | None = None  # of a table that `subset` made
    sample: Count | None = None  # of responses and pairs, where it is not the first
    teacher_sample: Round | None = None  # of a sample's pairs: that of their y_t, 0 where the teacher has fewer,
    student_sample: Round | None = None  # and that of their y_s


class Origin(ForPeople):
    """Keys that every `_table.json` must have, but for that of prompts."""

    stage: str
    vocab_size: Count  # of the model: every token id of its responses is smaller
    prompt_set: str
    parts: list[Part] = []  # of a table that `merge` or `subset` made
    teachers: list[Teacher] = []  # of a merge of several: whose the rows are, in their order


class Part(BaseModel):
    """The rows that a table has from the table of another dataset, or from a sample of it."""

    dataset: str  # its prompt set
    sample: Annotated[int, Field(strict=True, ge=0)] = 0
    rows: Annotated[int, Field(strict=True, ge=0)]  # of pairs by rule those whose y_s is of this sample
    rows_of_y_t: Annotated[int, Field(strict=True, ge=0)] = 0  # of pairs by rule those whose y_t is
    made: Origin


class Provenance(Origin):
    """Of a table that a model made."""

    model: Model
    dtype: str
    engine: str
    quantization: str | None = None  # of the model's weights, by its config or by the engine
    engine_args: dict[str, Any] = {}  # of the engine's own, those that may change numbers


class PromptProvenance(ForPeople):
    """Of the prompts in the tokens of a student; the commands that make it have no model in common."""

    stage: str
    template: str
    tokenizer_fingerprint: str
    vocab_size: Count
    prompt_set: str


class ResponseProvenance(Provenance):
    """Of sampled responses."""

    tokenizer_fingerprint: str
    eos_token_ids: list[Annotated[int, Field(strict=True)]]
    sampling: Sampling


class ImportProvenance(Origin):
    """Of responses that were imported as text: no model, no sampling."""

    source: str
    tokenizer_fingerprint: str
    eos_token_ids: list[Annotated[int, Field(strict=True)]]


class PairProvenance(Provenance):
    """Of pairs; `vocab_size` and the tokenizer are those of their token ids."""

    tokenizer_fingerprint: str
    scored: Literal["ids", "text"]


class TopKProvenance(Provenance):
    """Of the teacher's likeliest tokens."""

    tokenizer_fingerprint: str
    top_k: Count
    top_mass: Annotated[float, Field(gt=0, lt=1)] | None = None  # as few of them as cover this share


class Compared(BaseModel):
    """What an audit compared with."""

    engine: str
    dtype: str


class Audit(BaseModel):
    """What is read of `_audit.json`."""

    model_config = ConfigDict(extra="allow")

    rows: Count
    against: Compared
    gap_abs_mean: FiniteFloat
    margin_gap_abs_mean: FiniteFloat


PROVENANCE: dict[type, type[BaseModel]] = {
    Prompt: PromptProvenance,
    Response: ResponseProvenance,
    PreferencePair: PairProvenance,
    TopK: TopKProvenance,
}
FOR_PEOPLE = ("versions", "config", "license", "tokenizer")  # keys of `_table.json` that tell no producer from another


def check_keys(record: type, provenance: Mapping[str, Any], path: Location) -> None:
    """Raise DataError where the `_table.json` at `path`, of a table of these records, lacks a key or has it wrong."""
    imported = record is Response and provenance.get("stage") != "generate" and "model" not in provenance
    as_model(provenance, path, ImportProvenance if imported else PROVENANCE[record])


def fingerprint_of_template(name: str, text: Any, arguments: Mapping[str, Any]) -> str:
    """What is equal where a template of this name and text, with these arguments, makes the same text of a row."""
    return fingerprint([name, text, *([dict(arguments)] if arguments and name == "chat" else [])])


def origins(provenance: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The provenances behind one: of a table of parts theirs, through all that was combined before."""
    if not (parts := provenance.get("parts")):
        yield provenance
    for part in parts or ():
        yield from origins(part["made"])


def teachers_of(provenance: Mapping[str, Any]) -> dict[str, str]:
    """The names of the teachers of a table, by their revisions."""
    models = provenance.get("teachers") or ([provenance["model"]] if "model" in provenance else [])
    return {model["revision"]: model["name"] for model in models}


def several(teachers: Mapping[str, str]) -> dict[str, str]:
    """What `_table.json` says as `model` of a table of several teachers, whose names these are, by their revisions.

    The revision is that of no model, and the same for the same teachers.
    """
    return {"name": ", ".join(teachers.values()), "revision": f"several:{fingerprint(sorted(teachers))}"}


def pair_rules(provenance: Mapping[str, Any]) -> set[str]:
    """The rules by which rows of a table, or of those that it has parts of, were put together of several samples."""
    own = {rule} if (rule := (provenance.get("rule") or {}).get("pairs")) is not None else set()
    return own.union(*(pair_rules(part["made"]) for part in provenance.get("parts") or ()))


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} as {'a.b': 1}, and [{'b': 1}] as {'0.b': 1}, for naming what differs."""
    out: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, list) and item and isinstance(item[0], dict):
            item = {str(place): inner for place, inner in enumerate(item)}
        out.update(flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item})
    return out
