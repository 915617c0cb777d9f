from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel
from typing_extensions import TypedDict

from dpkd_offline.common.errors import DataError, MismatchError, StorageError
from dpkd_offline.common.files import (
    find_json,
    find_model,
    read_json,
    read_model,
    sweep_folder,
    write_atomically,
    write_json,
)
from dpkd_offline.common.hashing import file_sha256, fingerprint, sha256


def test_a_failed_write_leaves_the_old_content_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"file: cannot be written: No space left on device"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_exclusive_writers_do_not_overwrite(tmp_path: Path) -> None:
    assert write_json(tmp_path / "a.json", {"n": 1}, exclusive=True)
    assert not write_json(tmp_path / "a.json", {"n": 2}, exclusive=True)
    assert read_json(tmp_path / "a.json") == {"n": 1}


def test_what_dead_writers_left_is_swept(tmp_path: Path) -> None:
    (tmp_path / ".a.json.99999.tmp").write_text("half a fi")
    write_json(tmp_path / "a.json", {"n": 1})
    assert os.listdir(tmp_path) == ["a.json"]


def test_pieces_that_end_with_an_error_leave_nothing(tmp_path: Path) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"a"
        raise MismatchError("not what it should be")

    with pytest.raises(MismatchError):
        write_atomically(tmp_path / "file", pieces())
    assert os.listdir(tmp_path) == []
    assert write_atomically(tmp_path / "file", iter([b"a", b"b"]))
    assert (tmp_path / "file").read_bytes() == b"ab"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "key 'c' stands there twice"),
        ("[" * 100_000, "invalid JSON: maximum recursion"),
        ('{"a": ' + "9" * 5000 + "}", "invalid JSON: Exceeds the limit"),
        ('{"a": "\\ud800"}', "invalid JSON: .* surrogates not allowed"),
        ("[]", "expected a JSON object"),
    ],
)
def test_json_that_means_more_or_less_than_an_object_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=rf"a\.json.* {message}") as error:
        read_json(tmp_path / "a.json")
    assert "\n" not in str(error.value)


def test_bad_json_is_placed(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": 1,\n "b": }')
    with pytest.raises(DataError, match=r"a\.json:2:7: invalid JSON"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(DataError, match=r"a\.json:1:1: expected a JSON object"):
        read_json(tmp_path / "a.json")


def test_hashes(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert sha256(b"abc") == file_sha256(tmp_path / "f") == known
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": "1"})


def test_what_the_dead_left_anywhere_is_swept_where_their_file_is_there(tmp_path: Path) -> None:
    (tmp_path / "table").mkdir()
    for name in ("a.json", ".a.json.123.tmp", ".b.json.456.tmp"):  # somebody may be writing b.json now
        (tmp_path / "table" / name).write_text("{}")
    sweep_folder(tmp_path)
    assert sorted(os.listdir(tmp_path / "table")) == [".b.json.456.tmp", "a.json"]


class Numbers(BaseModel):
    rows: int
    names: list[str] = []


class Named(TypedDict):
    name: str


def test_json_becomes_a_model_or_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"rows": 3, "other": 1}')
    assert read_model(path, Numbers) == find_model(path, Numbers) == Numbers(rows=3)
    assert find_model(tmp_path / "b.json", Numbers) is None
    for text, model, message in [
        ('{"rows": "three"}', Numbers, "a.json: key 'rows' is missing or wrong"),
        ('{"rows": 3, "names": ["a", 1]}', Numbers, "a.json: key 'names.1' is missing or wrong"),
        ("{}", Named, "a.json: key 'name' is missing or wrong"),
        ("[]", Numbers, "a.json:1:1: expected a JSON object"),
    ]:
        path.write_text(text)
        with pytest.raises(DataError, match=message) as error:
            read_model(path, model)
        assert "\n" not in str(error.value)


def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "zeros").symlink_to("/dev/zero")
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", 1 << 40)
    for name, message in {
        "pipe": "pipe: a pipe or a device, not a file",
        "zeros": "zeros: a pipe or a device, not a file",
        "folder": "folder: a folder, not a file",
        "large": "large: longer than 4,194,304 bytes",
        "none": "none: no such file",
        "pipe/a": "pipe/a: cannot be read: Not a directory",
    }.items():
        for read in (find_json, read_json, file_sha256):
            if (name, read) not in {("none", find_json), ("large", file_sha256)}:
                with pytest.raises(DataError, match=message):
                    read(tmp_path / name)
    assert find_json(tmp_path / "none") is None


def test_a_name_that_is_not_utf_8_is_written_as_far_as_it_is_text(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    write_json(folder / "a.json", {"source": str(folder)})
    assert read_json(folder / "a.json") == {"source": f"{tmp_path}/caf?"}


def test_numbers_that_no_json_has(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for text in ('{"a": NaN}', '{"a": -Infinity}', '{"a": 1e999}'):
        path.write_text(text)
        assert find_json(path)
        with pytest.raises(DataError, match=r"a\.json: invalid JSON: Out of range"):
            find_json(path, finite=True)
