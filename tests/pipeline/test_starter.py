"""Stages that are forks of a process which has imported what they need: everything is as if each had been started."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest
from helpers.programs import children

from dpkd_offline.pipeline import starter
from dpkd_offline.pipeline.distill import STAGE_OF
from dpkd_offline.pipeline.starter import STAGE, Forked, stages_by_fork, start


@pytest.fixture(scope="module")
def by_fork() -> Iterator[None]:
    with stages_by_fork():
        yield


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A server that takes a request and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        yield server


def waiting_stage(
    listener: socket.socket, teacher: Path, source: Path, folder: Path, more: Mapping[str, str]
) -> tuple[Forked, bytes]:
    """A stage that waits for a server's answer, and what it has asked."""
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    options = ["--dataset", folder, "--role", "teacher", "--model", teacher, "--prompts", source, "--max-new-tokens", 8]
    stage = start(
        [*STAGE, "generate", "--url", url, *map(str, options)], {**os.environ, STAGE_OF: str(os.getpid()), **more}
    )
    assert isinstance(stage, Forked)
    with listener.accept()[0] as connection:
        request = connection.recv(1 << 16)
    return stage, request


def test_exit_codes_are_those_of_the_command(by_fork: None) -> None:
    for arguments, code in ((["--version"], 0), (["train", "--no-such-option"], 2), (["verify", "/no-such"], 3)):
        with start([*STAGE, *arguments], os.environ) as stage:
            assert isinstance(stage, Forked) and stage.wait() == code, arguments


def test_what_is_no_stage_of_ours_or_needs_a_launcher_is_started_as_ever(by_fork: None) -> None:
    for command in ([sys.executable, "-c", "raise SystemExit(7)"], ["env", *STAGE, "--version"]):
        with start(command, os.environ) as process:
            assert isinstance(process, subprocess.Popen) and process.wait() == (7 if "-c" in command else 0)


def test_a_stage_has_its_environment_a_name_and_signals(
    by_fork: None, listener: socket.socket, teachers: dict[str, Path], source: Path, tmp_path: Path
) -> None:
    before = dict(os.environ)
    stage, request = waiting_stage(listener, teachers["llama"], source, tmp_path / "d", {"VLLM_API_KEY": "my-secret"})
    assert b"Bearer my-secret" in request and dict(os.environ) == before
    process = psutil.Process(stage.pid)
    assert process.name() == "dpkd generate"
    with pytest.raises(subprocess.TimeoutExpired):
        stage.wait(0.01)
    stage.terminate()
    assert stage.wait() == 75 and not process.is_running()
    with stage:  # its code is still known, and nothing is sent to whoever has its number now
        stage.terminate()
    stage, request = waiting_stage(listener, teachers["llama"], source, tmp_path / "e", {})
    assert b"my-secret" not in request  # of another stage
    with stage:
        os.kill(stage.pid, signal.SIGKILL)
        assert stage.wait() == -signal.SIGKILL


def test_a_stage_ends_when_what_it_is_a_fork_of_is_killed(
    listener: socket.socket, teachers: dict[str, Path], source: Path, tmp_path: Path
) -> None:
    with stages_by_fork():
        stage, _ = waiting_stage(listener, teachers["llama"], source, tmp_path / "d", {})
        server = children(starter)[-1]
        process = psutil.Process(stage.pid)
        assert process.ppid() == server.pid
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):  # sent to the whole group, by a cluster
            server.send_signal(number)
        time.sleep(0.1)
        assert server.is_running() and process.is_running()
        server.kill()
        with stage:
            assert stage.wait() == -signal.SIGKILL
        process.wait(20)
        with start([*STAGE, "--version"], os.environ) as stage:
            assert stage.wait() == -signal.SIGKILL


READY = """
import os, threading
from importlib import import_module
from dpkd_offline.common.console import prepare_libraries
from dpkd_offline.pipeline.starter import IMPORTED

prepare_libraries()
for name in IMPORTED:
    import_module(name)
import torch
threads = [open(f"/proc/self/task/{thread}/comm").read() for thread in os.listdir("/proc/self/task")]
print(threads.count(open("/proc/self/comm").read()), torch.cuda.is_initialized())
"""


def test_what_stages_are_forks_of_has_no_threads_of_its_own() -> None:
    """OpenMP's are made by the first product, and those of BLAS, which know of forks, are left out here."""
    threads = {"OMP_NUM_THREADS": "3", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", READY], env={**os.environ, **threads}, capture_output=True, text=True, check=True
    )
    assert done.stdout == "1 False\n"
