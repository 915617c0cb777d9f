"""LoRA: small adapters that are trained in place of the model. PEFT makes them, merges them and writes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dpkd_offline.common.errors import UnavailableError, UsageError
from dpkd_offline.config.train import TrainConfig
from dpkd_offline.models.info import ModelInfo

if TYPE_CHECKING:
    from peft import PeftModel


def adapt(model: PreTrainedModel, config: TrainConfig) -> PeftModel:
    """Put adapters into a model, which add nothing yet; they alone require gradients then.

    Raises:
        UnavailableError: PEFT is not installed.
        UsageError: there is no such layer, or it is one that is shared with the head.
    """
    try:
        from peft import LoraConfig, get_peft_model
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError as error:
        raise UnavailableError("--lora-rank: PEFT is not installed; pip install 'dpkd-offline[lora]'") from error
    targets = config.lora_targets
    settings = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]
        target_modules=targets if targets == "all-linear" else [name.strip() for name in targets.split(",")],
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        try:
            adapted = get_peft_model(model, settings)
        except ValueError as error:
            raise UsageError(f"--lora-targets {targets}: {error}") from error
    if any(isinstance(e, BaseTunerLayer) for e in (model.get_input_embeddings(), model.get_output_embeddings())):
        raise UsageError(f"--lora-targets {targets}: embeddings and head take no adapters here")
    settings.base_model_name_or_path = ModelInfo(config.student).public_name  # and not where it lies
    return adapted.eval()


def round_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Give what is not trained the precision of products: no optimizer needs it in float32."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def merged(weights: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights of a model with its adapters merged into them: W + scale · B A.

    Args:
        weights: those of `model`, by its own names.
        model: one that has adapters; it is left as it is.
    """
    from peft.tuners.lora import LoraLayer

    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    plain = {name.replace(".base_layer", ""): w for name, w in weights.items() if ".lora_" not in name}
    for name, layer in layers.items():
        a, b = (weights[f"{name}.lora_{which}.default.weight"].float() for which in "AB")
        added = b @ a * layer.scaling["default"]
        transposed = isinstance(layer.get_base_layer(), Conv1D)
        base = plain[f"{name}.weight"]
        plain[f"{name}.weight"] = (base.float() + (added.T if transposed else added)).to(base.dtype)
    return plain
