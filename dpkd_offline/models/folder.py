"""Where a model lies, a folder or a name on the Hub, and its JSON files. Nothing of them is taken on trust."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError
from transformers.utils.hub import cached_file

from dpkd_offline.common.errors import DataError, DpkdError, UnavailableError, first_line
from dpkd_offline.common.files import parse_json

HUB_SECONDS = 10.0  # for the Hub's first answer; the libraries would ask again for a minute


@contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Whatever a library raises on a file that it does not expect, as an UnavailableError that begins with `what`.

    Each has errors of its own, down to TypeError. Errors of ours, and memory that is full, go on as they are.
    """
    try:
        yield
    except (DpkdError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UnavailableError(f"{what}: {first_line(error) or type(error).__name__}") from error


def require_model(name: str) -> None:
    """Refuse a name behind which there is no model, before a library asks the Hub for each of its files.

    Raises:
        UnavailableError: it can only be a folder and is none, or neither a folder nor known to the Hub.
    """
    folder = Path(name)
    if folder.is_dir():
        return
    if folder.exists():
        raise UnavailableError(f"model '{name}': a file; give the folder of the model")
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or ("/" in name and folder.parent.is_dir()):
        raise UnavailableError(f"model '{name}': no such folder")
    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=HUB_SECONDS)
    except EntryNotFoundError:
        return  # a model of the Hub without a config, which says so itself
    except HFValidationError as error:
        raise UnavailableError(f"model '{name}': no such folder, and no name that the Hub can have") from error
    except RepositoryNotFoundError as error:
        raise UnavailableError(
            f"model '{name}': no such folder, and the Hub shows you no model of this name"
        ) from error
    except Exception as error:  # of whatever library speaks HTTP for the Hub's
        raise UnavailableError(
            f"model '{name}': no such folder, and the Hub does not answer: {first_line(error)}"
        ) from error


def find_model_json(name: str, file: str) -> dict[str, Any] | None:
    """The object in a JSON file of a model, or None where it has no such file.

    Raises:
        UnavailableError: the file holds something else.
    """
    with library_errors(f"model '{name}': {file}"):
        path = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
        if path is None:
            return None
        try:
            return parse_json(Path(path).read_bytes(), Path(file))
        except DataError as error:
            raise UnavailableError(f"model '{name}': {error}") from error
