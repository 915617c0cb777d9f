"""Finds what must not leave this machine: secrets and absolute paths in the texts of a dataset."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from dpkd_offline.common.errors import DataError
from dpkd_offline.common.files import LARGEST_JSON_BYTES, read_bounded, read_json
from dpkd_offline.common.locations import USER
from dpkd_offline.common.secrets import SHORTEST_SECRET, secrets_of_environment

ABSOLUTE_PATH = re.compile(
    r"""(?:^|[\s"'`(\[{=,:;|])        # where a word begins:
    (?:file:/ | ~[\w.-]*/ | /[\w.]    # file:/x, ~ann/x, /x
     | [A-Za-z]:[\\/](?!/) | \\\\\w)  # C:\x, \\host
    """,
    re.VERBOSE,
)
IDS_OF_ROWS = ("prompt_set.longest_prompt",)  # which may look like anything


def check_disclosure(root: Path, names: Iterable[str], url: str) -> None:
    """Raise DataError where a text file tells an absolute path, or a secret of the environment or of the URL."""
    secrets = secrets_of_environment() | _secrets_of(url)
    for name in names:
        for place, text in _texts(root / name):
            for source, secret in secrets.items():
                if secret in text:
                    raise DataError(f"{root / name}: {place} tells the value of {source}; it would be shared")
            if place not in IDS_OF_ROWS and ABSOLUTE_PATH.search(text):
                raise DataError(f"{root / name}: {place} holds an absolute path; it would be shared")


def _secrets_of(url: str) -> dict[str, str]:
    user = USER.search(url)
    password = unquote(user[0][:-1].partition(":")[2]) if user else ""
    return {"the password in the URL": password} if len(password) >= SHORTEST_SECRET else {}


def _texts(path: Path) -> Iterator[tuple[str, str]]:
    """Each text of a file with its place: a key of a JSON object, or a line."""
    if path.suffix == ".json":
        yield from _strings(read_json(path), "")
    else:
        for number, line in enumerate(
            read_bounded(path, LARGEST_JSON_BYTES).decode("utf-8", "replace").splitlines(), 1
        ):
            yield f"line {number}", line


def _strings(value: Any, place: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield f"a key of {place or 'it'}", key
            yield from _strings(item, f"{place}.{key}" if place else key)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _strings(item, f"{place}.{number}")
    else:
        yield f"{place}", str(value)
