"""The rules of `subset`: which rows of a dataset, or pairs of its samples, satisfy them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import regex

from dpkd_offline.common.errors import DataError, MismatchError, UsageError
from dpkd_offline.config.data import SubsetConfig
from dpkd_offline.curation.pair_rules import Pairing, Pairs, sample_counts
from dpkd_offline.curation.scores import Scores, read_scores
from dpkd_offline.dataset.catalog import related_table
from dpkd_offline.dataset.columns import Lists, draws_of
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.dataset.layout import PAIRS, STUDENT_PROMPTS, TEACHER_PROMPTS, TEACHER_RESPONSES
from dpkd_offline.dataset.row_checks import Mask, check_rows, check_same
from dpkd_offline.dataset.schema import SIDES, Kind, PreferencePair, Response, Side, columns_of
from dpkd_offline.dataset.table import Table
from dpkd_offline.metrics.text import repetition

if TYPE_CHECKING:
    from dpkd_offline.models.info import ModelInfo

LETTER = regex.compile(r"(?V1)[\p{L}--[\p{Script=Common}\p{Script=Inherited}]]")
OF_SCRIPT = 0.9  # of the letters of a text that is written in a script


def _judged(dataset: Dataset, carried: Iterable[Table[Any]], config: SubsetConfig) -> list[Table[Any]]:
    """The tables that the rules are about, or a DataError where there are none."""
    margins = config.min_margin is not None or config.max_margin is not None
    of_pairs = config.drop_identical or config.drop_inexact or margins
    of_text = config.max_repetition is not None or config.script
    if not of_pairs and not of_text and not config.drop_truncated and config.max_tokens is None:
        return []
    judged = [table for table in carried if table.record in (Response, PreferencePair)]
    if not judged or (of_pairs and not any(table.kind is PAIRS for table in judged)):
        what, command = ("pairs", "score-teacher") if of_pairs else ("responses", "generate")
        raise DataError(f"{dataset.root / what}: a rule is about {what}, and none are whole; run `{command}` first")
    return judged


def _judged_columns(table: Table[Any], config: SubsetConfig) -> list[str]:
    """What the rules about responses read: ids, tokens, how they end; of a pair also text, exactness, the teacher."""
    record = table.record
    names = record.schema.names
    of_pair = columns_of(names, Kind.TEXT, Kind.EXACT, Kind.LOGPS, sides=SIDES) if record is PreferencePair else []
    own = columns_of(names, Kind.TOKEN_IDS, Kind.FINISH_REASON, sides=("response", *SIDES))
    text = [column] if config.script and (column := _text_of_y_t(table)) == "response" else []
    return ["id", *own, *text, *(name for name in of_pair if record.columns[name].model != "behavior")]


class Rules:
    """The rules of a subset, and which rows of its dataset, or which pairs of its samples, satisfy them."""

    def __init__(
        self, dataset: Dataset, carried: Mapping[str, Table[Any]], pairing: Pairing | None, config: SubsetConfig
    ) -> None:
        """
        Args:
            carried: the tables of the new dataset but its prompts.

        Raises:
            DataError: a rule is about tables that are not there, or a score is wrong.
            MismatchError: --known-to names a model with another tokenizer.
            UsageError: --min-score is of several samples.
        """
        self._dataset, self._carried, self._pairing, self._config = dataset, carried, pairing, config
        self._judged = _judged(dataset, carried.values(), config)
        self._scores = _scores(dataset, config) if pairing is None else pairing.scores
        self._model = None if config.known_to is None else _model(config.known_to)
        self.vocab_size = None if self._model is None else _known_ids(dataset, self._model)  # of all ids that stay

    def as_dict(self) -> dict[str, Any]:
        """What `_table.json` says of them: files and models by their names, with what they are."""
        rules = self._config.model_dump(exclude={"dataset", "output"})
        if self._scores is not None:
            rules["scores"] = self._scores.as_dict()
        if self._model is not None:
            rules["known_to"] = {"name": self._model.public_name, "vocab_size": self.vocab_size}
        return rules if self._pairing is None else {**rules, "samples": self._pairing.samples}

    def read(self, table: Table[Any], shard: int, pairs: Pairs | None, columns: list[str] | None = None) -> pa.Table:
        """The rows of a shard, or those that its pairs have."""
        if pairs is None or self._pairing is None:
            return table.read_arrow(shard, columns)
        return self._pairing.take(table, shard, pairs, columns)

    def of_shard(self, shard: int, prompts: pa.Table, pairs: Pairs | None) -> Iterator[tuple[str, Mask]]:
        """Each rule, and which rows [N] of a shard satisfy it."""
        config = self._config
        if config.min_gap is not None and pairs is not None:
            yield "min-gap", pairs.gap >= config.min_gap
        if self._scores is not None and config.min_score is not None:
            of_y_t = self._scores.of_shard("teacher", self._dataset, shard)
            yield "min-score", (of_y_t[0] if pairs is None else of_y_t[pairs.y_t, pairs.rows]) >= config.min_score
        if config.share is not None:
            # Not by the id alone: `train --holdout` draws by that, and would hold out all of a small share.
            seeded = pa.chunked_array([[f"{config.seed}:{id_}" for id_ in prompts["id"].to_pylist()]])
            yield "share", draws_of(seeded) < config.share
        for table in self._judged:
            rows = self.read(table, shard, pairs, _judged_columns(table, config))
            check_same(rows, "id", prompts["id"], table.path(shard), "the prompt in this row")
            provenance = table.require_provenance()
            check_rows(rows, table.path(shard), by_text=provenance.get("scored") == "text")
            if config.max_tokens is not None:
                of_teacher, asked = table.kind is TEACHER_RESPONSES, prompts
                own = TEACHER_PROMPTS.path() if of_teacher else related_table(table, STUDENT_PROMPTS)
                if own in self._carried:  # in the tokens of the responses, as their model saw them
                    asked = self.read(self._carried[own], shard, pairs, ["id", "prompt_ids"])
                tokens = [Lists(rows[name]).lengths for name in columns_of(rows.column_names, Kind.TOKEN_IDS)]
                yield "max-tokens", Lists(asked["prompt_ids"]).lengths + np.max(tokens, axis=0) <= config.max_tokens
            yield from _rules_of_responses(table, rows, config)
            if table.kind is PAIRS:
                yield from _rules_of_pairs(rows, config)
        if self.vocab_size is not None:
            yield from self._known(shard, prompts, pairs, self.vocab_size)

    def _known(self, shard: int, prompts: pa.Table, pairs: Pairs | None, known: int) -> Iterator[tuple[str, Mask]]:
        """Which rows have no token id from `known` on, in what is in the tokens of the dataset."""
        yield "known-to", _below(prompts["prompt_ids"], known)
        for table in self._carried.values():
            if self._dataset.shares_tokenizer(table.require_provenance()["tokenizer_fingerprint"]):
                sides: tuple[Side, ...] = ("prompt",) if table.kind is STUDENT_PROMPTS else ("response", *SIDES)
                names = columns_of(table.schema.names, Kind.TOKEN_IDS, Kind.TOP_IDS, sides=sides)
                rows = self.read(table, shard, pairs, ["id", *names])
                for name in names:
                    yield "known-to", _below(rows[name], known)


def _model(name: str) -> ModelInfo:
    from dpkd_offline.models.info import ModelInfo  # which imports transformers, and most subsets need none

    return ModelInfo.load(name)


def _known_ids(dataset: Dataset, model: ModelInfo) -> int:
    """How many token ids a model knows, all below this number; a MismatchError where it has another tokenizer."""
    if not dataset.shares_tokenizer(model.tokenizer_fingerprint):
        raise MismatchError(
            f"--known-to {model.name}: its tokenizer is not that of {dataset.root}, so that it gets the text of the "
            f"rows in tokens of its own, of which it knows all"
        )
    return model.embedding_rows


def _scores(dataset: Dataset, config: SubsetConfig) -> Scores | None:
    """The scores that --min-score is about, of the one y_t of each prompt."""
    if config.scores is None:
        return None
    samples = sample_counts(dataset)
    if max(samples.values()) > 1:
        raise UsageError(
            f"{dataset.root}: has several samples, and --min-score is of the one y_t of a row; say with --pairs which "
            f"that is"
        )
    return read_scores(config.scores, dataset, samples, {"teacher": 1})


def _below(ids: pa.ChunkedArray, known: int) -> Mask:
    """Which rows [N] of lists, or of lists of lists, hold no id from `known` on."""
    array = ids.combine_chunks()
    parents = pc.list_parent_indices(array).to_numpy()
    array = array.flatten()
    while pa.types.is_list(array.type):
        parents, array = parents[pc.list_parent_indices(array).to_numpy()], array.flatten()
    good = np.ones(len(ids), dtype=np.bool_)
    good[parents[array.to_numpy() >= known]] = False
    return good


def _rules_of_responses(table: Table[Any], rows: pa.Table, config: SubsetConfig) -> Iterator[tuple[str, Mask]]:
    """Each rule about responses one by one, and which rows [N] of a shard satisfy it."""
    if config.drop_truncated:
        for name in columns_of(rows.column_names, Kind.FINISH_REASON):
            yield "drop-truncated", pc.not_equal(rows[name], "length").to_numpy()
    if config.max_repetition is not None:
        for name in columns_of(rows.column_names, Kind.TOKEN_IDS):
            shares = np.array([repetition(tokens) for tokens in rows[name].to_pylist()])
            yield "max-repetition", shares <= config.max_repetition
    if config.script and (column := _text_of_y_t(table)) is not None:
        of_script = regex.compile("|".join(rf"\p{{Script={name}}}" for name in config.script))
        yield "script", np.array([is_written_in(text, of_script) for text in rows[column].to_pylist()])


def _text_of_y_t(table: Table[Any]) -> str | None:
    return {TEACHER_RESPONSES: "response", PAIRS: "chosen"}.get(table.kind)


def is_written_in(text: str, script: regex.Pattern[str]) -> bool:
    """Whether a script has at least `OF_SCRIPT` of the letters of a text; so it is where a text has none, as in `42`.

    Letters of no script in particular do not count, such as the mark of a long vowel in Japanese.
    """
    letters = LETTER.findall(text)
    return sum(script.match(letter) is not None for letter in letters) >= OF_SCRIPT * len(letters)


def _rules_of_pairs(rows: pa.Table, config: SubsetConfig) -> Iterator[tuple[str, Mask]]:
    """The same of the rules that are about pairs alone."""
    if config.drop_identical:
        yield "drop-identical", pc.not_equal(rows["chosen"], rows["rejected"]).to_numpy()
    if config.drop_inexact:
        for side in SIDES:
            yield "drop-inexact", rows[f"{side}_exact"].to_numpy()
    logps = [Lists(rows[f"teacher_{side}_logps"]) for side in SIDES]
    chosen, rejected = (of.sums() / of.lengths for of in logps)
    if config.min_margin is not None:
        yield "min-margin", chosen - rejected >= config.min_margin
    if config.max_margin is not None:
        yield "max-margin", chosen - rejected <= config.max_margin
