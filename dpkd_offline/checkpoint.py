"""Models on disk: loading them, saving a student in Hugging Face format, and the trainer's state. No pickle."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import metadata_load
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
from transformers.utils.hub import cached_file
from yaml import YAMLError

from dpkd_offline import log
from dpkd_offline.errors import DataError, MismatchError, UnavailableError
from dpkd_offline.files import disk_errors, file_sha256, fingerprint, fsync, read_json, write_json

if TYPE_CHECKING:
    from peft import PeftModel

# Where DeepSpeed is installed, transformers imports it to save a model, and it says on the output what it has guessed.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

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
    folder = _files_of(name)
    if not Path(name).is_dir():
        return {"name": name, "revision": folder.name}
    files = sorted(p for p in folder.iterdir() if p.suffix == ".safetensors" or p.name == "pytorch_model.bin")
    hashes = [file_sha256(folder / "config.json")] if (folder / "config.json").exists() else []
    hashes += [file_sha256(path) for path in files]
    return {"name": model_name(name), "revision": ("sha256:" if files else "config:") + fingerprint(hashes)}


def _files_of(name: str) -> Path:
    """The folder of a model's files; of a Hub name the one in the cache, which is called after the commit."""
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(str(cached_file(name, "config.json"))).parent
    except OSError as error:
        raise UnavailableError(f"model '{name}': cannot read its config: {_first_line(error)}") from error


def model_license(name: str) -> str | None:
    """What a model's own card, README.md beside its other files, says the licence is; None where it does not.

    Of a Hub name that is the one in the cache, if it came there with the model; it is not fetched.
    """
    card = _files_of(name) / "README.md"
    if not card.is_file():
        return None
    try:
        front = metadata_load(card) or {}
    except (OSError, ValueError, YAMLError) as error:
        log.info(f"model '{model_name(name)}': the front matter of its card cannot be read: {_first_line(error)}")
        return None
    said, name_of_other = front.get("license"), front.get("license_name")
    if isinstance(said, list):
        return ", ".join(map(str, said))
    if said == "other" and name_of_other:
        return f"other ({name_of_other})"
    return str(said) if said else None


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
            (folder / "config.json").unlink(missing_ok=True)  # of another model
            for path in sorted(making.iterdir(), key=lambda p: p.name.endswith("config.json")):
                path.replace(folder / path.name)
        finally:
            shutil.rmtree(making, ignore_errors=True)
        fsync(folder)


# --- trainer state --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Position:
    """Where a run stands: optimiser steps done, and after how many each later round of pairs began or is to begin."""

    step: int
    switches: list[int] = field(default_factory=list)


def random_states() -> dict[str, Tensor]:
    """The states of torch's generators, as bytes."""
    states = {"random/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["random/cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random(tensors: dict[str, Tensor]) -> None:
    """Set torch's generators to what `random_states` returned."""
    torch.set_rng_state(tensors["random/cpu"])
    if "random/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random/cuda"])


def save_state(folder: Path, position: Position, run: str, tensors: dict[str, Tensor]) -> None:
    """Commit the trainer's state as folder/step-N by one rename; the older ones go after that.

    Args:
        folder: the run's `checkpoints` folder.
        run: fingerprint of all that must agree for the state to be continued.
        tensors: master weights and optimiser moments, by name. The states of the generators are added.

    Raises:
        StorageError: the disk is full or fails. The checkpoint before is there still.
    """
    final = folder / f"step-{position.step:08d}"
    making = folder / f".{final.name}"
    with disk_errors(final):
        sweep_states(folder)
        making.mkdir(parents=True)
        try:
            file = making / "state.safetensors"
            save_file({name: t.contiguous() for name, t in {**tensors, **random_states()}.items()}, file)
            fsync(file)
            said = {**asdict(position), "run": run, "sha256": file_sha256(file)}
            write_json(making / "state.json", {**said, "fingerprint": fingerprint(said)})  # fsyncs the folder too
            if final.exists():  # damaged, else the run would have gone on from it
                final.rename(folder / f".{final.name}-damaged")
            making.rename(final)
        finally:
            shutil.rmtree(making, ignore_errors=True)
        fsync(folder)
        fsync(folder.parent)
    for other in folder.iterdir():
        if other != final:
            shutil.rmtree(other, ignore_errors=True)


def sweep_states(folder: Path) -> None:
    """Remove the checkpoints that were not committed, which may be what fills the disk."""
    for stale in folder.glob(".step-*"):
        shutil.rmtree(stale, ignore_errors=True)


def load_state(folder: Path, run: str) -> tuple[Position, dict[str, Tensor]] | None:
    """The newest committed state under `folder` that is whole, or None where none was committed.

    Raises:
        DataError: what is there is damaged.
        MismatchError: another run left it.
    """
    sweep_states(folder)
    damages = []
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            state = _read_state(path, run)
        except DataError as error:
            damages.append(error)
            continue
        for damage in damages:
            log.info(f"{damage}; an older checkpoint is whole")
        return state
    if damages:
        raise DataError(f"{damages[0]}; put back a whole copy of this checkpoint, or start over with --no-resume")
    return None


def _read_state(path: Path, run: str) -> tuple[Position, dict[str, Tensor]]:
    said, file = read_json(path / "state.json"), path / "state.safetensors"
    if said.pop("fingerprint", None) != fingerprint(said):
        raise DataError(f"{path / 'state.json'}: damaged: not what was written")
    if said["run"] != run:
        raise MismatchError(
            f"{path}: left by a run with another config, dataset or student; "
            "repeat its command, or take another --output, or --no-resume to start over"
        )
    try:
        if file_sha256(file) != said["sha256"]:
            raise DataError(f"{file}: damaged: its sha256 is not the one in state.json")
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}") from error
    position = Position(**{f.name: said[f.name] for f in fields(Position)})
    return position, load_file(file, backend="pread")  # no mapping of a file that is going to be removed


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
