"""The shuffled stream of examples: an order that is a function of (seed, epoch) and nothing else."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dpkd_offline.common.console import progress
from dpkd_offline.config.train import TrainConfig
from dpkd_offline.dataset.columns import draws_of
from dpkd_offline.dataset.table import Table
from dpkd_offline.prompts.retokenize import PromptSource

WINDOW_SHARDS = 16  # shards whose rows are mixed, and the rows that are in memory at once
T = TypeVar("T")
Mask = npt.NDArray[np.bool_]
Top = tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]  # the teacher's likeliest ids and their log-probs [T, K]


@dataclass(frozen=True)
class Example:
    """A prompt with its responses, (y_t, y_s) or the reference alone, and what is stored of each. In nats."""

    id: str
    prompt_ids: list[int]
    responses: tuple[list[int], ...]
    teacher_logps: tuple[list[float], ...] = ()  # log p(y_n|x, y_<n)
    behavior_logps: tuple[list[float], ...] = ()  # the same under the student that sampled y_s; none of y_t
    top: tuple[Top, ...] = ()


Sources = Sequence[
    tuple[Table[Any] | PromptSource, list[str]]
]  # tables of the same rows, and the columns that are read of each
Check = Callable[[int, Sequence[pa.Table]], None]  # refuses values of a shard
Keep = Callable[[Sequence[pa.Table]], Mask]  # which rows of a shard are wanted
Examples = Callable[[Sequence[pa.Table]], Callable[[int], Example]]  # from the sources' shard to one row's example


class Stream:
    """The examples of one table that training keeps, with what other tables hold of the same rows.

    Further rounds of the same rows may be added: what is read of a row then comes from the latest, or with `replay`
    sometimes from an earlier one, and the order of the rows stays what it was.

    Of those that `holdout` keeps from it, `validate_limit` of the smallest draws are there for validation.

    Making it reads the whole table once, a shard at a time: every hash and every value is checked before the first
    step, and the number of examples is known, so that a position is a number.
    """

    def __init__(
        self,
        sources: Sources,
        check: Check,
        keep: Keep,
        examples: Examples,
        config: TrainConfig,
    ) -> None:
        """Raises DataError and MismatchError as when a shard is read, and what `check` raises."""
        self._rounds, self._examples, self._seed, self._replay = [sources], examples, config.seed, config.replay
        self._usable: list[list[Mask]] = []  # of each round after the first, and of each shard
        self._kept: list[Mask] = []
        self._probed: list[tuple[float, int, int]] = []  # draw, shard, row
        self._held_out: list[tuple[float, int, int]] = []  # draw, shard, row
        self.held_out = 0  # how many examples training never sees
        self._validated: tuple[Sources, Check | None] = sources, None
        first, _ = sources[0]
        with progress(f"check {first.name}", first.plan.rows, "row") as shown:
            for shard in range(first.plan.count):
                found = _read(sources, shard)
                check(shard, found)
                kept = keep(found)
                if config.holdout:
                    draws = draws_of(found[0]["id"])
                    held = kept & (draws < config.holdout)
                    self._held_out = _smallest(config.validate_limit, self._held_out, draws, shard, held)
                    self.held_out += int(held.sum())
                    kept &= ~held
                self._kept.append(kept)
                if config.regenerates or config.drift_every:
                    self._probed = _smallest(config.drift_pairs, self._probed, draws_of(found[0]["id"]), shard, kept)
                shown.advance(len(found[0]))
        self._length = sum(int(mask.sum()) for mask in self._kept)

    def __len__(self) -> int:
        return self._length

    def add_round(self, sources: Sources, check: Check, keep: Keep) -> None:
        """Take rows from another round of the same tables from here on, where `keep` wants them; raises as above."""
        usable: list[Mask] = []
        first, _ = sources[0]
        with progress(f"check {first.name}", first.plan.rows, "row") as shown:
            for shard in range(first.plan.count):
                found = _read(sources, shard)
                check(shard, found)
                usable.append(keep(found))
                shown.advance(len(found[0]))
        self._rounds.append(sources)
        self._usable.append(usable)

    def validate_with(self, sources: Sources, check: Check) -> None:
        """Read more of the examples that training never sees; `check` refuses values, when they are read."""
        self._validated = sources, check

    def for_validation(self, limit: int | None = None) -> Iterator[Example]:
        """Examples of the first round that training never sees, in the table's order, a shard in memory at a time; of
        `limit` the smallest draws."""
        sources, check = self._validated
        drawn = self._held_out if limit is None else heapq.nsmallest(limit, self._held_out)
        for shard, rows in _by_shard(drawn):
            tables = _read(sources, shard)
            if check is not None:
                check(shard, tables)
            yield from map(self._examples(tables), rows)

    def for_drift(self) -> Iterator[Example]:
        """Examples of the latest round, always of the same rows but for those that it has not."""
        sources, *_, usable = self._rounds[-1], None, *self._usable
        for shard, rows in _by_shard(self._probed):
            example = self._examples(_read(sources, shard))
            yield from (example(row) for row in rows if usable is None or usable[shard][row])

    def _from_rounds(self, shard: int, epoch: int) -> Callable[[int], Example]:
        """A shard's examples, each from the round that is its turn."""
        if len(self._rounds) == 1:
            return self._examples(_read(self._rounds[0], shard))
        latest, size = len(self._usable), len(self._kept[shard])
        usable = np.array([np.ones(size, np.bool_), *(masks[shard] for masks in self._usable)])  # [rounds, rows]
        turns = np.full(size, latest)
        if self._replay:
            random = np.random.default_rng([self._seed, epoch, shard, latest])
            turns = np.where(random.random(size) < self._replay, random.integers(0, latest, size), latest)
        # Where a round has not the row, the one before it that has.
        nearest = np.maximum.accumulate(np.where(usable, np.arange(latest + 1)[:, None], 0), axis=0)
        turns = nearest[turns, np.arange(size)]
        examples = {round: self._examples(_read(self._rounds[round], shard)) for round in np.unique(turns).tolist()}
        return lambda row: examples[int(turns[row])](row)

    def _windows(self, epoch: int) -> Iterator[npt.NDArray[np.int64]]:
        """Places [n, 2] (shard, row) in the order of the epoch, some shards at a time."""
        random = np.random.default_rng([self._seed, epoch])
        shards = random.permutation(len(self._kept))
        for start in range(0, len(shards), WINDOW_SHARDS):
            window = shards[start : start + WINDOW_SHARDS]
            rows = [np.flatnonzero(self._kept[shard]) for shard in window]
            places = np.column_stack([np.repeat(window, list(map(len, rows))), np.concatenate(rows)])
            yield random.permutation(places)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Example]:
        """The examples of an epoch from number `start` on. What lies before is not read."""
        for places in self._windows(epoch):
            here, start = places[start:], max(start - len(places), 0)
            examples = {shard: self._from_rounds(shard, epoch) for shard in np.unique(here[:, 0]).tolist()}
            for shard, row in here.tolist():
                yield examples[shard](row)

    def batches(self, batch_size: int, start: int = 0) -> Iterator[list[Example]]:
        """Batches of epoch after epoch, without end, from number `start` on; an epoch's last batch may be smaller."""
        epoch, skipped = divmod(start, -(-len(self) // batch_size))
        while True:
            examples = self.epoch(epoch, skipped * batch_size)
            while batch := list(islice(examples, batch_size)):
                yield batch
            epoch, skipped = epoch + 1, 0


def _by_shard(drawn: Sequence[tuple[float, int, int]]) -> Iterator[tuple[int, list[int]]]:
    """The rows of each shard that are among these draws."""
    places = sorted((shard, row) for _, shard, row in drawn)
    for shard, those in groupby(places, key=lambda place: place[0]):
        yield shard, [row for _, row in those]


def _read(sources: Sources, shard: int) -> list[pa.Table]:
    return [table.read_arrow(shard, columns) for table, columns in sources]


def _smallest(
    limit: int,
    before: Sequence[tuple[float, int, int]],
    draws: npt.NDArray[np.float64],
    shard: int,
    wanted: Mask,
) -> list[tuple[float, int, int]]:
    """The smallest draws of the wanted rows of a shard, and of shards before."""
    rows = np.flatnonzero(wanted)
    here = ((draw, shard, row) for draw, row in zip(draws[rows].tolist(), rows.tolist(), strict=True))
    return heapq.nsmallest(limit, [*before, *here])


def prefetch(items: Iterator[T]) -> Iterator[T]:
    """The same items, each made in a thread while the one before is in use."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item
