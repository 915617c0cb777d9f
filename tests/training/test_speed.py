from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.runs import train_config
from torch.utils.flop_counter import FlopCounterMode

from dpkd_offline.models.batch import PromptAndResponses, response_batch
from dpkd_offline.models.loading import load_model
from dpkd_offline.training import speed
from dpkd_offline.training.distributed import Processes
from dpkd_offline.training.lora import adapt
from dpkd_offline.training.speed import Meter, cost_of
from dpkd_offline.training.stream import Example
from dpkd_offline.training.student import Student

ROWS: list[PromptAndResponses] = [([1] * 40, [[2] * 30, [3] * 30])] * 2


def counted(student: Student) -> float:
    """FLOPs of forward and backward of padded rows, by torch's own count of products."""
    batch = response_batch([(prompt, response) for prompt, responses in ROWS for response in responses])
    with FlopCounterMode(display=False) as counter:
        logps, _ = student(batch, batch.targets[:, None])
        logps.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_products_are_counted_as_torch_counts_them(family: str, students: dict[str, Path]) -> None:
    student = Student(load_model(str(students[family]), "float32"))
    student.shares = False
    student.model.set_attn_implementation("eager")
    cost = cost_of(student.model)
    assert cost is not None
    exact = counted(student)
    # Eager attention of 4 rows of 70 tokens also multiplies with the half that a mask hides.
    more = cost.pair * 4 * 70**2 / 2
    assert exact == pytest.approx(cost.of(ROWS, shares=False) + more, rel=1e-3)
    assert cost.of(ROWS, shares=True) < cost.of(ROWS, shares=False)


def test_frozen_weights_cost_two_products_in_place_of_three(students: dict[str, Path], tmp_path: Path) -> None:
    whole, model = (
        cost_of(load_model(str(students["llama"]), "float32")),
        load_model(str(students["llama"]), "float32"),
    )
    adapt(model, train_config(tmp_path, students["llama"], tmp_path, lora_rank=1))
    adapted = cost_of(Student(model).model)
    assert whole is not None and adapted is not None
    assert adapted.response_token == whole.response_token * 2 / 3
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert adapted.token == whole.token * 2 / 3 + 6 * adapters


class Device:
    type = "cuda"


def test_metrics_of_a_gpu(students: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a device that says how fast it is; none of its calls waits for it once the steps begin."""
    student = Student(load_model(str(students["llama"]), "float32"))
    processes, clock = Processes(), iter([0.0, 1.5, 10.0, 10.0])
    processes.device = Device()  # type: ignore[assignment]
    monkeypatch.setattr(speed, "product_rate", lambda *_: 1e9)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 << 30)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: pytest.fail("waits for the device"))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    meter = Meter(train_config(tmp_path, students["llama"], tmp_path), student, processes)
    items = meter.waited_for(iter(["first", "second"]))
    assert next(items) == "first"
    example = Example("0", [1] * 40, ([2] * 30, [3] * 30), ([], []), ([], []))
    metrics = meter.of_step([example], 0.5)
    cost = cost_of(student.model)
    assert cost is not None
    expected = cost.of([(example.prompt_ids, example.responses)], student.shares) / 0.5e9
    assert metrics == {"waiting": 0.75, "mfu": pytest.approx(expected, abs=1e-4), "memory_gib": 3.0}
    assert next(items) == "second" and meter.of_step([example], 0.5)["waiting"] == 0.0
