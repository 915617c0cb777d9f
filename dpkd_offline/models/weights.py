"""Whether the weights of a model are what its config says: all there, of the right shapes, and numbers.

Libraries fill what is missing with random numbers, and say so in a log at most.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from dpkd_offline.common.errors import UnavailableError
from dpkd_offline.models.folder import library_errors
from dpkd_offline.models.info import ModelInfo

SHOWN = 3  # names of a message
PREFIXES = ("_orig_mod.", "module.", "model.module.", "base_model.model.")  # that wrappers leave in front of a name


def check_weights(model: ModelInfo) -> None:
    """Check the weights on disk, for an engine that loads them without saying what it did not find.

    Names and shapes by transformers' own rules, from the headers; then the numbers, a tensor at a time. Of quantised
    weights the names are those of their format, which the engine knows.

    Raises:
        UnavailableError: weights are missing, unknown, of other shapes, or not numbers; or a file is damaged.
    """
    if model.quantization is not None:
        return
    check_headers(model)
    with library_errors(f"model '{model.name}': cannot load it"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model.name,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=model.trust_remote_code,
        )
    refuse_faults(model.name, loaded[1])
    for path in sorted(model.folder.glob("*.safetensors")):
        with library_errors(f"model '{model.name}': {path.name}"), safe_open(path, framework="pt") as file:
            refuse_not_finite(model.name, ((name, file.get_tensor(name)) for name in file.keys()))


def check_headers(model: ModelInfo) -> None:
    """Refuse a .safetensors file that is not whole, naming it."""
    for path in sorted(model.folder.glob("*.safetensors")):
        with library_errors(f"model '{model.name}': {path.name}"), safe_open(path, framework="pt"):
            pass


def refuse_faults(name: str, report: Mapping[str, Any]) -> None:
    """Refuse what transformers reports of a load as missing, unexpected or mismatched.

    Tied weights, and those that the architecture declares it can do without, are not in its report.

    Args:
        name: the model's.
        report: what `from_pretrained` returns with `output_loading_info`.
    """
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    faults = []
    if missing:
        faults.append(f"missing {_some(missing)}")
    if unexpected:
        faults.append(f"not of this architecture {_some(unexpected)}")
    if shapes := sorted(report["mismatched_keys"]):
        stored, expected = (list(shape) for shape in shapes[0][1:])
        faults.append(
            f"of another shape {_some([key for key, *_ in shapes])}, stored as {stored}, by the config {expected}"
        )
    faults.extend(report["error_msgs"])
    if not faults:
        return
    prefix = next((p for p in PREFIXES if unexpected and all(key.startswith(p) for key in unexpected)), None)
    hint = f"; take the prefix '{prefix}' off the names in its file" if prefix else ""
    raise UnavailableError(f"model '{name}': its weights are not those of its config: {'; '.join(faults)}{hint}")


def refuse_not_finite(name: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse weights of which one is not a number or infinite, naming them.

    Args:
        name: the model's.
        tensors: the weights with their names.
    """
    wrong = [key for key, tensor in tensors if not _is_finite(tensor)]
    if wrong:
        raise UnavailableError(f"model '{name}': weights that are not finite numbers: {_some(wrong)}")


def _is_finite(tensor: Tensor) -> bool:
    """Read in one pass, without a second tensor of its size."""
    if not tensor.numel() or tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        return True
    return bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
