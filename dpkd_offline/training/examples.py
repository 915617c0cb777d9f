"""What is read of a dataset for each kind of training: pairs, references, the teacher's responses, a corpus."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpkd_offline.common.errors import DataError
from dpkd_offline.config.train import TrainConfig
from dpkd_offline.dataset.columns import Lists
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.dataset.layout import PAIRS
from dpkd_offline.dataset.row_checks import check_rows, check_same, check_top_k, expect
from dpkd_offline.dataset.schema import SIDES, Kind, PreferencePair, TopK, columns_of
from dpkd_offline.dataset.table import Table
from dpkd_offline.dataset.top_k import Likeliest
from dpkd_offline.models.info import ModelInfo
from dpkd_offline.prompts.reader import check_known
from dpkd_offline.prompts.retokenize import ResponseTokenizer, prompts_for, student_view
from dpkd_offline.training.stream import Example, ExampleSource, HeldOutExamples, Mask, Stream, Top, scan

PAIR_COLUMNS = columns_of(PreferencePair.schema.names, Kind.ID, Kind.TOKEN_IDS, Kind.FINISH_REASON, Kind.LOGPS)
TOP_COLUMNS = list(TopK.columns)


def chosen_round(dataset: Dataset, config: TrainConfig) -> int:
    """The round of pairs to begin with: the one asked for, or the latest, but the first where further ones are to come.

    Raises:
        DataError: it is not complete.
    """
    dataset.require_student()
    rounds = dataset.rounds()
    if not rounds:
        dataset.require_round(PAIRS, 0)
        raise DataError(f"{dataset.root / 'pairs'}: no pairs yet; run `dpkd-offline score-teacher` first")
    round = config.round
    if round is None:
        round = rounds[0] if config.regenerates else rounds[-1]
    dataset.require_round(PAIRS, round)
    dataset.pairs(round).require_complete(f"dpkd-offline score-teacher --round {round}")
    return round


def within_context(config: TrainConfig, student: ModelInfo) -> TrainConfig:
    """The same, but no example is read that is longer than the student's context, whatever `max_length` is."""
    return config.model_copy(update={"max_length": min(config.max_length, student.context_length)})


def pair_stream(
    dataset: Dataset, config: TrainConfig, vocab_size: int, top_k: bool = False, behavior: bool = False
) -> tuple[Stream, int]:
    """Preference pairs (y_t, y_s) with the teacher's log-probs, and the round that they are of.

    Where the teacher's likeliest tokens are stored, held-out examples have them even if training does not read them.

    Args:
        vocab_size: that of the student, who must know every token.
        top_k: also read the teacher's likeliest tokens at each position.
        behavior: refuse pairs without log-probs under the student that sampled y_s, such as imported ones.

    Raises:
        DataError: there are no pairs, or not all, or they are damaged, or a column that is needed is empty.
    """
    round = chosen_round(dataset, config)
    source = pair_source(dataset, config, round, vocab_size, top_k, behavior)
    split, held_out = scan(source, config), None
    top = dataset.top_k(round)
    if split.held_out and not top_k and top.provenance() is not None and not top.pending():
        with_top = pair_source(dataset, config, round, vocab_size, True, behavior)
        held_out = HeldOutExamples(with_top, split.validation, split.held_out, checked=False)
    return Stream(source, split, config, held_out), round


def pair_source(
    dataset: Dataset, config: TrainConfig, round: int, vocab_size: int, top_k: bool, behavior: bool
) -> ExampleSource:
    """How pairs of a round that is complete are read; the arguments are those of `pair_stream`.

    Raises:
        DataError: what an objective needs is not stored.
    """
    table, top = dataset.pairs(round), dataset.top_k(round)
    provenance = table.require_provenance()
    by_text = provenance["scored"] == "text"
    unsampled = f"is empty, since no student sampled these responses; objective '{config.objective}' needs it"
    if behavior and provenance.get("student") is None:  # before top-k is asked for
        raise DataError(f"{table.folder}: column 'behavior_rejected_logps' {unsampled}")
    if top_k:
        top.require_complete(f"dpkd-offline score-teacher --round {round} --top-k K")
        of_top = top.require_provenance()
        k, share = of_top["top_k"], of_top.get("top_mass")

    def check(shard: int, tables: Sequence[pa.Table]) -> None:
        check_rows(tables[0], table.path(shard), vocab_size, by_text=by_text)
        if behavior:
            is_sampled = Lists(tables[0]["behavior_rejected_logps"]).lengths > 0
            expect(is_sampled, table.path(shard), "behavior_rejected_logps", unsampled)
        if top_k:
            check_same(tables[1], "id", tables[0]["id"], top.path(shard), f"the pair in {table.name}")
            check_top_k(tables[1], tables[0], top.path(shard), vocab_size, k, share)

    columns: list[tuple[Table[Any], list[str]]] = [(table, PAIR_COLUMNS), (top, TOP_COLUMNS)]
    examples = partial(_pair_examples, k=k if top_k else 0)
    return ExampleSource(columns[: 1 + top_k], check, partial(_faults_of_pairs, config), examples)


CUT_OFF = "cut off by length (--truncated drop)"


def _too_long(config: TrainConfig) -> str:
    return f"longer than {config.max_length} tokens (--max-length, or the context of the student)"


def _faults_of_pairs(config: TrainConfig, tables: Sequence[pa.Table]) -> dict[str, Mask]:
    """Pairs that are longer than `max_length`, and those that were cut off where such ones are dropped."""
    rows = tables[0]
    lengths = {c: Lists(rows[c]).lengths for c in ("prompt_ids", "chosen_ids", "rejected_ids")}
    longest = lengths["prompt_ids"] + np.maximum(lengths["chosen_ids"], lengths["rejected_ids"])
    faults = {_too_long(config): longest > config.max_length}
    if config.truncated == "drop":
        faults[CUT_OFF] = np.any(
            [pc.equal(rows[f"{side}_finish_reason"], "length").to_numpy() for side in SIDES], axis=0
        )
    return faults


def _pair_examples(tables: Sequence[pa.Table], k: int) -> Callable[[int], Example]:
    rows = tables[0]
    ids, prompts = rows["id"].to_pylist(), Lists(rows["prompt_ids"])
    responses = [Lists(rows[f"{side}_ids"]) for side in SIDES]
    teacher = [Lists(rows[f"teacher_{side}_logps"]) for side in SIDES]
    behavior = Lists(rows["behavior_rejected_logps"])
    top = [_top_by_row(Likeliest.of(tables[1], side, k)) for side in SIDES] if len(tables) > 1 else []

    def example(row: int) -> Example:
        return Example(
            ids[row],
            prompts[row],
            tuple(of[row] for of in responses),
            tuple(of[row] for of in teacher),
            ([], behavior[row]),
            tuple(of(row) for of in top),
        )

    return example


def _top_by_row(top: Likeliest) -> Callable[[int], Top]:
    """The likeliest tokens of one side, row by row."""
    starts, ids, logps = np.concatenate([[0], top.ends]), top.ids, top.read_logps
    return lambda row: (ids[starts[row] : starts[row + 1]], logps[starts[row] : starts[row + 1]])


def reference_stream(dataset: Dataset, config: TrainConfig, student: ModelInfo) -> Stream:
    """Prompts with their first reference, closed by what ends a turn, for the student's initial fine-tuning.

    That need not be the tokenizer's EOS (Gemma's is not). A student that was taught another end would close its y_s by
    it, and the teacher find that unlikely.

    Raises:
        DataError: the prompts are not complete, damaged, or hold a token that the student does not know.
    """
    prompts, tokenizer = prompts_for(dataset, student), _response_tokenizer(dataset, student)

    def reference_ids(rows: pa.Table) -> list[list[int]]:
        """The token ids of each first reference; none where there is no reference."""
        texts = [references[0] if references else "" for references in rows["references"].to_pylist()]
        encoded = tokenizer.continuations(rows["prompt"].to_pylist(), texts)
        for id_, ids in zip(rows["id"].to_pylist(), encoded, strict=True):
            check_known(f"prompt '{id_}': column 'references'", ids, student)
        return [[*ids, tokenizer.end] if text else [] for text, ids in zip(texts, encoded, strict=True)]

    def check(shard: int, tables: Sequence[pa.Table]) -> None:
        check_rows(tables[0], prompts.path(shard), student.vocab_size)

    def faults(tables: Sequence[pa.Table]) -> dict[str, Mask]:
        (rows,) = tables
        lengths = np.array(list(map(len, reference_ids(rows))))
        too_long = Lists(rows["prompt_ids"]).lengths + lengths > config.max_length
        return {"without a reference": lengths == 0, _too_long(config): too_long}

    def examples(tables: Sequence[pa.Table]) -> Callable[[int], Example]:
        (rows,) = tables
        ids, prompt_ids, references = rows["id"].to_pylist(), Lists(rows["prompt_ids"]), reference_ids(rows)
        return lambda row: Example(ids[row], prompt_ids[row], (references[row],))

    source = ExampleSource([(prompts, ["id", "prompt", "prompt_ids", "references"])], check, faults, examples)
    return Stream(source, scan(source, config), config)


def teacher_stream(dataset: Dataset, config: TrainConfig, student: ModelInfo) -> Stream:
    """Prompts with y_t alone, which needs no pairs: for a student that is to come near before it answers itself.

    A student that has another tokenizer than the teacher gets y_t by its text, with one of its own EOS behind what
    stopped.

    Raises:
        DataError: the teacher's responses are not complete, or damaged, or not of these prompts.
    """
    prompts, responses = prompts_for(dataset, student), dataset.responses("teacher", 0)
    responses.require_complete("dpkd-offline generate --role teacher")
    own = dataset.shares_tokenizer(student.tokenizer_fingerprint)
    tokenizer = None if own else _response_tokenizer(dataset, student)

    def response_ids(tables: Sequence[pa.Table]) -> list[list[int]]:
        asked, rows = tables
        if tokenizer is None:
            sampled: list[list[int]] = rows["response_ids"].to_pylist()
            return sampled
        texts, reasons = rows["response"].to_pylist(), rows["finish_reason"].to_pylist()
        encoded, _ = tokenizer.encode(asked["prompt"].to_pylist(), texts, reasons)
        for id_, ids in zip(rows["id"].to_pylist(), encoded, strict=True):
            check_known(f"prompt '{id_}': column 'response'", ids, student)
        return encoded

    def check(shard: int, tables: Sequence[pa.Table]) -> None:
        check_rows(tables[0], prompts.path(shard), student.vocab_size)
        check_rows(tables[1], responses.path(shard), student.vocab_size if own else None)
        check_same(tables[1], "id", tables[0]["id"], responses.path(shard), f"the prompt in {prompts.name}")

    def faults(tables: Sequence[pa.Table]) -> dict[str, Mask]:
        rows, y_t = tables
        lengths = Lists(rows["prompt_ids"]).lengths + np.array(list(map(len, response_ids(tables))))
        faulty = {_too_long(config): lengths > config.max_length}
        if config.truncated == "drop":
            faulty[CUT_OFF] = pc.equal(y_t["finish_reason"], "length").to_numpy()
        return faulty

    def examples(tables: Sequence[pa.Table]) -> Callable[[int], Example]:
        rows, _ = tables
        ids, prompt_ids, chosen = rows["id"].to_pylist(), Lists(rows["prompt_ids"]), response_ids(tables)
        return lambda row: Example(ids[row], prompt_ids[row], (chosen[row],))

    columns = ["id", "response", "response_ids", "finish_reason"]
    source = ExampleSource([(prompts, ["id", "prompt", "prompt_ids"]), (responses, columns)], check, faults, examples)
    return Stream(source, scan(source, config), config)


def _response_tokenizer(dataset: Dataset, student: ModelInfo) -> ResponseTokenizer:
    """How a student's tokens follow the prompts of `prompts_for`."""
    own, view = dataset.prompt_set, student_view(dataset, student)
    if view is not None:
        return ResponseTokenizer(view.model.tokenizer, view.template, student.eos_ids, view.arguments)
    tokenizer = student.with_chat_template(own.chat_template).tokenizer
    return ResponseTokenizer(tokenizer, own.template, student.eos_ids, own.template_args)


def corpus_blocks(texts: Callable[[], Iterator[str]], model: ModelInfo, length: int) -> Iterator[list[int]]:
    """Blocks of `length` tokens of a corpus, documents joined by EOS, over and over; D_p of Algorithm 1.

    Raises:
        DataError: the corpus is shorter than a block, or has a token that the model does not know.
    """
    tokenizer = model.tokenizer
    while True:
        tokens: list[int] = []
        is_empty = True
        for row, text in enumerate(texts(), start=1):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            check_known(f"lm-corpus: row {row}: column 'text'", ids, model)
            tokens += [*ids, tokenizer.eos_token_id]
            while len(tokens) >= length:
                yield tokens[:length]
                tokens, is_empty = tokens[length:], False
        if is_empty:
            raise DataError(f"lm-corpus: fewer than {length} tokens; take a larger corpus or a smaller --lm-length")
