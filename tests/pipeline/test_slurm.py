"""SLURM job arrays, with SLURM's variables and commands played by this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from helpers.tiny import command_line, files_of, generate_config, rows, write_jsonl

from dpkd_offline.common.errors import UsageError
from dpkd_offline.config.data import GenerateConfig, ScoreTeacherConfig
from dpkd_offline.config.recipe import from_recipe, slurm_share
from dpkd_offline.generation.generate import generate
from dpkd_offline.generation.score_teacher import score_teacher

PIPELINES = Path(__file__).parents[2] / "pipelines"
Run = Callable[..., subprocess.CompletedProcess[str]]


def array(*numbers: int | str) -> dict[str, str]:
    names = ("ID", "MIN", "MAX", "STEP", "COUNT")
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in zip(names, numbers, strict=True)}


@pytest.mark.parametrize(
    ("numbers", "share"),
    [
        ((0, 0, 7, 1, 8), (0, 8)),
        ((7, 0, 7, 1, 8), (7, 8)),
        ((3, 1, 4, 1, 4), (2, 4)),
        ((9, 1, 9, 4, 3), (2, 3)),
        ((8, 0, 10, 4, 3), (2, 3)),
        ((5, 5, 5, 1, 1), (0, 1)),
    ],
)
def test_a_worker_knows_its_place_in_the_array(numbers: tuple[int, ...], share: tuple[int, int]) -> None:
    assert tuple(slurm_share(array(*numbers)).values()) == share


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((1, 1, 7, 1, 3), "SLURM array: 3 ids from 1 to 7 in steps of 1 have gaps"),
        ((2, 0, 8, 4, 3), "have gaps"),
        ((1, 0, 3, 0, 4), "in steps of 0"),
        ((9, 0, 3, 1, 4), "have gaps"),
        (("x", 0, 3, 1, 4), "SLURM_ARRAY_TASK_ID=x: expected a whole number"),
        ((1, 0, 3, 1, ""), "SLURM_ARRAY_TASK_COUNT=: expected a whole number"),
    ],
)
def test_an_array_that_does_not_say_a_place_is_refused(numbers: tuple[int | str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=rf"{message}.*give --shard-index and --num-shards$"):
        slurm_share(array(*numbers))


def test_flags_and_recipe_win_over_the_array(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needed = {"dataset": "d", "role": "teacher", "model": "m"}
    recipe = tmp_path / "r.yaml"
    recipe.write_text("generate:\n  shard_index: 1\n  num_shards: 3\n")
    for name, value in array(2, 0, 7, 1, 8).items():
        monkeypatch.setenv(name, value)

    def share(file: Path | None, flags: dict[str, object]) -> tuple[int, int]:
        config = from_recipe(GenerateConfig, "generate", file, {**needed, **flags})
        return config.shard_index, config.num_shards

    assert share(None, {"shard_index": 0, "num_shards": 2}) == (0, 2)
    assert share(recipe, {}) == (1, 3)
    assert share(recipe, {"shard_index": 2}) == (2, 3)
    assert capsys.readouterr().err == ""
    assert share(None, {}) == (2, 8)
    assert capsys.readouterr().err == "SLURM array: worker 3 of 8\n"
    for alone in ("shard_index", "num_shards"):
        with pytest.raises(UsageError, match="give both --shard-index and --num-shards, or neither"):
            share(None, {alone: 1})
    config = generate_config(Path("d"), "teacher", Path("m"))  # a program says its share itself
    assert (config.shard_index, config.num_shards) == (0, 1)


def test_a_program_outside_an_array_has_all_shards() -> None:
    assert slurm_share({"SLURM_JOB_ID": "1"}) == {}


SBATCH = """#!{python}
import os, subprocess, sys
with open("jobs", "a+") as jobs:
    jobs.seek(0)
    number = len(jobs.readlines()) + 1
    jobs.write(" ".join(sys.argv[1:]) + "\\n")
script = next(n for n, a in enumerate(sys.argv) if a.endswith(".sh"))
count = next((int(a.partition("-")[2].rpartition("-")[2]) + 1 for a in sys.argv if a.startswith("--array=")), 0)
def start(index):
    numbers = dict(ID=index, MIN=0, MAX=count - 1, STEP=1, COUNT=count) if count else dict()
    numbers = {{f"SLURM_ARRAY_TASK_{{k}}": str(v) for k, v in numbers.items()}}
    output = open(f"job-{{number}}_{{index}}", "wb")
    environment = {{**os.environ, **numbers, "SLURM_JOB_ID": f"{{number}}{{index}}"}}
    return subprocess.Popen(["bash", *sys.argv[script:]], env=environment, stdout=output, stderr=output)
workers = [start(index) for index in range(count or 1)]
codes = [worker.wait() for worker in workers]
print(f"{{number}};cluster")
sys.exit(max(codes))
"""


def play_slurm(folder: Path) -> dict[str, str]:
    """An environment in which sbatch runs an array at once, srun its command, and scontrol notes what it is told."""
    commands = folder / "bin"
    commands.mkdir()
    for name, text in {
        "sbatch": SBATCH.format(python=sys.executable),
        "srun": '#!/bin/sh\nexec "$@"\n',
        "scontrol": '#!/bin/sh\necho "$@" >> scontrol\n',
        "dpkd-offline": f'#!/bin/sh\nexec {sys.executable} -m dpkd_offline.cli "$@"\n',
    }.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    return {**os.environ, "PATH": f"{commands}:{os.environ['PATH']}"}


@pytest.mark.slow
def test_four_workers_that_start_together_give_the_bytes_of_one(
    tmp_path: Path, teachers: dict[str, Path], students: dict[str, Path]
) -> None:
    teacher, student = str(teachers["llama"]), str(students["llama"])
    tiny = {"engine": "transformers", "dtype": "float32", "max_length": 256}
    source = str(write_jsonl(tmp_path / "p.jsonl", rows(46)))
    recipe = tmp_path / "r.yaml"
    sections = {
        "generate": {**tiny, "prompts": source, "max_new_tokens": 8, "shard_size": 4},
        "score_teacher": tiny,
        "train": {"max_steps": 1, "dtype": "float32"},
    }
    recipe.write_text(yaml.safe_dump(sections))
    one, many = tmp_path / "one" / "dataset", tmp_path / "many" / "dataset"
    for role, model in (("teacher", teacher), ("student", student)):
        generate(from_recipe(GenerateConfig, "generate", recipe, {"dataset": one, "role": role, "model": model}))
    score_teacher(from_recipe(ScoreTeacherConfig, "score_teacher", recipe, {"dataset": one, "model": teacher}))

    settings = {"TEACHER": teacher, "STUDENT": student, "RECIPE": str(recipe), "WORKERS": "2"}
    settings |= {"DATASET": str(many), "OUTPUT": str(tmp_path / "many" / "student")}
    environment = {**play_slurm(tmp_path), **settings}
    script = str(PIPELINES / "slurm.sh")
    first = f"generate --config {recipe} --dataset {many} --role teacher --model {teacher}".split()
    for command in (["sbatch", "--array=0-3", script, *first], ["bash", script]):
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        logs = {path.name: path.read_text() for path in tmp_path.glob("job-*")}
        assert done.returncode == 0, (done.stderr, logs)
    assert files_of(many) == files_of(one)
    assert (tmp_path / "many" / "student" / "config.json").exists()
    assert "SLURM array: worker 3 of 4\n" in logs["job-1_2"]
    jobs = (tmp_path / "jobs").read_text().splitlines()[1:]
    assert [("--array=0-1" in job, "--dependency=" in job) for job in jobs] == [
        (True, False),
        (True, True),
        (True, True),
        (False, True),
    ]


def test_an_interrupted_worker_queues_again(tmp_path: Path) -> None:
    environment = play_slurm(tmp_path)
    (tmp_path / "bin" / "dpkd-offline").write_text("#!/bin/sh\nexit $2\n")
    settings = {"TEACHER": "t", "STUDENT": "s", "RECIPE": "r", "SLURM_JOB_ID": "123"}
    for code in (0, 3, 75):
        command = ["bash", str(PIPELINES / "slurm.sh"), "generate", str(code)]
        assert subprocess.run(command, env={**environment, **settings}, cwd=tmp_path).returncode == code
    assert (tmp_path / "scontrol").read_text() == "requeue 123\n"


@pytest.mark.slow
def test_distill_says_that_it_does_not_share(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    prompts = write_jsonl(tmp_path / "p.jsonl", rows(3))
    recipe.write_text(f"teacher: none\nstudent: none\noutput: {tmp_path / 'run'}\ngenerate:\n  prompts: {prompts}\n")
    environment = {**os.environ, **array(2, 0, 7, 1, 8)}
    done = subprocess.run(command_line("distill", recipe), env=environment, capture_output=True, text=True)
    assert done.returncode == 69
    assert done.stderr.startswith("SLURM array: distill runs its whole recipe in one worker, and the others end")
    assert "worker 3 of 8" not in done.stderr
