"""Datasets of every version of the format, as the release of that time wrote them: later ones must read them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dpkd_offline.common.errors import MismatchError
from dpkd_offline.common.hashing import fingerprint
from dpkd_offline.config.train import TrainConfig
from dpkd_offline.curation.inspect import inspect
from dpkd_offline.curation.verify import verify
from dpkd_offline.dataset.catalog import begun_tables
from dpkd_offline.dataset.dataset import FORMAT_VERSION, Dataset
from dpkd_offline.training.examples import pair_stream

GOLDEN = Path(__file__).parents[1] / "golden"
ROWS = {  # a hash of all rows of each table, written down when the dataset was
    "prompts": "d5b6a6247fba688952cdd49a7403f57489a238900ae8d6e451032ce2bd0fe750",
    "responses/teacher": "f1eba6596209b8aa59dff21c1204eda2f0e0e0a20d0487875cddd0c9069c6368",
    "responses/student/round-000": "3045b3556226b375c767293dff99268e5508ceb22f8a51d2cc2faedd2b9acefd",
    "responses/student/round-001": "703812e365517f9a7cad7175162691ab69cba04cf547f7b5ecb99070168aa784",
    "pairs/round-000": "fcf0f62007f6a1c99f8f6e4ea5c2b167abfa7cd4afa73dcae4ee51bb07a06003",
    "pairs/round-001": "0a6f9be90807c07cb73ea5499e0f98a760ee201b7b5a0a052f2dfd490fc29d5a",
    "top_k/round-000": "538503bc1d75de5d9ed3ad0693944f2dc35494eb4d15c8e1f0bf49c4c0523158",
    "students/bytes/prompts/student": "887836a5da1b3ba7693aaee2e04c3c1d8a039c10cea2421a5b4057acc45ca712",
    "students/bytes/responses/student/round-000": "f79c143ffabfed9f91d7216e51a1535ddb9b8630192bf290b2d453a8b01e4adc",
    "students/bytes/pairs/round-000": "bc11de7a761044442582bf8e36868eae8930cce84c4041492a80cbfac949540c",
}


def test_every_version_is_here() -> None:
    assert sorted(path.name for path in GOLDEN.iterdir()) == [f"v{n}" for n in range(1, FORMAT_VERSION + 1)]


def test_version_1_is_whole_and_reads_as_it_was_written(tmp_path: Path) -> None:
    assert verify(GOLDEN / "v1").rows == dict.fromkeys(ROWS, 6)
    dataset = Dataset.open(GOLDEN / "v1")
    hashes = {
        table.name: fingerprint(
            [row for shard in range(table.plan.count) for row in table.read_arrow(shard).to_pylist()]
        )
        for table in begun_tables(dataset)
    }
    assert hashes == ROWS
    assert inspect(GOLDEN / "v1")["tables"].keys() == ROWS.keys()
    for student, top_k in ((None, True), ("bytes", False)):
        config = TrainConfig(dataset=GOLDEN / "v1", student="s", output=tmp_path, round=0, holdout=0.0)
        stream, _ = pair_stream(Dataset.open(GOLDEN / "v1", student), config, 10**6, top_k)
        assert len(list(stream.epoch(0))) == 6


@pytest.mark.parametrize(
    ("file", "key"),
    [("dataset.json", "format_version"), ("prompts/_manifest/prompts-00000-of-00002.json", "schema_version")],
)
def test_a_newer_version_is_refused_in_one_line(tmp_path: Path, file: str, key: str) -> None:
    shutil.copytree(GOLDEN / "v1", tmp_path / "ds")
    path = tmp_path / "ds" / file
    path.write_text(json.dumps({**json.loads(path.read_text()), key: 2}))
    with pytest.raises(MismatchError, match=r"version 2.*this program reads .*1$") as error:
        verify(tmp_path / "ds")
    assert "\n" not in str(error.value)
