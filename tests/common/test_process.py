"""How the process of a command ends: by signals, with streams that fail, and with threads of libraries still there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.tiny import command_line

import dpkd_offline
from dpkd_offline import cli

GOLDEN = Path(__file__).parents[1] / "golden" / "v1"
LINE = "dpkd-offline: stopped by {}; the same command goes on from what is committed\n"


@pytest.mark.parametrize("module", ["typer", "pyarrow"])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_a_signal_during_an_import_ends_with_75(name: str, module: str, tmp_path: Path) -> None:
    """Of the command line itself, and of what a command imports, which takes any exception for a missing library."""
    (tmp_path / f"{module}.py").write_text(
        f"import os, signal\ntry:\n    os.kill(os.getpid(), signal.{name})\nexcept BaseException:\n    pass\n"
    )
    paths = os.pathsep.join([str(tmp_path), str(Path(dpkd_offline.__file__).parents[1])])
    done = subprocess.run(
        command_line("inspect", GOLDEN), capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}
    )
    assert (done.returncode, done.stdout, done.stderr) == (75, "", LINE.format(name))


PROGRAM = """
import atexit, io, os, signal, sys, threading, time
from dpkd_offline import cli
from dpkd_offline.common import process

class Late:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0)

def dropped():
    late = Late()
    del late

def taken_for_a_failure():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    except Exception:
        pass

def after_the_end():
    atexit.register(os.kill, os.getpid(), signal.SIGTERM)

def thread_of_a_library():
    import pyarrow as pa, pyarrow.parquet as pq
    data, reading = io.BytesIO(), threading.Event()
    pq.write_table(pa.table({"a": [1]}), data)
    class Slow(io.BytesIO):
        def read(self, *size):
            reading.set()
            time.sleep(0.3)
            return super().read(*size)
    threading.Thread(target=lambda: pq.read_table(Slow(data.getvalue())), daemon=True).start()
    reading.wait()
    atexit.register(time.sleep, 0)

def bug():
    raise KeyError("a bug")

process.begin()
cli.app = lambda **_: globals()[sys.argv[1]]()
cli.main()
"""


@pytest.mark.parametrize(
    ("what", "code", "stderr"),
    [
        ("dropped", 75, LINE.format("SIGTERM")),
        ("taken_for_a_failure", 75, LINE.format("SIGTERM")),
        ("after_the_end", 0, ""),
        ("thread_of_a_library", 0, ""),
        ("bug", 1, "KeyError: 'a bug'\n"),
    ],
)
def test_the_end_of_a_process(what: str, code: int, stderr: str) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, what], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert done.stderr.endswith(stderr) and (code == 1 or done.stderr == stderr)


@pytest.mark.parametrize(
    ("streams", "code", "says"),
    [
        (">/dev/full", 75, "dpkd-offline: stdout: cannot be written: No space left on device\n"),
        (">&-", 75, "dpkd-offline: stdout is closed, so that no result could be written; nothing has run\n"),
        ("2>/dev/full", 75, ""),
        (">/dev/full 2>/dev/full", 75, ""),
        ("2>&-", 0, ""),
        ("<&-", 0, None),
    ],
)
def test_streams_that_fail(streams: str, code: int, says: str | None, tmp_path: Path) -> None:
    quiet = ["-q"] if says else []
    shell = ["sh", "-c", f'exec "$@" {streams}', "sh", *command_line("inspect", GOLDEN, *quiet)]
    done = subprocess.run(shell, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert says is None or done.stderr == says
    assert ("teacher log p(y_t)" in done.stdout) == (code == 0)
    assert "inspect prompts" not in done.stdout  # what is for people


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_pipe_that_nobody_reads_ends_a_command_quietly(stream: str) -> None:
    for arguments in (["verify", GOLDEN], ["--help"]) if stream == "stdout" else (["verify", GOLDEN],):
        reading, writing = os.pipe()
        os.close(reading)
        other = "stderr" if stream == "stdout" else "stdout"
        done = subprocess.run(command_line(*arguments), **{stream: writing, other: subprocess.PIPE})  # type: ignore[call-overload]
        os.close(writing)
        assert done.returncode == -13
        assert b"Error" not in (done.stderr or b"") and b"Exception" not in (done.stderr or b"")


def test_characters_and_names_that_an_encoding_lacks() -> None:
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii", "LANG": "C"}
    done = subprocess.run(command_line("inspect", GOLDEN), capture_output=True, env=ascii_only)
    assert done.returncode == 0 and b"\\xb7" in done.stdout and done.stdout.isascii()
    done = subprocess.run([*map(os.fsencode, command_line("inspect")), b"caf\xe9"], capture_output=True)
    assert done.returncode == 3
    line = b"dpkd-offline: argument 2, b'caf\\xe9', is not UTF-8 text; rename what it names\n"
    assert (done.stdout, done.stderr) == (b"", line)


def end_of(error: Exception, arguments: str, monkeypatch: pytest.MonkeyPatch) -> object:
    """The exit code of a command that ends with an error."""

    def fail(_: object) -> None:
        raise error

    words = arguments.split()
    monkeypatch.setattr(dpkd_offline, words[0].replace("-", "_"), fail, raising=False)
    monkeypatch.setattr(sys, "argv", ["dpkd-offline", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def test_out_of_memory_is_one_line_that_names_what_helps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import pyarrow
    import torch

    on_a_cpu = "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has"),
        RuntimeError(on_a_cpu),
        MemoryError(),
        pyarrow.ArrowMemoryError("malloc of size 1000 failed"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        ValueError("No available memory for the cache blocks. Try increasing `gpu_memory_utilization`"),
    ):
        for command, option in (
            (
                "train --dataset d --student s --output o",
                "--micro-batch-tokens, or --gradient-checkpointing",
            ),
            ("generate --dataset d --role teacher --model m", "--batch-size, or a lower --max-length"),
            ("evaluate --model m --prompts p --output o", "--batch-size"),
            ("inspect d", ""),
        ):
            assert end_of(error, command, monkeypatch) == 69
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith("dpkd-offline: memory ran out") and option in line


def test_what_the_machine_does_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import sqlite3

    for error, code, words in (
        (OSError(28, "No space left on device", "/there/file"), 75, "/there/file: No space left on device;"),
        (PermissionError(13, "Permission denied", "/there"), 75, "/there: Permission denied;"),
        (sqlite3.OperationalError("database or disk is full"), 75, "temporary files: database or disk is full"),
        (UnicodeEncodeError("utf-8", "caf\udce9", 3, 4, "surrogates not allowed"), 3, "b'caf\\xe9'"),
        (ImportError("libcuda.so.1: cannot open shared object file", name="torch"), 69, "libcuda.so.1"),
    ):
        assert end_of(error, "inspect d", monkeypatch) == code
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("dpkd-offline: ") and words in line
    assert end_of(ImportError("ours", name="dpkd_offline.nothing"), "inspect d", monkeypatch) == 1
    assert "Traceback" in capsys.readouterr().err
