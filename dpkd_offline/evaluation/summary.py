"""The numbers of an evaluation, from its lines that go by, and how far they are from those of another one."""

from __future__ import annotations

import json
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dpkd_offline.common.errors import DataError, MismatchError
from dpkd_offline.evaluation.table import QUALITY
from dpkd_offline.metrics.intervals import Difference, interval_of_mean, mean_and_spread
from dpkd_offline.metrics.text import MEASURES, word_count

Results = dict[str, Any]
Row = dict[str, Any]  # a line of responses.jsonl
RESULTS, RESPONSES = "results.json", "responses.jsonl"  # in the folder of an evaluation
NUMBERS = (*MEASURES, "teacher_nll", "reward", "accepted", "tokens")  # of a line; some are not always there


class Summary:
    """The numbers of results.json.

    Per measure: the mean of each seed, their mean, their spread (sample standard deviation), and the 95 % interval over
    prompts, each of which counts with the mean of its responses. Measures of text also by words of the reference.
    """

    def __init__(self, borders: Sequence[int]) -> None:
        self._borders = borders
        self._by_seed: dict[int, dict[str, array[float]]] = {}  # in the order of the prompts
        self._reference_words = array("q")  # of each prompt
        self._counts: Counter[str] = Counter()

    def add(self, row: Row) -> None:
        values = self._by_seed.setdefault(row["seed"], {})
        for measure in NUMBERS:
            if measure in row:
                values.setdefault(measure, array("d")).append(row[measure])
        reference = word_count(row["references"][0])
        if len(self._by_seed) == 1:  # prompts come again with the next seed
            self._reference_words.append(reference)
        self._counts.update(
            rows=1,
            cut_off=row["finish_reason"] == "length",
            repeating=row["repeating"],
            unfinished_thoughts=row.get("unfinished_thoughts", False),
            words=word_count(str(row.get("answer", row["response"]))),
            reference_words=reference,
        )

    def results(self) -> Results:
        counts, seeds = self._counts, sorted(self._by_seed)
        results: Results = {"prompts": len(self._reference_words), "seeds": seeds}
        by_prompt = {}
        for measure in self._by_seed[seeds[0]]:
            values = np.array([self._by_seed[seed][measure] for seed in seeds])  # [seeds, prompts]
            by_seed = values.mean(1).tolist()
            mean, spread = mean_and_spread(by_seed)
            by_prompt[measure] = values.mean(0)
            interval = interval_of_mean(by_prompt[measure])
            results[measure] = {"mean": mean, "spread": spread, "by_seed": by_seed, "interval": interval}
        results["truncated"] = counts["cut_off"] / counts["rows"]
        results["repeating"] = counts["repeating"] / counts["rows"]
        results["length_ratio"] = counts["words"] / max(counts["reference_words"], 1)
        if counts["unfinished_thoughts"]:
            results["unfinished_thoughts"] = counts["unfinished_thoughts"] / counts["rows"]
        results["by_length"] = self._by_length({name: by_prompt[name] for name in MEASURES})
        return results

    def _by_length(self, by_prompt: dict[str, Any]) -> list[Results]:
        """Means over the prompts whose references have so many words."""
        words, buckets = np.array(self._reference_words), []
        for low, high in zip((0, *self._borders), (*self._borders, None), strict=True):
            inside = (words > low) | (low == 0)
            if high is not None:
                inside &= words <= high
            bucket: Results = {"above": low, "to": high, "prompts": int(inside.sum())}
            if inside.any():
                bucket |= {name: float(values[inside].mean()) for name, values in by_prompt.items()}
            buckets.append(bucket)
        return buckets


def difference_of(before: Path, after: Path, teacher: Path | None = None) -> Results:
    """How far the evaluation in `after` is from that in `before`, on the prompts that both have.

    Of each measure: the mean difference per prompt, its 95 % interval over prompts, and a verdict in words. With a
    teacher's evaluation also what share of the gap from `before` to it is closed, where there is a gap.

    Raises:
        DataError: a folder holds no whole evaluation.
        MismatchError: they have no prompt in common, or one with other references.
    """
    one, other = values_by_prompt(before), values_by_prompt(after)
    if not (both := [prompt for prompt in one if prompt in other]):
        raise MismatchError(f"{before / RESPONSES}: has no prompt of {after / RESPONSES}")
    for prompt in both:
        if one[prompt][0] != other[prompt][0]:
            raise MismatchError(f"{before / RESPONSES}: prompt '{prompt}' has other references in {after / RESPONSES}")
    of_teacher = values_by_prompt(teacher) if teacher else {}
    result: Results = {"prompts": len(both), "of": max(len(one), len(other))}
    for measure in NUMBERS:
        if measure not in one[both[0]][1] or measure not in other[both[0]][1]:
            continue
        values = [[evaluation[prompt][1][measure] for prompt in both] for evaluation in (one, other)]
        difference = Difference.of(*values)
        better = QUALITY.get(measure, 0)
        result[measure] = asdict(difference) | ({"verdict": difference.word(better)} if better else {})
        del result[measure]["prompts"]
        if better and all(prompt in of_teacher for prompt in both):
            gap = Difference.of(values[0], [of_teacher[prompt][1][measure] for prompt in both])
            if gap.sign == better:
                result[measure]["gap_closed"] = difference.mean / gap.mean
    return result


def values_by_prompt(folder: Path) -> dict[str, tuple[list[str], dict[str, float]]]:
    """Of each prompt of an evaluation its references, and the mean of each measure over the seeds.

    Raises:
        DataError: the folder holds no whole evaluation.
    """
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    references: dict[str, list[str]] = {}
    for row in read_lines(folder):
        references[row["id"]] = row["references"]
        for measure in NUMBERS:
            if measure in row:
                values[row["id"]][measure].append(row[measure])
    return {
        prompt: (references[prompt], {name: float(np.mean(numbers)) for name, numbers in of.items()})
        for prompt, of in values.items()
    }


def read_lines(folder: Path) -> Iterator[Row]:
    """The lines of an evaluation.

    Raises:
        DataError: it is not there, or not whole.
    """
    path = folder / RESPONSES
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                yield _row_of(line, f"{path}:{number}")
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; name a folder that evaluate has written") from error


def _row_of(line: str, place: str) -> Row:
    try:
        row: Row = json.loads(line)
        return {**row, "id": row["id"], "references": row["references"]}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{place}: is no line of an evaluation of this version: {error}") from error
