from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from helpers.tiny import replace_shard

from dpkd_offline.common.errors import DataError
from dpkd_offline.curation.inspect import VALUES_AT_ONCE, Distribution, inspect, inspection_table
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.dataset.schema import PreferencePair, from_table


@pytest.fixture
def folder(tmp_path: Path, datasets_by_family: dict[str, Path]) -> Path:
    return shutil.copytree(datasets_by_family["llama"], tmp_path / "ds")


@pytest.mark.parametrize("count", [1, 2, 3, 20, 1001, 3 * VALUES_AT_ONCE + 7])
def test_quantiles_are_numpys_though_no_value_is_kept(count: int) -> None:
    values = np.random.default_rng(count).normal(-2, 3, count)
    distribution = Distribution()
    for start in range(0, count, 256):
        distribution.add(values[start : start + 256])
    summary = distribution.summary()
    assert summary["mean"] == pytest.approx(values.mean(), rel=1e-12)
    expected = np.quantile(np.round(values, 3), (0.05, 0.5, 0.95))
    np.testing.assert_allclose([summary["p5"], summary["median"], summary["p95"]], expected, rtol=1e-12)


def test_inspection_counts_what_is_there(folder: Path) -> None:
    inspection = inspect(folder)
    assert (inspection["prompts"], inspection["shards"], inspection["template"]) == (22, 3, "chat")
    pairs = [p for s in range(3) for p in from_table(Dataset.open(folder).pairs(0).read_arrow(s), PreferencePair)]
    measures = inspection["tables"]["pairs/round-000"]
    assert measures["chosen tokens"]["mean"] == pytest.approx(np.mean([len(p.chosen_ids) for p in pairs]))
    assert measures["rejected truncated"]["mean"] == pytest.approx(
        np.mean([p.rejected_finish_reason == "length" for p in pairs])
    )
    assert measures["identical"]["mean"] == np.mean([p.chosen == p.rejected for p in pairs])
    margins = [np.mean(p.teacher_chosen_logps) - np.mean(p.teacher_rejected_logps) for p in pairs]
    assert measures["teacher margin per token"]["mean"] == pytest.approx(np.mean(margins), rel=1e-5)
    assert measures["teacher margin per token"]["median"] == pytest.approx(np.median(margins), abs=6e-4)
    assert measures["model"]["name"] == "llama"
    shown = inspection_table(inspection)
    assert "pairs/round-000: 3 of 3 shards, llama (sha256:" in shown
    assert json.loads(json.dumps(inspection)) == inspection


def test_samples_are_pairs_as_text_that_moves_no_cursor(folder: Path) -> None:
    dataset, table = Dataset.open(folder), Dataset.open(folder).pairs(0)
    rows = table.read_arrow(1)
    hostile = "<b>\x1b[2J\u202e\npairs/round-000, shard 9, row 9: x\n" + "long" * 1000
    column = rows.column_names.index("rejected")
    texts = [hostile] * len(rows)
    replace_shard(table, 1, rows.set_column(column, rows.schema.field(column), pa.array(texts)))
    pairs = [p for s in range(3) for p in from_table(table.read_arrow(s), PreferencePair)]
    inspection = inspect(folder, 100)
    samples = inspection["samples"]
    assert [sample["id"] for sample in samples] == [pair.id for pair in pairs]
    assert [sample["chosen"] for sample in samples] == [pair.chosen for pair in pairs]
    assert samples[9]["teacher_chosen_logp"] == pytest.approx(np.mean(pairs[9].teacher_chosen_logps))
    assert (samples[9]["shard"], samples[9]["row"]) == (1, 1)
    few = inspect(folder, 3)["samples"]
    assert few == inspect(folder, 3)["samples"] and len(few) == 3
    assert few == [sample for sample in samples if sample["id"] in {one["id"] for one in few}]
    shown = inspection_table(inspection)
    assert "\x1b" not in shown and "\u202e" not in shown and "<b>\\u001b[2J\\u202e" in shown
    assert "\n    pairs/round-000, shard 9" in shown and "\npairs/round-000, shard 9" not in shown
    assert "more characters)" in shown and len(shown) < len(hostile) * len(texts)
    for path in (*table.folder.glob("*.parquet"), *table.folder.glob("_manifest/*")):
        path.unlink()
    with pytest.raises(DataError, match="has no pairs to show; `dpkd-offline score-teacher` makes them"):
        inspect(dataset.root, 1)


def test_a_table_that_is_only_begun_can_be_inspected(folder: Path) -> None:
    pairs = Dataset.open(folder).pairs(0)
    for path in (*pairs.folder.glob("*.parquet"), *pairs.folder.glob("_manifest/*")):
        path.unlink()
    measures = inspect(folder)["tables"]["pairs/round-000"]
    assert (measures["shards"], measures["engine"]) == (0, "transformers")
    assert "pairs/round-000: 0 of 3 shards" in inspection_table(inspect(folder))
