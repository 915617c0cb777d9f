"""The data stages under SIGKILL, full and failing disks, and rival writers: nothing lost, doubled or silently wrong."""

from __future__ import annotations

import errno
import os
import random
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from helpers.faults import FORKS, POINTS, at_every_point, start
from helpers.tiny import TINY, files_of, make_dataset, rows, write_jsonl

from dpkd_offline import cli
from dpkd_offline.config.base import SamplingOptions
from dpkd_offline.curation.verify import verify
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.dataset.layout import TEACHER_RESPONSES
from dpkd_offline.dataset.schema import Response
from dpkd_offline.dataset.table import ShardPlan, Table
from dpkd_offline.dataset.writing import write_shard
from dpkd_offline.engines.base import Completion, GenerateRequest, Key, Score, ScoreRequest
from dpkd_offline.generation import generate

pytestmark = pytest.mark.slow
Arguments = list[object]


def stages(folder: Path, source: Path, teacher: Path, student: Path, shard_size: int, *more: object) -> list[Arguments]:
    """The commands that fill a dataset."""
    common = ["--dataset", folder, "--batch-size", 4, *TINY, *more]
    sampling = ["--max-new-tokens", 6, "--shard-size", shard_size, *common]
    return [
        ["generate", "--role", "teacher", "--model", teacher, "--prompts", source, *sampling],
        ["generate", "--role", "student", "--model", student, *sampling],
        ["score-teacher", "--model", teacher, "--top-k", 3, *common],
    ]


def finish(arguments: Arguments) -> int | None:
    process = start(arguments)
    process.join(120)
    return process.exitcode


def without_names(folder: Path) -> dict[str, bytes]:
    """A dataset's files; the claims hold the folder's name and how work was shared out, which differ between runs."""
    own = re.compile(rb'"(dataset|shard_index|num_shards)": [^\n]*\n')
    return {name: own.sub(b"", data) if name.endswith(".json") else data for name, data in files_of(folder).items()}


@pytest.fixture
def models(teachers: dict[str, Path], students: dict[str, Path]) -> tuple[Path, Path]:
    return teachers["gpt2"], students["gpt2"]  # without a chat template, which each process would try in another


def test_two_hundred_kills_lose_and_double_nothing(tmp_path: Path, models: tuple[Path, Path]) -> None:
    """Killed at every named point of a write, and at random times, over both stages, until 200 kills have hit."""
    source = write_jsonl(tmp_path / "p.jsonl", rows(24))
    for arguments in stages(tmp_path / "calm", source, *models, 3):
        assert finish(arguments) == 0
    calm = without_names(tmp_path / "calm")
    random_ = random.Random(0)
    kills: Counter[str] = Counter()
    attempts = datasets = 0
    while sum(kills.values()) < 200:
        datasets += 1
        folder = tmp_path / f"killed-{datasets}"
        for arguments in stages(folder, source, *models, 3):
            while True:
                attempts += 1
                point = (*POINTS, None)[attempts % (len(POINTS) + 1)]
                process = start(arguments, point, passes=random_.randrange(5))
                if point is None:
                    process.join(random_.uniform(0.1, 1.2))
                    process.kill()
                process.join(120)
                if process.exitcode == 0:
                    break
                assert process.exitcode == -signal.SIGKILL
                kills[point or "a random time"] += 1
        assert finish(arguments) == 0
        assert without_names(folder) == calm
        assert set(verify(folder).rows.values()) == {24}
    print(f"\n{sum(kills.values())} kills over {datasets} datasets, 0 rows lost, 0 doubled: {dict(kills)}")
    assert set(kills) == {*POINTS, "a random time"}


def test_eight_workers_that_are_killed_make_what_one_makes(tmp_path: Path, models: tuple[Path, Path]) -> None:
    source = write_jsonl(tmp_path / "p.jsonl", rows(128))
    for arguments in stages(tmp_path / "one", source, *models, 2):
        assert finish(arguments) == 0
    random_ = random.Random(1)
    kills = 0
    for arguments in stages(tmp_path / "eight", source, *models, 2):
        goal, hit = time.monotonic() + 8, 0
        workers: dict[int, Any] = {}
        done: set[int] = set()
        while len(done) < 8:
            for index in set(range(8)) - done:
                if index not in workers:
                    workers[index] = start([*arguments, "--shard-index", index, "--num-shards", 8])
                elif workers[index].exitcode is not None:
                    ended = workers.pop(index).exitcode
                    assert ended in (0, -signal.SIGKILL)
                    done |= {index} if ended == 0 else set()
                elif time.monotonic() < goal and random_.random() < 0.02:
                    workers[index].kill()
                    hit += 1
            time.sleep(0.02)
        kills += hit
    one, eight = without_names(tmp_path / "one"), without_names(tmp_path / "eight")
    assert Dataset.open(tmp_path / "eight").plan.count == 64
    assert eight == one
    print(f"\n8 workers, 64 shards, 3 stages, {kills} kills: every file as from one worker")
    assert kills >= 20


# --- rivals ---------------------------------------------------------------------------------------------------------

PLAN = ShardPlan(rows=4, shard_size=4)


def rival(folder: str, barrier: Any, races: int, name: str) -> None:
    """Commit the same shards as somebody else, at the same moment, with other numbers in them."""
    responses = [
        Response(f"id-{n}", name * 50, [ord(c) for c in name] * 50, "length", [-0.5] * 50 * len(name), 0)
        for n in range(4)
    ]
    for race in range(races):
        table = Table(Path(folder) / str(race), TEACHER_RESPONSES, PLAN)
        barrier.wait(60)
        write_shard(table, 0, responses)
        table.read(0)


def test_two_hundred_races_of_two_writers_have_one_winner_each(tmp_path: Path) -> None:
    barrier = FORKS.Barrier(2)
    writers = [FORKS.Process(target=rival, args=(str(tmp_path), barrier, 200, name)) for name in ("a", "b")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(240)
        assert writer.exitcode == 0
    winners = Counter()
    for race in range(200):
        table = Table(tmp_path / str(race), TEACHER_RESPONSES, PLAN)
        (name,) = {row.response[0] for row in table.read(0)}  # whole, and what its manifest entry says
        winners[name] += 1
        assert sorted(files_of(tmp_path / str(race))) == [
            "responses/teacher/_manifest/responses-00000-of-00001.json",
            "responses/teacher/responses-00000-of-00001.parquet",
        ]
    print(f"\n200 races of two writers: won by {dict(winners)}, 0 mixed")
    assert sum(winners.values()) == 200


# --- disks ----------------------------------------------------------------------------------------------------------


class FakeEngine:
    """Responses and log-probs that are a function of the request, without a model."""

    name = "transformers"  # which it stands for
    versions: ClassVar[dict[str, str]] = {}

    def generate(
        self, groups: Iterator[Sequence[GenerateRequest]], sampling: SamplingOptions
    ) -> Iterator[tuple[Key, Completion]]:
        for group in groups:
            for request in group:
                random_ = random.Random(request.seed)
                ids = [random_.randrange(5, 300) for _ in range(sampling.max_new_tokens - 1)]
                yield request.key, Completion([*ids, 1], "stop", [-random_.random() for _ in [*ids, 1]])

    def score(self, groups: Iterator[Sequence[ScoreRequest]], top_k: int = 0) -> Iterator[tuple[Key, list[Score]]]:
        for group in groups:
            for request in group:
                yield request.key, [Score([-token / 400 for token in y], [], []) for y in request.responses]

    def close(self) -> None:
        pass


def run_here(arguments: Arguments, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["dpkd-offline", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
def test_a_disk_that_fails_at_any_of_the_first_hundred_writes_leaves_what_was_there(
    error: int,
    tmp_path: Path,
    models: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(generate, "load_engine", lambda *_: FakeEngine())
    source = write_jsonl(tmp_path / "p.jsonl", rows(24))
    assert run_here(stages(tmp_path / "calm", source, *models, 3)[0], monkeypatch) == 0
    calm = without_names(tmp_path / "calm")
    failed: Counter[str] = Counter()
    for number in range(100):
        command = stages(tmp_path / str(number), source, *models, 3)[0]
        before: dict[str, bytes] = {}
        passed = 0

        def fail(point: str, number: int = number, before: dict[str, bytes] = before) -> None:
            nonlocal passed
            passed += 1
            if passed == number + 1:
                failed[point] += 1
                before |= {k: v for k, v in files_of(tmp_path / str(number)).items() if not k.endswith(".tmp")}
                raise OSError(error, os.strerror(error))

        with at_every_point(fail):
            assert run_here(command, monkeypatch) == 75
        *_, last = capfd.readouterr().err.splitlines()
        assert last.startswith("dpkd-offline: ") and os.strerror(error) in last
        after = files_of(tmp_path / str(number))
        assert not any(name.endswith(".tmp") for name in after)
        assert {name: after[name] for name in before} == before
        assert run_here(command, monkeypatch) == 0
        assert without_names(tmp_path / str(number)) == calm
    print(
        f"\n100 writes of 100 failed with '{os.strerror(error)}', at {dict(failed)}: old data whole, then the same end"
    )


def test_a_shard_that_cannot_be_read_is_named(
    tmp_path: Path,
    source: Path,
    models: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = make_dataset(tmp_path / "ds", source, *models)
    opened = os.open

    def failing(path: Any, *rest: Any, **named: Any) -> int:
        if str(path).endswith(".parquet"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return opened(path, *rest, **named)

    monkeypatch.setattr(os, "open", failing)
    assert run_here(["verify", folder], monkeypatch) == 3
    assert (
        capfd.readouterr()
        .err.splitlines()[-1]
        .endswith("prompts-00000-of-00003.parquet: cannot be read: Input/output error")
    )
