"""Loading a model's weights, and saving a student in Hugging Face format. Nothing is written as a pickle; weights that
are published as one (pytorch_model.bin) are read by torch's `weights_only`, which runs no code of theirs."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from dpkd_offline.common import console
from dpkd_offline.common.errors import UnavailableError
from dpkd_offline.common.files import disk_errors, fsync
from dpkd_offline.models.folder import library_errors
from dpkd_offline.models.info import ModelInfo, tokenizer_fingerprint
from dpkd_offline.models.weights import check_headers, refuse_faults, refuse_not_finite

if TYPE_CHECKING:
    from peft import PeftModel


def tell_deepspeed_the_device() -> None:
    """For DeepSpeed, where it is installed: libraries import it, and it says on the output what it has guessed.

    Only a process that trains or saves calls this, since it asks CUDA, after which a process cannot be forked.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")


def load_model(
    name: str, dtype: str, trust_remote_code: bool = False, device: torch.device | None = None
) -> PreTrainedModel:
    """A causal language model in evaluation mode (no dropout).

    On `device`; by default the GPU, where there is one.

    Raises:
        UnavailableError: it cannot be loaded, or is not whole: weights are missing, unknown, of other shapes or not
            numbers, or one of its small files is damaged.
    """
    info = ModelInfo(name, trust_remote_code)
    _ = info.generation_config  # a library goes on without a damaged one
    if info.quantization not in (None, "bitsandbytes", *AUTO_QUANTIZATION_CONFIG_MAPPING):
        raise UnavailableError(
            f"model '{name}': its weights are quantised in {info.quantization}, which transformers does not know; take "
            f"an engine that does, or a model of plain weights"
        )
    check_headers(info)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with library_errors(f"model '{name}': cannot load it"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            dtype="auto" if dtype == "auto" else getattr(torch, dtype),
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the report
        )
    model, report = loaded
    assert isinstance(model, PreTrainedModel)
    refuse_faults(name, report)
    _keep_cap(model)
    with library_errors(f"model '{name}': cannot be used on {device}"):
        model.to(device)  # type: ignore[arg-type]
    refuse_not_finite(name, model.state_dict().items())
    model.eval()
    return model


def model_without_weights(name: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """What `load_model` gives in float32, but on the meta device, buffers too; none of its weights is read.

    Raises:
        UnavailableError: its small files are damaged, or no model can be made of its config.
    """
    info = ModelInfo(name, trust_remote_code)
    generation = info.generation_config
    with library_errors(f"model '{name}': cannot make it"), torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(
            info.full_config, dtype=torch.float32, trust_remote_code=trust_remote_code
        )
    assert isinstance(model, PreTrainedModel)
    if generation is not None:
        model.generation_config = generation
    _keep_cap(model)
    model.eval()
    return model


def _keep_cap(model: PreTrainedModel) -> None:
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")  # torch's own would leave the cap out, and vLLM does not


def rehearse_saving(model: ModelInfo) -> None:
    """Find out before any work that a student of this model can be saved.

    What is to stand beside its weights is written into a folder that is thrown away, and read again.

    Raises:
        StorageError: the disk for temporary files is full or fails.
        UnavailableError: its weights are quantised, or its config or tokenizer cannot be saved.
    """
    if model.quantization is not None:
        raise UnavailableError(
            f"model '{model.name}': config.json says that its weights are quantised ({model.quantization}), and such "
            f"weights cannot be trained; take the model that it was made from"
        )
    tokenizer = model.tokenizer
    with TemporaryDirectory() as place, library_errors(f"model '{model.name}': a student of it could not be saved"):
        with disk_errors(Path(place)):
            model.full_config.save_pretrained(place)
            tokenizer.save_pretrained(place)
        saved = ModelInfo(place, model.trust_remote_code).tokenizer
        if (
            model.tokenizer_fingerprint != tokenizer_fingerprint(saved)
            or saved.chat_template != tokenizer.chat_template
        ):
            raise UnavailableError(f"model '{model.name}': its tokenizer is another one once it is saved and loaded")
        generation = model.generation_config or GenerationConfig.from_model_config(model.full_config)
        if dropped := saveable(generation)[1]:
            console.info(
                f"warning: model '{model.name}': its generation config contradicts itself; the student is "
                f"saved without its {', '.join(dropped)}"
            )


def saveable(generation: GenerationConfig) -> tuple[GenerationConfig, list[str]]:
    """Sampling settings that transformers agrees to save, and the names of those that had to go, such as a temperature
    beside do_sample false."""
    values = {key: value for key, value in generation.to_diff_dict().items() if key != "transformers_version"}
    if _is_consistent(values):
        return generation, []
    kept: dict[str, Any] = {}
    while accepted := next((key for key in values if _is_consistent({**kept, key: values[key]})), None):
        kept[accepted] = values.pop(accepted)
    return GenerationConfig.from_dict(kept), sorted(values)


def _is_consistent(values: dict[str, Any]) -> bool:
    try:
        GenerationConfig.from_dict(values).validate(strict=True)
    except (ValueError, TypeError):
        return False
    return True


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
    tell_deepspeed_the_device()
    with disk_errors(folder):
        for stale in folder.glob(".saving-*"):
            shutil.rmtree(stale)
        making = folder / f".saving-{os.getpid()}"
        try:
            if isinstance(model, PreTrainedModel):
                if model.generation_config is not None:
                    model.generation_config = saveable(model.generation_config)[0]
                model.save_pretrained(making, state_dict=weights)
            else:  # without embeddings: it would ask the Hub whether they changed
                model.save_pretrained(str(making), state_dict=weights, save_embedding_layers=False)
            tokenizer.save_pretrained(making)
            (making / "README.md").write_text(card, encoding="utf-8")
            files = [path.relative_to(making) for path in making.rglob("*") if path.is_file()]
            for path in files:
                if path.suffix == ".safetensors":
                    shutil.copymode(making / "README.md", making / path)  # made for their owner alone
                fsync(making / path)
            (folder / "config.json").unlink(missing_ok=True)  # of another model, as are these
            for stale in (path for pattern in MODEL_FILES for path in folder.glob(pattern)):
                if stale.relative_to(folder) not in files:
                    stale.unlink()
            for path in sorted(files, key=lambda p: p.name.endswith("config.json")):
                (folder / path).parent.mkdir(exist_ok=True)  # chat templates beside the first have a folder
                (making / path).replace(folder / path)
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
