"""The stream that training reads: examples in an order that is a function of (seed, epoch) and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerFast

from dpkd_offline.checks import check_rows
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
]
WINDOW_SHARDS = 16  # shards whose rows are mixed, and the rows that are in memory at once
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Example:
    """A prompt with the responses that an objective compares: (y_t, y_s), or the reference alone."""

    id: str
    prompt_ids: list[int]
    responses: tuple[list[int], ...]
    teacher_logps: tuple[float, ...] = ()  # log p(y|x) in nats, one per response


Examples = Callable[[pa.Table], Callable[[int], Example]]  # from a shard's rows to the example of one row


class Stream:
    """The examples of one table that training keeps.

    Making it reads the whole table once, a shard at a time: every hash and every value is checked before the first
    step, and the number of examples is known, so that a position is a number.
    """

    def __init__(
        self,
        table: Table[Any],
        columns: list[str],
        keep: Callable[[pa.Table], Mask],
        examples: Examples,
        seed: int,
        vocab_size: int | None,
    ) -> None:
        """Of the table's `columns`: `keep` says which rows are wanted, `examples` what a row becomes.

        Raises:
            DataError, MismatchError: as when a shard is read, and where a value cannot be, or a token id is not below
                `vocab_size`.
        """
        self._table, self._columns, self._examples, self._seed = table, columns, examples, seed
        self._kept: list[Mask] = []
        with progress(f"check {table.name}", table.plan.rows, "row") as shown:
            for shard in range(table.plan.count):
                rows = table.read_arrow(shard, columns)
                check_rows(rows, table.path(shard), vocab_size)
                self._kept.append(keep(rows))
                shown.advance(len(rows))
        self._length = sum(int(mask.sum()) for mask in self._kept)

    def __len__(self) -> int:
        return self._length

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
            examples = {
                shard: self._examples(self._table.read_arrow(shard, self._columns))
                for shard in np.unique(here[:, 0]).tolist()
            }
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


def pair_stream(dataset: Dataset, config: TrainConfig, vocab_size: int | None = None) -> tuple[Stream, int]:
    """Preference pairs (y_t, y_s) with the teacher's log-probs, and the round that they are of.

    Args:
        vocab_size: that of the student, who must know every token.
    """
    rounds = dataset.rounds()
    if not rounds:
        raise DataError(f"{dataset.root / 'pairs'}: no pairs yet; run `dpkd-offline score-teacher` first")
    round = rounds[-1] if config.round is None else config.round
    table = dataset.pairs(round)
    table.require_complete(f"dpkd-offline score-teacher --round {round}")

    def keep(rows: pa.Table) -> Mask:
        lengths = {c: Lists(rows[c]).lengths for c in ("prompt_ids", "chosen_ids", "rejected_ids")}
        longest = lengths["prompt_ids"] + np.maximum(lengths["chosen_ids"], lengths["rejected_ids"])
        kept = longest <= config.max_length
        if config.truncated == "drop":
            for column in ("chosen_finish_reason", "rejected_finish_reason"):
                kept &= pc.not_equal(rows[column], "length").to_numpy()
        return np.asarray(kept, dtype=np.bool_)

    return Stream(table, PAIR_COLUMNS, keep, _pair_examples, config.seed, vocab_size), round


def _pair_examples(rows: pa.Table) -> Callable[[int], Example]:
    ids = rows["id"].to_pylist()
    prompts, chosen, rejected = (Lists(rows[c]) for c in ("prompt_ids", "chosen_ids", "rejected_ids"))
    teacher_chosen, teacher_rejected = (Lists(rows[f"teacher_{side}_logps"]).sums() for side in ("chosen", "rejected"))

    def example(row: int) -> Example:
        logps = float(teacher_chosen[row]), float(teacher_rejected[row])
        return Example(ids[row], prompts[row], (chosen[row], rejected[row]), logps)

    return example


def reference_stream(
    dataset: Dataset, config: TrainConfig, tokenizer: PreTrainedTokenizerFast, vocab_size: int | None = None
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

    def examples(rows: pa.Table) -> Callable[[int], Example]:
        ids, prompts, found = rows["id"].to_pylist(), Lists(rows["prompt_ids"]), answers(rows)
        return lambda row: Example(ids[row], prompts[row], (found[row],))

    return Stream(dataset.prompts, ["id", "prompt_ids", "references"], keep, examples, config.seed, vocab_size)


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
