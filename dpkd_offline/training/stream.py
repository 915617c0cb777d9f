"""The shuffled stream of examples: an order that is a function of (seed, epoch) and nothing else.

A source says how examples are read from tables. `scan` reads and checks all of it once, and says which rows are for
training; the stream gives these in their order, batch by batch.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dpkd_offline.common.console import progress
from dpkd_offline.config.train import TrainConfig
from dpkd_offline.dataset.columns import draws_of, draws_of_rows
from dpkd_offline.dataset.table import Table
from dpkd_offline.prompts.retokenize import PromptSource

WINDOW_SHARDS = 16  # shards whose rows are mixed, and the rows that are in memory at once
T = TypeVar("T")
Mask = npt.NDArray[np.bool_]
# The teacher's likeliest ids and their log-probs [T, K]; -1 and NOT_STORED where a position has fewer.
Top = tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]
Draw = tuple[float, int, int]  # the draw of an id in [0, 1), and the shard and row where it is


@dataclass(frozen=True)
class Example:
    """A prompt with its responses, (y_t, y_s) or the reference alone, and what is stored of each. In nats."""

    id: str
    prompt_ids: list[int]
    responses: tuple[list[int], ...]
    teacher_logps: tuple[list[float], ...] = ()  # log p(y_n|x, y_<n)
    behavior_logps: tuple[list[float], ...] = ()  # the same under the student that sampled y_s; none of y_t
    top: tuple[Top, ...] = ()


@dataclass(frozen=True)
class ExampleSource:
    """Tables of the same rows, and how examples are read from them."""

    tables: Sequence[tuple[Table[Any] | PromptSource, list[str]]]  # with the columns that are read of each
    check: Callable[[int, Sequence[pa.Table]], None]  # refuses values of a shard, such as by a DataError
    faults: Callable[[Sequence[pa.Table]], dict[str, Mask]]  # by why rows of a shard are not wanted: which
    examples: Callable[[Sequence[pa.Table]], Callable[[int], Example]]  # of a shard, by the number of the row

    def keep(self, tables: Sequence[pa.Table]) -> Mask:
        """Which rows of a shard are wanted."""
        kept = np.ones(len(tables[0]), np.bool_)
        for faulty in self.faults(tables).values():
            kept &= ~faulty
        return kept

    def read(self, shard: int) -> list[pa.Table]:
        """One shard of all tables, of which the hashes are checked."""
        return [table.read_arrow(shard, columns) for table, columns in self.tables]

    def read_checked(self) -> Iterator[tuple[int, list[pa.Table]]]:
        """All shards, one at a time, with every value checked."""
        first, _ = self.tables[0]
        with progress(f"check {first.name}", first.plan.rows, "row") as bar:
            for shard in range(first.plan.count):
                tables = self.read(shard)
                self.check(shard, tables)
                yield shard, tables
                bar.advance(len(tables[0]))

    def examples_at(self, draws: Sequence[Draw], checked: bool = True) -> Iterator[Example]:
        """The examples of some rows in the table's order, a shard in memory at a time.

        Values that were not `checked` before are checked when they are read.
        """
        places = sorted((shard, row) for _, shard, row in draws)
        for shard, of_shard in groupby(places, key=lambda place: place[0]):
            tables = self.read(shard)
            if not checked:
                self.check(shard, tables)
            yield from map(self.examples(tables), [row for _, row in of_shard])


@dataclass(frozen=True)
class Split:
    """Which rows of a source are for training, and which for validation and for the measure of drift."""

    training: list[Mask]  # [rows] of each shard
    held_out: int  # how many examples training never sees
    validation: list[Draw]  # of these the `validate_limit` smallest draws
    drift: list[Draw]  # of those for training the `drift_pairs` smallest draws; none where drift is not measured
    rows: int  # of the source
    dropped: Mapping[str, int]  # how many rows are not wanted, by the first reason that a row has


def scan(source: ExampleSource, config: TrainConfig) -> Split:
    """Read a source once, a shard at a time: every hash and every value is checked before the first step, and the
    number of examples is known, so that a position is a number.

    Raises:
        DataError, MismatchError: as when a shard is read, and as the source's own check does.
    """
    training: list[Mask] = []
    validation: list[Draw] = []
    drift: list[Draw] = []
    held_out = rows = 0
    dropped: Counter[str] = Counter()
    for shard, tables in source.read_checked():
        kept = np.ones(len(tables[0]), np.bool_)
        for why, faulty in source.faults(tables).items():
            dropped[why] += int((kept & faulty).sum())
            kept &= ~faulty
        rows += len(kept)
        if config.holdout:
            is_held_out = kept & (draws_of(tables[0]["id"]) < config.holdout)
            draws = draws_of_rows(tables[0]["id"])  # of several pairs of a prompt not all before those of the next
            validation = _smallest(config.validate_limit, validation, draws, shard, is_held_out)
            held_out += int(is_held_out.sum())
            kept &= ~is_held_out
        training.append(kept)
        if config.regenerates or config.drift_every:
            drift = _smallest(config.drift_pairs, drift, draws_of_rows(tables[0]["id"]), shard, kept)
    return Split(training, held_out, validation, drift, rows, {why: n for why, n in dropped.items() if n})


def _smallest(
    limit: int, before: Sequence[Draw], draws: npt.NDArray[np.float64], shard: int, wanted: Mask
) -> list[Draw]:
    """The smallest draws of the wanted rows of a shard, and of shards before."""
    rows = np.flatnonzero(wanted)
    of_shard = ((draw, shard, row) for draw, row in zip(draws[rows].tolist(), rows.tolist(), strict=True))
    return heapq.nsmallest(limit, [*before, *of_shard])


@dataclass(frozen=True)
class HeldOutExamples:
    """Examples of the first round that training never sees."""

    source: ExampleSource
    draws: Sequence[Draw]  # of those that a validation reads
    count: int  # of all
    checked: bool = True  # whether the scan has read these columns

    def read(self, limit: int | None = None) -> Iterator[Example]:
        """In the table's order; of `limit` the smallest draws. Raises as the source's check, if that was not done."""
        draws = self.draws if limit is None else heapq.nsmallest(limit, self.draws)
        return self.source.examples_at(draws, self.checked)


class Stream:
    """The examples that training reads, in an order that the seed decides.

    Further rounds of the same rows may be added: what is read of a row then comes from the latest, or with `replay`
    sometimes from an earlier one, and the order of the rows stays what it was.
    """

    def __init__(
        self, source: ExampleSource, split: Split, config: TrainConfig, held_out: HeldOutExamples | None = None
    ) -> None:
        """
        Args:
            split: what a scan of the source returned.
            held_out: where more is read of what training never sees than of its own examples.
        """
        self.held_out = held_out or HeldOutExamples(source, split.validation, split.held_out)
        self._rounds, self._seed, self._replay = [source], config.seed, config.replay
        self._usable: list[list[Mask]] = []  # of each round after the first, and of each shard
        self._training, self._drift = split.training, split.drift
        self.rows, self.dropped = split.rows, split.dropped  # of the source, and why some are not read
        self._length = sum(int(mask.sum()) for mask in split.training)

    def __len__(self) -> int:
        return self._length

    def add_round(self, source: ExampleSource) -> None:
        """Take rows from another round of the same tables from here on, where it keeps them. Raises as a scan."""
        self._usable.append([source.keep(tables) for _, tables in source.read_checked()])
        self._rounds.append(source)

    def drift_examples(self) -> Iterator[Example]:
        """Examples of the latest round, always of the same rows but for those that it has not."""
        usable = self._usable[-1] if self._usable else self._training
        draws = [draw for draw in self._drift if usable[draw[1]][draw[2]]]
        return self._rounds[-1].examples_at(draws)

    def batches(self, batch_size: int, start: int = 0) -> Iterator[list[Example]]:
        """Batches of epoch after epoch, without end, from number `start` on; an epoch's last batch may be smaller."""
        epoch, skipped = divmod(start, self.batches_per_epoch(batch_size))
        while True:
            examples = self.epoch(epoch, skipped * batch_size)
            while batch := list(islice(examples, batch_size)):
                yield batch
            epoch, skipped = epoch + 1, 0

    def batches_per_epoch(self, batch_size: int) -> int:
        """How many batches an epoch has."""
        return -(-len(self) // batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Example]:
        """The examples of an epoch from number `start` on. What lies before is not read."""
        for window in self._windows(epoch):
            places, start = window[start:], max(start - len(window), 0)
            examples = {shard: self._from_rounds(shard, epoch) for shard in np.unique(places[:, 0]).tolist()}
            for shard, row in places.tolist():
                yield examples[shard](row)

    def _windows(self, epoch: int) -> Iterator[npt.NDArray[np.int64]]:
        """Places [n, 2] (shard, row) in the order of the epoch, some shards at a time."""
        random = np.random.default_rng([self._seed, epoch])
        shards = random.permutation(len(self._training))
        for start in range(0, len(shards), WINDOW_SHARDS):
            window = shards[start : start + WINDOW_SHARDS]
            rows = [np.flatnonzero(self._training[shard]) for shard in window]
            places = np.column_stack([np.repeat(window, list(map(len, rows))), np.concatenate(rows)])
            yield random.permutation(places)

    def _from_rounds(self, shard: int, epoch: int) -> Callable[[int], Example]:
        """A shard's examples by row, each from the round that is its turn."""
        if len(self._rounds) == 1:
            return self._rounds[0].examples(self._rounds[0].read(shard))
        turns = self._turns(shard, epoch)
        sources = {round: self._rounds[round] for round in np.unique(turns).tolist()}
        examples = {round: source.examples(source.read(shard)) for round, source in sources.items()}
        return lambda row: examples[int(turns[row])](row)

    def _turns(self, shard: int, epoch: int) -> npt.NDArray[np.int64]:
        """From which round each row of a shard comes in an epoch."""
        latest, size = len(self._usable), len(self._training[shard])
        usable = np.array([np.ones(size, np.bool_), *(masks[shard] for masks in self._usable)])  # [rounds, rows]
        turns = np.full(size, latest)
        if self._replay:
            random = np.random.default_rng([self._seed, epoch, shard, latest])
            turns = np.where(random.random(size) < self._replay, random.integers(0, latest, size), latest)
        # Where a round has not the row, the one before it that has.
        nearest = np.maximum.accumulate(np.where(usable, np.arange(latest + 1)[:, None], 0), axis=0)
        of_rows: npt.NDArray[np.int64] = nearest[turns, np.arange(size)]
        return of_rows


def prefetch(items: Iterator[T]) -> Iterator[T]:
    """The same items, each made in a thread while the one before is in use."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item
