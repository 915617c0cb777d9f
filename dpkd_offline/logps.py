"""Log-probs of response tokens under a model, without ever holding the logits of all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from dpkd_offline.batch import Batch, PromptAndResponse, response_batch
from dpkd_offline.errors import UnavailableError

CHUNK = 1024  # tokens whose logits exist at once


def _chunk_logps(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    logits = (hidden @ head.T).float()  # [n, V]: the product in the model's precision, the reduction in float32
    return logits.gather(-1, targets[:, None]).squeeze(-1) - logits.logsumexp(-1)


def token_logps(model: PreTrainedModel, batch: Batch) -> Tensor:
    """log q(y_n | x, y_<n) in nats for the N response tokens of a batch: [N], float32, with a gradient.

    The output head runs on response positions only, a chunk at a time; the backward pass makes each chunk's logits
    again instead of keeping them.
    """
    output = model.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    hidden = output.last_hidden_state[batch.rows, batch.columns]  # [N, H]
    head = model.get_output_embeddings().weight  # [V, H]
    chunks = []
    for start in range(0, len(hidden), CHUNK):
        part = slice(start, start + CHUNK)
        chunks.append(checkpoint(_chunk_logps, hidden[part], head, batch.targets[part], use_reentrant=False))
    return torch.cat(chunks)


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
    if getattr(head, "bias", None) is not None or not torch.allclose(found, expected, rtol=0.05, atol=0.05):
        raise UnavailableError(
            f"{model.config.model_type}: its logits are not a plain product of its last hidden state"
        )
