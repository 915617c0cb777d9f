"""What a round takes over from the one before, or a student from another one: responses that are not sampled anew, and
log-probs that are not scored again."""

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
from dpkd_offline.dataset.writing import check_claim, claim, differing_keys
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


def responses_alike(dataset: Dataset, config: GenerateConfig, provenance: Mapping[str, Any]) -> Table[Response] | None:
    """What another student of the dataset answered in this round, where that is what would be sampled now.

    That is so where the same model answered with the same settings and seed: the seed of a row is of the run's seed,
    the round and the prompt's id.
    """
    if config.student_name is None or config.role == "teacher" or config.share < 1:
        return None
    for other in dataset.students():
        table = other.responses("student", config.round)
        stored = table.provenance() if other.student != config.student_name else None
        if stored is not None and not differing_keys(stored, provenance) and not table.pending():
            return table
    return None


# --- log-probs, for `score-teacher` -----------------------------------------------------------------------------------

SAME = ("scored", "tokenizer_fingerprint", "vocab_size", "dtype", "engine", "prompt_set", "top_k")  # and the teacher


@dataclass(frozen=True)
class ReusableTable(Generic[R]):
    """A round's pairs, or its likeliest tokens, and what they take over from those of the round before, or in round 0
    of a further student from those of another one.

    Whether they do is decided once, when the table is claimed, and stands in its `_table.json`: whoever goes on with
    the table does the same, whatever has come to the other table since.
    """

    table: Table[R]
    before: Table[R] | None  # of the round before, or of another student, if there is one
    reused_from: int | None  # its round, if log-probs are taken over from it
    same_responses: bool  # whether its y_s are the very same, so that nothing is left to score
    provenance: Mapping[str, Any]
    due: frozenset[int]  # shards that this worker has yet to make

    @classmethod
    def open(
        cls,
        dataset: Dataset,
        of_round: Callable[[Dataset, int], Table[R]],
        provenance: Mapping[str, Any],
        config: ScoreTeacherConfig,
    ) -> ReusableTable[R]:
        """`of_round` gives a student's table of any round, `provenance` says who makes this one.

        Raises:
            DataError: the table was begun with log-probs of another table that are gone.
            MismatchError: the table was begun by another producer.
        """
        table = of_round(dataset, config.round)
        begun, round = table.provenance(), max(config.round - 1, 0)
        owner = dataset if config.round else _other_student(dataset, of_round, provenance, begun)
        before = None if owner is None else of_round(owner, round)
        lacking = None if before is None else _lacking(before, provenance)
        if begun is not None:
            reused_from: int | None = begun.get("reused_from")
        else:
            reused_from = None if before is None or lacking else round
        provenance = {**provenance, "reused_from": reused_from}
        if owner is not None and not config.round and reused_from is not None:
            provenance["reused_student"] = owner.student or ""
        check_claim(table, provenance)
        due = frozenset(table.pending(config.shard_index, config.num_shards))
        if due and lacking and before is not None:
            if reused_from is not None:
                raise DataError(
                    f"{before.folder}: {lacking}, but {table.name} was begun with its log-probs; bring it back, or "
                    f"delete {table.folder} to score all of them"
                )
            console.info(f"{before.folder}: {lacking}; nothing is taken over from there")
        same_responses = owner is not None and _answered_alike(dataset, owner, config.round)
        return cls(table, before, reused_from, same_responses, provenance, due)

    def taken_over(self, shard: int) -> list[R] | None:
        """What the other table has of a shard's rows, if anything is taken over from it."""
        return self.before.read(shard) if self.before is not None and self.reused_from is not None else None


def _other_student(
    dataset: Dataset,
    of_round: Callable[[Dataset, int], Table[R]],
    provenance: Mapping[str, Any],
    begun: Mapping[str, Any] | None,
) -> Dataset | None:
    """The student from whose round 0 a further one takes log-probs over; best one that answered alike.

    Of a table that was begun it is the one that it was begun with.
    """
    others = [] if dataset.student is None else [other for other in dataset.students() if other.student]
    others = [other for other in (dataset.students()[:1] + others) if other.student != dataset.student]
    if begun is not None:
        return next((other for other in others if (other.student or "") == begun.get("reused_student")), None)
    others = [other for other in others if not _lacking(of_round(other, 0), provenance)]
    others.sort(key=lambda other: not _answered_alike(dataset, other, 0))
    return others[0] if others else None


def _answered_alike(dataset: Dataset, other: Dataset, round: int) -> bool:
    """Whether another student's responses are of the same model, settings and seed as this one's, and so the same."""
    if other.student == dataset.student:
        return False
    own, stored = (student.responses("student", round).provenance() for student in (dataset, other))
    return own is not None and stored is not None and not differing_keys(stored, own)


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
        pairs, top_k = ReusableTable.open(dataset, Dataset.pairs, provenance, config), None
        if config.top_k:
            top_k = ReusableTable.open(dataset, Dataset.top_k, {**provenance, "top_k": config.top_k}, config)
        return cls(pairs, top_k)

    @property
    def pending(self) -> list[int]:
        """The shards that one of them has yet to make."""
        return sorted(self.pairs.due | (self.top_k.due if self.top_k else set()))

    def reuse(self, shard: int) -> list[bool]:
        """Of each table that has yet to make a shard: whether it takes log-probs over."""
        tables: tuple[ReusableTable[Any] | None, ...] = (self.pairs, self.top_k)
        return [table.reused_from is not None for table in tables if table is not None and shard in table.due]

    @property
    def same_responses(self) -> bool:
        """Whether the tables that are taken over are of the very same y_s."""
        return self.pairs.same_responses and (self.top_k is None or self.top_k.same_responses)

    @property
    def versions(self) -> Mapping[str, str]:
        """Of what scored the pairs that are taken over."""
        return {} if self.pairs.before is None else self.pairs.before.require_provenance().get("versions", {})

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
            new = () if tables.same_responses else source.sampled_in(shard, config.round)
            asked[shard] = RowsToScore(new, first_side=1)
        else:
            asked[shard] = RowsToScore(range(plan.rows_of(shard)), first_side=0)
    scored = sum(of_shard.responses for of_shard in asked.values())
    if reused := 2 * sum(map(plan.rows_of, pending)) - scored:
        pairs = tables.pairs.before
        of = f"round {config.round - 1}" if config.round or pairs is None else pairs.name
        console.info(f"{reused} responses have the log-probs of {of}; {scored} are scored")
    return asked


def check_taken_over(pairs: ReusableTable[PreferencePair], rows: Sequence[PairRow], shard: int, round: int) -> None:
    """Raise DataError unless the pairs of the round before are of the same y_t, and of the y_s that were kept."""
    assert pairs.before is not None
    for k, (old, row) in enumerate(zip(pairs.before.read(shard), rows, strict=True)):
        same = {"id": old.id == row.prompt.id, "chosen_ids": old.chosen_ids == row.y_t.response_ids}
        if row.y_s.round < round or pairs.same_responses:
            same |= {"rejected_ids": old.rejected_ids == row.y_s.response_ids, "round": old.round == row.y_s.round}
        for column in (column for column, right in same.items() if not right):
            raise DataError(
                f"{pairs.before.path(shard)}: row {k}: column '{column}' is not that of the responses of round "
                f"{round}, so that its log-probs are not either; delete both tables of pairs and score them again"
            )
