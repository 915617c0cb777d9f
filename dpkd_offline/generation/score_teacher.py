"""`score-teacher`: the teacher's per-token log-probs of both responses of every pair."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dpkd_offline.common import console
from dpkd_offline.common.errors import DataError, MismatchError, UsageError
from dpkd_offline.config.base import redacted_dict
from dpkd_offline.config.data import ScoreTeacherConfig
from dpkd_offline.config.engines import ENGINES
from dpkd_offline.dataset.card import write_card
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.dataset.schema import PreferencePair, TopK
from dpkd_offline.dataset.writing import commit_results, write_shard
from dpkd_offline.engines.base import Engine, Score, ScoreRequest
from dpkd_offline.engines.factory import choose_engine, load_engine, provenance_of
from dpkd_offline.generation.audit import audit
from dpkd_offline.generation.health import pair_warnings, say
from dpkd_offline.generation.pairing import PairRow, PairSource
from dpkd_offline.generation.results import ScoreResult
from dpkd_offline.generation.reuse import RoundTables, RowsToScore, check_taken_over, rows_to_score
from dpkd_offline.models.info import ModelInfo


def score_teacher(config: ScoreTeacherConfig) -> ScoreResult:
    """Join prompts, y_t and y_s of a round, score both responses by prefill, and commit the pairs.

    Both sides go through the same engine, in the same requests; the log-probs of sampling time are not used. What the
    round before has scored is taken over and not scored again: y_t, which is the same in every round, and the y_s that
    `generate --share` kept. In round 0 of a further student, that is y_t as scored for another one, and y_s where both
    have the same. Both sides are of one code path then, too, since nothing is taken over but what the same
    teacher, engine, dtype and way of scoring has made of the same tokens: the path gave then what it would give now,
    within the engine's arithmetic, in which a response's numbers do not depend on what is scored beside it.
    The same call again goes on after the last committed shard. Returns the folder of the pairs, with means over them.

    Raises:
        DataError: responses are missing or malformed, or log-probs that this round was begun with.
        MismatchError: the model is not the teacher that sampled y_t, or has another tokenizer.
        UnavailableError: the model or the engine cannot be loaded.
        UsageError: there is no such student, or top_k is as large as the vocabulary.
    """
    dataset = Dataset.open(config.dataset, config.student_name)
    teacher = ModelInfo.load(config.model, config.trust_remote_code)
    dataset.check_tokenizer(config.model, teacher.tokenizer_fingerprint)
    if config.top_k >= teacher.vocab_size:
        raise UsageError(f"--top-k {config.top_k}: the vocabulary of {config.model} has {teacher.vocab_size} tokens")
    source = PairSource.open(dataset, config, teacher)
    _check_sampler(dataset, teacher)
    engine_name = choose_engine(config.engine, config.url)
    tables = RoundTables.open(dataset, _provenance(config, dataset, teacher, source, engine_name), config)
    scored = reused = 0
    if pending := tables.pending:
        limit = min(config.max_length, teacher.context_length - ENGINES[engine_name].score_extra)
        source.check_lengths(limit, config.model)
        asked = rows_to_score(config, source, pending, tables)
        nothing = not any(of_shard.rows for of_shard in asked.values())
        engine = None if nothing else load_engine(teacher, config.model_copy(update={"engine": engine_name}))
        resolved = redacted_dict(config) | provenance_of(engine_name, config.dtype)
        versions = tables.versions if engine is None else engine.versions
        tables.claim({"config": resolved, "versions": versions, "license": teacher.license})
        write_card(dataset)  # before the first shard, since a card with the size of a table that grows would be wrong
        scored = _PendingPairs(config, source, tables, asked).score(engine)
        reused = 2 * sum(map(dataset.plan.rows_of, pending)) - scored
        if engine is not None:
            engine.close()
    else:
        console.info(f"{tables.pairs.table.folder}: all is there already")
    write_card(dataset)
    audited = _audit_if_complete(dataset, config, source, teacher)
    table, warnings = tables.pairs.table, pair_warnings(dataset, config.round)
    say(warnings)
    return ScoreResult.of(config.dataset / table.name, table, scored, reused, audited, warnings)


def _check_sampler(dataset: Dataset, model: ModelInfo) -> None:
    """Raise MismatchError where another teacher sampled y_t. Imported responses are nobody's."""
    teacher, chosen = model.identity, dataset.responses("teacher", 0)
    sampler = chosen.require_provenance().get("model")
    if sampler is not None and sampler["revision"] != teacher["revision"]:
        raise MismatchError(
            f"{chosen.folder / '_table.json'}: the teacher's responses are of {sampler['name']} "
            f"({sampler['revision'][:19]}), --model is {teacher['name']} ({teacher['revision'][:19]}); score with the "
            f"teacher that sampled"
        )


def _provenance(
    config: ScoreTeacherConfig, dataset: Dataset, teacher: ModelInfo, source: PairSource, engine_name: str
) -> dict[str, Any]:
    """What `_table.json` says of the pairs, and what all workers of the table have in common."""
    return {
        "stage": "score-teacher",
        "round": config.round,
        "model": teacher.identity,
        **source.provenance(teacher),
        **provenance_of(engine_name, config.dtype),
        "prompt_set": dataset.prompt_set.id,
    }


def _audit_if_complete(
    dataset: Dataset, config: ScoreTeacherConfig, source: PairSource, teacher: ModelInfo
) -> dict[str, Any] | None:
    """What `--audit` found, where it is asked for and every shard is committed."""
    if not config.audit:
        return None
    if dataset.pairs(config.round).pending():
        console.info("audit: not before every shard is there; the same command again will do it")
        return None
    summary = audit(dataset, config, source, teacher)
    write_card(dataset)
    return summary


@dataclass(frozen=True)
class _PendingPairs:
    """The shards of pairs that this call scores: what it asks the teacher for, and what it writes."""

    config: ScoreTeacherConfig
    source: PairSource
    tables: RoundTables
    asked: Mapping[int, RowsToScore]  # of each pending shard
    _rows: dict[int, list[PairRow]] = field(default_factory=dict)  # of the shards that are under way
    _inexact: Counter[str] = field(default_factory=Counter)  # rows whose y_t or y_s is not quite the same text

    def score(self, engine: Engine | None) -> int:
        """Commit each shard as soon as it is scored; the number of responses that were. For none there is no engine."""
        counts = {shard: len(asked.rows) for shard, asked in self.asked.items()}
        results = () if engine is None else engine.score(self._requests(), self.config.top_k)
        table = self.tables.pairs.table
        commit_results(table.plan, counts, results, self._write, label="score-teacher")
        if self.source.retokenization:
            rows = sum(map(table.plan.rows_of, self.asked))
            console.info(
                f"scored by text: of {rows} rows {self._inexact['y_t']} y_t and {self._inexact['y_s']} y_s are not "
                f"quite the same text in the tokens of both models (columns chosen_exact and rejected_exact)"
            )
        return sum(asked.responses for asked in self.asked.values())

    def _requests(self) -> Iterator[list[ScoreRequest]]:
        for shard, asked in self.asked.items():
            if asked.rows:  # an empty group has a meaning of its own
                rows = self._rows[shard] = self.source.rows(shard)
                yield [
                    ScoreRequest(
                        (shard, k), rows[k].teacher_prompt_ids, rows[k].teacher_response_ids[asked.first_side :]
                    )
                    for k in asked.rows
                ]

    def _write(self, shard: int, scores: list[list[Score]]) -> None:
        """Commit one shard, the top-k before the pairs."""
        pairs, top_k, round = self.tables.pairs, self.tables.top_k, self.config.round
        rows = self._rows.pop(shard) if shard in self._rows else self.source.rows(shard)
        scores_of_row = dict(zip(self.asked[shard].rows, scores, strict=True))
        if any(self.tables.reuse(shard)):
            check_taken_over(pairs, rows, shard, round)
        if top_k is not None and shard in top_k.due:
            write_shard(top_k.table, shard, _likeliest(rows, scores_of_row, top_k.taken_over(shard), round))
        if shard in pairs.due:
            write_shard(pairs.table, shard, _pairs(rows, scores_of_row, pairs.taken_over(shard), round))
        for response, side in (("y_t", 0), ("y_s", 1)):
            self._inexact[response] += sum(not row.exact[side] for row in rows)


def _pairs(
    rows: Sequence[PairRow], scores: Mapping[int, Sequence[Score]], before: Sequence[PreferencePair] | None, round: int
) -> list[PreferencePair]:
    """A shard's pairs; the last score of a row is that of y_s."""
    if before is None:
        return [_pair(row, *(score.logps for score in scores[k])) for k, row in enumerate(rows)]
    return [
        old if row.y_s.round < round or k not in scores else _pair(row, old.teacher_chosen_logps, scores[k][-1].logps)
        for k, (row, old) in enumerate(zip(rows, before, strict=True))
    ]


def _pair(row: PairRow, chosen_logps: list[float], rejected_logps: list[float]) -> PreferencePair:
    prompt, y_t, y_s = row.prompt, row.y_t, row.y_s
    if not all(map(math.isfinite, (*chosen_logps, *rejected_logps))):
        raise DataError(f"prompt '{prompt.id}': the teacher gave a log-prob that is not finite; try --dtype float32")
    return PreferencePair(
        id=prompt.id,
        prompt=prompt.prompt,
        prompt_ids=prompt.prompt_ids,
        reference=prompt.references[0] if prompt.references else None,
        chosen=y_t.response,
        chosen_ids=y_t.response_ids,
        chosen_finish_reason=y_t.finish_reason,
        rejected=y_s.response,
        rejected_ids=y_s.response_ids,
        rejected_finish_reason=y_s.finish_reason,
        teacher_chosen_logps=chosen_logps,
        teacher_rejected_logps=rejected_logps,
        chosen_exact=row.exact[0],
        rejected_exact=row.exact[1],
        behavior_rejected_logps=y_s.logps,
        round=y_s.round,
    )


def _likeliest(
    rows: Sequence[PairRow], scores: Mapping[int, Sequence[Score]], before: Sequence[TopK] | None, round: int
) -> list[TopK]:
    """The likeliest tokens of a shard's pairs; the last score of a row is that of y_s."""

    def columns(side: str, score: Score) -> dict[str, Any]:
        mass = [min(sum(map(math.exp, logps)), 1.0) for logps in score.top_logps]
        return {f"{side}_top_ids": score.top_ids, f"{side}_top_logps": score.top_logps, f"{side}_top_mass": mass}

    if before is None:
        return [
            TopK(row.prompt.id, **columns("chosen", scores[k][0]), **columns("rejected", scores[k][1]))
            for k, row in enumerate(rows)
        ]
    return [
        old if row.y_s.round < round or k not in scores else replace(old, **columns("rejected", scores[k][-1]))
        for k, (row, old) in enumerate(zip(rows, before, strict=True))
    ]
