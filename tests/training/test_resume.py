"""Training that is stopped, killed, or whose checkpoints are damaged: the same weights in the end, or one line."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.faults import STATE_POINTS, start
from helpers.tiny import files_of, write_jsonl

from dpkd_offline import cli
from dpkd_offline.common.errors import DataError, Interrupted, MismatchError, StorageError
from dpkd_offline.config.train import TrainConfig
from dpkd_offline.training import checkpoint, distributed, trainer
from dpkd_offline.training.checkpoint import Position, load_state, random_states, restore_random, save_state
from dpkd_offline.training.trainer import train

STEPS = 20
OPTIONS = {  # what changes the arithmetic of a step
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "lora": {"dtype": "bfloat16", "lora_rank": 4},
    "compiled": {"dtype": "bfloat16", "compile": True},
}
Options = dict[str, Any]


@pytest.fixture
def values(datasets_by_family: dict[str, Path], students: dict[str, Path], tmp_path: Path) -> Options:
    """20 steps of 5 of 22 pairs, so that epochs end within; several micro batches a step, and a corpus."""
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [{"text": f"Tea and a river, day {n}."} for n in range(30)])
    return {
        "dataset": str(datasets_by_family["llama"]),
        "student": str(students["llama"]),
        "batch_size": 5,
        "micro_batch_tokens": 200,
        "lm_corpus": str(corpus),
        "lm_length": 16,
        "lm_batch_size": 3,
        "learning_rate": 1e-3,
        "max_steps": STEPS,
        "save_every": 1,
        "holdout": 0.0,
    }


def config_of(values: Options, output: Path, **changes: object) -> TrainConfig:
    return TrainConfig.model_validate({**values, "output": output, **changes})


def arguments(values: Options, output: Path, **changes: object) -> list[object]:
    """The same as a command's."""
    words: list[object] = ["train"]
    for key, value in {**values, "output": output, **changes}.items():
        words += [f"--{key.replace('_', '-')}", *([] if value is True else [value])]
    return words


def student_of(output: Path, total: int = STEPS) -> dict[str, bytes]:
    """The files of a finished run but for the metrics, which hold the rate of each step."""
    files = files_of(output)
    steps = [json.loads(line)["step"] for line in files.pop("metrics.jsonl").splitlines()]
    assert steps == list(range(1, total + 1))
    assert not [name for name in files if "checkpoints" in name or "saving" in name]
    return files


class Stop(Exception):
    """Raised in place of a kill, after a checkpoint."""


def after_each_save(monkeypatch: pytest.MonkeyPatch, act: Callable[[Path], None]) -> None:
    def save(folder: Path, position: Position, *rest: Any) -> None:
        save_state(folder, position, *rest)
        act(folder / f"step-{position.step:08d}")

    monkeypatch.setattr(trainer, "save_state", save)


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_from_every_step_a_run_goes_on_to_the_same_bytes(
    options: Options, values: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From step k the checkpoint of k + 1 is made again to the byte; from some of them also all that follow.

    Adapters and compiled layers go on from a few steps alone.
    """
    values = {**values, **options}
    kept, output = tmp_path / "kept", tmp_path / "calm" / "student"
    after_each_save(monkeypatch, lambda state: shutil.copytree(state, kept / state.name))
    train(config_of(values, output))
    calm = student_of(output)
    states = {path.name: files_of(path) for path in kept.iterdir()}
    assert len(states) == STEPS - 1
    assert len({state["state.safetensors"] for state in states.values()}) == STEPS - 1

    compared: list[str] = []

    def compare(state: Path) -> None:
        assert files_of(state) == states[state.name]
        compared.append(state.name)
        if k not in (1, 8, 19):
            raise Stop

    after_each_save(monkeypatch, compare)
    for k in range(1, STEPS) if options.keys() == {"dtype"} else (1, 2, 8, 13, 19):
        output = tmp_path / str(k) / "student"
        shutil.copytree(kept / f"step-{k:08d}", output / "checkpoints" / f"step-{k:08d}")
        write_jsonl(output / "metrics.jsonl", [{"step": step + 1} for step in range(STEPS)])
        torch.manual_seed(1234)  # as another process may stand
        try:
            train(config_of(values, output))
            assert student_of(output) == calm
        except Stop:
            assert compared[-1] == f"step-{k + 1:08d}"
            lines = (output / "metrics.jsonl").read_text().splitlines()
            assert [json.loads(line)["step"] for line in lines] == list(range(1, k + 2))
    assert set(compared) == states.keys() - {"step-00000001"}


def finish(values: Options, output: Path) -> None:
    process = start(arguments(values, output))
    process.join(120)
    assert process.exitcode == 0


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_kill_between_micro_batches_changes_nothing(options: Options, values: Options, tmp_path: Path) -> None:
    values = {**values, **options, "save_every": 2}
    finish(values, tmp_path / "calm" / "student")
    output = tmp_path / "killed" / "student"
    for backwards in (
        (7, 11) if "compile" in options else (7, 11, 14, 9)
    ):  # since the start of each run; a step has three or more
        process = start(arguments(values, output), "before backward", backwards)
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
    finish(values, output)
    assert student_of(output) == student_of(tmp_path / "calm" / "student")


@pytest.mark.slow
def test_fifty_kills_leave_a_whole_checkpoint_and_the_same_weights(values: Options, tmp_path: Path) -> None:
    """Killed at every named point of a checkpoint and at random times, in run after run until 50 kills have hit.

    Every other time a thread writes the checkpoints, as on a GPU.
    """
    finish(values, tmp_path / "calm" / "student")
    calm = student_of(tmp_path / "calm" / "student")
    random_, kills, attempts, runs = random.Random(0), Counter[str](), 0, 0
    while sum(kills.values()) < 50:
        output, runs, committed = tmp_path / str(runs) / "student", runs + 1, 0
        while True:
            attempts += 1
            point = (*STATE_POINTS, None)[attempts % (len(STATE_POINTS) + 1)]
            passes, background = random_.randrange(1, 4), attempts % 2 == 1
            process = start(arguments(values, output), point, passes, tmp_path / "errors", background)
            if point is None:
                changed = changed_at(output / "metrics.jsonl")
                while process.exitcode is None and changed_at(output / "metrics.jsonl") == changed:
                    time.sleep(0.001)
                process.join(random_.uniform(0, 0.2))
                process.kill()
            process.join(120)
            if process.exitcode == 0:
                break
            assert process.exitcode == -signal.SIGKILL, (tmp_path / "errors").read_text()
            kills[point or "a random time"] += 1
            committed = whole_step(output, committed)
        assert student_of(output) == calm
    print(f"\n{sum(kills.values())} kills over {runs} runs, the same weights after each run: {dict(kills)}")
    assert set(kills) == {*STATE_POINTS, "a random time"}


def changed_at(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def whole_step(output: Path, before: int) -> int:
    """The step of the checkpoint that a killed run left: never an older one than was there, and whole."""
    if (output / "training.json").exists():
        return before
    folder = output / "checkpoints"
    names = sorted(path.name for path in folder.glob("step-*"))
    if not names:
        assert before == 0
        return 0
    run = json.loads((folder / names[-1] / "state.json").read_text())["run"]
    position, _ = load_state(folder, run) or (Position(0), {})
    assert position.step == int(names[-1].removeprefix("step-")) >= before
    return position.step


def test_a_thread_writes_a_checkpoint_while_steps_are_taken(
    values: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of step 5 is written when step 9 is taken. It is what it would have been, and the weights are the same."""
    values |= {"save_every": 5, "max_steps": 12}
    kept, output = tmp_path / "kept", tmp_path / "threads" / "student"
    with monkeypatch.context() as patch:
        after_each_save(patch, lambda state: shutil.copytree(state, kept / state.name))
        train(config_of(values, tmp_path / "calm" / "student"))

    step, write, savings, committed, may_write = trainer.Run.step, checkpoint.write_tensors, [], [], threading.Event()

    class Noted(checkpoint.Saving):
        def __init__(self, *rest: Any, **named: Any) -> None:
            super().__init__(*rest, **named)
            savings.append(self)

        def commit(self) -> None:
            super().commit()
            (folder,) = (output / "checkpoints").iterdir()
            assert files_of(folder) == files_of(kept / folder.name)
            lines = (output / "metrics.jsonl").read_text().splitlines()
            committed.append((folder.name, json.loads(lines[-1])["step"]))

    def noted_step(run: trainer.Run, number: int, *rest: Any) -> Any:
        if number == 8:
            assert not savings[0].is_written()
            may_write.set()
            savings[0].wait()
        return step(run, number, *rest)

    def late_write(path: Path, tensors: dict[str, torch.Tensor]) -> str:
        assert threading.current_thread() is not threading.main_thread()
        assert may_write.wait(60)
        return write(path, tensors)

    monkeypatch.setattr(trainer.Run, "step", noted_step)
    monkeypatch.setattr(trainer, "Saving", Noted)
    monkeypatch.setattr(checkpoint, "write_tensors", late_write)
    monkeypatch.setattr(trainer, "copies_fit", lambda *_: True)
    train(config_of(values, output))
    assert committed[0] == ("step-00000005", 9)
    assert committed[1] in [("step-00000010", 11), ("step-00000010", 12)]
    assert student_of(output, 12) == student_of(tmp_path / "calm" / "student", 12)


def test_a_run_that_fails_waits_for_the_thread(
    values: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, write, written = trainer.Run.step, checkpoint.write_tensors, list[Path]()

    def failing_step(run: trainer.Run, number: int, *rest: Any) -> Any:
        if number == 1:
            raise DataError("a row is damaged")
        return step(run, number, *rest)

    def slow_write(path: Path, tensors: dict[str, torch.Tensor]) -> str:
        time.sleep(0.3)
        written.append(path)
        return write(path, tensors)

    monkeypatch.setattr(trainer.Run, "step", failing_step)
    monkeypatch.setattr(checkpoint, "write_tensors", slow_write)
    monkeypatch.setattr(trainer, "copies_fit", lambda *_: True)
    with pytest.raises(DataError, match="a row is damaged"):
        train(config_of(values, tmp_path / "student"))
    assert [path.parent.name for path in written] == [".step-00000001"] and written[0].exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_polite_signal_ends_with_a_checkpoint_of_its_step(
    number: signal.Signals, values: Options, tmp_path: Path
) -> None:
    values["save_every"] = 1000
    finish(values, tmp_path / "calm" / "student")
    output = tmp_path / "stopped" / "student"
    metrics = output / "metrics.jsonl"
    process = start(arguments(values, output), errors=tmp_path / "errors")
    while not metrics.exists() or metrics.read_text().count("\n") < 3:
        assert process.is_alive()
        time.sleep(0.001)
    assert process.pid is not None
    os.kill(process.pid, number)
    time.sleep(0.01)
    os.kill(process.pid, number)  # as a launcher hands it on: the two ask once
    process.join(120)
    assert process.exitcode == 75
    errors = (tmp_path / "errors").read_text()
    (folder,) = (output / "checkpoints").iterdir()
    step = int(folder.name.removeprefix("step-"))
    assert step == metrics.read_text().count("\n") >= 3
    assert errors.splitlines()[-1] == (
        f"dpkd-offline: stopped by {number.name} after step {step}; the same command goes on"
    )
    assert "Traceback" not in errors
    finish(values, output)
    assert student_of(output) == student_of(tmp_path / "calm" / "student")


def test_who_asks_again_is_heard_at_once(values: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def interrupted(number: int, _: object) -> None:
        raise Interrupted("at once")

    step = trainer.Run.step

    def ask(run: trainer.Run, number: int, *rest: Any) -> Any:
        facts = step(run, number, *rest)
        if number == 2:
            for _ in range(2):
                signal.raise_signal(signal.SIGTERM)
                asked.append(number)
        return facts

    monkeypatch.setattr(trainer.Run, "step", ask)
    monkeypatch.setattr(distributed, "ONE_REQUEST_SECONDS", -1.0)
    before = signal.signal(signal.SIGTERM, interrupted)
    try:
        with pytest.raises(Interrupted, match="at once"):
            train(config_of(values, tmp_path / "a", save_every=2))
        assert signal.getsignal(signal.SIGTERM) is interrupted
    finally:
        signal.signal(signal.SIGTERM, before)
    assert asked == [2]
    assert [p.name for p in (tmp_path / "a" / "checkpoints").iterdir()] == ["step-00000002"]


def test_a_signal_in_the_last_step_lets_the_run_end(
    values: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = trainer.save_student

    def ask(*arguments: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        save(*arguments)

    monkeypatch.setattr(trainer, "save_student", ask)
    train(config_of(values, tmp_path / "a", max_steps=2))
    assert (tmp_path / "a" / "training.json").exists()


# --- damages --------------------------------------------------------------------------------------------------------

FILES = ("state.json", "state.safetensors")


def one_bit(data: bytes, place: int) -> bytes:
    changed = bytearray(data)
    changed[place] ^= 1 << place % 8
    return bytes(changed)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut short": lambda data: data[:-2],
    "cut in half": lambda data: data[: len(data) // 2],
    "a bit early": lambda data: one_bit(data, 11),
    "a bit in the middle": lambda data: one_bit(data, len(data) // 2),
    "a bit late": lambda data: one_bit(data, len(data) - 7),
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_or_passed_over(
    damage: str, file: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save_state(tmp_path, Position(7), "run", {"a": torch.arange(40.0)})
    shutil.copytree(tmp_path / "step-00000007", tmp_path / "kept")
    save_state(tmp_path, Position(8), "run", {"a": torch.arange(40.0) + 1})
    path = tmp_path / "step-00000008" / file
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.raises(DataError, match=rf"step-00000008/{file}.*start over with --no-resume$") as refused:
        load_state(tmp_path, "run")
    assert "\n" not in str(refused.value)
    save_state(tmp_path / "b", Position(7), "run", {"a": torch.arange(40.0)})
    shutil.copytree(tmp_path / "step-00000008", tmp_path / "b" / "step-00000008")
    capfd.readouterr()
    position, tensors = load_state(tmp_path / "b", "run") or (None, {})
    assert position == Position(7)
    assert torch.equal(tensors["a"], torch.arange(40.0))
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path}/b/step-00000008/{file}") and line.endswith("; an older checkpoint is whole")
    save_state(tmp_path / "b", Position(8), "run", {"a": torch.ones(1)})  # in place of the damaged one
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["step-00000008"]
    assert load_state(tmp_path / "b", "run") is not None


def test_every_flipped_bit_of_the_record_is_seen(tmp_path: Path) -> None:
    save_state(tmp_path, Position(7), "run", {"a": torch.ones(3)})
    path = tmp_path / "step-00000007" / "state.json"
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(one_bit(whole, place))
        try:
            loaded = load_state(tmp_path, "run")
        except DataError:
            continue
        assert loaded is not None and loaded[0] == Position(7)  # white space became other white space


def test_the_state_of_the_generators_goes_with_a_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(3)
    torch.rand(5)
    save_state(tmp_path, Position(1), "run", {})
    expected = torch.rand(4)
    _, tensors = load_state(tmp_path, "run") or (None, {})
    assert tensors.keys() == random_states().keys()
    assert {tensor.dtype for tensor in tensors.values()} == {torch.uint8}
    restore_random(tensors)
    assert torch.equal(torch.rand(4), expected)


def test_another_runs_checkpoint_or_student_is_refused_until_told_to_start_over(
    values: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"

    def stop(_: Path) -> None:
        raise Stop

    after_each_save(monkeypatch, stop)
    with pytest.raises(Stop):
        train(config_of(values, output))
    with pytest.raises(MismatchError, match="holds a trained student of another command"):
        train(config_of(values, output, beta=0.5))
    with pytest.raises(Stop):  # where a checkpoint comes is nobody's business
        train(config_of(values, output, save_every=2))
    assert [p.name for p in (output / "checkpoints").iterdir()] == ["step-00000002"]

    monkeypatch.undo()
    short = {"max_steps": 2, "save_every": 100}
    train(config_of(values, output, beta=0.5, resume=False, **short))
    assert not (output / "checkpoints").exists()
    before = files_of(output)
    with pytest.raises(MismatchError, match="holds a trained student of another command"):
        train(config_of(values, output, **short))
    assert files_of(output) == before
    train(config_of(values, output, resume=False, **short))
    train(config_of(values, output, **short))  # trained already


# --- disks ----------------------------------------------------------------------------------------------------------


def run_here(words: list[object], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["dpkd-offline", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def file_limit(limit: int) -> None:
    """Let the system refuse to write files beyond a length, as a full disk does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize("limit", [0, 3000, 100_000])
def test_a_checkpoint_that_the_disk_refuses_leaves_the_one_before(limit: int, tmp_path: Path) -> None:
    tensors = {"a": torch.ones(100_000)}
    save_state(tmp_path, Position(1), "run", tensors)
    file_limit(limit)
    try:
        with pytest.raises(StorageError, match=r"step-00000002.*cannot be written: File too large") as refused:
            save_state(tmp_path, Position(2), "run", tensors)
    finally:
        file_limit(resource.RLIM_INFINITY)
    assert "\n" not in str(refused.value)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert load_state(tmp_path, "run") is not None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "module", "name", "limit", "background"),
    [
        ("step-00000002", checkpoint, "write_tensors", 10_000, False),
        ("step-00000002", checkpoint, "write_tensors", 10_000, True),
        ("metrics.jsonl", trainer.MetricsFile, "write", 0, False),
        ("student", trainer, "save_student", 30_000, False),
        ("training.json", trainer, "write_json", 0, False),
    ],
)
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(
    where: str,
    module: Any,
    name: str,
    limit: int,
    background: bool,
    values: Options,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Full while the second checkpoint, the metrics of step 2, the student or what says that it is done is written."""
    values["max_steps"] = 3
    assert run_here(arguments(values, tmp_path / "calm" / "student"), monkeypatch) == 0
    command, write, calls = arguments(values, tmp_path / "full" / "student"), getattr(module, name), 0

    def limited(*positional: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2 or module is trainer:
            file_limit(limit)
        try:
            return write(*positional, **named)
        finally:
            file_limit(resource.RLIM_INFINITY)

    with monkeypatch.context() as patched:
        patched.setattr(module, name, limited)
        if background:
            patched.setattr(trainer, "copies_fit", lambda *_: True)
        code = run_here(command, patched)
    last = capfd.readouterr().err.splitlines()[-1]
    assert code == 75
    assert last.startswith("dpkd-offline: ") and f"{where}: cannot be written: File too large; " in last
    (state,) = (tmp_path / "full" / "student" / "checkpoints").iterdir()
    assert state.name == ("step-00000002" if module is trainer else "step-00000001")
    assert run_here(command, monkeypatch) == 0
    assert student_of(tmp_path / "full" / "student", 3) == student_of(tmp_path / "calm" / "student", 3)


def test_saving_state_makes_no_copy_of_the_tensors(tmp_path: Path) -> None:
    """In a process of its own, whose peak is measured."""
    code = (
        "import resource, sys, torch; from pathlib import Path\n"
        "from dpkd_offline.training.checkpoint import Position, save_state\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "save_state(Path(sys.argv[1]), Position(1), 'run', {'a': torch.ones(10)})\n"
        "tensors = {str(n): torch.ones(2**22) for n in range(16)}\n"
        "before = peak()\n"
        "save_state(Path(sys.argv[1]), Position(2), 'run', tensors)\n"
        "print(peak() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 32  # MiB, of 256
