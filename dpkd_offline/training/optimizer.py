"""The optimizer: AdamW with float32 master weights, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dpkd_offline.config.train import TrainConfig
from dpkd_offline.training.checkpoint import StoredState
from dpkd_offline.training.distributed import GradientSums, Processes
from dpkd_offline.training.moments import RoundedAdamW, empty_moments, moment_bytes


class MasterAdamW:
    """AdamW on float32 masters of a model's parameters, so that bfloat16 does not swallow small steps.

    The masters are the parameters that the model comes with; it goes on with copies in `dtype`. Gradients are added up
    in the masters' own, which each parameter of the model has as its `main_grad`: by a hook as the backward pass makes
    them, so that those of the model never exist at once, or by an operator that knows it. The parameters of a sharded
    model are masters themselves: FSDP makes the copies and adds up the gradients, in float32 too.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, config: TrainConfig, processes: Processes) -> None:
        self._parameters: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._masters = self._parameters
        self._sharded = isinstance(model, FSDPModule)
        self._max_norm = config.max_grad_norm
        if not self._sharded:
            self._masters = {name: p.detach() for name, p in self._parameters.items()}
            for p in model.parameters():  # not its buffers: rotary frequencies stay float32
                p.data = p.data.to(dtype)
            self._sums, self._is_last = GradientSums(list(self._masters.values()), processes), False
            for place, (name, parameter) in enumerate(self._parameters.items()):
                self._masters[name].grad = parameter.main_grad = self._sums.gradients[place]  # type: ignore[attr-defined]
                parameter.register_post_accumulate_grad_hook(partial(self._take, place))
        self._adamw = adamw(self._masters, config)
        self._moments = getattr(torch, config.moments_dtype)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Backward through a loss of the step; with the `last`, sums over the processes begin as gradients are made."""
        self._is_last = last
        loss.backward()

    def _take(self, place: int, parameter: Tensor) -> None:
        _accumulate(parameter)
        if self._is_last:
            self._sums.made(place)

    def sum_gradients(self) -> None:
        """Have the sums over all processes. Of a sharded model they are sums already."""
        if not self._sharded:
            self._sums.finish()

    def discard_gradients(self) -> None:
        """Forget the sums since the last step, as of a trial."""
        self._adamw.zero_grad(set_to_none=self._sharded)

    def pending_bytes(self) -> int:
        """What the first step will add to the memory of this process: the moments."""
        fresh = (master for master in self._masters.values() if not self._adamw.state.get(master))
        return sum(moment_bytes(master, self._moments) for master in fresh)

    def gradients(self) -> list[Tensor]:
        """The sums since the last step, in an order that is the same in every process."""
        gradients = []
        for master in self._masters.values():
            if master.grad is None:  # of a sharded model, where nothing has reached it
                master.grad = torch.zeros_like(master)
            gradients.append(master.grad)
        return gradients

    def norm(self) -> Tensor:
        """The norm of the gradient, of sums over all processes."""
        norm = torch.nn.utils.get_total_norm(self.gradients())
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def step(self, learning_rate: float, norm: Tensor | None, value: float | None) -> float:
        """Clip, update the masters, round them into the model. Takes the norm of the gradient and its value."""
        assert norm is not None and value is not None
        if value > self._max_norm:  # a smaller one changes nothing
            torch.nn.utils.clip_grads_with_norm_(list(self._masters.values()), self._max_norm, norm)
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._adamw.step()
        self.discard_gradients()
        if not self._sharded:
            self._publish()
        return value

    @torch.no_grad()
    def _publish(self) -> None:
        torch._foreach_copy_(list(self._parameters.values()), list(self._masters.values()))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Masters, moments and step counts, with their names."""
        for name, master in self._masters.items():
            yield f"master/{name}", master.detach()
            for key, value in self._adamw.state[master].items():
                yield f"{key}/{name}", value

    @torch.no_grad()
    def restore(self, state: StoredState) -> None:
        """Go on from what `tensors` gave, put together from all processes; each reads its own parts."""
        for name, master in self._masters.items():
            master.copy_(state.part(f"master/{name}", master))
            fresh = empty_moments(master, self._moments)
            moments = {key: state.part(f"{key}/{name}", like) for key, like in fresh.items()}
            device = master.device if self._moments == torch.float32 else "cpu"  # where each keeps the count
            self._adamw.state[master] = {"step": state[f"step/{name}"].to(device), **moments}
        if not self._sharded:
            self._publish()


def adamw(masters: Mapping[str, Tensor], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW whose weight decay is on matrices alone, at a learning rate of zero until a step sets its own."""
    decayed = [m for m in masters.values() if m.ndim >= 2]
    others = [m for m in masters.values() if m.ndim < 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if config.moments_dtype != "float32":
        return RoundedAdamW(groups, 0.0, getattr(torch, config.moments_dtype), config.seed)
    return torch.optim.AdamW(groups, lr=0.0, fused=True)


def _accumulate(parameter: Tensor) -> None:
    """Add the gradient of this backward pass to the parameter's `main_grad`."""
    main_grad, grad = parameter.main_grad, parameter.grad  # type: ignore[attr-defined]
    if grad is not None:  # else an operator has added it there
        if grad.is_sparse:  # without looking for rows that come twice, for which a GPU is waited for
            main_grad.index_add_(0, grad._indices()[0], grad._values().to(main_grad.dtype))
        else:
            main_grad.add_(grad)
        parameter.grad = None


def learning_rate_at(step: int, total: int, config: TrainConfig) -> float:
    """Linear warm-up, then half a cosine down to zero at the end of the last step (steps count from 0)."""
    warmup = math.ceil(config.warmup_ratio * total)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / (total - warmup)))
