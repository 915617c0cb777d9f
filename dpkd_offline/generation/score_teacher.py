"""`score-teacher`: the teacher's per-token log-probs of both responses of every pair."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dpkd_offline.common import console
from dpkd_offline.common.errors import DataError, MismatchError, UsageError
from dpkd_offline.config.base import redacted_dict
from dpkd_offline.config.data import ScoreTeacherConfig
from dpkd_offline.config.engines import ENGINES
from dpkd_offline.dataset.card import write_card
from dpkd_offline.dataset.catalog import require_one_teacher
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.dataset.schema import PreferencePair, TopK
from dpkd_offline.dataset.top_k import LEAST_HALF, covering
from dpkd_offline.dataset.writing import commit_results, write_shard
from dpkd_offline.engines.base import Engine, Score, ScoreRequest
from dpkd_offline.engines.factory import choose_engine, engine_and_dtype, load_engine, provenance_of, together
from dpkd_offline.generation.audit import audit, check_audit
from dpkd_offline.generation.health import pair_warnings, say
from dpkd_offline.generation.pairing import PairRow, PairSource, scored_samples
from dpkd_offline.generation.results import ScoreResult
from dpkd_offline.generation.reuse import (
    Y_S,
    Y_T,
    RoundTables,
    RowsToScore,
    TakenOver,
    check_taken_over,
    rows_to_score,
)
from dpkd_offline.models.info import ModelInfo


def score_teacher(config: ScoreTeacherConfig) -> ScoreResult:
    """Join prompts, y_t and y_s of a round, score both responses by prefill, and commit the pairs, of all samples.

    Both sides go through the same engine, in the same requests; the log-probs of sampling time are not used. What is
    scored already is taken over and not scored again: y_t, which is the same in every round, and the y_s that
    `generate --share` kept; in round 0 of a further student y_t as scored for another one, and y_s where both have the
    same; in a later sample the response of a role that has fewer samples. Both sides are of one code path then, too,
    since nothing is taken over but what the same teacher, engine, dtype and way of scoring has made of the same tokens:
    the path gave then what it would give now, within the engine's arithmetic, in which a response's numbers do not
    depend on what is scored beside it.
    The same call again goes on after the last committed shard. Returns the folder of the pairs, with means over them.

    Raises:
        DataError: responses are missing or malformed, or log-probs that this round was begun with.
        MismatchError: the model is not the teacher that sampled y_t, or has another tokenizer.
        UnavailableError: the model or the engine cannot be loaded.
        UsageError: there is no such student, or top_k is as large as the vocabulary.
    """
    dataset = Dataset.open(config.dataset, config.student_name)
    require_one_teacher(dataset)
    teacher = ModelInfo.load(config.model, config.trust_remote_code)
    dataset.check_tokenizer(config.model, teacher.tokenizer_fingerprint)
    if config.top_k >= teacher.vocab_size:
        raise UsageError(f"--top-k {config.top_k}: the vocabulary of {config.model} has {teacher.vocab_size} tokens")
    source = PairSource.open(dataset, config, teacher)
    engine_name = choose_engine(config.engine, config.url)
    check_audit(config, engine_name, teacher)
    samples = []
    for of_sample in scored_samples(dataset, config.round):
        own = source.of_sample(of_sample, config.round)
        _check_sampler(own, teacher)
        samples.append((own, RoundTables.open(of_sample, _provenance(config, teacher, own, engine_name), config)))
    scored = reused = 0
    if any(tables.pending for _, tables in samples):
        scored, reused = _score_samples(config, teacher, engine_name, samples)
    else:
        console.info(f"{samples[0][1].pairs.table.folder}: all is there already")
    write_card(dataset)
    audited = _audit_if_complete(dataset, config, source, teacher)
    pairs, warnings = [tables.pairs.table for _, tables in samples], pair_warnings(dataset, config.round)
    say(warnings)
    return ScoreResult.of(config.dataset / pairs[0].name, pairs, scored, reused, audited, warnings)


def _score_samples(
    config: ScoreTeacherConfig,
    teacher: ModelInfo,
    engine_name: str,
    samples: Sequence[tuple[PairSource, RoundTables]],
) -> tuple[int, int]:
    """Make the shards that are pending, the first sample's before those that take over from it.

    Returns how many responses were scored, and how many have the log-probs of another table.
    """
    limit = min(config.max_length, teacher.context_length - ENGINES[engine_name].score_extra)
    work = []
    for source, tables in samples:
        source.check_lengths(limit, config.model)
        work.append((source, tables, rows_to_score(config, source, tables.pending, tables)))
    shards = max(sum(bool(of_shard.rows) for of_shard in asked.values()) for _, _, asked in work)
    engine = load_engine(teacher, config.model_copy(update={"engine": engine_name}), shards) if shards else None
    resolved = redacted_dict(config) | engine_and_dtype(engine_name, config)
    for tables in (tables for _, tables, asked in work if asked):  # all before the first shard
        versions = tables.versions if engine is None else engine.versions
        tables.claim({"config": resolved, "versions": versions, "license": teacher.license})
    dataset = samples[0][0].dataset
    write_card(dataset)  # before the first shard, since a card with the size of a table that grows would be wrong
    pending = [_PendingPairs(config, *of_sample) for of_sample in work if of_sample[2]]
    scored = sum(_score(of_samples, engine) for of_samples in together(pending, engine))
    if engine is not None:
        engine.close()
    return scored, 2 * sum(dataset.plan.rows_of(shard) for _, _, asked in work for shard in asked) - scored


def _check_sampler(source: PairSource, model: ModelInfo) -> None:
    """Raise MismatchError where another teacher sampled y_t. Imported responses are nobody's."""
    teacher, chosen = model.identity, source.chosen
    sampler = chosen.require_provenance().get("model")
    if sampler is not None and sampler["revision"] != teacher["revision"]:
        raise MismatchError(
            f"{chosen.folder / '_table.json'}: the teacher's responses are of {sampler['name']} "
            f"({sampler['revision'][:19]}), --model is {teacher['name']} ({teacher['revision'][:19]}); score with the "
            f"teacher that sampled"
        )


def _provenance(config: ScoreTeacherConfig, teacher: ModelInfo, source: PairSource, engine_name: str) -> dict[str, Any]:
    """What `_table.json` says of the pairs, and what all workers of the table have in common."""
    return {
        "stage": "score-teacher",
        "round": config.round,
        "model": teacher.identity,
        **source.provenance(teacher),
        **provenance_of(engine_name, config, teacher),
        "prompt_set": source.dataset.prompt_set.id,
        **source.samples,
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


ScoresOfRows = Mapping[int, Mapping[int, Score]]  # by row and side


@dataclass(frozen=True)
class _PendingPairs:
    """The shards of pairs that this call scores: what it asks the teacher for, and what it writes."""

    config: ScoreTeacherConfig
    source: PairSource
    tables: RoundTables
    asked: Mapping[int, RowsToScore]  # of each pending shard
    _rows: dict[int, list[PairRow]] = field(default_factory=dict)  # of the shards that are under way
    _inexact: Counter[str] = field(default_factory=Counter)  # rows whose y_t or y_s is not quite the same text

    def asked_of(self, shard: int, row: int) -> tuple[Sequence[int], list[Sequence[int]]]:
        """The prompt of a row, and its responses that are to be scored."""
        if shard not in self._rows:
            self._rows[shard] = self.source.rows(shard)
        of_row = self._rows[shard][row]
        return of_row.teacher_prompt_ids, [of_row.teacher_response_ids[side] for side in self.asked[shard].sides]

    def write(self, shard: int, scores: list[list[Score]]) -> None:
        """Commit one shard, the top-k before the pairs."""
        pairs, top_k, round = self.tables.pairs, self.tables.top_k, self.config.round
        rows = self._rows.pop(shard) if shard in self._rows else self.source.rows(shard)
        asked = self.asked[shard]
        scores_of_row = {k: dict(zip(asked.sides, of, strict=True)) for k, of in zip(asked.rows, scores, strict=True)}
        reuses = any(self.tables.reuse(shard))
        if reuses or pairs.first_sides:
            check_taken_over(pairs, rows, shard, round, reuses)
        if top_k is not None and shard in top_k.due:
            before = top_k.taken_over(shard)
            write_shard(top_k.table, shard, _likeliest(rows, scores_of_row, before, self.config))
        if shard in pairs.due:
            write_shard(pairs.table, shard, _pairs(rows, scores_of_row, pairs.taken_over(shard), round))
        for response, side in (("y_t", 0), ("y_s", 1)):
            self._inexact[response] += sum(not row.exact[side] for row in rows)

    def say_inexact(self) -> None:
        if self.source.retokenization:
            rows = sum(map(self.tables.pairs.table.plan.rows_of, self.asked))
            console.info(
                f"scored by text: of {rows} rows {self._inexact['y_t']} y_t and {self._inexact['y_s']} y_s are not "
                f"quite the same text in the tokens of both models (columns chosen_exact and rejected_exact)"
            )


def _score(samples: Sequence[_PendingPairs], engine: Engine | None) -> int:
    """Commit each shard of these samples as soon as it is scored, the first sample's first; the number of responses
    that were. All responses to a prompt are asked about in one request. For none there is no engine."""
    shards = sorted({shard for sample in samples for shard in sample.asked})
    of_shard = {shard: [sample for sample in samples if shard in sample.asked] for shard in shards}
    rows = {shard: sorted({k for sample in of for k in sample.asked[shard].rows}) for shard, of in of_shard.items()}

    def requests() -> Iterator[list[ScoreRequest]]:
        for shard in (shard for shard in shards if rows[shard]):  # an empty group has a meaning of its own
            group = []
            for k in rows[shard]:
                asked = [sample.asked_of(shard, k) for sample in of_shard[shard] if k in sample.asked[shard].rows]
                group.append(ScoreRequest((shard, k), asked[0][0], [y for _, responses in asked for y in responses]))
            yield group

    def write(shard: int, scores: list[list[Score]]) -> None:
        left = {k: iter(of_row) for k, of_row in zip(rows[shard], scores, strict=True)}
        for sample in of_shard[shard]:
            asked = sample.asked[shard]
            sample.write(shard, [[next(left[k]) for _ in asked.sides] for k in asked.rows])

    results = () if engine is None else engine.score(requests(), samples[0].config.top_k)
    table = samples[0].tables.pairs.table
    which = f", {len(samples)} samples" if len(samples) > 1 else f", sample {table.sample}" if table.sample else ""
    commit_results(
        table.plan, {shard: len(of) for shard, of in rows.items()}, results, write, label=f"score-teacher{which}"
    )
    for sample in samples:
        sample.say_inexact()
    return sum(asked.responses for sample in samples for asked in sample.asked.values())


def _pairs(
    rows: Sequence[PairRow], scores: ScoresOfRows, taken: TakenOver[PreferencePair], round: int
) -> list[PreferencePair]:
    """A shard's pairs."""
    pairs = []
    for k, row in enumerate(rows):
        score = scores.get(k, {})
        y_t, y_s = taken.of_row(k, kept=row.y_s.round < round, scored=score)
        chosen = score[Y_T].logps if y_t is None else y_t.teacher_chosen_logps
        pairs.append(_pair(row, chosen, score[Y_S].logps if y_s is None else y_s.teacher_rejected_logps))
    return pairs


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
    rows: Sequence[PairRow], scores: ScoresOfRows, taken: TakenOver[TopK], config: ScoreTeacherConfig
) -> list[TopK]:
    """The likeliest tokens of a shard's pairs."""
    likeliest = []
    for k, row in enumerate(rows):
        score, columns = scores.get(k, {}), dict[str, Any]()
        old = taken.of_row(k, kept=row.y_s.round < config.round, scored=score)
        for side, name in ((Y_T, "chosen"), (Y_S, "rejected")):
            of = old[side]
            columns |= _top_columns(row, name, score[side], config) if of is None else _stored_columns(name, of)
        likeliest.append(TopK(row.prompt.id, **columns))
    return likeliest


def _top_columns(row: PairRow, side: str, score: Score, config: ScoreTeacherConfig) -> dict[str, Any]:
    ids, tops = score.top_ids, score.top_logps
    if config.top_mass is not None:
        tops = [logps[: covering(logps, config.top_mass)] for logps in tops]
        ids = [of[: len(logps)] for of, logps in zip(ids, tops, strict=True)]
    mass = [min(sum(map(math.exp, logps)), 1.0) for logps in tops]
    if not all(logps[-1] > LEAST_HALF for logps in tops) or not all(map(math.isfinite, mass)):  # likeliest first
        raise DataError(
            f"prompt '{row.prompt.id}': the teacher gave one of its {config.top_k} likeliest tokens a log-prob that is "
            f"not finite; take a smaller --top-k, or --dtype float32"
        )
    return {f"{side}_top_ids": ids, f"{side}_top_logps": tops, f"{side}_top_mass": mass}


def _stored_columns(side: str, row: TopK) -> dict[str, Any]:
    return {name: getattr(row, name) for name, column in TopK.columns.items() if column.side == side}
