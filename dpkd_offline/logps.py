"""Log-probs of response tokens under a model, without ever holding the logits of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpkd_offline.batch import Batch, PromptAndResponse, response_batch
from dpkd_offline.errors import UnavailableError

CHUNK = 512  # tokens whose logits exist at once


class ChunkedLogps(torch.autograd.Function):
    """log softmax(hidden @ head.T)[n, targets[n]], a chunk of tokens at a time, forward and backward.

    The backward pass makes each chunk's logits again. Products are in the model's precision, reductions in float32
    (float64 for a float64 model). Legend: N tokens, H hidden size, V vocabulary.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        precise = torch.promote_types(hidden.dtype, torch.float32)
        logps = hidden.new_empty(len(hidden), dtype=precise)  # [N]
        normaliser = torch.empty_like(logps)  # [N]
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, start + CHUNK)
            logits = (hidden[part] @ head.T).to(precise)  # [n, V]
            normaliser[part] = logits.logsumexp(-1)
            logps[part] = logits.gather(-1, targets[part, None]).squeeze(-1) - normaliser[part]
        ctx.save_for_backward(hidden, head, targets, normaliser)
        return logps

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, head, targets, normaliser = ctx.saved_tensors
        grad = grads[0]  # [N]
        grad_hidden = torch.empty_like(hidden)
        grad_head = torch.zeros_like(head, dtype=normaliser.dtype)  # chunks add up in float32
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, start + CHUNK)
            # d logp / d logits = onehot(target) - softmax
            logits = (hidden[part] @ head.T).to(normaliser.dtype)  # [n, V]
            error = logits.sub_(normaliser[part, None]).exp_().mul_(-grad[part, None])
            error.scatter_add_(-1, targets[part, None], grad[part, None])
            error = error.to(hidden.dtype)
            grad_hidden[part] = error @ head
            grad_head += error.T @ hidden[part]
        return grad_hidden, grad_head.to(head.dtype), None


def token_logps(model: PreTrainedModel, batch: Batch) -> Tensor:
    """log q(y_n | x, y_<n) in nats for the N response tokens of a batch: [N], float32, with a gradient.

    The output head runs on response positions only, and the logits of all of them never exist at once.
    """
    output = model.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    hidden = output.last_hidden_state[batch.rows, batch.columns]  # [N, H]
    logps: Tensor = ChunkedLogps.apply(hidden, model.get_output_embeddings().weight, batch.targets)  # type: ignore[no-untyped-call]
    return logps


def response_logps(model: PreTrainedModel, items: Sequence[PromptAndResponse]) -> list[list[float]]:
    """Log-probs in nats of each response, a list per (prompt ids, response ids) and a number per token."""
    batch = response_batch(items).to(model.device)
    logps = token_logps(model, batch).split(batch.lengths.tolist())
    return [part.tolist() for part in logps]


def check_head(model: PreTrainedModel) -> None:
    """Raise UnavailableError for a model whose logits are not its output embedding times its last hidden state.

    Some architectures scale or cap their logits; their log-probs would be silently wrong here.
    """
    head = model.get_output_embeddings()
    ids = torch.arange(1, 9, device=model.device)[None] % model.config.get_text_config().vocab_size
    with torch.inference_mode():
        expected = model(input_ids=ids).logits.float()
        hidden = model.base_model(input_ids=ids).last_hidden_state
        found = (hidden @ head.weight.T).float()
    if getattr(head, "bias", None) is not None or not torch.allclose(
        found, expected, rtol=0.05, atol=0.05, equal_nan=True
    ):
        raise UnavailableError(
            f"{model.config.model_type}: its logits are not a plain product of its last hidden state"
        )
