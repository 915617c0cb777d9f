from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from pathlib import Path

import pytest
from helpers.tiny import files_of

from dpkd_offline.common.errors import DataError, MismatchError, OutputBusy, StorageError, UsageError
from dpkd_offline.common.ownership import CLAIM, LOCK, output_folder


def make(path: Path, run: str = "a", kind: str = "evaluation", begun: bool = True, known: str | None = None) -> None:
    """What a command does: it owns a folder, claims it and leaves a result."""
    with output_folder(path, kind, "evaluate", known=("results.json",)) as output:
        output.claim(run, known=lambda: known, begun=begun)
        assert {p.name for p in path.iterdir()} >= {CLAIM, LOCK}
        (path / "results.json").write_text(run)


def test_a_folder_says_what_it_is_and_by_which_run(tmp_path: Path) -> None:
    make(tmp_path / "a" / "out")
    assert json.loads((tmp_path / "a/out" / CLAIM).read_text()) == {"kind": "evaluation", "run": "a"}
    whole = files_of(tmp_path)
    assert [*whole] == [f"a/out/{CLAIM}", "a/out/results.json"]  # and no lock
    make(tmp_path / "a" / "out")  # the same run goes on
    with pytest.raises(MismatchError, match="out: holds an evaluation of another command, config or model"):
        make(tmp_path / "a" / "out", run="b")
    with pytest.raises(MismatchError, match="out: is an evaluation; take another folder for a trained student"):
        make(tmp_path / "a" / "out", kind="trained student")
    assert files_of(tmp_path) == whole
    make(tmp_path / "a" / "out", run="b", begun=False)  # nothing there counts
    assert json.loads((tmp_path / "a/out" / CLAIM).read_text())["run"] == "b"


def test_what_another_run_left_before_anything_counts_is_gone(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "config.json").touch()
    make(tmp_path, run="b", begun=False)
    assert [*files_of(tmp_path)] == [CLAIM, "results.json"]


def test_a_folder_of_an_older_version_is_known_by_its_results(tmp_path: Path) -> None:
    (tmp_path / "results.json").touch()
    with pytest.raises(MismatchError, match="another command, config or model"):
        make(tmp_path, known="b")
    assert [*files_of(tmp_path)] == ["results.json"]
    make(tmp_path, known="a")


@pytest.mark.parametrize("name", ["thesis.txt", "config.json", "dataset.json", ".bashrc"])
def test_what_is_not_ours_is_never_written_to(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(UsageError, match=f"holds '{name}', and nothing says that it is an evaluation of ours"):
        make(tmp_path)
    assert files_of(tmp_path) == {name: b"mine"}
    with pytest.raises(UsageError, match="not a folder"):
        make(tmp_path / name)


def test_what_a_killed_command_left_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("`dpkd-offline evaluate`, process 1 on elsewhere")
    (tmp_path / f".{CLAIM}.0123.tmp").write_text("{")
    make(tmp_path)
    assert [*files_of(tmp_path)] == [CLAIM, "results.json"]


def test_a_second_command_is_refused_and_told_who_writes(tmp_path: Path) -> None:
    with output_folder(tmp_path / "out", "evaluation", "evaluate") as output:
        output.claim("a", known=lambda: None, begun=False)
        held = f"`dpkd-offline evaluate`, process {os.getpid()} on {socket.gethostname()}, writes it now"
        with pytest.raises(OutputBusy, match=held) as busy:
            make(tmp_path / "out")
        assert busy.value.exit_code == 75
        assert not (tmp_path / "out" / "results.json").exists()
    make(tmp_path / "out")


def test_nothing_is_left_of_a_command_that_wrote_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError), output_folder(tmp_path / "a" / "out", "evaluation", "evaluate"):
        raise DataError("a row is wrong")
    assert [*tmp_path.iterdir()] == []


def test_a_damaged_claim_is_one_line(tmp_path: Path) -> None:
    (tmp_path / CLAIM).write_text('{"kind": 3}')
    with pytest.raises(DataError, match=rf"{CLAIM}: key 'kind' .*; put back a whole copy of it, or delete the folder"):
        make(tmp_path)


def test_a_file_system_without_locks_is_said_and_one_that_fails_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(number: int) -> None:
        def flock(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", flock)

    fails(errno.EOPNOTSUPP)
    make(tmp_path / "out")
    assert "its file system has no locks" in capsys.readouterr().err
    fails(errno.EIO)
    with pytest.raises(StorageError, match="out: cannot be written: Input/output error"):
        make(tmp_path / "out")


def test_a_read_only_folder_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def refused(path: object, flags: int, *rest: int) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return opened(path, flags, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(StorageError, match="out: cannot be written: Read-only file system"):
        make(tmp_path / "out")
