"""Several copies of a model on this machine, in real processes; of GPUs only what they are told."""

from __future__ import annotations

import operator
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from helpers.programs import children
from helpers.tiny import command_line, files_of, generate_config, rows, score_config, write_jsonl

from dpkd_offline.common import gpus
from dpkd_offline.common.errors import UnavailableError, UsageError
from dpkd_offline.config.base import ModelOptions, SamplingOptions
from dpkd_offline.engines import replica, replicas
from dpkd_offline.engines.base import GenerateRequest
from dpkd_offline.engines.factory import load_engine
from dpkd_offline.engines.replicas import ReplicasEngine, replica_places
from dpkd_offline.engines.worker_pool import WorkerPool
from dpkd_offline.generation.generate import generate
from dpkd_offline.generation.score_teacher import score_teacher
from dpkd_offline.models.info import ModelInfo

SHARDS = 64


def kill_one_in_the_middle(committed: Path, seen: list[int]) -> None:
    while (done := len(list(committed.glob("[!.]*.json")))) < 8:
        time.sleep(0.005)
    children(replica)[1].kill()
    seen.append(done)


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Here and in the processes that are started: the bits of a sum depend on the number of threads."""
    threads = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_a_killed_replica_changes_no_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teachers: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source, model = write_jsonl(tmp_path / "p.jsonl", rows(SHARDS)), teachers["llama"]
    one, many = tmp_path / "one" / "ds", tmp_path / "many" / "ds"
    student = generate_config(one, "student", model, prompts=str(source), shard_size=1, max_new_tokens=3)
    generate(student)
    shutil.copytree(one, many)
    seen: list[int] = []
    committed = many / "responses" / "teacher" / "_manifest"
    killer = threading.Thread(target=kill_one_in_the_middle, args=(committed, seen))
    killer.start()
    run = WorkerPool._run

    def run_with_all(pool: WorkerPool, *rest: Any) -> Any:
        while not all(worker.ready for worker in pool._workers):
            pool._handle_event()
        return run(pool, *rest)

    monkeypatch.setattr(WorkerPool, "_run", run_with_all)
    for dataset, copies in ((many, 4), (one, 1)):
        generate(generate_config(dataset, "teacher", model, max_new_tokens=20, replicas=copies))
        score_teacher(score_config(dataset, model, replicas=min(copies, 2)))
    killer.join()
    assert seen[0] < SHARDS - 8
    assert re.search(r"worker 2 on process 2 is lost: .* SIGKILL .*; [12] shards go to others", capsys.readouterr().err)
    assert not children(replica)
    assert files_of(many) == files_of(one)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_replicas_end_with_the_process_that_started_them(
    tmp_path: Path, teachers: dict[str, Path], number: signal.Signals
) -> None:
    source = write_jsonl(tmp_path / "p.jsonl", rows(200))
    command = ["generate", "--dataset", tmp_path / "ds", "--role", "teacher", "--model", teachers["gpt2"]]
    command += ["--prompts", source, "--engine", "transformers", "--dtype", "float32", "--max-length", 256]
    command += ["--max-new-tokens", 60, "--shard-size", 2, "--replicas", 2]
    committed = tmp_path / "ds" / "responses" / "teacher" / "_manifest"
    with subprocess.Popen(command_line(*command), stderr=subprocess.PIPE, text=True) as process:
        while len(list(committed.glob("[!.]*.json"))) < 2:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        copies = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    assert len(copies) == 2
    assert psutil.wait_procs(copies, timeout=10)[1] == []
    if number == signal.SIGTERM:
        assert process.returncode == 75, stderr
        assert stderr.splitlines()[-1].startswith("dpkd-offline: stopped by SIGTERM; ")


def test_errors_of_a_replica_are_those_of_its_engine(
    teachers: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ModelOptions(engine="transformers", dtype="float32", replicas=2)
    engine = load_engine(ModelInfo(str(teachers["gpt2"])), options)
    with pytest.raises(IndexError, match="index out of range") as raised:
        list(engine.generate([[GenerateRequest((0, 0), [5, 10**6], seed=0)]], SamplingOptions(max_new_tokens=4)))
    assert "In a replica:\nTraceback" in raised.value.__notes__[0]
    groups = [[GenerateRequest((n, 0), [5, 6], seed=n)] for n in range(4)]
    assert len(list(engine.generate(groups, SamplingOptions(max_new_tokens=4)))) == 4  # it goes on after an error
    for child in children(replica):
        child.kill()
    with pytest.raises(UnavailableError, match=r"replicas: all workers are lost, the last one: .* SIGKILL"):
        list(engine.generate(groups, SamplingOptions(max_new_tokens=4)))
    engine.close()
    assert "warning" not in capsys.readouterr().err


def test_what_keeps_a_replica_from_loading_is_raised_and_ends_all() -> None:
    options = ModelOptions(replicas=2)
    with pytest.raises(TypeError, match="unsupported operand"):
        ReplicasEngine(operator.truediv, ModelInfo("m"), options, replica_places(options))  # type: ignore[arg-type]
    assert not children(replica)


def places_with(monkeypatch: pytest.MonkeyPatch, count: int, groups: int | None = None, **options: object) -> list[str]:
    """The GPUs of each replica, on a machine with so many."""
    monkeypatch.setattr(gpus, "count_gpus", lambda: count)
    places = replica_places(ModelOptions.model_validate(options), groups)
    return [place.environment.get("CUDA_VISIBLE_DEVICES", "") for place in places]


def test_replicas_take_the_gpus_that_are_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert places_with(monkeypatch, 0) == places_with(monkeypatch, 1) == []  # one copy, in this process
    assert places_with(monkeypatch, 4) == ["0", "1", "2", "3"]
    assert places_with(monkeypatch, 4, groups=2) == ["0", "1"]
    assert places_with(monkeypatch, 4, groups=1) == places_with(monkeypatch, 4, replicas=1) == []
    assert places_with(monkeypatch, 5, tensor_parallel_size=2) == ["0,1", "2,3"]
    assert places_with(monkeypatch, 8, engine_args={"pipeline_parallel_size": 2}, tensor_parallel_size=2) == [
        "0,1,2,3",
        "4,5,6,7",
    ]
    assert places_with(monkeypatch, 2, tensor_parallel_size=4) == []  # the engine says what it lacks
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-aa,7")
    assert places_with(monkeypatch, 3) == ["3", "GPU-aa", "7"]
    assert places_with(monkeypatch, 3, replicas=2) == ["3", "GPU-aa"]
    with pytest.raises(UsageError, match="--replicas 4: 4 GPUs are needed, 1 for each copy of the model, and there"):
        places_with(monkeypatch, 3, replicas=4)


def test_replicas_on_a_cpu_share_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas.torch, "get_num_threads", lambda: 6)
    for given, copies, threads in ((None, 4, "1"), (None, 2, "3"), ("2", 2, "2")):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if given:
            monkeypatch.setenv("OMP_NUM_THREADS", given)
        places = replica_places(ModelOptions(replicas=copies))
        assert [place.environment["OMP_NUM_THREADS"] for place in places] == [threads] * copies


@pytest.mark.parametrize("options", [{"url": "http://h:1"}, {"engine": "http"}, {"cluster": "ray"}])
def test_replicas_are_of_engines_that_run_here(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="replicas are copies of the model on this machine, and"):
        ModelOptions.model_validate({**options, "replicas": 2})
    ModelOptions.model_validate({**options, "replicas": 1})
