"""The shape of a model, from its small files: no weight is loaded, and nothing is fetched."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dpkd_offline.models.loading import parameter_count
from dpkd_offline.pipeline.memory import ModelShape
from dpkd_offline.training.shallower import evenly_spaced, layers_kept


def shape_of(name: str, trust_remote_code: bool = False, *, layers: int | None = None) -> ModelShape | None:
    """The shape of a model folder, or of a Hub name in the cache.

    None where its config is not on this machine, or is not that of a decoder whose layers are alike.

    Args:
        layers: how many of its layers a student keeps; by default it is the model itself.

    Raises:
        UsageError: it has no more layers than that.
    """
    config = _config_of(name, trust_remote_code)
    if config is None:
        return None
    parameters = _stored_parameters(Path(name)) if layers is None else None
    if layers is not None:
        config = layers_kept(config, evenly_spaced(config.num_hidden_layers, layers))
    try:
        heads = config.num_attention_heads
        head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
        widths = (getattr(config, key, None) for key in ("intermediate_size", "ffn_dim", "n_inner"))
        return ModelShape(
            parameters=parameters or parameter_count(_skeleton(config, trust_remote_code)),
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=next((width for width in widths if width), 4 * config.hidden_size),
            key_width=(getattr(config, "num_key_value_heads", None) or heads) * head_size,
            vocabulary=config.vocab_size,
        )
    except (AttributeError, TypeError, ValueError):  # an estimate is not worth a run
        return None


def adapter_count(name: str, rank: int, targets: str, trust_remote_code: bool = False) -> int | None:
    """The parameters of LoRA adapters of a rank: rank times inputs plus outputs of each layer that has one.

    Args:
        targets: names of layers, comma-separated, or all-linear, which leaves out the head.
    """
    config = _config_of(name, trust_remote_code)
    if config is None:
        return None
    model, wanted = _skeleton(config, trust_remote_code), targets.split(",")
    head = model.get_output_embeddings()
    return rank * sum(
        sum(module.weight.shape)
        for layer, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
        if targets == "all-linear" or layer.rpartition(".")[2] in wanted
    )


def _config_of(name: str, trust_remote_code: bool) -> PreTrainedConfig | None:
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, local_files_only=True)
    except (OSError, ValueError, KeyError):
        return None
    assert isinstance(config, PreTrainedConfig)
    return config.get_text_config()


def _stored_parameters(folder: Path) -> int | None:
    """As the headers of the weights' files count them; None where there are none."""
    total = 0
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, "numpy") as weights:
                total += sum(math.prod(weights.get_slice(key).get_shape()) for key in weights.keys())
        except (OSError, SafetensorError):
            return None
    return total or None


def _skeleton(config: PreTrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    with torch.device("meta"):
        skeleton: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return skeleton
