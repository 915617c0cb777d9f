"""Manifest entries: one model of them, which every reader goes by and every writer writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dpkd_offline.common.errors import MismatchError
from dpkd_offline.common.files import write_json
from dpkd_offline.dataset.manifest import ManifestEntry

GOLDEN = sorted((Path(__file__).parents[1] / "golden" / "v1").rglob("_manifest/*.json"))
PATH = Path("_manifest/pairs-00000-of-00001.json")


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_entries_are_written_as_they_were_read(path: Path, tmp_path: Path) -> None:
    entry = ManifestEntry.parse(json.loads(path.read_text()), path)
    write_json(tmp_path / "again.json", entry.model_dump())
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("key", ["file", "sha256", "bytes", "rows", "facts"])
def test_an_entry_that_lacks_a_key_vouches_for_nothing(key: str) -> None:
    value = json.loads(GOLDEN[0].read_text())
    del value[key]
    with pytest.raises(MismatchError, match=rf"pairs-00000-of-00001\.json: key '{key}' is missing or wrong"):
        ManifestEntry.parse(value, PATH)


@pytest.mark.parametrize("version", [None, 0, 2, "1"])
def test_another_schema_version_is_named_before_what_else_differs(version: object) -> None:
    with pytest.raises(MismatchError, match=rf"schema version {version}, this program reads 1"):
        ManifestEntry.parse({"schema_version": version}, PATH)


def test_a_number_that_is_text_is_none() -> None:
    with pytest.raises(MismatchError, match="key 'rows' is missing or wrong"):
        ManifestEntry.parse({**json.loads(GOLDEN[0].read_text()), "rows": "4"}, PATH)
