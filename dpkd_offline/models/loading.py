"""Loading a model's weights, and saving a student in Hugging Face format. No pickle."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from dpkd_offline.common.errors import UnavailableError, first_line
from dpkd_offline.common.files import disk_errors, fsync

if TYPE_CHECKING:
    from peft import PeftModel

# Where DeepSpeed is installed, transformers imports it to save a model, and it says on the output what it has guessed.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")


def load_model(
    name: str, dtype: str, trust_remote_code: bool = False, device: torch.device | None = None
) -> PreTrainedModel:
    """A causal language model in evaluation mode (no dropout), or UnavailableError.

    On `device`; by default the GPU, where there is one.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype="auto" if dtype == "auto" else getattr(torch, dtype), trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UnavailableError(f"model '{name}': cannot load it: {first_line(error)}") from error
    assert isinstance(model, PreTrainedModel)
    model.to(device)  # type: ignore[arg-type]
    model.eval()
    return model


# What tells transformers how to load a model, besides config.json.
MODEL_FILES = (
    *("*.safetensors*", "adapter_config.json", "generation_config.json", "*.jinja", "*token*.json"),
    *("vocab.*", "merges.txt", "tokenizer.model"),
)


def save_student(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    card: str,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write a student that transformers and vLLM load: weights, config, tokenizer, chat template, model card.

    Of a model with an adapter, the adapter; `weights` in place of the model's own. The files are made in a folder
    beside and moved in, (adapter_)config.json last: a folder with one is whole.

    Raises:
        StorageError: the disk is full or fails.
    """
    with disk_errors(folder):
        for stale in folder.glob(".saving-*"):
            shutil.rmtree(stale)
        making = folder / f".saving-{os.getpid()}"
        try:
            if isinstance(model, PreTrainedModel):
                model.save_pretrained(making, state_dict=weights)
            else:  # without embeddings: it would ask the Hub whether they changed
                model.save_pretrained(str(making), state_dict=weights, save_embedding_layers=False)
            tokenizer.save_pretrained(making)
            (making / "README.md").write_text(card, encoding="utf-8")
            for path in making.iterdir():
                if path.suffix == ".safetensors":
                    shutil.copymode(making / "README.md", path)  # made for their owner alone
                fsync(path)
            (folder / "config.json").unlink(missing_ok=True)  # of another model, as are these
            for stale in (path for pattern in MODEL_FILES for path in folder.glob(pattern)):
                if not (making / stale.name).exists():
                    stale.unlink()
            for path in sorted(making.iterdir(), key=lambda p: p.name.endswith("config.json")):
                path.replace(folder / path.name)
        finally:
            shutil.rmtree(making, ignore_errors=True)
        fsync(folder)


def parameter_count(model: nn.Module) -> int:
    """Numbers that training may change; shared ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def stored_parameter_count(folder: Path) -> int:
    """The numbers in a model's .safetensors files, of which only the headers are read."""
    count = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())
    return count
