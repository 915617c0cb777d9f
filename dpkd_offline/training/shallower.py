"""A copy of a model with fewer of its layers, of which each is shown to compute what the model's own does."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from dpkd_offline.common.errors import UsageError
from dpkd_offline.models.folder import library_errors

COUNTS = ("first_k_dense_replace", "max_window_layers")  # of a config: how many of the first layers are of one kind
PROBE = 48  # tokens on which layers are compared


def evenly_spaced(teacher_layers: int, layers: int) -> list[int]:
    """Which layers stay: the first, the last, and the others at equal distances.

    Raises:
        UsageError: the student would not be shallower.
    """
    if not 0 < layers < teacher_layers:
        raise UsageError(f"layers: the teacher has {teacher_layers}, the student needs 1 to {teacher_layers - 1}")
    if layers == 1:
        return [0]
    return [round(i * (teacher_layers - 1) / (layers - 1)) for i in range(layers)]


def layers_kept(config: PreTrainedConfig, kept: Sequence[int]) -> PreTrainedConfig:
    """The config of a model that keeps the layers of these numbers: what it says of each layer is cut with them.

    That may be a list with an entry a layer, a list of layers' numbers, or how many of the first are of one kind.
    """
    values, total = config.to_dict(), config.num_hidden_layers
    for name, value in values.items():
        if name in COUNTS and isinstance(value, int) and value < total:
            values[name] = sum(number < value for number in kept)
        elif isinstance(value, list) and not name.endswith(("token_id", "token_ids")):
            if _are_numbers_of_layers(name, value, total):
                values[name] = [new for new, old in enumerate(kept) if old in value]
            elif len(value) == total:
                values[name] = [value[old] for old in kept]
    values[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(kept)
    return config.__class__.from_dict(values)


def _are_numbers_of_layers(name: str, value: list[Any], total: int) -> bool:
    """Whether a list of a config names layers, as [1, 3] of 4, and has no entry for each of them, as [1, 1, 1, 0]."""
    if not value or not any(part in name for part in ("layer", "idx", "indices")):
        return False
    rising = all(type(number) is int and 0 <= number < total for number in value) and value == sorted(set(value))
    return rising and (len(value) < total or value == list(range(total)))


def shallower(teacher: PreTrainedModel, layers: int) -> PreTrainedModel:
    """A copy of the teacher with evenly spaced layers of it, everything else whole. It shares the teacher's tensors.

    Raises:
        UnavailableError: a library refuses a model of this shape.
        UsageError: the teacher's layers are not known; or those of the copy would not be the teacher's.
    """
    kind = teacher.config.model_type
    place, stack = layer_stack(teacher)
    kept = evenly_spaced(len(stack), layers)
    with library_errors(f"init-student cannot cut a {kind}"):
        config = layers_kept(teacher.config, kept)
        student: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=teacher.dtype)
        student.to(teacher.device).eval()  # type: ignore[arg-type]
        pattern = re.compile(re.escape(place) + r"\.(\d+)\.")
        weights = {}
        for name, tensor in teacher.state_dict().items():
            layer = pattern.match(name)
            if layer is None:
                weights[name] = tensor
            elif int(layer[1]) in kept:
                weights[f"{place}.{kept.index(int(layer[1]))}.{name[layer.end() :]}"] = tensor
        _check_names(kind, weights, student)
        student.load_state_dict(weights, assign=True)  # in the teacher's own precision
        student.tie_weights()
        student.generation_config = teacher.generation_config
        _check_layers(teacher, student, kept)
    return student


def layer_stack(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The name and the modules of a model's stack of layers.

    Raises:
        UsageError: there is no list of modules with as many entries as the config says, or more than one.
    """
    config = model.config
    stacks = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == config.get_text_config().num_hidden_layers
    }
    outer = {name: module for name, module in stacks.items() if not any(name.startswith(f"{o}.") for o in stacks)}
    if config is not config.get_text_config() or len(outer) != 1:
        raise UsageError(f"init-student does not know the layers of a {config.model_type}; take another --teacher")
    return next(iter(outer.items()))


def _check_names(kind: str, weights: dict[str, Tensor], student: PreTrainedModel) -> None:
    expected = {name: tensor.shape for name, tensor in student.state_dict().items()}
    wrong = [name for name, shape in expected.items() if name not in weights or weights[name].shape != shape]
    if wrong := wrong or [name for name in weights if name not in expected]:
        raise UsageError(f"init-student cannot cut a {kind} to these layers: they would be of other kinds ({wrong[0]})")


@torch.no_grad()
def _check_layers(teacher: PreTrainedModel, student: PreTrainedModel, kept: Sequence[int]) -> None:
    """Refuse a student of which a layer computes something else than the teacher's layer that it is a copy of: another
    attention, another scale, another rule by which its number decides.

    Each layer of the teacher is called as the teacher calls it, but on what the student's layer has read.
    """
    kind, vocabulary = teacher.config.model_type, teacher.config.vocab_size
    ids = torch.arange(7, 7 + PROBE, device=teacher.device)[None] % vocabulary
    theirs, own = _layer_calls(teacher, ids), _layer_calls(student, ids)
    stack = layer_stack(teacher)[1]
    for new, old in enumerate(kept):
        hidden, _, expected = own[new]
        _, options, _ = theirs[old]
        output = _first(stack[old](hidden, *options[0], **options[1]))
        if not torch.allclose(output.float(), expected.float(), rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
            raise UsageError(
                f"init-student cannot cut a {kind} to these layers: layer {new} would not compute what layer {old} of "
                f"the teacher does"
            )
    for new, old in enumerate(kept):  # a window may be longer than the tokens of the comparison
        if _traits(stack[old]) != _traits(layer_stack(student)[1][new]):
            raise UsageError(f"init-student cannot cut a {kind} to these layers: layer {new} is not as layer {old} was")


def _layer_calls(model: PreTrainedModel, ids: Tensor) -> list[tuple[Tensor, tuple[Any, Any], Tensor]]:
    """Of each layer in a forward pass: the hidden states that it read, its other arguments, and the states after it."""
    calls: list[tuple[Tensor, tuple[Any, Any], Tensor]] = []

    def note(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
        hidden = args[0] if args else options.pop("hidden_states")
        calls.append((hidden, (args[1:], options), _first(output)))

    hooks = [layer.register_forward_hook(note, with_kwargs=True) for layer in layer_stack(model)[1]]
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _first(output: Any) -> Tensor:
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


def _traits(layer: nn.Module) -> list[tuple[Any, ...]]:
    """The modules of a layer with their plain settings, but for the layer's own number."""
    plain, number = (bool, int, float, str, type(None)), ("idx", "index", "layer_id", "layer_number")
    return [
        (name, type(module), {k: v for k, v in vars(module).items() if isinstance(v, plain) and not k.endswith(number)})
        for name, module in layer.named_modules()
    ]
