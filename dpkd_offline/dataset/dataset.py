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
from collections.abc import Iterator, Mapping, Sequence
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
    TEACHER_PROMPTS,
    TEACHER_RESPONSES,
    TOP_K,
    TableKind,
)
from dpkd_offline.dataset.provenance import Count
from dpkd_offline.dataset.schema import PreferencePair, Prompt, R, Response, TopK
from dpkd_offline.dataset.table import ShardPlan, Table
from dpkd_offline.dataset.writing import claim, creation, write_shard

FORMAT = "dpkd-offline"
FORMAT_VERSION = 1


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class TeacherPromptSet:
    """What dataset.json says of `prompts/teacher`, the prompts as a teacher sees them that is told more."""

    id: str  # hash over all of its rows
    longest_prompt: str  # its id
    longest_prompt_tokens: Count


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class PromptSet:
    """What every table of a dataset has in common; the content of dataset.json."""

    id: str  # hash over all rows of the prompts, as all see them, the tokenizer and the template: see PromptDigest
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
    chat_template: str | None = None  # its text, where it is not that of the tokenizer
    system: str | None = None  # the system turn of prompts that had none
    taken: dict[str, list[str]] = field(default_factory=dict)  # files of the source, its columns, those not used
    teacher_prompts: TeacherPromptSet | None = None  # where the teacher sees others than the students

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it, without what is empty of the keys that few datasets have."""
        few = ("template_args", "columns", "chat_template", "system", "taken", "teacher_prompts")
        return {key: value for key, value in asdict(self).items() if key not in few or value}


class PromptDigest:
    """What identifies a prompt set, from prompts that go by in pieces of any size, and the longest of them."""

    def __init__(self) -> None:
        self._hashes: dict[tuple[str, int], Any] = defaultdict(hashlib.sha256)  # by column and number of its part
        self._filled: set[str] = set()  # columns that not every dataset has, with a value
        self._of_teacher: PromptDigest | None = None  # of the same rows as the teacher sees them, where it sees others
        self.longest: tuple[str, int] = ("", 0)  # id, tokens

    def update(self, rows: pa.Table, of_teacher: pa.Table | None = None) -> None:
        """The next prompts, and the same as the teacher sees them, if it sees others. A column that not every dataset
        has may be missing: then it is null."""
        if of_teacher is not None and self._of_teacher is None:  # up to here both see the same
            self._of_teacher = PromptDigest()
            self._of_teacher._hashes.update({place: so_far.copy() for place, so_far in self._hashes.items()})
            self._of_teacher._filled.update(self._filled)
            self._of_teacher.longest = self.longest
        if self._of_teacher is not None:
            self._of_teacher.update(rows if of_teacher is None else of_teacher)
        for name in OPTIONAL:
            if name not in rows.column_names:
                missing = pa.nulls(len(rows), Prompt.columns[name].type)
                rows = rows.append_column(pa.field(name, missing.type), missing)
            elif rows[name].null_count < len(rows):
                self._filled.add(name)
        rows = rows.select([name for name in rows.column_names if name not in OPTIONAL] + OPTIONAL)
        for field_, column in zip(rows.schema, rows.columns, strict=True):
            arrays = _without_nulls(column.combine_chunks(), field_.nullable)
            for number, part in enumerate(part for array in arrays for part in _parts(array)):
                self._hashes[field_.name, number].update(part)
        lengths = Lists(rows["prompt_ids"]).lengths
        longest = int(lengths.argmax())
        if lengths[longest] > self.longest[1]:
            self.longest = rows["id"][longest].as_py(), int(lengths[longest])

    @property
    def columns(self) -> dict[str, str]:
        """The columns that a dataset of these prompts has, and not every one: see schema.py."""
        return {name: str(Prompt.columns[name].type) for name in OPTIONAL if name in self._filled}

    def id(self, template: str, template_fingerprint: str, tokenizer_fingerprint: str) -> str:
        """Equal for the same rows, in the same order, rendered and tokenised in the same way."""
        empty = set(OPTIONAL) - self._filled
        hashes = [hash_.hexdigest() for (name, _), hash_ in self._hashes.items() if name not in empty]
        own = fingerprint([hashes, template, template_fingerprint, tokenizer_fingerprint])
        if self._of_teacher is None:
            return own
        return fingerprint([own, self._of_teacher.id(template, template_fingerprint, tokenizer_fingerprint)])

    @property
    def columns_of_teacher(self) -> dict[str, str]:
        """The same of the prompts as the teacher sees them."""
        return (self._of_teacher or self).columns

    def teacher_prompts(
        self, template: str, template_fingerprint: str, tokenizer_fingerprint: str
    ) -> TeacherPromptSet | None:
        """What dataset.json says of the prompts as the teacher sees them; None where it sees those of the students."""
        if self._of_teacher is None:
            return None
        id_ = self._of_teacher.id(template, template_fingerprint, tokenizer_fingerprint)
        return TeacherPromptSet(id_, *self._of_teacher.longest)


OPTIONAL = [name for name, column in Prompt.columns.items() if column.optional]


def _without_nulls(array: pa.Array, nullable: bool) -> Iterator[pa.Array]:
    """What a column holds; of one that may have nulls two arrays, of which the first says where they are."""
    if nullable:
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


class TeacherPrompts(Protocol):
    """The prompts as a teacher sees them that is told more than the students, while both are written."""

    def provenance(self, prompt_set: PromptSet) -> Mapping[str, Any]:
        """What `_table.json` says of them."""
        ...

    def seen(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The next prompts, each as the teacher sees it."""
        ...


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
    def create(
        cls,
        root: Path,
        prompt_set: PromptSet,
        prompts: SizedPrompts,
        shard_size: int,
        teacher: TeacherPrompts | None = None,
    ) -> Dataset:
        """Write the prompts, and then dataset.json: until that is written there is no dataset.

        `prompts` is gone through once, a shard in memory at a time. With `teacher` each is also written as the teacher
        sees it.

        Raises:
            DataError: shards of other prompts are in the folder.
            MismatchError: another command began, or made, a dataset of other prompts there.
        """
        dataset = cls(root, prompt_set, ShardPlan(len(prompts), shard_size))
        coming = iter(prompts)
        with creation(root, fingerprint([prompt_set.id, asdict(dataset.plan)])):
            if teacher is not None:
                claim(dataset.table(TEACHER_PROMPTS), teacher.provenance(prompt_set))
            for shard in range(dataset.plan.count):
                write_shard(dataset.prompts, shard, rows := list(islice(coming, shard_size)))
                if teacher is not None:
                    write_shard(dataset.table(TEACHER_PROMPTS), shard, teacher.seen(rows))
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
        """The same prompts as a student sees them that has another tokenizer or template; of others there is none."""
        return self.table(STUDENT_PROMPTS)

    def prompts_seen_by(self, role: str) -> Table[Prompt]:
        """The prompts as the teacher sees them, or this student: its own, where it has such, else those of all."""
        if role == "teacher":
            return self.prompts if self.prompt_set.teacher_prompts is None else self.table(TEACHER_PROMPTS)
        return self.prompts if self.student_prompts.provenance() is None else self.student_prompts

    @property
    def longest_of_teacher(self) -> tuple[str, int]:
        """The id and the number of tokens of the longest prompt, as the teacher sees it."""
        longest = self.prompt_set.teacher_prompts or self.prompt_set
        return longest.longest_prompt, longest.longest_prompt_tokens

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
