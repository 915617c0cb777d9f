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

from dpkd_offline.checkpoint import tokenizer_fingerprint
from dpkd_offline.checks import check_rows, check_same, check_top_k, expect
from dpkd_offline.columns import Lists
from dpkd_offline.config import TrainConfig
from dpkd_offline.dataset import Dataset
from dpkd_offline.errors import DataError
from dpkd_offline.log import progress
from dpkd_offline.respelling import Speller, prompts_for, template_for
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
Check = Callable[[int, Sequence[pa.Table]], None]  # refuses values of a shard
Keep = Callable[[Sequence[pa.Table]], Mask]  # which rows of a shard are wanted
Examples = Callable[[Sequence[pa.Table]], Callable[[int], Example]]  # from the sources' shard to one row's example


def draws_of(ids: pa.ChunkedArray) -> npt.NDArray[np.float64]:
    """A number in [0, 1) for each id, evenly spread and a function of the id alone: those below a share are held out.

    So a prompt is held out in every round, process and objective or in none, and a larger share holds out more.
    """
    first = b"".join(hashlib.sha256(id.encode()).digest()[:6] for id in ids.to_pylist())
    return (np.frombuffer(first, np.uint8).reshape(-1, 6) @ 256.0 ** np.arange(5, -1, -1)) / 2.0**48


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


def chosen_round(dataset: Dataset, config: TrainConfig) -> int:
    """The round of pairs to begin with: the one asked for, or the latest, but the first where further ones are to come;
    a DataError where it is not complete."""
    rounds = dataset.rounds()
    if not rounds:
        raise DataError(f"{dataset.root / 'pairs'}: no pairs yet; run `dpkd-offline score-teacher` first")
    round = config.round
    if round is None:
        round = rounds[0] if config.regenerates else rounds[-1]
    dataset.pairs(round).require_complete(f"dpkd-offline score-teacher --round {round}")
    return round


def pair_stream(
    dataset: Dataset, config: TrainConfig, vocab_size: int, top_k: bool = False, behaviour: bool = False
) -> tuple[Stream, int]:
    """Preference pairs (y_t, y_s) with the teacher's log-probs, and the round that they are of.

    Args:
        vocab_size: that of the student, who must know every token.
        top_k: also read the teacher's likeliest tokens at each position.
        behaviour: refuse pairs without log-probs under the student that sampled y_s, such as imported ones.
    """
    round = chosen_round(dataset, config)
    stream = Stream(*round_of_pairs(dataset, config, round, vocab_size, top_k, behaviour), _pair_examples, config)
    top = dataset.top_k(round)
    if stream.held_out and not top_k and top.provenance() is not None and not top.pending():
        stream.validate_with(*round_of_pairs(dataset, config, round, vocab_size, True, behaviour)[:2])
    return stream, round


def round_of_pairs(
    dataset: Dataset, config: TrainConfig, round: int, vocab_size: int, top_k: bool, behaviour: bool
) -> tuple[Sources, Check, Keep]:
    """What a stream needs to know of a round of pairs, which is complete."""
    table = dataset.pairs(round)
    made = table.require_provenance()
    by_text = made["scored"] == "text"
    unsampled = f"is empty, since no student sampled these responses; objective '{config.objective}' needs it"
    if behaviour and made.get("student") is None:  # before top-k is asked for
        raise DataError(f"{table.folder}: column 'behavior_rejected_logps' {unsampled}")
    top = dataset.top_k(round)
    if top_k:
        top.require_complete(f"dpkd-offline score-teacher --round {round} --top-k K")
        k = top.require_provenance()["top_k"]
    sources: list[tuple[Table[Any], list[str]]] = [(table, PAIR_COLUMNS), (top, TOP_COLUMNS)]

    def check(shard: int, found: Sequence[pa.Table]) -> None:
        check_rows(found[0], table.path(shard), vocab_size, by_text=by_text)
        if behaviour:
            given = Lists(found[0]["behavior_rejected_logps"]).lengths > 0
            expect(given, table.path(shard), "behavior_rejected_logps", unsampled)
        if top_k:
            check_same(found[1], "id", found[0]["id"], top.path(shard), f"the pair in {table.name}")
            check_top_k(found[1], found[0], top.path(shard), vocab_size, k)

    def keep(tables: Sequence[pa.Table]) -> Mask:
        rows = tables[0]
        lengths = {c: Lists(rows[c]).lengths for c in ("prompt_ids", "chosen_ids", "rejected_ids")}
        longest = lengths["prompt_ids"] + np.maximum(lengths["chosen_ids"], lengths["rejected_ids"])
        kept = longest <= config.max_length
        if config.truncated == "drop":
            for column in ("chosen_finish_reason", "rejected_finish_reason"):
                kept &= pc.not_equal(rows[column], "length").to_numpy()
        return np.asarray(kept, dtype=np.bool_)

    return sources[: 1 + top_k], check, keep


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
    prompts = prompts_for(dataset, tokenizer)

    def answers(rows: pa.Table) -> list[list[int]]:
        """The token ids of each first reference; none where there is no reference."""
        texts = [references[0] if references else "" for references in rows["references"].to_pylist()]
        found = tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [[*ids, tokenizer.eos_token_id] if text else [] for text, ids in zip(texts, found, strict=True)]

    def keep(tables: Sequence[pa.Table]) -> Mask:
        (rows,) = tables
        lengths = np.array(list(map(len, answers(rows))))
        return np.asarray((lengths > 0) & (Lists(rows["prompt_ids"]).lengths + lengths <= config.max_length))

    def examples(tables: Sequence[pa.Table]) -> Callable[[int], Example]:
        (rows,) = tables
        ids, prompts, found = rows["id"].to_pylist(), Lists(rows["prompt_ids"]), answers(rows)
        return lambda row: Example(ids[row], prompts[row], (found[row],))

    def check(shard: int, found: Sequence[pa.Table]) -> None:
        check_rows(found[0], prompts.path(shard), vocab_size)

    return Stream([(prompts, ["id", "prompt_ids", "references"])], check, keep, examples, config)


def teacher_stream(
    dataset: Dataset,
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerFast,
    eos: Sequence[int],
    vocab_size: int,
) -> Stream:
    """Prompts with y_t alone, which needs no pairs: for a student that is to come near before it answers itself.

    A student that has another tokenizer than the teacher gets y_t by its text, with one of its own `eos` behind what
    stopped.
    """
    prompts, responses = prompts_for(dataset, tokenizer), dataset.responses("teacher", 0)
    responses.require_complete("dpkd-offline generate --role teacher")
    own = dataset.shares_tokenizer(tokenizer_fingerprint(tokenizer))
    speller = None if own else Speller(tokenizer, template_for(dataset, "auto", tokenizer), eos)

    def ids_of(rows: pa.Table) -> list[list[int]]:
        if speller is None:
            sampled: list[list[int]] = rows["response_ids"].to_pylist()
            return sampled
        return speller.spell(rows["response"].to_pylist(), rows["finish_reason"].to_pylist())[0]

    def check(shard: int, found: Sequence[pa.Table]) -> None:
        check_rows(found[0], prompts.path(shard), vocab_size)
        check_rows(found[1], responses.path(shard), vocab_size if own else None)
        check_same(found[1], "id", found[0]["id"], responses.path(shard), f"the prompt in {prompts.name}")

    def keep(tables: Sequence[pa.Table]) -> Mask:
        rows, y_t = tables
        kept = Lists(rows["prompt_ids"]).lengths + np.array(list(map(len, ids_of(y_t)))) <= config.max_length
        if config.truncated == "drop":
            kept &= pc.not_equal(y_t["finish_reason"], "length").to_numpy()
        return np.asarray(kept, dtype=np.bool_)

    def examples(tables: Sequence[pa.Table]) -> Callable[[int], Example]:
        rows, y_t = tables
        ids, those, chosen = rows["id"].to_pylist(), Lists(rows["prompt_ids"]), ids_of(y_t)
        return lambda row: Example(ids[row], those[row], (chosen[row],))

    columns = ["id", "response", "response_ids", "finish_reason"]
    return Stream([(prompts, ["id", "prompt_ids"]), (responses, columns)], check, keep, examples, config)


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
