"""The optimiser: AdamW with float32 master weights, and the learning rate of each step."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpkd_offline.config import TrainConfig


class MasterAdamW:
    """AdamW on float32 master copies of a model's parameters, so that bfloat16 does not swallow small steps.

    The model's gradients of each micro batch are added up in float32 too.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype, config: TrainConfig) -> None:
        self._masters = {name: p.detach().clone() for name, p in model.named_parameters()}
        self._model = model.to(dtype)  # type: ignore[arg-type]
        self._parameters = dict(model.named_parameters())
        self._max_norm = config.max_grad_norm
        for master in self._masters.values():
            master.grad = torch.zeros_like(master)
        decayed = [m for m in self._masters.values() if m.ndim >= 2]
        others = [m for m in self._masters.values() if m.ndim < 2]
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self._adamw = torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)

    def accumulate(self) -> None:
        """Take over the model's gradients."""
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                grad = self._masters[name].grad
                assert grad is not None
                grad.add_(parameter.grad)
                parameter.grad = None

    def step(self, learning_rate: float) -> float:
        """Clip, update the masters, round them into the model. Returns the norm of the gradient before clipping."""
        norm = torch.nn.utils.clip_grad_norm_(self._masters.values(), self._max_norm)
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._adamw.step()
        self._publish()
        self._adamw.zero_grad(set_to_none=False)
        return float(norm)

    @torch.no_grad()
    def _publish(self) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(self._masters[name])

    def tensors(self) -> dict[str, Tensor]:
        """Masters, moments and step counts, by name."""
        out = {}
        for name, master in self._masters.items():
            out[f"master/{name}"] = master.detach()
            out.update({f"{key}/{name}": value for key, value in self._adamw.state[master].items()})
        return out

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        for name, master in self._masters.items():
            master.copy_(tensors[f"master/{name}"])
            self._adamw.state[master] = {
                key: tensors[f"{key}/{name}"].to(master.device) for key in ("step", "exp_avg", "exp_avg_sq")
            }
        self._publish()


def learning_rate_at(step: int, total: int, config: TrainConfig) -> float:
    """Linear warm-up, then half a cosine down to zero at the end of the last step (steps count from 0)."""
    warmup = math.ceil(config.warmup_ratio * total)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))
