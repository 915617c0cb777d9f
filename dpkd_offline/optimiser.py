"""The optimiser: AdamW with float32 master weights, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from dpkd_offline.config import TrainConfig
from dpkd_offline.processes import like, whole


class MasterAdamW:
    """AdamW on float32 masters of a model's parameters, so that bfloat16 does not swallow small steps.

    The model's parameters go on in `dtype`. If that is bfloat16, they are the upper halves of their masters, and the
    lower ones are kept here; masters exist in a step alone. Gradients are added up in float32 as the backward pass
    makes them, so that those of the model never exist at once. The parameters of a sharded model are masters
    themselves: FSDP makes copies of them and adds up the gradients, in float32 too.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, config: TrainConfig) -> None:
        self._parameters: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._masters = self._parameters
        self._low: dict[str, Tensor] = {}
        self._sharded = isinstance(model, FSDPModule)
        self._max_norm = config.max_grad_norm
        if not self._sharded:
            self._masters = {name: p.detach() for name, p in self._parameters.items()}
            for master in self._masters.values():
                master.grad = torch.zeros_like(master)
            for parameter in model.parameters():  # not its buffers: rotary frequencies stay float32
                parameter.data = parameter.data.to(dtype)
            if dtype == torch.bfloat16:
                for name, master in self._masters.items():
                    self._split(name, master)
            for name, of_model in self._parameters.items():
                of_model.register_post_accumulate_grad_hook(self._take(name))
        self._has_gradient = dict.fromkeys(self._masters, self._sharded)
        decayed = [master for name, master in self._masters.items() if self._parameters[name].ndim >= 2]
        others = [master for name, master in self._masters.items() if self._parameters[name].ndim < 2]
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self._adamw = torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)

    def _take(self, name: str) -> Callable[[Tensor], None]:
        """Move the gradient of a parameter to its master."""

        def take(parameter: Tensor) -> None:
            sum_, grad = self._masters[name].grad, parameter.grad
            assert sum_ is not None and grad is not None
            if self._has_gradient[name]:
                sum_.add_(grad)
            else:
                sum_.copy_(grad)
                self._has_gradient[name] = True
            parameter.grad = None

        return take

    def gradients(self) -> list[Tensor]:
        """The sums since the last step, in an order that is the same in every process."""
        found = []
        for name, master in self._masters.items():
            if master.grad is None:
                master.grad = torch.zeros_like(master)
            elif not self._has_gradient[name]:
                master.grad.zero_()
            found.append(master.grad)
        return found

    def step(self, learning_rate: float) -> float:
        """Clip, update the masters, round them into the model. Returns the norm of the gradient before clipping."""
        gradients = self.gradients()
        norm = whole(torch.nn.utils.get_total_norm(gradients)).to(gradients[0].device)
        if norm > self._max_norm:
            torch.nn.utils.clip_grads_with_norm_(list(self._masters.values()), self._max_norm, norm)
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        for name in self._low:
            self._masters[name].data = self._joined(name)
        self._adamw.step()
        for name in self._low:
            self._split(name, self._masters[name])
        if self._sharded:
            self._adamw.zero_grad()  # to none
        else:
            self._has_gradient = dict.fromkeys(self._masters, False)
        return float(norm)

    @torch.no_grad()
    def _split(self, name: str, master: Tensor) -> None:
        """Round a master to its parameter (ties away from zero), and keep the difference of their bits."""
        bits = master.detach().view(torch.int32)
        high = bits.add(1 << 15).bitwise_right_shift_(16)
        self._parameters[name].copy_(high.to(torch.int16).view(torch.bfloat16))
        high.bitwise_left_shift_(16)
        self._low[name] = torch.sub(bits, high, out=high).to(torch.int16)
        master.data = master.new_empty(0)

    def _joined(self, name: str) -> Tensor:
        """What was split, bit for bit."""
        high = self._parameters[name].detach().view(torch.int16).to(torch.int32)
        return high.bitwise_left_shift_(16).add_(self._low[name]).view(torch.float32)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Masters, moments and step counts, with their names."""
        for name, master in self._masters.items():
            yield f"master/{name}", self._joined(name) if name in self._low else master.detach()
            for key, value in self._adamw.state[master].items():
                yield f"{key}/{name}", value

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        for name, master in self._masters.items():
            whole, first, second = (
                like(tensors[f"{key}/{name}"], master) for key in ("master", "exp_avg", "exp_avg_sq")
            )
            step = tensors[f"step/{name}"].to(master.device)
            self._adamw.state[master] = {"step": step, "exp_avg": first, "exp_avg_sq": second}
            if name in self._low:
                master.data = whole
                self._split(name, master)
            else:
                master.copy_(whole)


def learning_rate_at(step: int, total: int, config: TrainConfig) -> float:
    """Linear warm-up, then half a cosine down to zero at the end of the last step (steps count from 0)."""
    warmup = math.ceil(config.warmup_ratio * total)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))
