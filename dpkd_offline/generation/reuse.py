"""What a round need not score: the teacher's log-probs that the round before has of the same responses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias

from dpkd_offline.common import console
from dpkd_offline.common.errors import DataError, MismatchError
from dpkd_offline.config.data import GenerateConfig, ScoreTeacherConfig
from dpkd_offline.dataset.columns import Lists
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.dataset.row_checks import check_same, expect
from dpkd_offline.dataset.schema import PreferencePair, Prompt, R, Response, TopK
from dpkd_offline.dataset.table import Table
from dpkd_offline.dataset.writing import check_claim
from dpkd_offline.engines.base import row_seed
from dpkd_offline.generation.pairing import PairRow, PairSource


def is_drawn(config: GenerateConfig, id_: str) -> bool:
    """Whether a prompt is answered anew in this round: whether its draw, of seed, round and id, is below the share.

    `train --holdout` draws by the id alone, so that of what it holds out the same share is renewed as of the rest.
    """
    return row_seed(config.seed, "share", config.round, id_) < config.share * 2**56


def kept_responses(dataset: Dataset, config: GenerateConfig, provenance: Mapping[str, Any]) -> Table[Response] | None:
    """The responses of the round before, if some are kept: all there, and such as this round's model might give.

    Raises:
        DataError: they are not complete.
        MismatchError: they are of another tokenizer, or end otherwise.
    """
    if config.share == 1:
        return None
    table = dataset.responses("student", config.round - 1)
    table.require_complete(f"dpkd-offline generate --role student --round {config.round - 1}")
    made = table.require_provenance()
    differing = [key for key in ("tokenizer_fingerprint", "eos_token_ids") if made[key] != provenance[key]]
    if made["vocab_size"] > provenance["vocab_size"]:
        differing.append("vocab_size")
    if differing:
        raise MismatchError(
            f"{table.folder / '_table.json'}: {differing[0]} is not that of {config.model}, so that its responses "
            f"cannot be kept; take --share 1"
        )
    return table


def rows_to_sample(
    source: Table[Prompt], before: Table[Response] | None, config: GenerateConfig, pending: Sequence[int]
) -> dict[int, Sequence[int]]:
    """Of each pending shard the rows to sample: all, or those that are drawn, beside such as can be kept."""
    if before is None:
        return {shard: range(source.plan.rows_of(shard)) for shard in pending}
    asked: dict[int, Sequence[int]] = {}
    for shard in pending:
        ids, path = source.read_arrow(shard, ["id"])["id"], before.path(shard)
        there = before.read_arrow(shard, ["id", "logps"])
        check_same(there, "id", ids, path, "the prompt in this row")
        expect(Lists(there["logps"]).lengths > 0, path, "logps", "is empty: such responses are not kept, --share is 1")
        asked[shard] = [n for n, id_ in enumerate(ids.to_pylist()) if is_drawn(config, id_)]
    anew, rows = sum(map(len, asked.values())), sum(map(source.plan.rows_of, pending))
    console.info(
        f"share {config.share:g}: {anew} of {rows} prompts are answered anew, the others keep the response of "
        f"round {config.round - 1}"
    )
    return asked


SAME = ("scored", "tokenizer_fingerprint", "vocab_size", "dtype", "engine", "prompt_set", "top_k")  # and the teacher


class ReusableTable(Generic[R]):
    """A round's pairs, or its likeliest tokens, and what they take over from those of the round before.

    Whether they do is decided once, when the table is claimed, and stands in its `_table.json`: whoever goes on with
    the table does the same, whatever has come to the round before since.
    """

    def __init__(
        self, of_round: Callable[[int], Table[R]], provenance: Mapping[str, Any], config: ScoreTeacherConfig
    ) -> None:
        """`of_round` gives the table of any round, `provenance` says who makes this one.

        Raises:
            DataError: the table was begun with what is not there any more.
            MismatchError: the table was begun by another producer.
        """
        self.table: Table[R] = of_round(config.round)
        self.before: Table[R] | None = of_round(config.round - 1) if config.round else None
        table, before = self.table, self.before
        said, lacking = table.provenance(), None if before is None else _lacking(before, provenance)
        if said is not None:
            self.reused_from: int | None = said.get("reused_from")
        else:
            self.reused_from = None if before is None or lacking else config.round - 1
        self.provenance = {**provenance, "reused_from": self.reused_from}
        check_claim(table, self.provenance)
        self.due = set(table.pending(config.shard_index, config.num_shards))
        if self.due and lacking and before is not None:
            if self.reused_from is not None:
                raise DataError(
                    f"{before.folder}: {lacking}, but {table.name} was begun with its log-probs; bring it back, or "
                    f"delete {table.folder} to score all of them"
                )
            console.info(f"{before.folder}: {lacking}; nothing is taken over from there")

    def takes_over(self, shard: int) -> bool:
        """Whether a shard is yet to be made, and in part of what the round before has."""
        return shard in self.due and self.reused_from is not None

    def taken_over(self, shard: int) -> list[R] | None:
        """What the round before has of a shard's rows, if anything is taken over from it."""
        return self.before.read(shard) if self.before is not None and self.reused_from is not None else None


ReusableTables: TypeAlias = tuple[ReusableTable[PreferencePair], ReusableTable[TopK] | None]


def _lacking(before: Table[R], provenance: Mapping[str, Any]) -> str | None:
    """Why a table's log-probs are not those that would be made now; None if they are."""
    made = before.provenance()
    if made is None:
        return "is not there"
    if missing := len(before.pending()):
        return f"is not complete ({missing} of {before.plan.count} shards are missing)"
    if made["model"]["revision"] != provenance["model"]["revision"]:
        return "is of another teacher"
    differing = [key for key in SAME if made.get(key) != provenance.get(key)]
    return f"has another {differing[0]}" if differing else None


@dataclass(frozen=True)
class Asked:
    """What is to be scored of a shard."""

    rows: Sequence[int]
    first_side: int  # 0: y_t and y_s, 1: y_s alone


def ask(
    config: ScoreTeacherConfig, join: PairSource, pending: Sequence[int], renewals: ReusableTables
) -> dict[int, Asked]:
    """Both responses of all rows of the pending shards, or new ones of the student where the rest is taken over."""
    asked, plan = {}, renewals[0].table.plan
    for shard in pending:
        due = [table for table in renewals if table is not None and shard in table.due]
        if all(table.takes_over(shard) for table in due):
            asked[shard] = Asked(join.sampled_in(shard, config.round), first_side=1)
        else:
            asked[shard] = Asked(range(plan.rows_of(shard)), first_side=0)
    scored = sum(len(of.rows) * (2 - of.first_side) for of in asked.values())
    if taken_over := 2 * sum(map(plan.rows_of, pending)) - scored:
        console.info(f"{taken_over} responses have the log-probs of round {config.round - 1}; {scored} are scored")
    return asked


def check_taken_over(pairs: ReusableTable[PreferencePair], rows: Sequence[PairRow], shard: int, round: int) -> None:
    """Raise DataError unless the pairs of the round before are of the same y_t, and of the y_s that were kept."""
    assert pairs.before is not None
    for k, (old, row) in enumerate(zip(pairs.before.read(shard), rows, strict=True)):
        same = {"id": old.id == row.prompt.id, "chosen_ids": old.chosen_ids == row.y_t.response_ids}
        if row.y_s.round < round:
            same |= {"rejected_ids": old.rejected_ids == row.y_s.response_ids, "round": old.round == row.y_s.round}
        for column in (column for column, right in same.items() if not right):
            raise DataError(
                f"{pairs.before.path(shard)}: row {k}: column '{column}' is not that of the responses of round "
                f"{round}, so that its log-probs are not either; delete the pairs of both rounds and score them again"
            )
