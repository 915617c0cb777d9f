"""What is tried on a model when it is loaded. Of many families: test_families.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import FAMILIES
from transformers import AutoModelForCausalLM, LlamaConfig

from dpkd_offline.common.errors import UnavailableError
from dpkd_offline.models import shared_prompt
from dpkd_offline.models.batch import response_batch
from dpkd_offline.models.head import head_of
from dpkd_offline.models.loading import load_model
from dpkd_offline.models.logprobs import token_logps
from dpkd_offline.models.trial import (
    check_model,
    flat,
    gpu_shares,
    plain_logps,
    probe_items,
    row_layout,
    sampling_layout,
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_common_models_share_prompts_and_pad_samples(family: str, dtype: str, teachers: dict[str, Path]) -> None:
    model = load_model(str(teachers[family]), dtype)
    check_model(model)
    own = model.config._attn_implementation
    assert sampling_layout(model) == "padded"
    assert row_layout(model) == "shared"
    assert model.config._attn_implementation == own  # with which it can sample


def test_a_trial_makes_no_pass_that_it_need_not(teachers: dict[str, Path]) -> None:
    """Each takes a tenth of a second and more of a model of 100M parameters on a CPU, in every stage."""
    model, passes = load_model(str(teachers["llama"]), "float32"), [0]
    head_of(model)
    model.base_model.register_forward_pre_hook(lambda *_: passes.append(passes.pop() + 1))
    for trial, most in ((check_model, 3), (row_layout, 4 + 2)):  # of sequences by themselves, then of shared prompts
        passes[0] = 0
        trial(model)
        assert 0 < passes[0] <= most


def test_what_half_precision_rounds_away_is_tried_in_float32() -> None:
    """Where it is large, two right layouts are further apart than a wrong one elsewhere."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400, hidden_size=64, intermediate_size=128, num_hidden_layers=24, num_attention_heads=2
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(8)
        model.lm_head.weight.mul_(40)
    items = probe_items(model)
    with torch.no_grad():
        rounding = plain_logps(model, flat(items)) - token_logps(model, response_batch(flat(items)))
    assert float(rounding.abs().mean()) > 0.02  # 200 times what the trial allows; how much depends on the CPU's kernels
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    check_model(model)
    assert sampling_layout(model) == "padded"
    assert row_layout(model) == "shared"
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, before[name])


def test_a_model_that_sees_later_tokens_is_refused(teachers: dict[str, Path]) -> None:
    model = load_model(str(teachers["llama"]), "float32")
    model.get_input_embeddings().register_forward_hook(lambda _module, _inputs, output: output + output.mean(1, True))
    with pytest.raises(UnavailableError, match="llama: what it says of a token depends on later ones"):
        check_model(model)


@pytest.mark.parametrize("share", [1e-5, 0.3])
def test_what_runs_along_the_row_keeps_prompts_apart(share: float, teachers: dict[str, Path]) -> None:
    """Weak as it may be in these weights: training may make it strong."""
    model = load_model(str(teachers["llama"]), "float32")
    model.get_input_embeddings().register_forward_hook(
        lambda _module, _inputs, output: output + share * F.pad(output[:, :-1], (0, 0, 1, 0))
    )
    assert row_layout(model) == "padded"


def test_rows_that_padding_would_change_go_alone(teachers: dict[str, Path]) -> None:
    """As where positions are counted from the longest row."""
    model = load_model(str(teachers["llama"]), "float32")
    model.get_input_embeddings().register_forward_hook(
        lambda _module, _inputs, output: output * (1 + 0.01 * output.shape[1])
    )
    assert row_layout(model) == "alone"
    items = [([7, 8, 9], [10, 11, 12, 1]), ([5], [6]), (list(range(20, 60)), list(range(100, 125)))]
    with torch.no_grad():
        together = token_logps(model, response_batch(items), alone=True)
        torch.testing.assert_close(together, torch.cat([token_logps(model, response_batch([item])) for item in items]))


@pytest.mark.parametrize("runs", [True, False])
def test_a_trial_in_half_precision_leaves_the_model_as_it_was(
    runs: bool, teachers: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(str(teachers["llama"]), "float32")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    own = model.config._attn_implementation
    if not runs:

        def refuse(*_: object) -> None:
            raise RuntimeError("FlashAttention only supports head dimension at most 256.")

        monkeypatch.setattr(shared_prompt, "_attention", refuse)
    assert gpu_shares(model, torch.bfloat16) == runs
    assert not gpu_shares(model, None)  # in float32
    assert model.config._attn_implementation == own
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.dtype == torch.float32 and parameter.grad is None
