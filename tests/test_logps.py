"""Log-probs by chunks of response positions against the full log-softmax of the whole model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import FAMILIES
from torch import Tensor

import dpkd_offline.logps
from dpkd_offline.batch import response_batch
from dpkd_offline.checkpoint import load_model
from dpkd_offline.errors import UnavailableError
from dpkd_offline.logps import ChunkedLogps, check_head, response_logps, token_logps

ITEMS = [([7, 8, 9], [10, 11, 12, 1]), ([5], [6]), (list(range(20, 60)), list(range(100, 125))), ([9, 9], [9, 1])]


def full_logps(model: torch.nn.Module, prompt: list[int], response: list[int]) -> Tensor:
    """One sequence at a time, without padding, all logits, float64 reduction."""
    ids = torch.tensor([[*prompt, *response]])
    logps = model(input_ids=ids).logits.double().log_softmax(-1)
    return torch.stack([logps[0, len(prompt) - 1 + n, token] for n, token in enumerate(response)])


@pytest.mark.parametrize("family", FAMILIES)
def test_logps_equal_the_full_log_softmax(family: str, teachers: dict[str, Path]) -> None:
    model = load_model(str(teachers[family]), "float32")
    with torch.no_grad():
        found = response_logps(model, ITEMS)
        for logps, (prompt, response) in zip(found, ITEMS, strict=True):
            torch.testing.assert_close(
                torch.tensor(logps).double(), full_logps(model, prompt, response), rtol=0, atol=2e-5
            )


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_those_of_the_full_log_softmax(
    family: str, teachers: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dpkd_offline.logps, "CHUNK", 7)
    model = load_model(str(teachers[family]), "float64")
    weights = torch.linspace(-1, 2, len(ITEMS), dtype=torch.float64)
    batch = response_batch(ITEMS)
    (batch.sum_by_sequence(token_logps(model, batch)) * weights).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    sum(w * full_logps(model, *item).sum() for w, item in zip(weights, ITEMS, strict=True)).backward()
    assert found.keys() == {name for name, p in model.named_parameters() if p.grad is not None}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_the_chunked_backward_is_exact(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dpkd_offline.logps, "CHUNK", chunk)
    torch.manual_seed(0)
    hidden, head = torch.randn(10, 4, dtype=torch.float64), torch.randn(12, 4, dtype=torch.float64)
    targets = torch.randint(0, 12, (10,))
    assert torch.autograd.gradcheck(
        lambda h, w: ChunkedLogps.apply(h, w, targets), (hidden.requires_grad_(), head.requires_grad_())
    )


def test_reductions_are_float32_for_a_bfloat16_model() -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(64, 32).bfloat16(), torch.randn(500, 32).bfloat16()
    targets = torch.randint(0, 500, (64,))
    logps = ChunkedLogps.apply(hidden, head, targets)
    assert logps.dtype == torch.float32
    logits = (hidden @ head.T).double()
    expected = logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(logps.double(), expected, rtol=1e-6, atol=1e-5)


def test_a_model_that_changes_its_logits_is_refused(teachers: dict[str, Path]) -> None:
    model = load_model(str(teachers["llama"]), "float32")
    check_head(model)
    forward = model.forward

    def capped(*args: object, **kwargs: object) -> object:
        output = forward(*args, **kwargs)
        output.logits = 5 * torch.tanh(output.logits / 5)
        return output

    model.forward = capped  # type: ignore[method-assign]
    with pytest.raises(UnavailableError, match="llama: its logits are not"):
        check_head(model)
