"""What is known of a model without its weights: tokenizer, EOS, context, vocabulary, identity, licence."""

from __future__ import annotations

import json
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerFast
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file
from yaml import YAMLError

from dpkd_offline.common import console
from dpkd_offline.common.errors import UnavailableError, first_line
from dpkd_offline.common.hashing import file_sha256, fingerprint
from dpkd_offline.models.folder import find_model_json, library_errors, require_model

# How the weights of an input embedding are called, by the ends of their names.
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")


@dataclass(frozen=True)
class ModelInfo:
    """A model as its small files describe it.

    A command makes one of each model and hands it on. Every fact is read when it is first asked for, and then kept.
    Each may raise UnavailableError, naming the model, where its file is missing or wrong. A pickled one holds no facts:
    another machine reads its own files.
    """

    name: str  # folder or Hub name, as the user gave it
    trust_remote_code: bool = False
    chat_template: str | None = None  # in place of that of its tokenizer

    @classmethod
    def load(cls, name: str, trust_remote_code: bool = False) -> ModelInfo:
        """A model whose small files have been read, and its tokenizer loaded.

        Raises:
            UnavailableError: there is no such model, one of its files is damaged, or it has no fast tokenizer.
        """
        model = cls(name, trust_remote_code)
        _ = model.generation_config, model.tokenizer
        return model

    def __reduce__(self) -> tuple[Any, ...]:
        return ModelInfo, (self.name, self.trust_remote_code, self.chat_template)

    def with_chat_template(self, text: str | None) -> ModelInfo:
        """The same model with another chat template, where there is one; what is known of it is not read again."""
        if text in (None, self.chat_template):
            return self
        other, tokenizer = replace(self, chat_template=text), copy(self.tokenizer)
        tokenizer.chat_template = text
        vars(other).update({**vars(self), "chat_template": text, "tokenizer": tokenizer})
        return other

    @cached_property
    def _config_json(self) -> dict[str, Any] | None:
        """config.json as it stands; None where there is none, such as beside a tokenizer alone.

        An adapter is no model here: libraries would load it onto a base that they look for elsewhere, and differ in
        what they do where a model lies beside it.
        """
        require_model(self.name)
        with library_errors(f"model '{self.name}'"):
            adapter = find_adapter_config_file(self.name)
        if adapter is not None:
            base = (find_model_json(self.name, "adapter_config.json") or {}).get("base_model_name_or_path")
            raise UnavailableError(
                f"model '{self.name}': adapter_config.json makes it an adapter of {base or 'another model'}; merge it "
                f"into that model (PEFT's merge_and_unload, then save_pretrained), and give the folder of the result"
            )
        return find_model_json(self.name, "config.json")

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        _ = self._config_json, find_model_json(self.name, "tokenizer_config.json")
        with library_errors(f"model '{self.name}': cannot load its tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(self.name, trust_remote_code=self.trust_remote_code)
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise UnavailableError(f"model '{self.name}': its tokenizer has no fast version (tokenizer.json)")
        if self.chat_template is not None:
            tokenizer.chat_template = self.chat_template
        return tokenizer

    @cached_property
    def special_tokens(self) -> list[str]:
        """What the model is given as a token of its own wherever it stands in a text, the longest first."""
        added = self.tokenizer.added_tokens_decoder.values()
        return sorted((token.content for token in added if token.special and token.content), key=len, reverse=True)

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        """See the function of this name."""
        return tokenizer_fingerprint(self.tokenizer)

    @cached_property
    def full_config(self) -> PreTrainedConfig:
        """As config.json has it, of all parts of a model that reads more than text."""
        _ = self._config_json
        with library_errors(f"model '{self.name}': cannot read its config"):
            config = AutoConfig.from_pretrained(self.name, trust_remote_code=self.trust_remote_code)
            assert isinstance(config, PreTrainedConfig)
            return config

    @property
    def config(self) -> PreTrainedConfig:
        """Its text model's, where it has several."""
        return self.full_config.get_text_config()

    @cached_property
    def generation_config(self) -> GenerationConfig | None:
        """How it is sampled, by its own generation_config.json; None where it has none.

        A library takes a damaged one for one that is not there, and the tokens that end a response are lost with it.
        """
        _ = self._config_json
        if (values := find_model_json(self.name, "generation_config.json")) is None:
            return None
        eos = values.get("eos_token_id")
        if any(type(token) is not int for token in (eos if isinstance(eos, list) else [eos]) if token is not None):
            raise UnavailableError(
                f"model '{self.name}': generation_config.json: eos_token_id is {eos!r}, and must be a token id or a "
                f"list of them"
            )
        with library_errors(f"model '{self.name}': generation_config.json"):
            return GenerationConfig.from_dict(values)

    @property
    def quantization(self) -> str | None:
        """The name of the format that its weights are quantised in; None of plain numbers."""
        config = self._config_json or {}
        for part in (config, config.get("text_config")):
            if not isinstance(part, dict) or not (settings := part.get("quantization_config")):
                continue
            if isinstance(settings, dict):
                bits = settings.get("load_in_4bit") or settings.get("load_in_8bit")
                return str(settings.get("quant_method") or ("bitsandbytes" if bits else "an unknown format"))
            return "an unknown format"
        return None

    @cached_property
    def eos_ids(self) -> list[int]:
        """The tokens that end a response, ascending: the tokenizer's EOS and those of the generation config."""
        generation = self.generation_config
        eos = self.config.eos_token_id if generation is None else generation.eos_token_id
        tokens = {self.tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])}
        ids = sorted(token for token in tokens if token is not None)
        if not ids:
            raise UnavailableError(f"model '{self.name}': neither tokenizer nor generation config names an EOS token")
        return ids

    @property
    def context_length(self) -> int:
        """The most tokens that its positions allow."""
        return int(getattr(self.config, "max_position_embeddings", None) or 2**31)

    @property
    def vocab_size(self) -> int:
        """The rows of its embedding, padding included: it may sample the id of any of them."""
        return int(self.config.vocab_size)

    @cached_property
    def embedding_rows(self) -> int:
        """The rows of its input embedding, by the headers of its weights: no id at or beyond can be looked up.

        Where the weights are not here, or not in safetensors, it is what the config says.
        """
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(path, framework="np") as file:
                    for name in file.keys():
                        if name.endswith(EMBEDDINGS):
                            return int(file.get_slice(name).get_shape()[0])
            except (OSError, SafetensorError) as error:
                raise UnavailableError(
                    f"model '{self.name}': {path.name} cannot be read: {first_line(error)}"
                ) from error
        return self.vocab_size

    @property
    def id_bound(self) -> int:
        """Every token id that its tokenizer makes or the model samples is smaller."""
        return max(len(self.tokenizer), self.vocab_size)

    @property
    def public_name(self) -> str:
        """Its Hub name, or the name of its folder without where it lies."""
        folder = Path(self.name)
        return folder.resolve().name if folder.is_dir() else self.name

    @cached_property
    def identity(self) -> dict[str, str]:
        """Which model this is, without where it lies: name and commit (Hub), or folder name and hash of the weights.

        All weights in a folder are read for it. A folder may lack them, where a server holds them: then the revision
        says that it is of the config alone.
        """
        folder = self.folder
        if not Path(self.name).is_dir():
            return {"name": self.name, "revision": folder.name}
        weights = sorted(p for p in folder.iterdir() if p.suffix == ".safetensors" or p.match("pytorch_model*.bin"))
        config = [folder / "config.json"] if (folder / "config.json").exists() else []
        hashes = fingerprint([file_sha256(path) for path in (*config, *weights)])
        return {"name": self.public_name, "revision": ("sha256:" if weights else "config:") + hashes}

    @cached_property
    def license(self) -> str | None:
        """The licence that its card, README.md beside its other files, names; None where it names none.

        Of a Hub name that is the card in the cache, if it came there with the model; it is not fetched.
        """
        card = self.folder / "README.md"
        if not card.is_file():
            return None
        try:
            front = metadata_load(card) or {}
        except (OSError, ValueError, YAMLError) as error:
            reason = first_line(error)
            console.info(f"model '{self.public_name}': the front matter of its card cannot be read: {reason}")
            return None
        license, name = front.get("license"), front.get("license_name")
        if isinstance(license, list):
            return ", ".join(map(str, license))
        if license == "other" and name:
            return f"other ({name})"
        return str(license) if license else None

    @property
    def folder(self) -> Path:
        """The folder of its files; of a Hub name the one in the cache, which is called after the commit."""
        if Path(self.name).is_dir():
            return Path(self.name)
        try:
            return Path(str(cached_file(self.name, "config.json"))).parent
        except OSError as error:
            raise UnavailableError(f"model '{self.name}': cannot read its config: {first_line(error)}") from error


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Equal for tokenizers that map the same text to the same ids and end a response with the same token."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for key in ("padding", "truncation", "post_processor"):
        state.pop(key, None)
    return fingerprint([state, tokenizer.eos_token_id])
