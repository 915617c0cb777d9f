"""The stream that training reads: examples in an order that is a function of (seed, epoch) and nothing else."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerFast

from dpkd_offline.checks import check_rows, check_same, check_top_k, expect
from dpkd_offline.columns import Lists
from dpkd_offline.config import TrainConfig
from dpkd_offline.dataset import Dataset
from dpkd_offline.errors import DataError
from dpkd_offline.log import progress
from dpkd_offline.shards import Table

PAIR_COLUMNS = [
    "id",
    "prompt_ids",
    "chosen_ids",
    "chosen_finish_reason",
    "rejected_ids",
    "rejected_finish_reason",
    "teacher_chosen_logps",
    "teacher_rejected_logps",
    "behavior_rejected_logps",
]
TOP_COLUMNS = ["id"] + [f"{side}_top_{what}" for side in ("chosen", "rejected") for what in ("ids", "logps", "mass")]
SIDES = ("chosen", "rejected")
CHOSEN, REJECTED = range(2)  # places of y_t and y_s among an example's responses
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
    behaviour_logps: tuple[list[float], ...] = ()  # the same under the student that sampled y_s; none of y_t
    top: tuple[Top, ...] = ()


Sources = Sequence[tuple[Table[Any], list[str]]]  # tables of the same rows, and the columns that are read of each
Examples = Callable[[Sequence[pa.Table]], Callable[[int], Example]]  # from the sources' shard to one row's example


def draws_of(ids: pa.ChunkedArray) -> npt.NDArray[np.float64]:
    """A number in [0, 1) for each id, evenly spread and a function of the id alone: those below a share are held out.

    So a prompt is held out in every round, process and objective or in none, and a larger share holds out more.
    """
    first = b"".join(hashlib.sha256(id.encode()).digest()[:6] for id in ids.to_pylist())
    return (np.frombuffer(first, np.uint8).reshape(-1, 6) @ 256.0 ** np.arange(5, -1, -1)) / 2.0**48


class Stream:
    """The examples of one table that training keeps, with what other tables hold of the same rows.

    Of those that `holdout` keeps from it, `validate_limit` of the smallest draws are there for validation.

    Making it reads the whole table once, a shard at a time: every hash and every value is checked before the first
    step, and the number of examples is known, so that a position is a number.
    """

    def __init__(
        self,
        sources: Sources,
        check: Callable[[int, Sequence[pa.Table]], None],
        keep: Callable[[pa.Table], Mask],
        examples: Examples,
        config: TrainConfig,
    ) -> None:
        """`check` refuses values of a shard, `keep` says which rows are wanted, by what the first source holds.

        Raises:
            DataError, MismatchError: as when a shard is read, and what `check` raises.
        """
        self._sources, self._examples, self._seed = sources, examples, config.seed
        self._kept: list[Mask] = []
        self._held_out: list[tuple[float, int, int]] = []  # draw, shard, row
        self.held_out = 0  # how many examples training never sees
        first, _ = sources[0]
        with progress(f"check {first.name}", first.plan.rows, "row") as shown:
            for shard in range(first.plan.count):
                found = self._read(shard)
                check(shard, found)
                kept = keep(found[0])
                if config.holdout:
                    draws = draws_of(found[0]["id"])
                    held = kept & (draws < config.holdout)
                    self._hold_out(shard, held, draws, config.validate_limit)
                    kept &= ~held
                self._kept.append(kept)
                shown.advance(len(found[0]))
        self._length = sum(int(mask.sum()) for mask in self._kept)

    def __len__(self) -> int:
        return self._length

    def _hold_out(self, shard: int, held: Mask, draws: npt.NDArray[np.float64], limit: int) -> None:
        rows = np.flatnonzero(held)
        here = ((draw, shard, row) for draw, row in zip(draws[rows].tolist(), rows.tolist(), strict=True))
        self._held_out = heapq.nsmallest(limit, [*self._held_out, *here])
        self.held_out += len(rows)

    def for_validation(self) -> Iterator[Example]:
        """Examples that training never sees, in the table's order, a shard in memory at a time."""
        places = sorted((shard, row) for _, shard, row in self._held_out)
        for shard, rows in groupby(places, key=lambda place: place[0]):
            example = self._examples(self._read(shard))
            yield from (example(row) for _, row in rows)

    def _read(self, shard: int) -> list[pa.Table]:
        return [table.read_arrow(shard, columns) for table, columns in self._sources]

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
            examples = {shard: self._examples(self._read(shard)) for shard in np.unique(here[:, 0]).tolist()}
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


def pair_stream(
    dataset: Dataset, config: TrainConfig, vocab_size: int, top_k: bool = False, behaviour: bool = False
) -> tuple[Stream, int]:
    """Preference pairs (y_t, y_s) with the teacher's log-probs, and the round that they are of.

    Args:
        vocab_size: that of the student, who must know every token.
        top_k: also read the teacher's likeliest tokens at each position.
        behaviour: refuse pairs without log-probs under the student that sampled y_s, such as imported ones.
    """
    rounds = dataset.rounds()
    if not rounds:
        raise DataError(f"{dataset.root / 'pairs'}: no pairs yet; run `dpkd-offline score-teacher` first")
    round = rounds[-1] if config.round is None else config.round
    table = dataset.pairs(round)
    table.require_complete(f"dpkd-offline score-teacher --round {round}")
    unsampled = f"is empty, since no student sampled these responses; objective '{config.objective}' needs it"
    if behaviour and (made := table.provenance()) and made.get("student") is None:  # before top-k is asked for
        raise DataError(f"{table.folder}: column 'behavior_rejected_logps' {unsampled}")
    top = dataset.top_k(round)
    if top_k:
        top.require_complete(f"dpkd-offline score-teacher --round {round} --top-k K")
        k = top.require_provenance()["top_k"]
    sources: list[tuple[Table[Any], list[str]]] = [(table, PAIR_COLUMNS), (top, TOP_COLUMNS)]

    def check(shard: int, found: Sequence[pa.Table]) -> None:
        check_rows(found[0], table.path(shard), vocab_size)
        if behaviour:
            given = Lists(found[0]["behavior_rejected_logps"]).lengths > 0
            expect(given, table.path(shard), "behavior_rejected_logps", unsampled)
        if top_k:
            check_same(found[1], "id", found[0]["id"], top.path(shard), f"the pair in {table.name}")
            check_top_k(found[1], found[0], top.path(shard), vocab_size, k)

    def keep(rows: pa.Table) -> Mask:
        lengths = {c: Lists(rows[c]).lengths for c in ("prompt_ids", "chosen_ids", "rejected_ids")}
        longest = lengths["prompt_ids"] + np.maximum(lengths["chosen_ids"], lengths["rejected_ids"])
        kept = longest <= config.max_length
        if config.truncated == "drop":
            for column in ("chosen_finish_reason", "rejected_finish_reason"):
                kept &= pc.not_equal(rows[column], "length").to_numpy()
        return np.asarray(kept, dtype=np.bool_)

    return Stream(sources[: 1 + top_k], check, keep, _pair_examples, config), round


def _pair_examples(found: Sequence[pa.Table]) -> Callable[[int], Example]:
    rows = found[0]
    ids, prompts = rows["id"].to_pylist(), Lists(rows["prompt_ids"])
    responses = [Lists(rows[f"{side}_ids"]) for side in SIDES]
    teacher = [Lists(rows[f"teacher_{side}_logps"]) for side in SIDES]
    behaviour = Lists(rows["behavior_rejected_logps"])
    top = [_tops(found[1], side) for side in SIDES] if len(found) > 1 else []

    def example(row: int) -> Example:
        return Example(
            ids[row],
            prompts[row],
            tuple(of[row] for of in responses),
            tuple(of[row] for of in teacher),
            ([], behaviour[row]),
            tuple(of(row) for of in top),
        )

    return example


def _tops(rows: pa.Table, side: str) -> Callable[[int], Top]:
    """The likeliest tokens of one side, row by row."""
    columns = [rows[f"{side}_top_{what}"].combine_chunks() for what in ("ids", "logps")]
    ends = np.cumsum(pc.list_value_length(columns[0]).to_numpy())
    starts = np.concatenate([[0], ends])
    ids, logps = (column.flatten().flatten().to_numpy().reshape(ends[-1], -1) for column in columns)
    return lambda row: (ids[starts[row] : ends[row]], logps[starts[row] : ends[row]])


def reference_stream(
    dataset: Dataset, config: TrainConfig, tokenizer: PreTrainedTokenizerFast, vocab_size: int
) -> Stream:
    """Prompts with their first reference, closed by EOS, for the student's initial fine-tuning."""

    def answers(rows: pa.Table) -> list[list[int]]:
        """The token ids of each first reference; none where there is no reference."""
        texts = [references[0] if references else "" for references in rows["references"].to_pylist()]
        found = tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [[*ids, tokenizer.eos_token_id] if text else [] for text, ids in zip(texts, found, strict=True)]

    def keep(rows: pa.Table) -> Mask:
        lengths = np.array(list(map(len, answers(rows))))
        return np.asarray((lengths > 0) & (Lists(rows["prompt_ids"]).lengths + lengths <= config.max_length))

    def examples(tables: Sequence[pa.Table]) -> Callable[[int], Example]:
        (rows,) = tables
        ids, prompts, found = rows["id"].to_pylist(), Lists(rows["prompt_ids"]), answers(rows)
        return lambda row: Example(ids[row], prompts[row], (found[row],))

    def check(shard: int, found: Sequence[pa.Table]) -> None:
        check_rows(found[0], dataset.prompts.path(shard), vocab_size)

    return Stream([(dataset.prompts, ["id", "prompt_ids", "references"])], check, keep, examples, config)


def corpus_blocks(
    texts: Callable[[], Iterator[str]], tokenizer: PreTrainedTokenizerFast, length: int
) -> Iterator[list[int]]:
    """Blocks of `length` tokens of a corpus, documents joined by EOS, over and over; D_p of Algorithm 1."""
    while True:
        tokens: list[int] = []
        found = False
        for text in texts():
            tokens += [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            while len(tokens) >= length:
                yield tokens[:length]
                tokens, found = tokens[length:], True
        if not found:
            raise DataError(f"lm-corpus: fewer than {length} tokens; take a larger corpus or a smaller --lm-length")


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, each made in a thread while the one before is in use."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item
