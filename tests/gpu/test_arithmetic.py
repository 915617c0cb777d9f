"""Log-probs and gradients on a GPU against float64 on the same GPU, in every layout and dtype that is used there."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedModel

from dpkd_offline.models.batch import PromptAndResponses, response_batch, shared_prompt_batch
from dpkd_offline.models.head import head_of
from dpkd_offline.models.logprobs import logps_of, token_logps, top_logps
from dpkd_offline.models.shared_prompt import SHARED_PROMPT
from dpkd_offline.models.trial import flat, gpu_shares, row_layout

pytestmark = pytest.mark.gpu

SHAPES = {  # heads of queries, of keys, their size, and how far back they look
    "14 heads of 64": (14, 2, 64, None),
    "8 heads of 128": (8, 4, 128, None),
    "4 heads of 256": (4, 1, 256, None),
    "a window": (8, 2, 64, 70),
}
Shape = tuple[int, int, int, int | None]
LENGTHS = {  # of prompts and their two responses
    "short": [(5, (3, 9)), (17, (11, 4))],
    "a kernel's block": [(127, (128, 129)), (64, (1, 64))],
    "long": [(1500, (1200, 900)), (300, (2000, 700)), (40, (1100, 60))],
}
ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 4e-2}


def small_model(heads: int, groups: int, size: int, window: int | None) -> PreTrainedModel:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=1000,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=size,
        max_position_embeddings=4096,
        sliding_window=window,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(3.0)  # so that attention is not even
    assert isinstance(model, PreTrainedModel)
    return model


def items_of(lengths: list[tuple[int, tuple[int, int]]]) -> list[PromptAndResponses]:
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        values: list[int] = torch.randint(3, 1000, (count,), generator=generator).tolist()
        return values

    return [(ids(prompt), [ids(n) for n in responses]) for prompt, responses in lengths]


def passes(model: PreTrainedModel, logps: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs, and gradients of a sum of them that is not even."""
    weights = torch.linspace(-1, 1, len(logps), device=logps.device, dtype=logps.dtype)
    model.zero_grad(set_to_none=True)
    (logps * weights).mean().backward()
    return logps.detach(), {k: p.grad.double() for k, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shared_prompts_give_the_log_probs_and_gradients_of_float64(
    shape: Shape,
    lengths: list[tuple[int, tuple[int, int]]],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    reference = small_model(*shape).to(device)
    reference.set_attn_implementation("eager")
    model, items = copy.deepcopy(reference).to(dtype), items_of(lengths)
    head_of(model)  # while its attention takes a row by itself
    alone = [token_logps(reference, response_batch([item]).to(device)) for item in flat(items)]
    expected, expected_grads = passes(reference, torch.cat(alone))
    padded = copy.deepcopy(model)
    padded.set_attn_implementation("sdpa")
    on_rows, grads_on_rows = passes(padded, token_logps(padded, response_batch(flat(items)).to(device)))

    model.set_attn_implementation(SHARED_PROMPT)
    actual, grads = passes(model, token_logps(model, shared_prompt_batch(items).to(device)))
    near = ROUNDING[dtype]
    error, usual = (float((x.double() - expected).abs().max()) for x in (actual, on_rows))
    print(f"log-probs: shared {error:.1e}, padded {usual:.1e}")
    assert error <= max(near, 2 * usual)
    for name, gradient in expected_grads.items():
        scale = float(gradient.norm())
        error, usual = (float((g[name] - gradient).norm()) / scale for g in (grads, grads_on_rows))
        assert error <= max(near, 2 * usual), (name, error, usual)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_the_trial_finds_that_prompts_may_be_shared(dtype: torch.dtype, device: torch.device, only_gpu: None) -> None:
    for shape in SHAPES.values():
        model = small_model(*shape).to(device, torch.float32)
        half = dtype == torch.bfloat16  # there is no kernel for float32
        if model.config.sliding_window is not None:
            assert row_layout(model, train_dtype=dtype) == "padded"
            continue
        assert gpu_shares(model, dtype) == half
        assert row_layout(model, train_dtype=dtype) == ("shared" if half else "padded")


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("added_up", [False, True], ids=["gradient of the head", "its main_grad"])
def test_the_head_in_blocks(dtype: torch.dtype, added_up: bool, device: torch.device) -> None:
    """More tokens and words than a block holds."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20_000, hidden_size=96, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).to(device)
    head_of(model)
    count = 9000 if device.type == "cuda" else 2100
    hidden = torch.randn(count, 96, device=device).to(dtype).requires_grad_()
    ids = torch.randint(20_000, (count, 2), device=device)
    weights = torch.randn(count, 2, device=device)
    weight: nn.Parameter = model.lm_head.weight
    weight.data.mul_(20)
    exact_hidden, exact_weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    expected = (exact_hidden @ exact_weight.T).log_softmax(-1).gather(-1, ids)
    (expected * weights).sum().backward()
    if added_up:
        weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
    logps = logps_of(model, hidden, ids)
    (logps * weights).sum().backward()
    gradient = weight.main_grad if added_up else weight.grad
    assert gradient is not None and hidden.grad is not None
    assert exact_hidden.grad is not None and exact_weight.grad is not None
    near = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    for ours, exact in (
        (logps, expected),
        (hidden.grad, exact_hidden.grad),
        (gradient, exact_weight.grad),
    ):
        error = float((ours.detach().double() - exact.detach()).norm() / exact.detach().norm())
        print(f"{error:.1e}")
        assert error <= near


def test_the_likeliest_tokens(device: torch.device) -> None:
    model = small_model(2, 1, 64, None).to(device, torch.float32)
    batch = response_batch(flat(items_of(LENGTHS["short"])))
    with torch.no_grad():
        logps, ids, values = top_logps(model, batch, 5)
        hidden = model.model(**{k: getattr(batch, k).to(device) for k in ("input_ids", "attention_mask")})
        logits = model.lm_head(hidden.last_hidden_state).flatten(0, 1)[batch.places.to(device)].double()
    expected = logits.log_softmax(-1)
    torch.testing.assert_close(values.double(), expected.topk(5).values, rtol=0, atol=1e-4)
    torch.testing.assert_close(expected.gather(-1, ids), values.double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(
        logps.double(), expected.gather(-1, batch.targets.to(device)[:, None])[:, 0], rtol=0, atol=1e-4
    )
