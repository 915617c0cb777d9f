from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import metrics_of, train_config, train_until, weights_of

from dpkd_offline.common.errors import UnavailableError
from dpkd_offline.config.train import TrainConfig
from dpkd_offline.models.loading import load_model
from dpkd_offline.training import trainer
from dpkd_offline.training.distributed import Processes
from dpkd_offline.training.memory import GIB, TOKENS, MicroBatchMemory, RunMemory
from dpkd_offline.training.optimizer import MasterAdamW
from dpkd_offline.training.student import Student, layers_of
from dpkd_offline.training.trainer import train

FIXED, OF_TOKEN, RECOMPUTED = 2**20, 1000, 100  # bytes of the fake


class FakeMemory:
    """A device on which a token of a micro batch takes so many bytes, fewer if its layers are computed again."""

    def __init__(self, free: int) -> None:
        self.free, self.trials = free, 0
        self.student: Student | None = None

    def total(self) -> int:
        return self.free

    def available(self) -> int:
        return self.free

    def peak_of(self, work: Callable[[], None]) -> int:
        self.trials += 1
        seen: list[int] = []
        student = work.student  # type: ignore[attr-defined]
        hook = student.register_forward_pre_hook(lambda _, args: seen.append(args[0].input_ids.numel()))
        work()
        hook.remove()
        again = "recomputed" in layers_of(student.model)[0].forward.__qualname__
        peak = FIXED + sum(seen) * (RECOMPUTED if again else OF_TOKEN)
        if peak > self.free:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has")
        return peak


def settled(free: int, model: Path, **changes: Any) -> tuple[RunMemory, Student, MasterAdamW]:
    config = TrainConfig(dataset=Path("d"), student=str(model), output=Path("o"), **changes)
    student = Student(load_model(str(model), "float32"))
    optimizer = MasterAdamW(student, torch.float32, config, Processes())
    memory = RunMemory(config, Processes(), FakeMemory(free), student)
    memory.settle(student, optimizer)
    return memory, student, optimizer


def room_for(tokens: int, of_token: int, model: Path) -> int:
    """Free bytes with which so many tokens fit, and hardly more."""
    moments = 8 * sum(p.numel() for p in load_model(str(model), "float32").parameters())
    return int((moments + FIXED + of_token * tokens) / 0.92) + 1000


@pytest.fixture(scope="module")
def model(students: dict[str, Path]) -> Path:
    return students["llama"]


@pytest.mark.parametrize("tokens", [TOKENS[0], 8192, TOKENS[-1]])
def test_the_largest_micro_batch_that_fits_is_taken(
    tokens: int, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memory, student, optimizer = settled(room_for(tokens, OF_TOKEN, model), model, max_length=256)
    assert memory.config.micro_batch_tokens == tokens and memory.config.gradient_checkpointing is False
    assert memory.choices == {"micro_batch_tokens": tokens, "gradient_checkpointing": False}
    assert f"micro batches of at most {tokens} tokens: " in capsys.readouterr().err
    assert memory.micro_batch is not None
    assert memory.micro_batch.per_token == pytest.approx(OF_TOKEN) and memory.micro_batch.fixed == pytest.approx(FIXED)
    assert not any(gradient.any() for gradient in optimizer.gradients())  # the trial leaves none
    assert all(
        torch.equal(a, b)
        for a, b in zip(student.parameters(), Student(load_model(str(model), "float32")).parameters(), strict=True)
    )


def test_layers_are_computed_again_where_the_longest_pair_would_not_fit(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    free = room_for(1500, OF_TOKEN, model)  # a pair of two times 1024 tokens needs more
    memory, _, _ = settled(free, model)
    assert memory.config.gradient_checkpointing is True and memory.config.micro_batch_tokens == 8192
    assert "with gradient checkpointing" in capsys.readouterr().err
    memory, _, _ = settled(free, model, gradient_checkpointing=False)
    assert memory.choices == {"micro_batch_tokens": 1024}
    assert "warning: the longest pair, of 2048 tokens, would take" in capsys.readouterr().err


def test_what_is_chosen_already_needs_no_trial(model: Path) -> None:
    memory, _, _ = settled(10**9, model, micro_batch_tokens=300, gradient_checkpointing=False)
    assert isinstance(memory.device, FakeMemory) and memory.device.trials == 0 and memory.choices == {}
    memory.choose({"micro_batch_tokens": 4096, "compile": True})
    assert memory.config.micro_batch_tokens == 300 and memory.config.compile is True
    assert memory.choices == {"compile": True}


def test_a_run_goes_on_with_what_was_chosen(
    datasets_by_family: dict[str, Path], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although the device has less memory then: the numbers are those of a run that was never stopped."""
    monkeypatch.setattr(trainer, "device_memory", lambda _: FakeMemory(10**9))
    changes = {"micro_batch_tokens": None, "save_every": 1}
    calm, stopped = (train_config(datasets_by_family["llama"], model, tmp_path / n, **changes) for n in ("a", "b"))
    train(calm)
    train_until(stopped, 1, monkeypatch)
    state = next((stopped.output / "checkpoints").glob("step-*/state.json"))
    chosen = {"compile": False, "gradient_checkpointing": False, "micro_batch_tokens": 32_768}
    assert json.loads(state.read_text())["choices"] == chosen
    monkeypatch.setattr(trainer, "device_memory", lambda _: FakeMemory(0))
    train(stopped)
    assert json.loads((stopped.output / "training.json").read_text())["chosen"] == chosen
    assert [m["loss"] for m in metrics_of(stopped.output)] == [m["loss"] for m in metrics_of(calm.output)]
    expected = weights_of(calm.output)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights_of(stopped.output).items())


def test_out_of_memory_says_what_would_help_and_by_how_much(model: Path) -> None:
    memory, student, _ = settled(10 * GIB, model)
    memory.micro_batch = MicroBatchMemory(0, GIB / 8192)
    parameters = sum(p.numel() for p in student.parameters())
    scale = GIB / parameters
    for parameter in student.parameters():  # as if there were 2**30 of them
        parameter.numel = partial(int, parameter.shape.numel() * scale)  # type: ignore[method-assign]
    with pytest.raises(UnavailableError) as caught, memory.explained():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has")
    words = str(caught.value)
    print(words)
    for part in (
        "memory ran out (1.5 GiB needed, 10.0 GiB there)",
        "--micro-batch-tokens 16384 (saves about 2.0 GiB)",
        "--gradient-checkpointing (saves about ",
        "--moments-dtype int8 (saves about 6.0 GiB)",
        "--lora-rank 16 (saves about 16.0 GiB)",
        "a lower --max-length",
        "FSDP on two GPUs (saves about 9.0 GiB)",
    ):
        assert part in words


def test_only_memory_is_explained(model: Path) -> None:
    memory = RunMemory(TrainConfig(dataset=Path("d"), student="s", output=Path("o")), Processes())
    with pytest.raises(RuntimeError, match=r"^shapes$"), memory.explained():
        raise RuntimeError("shapes")
    on_a_cpu = "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"
    with pytest.raises(UnavailableError, match=r"can't allocate.*--micro-batch-tokens 320, or"), memory.explained():
        raise RuntimeError(on_a_cpu)
