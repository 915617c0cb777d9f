"""What a round takes over from the one before, a student from another one, or a sample from the first: responses that
are not sampled anew, and log-probs that are not scored again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic

from dpkd_offline.common import console
from dpkd_offline.common.errors import DataError, MismatchError
from dpkd_offline.config.data import GenerateConfig, ScoreTeacherConfig
from dpkd_offline.dataset.catalog import begun_tables
from dpkd_offline.dataset.columns import Lists
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.dataset.layout import STUDENT_RESPONSES, TOP_K
from dpkd_offline.dataset.row_checks import check_same, expect
from dpkd_offline.dataset.schema import PreferencePair, R, Response, TopK
from dpkd_offline.dataset.table import Table
from dpkd_offline.dataset.top_k import compact_columns
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


def responses_alike(
    dataset: Dataset, config: GenerateConfig, provenance: Mapping[str, Any], prompts: Mapping[str, Any] | None
) -> Table[Response] | None:
    """What another student of the dataset answered in this round, where that is what would be sampled now.

    That is so where the same model answered the same prompts with the same settings and seed: the seed of a row is of
    the run's seed, the round, the sample and the prompt's id.

    Args:
        prompts: what `_table.json` says of the prompts as this student sees them; None where they are the dataset's.
    """
    if config.student_name is None or config.role == "teacher" or config.share < 1:
        return None
    for other in dataset.students():
        table = other.responses("student", config.round)
        stored = table.provenance() if other.student != config.student_name else None
        alike = stored is not None and not differing_keys(stored, provenance)
        if alike and _same_prompts(other.student_prompts.provenance(), prompts) and not table.pending():
            return table
    return None


def _same_prompts(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> bool:
    """Whether two students see the same prompts, by what `_table.json` says of theirs."""
    return one == other if one is None or other is None else not differing_keys(one, other)


# --- log-probs, for `score-teacher` -----------------------------------------------------------------------------------

SAME = (  # and the teacher
    *("scored", "tokenizer_fingerprint", "vocab_size", "dtype", "quantization", "engine", "engine_args"),
    *("prompt_set", "top_k", "top_mass", "teacher_sample"),
)
Y_T, Y_S = 0, 1  # sides of a pair


@dataclass(frozen=True)
class ReusableTable(Generic[R]):
    """A round's pairs, or its likeliest tokens, and what they take over from those of the round before, or in round 0
    of a further student from those of another one.

    Whether they do is decided once, when the table is claimed, and stands in its `_table.json`: whoever goes on with
    the table does the same, whatever has come to the other table since.

    A sample whose y_t or y_s is that of the first sample has its log-probs from there in any case: the same command
    scores a shard of the first sample before those of others.
    """

    table: Table[R]
    first: Table[R]  # the same of the first sample
    first_sides: frozenset[int]  # whose responses are those of the first sample
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
        table, first = (of_round(of_sample, config.round) for of_sample in (dataset, dataset.of_sample(0)))
        begun, round = table.provenance(), max(config.round - 1, 0)
        samples = [provenance.get(f"{role}_sample", 0) for role in ("teacher", "student")]
        first_sides = frozenset(side for side in (Y_T, Y_S) if samples[side] != dataset.sample)
        _check_samples(table, begun, provenance)
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
            if Y_T not in first_sides:
                console.info(f"{before.folder}: {lacking}; nothing is taken over from there")
        same_responses = owner is not None and _answered_alike(dataset, owner, config.round)
        return cls(table, first, first_sides, before, reused_from, same_responses, provenance, due)

    @property
    def sources(self) -> list[str]:
        """The names of the tables that log-probs are taken over from."""
        reused = [self.before] if self.before is not None and self.reused_from is not None else []
        return [table.name for table in ([self.first] if self.first_sides else []) + reused]

    def taken_over(self, shard: int) -> TakenOver[R]:
        """What other tables have of a shard's rows, of each side, if anything of it is taken over."""
        reuses = self.before is not None and self.reused_from is not None
        before = self.before.read(shard) if self.before is not None and reuses else None
        first = self.first.read(shard) if self.first_sides else None
        chosen, rejected = (first if side in self.first_sides else before for side in (Y_T, Y_S))
        return TakenOver(chosen, rejected)


@dataclass(frozen=True)
class TakenOver(Generic[R]):
    """Rows of other tables, which give what was not scored of a side. None: all of the side was scored."""

    chosen: Sequence[R] | None
    rejected: Sequence[R] | None

    def of_row(self, k: int, *, kept: bool, scored: Collection[int]) -> tuple[R | None, R | None]:
        """What gives y_t and y_s of row k. `kept`: whether its y_s is of an earlier round."""
        chosen = None if self.chosen is None else self.chosen[k]
        rejected = None if self.rejected is None or (Y_S in scored and not kept) else self.rejected[k]
        return chosen, rejected


def _check_samples(table: Table[Any], begun: Mapping[str, Any] | None, provenance: Mapping[str, Any]) -> None:
    """Raise MismatchError where a role had fewer samples when the table was begun."""
    for role, symbol in (("teacher", "y_t"), ("student", "y_s")):
        key = f"{role}_sample"
        if begun is not None and key in provenance and begun.get(key) != provenance[key]:
            raise MismatchError(
                f"{table.provenance_path}: {table.name} has {symbol} of sample {begun.get(key)}, and now there is a "
                f"sample {provenance[key]} of {symbol}; delete {table.folder} to score that one"
            )


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
    prompts = (student.student_prompts.provenance() for student in (dataset, other))
    return own is not None and stored is not None and not differing_keys(stored, own) and _same_prompts(*prompts)


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
            share = {} if config.top_mass is None else {"top_mass": config.top_mass}
            columns = _columns_of_top_k(dataset, provenance["vocab_size"])
            own = {"top_k": config.top_k, **share, **({"columns": columns} if columns else {})}
            top_k = ReusableTable.open(dataset, Dataset.top_k, {**provenance, **own}, config)
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
    def sources(self) -> list[str]:
        """The names of the tables that log-probs are taken over from."""
        return self.pairs.sources or (self.top_k.sources if self.top_k else [])

    @property
    def versions(self) -> Mapping[str, str]:
        """Of what scored the pairs that are taken over."""
        source = self.pairs.first if self.pairs.first_sides else self.pairs.before
        return {} if source is None else source.require_provenance().get("versions", {})

    def claim(self, for_people: Mapping[str, Any]) -> None:
        """Say who makes them, or raise MismatchError where somebody else does."""
        claim(self.pairs.table, {**self.pairs.provenance, **for_people})
        if self.top_k:
            claim(self.top_k.table, {**self.top_k.provenance, **for_people})


def _columns_of_top_k(dataset: Dataset, vocab_size: int) -> Mapping[str, str]:
    """Those of a dataset's other tables of likeliest tokens, since all have one form; else those of a new one."""
    tables = (table for table in begun_tables(dataset) if table.kind is TOP_K)
    begun = next((made for table in tables if (made := table.provenance()) is not None), None)
    return compact_columns(vocab_size) if begun is None else begun.get("columns", {})


@dataclass(frozen=True)
class RowsToScore:
    """What is to be scored of a shard."""

    rows: Sequence[int]
    sides: Sequence[int]  # of each of these rows

    @property
    def responses(self) -> int:
        return len(self.rows) * len(self.sides)


def rows_to_score(
    config: ScoreTeacherConfig, source: PairSource, pending: Sequence[int], tables: RoundTables
) -> dict[int, RowsToScore]:
    """Both responses of all rows of the pending shards, or what of them is not taken over."""
    asked, plan, first_sides = {}, tables.pairs.table.plan, tables.pairs.first_sides
    for shard in pending:
        reuses, rows = all(tables.reuse(shard)), range(plan.rows_of(shard))
        if Y_T not in first_sides and not reuses:
            asked[shard] = RowsToScore(rows, sides=[side for side in (Y_T, Y_S) if side not in first_sides])
        elif Y_S in first_sides or (reuses and tables.same_responses):
            asked[shard] = RowsToScore((), sides=())
        else:
            new = source.sampled_in(shard, config.round) if reuses else rows
            asked[shard] = RowsToScore(new, sides=(Y_S,))
    scored = sum(of_shard.responses for of_shard in asked.values())
    if reused := 2 * sum(map(plan.rows_of, pending)) - scored:
        of = f"round {config.round - 1}" if config.round and not first_sides else " and ".join(tables.sources)
        console.info(f"{reused} responses have the log-probs of {of}; {scored} are scored")
    return asked


def check_taken_over(
    pairs: ReusableTable[PreferencePair], rows: Sequence[PairRow], shard: int, round: int, reuses: bool
) -> None:
    """Raise DataError unless the pairs that are taken over are of the same responses.

    Args:
        reuses: whether something of the round before, or of another student, is taken over.
    """
    before = pairs.before if reuses else None
    chosen, rejected = (pairs.first if side in pairs.first_sides else before for side in (Y_T, Y_S))
    if chosen is not None:
        for k, (old, row) in enumerate(zip(chosen.read(shard), rows, strict=True)):
            same = {"id": old.id == row.prompt.id, "chosen_ids": old.chosen_ids == row.y_t.response_ids}
            _check_same(chosen, shard, k, round, same)
    if rejected is not None:
        all_ = Y_S in pairs.first_sides or pairs.same_responses
        for k, (old, row) in enumerate(zip(rejected.read(shard), rows, strict=True)):
            if all_ or row.y_s.round < round:
                same = {"rejected_ids": old.rejected_ids == row.y_s.response_ids, "round": old.round == row.y_s.round}
                _check_same(rejected, shard, k, round, {"id": old.id == row.prompt.id, **same})


def _check_same(table: Table[Any], shard: int, row: int, round: int, same: Mapping[str, bool]) -> None:
    for column in (column for column, right in same.items() if not right):
        raise DataError(
            f"{table.path(shard)}: row {row}: column '{column}' is not that of the responses of round "
            f"{round}, so that its log-probs are not either; delete both tables of pairs and score them again"
        )
