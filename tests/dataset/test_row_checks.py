"""What a wrong value in a shard is answered with, line by line, and which values are just right."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from dpkd_offline.common.errors import DataError
from dpkd_offline.dataset.row_checks import check_ends, check_rows, check_same, check_top_k
from dpkd_offline.dataset.schema import (
    HALF_TOP_LOGPS,
    MESSAGES,
    STRINGS,
    TOKEN_IDS,
    TOP_IDS,
    PreferencePair,
    Response,
    TopK,
    schema_with,
    to_table,
)

pytestmark = pytest.mark.filterwarnings("error")  # a wrong value is told of in one line, and in no warning of numpy's
PATH = Path("shard.parquet")
VOCABULARY = 9
NAN, INF = math.nan, math.inf


def line_of(check: Callable[..., None], *arguments: Any, **options: Any) -> str:
    with pytest.raises(DataError) as error:
        check(*arguments, **options)
    return str(error.value)


# --- values of pairs and responses ----------------------------------------------------------------------------------

PAIR = PreferencePair(
    id="a",
    prompt="x",
    prompt_ids=[3, 4],
    reference=None,
    chosen="y",
    chosen_ids=[5, 1],
    chosen_finish_reason="stop",
    rejected="z",
    rejected_ids=[6, 7, 8],
    rejected_finish_reason="length",
    teacher_chosen_logps=[-1.0, -2.0],
    teacher_rejected_logps=[-1.0, -0.5, -2.0],
    chosen_exact=True,
    rejected_exact=True,
    behavior_rejected_logps=[-1.0, -1.0, -1.0],
    round=1,
)


def pairs(**changes: Any) -> pa.Table:
    """Three pairs; the second has other values."""
    return to_table([PAIR, replace(PAIR, **changes), PAIR], PreferencePair.schema)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_ids": []}, "column 'prompt_ids' is empty"),
        ({"rejected_ids": [6, -1, 8]}, "column 'rejected_ids' holds a negative token id"),
        ({"chosen_ids": [9, 1]}, "column 'chosen_ids' holds a token id that a vocabulary of 9 has not"),
        ({"teacher_chosen_logps": []}, "column 'teacher_chosen_logps' has not one log-prob per token of chosen_ids"),
        (
            {"behavior_rejected_logps": [-1.0] * 4},
            "column 'behavior_rejected_logps' has not one log-prob per token of rejected_ids",
        ),
        ({"teacher_chosen_logps": [-1.0, NAN]}, "column 'teacher_chosen_logps' holds a log-prob that is not finite"),
        ({"teacher_chosen_logps": [-INF, -1.0]}, "column 'teacher_chosen_logps' holds a log-prob that is not finite"),
        ({"teacher_chosen_logps": [1.01e-4, -1.0]}, "column 'teacher_chosen_logps' holds a positive log-prob"),
        ({"rejected_finish_reason": "tired"}, "column 'rejected_finish_reason' is neither 'stop' nor 'length'"),
        ({"chosen_exact": False}, "column 'chosen_exact' is false, though the tokens themselves were scored"),
        ({"round": -1}, "column 'round' is not from 0 to 2, the folder's"),
        ({"round": 3}, "column 'round' is not from 0 to 2, the folder's"),
    ],
)
def test_a_value_that_cannot_be_is_placed(changes: dict[str, Any], message: str) -> None:
    assert line_of(check_rows, pairs(**changes), PATH, VOCABULARY, (0, 2)) == f"shard.parquet: row 1: {message}"


def test_a_round_that_is_the_only_one_is_named() -> None:
    check_rows(pairs(), PATH, rounds=(1, 1))
    line = line_of(check_rows, pairs(round=2), PATH, rounds=(1, 1))
    assert line == "shard.parquet: row 1: column 'round' is not 1, the folder's"


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt_ids": [0, 8]},  # the first and the last of the vocabulary
        {"teacher_chosen_logps": [0.0, 1e-4]},  # of a token that is certain, in float32
        {"round": 0},
        {"round": 2},
    ],
)
def test_a_value_at_its_bound_is_allowed(changes: dict[str, Any]) -> None:
    check_rows(pairs(**changes), PATH, VOCABULARY, (0, 2))


def test_by_text_the_teacher_has_log_probs_of_its_own_tokens() -> None:
    rows = pairs(teacher_chosen_logps=[-1.0], teacher_rejected_logps=[-1.0] * 5, rejected_exact=False)
    check_rows(rows, PATH, VOCABULARY, by_text=True)
    for changes, message in (
        ({"teacher_chosen_logps": []}, "column 'teacher_chosen_logps' is empty"),
        ({"teacher_rejected_logps": [0.5]}, "column 'teacher_rejected_logps' holds a positive log-prob"),
        (
            {"behavior_rejected_logps": [-1.0]},
            "column 'behavior_rejected_logps' has not one log-prob per token of rejected_ids",
        ),
    ):
        line = line_of(check_rows, pairs(**changes), PATH, VOCABULARY, by_text=True)
        assert line == f"shard.parquet: row 1: {message}"


def test_only_log_probs_under_who_sampled_may_be_of_no_row() -> None:
    imported = replace(PAIR, behavior_rejected_logps=[])
    check_rows(to_table([imported] * 3, PreferencePair.schema), PATH, VOCABULARY)
    unscored = replace(PAIR, teacher_chosen_logps=[])
    line = line_of(check_rows, to_table([unscored] * 3, PreferencePair.schema), PATH, VOCABULARY)
    assert line == ("shard.parquet: row 0: column 'teacher_chosen_logps' has not one log-prob per token of chosen_ids")


def test_exactly_the_responses_that_stopped_end_with_an_eos() -> None:
    def responses(ids: list[int], reason: Any) -> pa.Table:
        rows = [([1, 5, 1], "stop"), ([5], "length"), (ids, reason), ([2], "stop")]
        return to_table([Response("a", "y", *row, [], 0) for row in rows], Response.schema)

    check_ends(responses([1, 2, 5], "length"), PATH, (1, 2))
    assert line_of(check_ends, responses([1, 2, 5], "stop"), PATH, (1, 2)) == (
        "shard.parquet: row 2: column 'finish_reason' is 'stop', but the last token is no EOS"
    )
    assert line_of(check_ends, responses([5, 2], "length"), PATH, (1, 2)) == (
        "shard.parquet: row 2: column 'finish_reason' is 'length', but the last token is an EOS"
    )


# --- the same in two tables -----------------------------------------------------------------------------------------


def turn(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


@pytest.mark.parametrize(
    ("type_", "original", "row", "other"),
    [
        (pa.string(), ["a", "b", "c"], 1, "d"),
        (pa.string(), ["a", None, "c"], 1, ""),
        (pa.int32(), [0, 1, 2], 2, 0),
        (STRINGS, [["a"], [], ["b", "c"]], 2, ["b", "d"]),
        (MESSAGES, [[], [turn("a")], []], 1, [turn("b")]),
        (TOKEN_IDS, [[1, 2], [3, 4, 5], [6]], 1, [3, 7, 5]),
        (TOKEN_IDS, [[1, 2], [3, 4, 5], [6]], 1, [3, 4]),
        (TOP_IDS, [[[1, 2], [3]], [[4]], [[5], [6]]], 0, [[1], [2, 3]]),
    ],
    ids=["text", "null", "numbers", "texts", "turns", "token ids", "fewer token ids", "lists of lists"],
)
def test_a_copy_that_differs_is_placed(type_: pa.DataType, original: list[Any], row: int, other: Any) -> None:
    first, *rest = (pa.array([value], type_) for value in original)
    of = pa.chunked_array([first, pa.concat_arrays(rest)])
    check_same(pa.table({"it": pa.array(original, type_)}), "it", of, PATH, "pairs")
    copy = pa.table({"it": pa.array([*original[:row], other, *original[row + 1 :]], type_)})
    assert line_of(check_same, copy, "it", of, PATH, "pairs") == (
        f"shard.parquet: row {row}: column 'it' is not that of pairs"
    )


# --- the teacher's likeliest tokens ---------------------------------------------------------------------------------

K = 3
POSITION = ([0, 7, 8], [math.log(0.5), math.log(0.25), math.log(0.125)], 0.875)
SCHEMAS = {
    "float32": TopK.schema,
    "half": schema_with(TopK, {f"{s}_top_logps": str(HALF_TOP_LOGPS) for s in ("chosen", "rejected")}),
}
Position = tuple[list[int], list[float], float]


def row_of(chosen: list[Position], rejected: list[Position]) -> TopK:
    return TopK("a", *map(list, zip(*chosen, strict=True)), *map(list, zip(*rejected, strict=True)))


def check_position(schema: str, share: float | None, *position: Any) -> None:
    """Check rows of which one has other tokens at its last position."""
    whole, changed = row_of([POSITION] * 2, [POSITION] * 3), row_of([POSITION] * 2, [POSITION, POSITION, position])
    check_top_k(to_table([whole, changed, whole], SCHEMAS[schema]), pairs(), PATH, VOCABULARY, K, share)


@pytest.mark.parametrize("schema", SCHEMAS)
@pytest.mark.parametrize(
    ("share", "position", "name", "message"),
    [
        (None, (POSITION[0][:2], *POSITION[1:]), "ids", "has not 3 entries at each position"),
        (None, ([0], [0.0], 1.0), "ids", "has not 3 entries at each position"),
        (None, (POSITION[0], [0.0], 1.0), "logps", "has not 3 entries at each position"),
        (0.5, ([], [], 0.0), "ids", "has not 1 to 3 entries at each position"),
        (0.5, ([0, 1, 2, 3], *POSITION[1:]), "ids", "has not 1 to 3 entries at each position"),
        (0.5, ([0, 7], *POSITION[1:]), "logps", "has not 1 to 3 entries at each position"),
        (None, ([9, 7, 8], *POSITION[1:]), "ids", "holds a token id that a vocabulary of 9 has not"),
        (0.5, ([-1], [0.0], 1.0), "ids", "holds a token id that a vocabulary of 9 has not"),
        (None, ([7, 8, 7], *POSITION[1:]), "ids", "names a token twice at a position"),
        (None, (POSITION[0], [1.01e-4, -9.0, -9.0], 1.0), "logps", "holds a log-prob that is positive or not finite"),
        (None, (POSITION[0], [-1.0, -INF, -INF], 0.5), "logps", "holds a log-prob that is positive or not finite"),
        (0.5, ([5, 6], [NAN, -1.0], 0.5), "logps", "holds a log-prob that is positive or not finite"),
        (
            None,
            (POSITION[0], [math.log(0.5), math.log(0.125), math.log(0.25)], 0.875),
            "logps",
            "is not in order, likeliest first",
        ),
        (None, (*POSITION[:2], 0.8766), "mass", "is not the sum of its tokens' probabilities"),
        (None, (*POSITION[:2], NAN), "mass", "is not the sum of its tokens' probabilities"),
        (None, (POSITION[0], [-9000.0] * 3, 0.0), "mass", "is not above 0"),
        (None, (POSITION[0], [0.0, -7.0, -8.0], 1.0015), "mass", "is more than 1"),
        (0.9, ([7, 8], POSITION[1][:2], 0.75), "mass", "is below 0.9, with fewer than K"),
        (0.75, ([7, 8], POSITION[1][:2], 0.75 * (1 - 2e-6)), "mass", "is below 0.75, with fewer than K"),
    ],
)
def test_likeliest_tokens_that_cannot_be_are_placed(
    share: float | None, position: Position, name: str, message: str, schema: str
) -> None:
    line = line_of(check_position, schema, share, *position)
    assert line == f"shard.parquet: row 1: column 'rejected_top_{name}' {message}"


@pytest.mark.parametrize("schema", SCHEMAS)
@pytest.mark.parametrize(
    ("share", "position"),
    [
        (None, POSITION),
        (0.9, POSITION),  # less than the share, by all K tokens
        (0.75, ([7, 8], POSITION[1][:2], 0.75)),
        (0.75, ([7, 8], POSITION[1][:2], 0.75 * (1 - 1e-6))),  # but for rounding
        (0.5, ([0], [math.log(0.5)], 0.5)),
        (0.5, ([0], [5e-5], 1.001)),  # of a token that is certain, in float32
    ],
)
def test_likeliest_tokens_at_their_bounds_are_allowed(share: float | None, position: Position, schema: str) -> None:
    check_position(schema, share, *position)


def test_the_mass_is_off_by_no_more_than_its_type_allows() -> None:
    """In half precision that is what rounding can do to these log-probs, since a reader shifts them by it."""
    position = ([0], [math.log(0.1)], 0.1009)
    check_position("float32", 0.05, *position)
    assert line_of(check_position, "half", 0.05, *position) == (
        "shard.parquet: row 1: column 'rejected_top_mass' is not the sum of its tokens' probabilities"
    )
    logp = -8 - 2**-8  # midway between two numbers of half precision, of which -8 is taken
    assert np.float16(logp) == -8
    check_position("half", 1e-4, [0], [logp], math.exp(logp))
    with pytest.raises(DataError, match="is not the sum"):
        check_position("half", 1e-4, [0], [logp], math.exp(logp - 2**-8))


@pytest.mark.parametrize("side", ["chosen", "rejected"])
@pytest.mark.parametrize("name", ["ids", "logps", "mass"])
def test_likeliest_tokens_have_an_entry_for_each_token(side: str, name: str) -> None:
    whole, column = row_of([POSITION] * 2, [POSITION] * 3), f"{side}_top_{name}"
    changed = replace(whole, **{column: getattr(whole, column)[1:]})
    rows = to_table([whole, changed, whole], TopK.schema)
    assert line_of(check_top_k, rows, pairs(), PATH, VOCABULARY, K) == (
        f"shard.parquet: row 1: column '{column}' has not one entry per token of {side}_ids"
    )
