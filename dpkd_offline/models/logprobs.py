"""Log-probs of response tokens under a model, without ever holding the logits of all of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpkd_offline.models.batch import Batch
from dpkd_offline.models.head import Transform, head_of
from dpkd_offline.models.shared_prompt import packed

TOKENS, WIDTH = 2048, 4096  # so many tokens' logits for so many ids exist at once
CHUNK = 128  # tokens whose logits of the whole vocabulary exist at once, for the likeliest tokens
ON_GPU = {TOKENS: 8192, WIDTH: 8192, CHUNK: 2048}  # instead


class ChunkedLogps(torch.autograd.Function):
    """log softmax(transform(hidden @ head.T + bias))[n, ids[n, k]], a block of tokens and vocabulary at a time.

    The backward pass makes each block's logits again, and adds the gradient of the head to its `main_grad` where it has
    one, so that it need not exist twice. Products are in the model's precision, reductions in float32
    (float64 for a float64 model). Legend: N tokens, K ids asked for, H hidden size, V vocabulary.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        ids: Tensor,
        bias: Tensor | None = None,
        transform: Transform | None = None,
    ) -> Tensor:
        precise = torch.promote_types(hidden.dtype, torch.float32)
        logps = hidden.new_empty(ids.shape, dtype=precise)  # [N, K]
        normaliser = hidden.new_empty(len(hidden), dtype=precise)  # [N], log-sum-exp
        for tokens in _blocks(len(hidden), _size(TOKENS, hidden)):
            largest = torch.full_like(normaliser[tokens], -torch.inf)
            total = torch.zeros_like(largest)  # of exp(logit - largest) so far
            for words in _blocks(len(head), _size(WIDTH, hidden)):
                logits = _logits(hidden[tokens], head, bias, transform, words)
                inside, local = _local(ids[tokens], words)
                logps[tokens] = torch.where(inside, logits.gather(-1, local), logps[tokens])
                new = torch.maximum(largest, logits.amax(-1))
                total.mul_(largest.sub_(new).exp_()).add_(logits.sub_(new[:, None]).exp_().sum(-1))
                largest = new
            normaliser[tokens] = total.log_().add_(largest)
        ctx.save_for_backward(hidden, head, ids, bias, normaliser)
        ctx.transform = transform
        ctx.main_grad = getattr(head, "main_grad", None) if ctx.needs_input_grad[1] else None
        return logps.sub_(normaliser[:, None])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head, ids, bias, normaliser = ctx.saved_tensors
        grad = grads[0]  # [N, K]
        grad_hidden = torch.zeros_like(hidden, dtype=normaliser.dtype)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=normaliser.dtype)
        size = _size(TOKENS, hidden)
        # Several blocks of tokens add up in float32; one alone is complete at once.
        kept = head.dtype if len(hidden) <= size else normaliser.dtype
        grad_head: Tensor | None = ctx.main_grad
        if grad_head is None and ctx.needs_input_grad[1]:
            grad_head = torch.zeros_like(head, dtype=kept)
        for tokens in _blocks(len(hidden), size):
            for words in _blocks(len(head), _size(WIDTH, hidden)):
                # d logp / d logits = onehot(id) - softmax
                logits = _logits(hidden[tokens], head, bias, ctx.transform, words)
                slope = None if ctx.transform is None else ctx.transform.slope(logits)
                error = logits.sub_(normaliser[tokens, None]).exp_().mul_(-grad[tokens].sum(-1, keepdim=True))
                inside, local = _local(ids[tokens], words)
                error = error.scatter_add_(-1, local, grad[tokens] * inside)
                if slope is not None:
                    error *= slope
                if grad_bias is not None:
                    grad_bias[words] += error.sum(0)
                error = error.to(hidden.dtype)
                grad_hidden[tokens] += error @ head[words]
                if grad_head is not None:
                    grad_head[words] += error.T @ hidden[tokens]
        returned = None if grad_head is None or ctx.main_grad is not None else grad_head.to(head.dtype)
        return (
            grad_hidden.to(hidden.dtype),
            returned,
            None,
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
        )


def _size(size: int, where: Tensor) -> int:
    return ON_GPU.get(size, size) if where.is_cuda else size


def _logits(
    hidden: Tensor, head: Tensor, bias: Tensor | None, transform: Transform | None, words: slice = slice(None)
) -> Tensor:
    """Logits of a block of the vocabulary, in float32 at least."""
    logits = (hidden @ head[words].T).to(torch.promote_types(hidden.dtype, torch.float32))
    if bias is not None:
        logits = logits + bias[words]
    return logits if transform is None else transform(logits)


def _blocks(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _local(ids: Tensor, words: slice) -> tuple[Tensor, Tensor]:
    """Which ids a block of the vocabulary holds, and where in it (anywhere, for those that it does not)."""
    inside = (ids >= words.start) & (ids < words.stop)
    return inside, (ids - words.start).clamp_(0, words.stop - words.start - 1)


def response_hidden(model: PreTrainedModel, batch: Batch, alone: bool = False) -> Tensor:
    """The last hidden states that predict the N response tokens of a batch: [N, H].

    With `alone` each padded row goes through the model by itself, without its padding.
    """
    decoder = head_of(model).decoder
    if alone:
        return _hidden_one_by_one(decoder, batch)
    layout: dict[str, Any] = {name: getattr(batch, name) for name in ("attention_mask", "position_ids", "segments")}
    if batch.segments is not None and batch.input_ids.is_cuda:
        layout["segments"] = packed(batch.segments, batch.input_ids.shape[1], batch.input_ids.device)
    output = decoder(input_ids=batch.input_ids, use_cache=False, **{k: v for k, v in layout.items() if v is not None})
    hidden: Tensor = output.last_hidden_state.flatten(0, 1)[batch.places]
    return hidden


def _hidden_one_by_one(decoder: nn.Module, batch: Batch) -> Tensor:
    assert batch.attention_mask is not None
    width = batch.input_ids.shape[1]
    hidden = []
    for row, length in enumerate(batch.attention_mask.sum(1).tolist()):
        states = decoder(input_ids=batch.input_ids[row : row + 1, :length], use_cache=False).last_hidden_state[0]
        hidden.append(states[batch.places[batch.places // width == row] - row * width])
    return torch.cat(hidden)


def token_logps(model: PreTrainedModel, batch: Batch, alone: bool = False) -> Tensor:
    """log q(y_n | x, y_<n) in nats for the N response tokens of a batch: [N], float32, with a gradient.

    The output head runs on response positions only, and the logits of all of them never exist at once.
    """
    return logps_of(model, response_hidden(model, batch, alone), batch.targets[:, None])[:, 0]


def logps_of(model: PreTrainedModel, hidden: Tensor, ids: Tensor) -> Tensor:
    """Log-probs in nats of ids [N, K] after the hidden states [N, H]: [N, K], float32, with a gradient."""
    logps: Tensor = ChunkedLogps.apply(hidden, _weight(model), ids, _bias(model), _transform(model))  # type: ignore[no-untyped-call]
    return logps


@torch.no_grad()
def likeliest(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """The likeliest id after each of the hidden states [N, H]: [N]."""
    head, bias = _weight(model), _bias(model)  # scale and cap change no order
    parts = []
    for part in _blocks(len(hidden), _size(CHUNK, hidden)):
        products = hidden[part] @ head.T
        parts.append((products if bias is None else products + bias).argmax(-1))
    return torch.cat(parts)


def response_logps(model: PreTrainedModel, batch: Batch, alone: bool = False) -> list[list[float]]:
    """Log-probs in nats of the responses of a batch, a list per response and a number per token."""
    batch = batch.to(model.device)
    return [part.tolist() for part in token_logps(model, batch, alone).split(batch.lengths.tolist())]


def top_logps(model: PreTrainedModel, batch: Batch, k: int, alone: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs [N] of the response tokens as in `token_logps`, and the ids and log-probs [N, k] of the likeliest."""
    batch = batch.to(model.device)
    hidden = response_hidden(model, batch, alone)
    head, bias, transform = _weight(model), _bias(model), _transform(model)
    parts = []
    for part in _blocks(len(hidden), _size(CHUNK, hidden)):
        logps = _logits(hidden[part], head, bias, transform).float().log_softmax(-1)  # [n, V]
        top = logps.topk(k, dim=-1)
        parts.append((logps.gather(-1, batch.targets[part, None]).squeeze(-1), top.indices, top.values))
    logps, ids, values = (torch.cat(column) for column in zip(*parts, strict=True))
    return logps, ids, values


def _weight(model: PreTrainedModel) -> Tensor:
    weight: Tensor = model.get_output_embeddings().weight
    return weight


def _bias(model: PreTrainedModel) -> Tensor | None:
    return getattr(model.get_output_embeddings(), "bias", None)


def _transform(model: PreTrainedModel) -> Transform | None:
    """None for that which changes nothing."""
    transform = head_of(model).transform
    return None if transform == Transform() else transform
