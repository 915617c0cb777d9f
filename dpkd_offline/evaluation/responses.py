"""The responses of evaluations, read again: checked against their results, and paired by prompt and seed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from dpkd_offline.common.errors import DataError, MismatchError
from dpkd_offline.common.files import as_model, opened, parse_json, read_model
from dpkd_offline.evaluation.summary import RESPONSES, RESULTS
from dpkd_offline.evaluation.table import EvaluationRecord

Draw = tuple[int, str]  # seed, and id of the prompt


class ResponseRow(BaseModel):
    """What a line of responses.jsonl says, as far as it matters here."""

    seed: int
    id: str
    prompt: str
    messages: list[dict[str, str]] | None = None
    references: list[str] | None = None
    response: str
    answer: str | None = None  # of a model that thinks first: what comes after its thoughts

    @property
    def text(self) -> str:
        """What is judged."""
        return self.response if self.answer is None else self.answer

    @property
    def task(self) -> str:
        """What the model was asked, without its template where the line says it."""
        if not self.messages:
            return self.prompt
        if len(self.messages) == 1:
            return self.messages[0].get("content", "")
        return "\n\n".join(f"{turn.get('role', '')}: {turn.get('content', '')}" for turn in self.messages)


@dataclass(frozen=True)
class Responses:
    """One evaluation's responses, of which only the places are held in memory."""

    path: Path
    sha256: str
    model: dict[str, Any]  # its identity
    places: dict[Draw, tuple[int, int]] = field(repr=False)  # number of its line, and where that begins

    @classmethod
    def open(cls, folder: Path) -> Responses:
        """The responses in an output folder of `evaluate`.

        Raises:
            DataError: the folder holds no finished evaluation, or a line is malformed, or stands there twice.
            MismatchError: the file is not the one that its results.json vouches for.
        """
        record, path = read_model(folder / RESULTS, EvaluationRecord), folder / RESPONSES
        places: dict[Draw, tuple[int, int]] = {}
        digest, offset = hashlib.sha256(), 0
        with opened(path) as file:
            for number, line in enumerate(file, start=1):
                digest.update(line)
                row = _row(line, path, number)
                if places.setdefault((row.seed, row.id), (number, offset))[0] != number:
                    raise DataError(f"{path}:{number}: prompt '{row.id}' stands there twice with seed {row.seed}")
                offset += len(line)
        if record.responses not in (None, digest.hexdigest()):
            raise MismatchError(
                f"{path}: was changed after {RESULTS} beside it was written; put back the file, or evaluate again"
            )
        if not places:
            raise DataError(f"{path}: holds no response")
        return cls(path, digest.hexdigest(), record.made.get("model") or {}, places)

    def rows(self, draws: list[Draw]) -> Iterator[ResponseRow]:
        """The lines of some draws, in their order."""
        with opened(self.path) as file:
            for draw in draws:
                number, offset = self.places[draw]
                file.seek(offset)
                yield _row(file.readline(), self.path, number)

    def place(self, draw: Draw) -> str:
        """`file:line` of a draw, for error messages."""
        return f"{self.path}:{self.places[draw][0]}"

    def first_prompts(self, limit: int | None) -> list[Draw]:
        """The draws, of the first prompts only where there is a limit."""
        ids = list(dict.fromkeys(id_ for _, id_ in self.places))[:limit]
        kept = set(ids)
        return [draw for draw in self.places if draw[1] in kept]


def _row(line: bytes, path: Path, number: int) -> ResponseRow:
    place = Path(f"{path}:{number}")
    return as_model(parse_json(line, place), place, ResponseRow)


def check_same_prompts(a: Responses, b: Responses) -> None:
    """Raise MismatchError, naming the first that differs, unless both answer the same prompts with the same seeds."""
    for one, other in ((a, b), (b, a)):
        for draw in one.places:
            if draw not in other.places:
                raise MismatchError(
                    f"{one.place(draw)}: prompt '{draw[1]}' with seed {draw[0]} is not in {other.path}; evaluate both "
                    f"models on the same prompts and seeds"
                )
    draws = list(a.places)
    for draw, x, y in zip(draws, a.rows(draws), b.rows(draws), strict=True):
        same = x.messages == y.messages if x.messages and y.messages else x.prompt == y.prompt
        if not same or (x.references or []) != (y.references or []):
            raise MismatchError(
                f"{b.place(draw)}: prompt '{draw[1]}' is another one than in {a.place(draw)}; evaluate both models on "
                f"the same prompts"
            )
