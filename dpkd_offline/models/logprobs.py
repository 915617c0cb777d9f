"""Log-probs of response tokens under a model, without ever holding the logits of all of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpkd_offline.common import console
from dpkd_offline.common.errors import UnavailableError
from dpkd_offline.models.batch import Batch, response_batch, shared_prompt_batch
from dpkd_offline.models.shared_prompt import FLEX, SHARED_PROMPT, flex_mask

CUDA = torch.cuda.is_available()
TOKENS, WIDTH = (8192, 8192) if CUDA else (2048, 4096)  # so many tokens' logits for so many ids exist at once
CHUNK = 2048 if CUDA else 128  # tokens whose logits of the whole vocabulary exist at once, for the likeliest tokens


class ChunkedLogps(torch.autograd.Function):
    """log softmax(hidden @ head.T)[n, ids[n, k]], a block of tokens and vocabulary at a time, forward and backward.

    The backward pass makes each block's logits again, and adds the gradient of the head to its `main_grad` where it has
    one, so that it need not exist twice. Products are in the model's precision, reductions in float32
    (float64 for a float64 model). Legend: N tokens, K ids asked for, H hidden size, V vocabulary.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, ids: Tensor) -> Tensor:
        precise = torch.promote_types(hidden.dtype, torch.float32)
        logps = hidden.new_empty(ids.shape, dtype=precise)  # [N, K]
        normaliser = hidden.new_empty(len(hidden), dtype=precise)  # [N], log-sum-exp
        for tokens in _blocks(len(hidden), TOKENS):
            largest = torch.full_like(normaliser[tokens], -torch.inf)
            total = torch.zeros_like(largest)  # of exp(logit - largest) so far
            for words in _blocks(len(head), WIDTH):
                logits = (hidden[tokens] @ head[words].T).to(precise)
                inside, local = _local(ids[tokens], words)
                logps[tokens] = torch.where(inside, logits.gather(-1, local), logps[tokens])
                new = torch.maximum(largest, logits.amax(-1))
                total.mul_(largest.sub_(new).exp_()).add_(logits.sub_(new[:, None]).exp_().sum(-1))
                largest = new
            normaliser[tokens] = total.log_().add_(largest)
        ctx.save_for_backward(hidden, head, ids, normaliser)
        ctx.main_grad = getattr(head, "main_grad", None) if ctx.needs_input_grad[1] else None
        return logps.sub_(normaliser[:, None])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        hidden, head, ids, normaliser = ctx.saved_tensors
        grad = grads[0]  # [N, K]
        grad_hidden = torch.zeros_like(hidden, dtype=normaliser.dtype)
        # Several blocks of tokens add up in float32; one alone is complete at once.
        kept = head.dtype if len(hidden) <= TOKENS else normaliser.dtype
        grad_head: Tensor | None = ctx.main_grad
        if grad_head is None and ctx.needs_input_grad[1]:
            grad_head = torch.zeros_like(head, dtype=kept)
        for tokens in _blocks(len(hidden), TOKENS):
            for words in _blocks(len(head), WIDTH):
                # d logp / d logits = onehot(id) - softmax
                logits = (hidden[tokens] @ head[words].T).to(normaliser.dtype)
                error = logits.sub_(normaliser[tokens, None]).exp_().mul_(-grad[tokens].sum(-1, keepdim=True))
                inside, local = _local(ids[tokens], words)
                error = error.scatter_add_(-1, local, grad[tokens] * inside).to(hidden.dtype)
                grad_hidden[tokens] += error @ head[words]
                if grad_head is not None:
                    grad_head[words] += error.T @ hidden[tokens]
        returned = None if grad_head is None or ctx.main_grad is not None else grad_head.to(head.dtype)
        return grad_hidden.to(hidden.dtype), returned, None


def _blocks(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _local(ids: Tensor, words: slice) -> tuple[Tensor, Tensor]:
    """Which ids a block of the vocabulary holds, and where in it (anywhere, for those that it does not)."""
    inside = (ids >= words.start) & (ids < words.stop)
    return inside, (ids - words.start).clamp_(0, words.stop - words.start - 1)


def response_hidden(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The last hidden states that predict the N response tokens of a batch: [N, H]."""
    layout = {name: getattr(batch, name) for name in ("attention_mask", "position_ids", "segments")}
    if model.config._attn_implementation == FLEX and (segments := layout.pop("segments")) is not None:
        layout["attention_mask"] = flex_mask(segments, batch.input_ids.shape[1], model.device)
    output = model.base_model(
        input_ids=batch.input_ids, use_cache=False, **{k: v for k, v in layout.items() if v is not None}
    )
    hidden: Tensor = output.last_hidden_state.flatten(0, 1)[batch.places]
    return hidden


def token_logps(model: PreTrainedModel, batch: Batch) -> Tensor:
    """log q(y_n | x, y_<n) in nats for the N response tokens of a batch: [N], float32, with a gradient.

    The output head runs on response positions only, and the logits of all of them never exist at once.
    """
    return logps_of(model, response_hidden(model, batch), batch.targets[:, None])[:, 0]


def logps_of(model: PreTrainedModel, hidden: Tensor, ids: Tensor) -> Tensor:
    """Log-probs in nats of ids [N, K] after the hidden states [N, H]: [N, K], float32, with a gradient."""
    logps: Tensor = ChunkedLogps.apply(hidden, model.get_output_embeddings().weight, ids)  # type: ignore[no-untyped-call]
    return logps


@torch.no_grad()
def likeliest(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """The likeliest id after each of the hidden states [N, H]: [N]."""
    head = model.get_output_embeddings().weight
    return torch.cat([(hidden[part] @ head.T).argmax(-1) for part in _blocks(len(hidden), CHUNK)])


def response_logps(model: PreTrainedModel, batch: Batch) -> list[list[float]]:
    """Log-probs in nats of the responses of a batch, a list per response and a number per token."""
    batch = batch.to(model.device)
    return [part.tolist() for part in token_logps(model, batch).split(batch.lengths.tolist())]


def top_logps(model: PreTrainedModel, batch: Batch, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs [N] of the response tokens as in `token_logps`, and the ids and log-probs [N, k] of the likeliest."""
    batch = batch.to(model.device)
    hidden, head = response_hidden(model, batch), model.get_output_embeddings().weight
    parts = []
    for start in range(0, len(hidden), CHUNK):
        part = slice(start, start + CHUNK)
        logps = (hidden[part] @ head.T).float().log_softmax(-1)  # [n, V]
        top = logps.topk(k, dim=-1)
        parts.append((logps.gather(-1, batch.targets[part, None]).squeeze(-1), top.indices, top.values))
    logps, ids, values = (torch.cat(column) for column in zip(*parts, strict=True))
    return logps, ids, values


def can_share_prompts(model: PreTrainedModel) -> bool:
    """Whether a model gives the same log-probs where a prompt stands once before all its responses.

    Asked of the model itself, on a few tokens: whether an architecture's attention is exchangeable is not known ahead.
    The model is left with the attention that serves: ours on a CPU, and on a GPU, where its many small calls would cost
    more than they save, FlexAttention.
    """
    own, on_cpu = model.config._attn_implementation, model.device.type == "cpu"
    if not on_cpu and getattr(model.config.get_text_config(), "sliding_window", None):
        return False  # some layers would need another mask
    device, items = model.device, [([5, 6, 7], [[8, 9, 10], [11, 12]]), ([13], [[14], [15, 16, 17, 18]])]
    # An attention that cannot be exchanged, or on a GPU one that cannot be compiled.
    failures = (ValueError, TypeError, NotImplementedError if on_cpu else RuntimeError)
    with torch.no_grad():
        padded = token_logps(model, response_batch([(prompt, y) for prompt, both in items for y in both]).to(device))
        try:
            model.set_attn_implementation(SHARED_PROMPT if on_cpu else FLEX)
            shared = token_logps(model, shared_prompt_batch(items).to(device))
        except failures as error:
            console.info(f"{model.config.model_type}: {str(error).partition('. ')[0]}")
            shared = torch.full_like(padded, torch.nan)
    same = torch.allclose(shared, padded, rtol=0.05, atol=0.05 if model.dtype == torch.float32 else 0.5)
    if not same:
        model.set_attn_implementation(own)
    return same


def check_head(model: PreTrainedModel) -> None:
    """Raise UnavailableError for a model whose logits are not its output embedding times its last hidden state.

    Some architectures scale or cap their logits; their log-probs would be silently wrong here.
    """
    head = model.get_output_embeddings()
    ids = torch.arange(1, 9, device=model.device)[None] % model.config.get_text_config().vocab_size
    with torch.inference_mode():
        expected = model(input_ids=ids).logits.float()
        hidden = model.base_model(input_ids=ids).last_hidden_state
        product = (hidden @ head.weight.T).float()
    if getattr(head, "bias", None) is not None or not torch.allclose(
        product, expected, rtol=0.05, atol=0.05, equal_nan=True
    ):
        raise UnavailableError(
            f"{model.config.model_type}: its logits are not a plain product of its last hidden state"
        )
