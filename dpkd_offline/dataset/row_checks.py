"""Checks of the values of a table, each in one pass over whole columns."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from dpkd_offline.common.errors import DataError
from dpkd_offline.common.locations import Location
from dpkd_offline.dataset.columns import Lists, lists_of
from dpkd_offline.dataset.schema import COLUMNS, SIDES, Kind, Side, columns_of
from dpkd_offline.dataset.top_k import Likeliest, rounding

ROUNDING = 1e-4  # nats by which a log-prob may lie above zero
MASS_ROUNDING = 1e-3  # by which k probabilities in float32 may miss their sum, which is cut off at 1
FINISH_REASONS = ["stop", "length"]
TOKENS_OF: dict[Side | None, str] = {  # the column of each side's token ids
    column.side: name for name, column in COLUMNS.items() if column.kind is Kind.TOKEN_IDS
}

Mask = npt.NDArray[np.bool_]


def check_rows(
    rows: pa.Table,
    path: Location,
    vocab_size: int | None = None,
    rounds: tuple[int, int] | None = None,
    by_text: bool = False,
) -> None:
    """Raise DataError, naming the first row and column whose value cannot be.

    Args:
        rows: all columns of a table or some of them.
        path: the file that they come from.
        vocab_size: every token id must be smaller, where it is known.
        rounds: the first and the last that the column `round` may say.
        by_text: of pairs, whether the teacher's log-probs are of its own tokens of the same text.
    """
    lists = lists_of(rows)
    for name in columns_of(lists, Kind.TOKEN_IDS):
        _check_token_ids(lists[name], path, name, vocab_size)
    for name in columns_of(lists, Kind.LOGPS):
        _check_logps(lists, path, name, by_text)
    for name in rows.column_names:
        kind = COLUMNS[name].kind
        if kind is Kind.FINISH_REASON:
            known = pc.is_in(rows[name], pa.array(FINISH_REASONS)).to_numpy()
            expect(known, path, name, "is neither 'stop' nor 'length'")
        elif kind is Kind.EXACT and not by_text:
            exact = rows[name].combine_chunks().to_numpy(zero_copy_only=False)
            expect(exact, path, name, "is false, though the tokens themselves were scored")
        elif kind is Kind.ROUND and rounds is not None:
            (first, last), values = rounds, rows[name].to_numpy()
            allowed = f"{last}" if first == last else f"from {first} to {last}"
            expect((first <= values) & (values <= last), path, name, f"is not {allowed}, the folder's")


def _check_token_ids(tokens: Lists, path: Location, column: str, vocab_size: int | None) -> None:
    expect(tokens.lengths > 0, path, column, "is empty")
    expect_elements(tokens, tokens.values >= 0, path, column, "holds a negative token id")
    if vocab_size is not None:
        message = f"holds a token id that a vocabulary of {vocab_size} has not"
        expect_elements(tokens, tokens.values < vocab_size, path, column, message)


def _check_logps(lists: dict[str, Lists], path: Location, column: str, by_text: bool) -> None:
    """Raise DataError unless there is one log-prob for each token, where the tokens that were scored are known."""
    logps, of_teacher = lists[column], COLUMNS[column].model == "teacher"
    if not of_teacher and not len(logps.values):
        return  # of a teacher, which score-teacher scores by prefill, or of responses that were imported
    if by_text and of_teacher:
        expect(logps.lengths > 0, path, column, "is empty")
    else:
        tokens = TOKENS_OF[COLUMNS[column].side]
        same = logps.lengths == lists[tokens].lengths
        expect(same, path, column, f"has not one log-prob per token of {tokens}")
    expect_elements(logps, np.isfinite(logps.values), path, column, "holds a log-prob that is not finite")
    expect_elements(logps, logps.values <= ROUNDING, path, column, "holds a positive log-prob")


def check_ends(rows: pa.Table, path: Location, eos_token_ids: Collection[int]) -> None:
    """Raise DataError unless exactly the responses that stopped end with an EOS."""
    tokens = Lists(rows["response_ids"])
    ended = np.isin(tokens.values[tokens.ends - 1], list(eos_token_ids))
    stopped = pc.equal(rows["finish_reason"], "stop").to_numpy()
    expect(ended | ~stopped, path, "finish_reason", "is 'stop', but the last token is no EOS")
    expect(stopped | ~ended, path, "finish_reason", "is 'length', but the last token is an EOS")


def check_top_k(
    rows: pa.Table, pairs: pa.Table, path: Location, vocab_size: int, k: int, share: float | None = None
) -> None:
    """Raise DataError unless each position of the pairs' responses has k tokens, likeliest first, and their mass.

    Args:
        share: of the probability; a position has as few of the k as cover it, where it is given.
    """
    for side in SIDES:
        tokens = Lists(pairs[f"{side}_ids"])
        columns = {name: f"{side}_top_{name}" for name in ("ids", "logps", "mass")}
        outer = {name: rows[column].combine_chunks() for name, column in columns.items()}
        for name, column in columns.items():
            same = pc.list_value_length(outer[name]).to_numpy() == tokens.lengths
            expect(same, path, column, f"has not one entry per token of {side}_ids")
        counts, of_logps = (pc.list_value_length(outer[name].flatten()).to_numpy() for name in ("ids", "logps"))
        as_many = (counts == k) if share is None else (counts >= 1) & (counts <= k)
        wanted = f"has not {k} entries" if share is None else f"has not 1 to {k} entries"
        expect_elements(tokens, as_many, path, columns["ids"], f"{wanted} at each position")
        expect_elements(tokens, of_logps == counts, path, columns["logps"], f"{wanted} at each position")
        top = Likeliest.of(rows, side, k)
        for name, good, message in _checks_of_tokens(top, vocab_size):
            expect_elements(tokens, good, path, columns[name], message)
        if share is not None:
            expect_elements(
                tokens, _covers(top, k, share), path, columns["mass"], f"is below {share:g}, with fewer than K"
            )


def _checks_of_tokens(top: Likeliest, vocab_size: int) -> list[tuple[str, Mask, str]]:
    """What is checked of which column, for each position."""
    is_stored, places = top.is_stored, np.arange(top.ids.shape[1])
    ids = np.where(is_stored, top.ids, -1 - places)
    logps = top.logps.astype(np.float64)
    known = ((ids >= 0) & (ids < vocab_size) | ~is_stored).all(-1)
    distinct = (np.diff(np.sort(ids)) > 0).all(-1)
    possible = (np.isfinite(logps) & (logps <= ROUNDING)).all(-1)
    with np.errstate(all="ignore"):  # of log-probs that are not possible
        ordered = (np.diff(logps) <= 0).all(-1)
        probabilities = np.exp(logps)
        off = np.full(len(top.mass), MASS_ROUNDING)
        if top.logps.dtype == np.float16:  # a reader shifts by what they are off, which must be what rounding can do
            off = off * top.mass + (probabilities * np.expm1(rounding(top.logps))).sum(-1)
        covered = np.abs(probabilities.sum(-1) - top.mass) <= off
    return [
        ("ids", known, f"holds a token id that a vocabulary of {vocab_size} has not"),
        ("ids", distinct, "names a token twice at a position"),
        ("logps", possible, "holds a log-prob that is positive or not finite"),
        ("logps", ordered, "is not in order, likeliest first"),
        ("mass", covered, "is not the sum of its tokens' probabilities"),
        ("mass", top.mass > 0, "is not above 0"),
        ("mass", top.mass <= 1 + MASS_ROUNDING, "is more than 1"),
    ]


def _covers(top: Likeliest, k: int, share: float) -> Mask:
    """Whether the tokens of each position are k, or cover the share but for rounding."""
    covers: Mask = (top.is_stored.sum(-1) == k) | (top.mass >= share * (1 - 1e-6))
    return covers


def check_same(rows: pa.Table, column: str, original: pa.ChunkedArray, path: Location, of: str) -> None:
    """Raise DataError unless a column equals, row by row, the one that it was made of, which is that of `of`."""
    copy, message = rows[column], f"is not that of {of}"
    if copy.equals(original):
        return
    if not pa.types.is_list(copy.type) or not pa.types.is_primitive(copy.type.value_type):
        pairs = zip(copy.to_pylist(), original.to_pylist(), strict=True)
        expect(np.asarray([a == b for a, b in pairs]), path, column, message)
        return
    copied, expected = Lists(copy), Lists(original)
    expect(copied.lengths == expected.lengths, path, column, message)
    expect_elements(copied, copied.values == expected.values, path, column, message)


def expect(good: Mask, path: Location, column: str, message: str) -> None:
    """Raise DataError for the first row [N] that is not good."""
    if not good.all():
        raise DataError(f"{path}: row {good.argmin()}: column '{column}' {message}")


def expect_elements(lists: Lists, good: Any, path: Location, column: str, message: str) -> None:
    """Raise DataError for the first row that holds an element that is not good."""
    if not good.all():
        raise DataError(f"{path}: row {lists.row_of(good.argmin())}: column '{column}' {message}")
