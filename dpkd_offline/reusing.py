"""What a round need not score: the teacher's log-probs that the round before has of the same responses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias

from dpkd_offline import log
from dpkd_offline.config import ScoreTeacherConfig
from dpkd_offline.errors import DataError
from dpkd_offline.joining import Join, Joined
from dpkd_offline.records import PreferencePair, R, TopK
from dpkd_offline.shards import Table

SAME = ("scored", "tokenizer_fingerprint", "vocab_size", "dtype", "engine", "prompt_set", "top_k")  # and the teacher


class Renewal(Generic[R]):
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
        table.check_claim(self.provenance)
        self.due = set(table.pending(config.shard_index, config.num_shards))
        if self.due and lacking and before is not None:
            if self.reused_from is not None:
                raise DataError(
                    f"{before.folder}: {lacking}, but {table.name} was begun with its log-probs; bring it back, or "
                    f"delete {table.folder} to score all of them"
                )
            log.info(f"{before.folder}: {lacking}; nothing is taken over from there")

    def takes_over(self, shard: int) -> bool:
        """Whether a shard is yet to be made, and in part of what the round before has."""
        return shard in self.due and self.reused_from is not None

    def taken_over(self, shard: int) -> list[R] | None:
        """What the round before has of a shard's rows, if anything is taken over from it."""
        return self.before.read(shard) if self.before is not None and self.reused_from is not None else None


Renewals: TypeAlias = tuple[Renewal[PreferencePair], Renewal[TopK] | None]


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


def ask(config: ScoreTeacherConfig, join: Join, pending: Sequence[int], renewals: Renewals) -> dict[int, Asked]:
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
        log.info(f"{taken_over} responses have the log-probs of round {config.round - 1}; {scored} are scored")
    return asked


def check_taken_over(pairs: Renewal[PreferencePair], rows: Sequence[Joined], shard: int, round: int) -> None:
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
