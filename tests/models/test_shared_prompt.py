"""Attention over rows with shared prompts against that of each sequence alone. Of whole models: test_logprobs.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.library import opcheck
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dpkd_offline.models.shared_prompt import SHARED_PROMPT, Call, keys_of, pack, recorded_calls, segments_of

# Tokens of each prompt and of its responses: shorter and longer than what is padded, and than a block of queries.
ROW = [(3, [4, 2]), (70, [140, 1, 60]), (1, [1]), (64, [64, 200])]
HEADS, KEYS, SIZE = 4, 2, 8


def attention(query: Tensor, key: Tensor, value: Tensor, **keywords: Any) -> Tensor:
    """Ours as transformers calls it, of queries [H, T, D]: [T, H, D']."""
    layer, inputs = nn.Module(), (query[None], key[None], value[None], None)
    out: Tensor = ALL_ATTENTION_FUNCTIONS[SHARED_PROMPT](layer, *inputs, **keywords)[0][0]
    return out


def one_by_one(inputs: Sequence[Tensor], scale: float, window: int | None) -> Tensor:
    """The same of each prompt of ROW with one of its responses, by a plain softmax."""
    query, key, value = inputs
    key, value = (tensor.repeat_interleave(len(query) // len(tensor), 0) for tensor in (key, value))
    parts, start = [], 0
    for prompt, responses in ROW:
        at = start + prompt
        for number, length in enumerate(responses):
            ids = torch.tensor([*range(start, start + prompt), *range(at, at + length)])
            age = torch.arange(len(ids))[:, None] - torch.arange(len(ids))
            hidden = (age < 0) | (age >= (window or len(ids)))
            scores = (query[:, ids] @ key[:, ids].mT * scale).masked_fill(hidden, -torch.inf)
            parts.append((scores.softmax(-1) @ value[:, ids])[:, prompt if number else 0 :])
            at += length
        start = at
    return torch.cat(parts, 1).transpose(0, 1)


def row_of(row: list[tuple[int, list[int]]], dtype: torch.dtype, values: int, padding: int) -> list[Tensor]:
    """Queries, keys and values, and what the gradient of the answers is; large, so that scores differ."""
    length = sum(prompt + sum(responses) for prompt, responses in row) + padding
    generator = torch.Generator().manual_seed(0)
    shapes = [(HEADS, length, SIZE), (KEYS, length, SIZE), (KEYS, length, values), (length, HEADS, values)]
    return [(2 * torch.randn(shape, generator=generator)).to(dtype) for shape in shapes]


@pytest.mark.parametrize("values", [6, 8, 11])
@pytest.mark.parametrize("window", [None, 1, 9, 65, 66, 128, 1000])
def test_a_token_sees_its_prompt_and_its_response_alone(window: int | None, values: int) -> None:
    *inputs, grad = row_of(ROW, torch.float64, values, padding=5)
    inputs = [tensor.requires_grad_() for tensor in inputs]
    actual = attention(*inputs, scaling=0.3, sliding_window=window, segments=segments_of(ROW))
    assert actual.is_contiguous() and not actual[-5:].any()
    expected = one_by_one(inputs, 0.3, window)
    torch.testing.assert_close(actual[:-5], expected, rtol=1e-10, atol=1e-10)
    gradients = torch.autograd.grad(actual, inputs, grad)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, inputs, grad[:-5]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 2e-6), (torch.bfloat16, 6e-3)])
def test_scores_are_exact_in_half_precision(dtype: torch.dtype, near: float) -> None:
    """Of scores up to a hundred, which bfloat16 knows to a quarter; what goes in and comes out is rounded."""
    *inputs, grad = row_of(ROW, dtype, SIZE, padding=0)
    inputs = [tensor.requires_grad_() for tensor in inputs]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    actual = attention(*inputs, scaling=1.5, segments=segments_of(ROW))
    expected = one_by_one(exact, 1.5, None)
    gradients = torch.autograd.grad(actual, inputs, grad)
    exact_gradients = torch.autograd.grad(expected, exact, grad.double())
    for ours, theirs in zip((actual, *gradients), (expected, *exact_gradients), strict=True):
        assert ours.dtype == dtype
        error = (ours.double() - theirs).detach()
        assert float(error.norm() / theirs.detach().norm()) < near


@pytest.mark.parametrize("row", [[(1, [1] * 16)], [(1, [2048])]], ids=["segments", "blocks"])
def test_gradients_of_half_precision_add_up_in_float32(row: list[tuple[int, list[int]]]) -> None:
    """All look at the first token alone, whose gradient is 512 and 16 times 1, which bfloat16 does not add to 512."""
    length = 1 + sum(row[0][1])
    query, value = torch.ones(1, length, 1), torch.ones(1, length, 1, requires_grad=True)
    key, grad = torch.zeros_like(query), torch.zeros(length, 1, 1)
    key[:, 0], grad[0], grad[length // 16 :: length // 16] = 50, 512, 1
    query, key, value, grad = (tensor.bfloat16() for tensor in (query, key, value, grad))
    out = attention(query, key, value, scaling=1.0, segments=segments_of(row))
    (of_value,) = torch.autograd.grad(out, value, grad)
    assert of_value.flatten()[0] == 512 + 16


@pytest.mark.parametrize("values", [6, 8, 11])
@pytest.mark.parametrize("window", [None, 9])
def test_scores_of_all_tokens_never_exist_at_once(window: int | None, values: int) -> None:
    """Torch's fused kernel takes every call."""
    *inputs, _ = row_of(ROW, torch.float32, values, padding=0)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        attention(*inputs, sliding_window=window, segments=segments_of(ROW))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_operators_are_what_a_compiler_is_told(dtype: torch.dtype) -> None:
    *inputs, grad = row_of(ROW, dtype, 6, padding=2)
    operators, layout = torch.ops.dpkd_offline, (segments_of(ROW), 0.3, 9)
    for operator, tensors in (
        (operators.attention.default, inputs),
        (operators.attention_backward.default, [grad.transpose(0, 1), *inputs]),
    ):
        opcheck(operator, (*tensors, *layout), test_utils=("test_schema", "test_faketensor"))


def test_scores_are_scaled_by_the_size_of_a_head_where_nothing_is_said() -> None:
    query, key, value, _ = row_of(ROW, torch.float64, SIZE, padding=0)
    expected = one_by_one((query, key, value), 8**-0.5, None)
    torch.testing.assert_close(attention(query, key, value, segments=segments_of(ROW)), expected)
    packed = pack(segments_of(ROW), query.shape[1])  # which a GPU takes in half precision alone
    torch.testing.assert_close(attention(query, key, value, segments=packed), expected)


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"softcap": 50.0}, "an attention with softcap"),
        ({"s_aux": torch.zeros(4)}, "an attention with s_aux"),
        ({"position_bias": torch.zeros(1)}, "an attention with position_bias"),
        ({"dropout": 0.1}, "an attention with dropout"),
        ({"segments": None}, "a model that does not hand on what its attention is to know"),
    ],
)
def test_what_it_does_not_do_is_refused(keywords: dict[str, Any], words: str) -> None:
    row = row_of([(3, [1])], torch.float32, SIZE, padding=0)[:3]
    none: dict[str, Any] = {"softcap": None, "s_aux": None, "position_bias": None, "dropout": 0.0}
    attention(*row, **none, segments=segments_of([(3, [1])]))
    with pytest.raises(NotImplementedError) as caught:
        attention(*row, **{**none, "segments": segments_of([(3, [1])]), **keywords})
    assert str(caught.value) == words


def test_calls_are_noted_while_that_is_asked_for() -> None:
    row, segments, layers = row_of([(3, [1])], torch.float32, SIZE, padding=0)[:3], segments_of([(3, [1])]), []

    def call(window: int | None) -> None:
        layers.append(nn.Module())
        inputs = (tensor[None] for tensor in row)
        ALL_ATTENTION_FUNCTIONS[SHARED_PROMPT](layers[-1], *inputs, None, sliding_window=window, segments=segments)

    with recorded_calls() as calls:
        call(None)
        call(7)
        assert calls == [Call(layers[0], None), Call(layers[1], 7)]
    call(7)
    assert len(calls) == 2


def test_a_row_as_flash_attention_takes_it() -> None:
    segments = segments_of([(3, [1, 2]), (1, [2])])
    assert segments.tolist() == [[0, 0, 0, 4], [0, 3, 4, 2], [6, 0, 6, 3]]
    packed = pack(segments, 12)  # with three tokens of padding
    assert packed.segments is segments
    assert packed.query_ends.tolist() == [0, 4, 6, 9, 12] and packed.query_ends.dtype == torch.int32
    assert packed.key_ends.tolist() == [0, 4, 9, 12, 15] and packed.key_ends.dtype == torch.int32
    assert packed.keys.tolist() == [0, 1, 2, 3, 0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11]
    assert packed.own.tolist() == [0, 1, 2, 3, 7, 8, 9, 10, 11, 12, 13, 14]
    assert (packed.again.tolist(), packed.again_of.tolist()) == ([4, 5, 6], [0, 1, 2])
    assert (packed.most_queries, packed.most_keys) == (4, 5)
    assert pack(segments, 9).query_ends.tolist() == [0, 4, 6, 9]
    assert pack(segments, 10).query_ends.tolist() == [0, 4, 6, 9, 10]


def test_the_gradient_of_keys_is_that_of_all_their_copies() -> None:
    packed = pack(segments_of(ROW), 620)
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(620, KEYS, SIZE, dtype=torch.float64, generator=generator).requires_grad_()
    keys, plain = keys_of(row, packed), row[packed.keys]
    assert torch.equal(keys, plain)
    grad = torch.randn(keys.shape, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(torch.autograd.grad(keys, row, grad), torch.autograd.grad(plain, row, grad))
