"""Log-probs of response tokens under a model, without ever holding the logits of all of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpkd_offline.models.batch import Batch
from dpkd_offline.models.head import Transform, head_of
from dpkd_offline.models.shared_prompt import HALF

TOKENS, WIDTH = 2048, 4096  # so many tokens' logits for so many ids exist at once
CHUNK = 128  # tokens whose logits of the whole vocabulary exist at once, for the likeliest tokens
ROWS = 64  # tokens whose exponentials a CPU makes at once: they stay in its cache
KEPT = 2**26  # bytes of logits that a CPU keeps for the backward pass, if these are all, instead of making them again
ON_GPU = {TOKENS: 8192, WIDTH: 8192, CHUNK: 1024}  # instead


class ChunkedLogps(torch.autograd.Function):
    """log softmax(transform(hidden @ head.T + bias))[n, ids[n, k]], a block of tokens and vocabulary at a time.

    The backward pass makes each block's logits again, unless a CPU has kept them, and adds the gradient of the head to
    its `main_grad` where it has one, so that it need not exist twice. Products are in the model's precision,
    reductions in float32 (float64 for a float64 model). Legend: N tokens, K ids asked for, H hidden size, V vocabulary.
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
        plain = _plain(hidden, bias, transform)
        keeps = plain and any(ctx.needs_input_grad) and len(hidden) * len(head) * hidden.element_size() <= KEPT
        kept: list[Tensor] = []
        for tokens in _blocks(len(hidden), _size(TOKENS, hidden)):
            largest = torch.full_like(normaliser[tokens], -torch.inf)
            total = torch.zeros_like(largest)  # of exp(logit - largest) so far
            for words in _blocks(len(head), _size(WIDTH, hidden)):
                if plain:
                    logits = hidden[tokens] @ head[words].T
                else:
                    logits = _logits(hidden[tokens], head, bias, transform, words)
                if keeps:
                    kept.append(logits)
                inside, local = _local(ids[tokens], words)
                logps[tokens] = torch.where(inside, logits.gather(-1, local), logps[tokens])
                new = torch.maximum(largest, logits.amax(-1))
                total.mul_(largest.sub_(new).exp_()).add_(_sum_of_exp(logits, new))
                largest = new
            normaliser[tokens] = total.log_().add_(largest)
        ctx.save_for_backward(hidden, head, ids, bias, normaliser, *kept)
        ctx.transform = transform
        ctx.main_grad = getattr(head, "main_grad", None) if ctx.needs_input_grad[1] else None
        return logps.sub_(normaliser[:, None])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head, ids, bias, normaliser, *blocks = ctx.saved_tensors
        kept_logits = iter(blocks)
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
                inside, local = _local(ids[tokens], words)
                if _plain(hidden, bias, ctx.transform):
                    logits = next(kept_logits) if blocks else hidden[tokens] @ head[words].T
                    error = _error_by_rows(logits, normaliser[tokens], grad[tokens], inside, local)
                    grad_hidden[tokens] += error @ head[words]
                    if grad_head is not None:
                        grad_head[words] += error.T @ hidden[tokens]
                    continue
                logits = _logits(hidden[tokens], head, bias, ctx.transform, words)
                slope = None if ctx.transform is None else ctx.transform.slope(logits)
                error = logits.sub_(normaliser[tokens, None]).exp_().mul_(-grad[tokens].sum(-1, keepdim=True))
                error = error.scatter_add_(-1, local, grad[tokens] * inside)
                if slope is not None:
                    error *= slope
                if grad_bias is not None:
                    grad_bias[words] += error.sum(0)
                error = error.to(hidden.dtype)
                grad_hidden[tokens] += error @ head[words]
                if grad_head is not None:
                    grad_head[words] += error.T @ hidden[tokens]
        # Autograd rounds each to the dtype of what it is the gradient of.
        return grad_hidden, None if ctx.main_grad is not None else grad_head, None, grad_bias, None


class KeptLogps(torch.autograd.Function):
    """What `ChunkedLogps` computes, on a GPU in half precision, where a head is a product and no more.

    A GPU makes logits in less time than it passes over them. So they are made once, in float32, some tokens' at a time,
    and their probabilities kept in half precision for the backward pass: 2 bytes for each token and id of the
    vocabulary. Those of the ids that are asked for come from the float32 log-probs instead.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, ids: Tensor, keeps: bool = True) -> Tensor:
        precise = torch.promote_types(hidden.dtype, torch.float32)
        logps = hidden.new_empty(ids.shape, dtype=precise)  # [N, K]
        kept = hidden.new_empty(len(hidden) if keeps else 0, len(head))  # [N, V] probabilities
        for tokens in _blocks(len(hidden), _size(CHUNK, hidden)):
            of_all = _products(hidden[tokens], head.T).log_softmax(-1)
            torch.gather(of_all, -1, ids[tokens], out=logps[tokens])
            if keeps:
                torch.exp(of_all, out=kept[tokens])
        ctx.save_for_backward(hidden, head, ids, logps)
        ctx.kept, ctx.main_grad = kept, getattr(head, "main_grad", None) if ctx.needs_input_grad[1] else None
        return logps

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head, ids, logps = ctx.saved_tensors
        error, grad = ctx.kept, grads[0]  # [N, V], [N, K]
        del ctx.kept  # it is overwritten
        # d logp / d logits = onehot(id) - softmax; of an id that is asked for several times all at once
        total = grad.sum(-1, keepdim=True)
        same = ids[:, :, None] == ids[:, None, :]
        exact = (same * grad[:, None, :]).sum(-1) - total - total * logps.expm1()
        error.mul_(-total).scatter_(-1, ids, exact.to(error.dtype))
        grad_head: Tensor | None = None
        if ctx.main_grad is not None:
            _add_product(ctx.main_grad, error.T, hidden)
        elif ctx.needs_input_grad[1]:
            grad_head = error.T @ hidden
        return error @ head, grad_head, None, None


def _products(hidden: Tensor, head: Tensor) -> Tensor:
    """hidden @ head, in float32 at least: a GPU need not round what it has added up."""
    if hidden.is_cuda and hidden.dtype in HALF:
        return torch.mm(hidden, head, out_dtype=torch.float32)
    return (hidden @ head).to(torch.promote_types(hidden.dtype, torch.float32))


def _add_product(total: Tensor, one: Tensor, other: Tensor) -> None:
    """Add one @ other to a total in float32."""
    if one.is_cuda and one.dtype in HALF:
        torch.addmm(total, one, other, out_dtype=total.dtype, out=total)
    else:
        total += one @ other


def _plain(hidden: Tensor, bias: Tensor | None, transform: Transform | None) -> bool:
    """Whether logits are the products alone, and on a CPU, which is spared a copy of them in float32."""
    return hidden.device.type == "cpu" and bias is None and transform is None


def _sum_of_exp(logits: Tensor, shift: Tensor) -> Tensor:
    """The sums [N] of exp(logits [N, W] - shift [N]), in the precision of the shift. May overwrite logits on a GPU."""
    if logits.is_cuda:
        return logits.sub_(shift[:, None]).exp_().sum(-1)
    return torch.cat([(logits[n] - shift[n, None]).exp_().sum(-1) for n in _blocks(len(logits), ROWS)])


def _error_by_rows(logits: Tensor, normaliser: Tensor, grad: Tensor, inside: Tensor, local: Tensor) -> Tensor:
    """The gradient by logits [N, W] from that by log-probs [N, K], in the precision of the logits."""
    error = torch.empty_like(logits)
    for n in _blocks(len(logits), ROWS):
        part = (logits[n] - normaliser[n, None]).exp_().mul_(-grad[n].sum(-1, keepdim=True))
        error[n] = part.scatter_add_(-1, local[n], grad[n] * inside[n])
    return error


def _size(size: int, where: Tensor) -> int:
    return ON_GPU.get(size, size) if where.is_cuda else size


def _logits(
    hidden: Tensor, head: Tensor, bias: Tensor | None, transform: Transform | None, words: slice = slice(None)
) -> Tensor:
    """Logits of a block of the vocabulary, in float32 at least."""
    logits = _products(hidden, head[words].T)
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
    head, bias, transform = _weight(model), _bias(model), _transform(model)
    if hidden.is_cuda and hidden.dtype in HALF and bias is None and transform is None:
        kept: Tensor = KeptLogps.apply(hidden, head, ids, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
        return kept
    logps: Tensor = ChunkedLogps.apply(hidden, head, ids, bias, transform)  # type: ignore[no-untyped-call]
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
