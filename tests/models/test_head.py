"""How a model makes its logits, as it is tried on the model. What is computed with it: test_logprobs.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.tiny import SMALL
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from dpkd_offline.common.errors import UnavailableError
from dpkd_offline.models.head import Head, Transform, head_of, named_head, probe_ids, set_head
from dpkd_offline.models.trial import check_model

SHAPE = {**SMALL, "num_hidden_layers": 1, "num_key_value_heads": 1, "intermediate_size": 64}
CAPPED = Gemma2Config(**SHAPE, final_logit_softcapping=3.0)


def model_of(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    assert isinstance(model, PreTrainedModel)
    return model


def llama(**settings: Any) -> PreTrainedModel:
    return model_of(LlamaConfig(**{**SHAPE, **settings}))


@pytest.mark.parametrize(
    ("config", "scale", "cap"),
    [(CohereConfig(**SHAPE, logit_scale=2.0), 2.0, None), (CAPPED, 1.0, 3.0), (LlamaConfig(**SHAPE), 1.0, None)],
    ids=["a scale", "a cap", "neither"],
)
def test_a_model_without_weights_is_told_what_was_found_with_them(
    config: PreTrainedConfig, scale: float, cap: float | None
) -> None:
    """As the parts of a sharded student are."""
    assert named_head(model_of(config)) == ("model", scale, cap)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    set_head(empty, "model", scale, cap)
    assert head_of(empty) == Head(empty.model, Transform(scale, cap))
    assert named_head(empty) == ("model", scale, cap)


@pytest.mark.parametrize("size", [1e-5, 1.0, 1e4])
def test_a_cap_shows_whatever_the_size_of_the_weights(size: float) -> None:
    model = model_of(CAPPED)
    with torch.no_grad():
        model.lm_head.weight.mul_(size)
    assert head_of(model).transform == Transform(cap=3.0)


def test_a_head_need_not_have_a_bias() -> None:
    class Plain(nn.Module):
        def __init__(self, weight: Tensor) -> None:
            super().__init__()
            self.weight = nn.Parameter(weight)

        def forward(self, hidden: Tensor) -> Tensor:
            return hidden @ self.weight.T

    model = llama()
    model.lm_head = Plain(model.lm_head.weight.detach())
    check_model(model)


def test_a_setting_of_zero_scales_nothing() -> None:
    assert head_of(llama(logits_scaling=0, final_logit_softcapping=0.0)).transform == Transform()


@pytest.mark.parametrize("head", [None, nn.Identity(), "lm_head"])
def test_a_model_without_an_output_embedding_is_refused(head: object, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    monkeypatch.setattr(model, "get_output_embeddings", lambda: head)
    with pytest.raises(UnavailableError) as caught:
        head_of(model)
    assert str(caught.value) == "llama: it has no output embedding whose log-probs could be made piece by piece"


def test_a_model_that_needs_more_than_token_ids_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(input_ids: Tensor) -> None:
        raise ValueError("You must give pixels\nor an image.")

    model = llama()
    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(UnavailableError) as caught:
        head_of(model)
    expected = "llama: it does not take a row of token ids alone: You must give pixels or an image."
    assert str(caught.value) == expected


def test_logits_a_little_off_are_no_rounding() -> None:
    """In float32; by a hundredth, which half precision may round away."""
    model = llama()
    model.lm_head.register_forward_hook(lambda _module, _inputs, logits: 1.01 * logits)
    with pytest.raises(UnavailableError) as caught:
        head_of(model)
    assert str(caught.value) == (
        "llama: its logits are not those of its output embedding on its last hidden states, and what else it does to "
        "them its config does not say"
    )


IDS = {"vocab_size": 12, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": [4, 5]}
WITH_IMAGES = Gemma3Config(
    text_config={**SHAPE, **IDS},
    vision_config={**SHAPE, "image_size": 28, "patch_size": 14},
    image_token_index=11,
    mm_tokens_per_image=4,
)


@pytest.mark.parametrize("config", [LlamaConfig(**SHAPE | IDS | {"image_token_index": 11}), WITH_IMAGES])
def test_ids_to_try_a_model_with_mean_nothing_to_it(config: PreTrainedConfig) -> None:
    """Of twelve: neither of the ends of a text, nor its start, nor the padding, nor where an image goes."""
    model = model_of(config)
    assert sorted(set(probe_ids(model, 1000).tolist())) == [1, 3, 6, 7, 8, 9, 10]
    check_model(model)


def test_ids_to_try_a_model_with_where_all_mean_something() -> None:
    model = llama(vocab_size=3, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    assert probe_ids(model, 2).tolist() == [0, 0]
    assert probe_ids(model.to("meta"), 2).device.type == "meta"  # type: ignore[arg-type]


def test_a_trial_of_a_head_draws_no_random_number() -> None:
    """Of those that a run goes on with."""
    tried = []
    for seed in (1, 2):
        model = llama()
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        tried.append(probe_ids(model, 50).tolist())
        head_of(model)
        assert torch.equal(torch.random.get_rng_state(), before)
    assert tried[0] == tried[1]
