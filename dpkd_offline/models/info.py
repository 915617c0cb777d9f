"""What is known of a model without its weights: tokenizer, EOS, context, vocabulary, identity, licence."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import metadata_load
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerFast
from transformers.utils.hub import cached_file
from yaml import YAMLError

from dpkd_offline.common import console
from dpkd_offline.common.errors import UnavailableError, first_line
from dpkd_offline.common.hashing import file_sha256, fingerprint


def load_tokenizer(name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerFast:
    """The tokenizer of a model folder or Hub name, or UnavailableError."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UnavailableError(f"model '{name}': cannot load its tokenizer: {first_line(error)}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UnavailableError(f"model '{name}': its tokenizer has no fast version (tokenizer.json)")
    return tokenizer


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
        raise UnavailableError(f"model '{name}': cannot read its config: {first_line(error)}") from error
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
        raise UnavailableError(f"model '{name}': cannot read its config: {first_line(error)}") from error


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
        console.info(f"model '{model_name(name)}': the front matter of its card cannot be read: {first_line(error)}")
        return None
    said, name_of_other = front.get("license"), front.get("license_name")
    if isinstance(said, list):
        return ", ".join(map(str, said))
    if said == "other" and name_of_other:
        return f"other ({name_of_other})"
    return str(said) if said else None
