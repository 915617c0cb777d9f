from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from dpkd_offline.config.train import TrainConfig
from dpkd_offline.training.checkpoint import Position, load_state, save_state
from dpkd_offline.training.distributed import Processes, gather_full
from dpkd_offline.training.optimizer import MasterAdamW, learning_rate_at

TINY = 1e-5  # a learning rate that bfloat16 alone would swallow
CONFIG = TrainConfig(dataset=Path("d"), student="s", output=Path("o"), weight_decay=0.3, max_grad_norm=1.0)


def module(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight.data, linear.bias.data = weight.clone(), weight[:, 0].clone()
    return linear


def masters(optimizer: MasterAdamW) -> list[Tensor]:
    tensors = dict(optimizer.tensors())
    return [tensors["master/weight"], tensors["master/bias"]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_steps_are_those_of_adamw_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    """At a learning rate of each step; matrices decay, vectors do not."""
    torch.manual_seed(0)
    weight = torch.randn(40, 30)
    model, reference = module(weight), module(weight)
    optimizer = MasterAdamW(model, dtype, CONFIG, Processes())
    groups = [{"params": [reference.weight], "weight_decay": 0.3}, {"params": [reference.bias], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, fused=True)
    for step in range(12):
        if step == 6:  # goes on from a checkpoint
            kept = {name: tensor.clone() for name, tensor in optimizer.tensors()}
            model = module(torch.zeros_like(weight))
            optimizer = MasterAdamW(model, dtype, CONFIG, Processes())
            save_state(tmp_path, Position(step), "run", kept)
            _, stored = load_state(tmp_path, "run") or pytest.fail("no state")
            optimizer.restore(stored)
            assert all(torch.equal(tensor, kept[name]) for name, tensor in optimizer.tensors())
            assert torch.equal(model.weight.detach(), kept["master/weight"].to(dtype))
        gradients = torch.randn(2, 40, 31, dtype=dtype)
        for gradient in gradients:  # as of two micro batches
            ((model.weight * gradient[:, 1:]).sum() + (model.bias * gradient[:, 0]).sum()).backward()
        assert model.weight.grad is None
        total = gradients.float().sum(0)
        reference.weight.grad, reference.bias.grad = total[:, 1:].contiguous(), total[:, 0].contiguous()
        expected = nn.utils.clip_grad_norm_(reference.parameters(), CONFIG.max_grad_norm)
        norm, learning_rate = optimizer.norm(), TINY * (step + 1)
        assert optimizer.step(learning_rate, norm, float(norm)) == pytest.approx(float(expected), rel=1e-6)
        for group in adamw.param_groups:
            group["lr"] = learning_rate
        adamw.step()
        for master, exact, rounded in zip(masters(optimizer), reference.parameters(), model.parameters(), strict=True):
            assert torch.equal(master, exact.detach())
            assert torch.equal(rounded.detach(), master.to(dtype))
    assert not torch.equal(masters(optimizer)[0], weight)


def test_sparse_gradients_add_up_in_float32() -> None:
    """300 times one, where bfloat16 adds nothing to a sum from its 257th part on; of one row twice at a time."""
    words = nn.Embedding(8, 2, sparse=True)
    optimizer = MasterAdamW(words, torch.bfloat16, CONFIG, Processes())
    for _ in range(300):
        words(torch.tensor([3, 5, 3])).sum().backward()
    (gradient,) = optimizer.gradients()
    assert gradient.tolist() == [[600.0 if row == 3 else 300.0 if row == 5 else 0.0] * 2 for row in range(8)]
    assert words.weight.grad is None


def test_the_learning_rate_rises_in_equal_parts_and_falls_by_half_a_cosine() -> None:
    """Three of seven steps of warm-up, 2.8 rounded up; then a cosine at 0, 45, 90 and 135 degrees."""
    config = CONFIG.model_copy(update={"learning_rate": 0.5, "warmup_ratio": 0.4})
    half = 0.5**0.5 / 2
    shares = [1 / 3, 2 / 3, 1, 1, 0.5 + half, 0.5, 0.5 - half]
    assert [learning_rate_at(step, 7, config) for step in range(7)] == pytest.approx([0.5 * part for part in shares])
    alone = config.model_copy(update={"warmup_ratio": 0.0})
    assert learning_rate_at(0, 1, alone) == 0.5


class Reached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.unreached = nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(self.first(x))
        return result


def test_a_sharded_model_is_its_own_master(tmp_path: Path) -> None:
    """Here of one process: its parameters are DTensors, a layer that nothing reaches has a gradient of zeros."""
    torch.manual_seed(0)
    model = Reached()
    reference = deepcopy(model)
    processes, inputs = Processes(), torch.randn(3, 6, 5)
    matrices, vectors = ([p for p in reference.parameters() if p.ndim == n] for n in (2, 1))
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=0.01, fused=True)
    distributed.init_process_group(
        "gloo", store=distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        optimizer = MasterAdamW(
            fully_shard(model, mesh=init_device_mesh("cpu", (1,))), torch.float32, CONFIG, processes
        )
        for x in inputs:
            for one in (model, reference):
                loss = one(x).square().sum()
                optimizer.backward(loss, last=True) if one is model else loss.backward()
            optimizer.sum_gradients()
            for parameter in reference.unreached.parameters():
                parameter.grad = torch.zeros_like(parameter)
            expected = nn.utils.clip_grad_norm_(reference.parameters(), CONFIG.max_grad_norm)
            norm = optimizer.norm()
            assert not isinstance(norm, DTensor)
            assert optimizer.step(0.01, norm, float(norm)) == pytest.approx(float(expected), rel=1e-6)
            adamw.step()
            adamw.zero_grad()
            for ours, exact in zip(model.parameters(), reference.parameters(), strict=True):
                assert isinstance(ours, DTensor)
                torch.testing.assert_close(ours.full_tensor(), exact, rtol=1e-6, atol=1e-7)
        stored = {name: gather_full(tensor) for name, tensor in optimizer.tensors()}
        assert torch.equal(stored["master/unreached.weight"], model.unreached.weight.full_tensor())
    finally:
        distributed.destroy_process_group()
