"""The dataset directory: its prompt set, its shard plan, and its tables.

    dataset.json        format, prompt set, tokenizer, template, shard plan
    <table>/            prompts, responses/…, pairs/…: see layout.py and table.py
    students/<name>/    the tables of a further student

dataset.json is written once, after the prompts; until then there is no dataset.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict
from pydantic.dataclasses import dataclass

from dpkd_offline.common.errors import DataError, MismatchError, UsageError
from dpkd_offline.common.files import as_model, find_json, write_json
from dpkd_offline.common.hashing import fingerprint
from dpkd_offline.common.locations import Location
from dpkd_offline.config.base import STUDENT_NAME
from dpkd_offline.dataset.columns import Lists
from dpkd_offline.dataset.layout import (
    PAIRS,
    PROMPTS,
    SAMPLES,
    STUDENT_PROMPTS,
    STUDENT_RESPONSES,
    TEACHER_RESPONSES,
    TOP_K,
    TableKind,
)
from dpkd_offline.dataset.provenance import Count
from dpkd_offline.dataset.schema import PreferencePair, Prompt, R, Response, TopK
from dpkd_offline.dataset.table import ShardPlan, Table
from dpkd_offline.dataset.writing import creation, write_shard

FORMAT = "dpkd-offline"
FORMAT_VERSION = 1


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class PromptSet:
    """What every table of a dataset has in common; the content of dataset.json."""

    id: str  # hash over all rows of the prompts, the tokenizer and the template: see PromptDigest
    source: str
    template: str
    template_fingerprint: str
    tokenizer: str
    tokenizer_fingerprint: str
    vocab_size: Count  # every token id of a prompt is smaller
    longest_prompt: str  # its id
    longest_prompt_tokens: Count
    rows: dict[str, int]  # read from the source, and dropped for what reason
    license: str | None = None  # of the prompts, for people: where two agree in all else, they are the same prompts
    template_args: dict[str, Any] = field(default_factory=dict)  # what the chat template was told besides
    columns: dict[str, str] = field(default_factory=dict)  # of the prompts, that not every dataset has: see schema.py

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it, without what is empty of the keys that few datasets have."""
        return {key: value for key, value in asdict(self).items() if key not in ("template_args", "columns") or value}


class PromptDigest:
    """What identifies a prompt set, from prompts that go by in pieces of any size, and the longest of them."""

    def __init__(self) -> None:
        self._hashes: defaultdict[int, Any] = defaultdict(hashlib.sha256)
        self.longest: tuple[str, int] = ("", 0)  # id, tokens

    def update(self, rows: pa.Table) -> None:
        """The next prompts."""
        parts = (part for array in _without_nulls(rows) for part in _parts(array))
        for number, part in enumerate(parts):
            self._hashes[number].update(part)
        lengths = Lists(rows["prompt_ids"]).lengths
        longest = int(lengths.argmax())
        if lengths[longest] > self.longest[1]:
            self.longest = rows["id"][longest].as_py(), int(lengths[longest])

    def id(self, template: str, template_fingerprint: str, tokenizer_fingerprint: str) -> str:
        """Equal for the same rows, in the same order, rendered and tokenised in the same way."""
        hashes = [self._hashes[number].hexdigest() for number in range(len(self._hashes))]
        return fingerprint([hashes, template, template_fingerprint, tokenizer_fingerprint])


def _without_nulls(rows: pa.Table) -> Iterator[pa.Array]:
    """The columns of a table; one that may have nulls as two, of which the first says where they are."""
    for field_, column in zip(rows.schema, rows.columns, strict=True):
        array = column.combine_chunks()
        if field_.nullable:
            yield array.is_valid().cast(pa.int8())
            array = array.fill_null("")
        yield array


def _parts(array: pa.Array) -> Iterator[bytes | memoryview]:
    """All that an array without nulls holds: lengths of lists and strings, numbers, text, each in one piece.

    The pieces of an array cut in two are those of its halves, joined.
    """
    if pa.types.is_struct(array.type):
        for child in array.flatten():
            yield from _parts(child)
    elif pa.types.is_list(array.type):
        yield pc.list_value_length(array).to_numpy().tobytes()
        yield from _parts(array.flatten())
    elif pa.types.is_string(array.type):
        yield pc.binary_length(array).to_numpy().tobytes()
        yield "".join(array.to_pylist()).encode()
    else:
        yield array.to_numpy().tobytes()


class SizedPrompts(Protocol):
    """Prompts whose number is known before they are gone through: a list, or a spool."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Prompt]: ...


class _Shards(BaseModel):
    rows: Count
    shard_size: Count
    count: Count


class _File(BaseModel):
    """dataset.json, but for its format."""

    prompt_set: PromptSet
    shards: _Shards


class Dataset:
    """A dataset directory, as one of its students sees it, and one of its samples.

    Prompts and the teacher's responses are the same for all students. The first student has no name. Prompts are the
    same for all samples, of which each has a response to every one.
    """

    def __init__(
        self, root: Location, prompt_set: PromptSet, plan: ShardPlan, student: str | None = None, sample: int = 0
    ) -> None:
        self.root, self.prompt_set, self.plan = root, prompt_set, plan
        self.student, self.sample = student, sample
        self._tables: dict[str, Table[Any]] = {}

    @staticmethod
    def exists(root: Path) -> bool:
        return (root / "dataset.json").exists()

    @classmethod
    def open(cls, root: Location, student: str | None = None, sample: int = 0) -> Dataset:
        """The dataset in a folder, or at a URL, where it can only be read.

        Raises:
            DataError: there is none, its dataset.json is wrong, or plans more than there is.
            MismatchError: its format is of another version.
        """
        path = root / "dataset.json"
        if (value := find_json(path, finite=True)) is None:
            if isinstance(root, Path) and not root.exists():
                raise DataError(f"{root}: no such folder; `dpkd-offline generate --prompts ...` starts a dataset")
            raise DataError(f"{path}: no such file; `dpkd-offline generate --prompts ...` starts a dataset")
        dataset = cls.parse(root, value, student).of_sample(sample)
        dataset.prompts.check_count()  # all of them were there before it was
        return dataset

    @classmethod
    def parse(cls, root: Location, value: Mapping[str, Any], student: str | None = None) -> Dataset:
        """The dataset whose dataset.json holds `value`."""
        path = root / "dataset.json"
        if value.get("format") != FORMAT or value.get("format_version") != FORMAT_VERSION:
            raise MismatchError(
                f"{path}: format {value.get('format')} version {value.get('format_version')}; "
                f"this program reads {FORMAT} version {FORMAT_VERSION}"
            )
        file = as_model(value, path, _File)
        plan = ShardPlan(file.shards.rows, file.shards.shard_size)
        if file.shards.count != plan.count:
            raise DataError(
                f"{path}: shards: {plan.rows} rows, {plan.shard_size} a shard, are {plan.count} shards, "
                f"not {file.shards.count}"
            )
        return cls(root, file.prompt_set, plan, student)

    @classmethod
    def create(cls, root: Path, prompt_set: PromptSet, prompts: SizedPrompts, shard_size: int) -> Dataset:
        """Write the prompts, and then dataset.json: until that is written there is no dataset.

        `prompts` is gone through once, a shard in memory at a time.

        Raises:
            DataError: shards of other prompts are in the folder.
            MismatchError: another command began, or made, a dataset of other prompts there.
        """
        dataset = cls(root, prompt_set, ShardPlan(len(prompts), shard_size))
        coming = iter(prompts)
        with creation(root, fingerprint([prompt_set.id, asdict(dataset.plan)])):
            for shard in range(dataset.plan.count):
                write_shard(dataset.prompts, shard, list(islice(coming, shard_size)))
            file = {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "prompt_set": prompt_set.as_dict(),
                "shards": {**asdict(dataset.plan), "count": dataset.plan.count},
            }
            if not write_json(root / "dataset.json", file, exclusive=True):
                stored = cls.open(root)
                if (stored.prompt_set.id, stored.plan) != (prompt_set.id, dataset.plan):
                    raise MismatchError(f"{root}: another command has just made a dataset of other prompts here")
        return dataset

    def table(self, kind: TableKind[R], round: int | None = None) -> Table[R]:
        """The table of a kind and round. It is one object, which at a URL remembers the entries that it has read."""
        name = kind.path(self.student, round, self.sample)
        columns = self.prompt_set.columns if kind is PROMPTS else None
        new = Table(self.root, kind, self.plan, self.student, round, self.sample, columns)
        table: Table[R] = self._tables.setdefault(name, new)
        return table

    @property
    def prompts(self) -> Table[Prompt]:
        return self.table(PROMPTS)

    @property
    def student_prompts(self) -> Table[Prompt]:
        """The same prompts in the tokens of a student with another tokenizer; of others there is no such table."""
        return self.table(STUDENT_PROMPTS)

    def responses(self, role: str, round: int) -> Table[Response]:
        return self.table(TEACHER_RESPONSES if role == "teacher" else STUDENT_RESPONSES, round)

    def pairs(self, round: int) -> Table[PreferencePair]:
        return self.table(PAIRS, round)

    def top_k(self, round: int) -> Table[TopK]:
        return self.table(TOP_K, round)

    def rounds(self, kind: TableKind[Any] = PAIRS) -> list[int]:
        """The rounds of this student's tables of a kind that have been begun."""
        folders = (self.root / kind.home(self.student, self.sample)).glob("round-*")
        return sorted(int(f.name[6:]) for f in folders if re.fullmatch(r"round-\d{3,}", f.name))

    def students(self) -> list[Dataset]:
        """This dataset as each of its students sees it, the first one, without a name, before the others."""
        names = sorted(f.name for f in (self.root / "students").glob("*") if re.fullmatch(STUDENT_NAME, f.name))
        return [Dataset(self.root, self.prompt_set, self.plan, name, self.sample) for name in (None, *names)]

    def of_sample(self, sample: int) -> Dataset:
        """This dataset as another sample of it sees it, for the same student."""
        return self if sample == self.sample else Dataset(self.root, self.prompt_set, self.plan, self.student, sample)

    def samples(self) -> list[Dataset]:
        """This dataset as each of its samples sees it, the first one before those that have been begun besides."""
        folders = (self.root / SAMPLES).glob("*")
        numbers = sorted(int(f.name) for f in folders if re.fullmatch(r"\d{3,}", f.name) and int(f.name))
        return [self.of_sample(number) for number in (0, *numbers)]

    def require_student(self) -> None:
        """Raise UsageError where nothing is stored of the student of this name, naming those that there are."""
        names = [dataset.student for dataset in self.students() if dataset.student is not None]
        if self.student is not None and self.student not in names:
            others = ", ".join(names) or "none but the first, which has no name"
            raise UsageError(f"{self.root}: no student '{self.student}'; there is: {others}")

    def require_round(self, kind: TableKind[Any], round: int) -> None:
        """Raise DataError where a student has rounds of a kind of table, and not this one, or where another one has."""
        folder, rounds = self.root / kind.home(self.student, self.sample), self.rounds(kind)
        if rounds and round not in rounds:
            raise DataError(
                f"{folder}: no round {round}; there is: {', '.join(map(str, rounds))}; `dpkd-offline {kind.command}"
                f"{' --role student' if kind is STUDENT_RESPONSES else ''} --round {round}` makes it"
            )
        names = [name for dataset in self.students() if (name := dataset.student) and dataset.rounds(kind)]
        if not rounds and self.student is None and names:
            others = ", ".join(f"--student-name {name}" for name in names)
            raise DataError(f"{folder}: the student without a name has none; there is: {others}")

    def shares_tokenizer(self, tokenizer_fingerprint: str) -> bool:
        """Whether the prompts' token ids, and with them the teacher's, are those of a tokenizer."""
        return tokenizer_fingerprint == self.prompt_set.tokenizer_fingerprint

    def check_tokenizer(self, name: str, tokenizer_fingerprint: str) -> None:
        """Raise MismatchError unless the tokenizer is the one the prompts were tokenised with."""
        if not self.shares_tokenizer(tokenizer_fingerprint):
            raise MismatchError(
                f"{self.root / 'dataset.json'}: the prompts were tokenised by {self.prompt_set.tokenizer} "
                f"({self.prompt_set.tokenizer_fingerprint[:12]}), the tokenizer of {name} is another "
                f"({tokenizer_fingerprint[:12]}); the prompts have to be in the tokens of the teacher, so that only "
                f"students may have others"
            )
