"""What stages do with the GPUs of a machine: plans with GPUs that are not there, and two processes on a CPU."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from helpers.runs import train_config, write_recipe
from helpers.tiny import make_dataset

from dpkd_offline.common import gpus
from dpkd_offline.common.errors import UsageError
from dpkd_offline.config.recipe import read_recipe
from dpkd_offline.config.train import TrainConfig
from dpkd_offline.pipeline import box as boxes
from dpkd_offline.pipeline.box import Box, Training
from dpkd_offline.pipeline.distill import Runner, command_of
from dpkd_offline.pipeline.dry_run import plan_of_work, table_of_work
from dpkd_offline.pipeline.launch import launched
from dpkd_offline.pipeline.memory import ModelShape, train_memory
from dpkd_offline.pipeline.stages import Stage, plan
from dpkd_offline.pipeline.throughput import Throughput, Workload, record_stage

GIB = 1 << 30
A_BILLION = ModelShape(10**9, 24, 2048, 8192, 512, 128_000)
Fake = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Makes this a machine with so many GPUs of so many bytes."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def with_gpus(count: int, memory: int = 80 * GIB) -> None:
        monkeypatch.setattr(gpus, "count_gpus", lambda: count)
        monkeypatch.setattr(boxes, "memory_of_each", lambda gpus: memory)

    return with_gpus


def train_of(folder: Path, **changes: object) -> TrainConfig:
    return train_config(folder / "ds", folder / "student", folder / "out", **changes)


def test_a_student_is_sharded_where_a_gpu_cannot_hold_it(tmp_path: Path, machine: Fake) -> None:
    config = train_of(tmp_path, batch_size=64, dtype="bfloat16", micro_batch_tokens=None)
    for count, memory, expected in (
        (0, 0, Training()),
        (1, 24, Training()),
        (4, 24, Training(4)),
        (4, 20, Training(4, sharded=True)),
    ):
        machine(count, memory * GIB)
        assert Box(gpus.visible_gpus()).training(config, A_BILLION) == expected
    assert Box(gpus.visible_gpus()).training(config, A_BILLION, adapters=10**6) == Training(4)
    assert Box(gpus.visible_gpus()).training(config, None) == Training(4, sharded=True)
    machine(8)
    few = train_of(tmp_path, batch_size=6)
    assert Box(gpus.visible_gpus()).training(few, A_BILLION) == Training(6)  # a pair for each
    whole, part = (train_memory(A_BILLION, "bfloat16", 0, shards=shards) for shards in (1, 8))
    assert (whole, part) == (18 * 10**9, 2 * 10**9)


def test_more_gpus_than_there_are_is_one_line(tmp_path: Path, machine: Fake, teachers: dict[str, Path]) -> None:
    path = write_recipe(tmp_path, teachers["llama"])
    for count, words in ((0, "there is none here"), (1, "there is one"), (3, "there are 3")):
        machine(count)
        with pytest.raises(UsageError, match=f"gpus: 4 are asked for, and {words}; leave gpus out"):
            plan_of_work(read_recipe(path, ["gpus=4"]), path)
    machine(2)
    with pytest.raises(UsageError, match="score_teacher: 4 GPUs are asked for, and the run has 2"):
        engine = ["score_teacher.engine=auto", "score_teacher.tensor_parallel_size=4"]
        plan_of_work(read_recipe(path, engine), path)
    with pytest.raises(UsageError, match="generate: 3 replicas of 1 GPUs are asked for, and the run has 2"):
        plan_of_work(read_recipe(path, ["generate.replicas=3"]), path)
    for wrong in ("0", "many"):
        with pytest.raises(UsageError, match=r"'gpus': .* expected auto, or a number from 1 on"):
            read_recipe(path, [f"gpus={wrong}"])


def test_a_dry_run_says_which_gpus_each_stage_uses(tmp_path: Path, machine: Fake, teachers: dict[str, Path]) -> None:
    path = write_recipe(tmp_path, teachers["llama"])
    machine(4, 2 * GIB)
    work = plan_of_work(read_recipe(path, ["generate.shard_size=2", "train.micro_batch_tokens=64"]), path)
    notes = {one.stage: one.note for one in work.works}
    assert notes["generate: teacher"] == "GPUs 0-3: 4 copies"
    assert notes["score-teacher"] == "GPUs 0-3: 4 copies"
    assert notes["train"] == "GPUs 0-3: DDP"
    assert work.workloads["generate: teacher"].parts == work.workloads["train"].parts == 4
    assert "GPUs 0-3: 4 copies" in table_of_work(work)
    machine(4, 1 << 20)
    few = plan_of_work(read_recipe(path, ["gpus=2", "generate.shard_size=6"]), path)
    assert {one.stage: one.note for one in few.works}["train"] == "GPUs 0,1: FSDP"
    machine(1)
    notes = {one.stage: one.note for one in plan_of_work(read_recipe(path), path).works}
    assert notes["generate: teacher"] == notes["train"] == "GPU 0"
    machine(0)
    assert not any(one.note for one in plan_of_work(read_recipe(path), path).works)


def test_each_stage_is_told_its_gpus(tmp_path: Path, machine: Fake, teachers: dict[str, Path]) -> None:
    recipe = read_recipe(write_recipe(tmp_path, teachers["llama"]), [f"student={teachers['llama']}", "init_student="])
    stages = {stage.title: stage for stage in plan(recipe)}
    alone = [sys.executable, "-m", "dpkd_offline.cli"]

    def commands(changes: list[str]) -> tuple[list[str], list[str], dict[str, str]]:
        own = read_recipe(tmp_path / "recipe.yaml", changes)
        box = Box.of(own)
        train = stages["train: sft"]
        return command_of(stages["generate: teacher"], [], box), command_of(train, [], box), dict(box.environment)

    machine(0)
    assert commands([]) == ([*alone, "generate"], [*alone, "train"], {})
    machine(1)
    assert commands([]) == ([*alone, "generate"], [*alone, "train"], {})
    machine(4)
    assert commands([]) == ([*alone, "generate"], launched(4, "ddp", [*alone, "train"]), {})
    assert commands(["gpus=2"])[1:] == (launched(2, "ddp", [*alone, "train"]), {"CUDA_VISIBLE_DEVICES": "0,1"})
    assert commands(["gpus=1"])[1:] == ([*alone, "train"], {"CUDA_VISIBLE_DEVICES": "0"})
    machine(2, 1 << 20)
    assert commands([])[1] == launched(2, "fsdp", [*alone, "train"])


def test_distill_trains_in_two_processes(
    tmp_path: Path,
    machine: Fake,
    teachers: dict[str, Path],
    students: dict[str, Path],
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine(2)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    dataset = make_dataset(tmp_path / "ds", source, teachers["gpt2"], students["gpt2"])
    config = train_config(dataset, students["gpt2"], tmp_path / "out", max_steps=2)
    (tmp_path / "stages").mkdir()
    runner = Runner(tmp_path, 1, {}, Box.of(read_recipe(write_recipe(tmp_path, teachers["gpt2"]))))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # what is there, if there is some
    runner.run(Stage("train", "train", config), 1)
    assert json.loads((tmp_path / "out" / "training.json").read_text())["steps"] == 2


# Says who it is, and ends with its standard input, as a stage does.
RANK = "import os; os.write(1, '{RANK} {WORLD_SIZE};'.format(**os.environ).encode()); os.read(0, 1); os._exit(75)"


@pytest.mark.parametrize("ended_by", ["a rank", "a signal", "death", "distill"])
def test_processes_end_with_their_launcher_and_with_the_first_that_dies(ended_by: str) -> None:
    command = launched(2, "ddp", [sys.executable, "-c", RANK])
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdin is not None
        assert sorted(process.stdout.read(len("0 2;1 2;")).split(";")) == ["", "0 2", "1 2"]
        ranks = psutil.Process(process.pid).children()
        if ended_by == "a rank":
            ranks[0].kill()
        elif ended_by == "distill":
            process.stdin.close()
        else:
            process.send_signal(signal.SIGTERM if ended_by == "a signal" else signal.SIGKILL)
        code = process.wait(30)
    assert code == {"a rank": -9, "a signal": -15, "death": -9, "distill": 75}[ended_by]
    assert psutil.wait_procs(ranks, timeout=10)[1] == []


def test_the_exit_code_is_that_of_the_first_that_failed() -> None:
    program = "import os, time; time.sleep(0.5 * (os.environ['RANK'] == '1')); os._exit(5)"
    with subprocess.Popen(launched(2, "fsdp", [sys.executable, "-c", program]), stdin=subprocess.PIPE) as process:
        assert process.wait(30) == 5


def test_time_is_scaled_by_the_gpus_that_share_the_work(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    done = Workload("generate", None, "vllm", 1000, 10, 2000, parts=2)
    record_stage(tmp_path / "old", "generate", 100.0, 0, 1, done)
    seconds = Throughput(tmp_path / "new").seconds(Workload("generate", None, "vllm", 1000, 20, 4000, parts=8))
    assert seconds == pytest.approx(50)
