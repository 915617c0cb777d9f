"""A rank that loads students in parts, beside others, and compares them with what a single process loads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from helpers.launched import FSDP


def refuse(*_: Any) -> None:
    raise AssertionError("only the first process may load a whole model")


def load_in_parts(rank: int, count: int, port: int, folders: list[tuple[str, dict[str, Any]]]) -> None:
    """Load each student, with changes of its config, and hold it against the model of one process, to the last bit."""
    several = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update({**several, "RANK": str(rank), "LOCAL_RANK": str(rank), **FSDP})
    torch.set_num_threads(1)
    from dpkd_offline.config.train import TrainConfig
    from dpkd_offline.models.batch import pair_batch
    from dpkd_offline.models.loading import load_model
    from dpkd_offline.training import lora
    from dpkd_offline.training import student as students
    from dpkd_offline.training.distributed import Processes, gather_full
    from dpkd_offline.training.student import Student, load_student

    if rank:
        students.load_model = refuse  # type: ignore[assignment]
    processes = Processes()
    for folder, changes in folders:
        config = TrainConfig(dataset=Path("d"), student=folder, output=Path("o"), dtype="float32", **changes)
        ours = load_student(config, processes)
        expected = load_model(folder, "float32")
        if config.lora_rank:
            lora.adapt(expected, config)
        whole, model = Student(expected), ours.model
        assert (ours.shares, ours.alone, ours.own_attention) == (whole.shares, whole.alone, whole.own_attention)
        assert model.config._attn_implementation == expected.config._attn_implementation
        assert model.generation_config.to_dict() == expected.generation_config.to_dict()
        theirs = dict(expected.named_parameters())  # tied ones once
        assert theirs.keys() == dict(model.named_parameters()).keys(), folder
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, DTensor) and parameter.requires_grad == theirs[name].requires_grad
            rows = -(-len(theirs[name]) // count)
            assert parameter.to_local().untyped_storage().nbytes() <= 4 * rows * theirs[name][:1].numel()
            assert torch.equal(gather_full(parameter), theirs[name]), name
        buffers = dict(expected.named_buffers(remove_duplicate=False))
        assert buffers.keys() == dict(model.named_buffers(remove_duplicate=False)).keys()
        for name, buffer in model.named_buffers(remove_duplicate=False):
            assert buffer.dtype == buffers[name].dtype and torch.equal(buffer, buffers[name]), name
        batch = pair_batch([(list(range(5, 25)), [list(range(40, 50)), [7, 8]])], ours.shares)
        with torch.no_grad():
            logps = [student(batch, batch.targets[:, None])[0] for student in (ours, whole)]
        assert torch.equal(*logps), folder
