"""What a round takes over from the one before: responses that are not sampled anew, and the log-probs of these."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic

from dpkd_offline.common import console
from dpkd_offline.common.errors import DataError, MismatchError
from dpkd_offline.config.data import GenerateConfig, ScoreTeacherConfig
from dpkd_offline.dataset.columns import Lists
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.dataset.layout import STUDENT_RESPONSES
from dpkd_offline.dataset.row_checks import check_same, expect
from dpkd_offline.dataset.schema import PreferencePair, R, Response, TopK
from dpkd_offline.dataset.table import Table
from dpkd_offline.dataset.writing import check_claim, claim
from dpkd_offline.engines.base import row_seed
from dpkd_offline.generation.pairing import PairRow, PairSource
from dpkd_offline.prompts.retokenize import PromptSource

# --- responses, for `generate --share` --------------------------------------------------------------------------------


def is_drawn(config: GenerateConfig, id_: str) -> bool:
    """Whether a prompt is answered anew in this round: whether its draw, of seed, round and id, is below the share.

    `train --holdout` draws by the id alone, so that of what it holds out the same share is renewed as of the rest.
    """
    return row_seed(config.seed, "share", config.round, id_) < config.share * 2**56


def kept_responses(dataset: Dataset, config: GenerateConfig, provenance: Mapping[str, Any]) -> Table[Response] | None:
    """The responses of the round before, if some are kept: complete, and such as this round's model might give.

    Raises:
        DataError: they are not complete.
        MismatchError: they are of another tokenizer, or end otherwise.
    """
    if config.share == 1:
        return None
    dataset.require_student()
    dataset.require_round(STUDENT_RESPONSES, config.round - 1)
    table = dataset.responses("student", config.round - 1)
    table.require_complete(f"dpkd-offline generate --role student --round {config.round - 1}")
    before = table.require_provenance()
    differing = [key for key in ("tokenizer_fingerprint", "eos_token_ids") if before[key] != provenance[key]]
    if before["vocab_size"] > provenance["vocab_size"]:
        differing.append("vocab_size")
    if differing:
        raise MismatchError(
            f"{table.folder / '_table.json'}: {differing[0]} is not that of {config.model}, so that its responses "
            f"cannot be kept; take --share 1"
        )
    return table


def rows_to_sample(
    source: PromptSource, kept: Table[Response] | None, config: GenerateConfig, pending: Sequence[int]
) -> dict[int, Sequence[int]]:
    """Of each pending shard the rows to sample: all, or those that are drawn, where the others can be kept.

    Raises:
        DataError: a response that is to be kept is of another prompt, or has no log-probs.
    """
    if kept is None:
        return {shard: range(source.plan.rows_of(shard)) for shard in pending}
    drawn: dict[int, Sequence[int]] = {}
    for shard in pending:
        ids, path = source.read_arrow(shard, ["id"])["id"], kept.path(shard)
        rows = kept.read_arrow(shard, ["id", "logps"])
        check_same(rows, "id", ids, path, "the prompt in this row")
        expect(Lists(rows["logps"]).lengths > 0, path, "logps", "is empty: such responses are not kept, --share is 1")
        drawn[shard] = [n for n, id_ in enumerate(ids.to_pylist()) if is_drawn(config, id_)]
    anew, total = sum(map(len, drawn.values())), sum(map(source.plan.rows_of, pending))
    console.info(
        f"share {config.share:g}: {anew} of {total} prompts are answered anew, the others keep the response of "
        f"round {config.round - 1}"
    )
    return drawn


# --- log-probs, for `score-teacher` -----------------------------------------------------------------------------------

SAME = ("scored", "tokenizer_fingerprint", "vocab_size", "dtype", "engine", "prompt_set", "top_k")  # and the teacher


@dataclass(frozen=True)
class ReusableTable(Generic[R]):
    """A round's pairs, or its likeliest tokens, and what they take over from those of the round before.

    Whether they do is decided once, when the table is claimed, and stands in its `_table.json`: whoever goes on with
    the table does the same, whatever has come to the round before since.
    """

    table: Table[R]
    before: Table[R] | None  # of the round before, if there is one
    reused_from: int | None  # that round, if log-probs are taken over from it
    provenance: Mapping[str, Any]
    due: frozenset[int]  # shards that this worker has yet to make

    @classmethod
    def open(
        cls, of_round: Callable[[int], Table[R]], provenance: Mapping[str, Any], config: ScoreTeacherConfig
    ) -> ReusableTable[R]:
        """`of_round` gives the table of any round, `provenance` says who makes this one.

        Raises:
            DataError: the table was begun with log-probs of the round before that are gone.
            MismatchError: the table was begun by another producer.
        """
        table, before = of_round(config.round), of_round(config.round - 1) if config.round else None
        begun, lacking = table.provenance(), None if before is None else _lacking(before, provenance)
        if begun is not None:
            reused_from: int | None = begun.get("reused_from")
        else:
            reused_from = None if before is None or lacking else config.round - 1
        provenance = {**provenance, "reused_from": reused_from}
        check_claim(table, provenance)
        due = frozenset(table.pending(config.shard_index, config.num_shards))
        if due and lacking and before is not None:
            if reused_from is not None:
                raise DataError(
                    f"{before.folder}: {lacking}, but {table.name} was begun with its log-probs; bring it back, or "
                    f"delete {table.folder} to score all of them"
                )
            console.info(f"{before.folder}: {lacking}; nothing is taken over from there")
        return cls(table, before, reused_from, provenance, due)

    def taken_over(self, shard: int) -> list[R] | None:
        """What the round before has of a shard's rows, if anything is taken over from it."""
        return self.before.read(shard) if self.before is not None and self.reused_from is not None else None


def _lacking(before: Table[R], provenance: Mapping[str, Any]) -> str | None:
    """Why a table's log-probs are not those that would be made now; None if they are."""
    begun = before.provenance()
    if begun is None:
        return "is not there"
    if missing := len(before.pending()):
        return f"is not complete ({missing} of {before.plan.count} shards are missing)"
    if begun["model"]["revision"] != provenance["model"]["revision"]:
        return "is of another teacher"
    differing = [key for key in SAME if begun.get(key) != provenance.get(key)]
    return f"has another {differing[0]}" if differing else None


@dataclass(frozen=True)
class RoundTables:
    """The tables of a round that log-probs go into: pairs, and on request the teacher's likeliest tokens."""

    pairs: ReusableTable[PreferencePair]
    top_k: ReusableTable[TopK] | None

    @classmethod
    def open(cls, dataset: Dataset, provenance: Mapping[str, Any], config: ScoreTeacherConfig) -> RoundTables:
        """Raises what `ReusableTable.open` does."""
        pairs, top_k = ReusableTable.open(dataset.pairs, provenance, config), None
        if config.top_k:
            top_k = ReusableTable.open(dataset.top_k, {**provenance, "top_k": config.top_k}, config)
        return cls(pairs, top_k)

    @property
    def pending(self) -> list[int]:
        """The shards that one of them has yet to make."""
        return sorted(self.pairs.due | (self.top_k.due if self.top_k else set()))

    def reuse(self, shard: int) -> list[bool]:
        """Of each table that has yet to make a shard: whether it takes log-probs over."""
        tables: tuple[ReusableTable[Any] | None, ...] = (self.pairs, self.top_k)
        return [table.reused_from is not None for table in tables if table is not None and shard in table.due]

    def claim(self, for_people: Mapping[str, Any]) -> None:
        """Say who makes them, or raise MismatchError where somebody else does."""
        claim(self.pairs.table, {**self.pairs.provenance, **for_people})
        if self.top_k:
            claim(self.top_k.table, {**self.top_k.provenance, **for_people})


@dataclass(frozen=True)
class RowsToScore:
    """What is to be scored of a shard."""

    rows: Sequence[int]
    first_side: int  # 0: y_t and y_s, 1: y_s alone

    @property
    def responses(self) -> int:
        return len(self.rows) * (2 - self.first_side)


def rows_to_score(
    config: ScoreTeacherConfig, source: PairSource, pending: Sequence[int], tables: RoundTables
) -> dict[int, RowsToScore]:
    """Both responses of all rows of the pending shards, or new ones of the student where the rest is taken over."""
    asked, plan = {}, tables.pairs.table.plan
    for shard in pending:
        if all(tables.reuse(shard)):
            asked[shard] = RowsToScore(source.sampled_in(shard, config.round), first_side=1)
        else:
            asked[shard] = RowsToScore(range(plan.rows_of(shard)), first_side=0)
    scored = sum(of_shard.responses for of_shard in asked.values())
    if reused := 2 * sum(map(plan.rows_of, pending)) - scored:
        console.info(f"{reused} responses have the log-probs of round {config.round - 1}; {scored} are scored")
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
