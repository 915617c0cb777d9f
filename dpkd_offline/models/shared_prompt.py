"""Attention over rows in which a prompt stands once, before all of its responses.

    x y_t y_s x' y'_t y'_s …      one row, padded at its end alone

A response sees its prompt and itself, and its positions follow the prompt's; so each prompt is computed once, whatever
the number of its responses. This is registered with transformers as an attention implementation, so that it serves
every architecture whose attention is exchangeable. A GPU has a kernel for it in half precision, FlashAttention: to that
each segment goes with all the keys that it sees, one after the other.

Legend: H heads, K key-value heads, G = H / K, D size of a head, T tokens of the row, S segments: tokens that follow
each other, and what they see, the prompt before them where it does not stand there. Values may have another size than
keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

SHARED_PROMPT = "dpkd_shared_prompt"  # its name among transformers' attentions
HALF = (torch.bfloat16, torch.float16)  # what FlashAttention computes in
# Rows, and segments in the backward pass, are padded to a multiple of STEP, so that there are few shapes of products: a
# CPU's library makes a kernel for each, which takes longer than to use it. So many queries' scores exist at once there.
STEP, BLOCK = 64, 128
UNKNOWN = ("softcap", "s_aux", "position_bias")  # what some models change their scores by, and this does not


def segments_of(row: Sequence[tuple[int, Sequence[int]]]) -> Tensor:
    """The segments [S, 4] of a row, by the tokens of each prompt and of its responses.

    Of each: where the prompt that it sees starts and its tokens, where it starts itself and its tokens.
    """
    segments, start = [], 0
    for prompt, (first, *others) in row:
        end = start + prompt + first
        segments.append((start, 0, start, prompt + first))  # with the prompt
        for length in others:
            segments.append((start, prompt, end, length))
            end += length
        start = end
    return torch.tensor(segments)


class Packed(NamedTuple):
    """The segments of a row as FlashAttention takes them, with the padding of the row as the last.

    M keys: of each segment its prompt's and its own. Each token of the row is among its segment's own, and a prompt's
    once more for each further response.
    """

    segments: Tensor  # [S, 4], on the CPU
    query_ends: Tensor  # [S + 1] int32, where each segment ends in the row, after a zero
    key_ends: Tensor  # [S + 1] int32, where its keys end among all
    keys: Tensor  # [M], of which token each key is
    own: Tensor  # [T], where each token of the row is among the keys as one of its segment
    again: Tensor  # [P], where prompts stand among the keys once more
    again_of: Tensor  # [P], and of which tokens
    most_queries: int  # of a segment
    most_keys: int

    def sent(self, send: Callable[[Tensor], Tensor]) -> Packed:
        """The same on a device, as far as its kernel reads it."""
        return self._replace(
            query_ends=send(self.query_ends),
            key_ends=send(self.key_ends),
            keys=send(self.keys),
            own=send(self.own),
            again=send(self.again),
            again_of=send(self.again_of),
        )


def pack(segments: Tensor, length: int) -> Packed:
    """The segments of a row of `length` tokens, on the CPU."""
    rows = segments.tolist()
    if (end := rows[-1][2] + rows[-1][3]) < length:
        rows.append([end, 0, end, length - end])
    _, past, _, size = torch.tensor(rows).T
    key_ends = torch.nn.functional.pad((past + size).cumsum(0), (1, 0))
    query_ends = torch.nn.functional.pad(size.cumsum(0), (1, 0))
    is_own = torch.tensor([False, True]).repeat(len(rows)).repeat_interleave(torch.stack([past, size], 1).flatten())
    parts = [part for s, p, o, n in rows for part in ((s, p), (o, n))]
    keys = torch.cat([torch.arange(at, at + count) for at, count in parts])
    places = torch.arange(len(keys))
    own_places = torch.empty(length, dtype=torch.long)
    own_places[keys[is_own]] = places[is_own]
    most = (int(size.max()), int((past + size).max()))
    return Packed(segments, query_ends.int(), key_ends.int(), keys, own_places, places[~is_own], keys[~is_own], *most)


class Call(NamedTuple):
    """A layer that has called this attention, and the window that it asked for."""

    layer: nn.Module
    window: int | None


_calls: list[Call] | None = None  # no ContextVar, which torch.compile does not know


@contextmanager
def recorded_calls() -> Iterator[list[Call]]:
    """A context in which every call of this attention, with segments as all are, is noted in a list."""
    global _calls
    calls: list[Call] = []
    _calls = calls
    try:
        yield calls
    finally:
        _calls = None


class _Block(NamedTuple):
    """Some queries of a segment, and of padding after it."""

    start: int
    size: int  # a multiple of STEP
    before: int  # keys before its first query
    seen: slice  # keys of which any query sees one


class _Segment:
    """One of a row's: its keys, and its queries in blocks."""

    def __init__(self, shared: int, past: int, start: int, length: int, window: int | None) -> None:
        self._shared, self._own = slice(shared, shared + past), slice(start, start + length)
        self._past, self._length, self._window = past, length, window
        self._keys = padded(past + padded(length))

    def blocks(self) -> Iterator[_Block]:
        for start in range(0, self._length, BLOCK):
            size, before = min(BLOCK, padded(self._length - start)), self._past + start
            first = 0 if self._window is None else max(before - self._window + 1, 0) // STEP * STEP
            yield _Block(start, size, before, slice(first, padded(before + size)))

    def exact_keys(self, row: Tensor) -> Tensor:
        """Of keys or values [K, T, D] all that the segment sees: [K, past + own, D]."""
        own = row[:, self._own]
        return torch.cat([row[:, self._shared], own], 1) if self._past else own

    def keys(self, row: Tensor, dtype: torch.dtype) -> Tensor:
        """The same and zeros, up to a multiple of STEP."""
        keys = row.new_empty(len(row), self._keys, row.shape[2], dtype=dtype)
        end = self._past + self._length
        keys[:, : self._past], keys[:, self._past : end] = row[:, self._shared], row[:, self._own]
        keys[:, end:] = 0
        return keys

    def add_keys(self, row: Tensor, keys: Tensor) -> None:
        """The reverse of `keys`: add up in the row."""
        row[:, self._shared] += keys[:, : self._past]
        row[:, self._own] += keys[:, self._past : self._past + self._length]

    def own(self, row: Tensor) -> Tensor:
        """Of queries [K, G, T, D] the segment's, as attention of several batches takes them: [G, K, own, D]."""
        return row[:, :, self._own].transpose(0, 1)

    def queries(self, row: Tensor, block: _Block) -> Tensor:
        """Of queries [K, G, T, D] a block's, and zeros: [K, G * size, D]."""
        part = row[:, :, self._own][:, :, block.start : block.start + block.size]
        if missing := block.size - part.shape[2]:
            part = torch.nn.functional.pad(part, (0, 0, 0, missing))
        return part.flatten(1, 2)

    def set_queries(self, row: Tensor, block: _Block, queries: Tensor) -> None:
        """The reverse of `queries`: fill the block's part of the row."""
        part = row[:, :, self._own][:, :, block.start : block.start + block.size]
        part.copy_(queries.unflatten(1, (-1, block.size))[:, :, : part.shape[2]])

    def mask(self, like: Tensor) -> Tensor | None:
        """What is added to the scores [own, past + own], or None: each query sees the keys up to its own."""
        keys = self._past + self._length
        cut = self._window is not None and self._window < keys
        if not self._past and not cut:
            return None
        mask = like.new_full((self._length, keys), -torch.inf).triu_(self._past + 1)
        if cut:
            assert self._window is not None
            gone = mask.new_ones(mask.shape, dtype=torch.bool).tril_(self._past - self._window)
            mask.masked_fill_(gone, -torch.inf)
        return mask

    def weights(self, queries: Tensor, keys: Tensor, block: _Block) -> Tensor:
        """Softmax [K, G * size, m] of a block of queries [K, G * size, D] on all keys, of which it sees m."""
        scores = queries @ keys[:, block.seen].mT
        by_place = scores.unflatten(1, (-1, block.size))  # [K, G, size, m]
        before = block.before - block.seen.start
        last = by_place[..., before:]
        last.masked_fill_(last.new_ones(last.shape[-2:], dtype=torch.bool).triu_(1), -torch.inf)
        if self._window is not None and before + block.size > self._window:
            gone = last.new_ones(by_place.shape[-2:], dtype=torch.bool).tril_(before - self._window)
            by_place.masked_fill_(gone, -torch.inf)
        return scores.softmax(-1)


def _segments(segments: Tensor, window: int | None) -> Iterator[_Segment]:
    for shared, past, start, length in segments.tolist():
        yield _Segment(shared, past, start, length, window)


def padded(length: int) -> int:
    """The next multiple of STEP."""
    return -(-length // STEP) * STEP


def _widened(row: Tensor, size: int) -> Tensor:
    """With zeros after each vector of a row, up to a size."""
    return row if row.shape[-1] == size else torch.nn.functional.pad(row, (0, size - row.shape[-1]))


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


# Operators of their own, of which a compiler need not know more than the shapes.
@torch.library.custom_op("dpkd_offline::attention", mutates_args=())
def _attention(query: Tensor, key: Tensor, value: Tensor, segments: Tensor, scale: float, window: int | None) -> Tensor:
    """softmax(query · key · scale) · value of queries [H, T, D], keys [K, T, D] and values [K, T, D']: [H, T, D'].

    By torch's fused kernel, segment by segment. Scores are made and reduced in float32 at least.
    """
    out = query.new_zeros(*query.shape[:-1], value.shape[2])
    size = max(key.shape[2], value.shape[2])
    query, key, value = (_widened(row, size) for row in (query, key, value))
    by_key = query.unflatten(0, (len(key), -1))  # [K, G, T, D]
    groups = by_key.shape[1]
    for segment in _segments(segments, window):
        keys, values = (segment.exact_keys(row).expand(groups, -1, -1, -1) for row in (key, value))
        mask = segment.mask(query)
        answers = scaled_dot_product_attention(
            segment.own(by_key), keys, values, attn_mask=mask, is_causal=mask is None, scale=scale
        )
        segment.own(out.unflatten(0, (len(key), -1))).copy_(answers[..., : out.shape[2]])
    return out


@torch.library.custom_op("dpkd_offline::attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, segments: Tensor, scale: float, window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by query, key and value, from that by what `_attention` returns. Makes its softmax again."""
    query, precise = query.unflatten(0, (len(key), -1)), _precise(query.dtype)  # [K, G, T, D]
    grad = grad.unflatten(0, (len(key), -1))
    grad_query = query.new_zeros(query.shape)
    grad_key, grad_value = (t.new_zeros(t.shape, dtype=precise) for t in (key, value))
    for segment in _segments(segments, window):
        keys, values = segment.keys(key, precise), segment.keys(value, value.dtype)
        scaled_keys = (keys * scale).to(key.dtype)
        exact_values = values.to(precise)
        grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values, dtype=precise)
        for block in segment.blocks():
            seen = block.seen
            queries, above = segment.queries(query, block), segment.queries(grad, block)
            weights = segment.weights(queries.to(precise) * scale, keys, block)
            grad_values[:, seen] += weights.to(value.dtype).mT @ above
            error = above.to(precise) @ exact_values[:, seen].mT
            error = torch._softmax_backward_data(error, weights, -1, precise).to(query.dtype)
            segment.set_queries(grad_query, block, error @ scaled_keys[:, seen])
            grad_keys[:, seen] += error.mT @ queries
        segment.add_keys(grad_key, grad_keys.mul_(scale))
        segment.add_keys(grad_value, grad_values)
    return grad_query.flatten(0, 1), grad_key.to(key.dtype), grad_value.to(value.dtype)


@_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return query.new_empty(*query.shape[:-1], value.shape[-1])


@_attention_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_attention_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.window), None, None, None


_attention.register_autograd(_backward, setup_context=_keep)


class _Keys(torch.autograd.Function):
    """Keys or values [M, K, D] of all segments, from those of a row [T, K, D].

    Nearly every token is there once: the gradient is taken from there, and that of prompts added, rather than that all
    are added up.
    """

    @staticmethod
    def forward(ctx: Any, row: Tensor, keys: Tensor, own: Tensor, again: Tensor, again_of: Tensor) -> Tensor:
        ctx.save_for_backward(own, again, again_of)
        return row.index_select(0, keys)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        own, again, again_of = ctx.saved_tensors
        grad = grads[0].index_select(0, own).index_add(0, again_of, grads[0].index_select(0, again))
        return grad, None, None, None, None


def keys_of(row: Tensor, packed: Packed) -> Tensor:
    """Keys or values [M, K, D] of all segments, from those of a row [T, K, D]."""
    keys: Tensor = _Keys.apply(row, packed.keys, packed.own, packed.again, packed.again_of)  # type: ignore[no-untyped-call]
    return keys


def _flash_attention(
    query: Tensor, key: Tensor, value: Tensor, row: Packed, scale: float, window: int | None
) -> Tensor:
    """What `_attention` computes, as [T, H, D]: causal from the last query and the last key of each segment on."""
    keys, values = (keys_of(tensor.transpose(0, 1), row) for tensor in (key, value))
    seen = (-1 if window is None else window - 1, 0)  # tokens before and after the one that is aligned with a query
    ends = (row.query_ends, row.key_ends, row.most_queries, row.most_keys)
    out = varlen_attn(query.transpose(0, 1), keys, values, *ends, scale=scale, window_size=seen, enable_gqa=True)
    assert isinstance(out, Tensor)
    return out


def _shared_prompt_attention(
    module: nn.Module,
    query: Tensor,  # [1, H, T, D]
    key: Tensor,  # [1, K, T, D]
    value: Tensor,  # [1, K, T, D']
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    segments: Tensor | Packed | None = None,  # [S, 4], as `segments_of` makes them
    **more: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls in each layer. Returns [1, T, H, D']."""
    changed = [name for name in UNKNOWN if more.get(name) is not None] + ["dropout"] * (dropout > 0)
    if changed:
        raise NotImplementedError(f"an attention with {changed[0]}")
    if segments is None:
        raise NotImplementedError("a model that does not hand on what its attention is to know")
    if _calls is not None:
        _calls.append(Call(module, sliding_window))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(segments, Packed):
        if query.dtype in HALF:
            return _flash_attention(query[0], key[0], value[0], segments, scale, sliding_window)[None], None
        segments = segments.segments
    out: Tensor = _attention(query[0], key[0], value[0], segments, scale, sliding_window)
    return out.transpose(0, 1)[None].contiguous(), None  # as transformers' own: some models take a view of it


AttentionInterface.register(SHARED_PROMPT, _shared_prompt_attention)
