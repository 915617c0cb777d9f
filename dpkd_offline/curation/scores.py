"""Scores of stored responses that others gave them: a judge, a verifier, a reward model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dpkd_offline.common.errors import DataError
from dpkd_offline.common.hashing import file_sha256
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.dataset.scratch import KeyIndex
from dpkd_offline.prompts.sources import Row, read_rows, source_name

ROLES = ("teacher", "student")


@dataclass(frozen=True)
class Scores:
    """The scores of a file, by role; a float64 array [samples, rows of the dataset], with nan where there is none."""

    path: Path
    sha256: str
    by_role: Mapping[str, npt.NDArray[np.float64]]

    def of_shard(self, role: str, dataset: Dataset, shard: int) -> npt.NDArray[np.float64]:
        """Those of the rows [samples, rows] of a shard."""
        first = shard * dataset.plan.shard_size
        return self.by_role[role][:, first : first + dataset.plan.rows_of(shard)]

    def as_dict(self) -> dict[str, str]:
        """Which file it was, for `_table.json`."""
        return {"file": source_name(self.path), "sha256": self.sha256}


def read_scores(path: Path, dataset: Dataset, samples: Mapping[str, int], needed: Mapping[str, int]) -> Scores:
    """The scores in a file with columns `id`, `score`, and, where they are not 0 and teacher, `sample` and `role`.

    Args:
        samples: how many samples each role has.
        needed: how many of them, from sample 0 on, must have a score for every prompt.

    Raises:
        DataError: a score is missing, stands twice, is of an unknown response, or is no finite number.
    """
    sha256 = file_sha256(path)
    rows = KeyIndex()
    for shard in range(dataset.plan.count):
        ids = dataset.prompts.read_arrow(shard, ["id"])["id"].to_pylist()
        first = shard * dataset.plan.shard_size
        rows.add(ids, range(first, first + len(ids)))
    by_role = {role: np.full((samples[role], dataset.plan.rows), np.nan) for role in ROLES}
    for row in read_rows(path):
        role, sample = _role(row), _sample(row)
        if (id_ := row.columns.get("id")) is None:
            raise DataError(f"{row.place}: column 'id' is missing")
        if (place := rows.place(str(id_))) is None:
            raise DataError(f"{row.place}: column 'id': no prompt of {dataset.root} is called '{id_}'")
        if sample >= samples[role]:
            raise DataError(
                f"{row.place}: column 'sample' is {sample}, the {role} has {_count(samples[role])}, counted from 0"
            )
        if not math.isnan(by_role[role][sample, int(place)]):
            raise DataError(f"{row.place}: column 'id': '{id_}', sample {sample} of the {role} has a score already")
        by_role[role][sample, int(place)] = _score(row)
    scores = Scores(path, sha256, by_role)
    _check_complete(scores, dataset, needed)
    return scores


def _count(samples: int) -> str:
    return f"{samples} sample{'' if samples == 1 else 's'}"


def _role(row: Row) -> str:
    value = row.columns.get("role")
    if value is not None and value not in ROLES:
        raise DataError(f"{row.place}: column 'role' is {value!r}, and must be teacher or student")
    return "teacher" if value is None else str(value)


def _sample(row: Row) -> int:
    value = row.columns.get("sample")
    if isinstance(value, str) and value.isascii() and value.isdigit():  # a cell of CSV
        value = int(value)
    if value is not None and (type(value) is not int or value < 0):
        raise DataError(f"{row.place}: column 'sample' is {value!r}, and must be a whole number from 0")
    return value or 0


def _score(row: Row) -> float:
    value: Any = row.columns.get("score")
    try:
        score = math.nan if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        score = math.nan
    if not math.isfinite(score):
        raise DataError(f"{row.place}: column 'score' is {value!r}, and must be a finite number")
    return score


def _check_complete(scores: Scores, dataset: Dataset, needed: Mapping[str, int]) -> None:
    """Raise DataError, naming the first prompt, where a score is missing."""
    for role, samples in needed.items():
        missing = np.isnan(scores.by_role[role][:samples])
        if missing.any():
            row = int(missing.any(axis=0).argmax())
            shard, place = divmod(row, dataset.plan.shard_size)
            id_ = dataset.prompts.read_arrow(shard, ["id"])["id"][place].as_py()
            raise DataError(
                f"{scores.path}: no row with id '{id_}', sample {missing[:, row].argmax()} and role {role}: "
                f"{missing.sum()} of {missing.size} scores of the {role} are missing"
            )
