"""Can the values of a table be what they are said to be? Every check is one pass over whole columns."""

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

ROUNDING = 1e-4  # nats by which a log-prob may lie above zero
MASS_ROUNDING = 1e-3  # by which k probabilities in float32 may miss their sum, which is cut off at 1
FINISH_REASONS = ["stop", "length"]
TOKENS_OF = {  # a column of log-probs, and the tokens that they are of
    "logps": "response_ids",
    "teacher_chosen_logps": "chosen_ids",
    "teacher_rejected_logps": "rejected_ids",
    "behavior_rejected_logps": "rejected_ids",
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
    for column, tokens in lists.items():
        if column.endswith("_ids"):
            expect(tokens.lengths > 0, path, column, "is empty")
            expect_elements(tokens, tokens.values >= 0, path, column, "holds a negative token id")
            if vocab_size is not None:
                message = f"holds a token id that a vocabulary of {vocab_size} has not"
                expect_elements(tokens, tokens.values < vocab_size, path, column, message)
    for column, of in TOKENS_OF.items():
        if column in lists:
            logps, same = lists[column], lists[column].lengths == lists[of].lengths
            if not column.startswith("teacher_") and not len(logps.values):
                continue  # of a teacher, which score-teacher scores by prefill, or of responses that were imported
            if by_text and column.startswith("teacher_"):
                expect(logps.lengths > 0, path, column, "is empty")
            else:
                expect(same, path, column, f"has not one log-prob per token of {of}")
            expect_elements(logps, np.isfinite(logps.values), path, column, "holds a log-prob that is not finite")
            expect_elements(logps, logps.values <= ROUNDING, path, column, "holds a positive log-prob")
    for column in rows.column_names:
        if column.endswith("finish_reason"):
            known = pc.is_in(rows[column], pa.array(FINISH_REASONS)).to_numpy()
            expect(known, path, column, "is neither 'stop' nor 'length'")
        elif column.endswith("_exact") and not by_text:
            exact = rows[column].combine_chunks().to_numpy(zero_copy_only=False)
            expect(exact, path, column, "is false, though the tokens themselves were scored")
        elif column == "round" and rounds is not None:
            (first, last), found = rounds, rows[column].to_numpy()
            message = (
                f"is not {last}, the folder's" if first == last else f"is not from {first} to {last}, the folder's"
            )
            expect((first <= found) & (found <= last), path, column, message)


def check_ends(rows: pa.Table, path: Location, eos_token_ids: Collection[int]) -> None:
    """Raise DataError unless exactly the responses that stopped end with an EOS."""
    tokens = Lists(rows["response_ids"])
    ended = np.isin(tokens.values[tokens.ends - 1], list(eos_token_ids))
    stopped = pc.equal(rows["finish_reason"], "stop").to_numpy()
    expect(ended | ~stopped, path, "finish_reason", "is 'stop', but the last token is no EOS")
    expect(stopped | ~ended, path, "finish_reason", "is 'length', but the last token is an EOS")


def check_top_k(rows: pa.Table, pairs: pa.Table, path: Location, vocab_size: int, k: int) -> None:
    """Raise DataError unless each position of the pairs' responses has k tokens, likeliest first, and their mass."""
    for side in ("chosen", "rejected"):
        tokens = Lists(pairs[f"{side}_ids"])
        outer = {name: rows[f"{side}_top_{name}"].combine_chunks() for name in ("ids", "logps", "mass")}
        for name, column in outer.items():
            same = pc.list_value_length(column).to_numpy() == tokens.lengths
            expect(same, path, f"{side}_top_{name}", f"has not one entry per token of {side}_ids")
        for name in ("ids", "logps"):
            inner = pc.list_value_length(outer[name].flatten()).to_numpy() == k
            expect_elements(tokens, inner, path, f"{side}_top_{name}", f"has not {k} entries at each position")
        ids, logps = (outer[name].flatten().flatten().to_numpy().reshape(-1, k) for name in ("ids", "logps"))
        mass = outer["mass"].flatten().to_numpy()
        known = ((ids >= 0) & (ids < vocab_size)).all(-1)
        expect_elements(
            tokens, known, path, f"{side}_top_ids", f"holds a token id that a vocabulary of {vocab_size} has not"
        )
        once = (np.diff(np.sort(ids, axis=-1), axis=-1) > 0).all(-1)
        expect_elements(tokens, once, path, f"{side}_top_ids", "names a token twice at a position")
        possible = (np.isfinite(logps) & (logps <= ROUNDING)).all(-1)
        expect_elements(tokens, possible, path, f"{side}_top_logps", "holds a log-prob that is positive or not finite")
        ordered = (np.diff(logps, axis=-1) <= 0).all(-1)
        expect_elements(tokens, ordered, path, f"{side}_top_logps", "is not in order, likeliest first")
        covered = np.abs(np.exp(logps).sum(-1) - mass) <= MASS_ROUNDING
        expect_elements(tokens, covered, path, f"{side}_top_mass", "is not the sum of its tokens' probabilities")
        expect_elements(tokens, mass <= 1 + MASS_ROUNDING, path, f"{side}_top_mass", "is more than 1")


def check_same(rows: pa.Table, column: str, there: pa.ChunkedArray, path: Location, of: str) -> None:
    """Raise DataError unless a column equals, row by row, the one that it was made of."""
    here = rows[column]
    if here.equals(there):
        return
    if not pa.types.is_list(here.type) or not pa.types.is_primitive(here.type.value_type):
        same = np.asarray([a == b for a, b in zip(here.to_pylist(), there.to_pylist(), strict=True)], dtype=np.bool_)
        expect(same, path, column, f"is not that of {of}")
        return
    mine, other = Lists(here), Lists(there)
    expect(mine.lengths == other.lengths, path, column, f"is not that of {of}")
    expect_elements(mine, mine.values == other.values, path, column, f"is not that of {of}")


def expect(good: Mask, path: Location, column: str, message: str) -> None:
    """Raise DataError for the first row [N] that is not good."""
    if not good.all():
        raise DataError(f"{path}: row {good.argmin()}: column '{column}' {message}")


def expect_elements(lists: Lists, good: Any, path: Location, column: str, message: str) -> None:
    """Raise DataError for the first row that holds an element that is not good."""
    if not good.all():
        raise DataError(f"{path}: row {lists.row_of(good.argmin())}: column '{column}' {message}")
