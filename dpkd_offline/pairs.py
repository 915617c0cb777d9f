"""The stream that training reads: examples in an order that is a function of (seed, epoch) and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Generic

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerFast

from dpkd_offline.config import TrainConfig
from dpkd_offline.dataset import Dataset
from dpkd_offline.errors import DataError
from dpkd_offline.log import progress
from dpkd_offline.records import PreferencePair, Prompt, R, from_table
from dpkd_offline.shards import Table

WINDOW_SHARDS = 16  # shards whose rows are mixed, and the rows that are in memory at once
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Example:
    """A prompt with the responses that an objective compares: (y_t, y_s), or the reference alone."""

    id: str
    prompt_ids: list[int]
    responses: tuple[list[int], ...]
    teacher_logps: tuple[float, ...] = ()  # log p(y|x) in nats, one per response


class Stream(Generic[R]):
    """The examples of one table that training keeps.

    Making it reads the whole table once, a shard at a time: every hash is checked before the first step, and the
    number of examples is known, so that a position is a number.
    """

    def __init__(
        self, table: Table[R], keep: Callable[[pa.Table], Mask], example: Callable[[R], Example], seed: int
    ) -> None:
        self._table: Table[R] = table
        self._example: Callable[[R], Example] = example
        self._seed = seed
        self._kept: list[Mask] = []
        with progress(f"check {table.name}", table.plan.rows, "row") as shown:
            for shard in range(table.plan.count):
                self._kept.append(keep(table.read_arrow(shard)))
                shown.advance(table.plan.rows_of(shard))

    def __len__(self) -> int:
        return sum(int(mask.sum()) for mask in self._kept)

    def _windows(self, epoch: int) -> Iterator[npt.NDArray[np.int64]]:
        """Places [n, 2] (shard, row) in the order of the epoch, some shards at a time."""
        random = np.random.default_rng([self._seed, epoch])
        shards = random.permutation(len(self._kept))
        for start in range(0, len(shards), WINDOW_SHARDS):
            places = [(s, row) for s in shards[start : start + WINDOW_SHARDS] for row in np.flatnonzero(self._kept[s])]
            yield random.permutation(np.array(places, dtype=np.int64).reshape(-1, 2))

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Example]:
        """The examples of an epoch from number `start` on. What lies before is not read."""
        for places in self._windows(epoch):
            here, start = places[start:], max(start - len(places), 0)
            tables = {int(shard): self._table.read_arrow(int(shard)) for shard in np.unique(here[:, 0])}
            for shard, row in here.tolist():
                yield self._example(from_table(tables[shard].slice(row, 1), self._table.record)[0])

    def batches(self, batch_size: int, start: int = 0) -> Iterator[list[Example]]:
        """Batches of epoch after epoch, without end, from number `start` on; an epoch's last batch may be smaller."""
        epoch, skipped = divmod(start, -(-len(self) // batch_size))
        while True:
            examples = self.epoch(epoch, skipped * batch_size)
            while batch := list(islice(examples, batch_size)):
                yield batch
            epoch, skipped = epoch + 1, 0


def pair_stream(dataset: Dataset, config: TrainConfig) -> tuple[Stream[PreferencePair], int]:
    """Preference pairs (y_t, y_s) with the teacher's log-probs, and the round that they are of."""
    rounds = dataset.rounds()
    if not rounds:
        raise DataError(f"{dataset.root / 'pairs'}: no pairs yet; run `dpkd-offline score-teacher` first")
    round = rounds[-1] if config.round is None else config.round
    table = dataset.pairs(round)
    table.require_complete(f"dpkd-offline score-teacher --round {round}")

    def keep(rows: pa.Table) -> Mask:
        lengths = {c: pc.list_value_length(rows[c]).to_numpy() for c in ("prompt_ids", "chosen_ids", "rejected_ids")}
        longest = lengths["prompt_ids"] + np.maximum(lengths["chosen_ids"], lengths["rejected_ids"])
        kept = longest <= config.max_length
        if config.truncated == "drop":
            for column in ("chosen_finish_reason", "rejected_finish_reason"):
                kept &= pc.not_equal(rows[column], "length").to_numpy()
        return np.asarray(kept, dtype=np.bool_)

    def example(pair: PreferencePair) -> Example:
        logps = float(np.sum(pair.teacher_chosen_logps)), float(np.sum(pair.teacher_rejected_logps))
        return Example(pair.id, pair.prompt_ids, (pair.chosen_ids, pair.rejected_ids), logps)

    return Stream(table, keep, example, config.seed), round


def reference_stream(dataset: Dataset, config: TrainConfig, tokenizer: PreTrainedTokenizerFast) -> Stream[Prompt]:
    """Prompts with their first reference, closed by EOS, for the student's initial fine-tuning."""

    def example(prompt: Prompt) -> Example:
        ids = tokenizer(prompt.references[0], add_special_tokens=False)["input_ids"]
        return Example(prompt.id, prompt.prompt_ids, ([*ids, tokenizer.eos_token_id],))

    def keep(rows: pa.Table) -> Mask:
        def fits(prompt: Prompt) -> bool:
            return bool(prompt.references) and (
                len(prompt.prompt_ids) + len(example(prompt).responses[0]) <= config.max_length
            )

        return np.array([fits(prompt) for prompt in from_table(rows, Prompt)], dtype=np.bool_)

    return Stream(dataset.prompts, keep, example, config.seed)


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
