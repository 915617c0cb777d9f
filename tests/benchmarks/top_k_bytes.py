"""What the teacher's likeliest tokens take on the disk for each token of a response, in float32 and as they are stored.

    python tests/benchmarks/top_k_bytes.py TEACHER DATASET

DATASET has responses of teacher and student. They are scored with --top-k 64 in float32, in a copy; all else is made of
that. A vocabulary beyond 16 bits is simulated by ids that are as far apart as 151,936 is larger than the teacher's,
with a random part, so that there are as many different ones as such a vocabulary may have.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from dpkd_offline.common.markdown import markdown_table
from dpkd_offline.config.data import ScoreTeacherConfig
from dpkd_offline.dataset.catalog import summarize_tables
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.dataset.schema import SIDES, TopK
from dpkd_offline.dataset.top_k import Likeliest, compact_columns, covering
from dpkd_offline.dataset.writing import claim, write_shard
from dpkd_offline.generation.score_teacher import score_teacher

MOST, LARGE = 64, 151936


@dataclass(frozen=True)
class Form:
    """What is stored of the MOST tokens, and how."""

    k: int
    compact: bool
    vocabulary: int
    share: float | None = None


def stored(row: TopK, form: Form, id_of: Callable[[int], int]) -> TopK:
    """A row as `score-teacher` makes it in that form."""
    values: dict[str, Any] = {"id": row.id}
    for side in SIDES:
        logps = [of[: form.k] for of in getattr(row, f"{side}_top_logps")]
        if form.share is not None:
            logps = [of[: covering(of, form.share)] for of in logps]
        ids = zip(getattr(row, f"{side}_top_ids"), logps, strict=True)
        values[f"{side}_top_ids"] = [[id_of(token) for token in of[: len(kept)]] for of, kept in ids]
        values[f"{side}_top_logps"] = logps
        values[f"{side}_top_mass"] = [min(float(np.exp(of).sum()), 1.0) for of in logps]
    return TopK(**values)


def written(folder: Path, original: Path, form: Form) -> Dataset:
    """A copy of the dataset whose likeliest tokens are in that form."""
    shutil.copytree(original, folder)
    float32, dataset = Dataset.open(original).top_k(0), Dataset.open(folder)
    shutil.rmtree(folder / "top_k")
    own = {"columns": compact_columns(form.vocabulary)} if form.compact else {}
    share = {} if form.share is None else {"top_mass": form.share}
    claim(dataset.top_k(0), {**float32.require_provenance(), "top_k": form.k, **own, **share})
    random = np.random.default_rng(0)
    step = form.vocabulary / float32.require_provenance()["vocab_size"]

    def id_of(token: int) -> int:
        return token if step == 1 else int((token + random.random()) * step)

    for shard in range(dataset.plan.count):
        write_shard(dataset.top_k(0), shard, [stored(row, form, id_of) for row in float32.read(shard)])
    return dataset


def bytes_a_token(dataset: Dataset) -> float:
    """Of all files of the table, for each token of both responses."""
    of = {summary.name: summary for summary in summarize_tables(dataset)}
    tokens = sum(of["pairs/round-000"].stats.tokens[f"{side}_ids"] for side in SIDES)
    return of["top_k/round-000"].bytes / tokens


def errors(exact: Dataset, compact: Dataset, k: int) -> str:
    """How far half precision is off, in words: of what is stored, and of what a reader makes of it."""
    off: dict[str, list[np.ndarray[Any, Any]]] = {"stored": [], "mass": [], "read": []}
    for shard in range(exact.plan.count):
        rows = [of.top_k(0).read_arrow(shard) for of in (exact, compact)]
        for side in SIDES:
            true, half = (Likeliest.of(of, side, k) for of in rows)
            logps = half.logps.astype(np.float64)
            off["stored"].append(np.abs(logps - true.logps).ravel())
            off["mass"].append(np.abs(np.exp(logps).sum(-1) - true.mass))
            off["read"].append(np.abs(half.read_logps - true.logps).ravel())
    numbers = {name: np.concatenate(values) for name, values in off.items()}
    stats = next(of.stats for of in summarize_tables(compact) if of.name == "top_k/round-000")
    at_most = max(stats.rounding_max.values()), sum(stats.rounding_sum.values()) / sum(stats.halves.values())
    words = [f"{name} {of.max():.2e} at most, {of.mean():.2e} on average" for name, of in numbers.items()]
    return f"K = {k}: {'; '.join(words)}; recorded {at_most[0]:.2e} and {at_most[1]:.2e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher")
    parser.add_argument("dataset", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        original = Path(place) / "original"
        shutil.copytree(options.dataset, original, ignore=shutil.ignore_patterns("pairs", "top_k"))
        with patch("dpkd_offline.generation.reuse.compact_columns", lambda _: {}):
            score_teacher(
                ScoreTeacherConfig(
                    dataset=original, model=options.teacher, engine="transformers", batch_size=16, top_k=MOST
                )
            )
        small = Dataset.open(original).top_k(0).require_provenance()["vocab_size"]
        lines, number = [], 0
        for vocabulary in (small, LARGE):
            for k in (8, 32, 64):
                sizes = []
                for compact, share in ((False, None), (True, None), (True, 0.99), (True, 0.9)):
                    dataset = written(Path(place) / str(number), original, Form(k, compact, vocabulary, share))
                    number += 1
                    sizes.append(f"{bytes_a_token(dataset):.1f}")
                lines.append((f"{vocabulary:,}", str(k), *sizes))
                if vocabulary == small:
                    print(
                        errors(
                            Dataset.open(Path(place) / str(number - 4)), Dataset.open(Path(place) / str(number - 3)), k
                        )
                    )
        heads = ("vocabulary", "K", "float32, int32", "as stored", "`--top-mass 0.99`", "`--top-mass 0.9`")
        print(markdown_table(heads, lines))


if __name__ == "__main__":
    main()
