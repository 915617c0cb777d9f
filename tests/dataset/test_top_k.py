"""How the likeliest tokens of a shard lie in matrices, and which numbers training reads of them."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest

from dpkd_offline.dataset.schema import HALF_TOP_LOGPS, LOGPS, SHORT_TOP_IDS, TOP_IDS, TOP_LOGPS
from dpkd_offline.dataset.top_k import LEAST_HALF, NOT_STORED, Likeliest, compact_columns, rounding

K = 3
WHOLE = [[[0, 7, 8], [1, 2, 3]], [[65535, 4, 5]]]  # of two rows, [T][k]
CUT = [[[0, 7, 8], [1]], [[65535, 4]]]
PROBABILITIES = [0.5, 0.25, 0.125]


def columns_of(ids: list[list[list[int]]], ids_type: pa.DataType, logps_type: pa.DataType) -> pa.Table:
    """The columns of y_t, of tokens whose probabilities are halves of halves; the mass is what these give."""
    logps = [[[math.log(p) for p in PROBABILITIES[: len(of)]] for of in row] for row in ids]
    mass = [[sum(PROBABILITIES[: len(of)]) for of in row] for row in ids]
    arrays = {"ids": pa.array(ids, ids_type), "logps": pa.array(logps, logps_type), "mass": pa.array(mass, LOGPS)}
    return pa.table({f"chosen_top_{name}": array for name, array in arrays.items()})


@pytest.mark.parametrize("types", [(TOP_IDS, TOP_LOGPS), (SHORT_TOP_IDS, HALF_TOP_LOGPS)], ids=["float32", "half"])
@pytest.mark.parametrize("ids", [WHOLE, CUT], ids=["whole", "cut"])
def test_positions_lie_after_one_another(ids: list[list[list[int]]], types: tuple[pa.DataType, pa.DataType]) -> None:
    top = Likeliest.of(columns_of(ids, *types), "chosen", K)
    positions = [of for row in ids for of in row]
    assert top.ends.tolist() == [2, 3]
    assert top.ids.dtype == np.int32
    assert top.ids.tolist() == [of + [-1] * (K - len(of)) for of in positions]
    assert top.is_stored.tolist() == [[n < len(of) for n in range(K)] for of in positions]
    assert top.mass.tolist() == [sum(PROBABILITIES[: len(of)]) for of in positions]
    stored = np.array([math.log(p) for p in PROBABILITIES], types[1].value_type.value_type.to_pandas_dtype())
    assert top.logps.dtype == stored.dtype
    assert top.logps.tolist() == [[*stored[: len(of)].tolist(), *[NOT_STORED] * (K - len(of))] for of in positions]

    read = top.read_logps
    assert read.dtype == np.float32
    for of, probabilities in zip(positions, np.exp(read.astype(np.float64)), strict=True):
        assert probabilities.tolist() == pytest.approx([*PROBABILITIES[: len(of)], *[0.0] * (K - len(of))], rel=2**-9)
        assert math.fsum(probabilities) == pytest.approx(sum(PROBABILITIES[: len(of)]), rel=2e-7)  # the mass again


def test_ids_are_short_where_16_bits_name_the_whole_vocabulary() -> None:
    halves = {"chosen_top_logps": str(HALF_TOP_LOGPS), "rejected_top_logps": str(HALF_TOP_LOGPS)}
    short = {"chosen_top_ids": str(SHORT_TOP_IDS), "rejected_top_ids": str(SHORT_TOP_IDS)}
    assert compact_columns(400) == compact_columns(65536) == {**halves, **short}
    assert compact_columns(65537) == halves


@pytest.mark.filterwarnings("error")
def test_rounding_is_half_a_step_of_half_precision() -> None:
    halves = np.array([-1.0, -1.5, -2.0, -1000.0, 0.0], np.float16)
    steps = [2**-10, 2**-10, 2**-9, 0.5, 2**-24]  # 10 bits behind the first one; 2⁻²⁴ is the least number
    assert rounding(halves).tolist() == [step / 2 for step in steps]
    assert np.isnan(rounding(np.array([math.nan], np.float16))).all()  # refused elsewhere, without a warning


@pytest.mark.filterwarnings("error")
def test_rounding_to_the_largest_number_of_half_precision_is_finite() -> None:
    """It is stored in the manifest, which holds no infinity."""
    largest = np.array([LEAST_HALF, LEAST_HALF + 10], np.float32).astype(np.float16)
    assert largest.tolist() == [LEAST_HALF] * 2
    assert rounding(largest).tolist() == [16.0, 16.0]
