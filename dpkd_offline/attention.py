"""Attention over rows in which a prompt stands once, before all of its responses.

    x y_t y_s x' y'_t y'_s …      one row, no padding

A response sees its prompt and itself, and its positions follow the prompt's; so each prompt is computed once, whatever
the number of its responses. It is registered with transformers as an attention implementation, so that it serves every
architecture whose attention is exchangeable. Legend: H heads, K key-value heads, D size of a head, T tokens of the row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

SHARED_PROMPT = "dpkd_shared_prompt"
T = TypeVar("T")
QUERIES = 64  # of which the scores exist at once; on a CPU they fit its cache
UNKNOWN = ("softcap", "s_aux", "position_bias")  # what some models change their scores by, and this does not


class Span(NamedTuple):
    """A prompt and its responses, by their numbers of tokens."""

    prompt: int
    responses: tuple[int, ...]


_row: ContextVar[Sequence[Span]] = ContextVar("row")


@contextmanager
def spans(found: Sequence[Span]) -> Iterator[None]:
    """What stands in the row that a model is called with, inside of this."""
    token = _row.set(found)
    try:
        yield
    finally:
        _row.reset(token)


def with_these_spans(call: Callable[..., T]) -> Callable[..., T]:
    """`call`, with the row that stands now, whenever and in whatever thread it is called."""
    row = _row.get()

    def later(*args: Any, **keywords: Any) -> T:
        with spans(row):
            return call(*args, **keywords)

    return later


class _Segment(NamedTuple):
    """Tokens that follow each other, and what they see: the prompt before them, where it does not stand there."""

    own: slice
    shared: slice

    def of(self, row: Tensor) -> Tensor:
        """Keys or values [K, T, D] of all that the last of the tokens sees: [K, past + own, D]."""
        return torch.cat([row[:, self.shared], row[:, self.own]], dim=1) if self.past else row[:, self.own]

    @property
    def past(self) -> int:
        return int(self.shared.stop - self.shared.start)

    def blocks(self, window: int | None) -> Iterator[tuple[slice, slice]]:
        """Some queries of the row, and the keys among `of` that any of them sees."""
        for start in range(self.own.start, self.own.stop, QUERIES):
            queries = slice(start, min(start + QUERIES, self.own.stop))
            before = self.past + start - self.own.start  # keys before the first query
            first = 0 if window is None else max(before - window + 1, 0)
            yield queries, slice(first, before + queries.stop - start)


def _segments(row: Sequence[Span]) -> Iterator[_Segment]:
    start = 0
    for prompt, responses in row:
        shared, end = slice(start, start + prompt), start + prompt + responses[0]
        yield _Segment(slice(start, end), slice(0, 0))
        for length in responses[1:]:
            yield _Segment(slice(end, end + length), shared)
            end += length
        start = end


class _Attention(torch.autograd.Function):
    """softmax(query · key · scale) · value, some queries at a time, forward and backward.

    Scores are made and reduced in float32 at least. Legend as above, and G = H / K, the queries that share a key.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, row: Sequence[Span], scale: float, window: int | None
    ) -> Tensor:
        query = query.unflatten(0, (len(key), -1))  # [K, G, T, D]
        out = torch.empty_like(query)  # [K, G, T, D]
        for segment in _segments(row):
            keys, values = segment.of(key), segment.of(value)
            scaled = keys.to(_precise(keys)) * scale
            for queries, seen in segment.blocks(window):
                weights = _weights(
                    query[:, :, queries].flatten(1, 2), scaled[:, seen], queries.stop - queries.start, window
                )
                out[:, :, queries] = (weights.to(value.dtype) @ values[:, seen]).view_as(out[:, :, queries])
        ctx.save_for_backward(query, key, value)
        ctx.row, ctx.scale, ctx.window = row, scale, window
        return out.flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        query, key, value = ctx.saved_tensors
        grad = grads[0].view_as(query)  # [K, G, T, D]
        grad_query = torch.empty_like(query)
        grad_key, grad_value = (torch.zeros_like(t, dtype=_precise(t)) for t in (key, value))
        for segment in _segments(ctx.row):
            keys, values, past = segment.of(key), segment.of(value), segment.past
            scaled = keys.to(_precise(keys)) * ctx.scale
            keys = scaled.to(keys.dtype)
            grad_keys, grad_values = (torch.zeros_like(t, dtype=_precise(t)) for t in (keys, values))
            for queries, seen in segment.blocks(ctx.window):
                here = query[:, :, queries].flatten(1, 2)  # [K, G * n, D]
                above = grad[:, :, queries].flatten(1, 2)
                weights = _weights(here, scaled[:, seen], queries.stop - queries.start, ctx.window)
                grad_values[:, seen] += weights.to(value.dtype).mT @ above
                error = (above @ values[:, seen].mT).to(weights.dtype)
                error = torch._softmax_backward_data(error, weights, -1, weights.dtype).to(query.dtype)
                grad_query[:, :, queries] = (error @ keys[:, seen]).view_as(query[:, :, queries])
                grad_keys[:, seen] += error.mT @ here
            for whole, part in ((grad_key, grad_keys.mul_(ctx.scale)), (grad_value, grad_values)):
                whole[:, segment.shared] += part[:, :past]
                whole[:, segment.own] += part[:, past:]
        return grad_query.flatten(0, 1), grad_key.to(key.dtype), grad_value.to(value.dtype), None, None, None


def _precise(like: Tensor) -> torch.dtype:
    return torch.promote_types(like.dtype, torch.float32)


def _weights(query: Tensor, keys: Tensor, n: int, window: int | None) -> Tensor:
    """Softmax [K, G * n, m] of queries [K, G * n, D] on scaled keys [K, m, D], the last n of which are their own."""
    m = keys.shape[1]
    scores = query.to(keys.dtype) @ keys.mT
    by_place = scores.unflatten(1, (-1, n))  # [K, G, n, m]
    later = torch.ones(n, n, dtype=torch.bool, device=query.device).triu_(1)
    by_place[..., m - n :].masked_fill_(later, -torch.inf)
    if window is not None and m > window:
        by_place.masked_fill_(later.new_ones(n, m).tril_(m - n - window), -torch.inf)
    return scores.softmax(-1)


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
    changed = [name for name in UNKNOWN if more.get(name) is not None] + ["dropout"] * (dropout > 0)
    if changed:
        raise NotImplementedError(f"an attention with {changed[0]}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out: Tensor = _Attention.apply(query[0], key[0], value[0], _row.get(), scale, sliding_window)  # type: ignore[no-untyped-call]
    return out.transpose(0, 1)[None], None


AttentionInterface.register(SHARED_PROMPT, _shared_prompt_attention)
