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

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

SHARED_PROMPT = "dpkd_shared_prompt"  # its name among transformers' attentions
HALF = (torch.bfloat16, torch.float16)  # what FlashAttention computes in
# So many queries' scores exist at once: on a CPU they fit its cache. Segments and rows are padded to a multiple of it,
# so that there are few shapes of products: a CPU's library makes a kernel for each, which takes longer than to use it.
BLOCK = 64
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
    """The segments of a row as FlashAttention takes them, with the padding of the row as the last."""

    segments: Tensor  # [S, 4]
    keys: Tensor  # places in the row of the keys that the segments see: of each its prompt's and its own
    query_ends: Tensor  # [S + 1] int32, where each segment ends in the row, after a zero
    key_ends: Tensor  # [S + 1] int32, where its keys end in `keys`
    most_queries: int  # of a segment
    most_keys: int


def packed(segments: Tensor, length: int, device: torch.device) -> Packed:
    """The segments of a row of `length` tokens, for a GPU."""
    rows = segments.tolist()
    if (end := rows[-1][2] + rows[-1][3]) < length:
        rows.append([end, 0, end, length - end])
    places = [(torch.arange(prompt, prompt + past), torch.arange(own, own + size)) for prompt, past, own, size in rows]
    sizes = torch.tensor([(size, past + size) for _, past, _, size in rows])
    most_queries, most_keys = sizes.amax(0).tolist()
    query_ends, key_ends = (
        torch.nn.functional.pad(sizes.cumsum(0), (0, 0, 1, 0)).int().T.contiguous().to(device, non_blocking=True)
    )
    keys = torch.cat([part for pair in places for part in pair]).to(device, non_blocking=True)
    return Packed(segments, keys, query_ends, key_ends, most_queries, most_keys)


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
    """Some queries of a segment."""

    number: int
    before: int  # keys before its first query
    seen: slice  # keys of which any query sees one


class _Segment:
    """One of a row's, and its tensors in blocks."""

    def __init__(self, shared: int, past: int, start: int, length: int, window: int | None) -> None:
        self._shared, self._own = slice(shared, shared + past), slice(start, start + length)
        self._past, self._length, self._window = past, length, window
        self._blocks, self._whole = -(-length // BLOCK), length // BLOCK
        self._keys = padded(past + self._blocks * BLOCK)
        # Which of the last keys that a block sees come after each query: of all blocks the same.
        self._later = torch.ones(BLOCK, padded(past + BLOCK) - past, dtype=torch.bool).triu_(1)

    def blocks(self) -> Iterator[_Block]:
        for number in range(self._blocks):
            before = self._past + number * BLOCK
            first = 0 if self._window is None else max(before - self._window + 1, 0) // BLOCK * BLOCK
            yield _Block(number, before, slice(first, padded(before + BLOCK)))

    def keys(self, row: Tensor, dtype: torch.dtype) -> Tensor:
        """Of keys or values [K, T, D] all that the segment sees: [K, past + own + padding, D]."""
        keys = row.new_empty(len(row), self._keys, row.shape[2], dtype=dtype)
        end = self._past + self._length
        keys[:, : self._past], keys[:, self._past : end] = row[:, self._shared], row[:, self._own]
        keys[:, end:] = 0
        return keys

    def add_keys(self, row: Tensor, keys: Tensor) -> None:
        """The reverse of `keys`: add up in the row."""
        row[:, self._shared] += keys[:, : self._past]
        row[:, self._own] += keys[:, self._past : self._past + self._length]

    def queries(self, row: Tensor) -> Tensor:
        """Of queries [K, G, T, D] the segment's, in blocks: [blocks, K, G * BLOCK, D]."""
        heads, groups, _, size = row.shape
        blocks = row.new_zeros(self._blocks, heads, groups, BLOCK, size)
        for ours, theirs in self._pieces(blocks, row):
            ours.copy_(theirs)
        return blocks.flatten(2, 3)

    def set_queries(self, row: Tensor, blocks: Tensor) -> None:
        """The reverse of `queries`: fill the segment's part of the row."""
        for ours, theirs in self._pieces(blocks.unflatten(2, (-1, BLOCK)), row):
            theirs.copy_(ours)

    def _pieces(self, blocks: Tensor, row: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Where the same queries stand, in blocks [blocks, K, G, BLOCK, D] and in a row."""
        row, whole = row[:, :, self._own], self._whole
        if whole:
            yield blocks[:whole], row[:, :, : whole * BLOCK].unflatten(2, (whole, BLOCK)).permute(2, 0, 1, 3, 4)
        if rest := self._length % BLOCK:
            yield blocks[whole, :, :, :rest], row[:, :, whole * BLOCK :]

    def weights(self, queries: Tensor, keys: Tensor, block: _Block) -> Tensor:
        """Softmax [K, G * BLOCK, m] of a block of queries [K, G * BLOCK, D] on all keys, of which it sees m."""
        scores = queries @ keys[:, block.seen].mT
        by_place = scores.unflatten(1, (-1, BLOCK))  # [K, G, BLOCK, m]
        before = block.before - block.seen.start
        by_place[..., before:].masked_fill_(self._later.to(scores.device), -torch.inf)
        if self._window is not None and before + BLOCK > self._window:
            gone = torch.ones(by_place.shape[-2:], dtype=torch.bool, device=scores.device).tril_(before - self._window)
            by_place.masked_fill_(gone, -torch.inf)
        return scores.softmax(-1)


def _segments(segments: Tensor, window: int | None) -> Iterator[_Segment]:
    for shared, past, start, length in segments.tolist():
        yield _Segment(shared, past, start, length, window)


def padded(length: int) -> int:
    """The next multiple of BLOCK."""
    return -(-length // BLOCK) * BLOCK


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


# Operators of their own, of which a compiler need not know more than the shapes.
@torch.library.custom_op("dpkd_offline::attention", mutates_args=())
def _attention(query: Tensor, key: Tensor, value: Tensor, segments: Tensor, scale: float, window: int | None) -> Tensor:
    """softmax(query · key · scale) · value of queries [H, T, D], keys [K, T, D] and values [K, T, D']: [H, T, D'].

    Scores are made and reduced in float32 at least.
    """
    query, precise = query.unflatten(0, (len(key), -1)), _precise(query.dtype)  # [K, G, T, D]
    out = query.new_zeros(*query.shape[:-1], value.shape[2])
    for segment in _segments(segments, window):
        keys, values = segment.keys(key, precise), segment.keys(value, value.dtype)
        queries = segment.queries(query)
        answers = queries if value.shape[2] == key.shape[2] else queries.new_empty(*queries.shape[:-1], value.shape[2])
        scaled = queries.to(precise) * scale
        for block in segment.blocks():
            weights = segment.weights(scaled[block.number], keys, block).to(value.dtype)
            torch.bmm(weights, values[:, block.seen], out=answers[block.number])
        segment.set_queries(out, answers)
    return out.flatten(0, 1)


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
        queries, above = segment.queries(query), segment.queries(grad)
        scaled, grad_queries = queries.to(precise) * scale, torch.empty_like(queries)
        grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values, dtype=precise)
        for block in segment.blocks():
            number, _, seen = block
            weights = segment.weights(scaled[number], keys, block)
            grad_values[:, seen] += weights.to(value.dtype).mT @ above[number]
            error = (above[number] @ values[:, seen].mT).to(precise)
            error = torch._softmax_backward_data(error, weights, -1, precise).to(query.dtype)
            torch.bmm(error, scaled_keys[:, seen], out=grad_queries[number])
            grad_keys[:, seen] += error.mT @ queries[number]
        segment.set_queries(grad_query, grad_queries)
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


def _flash_attention(
    query: Tensor, key: Tensor, value: Tensor, row: Packed, scale: float, window: int | None
) -> Tensor:
    """What `_attention` computes, as [T, H, D]: causal from the last query and the last key of each segment on."""
    keys, values = (tensor.transpose(0, 1).index_select(0, row.keys) for tensor in (key, value))
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
