from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dpkd_offline.config.train import TrainConfig
from dpkd_offline.training.optimizer import MasterAdamW

TINY = 1e-5  # a learning rate that bfloat16 alone would swallow
CONFIG = TrainConfig(dataset=Path("d"), student="s", output=Path("o"), learning_rate=TINY, max_grad_norm=1.0)


def module(weight: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    made.weight.data = weight.clone()
    return made


def masters(optimiser: MasterAdamW) -> Tensor:
    return dict(optimiser.tensors())["master/weight"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_steps_are_those_of_adamw_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(40, 30)
    made, reference = module(weight), module(weight)
    optimiser = MasterAdamW(made, dtype, CONFIG)
    adamw = torch.optim.AdamW(reference.parameters(), lr=TINY, weight_decay=CONFIG.weight_decay, fused=True)
    for step in range(12):
        if step == 6:  # goes on from a checkpoint
            kept = {name: tensor.clone() for name, tensor in optimiser.tensors()}
            made = module(torch.zeros_like(weight))
            optimiser = MasterAdamW(made, dtype, CONFIG)
            optimiser.restore(kept)
            assert all(torch.equal(tensor, kept[name]) for name, tensor in optimiser.tensors())
        gradients = torch.randn(2, 40, 30, dtype=dtype)
        for gradient in gradients:  # as of two micro batches
            (made.weight * gradient).sum().backward()
        assert made.weight.grad is None
        reference.weight.grad = gradients.float().sum(0)
        expected = nn.utils.clip_grad_norm_(reference.parameters(), CONFIG.max_grad_norm)
        assert optimiser.step(TINY) == pytest.approx(float(expected), rel=1e-6)
        adamw.step()
        assert torch.equal(masters(optimiser), reference.weight.detach())
        assert torch.equal(made.weight.detach(), masters(optimiser).to(dtype))
    assert not torch.equal(masters(optimiser), weight)
