"""The student as it is trained: loaded, prepared, and called on a micro batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpkd_offline import log
from dpkd_offline.batch import Batch
from dpkd_offline.checkpoint import load_model
from dpkd_offline.config import TrainConfig
from dpkd_offline.logps import can_share_prompts, check_head, likeliest, logps_of, response_hidden


class Trainee(nn.Module):
    """A student that answers with log-probs; what wraps a model for several processes wraps this."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.shares = can_share_prompts(model)
        if not self.shares:
            log.info(f"{model.config.model_type}: each response goes with a prompt of its own")

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def vocab_size(self) -> int:
        return int(self.model.config.get_text_config().vocab_size)

    def forward(self, batch: Batch, ids: Tensor, best: bool = False) -> tuple[Tensor, Tensor | None]:
        """Log-probs [N, K] in nats of ids [N, K] at the response positions of a batch.

        With `best` also the student's likeliest ids [N], whose log-probs are the last column of [N, K + 1].
        """
        hidden = response_hidden(self.model, batch)
        found = likeliest(self.model, hidden) if best else None
        if found is not None:
            ids = torch.cat([ids, found[:, None]], dim=1)
        return logps_of(self.model, hidden, ids), found

    def generate(self, input_ids: Tensor, **options: Any) -> Tensor:
        """What transformers' `generate` returns; what wraps the model wraps this too."""
        tokens: Tensor = self.model.generate(input_ids, **options)  # type: ignore[operator]
        return tokens


def load_trainee(config: TrainConfig) -> Trainee:
    """The student in float32, ready for an optimiser that keeps it so.

    Raises:
        UnavailableError: it cannot be loaded, or does something to its logits that is not known here.
    """
    model = load_model(config.student, "float32", config.trust_remote_code)
    check_head(model)
    return Trainee(model)
