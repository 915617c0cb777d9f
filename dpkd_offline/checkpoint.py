"""Models on disk: loading them, saving a student in Hugging Face format, and the trainer's state. No pickle."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from dpkd_offline.errors import MismatchError, UnavailableError
from dpkd_offline.files import file_sha256, fingerprint, fsync_folder, read_json, write_atomically, write_json

if TYPE_CHECKING:
    from peft import PeftModel

# --- models and tokenizers ------------------------------------------------------------------------------------------


def load_tokenizer(name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerFast:
    """The tokenizer of a model folder or Hub name, or UnavailableError."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UnavailableError(f"model '{name}': cannot load its tokenizer: {_first_line(error)}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UnavailableError(f"model '{name}': its tokenizer has no fast version (tokenizer.json)")
    return tokenizer


def load_model(
    name: str, dtype: str, trust_remote_code: bool = False, device: torch.device | None = None
) -> PreTrainedModel:
    """A causal language model in evaluation mode (no dropout), or UnavailableError.

    On the GPU, where there is one and no other `device` is said.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype="auto" if dtype == "auto" else getattr(torch, dtype), trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UnavailableError(f"model '{name}': cannot load it: {_first_line(error)}") from error
    assert isinstance(model, PreTrainedModel)
    model.to(device)  # type: ignore[arg-type]
    model.eval()
    return model


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Equal for tokenizers that map the same text to the same ids and end a response with the same token."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for key in ("padding", "truncation", "post_processor"):
        state.pop(key, None)
    return fingerprint([state, tokenizer.eos_token_id])


def eos_ids(name: str, tokenizer: PreTrainedTokenizerFast, trust_remote_code: bool = False) -> list[int]:
    """The tokens that end a response: the tokenizer's EOS and those of the model's generation config."""
    try:
        eos = GenerationConfig.from_pretrained(name).eos_token_id
    except OSError:  # a model without one
        eos = _config(name, trust_remote_code).eos_token_id
    ids = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])}
    found = sorted(i for i in ids if i is not None)
    if not found:
        raise UnavailableError(f"model '{name}': neither tokenizer nor generation config names an EOS token")
    return found


def _config(name: str, trust_remote_code: bool) -> PreTrainedConfig:
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UnavailableError(f"model '{name}': cannot read its config: {_first_line(error)}") from error
    assert isinstance(config, PreTrainedConfig)
    return config.get_text_config()


def context_length(name: str, trust_remote_code: bool = False) -> int:
    """The most tokens that a model's positions allow."""
    return int(getattr(_config(name, trust_remote_code), "max_position_embeddings", None) or 2**31)


def vocab_size(name: str, trust_remote_code: bool = False) -> int:
    """The number of a model's token ids, those of a padded embedding included: it may sample any of them."""
    return int(_config(name, trust_remote_code).vocab_size)


def model_name(name: str) -> str:
    """A model's Hub name, or the name of its folder without where it lies."""
    folder = Path(name)
    return folder.resolve().name if folder.is_dir() else name


def model_identity(name: str) -> dict[str, str]:
    """Who a model is, without where it lies: name and commit (Hub), or folder name and hash of the weights.

    A folder may lack the weights, where a server holds them: then the revision says that it is of the config alone.
    """
    folder = Path(name)
    if not folder.is_dir():
        config, _ = PreTrainedConfig.get_config_dict(name)
        return {"name": name, "revision": str(config.get("_commit_hash"))}
    files = sorted(p for p in folder.iterdir() if p.suffix == ".safetensors" or p.name == "pytorch_model.bin")
    hashes = [file_sha256(folder / "config.json")] if (folder / "config.json").exists() else []
    hashes += [file_sha256(path) for path in files]
    return {"name": model_name(name), "revision": ("sha256:" if files else "config:") + fingerprint(hashes)}


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
    """
    making = folder / f".saving-{os.getpid()}"
    shutil.rmtree(making, ignore_errors=True)
    if isinstance(model, PreTrainedModel):
        model.save_pretrained(making, state_dict=weights)
    else:
        model.save_pretrained(
            str(making), state_dict=weights, save_embedding_layers=False
        )  # it would ask the Hub whether to
    tokenizer.save_pretrained(making)
    write_atomically(making / "README.md", card.encode())
    for path in sorted(making.iterdir(), key=lambda p: p.name.endswith("config.json")):
        path.replace(folder / path.name)
    making.rmdir()
    fsync_folder(folder)


# --- trainer state --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Position:
    """Where a run stands: optimiser steps done."""

    step: int


def save_state(folder: Path, position: Position, run: str, tensors: dict[str, Tensor]) -> None:
    """Commit the trainer's state as folder/step-N by one rename, then drop the older ones.

    Args:
        folder: the run's `checkpoints` folder.
        run: fingerprint of all that must agree for the state to be continued.
        tensors: master weights and optimiser moments, by name.
    """
    final = folder / f"step-{position.step:08d}"
    making = folder / f".{final.name}-{os.getpid()}"
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, making / "state.safetensors")
    with (making / "state.safetensors").open("rb") as file:
        os.fsync(file.fileno())
    write_json(making / "state.json", {**asdict(position), "run": run})
    shutil.rmtree(final, ignore_errors=True)
    making.rename(final)
    fsync_folder(folder)
    for other in folder.iterdir():
        if other != final:
            shutil.rmtree(other, ignore_errors=True)


def load_state(folder: Path, run: str) -> tuple[Position, dict[str, Tensor]] | None:
    """The newest committed state under `folder`, or None. MismatchError if another run left it."""
    states = sorted(folder.glob("step-*"))
    if not states:
        return None
    state = read_json(states[-1] / "state.json")
    if state.pop("run") != run:
        raise MismatchError(
            f"{states[-1]}: left by a run with another config, dataset or student; "
            "repeat its command, or take another --output, or --no-resume to start over"
        )
    return Position(**state), load_file(states[-1] / "state.safetensors")


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
