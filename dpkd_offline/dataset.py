"""The dataset directory: its prompt set, its shard plan, and its tables.

    dataset.json        format, prompt set, tokenizer, template, shard plan
    <table>/            prompts, responses/…, pairs/…: see shards.py

dataset.json is written once, when the prompts have entered; until then there is no dataset.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dpkd_offline.errors import DataError, MismatchError
from dpkd_offline.files import read_json, write_json
from dpkd_offline.records import PreferencePair, Prompt, Response, TopK
from dpkd_offline.shards import ShardPlan, Table

FORMAT = "dpkd-offline"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class PromptSet:
    """What every table of a dataset has in common; the content of dataset.json."""

    id: str  # hash over ids and token ids of all prompts
    source: str
    template: str
    template_fingerprint: str
    tokenizer: str
    tokenizer_fingerprint: str
    rows: dict[str, int]  # read from the source, and dropped for what reason


class Dataset:
    """A dataset directory whose prompts have entered."""

    def __init__(self, root: Path, prompt_set: PromptSet, plan: ShardPlan) -> None:
        self.root, self.prompt_set, self.plan = root, prompt_set, plan

    @staticmethod
    def exists(root: Path) -> bool:
        return (root / "dataset.json").exists()

    @classmethod
    def open(cls, root: Path) -> Dataset:
        path = root / "dataset.json"
        if not path.exists():
            raise DataError(f"{path}: no such file; `dpkd-offline generate --prompts ...` starts a dataset")
        value = read_json(path)
        if value.get("format") != FORMAT or value.get("format_version") != FORMAT_VERSION:
            raise MismatchError(
                f"{path}: format {value.get('format')} version {value.get('format_version')}; "
                f"this program reads {FORMAT} version {FORMAT_VERSION}"
            )
        try:
            plan = ShardPlan(rows=value["shards"]["rows"], shard_size=value["shards"]["shard_size"])
            return cls(root, PromptSet(**value["prompt_set"]), plan)
        except (KeyError, TypeError) as error:
            raise DataError(f"{path}: a key of dataset.json is missing or unknown: {error}") from error

    @classmethod
    def create(cls, root: Path, prompt_set: PromptSet, prompts: Sequence[Prompt], shard_size: int) -> Dataset:
        """Let the prompts enter. dataset.json comes last: until then there is no dataset."""
        dataset = cls(root, prompt_set, ShardPlan(len(prompts), shard_size))
        for shard in range(dataset.plan.count):
            dataset.prompts.write(shard, prompts[shard * shard_size : (shard + 1) * shard_size])
        write_json(
            root / "dataset.json",
            {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "prompt_set": asdict(prompt_set),
                "shards": {**asdict(dataset.plan), "count": dataset.plan.count},
            },
        )
        return dataset

    @property
    def prompts(self) -> Table[Prompt]:
        return Table(self.root, "prompts", Prompt, self.plan)

    def responses(self, role: str, round: int) -> Table[Response]:
        name = "responses/teacher" if role == "teacher" else f"responses/student/round-{round:03d}"
        return Table(self.root, name, Response, self.plan)

    def pairs(self, round: int) -> Table[PreferencePair]:
        return Table(self.root, f"pairs/round-{round:03d}", PreferencePair, self.plan)

    def top_k(self, round: int) -> Table[TopK]:
        return Table(self.root, f"top_k/round-{round:03d}", TopK, self.plan)

    def rounds(self, kind: str = "pairs") -> list[int]:
        """The rounds of `pairs` or of `responses/student` that have been begun."""
        folders = (self.root / kind).glob("round-*")
        return sorted(int(f.name[6:]) for f in folders if re.fullmatch(r"round-\d{3,}", f.name))

    def check_tokenizer(self, name: str, tokenizer_fingerprint: str) -> None:
        """Raise MismatchError unless the tokenizer is the one the prompts were tokenised with."""
        if tokenizer_fingerprint != self.prompt_set.tokenizer_fingerprint:
            raise MismatchError(
                f"{self.root / 'dataset.json'}: the prompts were tokenised by {self.prompt_set.tokenizer} "
                f"({self.prompt_set.tokenizer_fingerprint[:12]}), the tokenizer of {name} is another "
                f"({tokenizer_fingerprint[:12]}); take models that share a tokenizer"
            )
