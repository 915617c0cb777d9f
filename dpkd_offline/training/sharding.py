"""A student in parts, by FSDP: made without weights in all processes, and filled by the first, which alone loads it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from dpkd_offline.common.errors import UnavailableError
from dpkd_offline.models.folder import library_errors
from dpkd_offline.models.trial import ROOM_FOR_TRIALS, RowLayout, row_layout
from dpkd_offline.training import lora
from dpkd_offline.training.distributed import Processes
from dpkd_offline.training.shallower import layers_kept

TRIAL_BYTES = 12  # a parameter: float32, and in half precision a copy and two gradients

Place = tuple[nn.Module, str]  # a module, and the name by which it holds a tensor


def layout_on(model: PreTrainedModel, device: torch.device, longest: int | None, train_dtype: torch.dtype) -> RowLayout:
    """`row_layout` of a model, tried on the device where parts of it will be called; it lies afterwards where it lay.

    Where all of it does not fit there, its structure is tried where it lies, and the kernels of the device on a model
    of the same config with a layer of each kind and random weights.
    """
    home = model.device
    if home.type == device.type:
        return row_layout(model, longest, train_dtype)
    size = sum(parameter.numel() for parameter in model.parameters())
    if TRIAL_BYTES * size < ROOM_FOR_TRIALS * torch.cuda.mem_get_info(device)[0]:
        model.to(device)  # type: ignore[arg-type]
        layout = row_layout(model, longest, train_dtype)
        model.to(home)  # type: ignore[arg-type]
    else:
        layout = row_layout(model, longest, train_dtype)
        if layout == "shared":
            layout = row_layout(few_layers(model).to(device), longest, train_dtype)  # type: ignore[arg-type]
    torch.cuda.empty_cache()
    return layout


def few_layers(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same config with the first layer of each kind, and random weights."""
    config = model.config.get_text_config()
    kinds = list(getattr(config, "layer_types", None) or range(min(2, config.num_hidden_layers)))
    kept = sorted(kinds.index(kind) for kind in set(kinds))
    with library_errors(f"{config.model_type}: a model with few of its layers"), torch.random.fork_rng():
        small: PreTrainedModel = AutoModelForCausalLM.from_config(layers_kept(config, kept), dtype=model.dtype)
    small.eval()
    return small


def shard(
    root: nn.Module,
    layers: Sequence[nn.Module],
    whole: PreTrainedModel | None,
    dtype: torch.dtype,
    processes: Processes,
) -> None:
    """Give each process its part of every parameter: a group of them per layer, and the rest with the root.

    A group is put together in `dtype` while it is in use; gradients are added up in float32. Whether a layer is taken
    apart again between forward and backward, and whether parts lie on the CPU meanwhile, is Accelerate's to say.

    Args:
        root: its child `model` has no weights yet.
        whole: that model with its weights, in the first process; it has none afterwards.

    Raises:
        UnavailableError: the two hold other tensors.
    """
    model: nn.Module = root.model  # type: ignore[assignment]
    outline = processes.from_first("outline", _outline(whole) if whole is not None else None)
    _tie(model, outline)
    lora.round_frozen(root, dtype)
    offload = parse_flag_from_env("FSDP_OFFLOAD_PARAMS")
    options: dict[str, Any] = {
        "mp_policy": MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False),
        "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy(),
        "mesh": init_device_mesh(processes.device.type, (processes.count,)),
    }
    again = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() not in ("false", "shard_grad_op")
    for layer in layers:
        fully_shard(layer, reshard_after_forward=again, **options)
    fully_shard(root, **options)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # sums, not means
            module.set_force_sum_reduction_for_comms(True)
    root.to_empty(device=torch.device("cpu") if offload else processes.device)
    _tie(model, outline)
    _fill(model, whole, outline, processes)


# Of each tensor by its name: that of the first one that is the same, its shape, its dtype.
Outline = dict[str, tuple[str, list[int], str]]


def _places(model: nn.Module) -> Iterator[tuple[str, Place, Tensor]]:
    """Every tensor that a model holds: parameters, buffers, and those that are a plain attribute of a module."""
    for prefix, module in model.named_modules():
        for held in (module._parameters, module._buffers, vars(module)):
            for key, tensor in held.items():
                if isinstance(tensor, Tensor):
                    yield f"{prefix}.{key}", (module, key), tensor


def _outline(model: nn.Module) -> Outline:
    firsts: dict[Tensor, str] = {}
    outline = {}
    for name, _, tensor in _places(model):
        first = firsts.setdefault(tensor, name)
        outline[name] = (first, list(tensor.shape), str(tensor.dtype).removeprefix("torch."))
    return outline


def _tie(model: nn.Module, outline: Outline) -> None:
    """Make one tensor of those that are one in the outline, and no others: which are depends on the weights' file."""
    held = {name: (place, tensor) for name, place, tensor in _places(model)}
    for name in sorted(held.keys() ^ outline.keys()):
        kind = "alone without its weights" if name in held else "once it is loaded"
        raise UnavailableError(f"{type(model).__name__}: it has a tensor {name[:80]} {kind}; train it without FSDP")
    taken: dict[Tensor, str] = {}
    for name, ((module, key), tensor) in held.items():
        first, shape, _ = outline[name]
        if isinstance(tensor, nn.Parameter) and list(tensor.shape) != shape:
            raise UnavailableError(f"{type(model).__name__}: {name} has another shape once it is loaded, {shape}")
        if first != name:
            setattr(module, key, held[first][1])
        elif taken.setdefault(tensor, name) != name:
            setattr(module, key, nn.Parameter(torch.empty_like(tensor), tensor.requires_grad))


@torch.no_grad()
def _fill(model: nn.Module, whole: nn.Module | None, outline: Outline, processes: Processes) -> None:
    """Hand out the tensors of the first process, one after the other: to each its part of a parameter, else all."""
    source = {name: tensor for name, _, tensor in _places(whole)} if whole is not None else {}
    held = {name: (place, tensor) for name, place, tensor in _places(model)}
    filled: dict[str, Tensor] = {}
    for name, (first, shape, dtype) in outline.items():
        (module, key), tensor = held[name]
        if isinstance(tensor, DTensor):
            if first == name:
                _scatter(tensor, source.get(name), processes)
        elif first == name:
            filled[name] = _broadcast(source.get(name), shape, getattr(torch, dtype), processes)
            setattr(module, key, filled[name])
        else:
            setattr(module, key, filled[first])
        if first == name and name in source:
            given = source.pop(name)
            given.data = given.new_empty(0)  # what is handed out makes room for the parts


def _scatter(parameter: DTensor, full: Tensor | None, processes: Processes) -> None:
    rows = -(-parameter.shape[0] // processes.count)  # of each part but the last ones
    received = torch.empty((rows, *parameter.shape[1:]), dtype=parameter.dtype, device=processes.device)
    parts = None
    if full is not None:
        full = full.to(parameter.dtype).to(processes.device)
        parts = [_padded(full[i * rows : (i + 1) * rows], rows) for i in range(processes.count)]
    distributed.scatter(received, parts, src=0)
    local = parameter.to_local()
    local.copy_(received[: len(local)])


def _padded(part: Tensor, rows: int) -> Tensor:
    if len(part) == rows:
        return part.contiguous()
    return torch.cat([part, part.new_zeros((rows - len(part), *part.shape[1:]))])


def _broadcast(tensor: Tensor | None, shape: Sequence[int], dtype: torch.dtype, processes: Processes) -> Tensor:
    if tensor is None:
        tensor = torch.empty(list(shape), dtype=dtype)
    tensor = tensor.detach().to(processes.device).contiguous()
    if tensor.numel():
        distributed.broadcast(tensor.view(-1).view(torch.uint8), src=0)  # of any dtype
    return tensor
