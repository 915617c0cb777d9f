"""Attention over rows in which a prompt stands once, before all of its responses.

    x y_t y_s x' y'_t y'_s …      one row, no padding

A response sees its prompt and itself, and its positions follow the prompt's; so each prompt is computed once, whatever
the number of its responses. It is registered with transformers as an attention implementation, so that it serves every
architecture whose attention is exchangeable. Legend: H heads, K key-value heads, D size of a head, T tokens of the row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

SHARED_PROMPT = "dpkd_shared_prompt"
UNKNOWN = ("softcap", "s_aux", "position_bias")  # what some models change their scores by, and this does not


class Span(NamedTuple):
    """A prompt and its responses, by their numbers of tokens."""

    prompt: int
    responses: tuple[int, ...]


class _Row(NamedTuple):
    spans: Sequence[Span]
    masks: dict[tuple[int, int, int | None], Tensor]  # the same in every layer


_row: ContextVar[_Row] = ContextVar("row")


@contextmanager
def spans(found: Sequence[Span]) -> Iterator[None]:
    """What stands in the row that a model is called with, inside of this."""
    token = _row.set(_Row(found, {}))
    try:
        yield
    finally:
        _row.reset(token)


def _shared_prompt_attention(
    module: nn.Module,
    query: Tensor,  # [1, H, T, D]
    key: Tensor,  # [1, K, T, D]
    value: Tensor,  # [1, K, T, D]
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls in each layer. Returns [1, T, H, D]."""
    if changed := [name for name in UNKNOWN if more.get(name) is not None]:
        raise NotImplementedError(f"an attention with {changed[0]}")
    row = _row.get()

    def attend(place: slice, keys: Tensor, values: Tensor, past: int) -> Tensor:
        length = place.stop - place.start
        mask = None
        if past or (sliding_window is not None and length > sliding_window):
            mask = row.masks.get((length, past, sliding_window))
            if mask is None:
                mask = row.masks[length, past, sliding_window] = _mask(length, past, sliding_window, query)
        return F.scaled_dot_product_attention(
            query[:, :, place],
            keys,
            values,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        ).transpose(1, 2)

    parts, start = [], 0
    for prompt, responses in row.spans:
        first = slice(start, start + prompt + responses[0])
        parts.append(attend(first, key[:, :, first], value[:, :, first], past=0))
        shared, end = slice(start, start + prompt), first.stop
        for length in responses[1:]:
            place = slice(end, end + length)
            keys = torch.cat([key[:, :, shared], key[:, :, place]], dim=2)
            values = torch.cat([value[:, :, shared], value[:, :, place]], dim=2)
            parts.append(attend(place, keys, values, past=prompt))
            end = place.stop
        start = end
    return torch.cat(parts, dim=1), None


def _mask(length: int, past: int, window: int | None, like: Tensor) -> Tensor:
    """What to add to the scores of `length` queries that come after `past` keys: [length, past + length]."""
    distance = torch.arange(past, past + length)[:, None] - torch.arange(past + length)
    hidden = (distance < 0) if window is None else (distance < 0) | (distance >= window)
    return torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf).to(like.device, like.dtype)


AttentionInterface.register(SHARED_PROMPT, _shared_prompt_attention)
