from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dpkd_offline.config.train import TrainConfig
from dpkd_offline.training.checkpoint import Position, load_state, save_state
from dpkd_offline.training.distributed import Processes
from dpkd_offline.training.optimizer import MasterAdamW

TINY = 1e-5  # a learning rate that bfloat16 alone would swallow
CONFIG = TrainConfig(dataset=Path("d"), student="s", output=Path("o"), learning_rate=TINY, max_grad_norm=1.0)


def module(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.clone()
    return linear


def masters(optimizer: MasterAdamW) -> Tensor:
    return dict(optimizer.tensors())["master/weight"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_steps_are_those_of_adamw_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    weight = torch.randn(40, 30)
    model, reference = module(weight), module(weight)
    optimizer = MasterAdamW(model, dtype, CONFIG, Processes())
    adamw = torch.optim.AdamW(reference.parameters(), lr=TINY, weight_decay=CONFIG.weight_decay, fused=True)
    for step in range(12):
        if step == 6:  # goes on from a checkpoint
            kept = {name: tensor.clone() for name, tensor in optimizer.tensors()}
            model = module(torch.zeros_like(weight))
            optimizer = MasterAdamW(model, dtype, CONFIG, Processes())
            save_state(tmp_path, Position(step), "run", kept)
            _, stored = load_state(tmp_path, "run") or pytest.fail("no state")
            optimizer.restore(stored)
            assert all(torch.equal(tensor, kept[name]) for name, tensor in optimizer.tensors())
        gradients = torch.randn(2, 40, 30, dtype=dtype)
        for gradient in gradients:  # as of two micro batches
            (model.weight * gradient).sum().backward()
        assert model.weight.grad is None
        reference.weight.grad = gradients.float().sum(0)
        expected = nn.utils.clip_grad_norm_(reference.parameters(), CONFIG.max_grad_norm)
        norm = optimizer.norm()
        assert optimizer.step(TINY, norm, float(norm)) == pytest.approx(float(expected), rel=1e-6)
        adamw.step()
        assert torch.equal(masters(optimizer), reference.weight.detach())
        assert torch.equal(model.weight.detach(), masters(optimizer).to(dtype))
    assert not torch.equal(masters(optimizer), weight)
