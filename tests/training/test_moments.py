from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dpkd_offline.config.train import MOMENT_BYTES, TrainConfig
from dpkd_offline.training import moments
from dpkd_offline.training.checkpoint import Position, load_state, save_state
from dpkd_offline.training.distributed import Processes
from dpkd_offline.training.moments import RoundedAdamW
from dpkd_offline.training.optimizer import MasterAdamW

SMALL = ("bfloat16", "int8")


def config_of(dtype: str) -> TrainConfig:
    values = {"dataset": Path("d"), "student": "s", "output": Path("o"), "moments_dtype": dtype}
    return TrainConfig.model_validate(values)


def model_of(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(300, 40), nn.Tanh(), nn.Linear(40, 7))


def step(model: nn.Module, optimizer: MasterAdamW, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    model(torch.randn(5, 300, generator=generator)).square().sum().backward()
    norm = optimizer.norm()
    optimizer.step(1e-3, norm, float(norm))


def tensors_of(optimizer: MasterAdamW) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in optimizer.tensors()}


@pytest.mark.parametrize("dtype", SMALL)
def test_they_take_the_bytes_that_the_option_names(dtype: str) -> None:
    model = model_of()
    optimizer = MasterAdamW(model, torch.float32, config_of(dtype), Processes())
    expected = optimizer.pending_bytes()
    step(model, optimizer, 0)
    stored = {name: t for name, t in optimizer.tensors() if not name.startswith(("master", "step"))}
    assert sum(tensor.nbytes for tensor in stored.values()) == expected and optimizer.pending_bytes() == 0
    large = sum(tensor.nbytes for name, tensor in stored.items() if name.endswith("0.weight"))
    scales = 40 * 2 * 2 * 4 if dtype == "int8" else 0
    assert large == 40 * 300 * MOMENT_BYTES[dtype] + scales
    assert stored["exp_avg/0.bias"].dtype == torch.float32


@pytest.mark.parametrize("dtype", SMALL)
def test_a_run_that_goes_on_takes_the_same_steps(dtype: str, tmp_path: Path) -> None:
    model = model_of()
    optimizer = MasterAdamW(model, torch.float32, config_of(dtype), Processes())
    for number in range(3):
        step(model, optimizer, number)
    save_state(tmp_path, Position(3), "run", tensors_of(optimizer))
    step(model, optimizer, 3)
    other = model_of(1)
    resumed = MasterAdamW(other, torch.float32, config_of(dtype), Processes())
    _, stored = load_state(tmp_path, "run") or pytest.fail("no state")
    resumed.restore(stored)
    step(other, resumed, 3)
    expected, actual = tensors_of(optimizer), tensors_of(resumed)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


@pytest.mark.parametrize(("dtype", "near"), [("bfloat16", 0.1), ("int8", 0.6)])
def test_small_changes_add_up_as_in_float32(dtype: str, near: float) -> None:
    """exp_avg_sq moves by a thousandth a step: from gradients of 1 to those of 0.1 in 2000 steps."""
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.zeros(16, 300)) for _ in range(2)]
    vector = nn.Parameter(torch.zeros(300))
    rounded = RoundedAdamW([{"params": [weights[0], vector]}], 1e-4, getattr(torch, dtype), 0)
    exact = torch.optim.AdamW([weights[1]], lr=1e-4, weight_decay=0.0)
    for number in range(2000):
        gradient = torch.randn(16, 300) * (1.0 if number < 100 else 0.1)
        vector.grad = gradient[0].clone()
        for weight in weights:
            weight.grad = gradient
        rounded.step()
        exact.step()
    stored = {name: tensor for name, tensor in rounded.state[weights[0]].items() if name != "step"}
    for name in moments.MOMENTS:
        expected, actual = exact.state[weights[1]][name], moments.decoded(stored, name)
        error = (actual - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        assert float(error) < near, name
        assert float(actual.mean() / expected.mean()) == pytest.approx(1, abs=0.03) or name == "exp_avg"
    torch.testing.assert_close(vector, weights[1][0], rtol=1e-4, atol=1e-6)
    moved = (weights[0] - weights[1]).norm() / weights[1].norm()
    assert moved.item() < 0.2


def test_codes_are_right_in_the_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    for levels, halvings in (moments.SIGNED, moments.UNSIGNED):
        shares = torch.tensor([0.0, 1e-12, 0.003, 0.3, 0.77, 1.0]).repeat(20_000, 1)
        codes = moments.codes_of(shares, levels, halvings, generator)
        assert 0 <= int(codes.min()) and int(codes.max()) == levels
        mean = moments.values_of(codes, levels, halvings).mean(0)
        torch.testing.assert_close(mean[2:], shares[0, 2:], rtol=2e-3, atol=0)
        assert mean[0] == 0.0 and mean[-1] == 1.0
