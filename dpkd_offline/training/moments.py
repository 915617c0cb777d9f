"""AdamW whose moments take two bytes a parameter, or one, in place of four.

Matrices alone: of vectors, which are few, the moments stay float32. All arithmetic is in float32; what is stored is
rounded up or down by chance, so that its mean is what it would be: exp_avg_sq changes by a thousandth in a step, which
rounding to the nearest would lose each time. The chance is a function of seed and step: a run that goes on takes the
same steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional

BETAS, EPS = (0.9, 0.999), 1e-8  # those of torch.optim.AdamW
MOMENTS = ("exp_avg", "exp_avg_sq")
BLOCK = 256  # numbers of a row with a scale of their own
PART = 1 << 22  # numbers that exist in float32 at once
# Of numbers with and without a sign: codes besides that of zero, and how many times the largest is halved until the
# smallest. Neighbours are 9 % apart.
SIGNED, UNSIGNED = (127, 16), (255, 32)


class RoundedAdamW(torch.optim.Optimizer):
    """AdamW with moments in bfloat16 or in 8 bits.

    Args:
        groups: as torch.optim.AdamW takes them.
        moments: their dtype, torch.bfloat16 or torch.int8.
        seed: of the rounding.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, moments: torch.dtype, seed: int) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})
        self._moments, self._seed = moments, seed

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        generators: dict[torch.device, torch.Generator] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state |= {"step": torch.tensor(0.0), **empty_moments(parameter, self._moments)}
                state["step"] += 1
                steps, device = int(state["step"]), _local(parameter).device
                if device not in generators:
                    generators[device] = torch.Generator(device).manual_seed((self._seed << 32) + steps)
                tensors = {name: _local(value) for name, value in state.items() if name != "step"}
                _update(_local(parameter), _local(parameter.grad), tensors, steps, group, generators[device])


def empty_moments(parameter: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The moments of a parameter before the first step, laid out over processes as it is; of 8 bits with scales."""
    if parameter.ndim < 2 or dtype == torch.float32:
        return {name: torch.zeros_like(parameter) for name in MOMENTS}
    if dtype == torch.bfloat16:
        return {name: torch.zeros_like(parameter, dtype=dtype) for name in MOMENTS}
    moments = {name: torch.zeros_like(parameter, dtype=torch.uint8) for name in MOMENTS}
    return moments | {f"{name}_scale": _scales_of(parameter) for name in MOMENTS}


def moment_bytes(parameter: Tensor, dtype: torch.dtype) -> int:
    """How much memory of this process those take."""
    own = _local(parameter)
    with torch.device("meta"):
        moments = empty_moments(torch.empty(own.shape, dtype=own.dtype), dtype)
    return sum(moment.nbytes for moment in moments.values())


def _scales_of(parameter: Tensor) -> Tensor:
    """Zeros, one for each block of each row."""
    blocks = -(-parameter.shape[-1] // BLOCK)
    local = _local(parameter).new_zeros(*_local(parameter).shape[:-1], blocks)
    if not isinstance(parameter, DTensor):
        return local
    shape = torch.Size([*parameter.shape[:-1], blocks])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, parameter.device_mesh, parameter.placements, shape=shape, stride=stride)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _update(
    parameter: Tensor,
    grad: Tensor,
    state: dict[str, Tensor],
    steps: int,
    group: dict[str, Any],
    generator: torch.Generator,
) -> None:
    """One step of AdamW on a parameter, in place, some rows at a time."""
    correction, correction_sq = (1 - beta**steps for beta in BETAS)
    for p, g, *stored in _parts([parameter, grad, *state.values()]):
        moments = dict(zip(state, stored, strict=True))
        mean, square = (decoded(moments, name) for name in MOMENTS)
        mean.lerp_(g, 1 - BETAS[0])
        square.mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
        for name, value in zip(MOMENTS, (mean, square), strict=True):
            _encode(value, moments, name, generator)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.addcdiv_(mean, (square / correction_sq).sqrt_().add_(EPS), value=-group["lr"] / correction)


def _parts(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """The same rows of each, as matrices, so few at a time that their copies are small."""
    if tensors[0].ndim < 2 or not tensors[0].numel():
        yield tensors
        return
    matrices = [tensor.view(-1, tensor.shape[-1]) for tensor in tensors]
    rows = max(PART // matrices[0].shape[1], 1)
    for start in range(0, len(matrices[0]), rows):
        yield [matrix[start : start + rows] for matrix in matrices]


def decoded(moments: dict[str, Tensor], name: str) -> Tensor:
    """A moment in float32: the stored one where that is what it is."""
    stored, scale = moments[name], moments.get(f"{name}_scale")
    if scale is None:
        return stored.float()
    if name == "exp_avg_sq":
        return _by_block(values_of(stored, *UNSIGNED), scale)
    magnitude = values_of(stored & 127, *SIGNED)
    return _by_block(torch.where(stored > 127, -magnitude, magnitude), scale)


def _encode(value: Tensor, moments: dict[str, Tensor], name: str, generator: torch.Generator) -> None:
    """Store a moment, rounded."""
    stored, scale = moments[name], moments.get(f"{name}_scale")
    if scale is None and stored.dtype == torch.bfloat16:
        noise = torch.randint(1 << 16, value.shape, dtype=torch.int32, device=value.device, generator=generator)
        stored.copy_(noise.add_(value.view(torch.int32)).bitwise_and_(-(1 << 16)).view(torch.float32))
    elif scale is not None:
        padding = scale.shape[-1] * BLOCK - value.shape[-1]
        scale.copy_(functional.pad(value.abs(), (0, padding)).unflatten(-1, (-1, BLOCK)).amax(-1))
        share = _by_block(value.abs(), scale.reciprocal().nan_to_num_(posinf=0.0))
        if name == "exp_avg_sq":  # never zero where a gradient was: it is divided by
            codes = codes_of(share, *UNSIGNED, generator).clamp_(min=1)
            stored.copy_(torch.where(share > 0, codes, 0))
        else:
            stored.copy_(codes_of(share, *SIGNED, generator) + torch.where(value < 0, 128, 0))


def _by_block(values: Tensor, factors: Tensor) -> Tensor:
    """Each number [R, C] times the factor of its block [R, C / BLOCK]."""
    return values * factors.repeat_interleave(BLOCK, -1)[:, : values.shape[-1]]


def values_of(codes: Tensor, levels: int, halvings: int) -> Tensor:
    """What codes stand for, as a share of the largest: evenly apart in their logarithm, but for the code of zero."""
    codes = codes.float()
    return torch.where(codes > 0, torch.exp2((codes / levels - 1) * halvings), 0.0)


def codes_of(shares: Tensor, levels: int, halvings: int, generator: torch.Generator) -> Tensor:
    """Codes of numbers from 0 to 1: the one below or above, by chance, so that the mean of their values is right."""
    below = ((torch.log2(shares) / halvings + 1) * levels).floor_().clamp_(0, levels - 1)
    low, high = (values_of(codes, levels, halvings) for codes in (below, below + 1))
    chance = torch.rand(shares.shape, device=shares.device, generator=generator)
    return below + (chance * (high - low) < shares - low)
