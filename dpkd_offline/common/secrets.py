"""Values that are in nothing that is shown or written: passwords of URLs, tokens, keys.

They are known by value and not by place, since a server may echo them and an error may quote them: values of the
environment's variables that look like secrets, and users' parts of every URL that a command is given. A stage of
`distill` gets those of its settings through its environment, never through a file.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

SECRET_NAME = re.compile(
    r"(TOKEN|KEY|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|_PASS|_PWD|_PAT|_AUTH)$", re.IGNORECASE
)
SHORTEST_SECRET = 8  # characters, of what only looks like one
SHORTEST_ENCODED = 6  # bytes, of a part of what is encoded: a few letters stand in many words
SHORTEST_PASSWORD = 3  # of what is one; a shorter one would be found in every word
USER_OF_URL = re.compile(r"://([^/\s\"'@]*(?:@[^/\s\"'@]+)*)@")
SECRET_OF_QUERY = re.compile(
    r"[?&](?:[\w.-]*(?:token|key|secret|password|passwd|signature|credential)|sig|auth)=([^&#\s\"']+)", re.IGNORECASE
)
HIDDEN = "***"
STAGE_SECRETS = "DPKD_OFFLINE_STAGE_SECRETS"  # of a stage's environment: what stands in place of what in its settings
_given: set[str] = set()  # as they stood in a URL, or in a file of a token


def remember_secrets(text: str) -> None:
    """Remember the passwords of all URLs in a text: one that is given, or all of a recipe."""
    _given.update(secrets_in(text))


def secrets_in(text: str) -> set[str]:
    """The passwords and tokens of the URLs in a text, as they stand there, and as they are meant."""
    written = set()
    for users in USER_OF_URL.findall(text):
        user, colon, password = users.partition(":")
        written |= {password, users} if colon else {user} if len(user) >= SHORTEST_SECRET else set()
    written |= set(SECRET_OF_QUERY.findall(text))
    return {value for as_written in written for value in (as_written, unquote(as_written)) if _is_long(value)}


def _is_long(value: str) -> bool:
    return len(value) >= SHORTEST_PASSWORD


def secrets_of_environment() -> dict[str, str]:
    """By their names, the values of environment variables that look like tokens, keys and passwords."""
    return _named_as_secrets(os.environ.items())


def _named_as_secrets(variables: Iterable[tuple[str, str]]) -> dict[str, str]:
    return {
        name: value.strip()
        for name, value in variables
        if SECRET_NAME.search(name) and len(value.strip()) >= SHORTEST_SECRET
    }


def known_secrets() -> frozenset[str]:
    """All secrets that are known now, as they are."""
    return _of_variables(tuple(os.environ.items())).union(_given, _hub_token())


@lru_cache(maxsize=8)
def _of_variables(variables: tuple[tuple[str, str], ...]) -> frozenset[str]:
    of_urls = (secret for _, value in variables if "://" in value for secret in secrets_in(value))
    stage = json.loads(dict(variables).get(STAGE_SECRETS, "{}")).values()
    of_stage = (secret for value in stage for secret in (value, *secrets_in(f"://{value}@")))
    return frozenset([*_named_as_secrets(variables).values(), *of_urls, *of_stage])


@lru_cache
def _hub_token() -> tuple[str, ...]:
    """The token that huggingface_hub would send, where a login has stored one."""
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    path = Path(os.environ.get("HF_TOKEN_PATH") or Path(home) / "token")
    try:
        token = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
    except (OSError, UnicodeDecodeError):
        return ()  # nor can the library read it
    return (token,) if len(token) >= SHORTEST_SECRET else ()


@lru_cache(maxsize=8)
def _pattern(secrets: frozenset[str], shortest: int) -> re.Pattern[str] | None:
    """Any of the secrets, plain or in a form that it is sent or written in; the longest first."""
    forms = {form for secret in secrets for form in _forms(secret) if len(form) >= shortest or ":" in form}
    return re.compile("|".join(map(re.escape, sorted(forms, key=len, reverse=True)))) if forms else None


def _forms(secret: str) -> Iterator[str]:
    data = secret.encode("utf-8", "surrogatepass")
    yield secret
    yield quote(secret, safe="")
    yield re.sub("%..", lambda found: found[0].lower(), quote(secret, safe=""))
    yield quote(secret)
    for plain in (json.dumps(secret), json.dumps(secret, ensure_ascii=False), repr(secret)):
        yield plain[1:-1]
    if len(secret) >= SHORTEST_SECRET or ":" in secret:
        yield data.hex()
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        for before in range(3):  # where it stands behind others, as behind a user's name
            skipped, cut = (0, 2, 3)[before], (len(data) + before) % 3
            padded = encode(b"\0" * before + data).decode()
            text = padded.rstrip("=")
            if before == 0 or len(data) >= SHORTEST_ENCODED:  # at the end of what is encoded, or before more of it
                yield from (padded[skipped:], text[skipped:])
            if len(data) >= SHORTEST_ENCODED:
                yield text[skipped : len(text) - (1 if cut else 0)]


def redacted(text: str) -> str:
    """A text without any secret that is known."""
    return _hidden_by(SHORTEST_PASSWORD)(text)


def redacted_value(value: Any) -> Any:
    """What a file of JSON or YAML holds, without secrets in its texts and keys.

    A password so short that it may stand in a hash by chance is hidden only where it stands behind its user.
    """
    return _mapped(value, _hidden_by(SHORTEST_SECRET))


def _hidden_by(shortest: int) -> Callable[[str], str]:
    """What hides in a text each secret that is known now, of so many letters or more."""
    pattern = _pattern(known_secrets(), shortest)
    return lambda text: pattern.sub(HIDDEN, text) if pattern else text


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_mapped(key, change): _mapped(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(item, change) for item in value]
    return value


def set_aside(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Settings that a file may hold, and the environment from which `put_back` fills in the rest."""
    places: dict[str, str] = {}  # by what was taken away

    def take(text: str) -> str:
        def name(found: re.Match[str]) -> str:
            return places.setdefault(found[0], f"***{len(places) + 1}***")

        pattern = _pattern(known_secrets(), SHORTEST_PASSWORD)
        return pattern.sub(name, text) if pattern else text

    kept = _mapped(settings, take)
    return kept, {STAGE_SECRETS: json.dumps({place: secret for secret, place in places.items()})} if places else {}


def put_back(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a stage with what `set_aside` took from them."""
    places: dict[str, str] = json.loads(os.environ.get(STAGE_SECRETS, "{}"))

    def put(text: str) -> str:
        for place, secret in places.items():
            text = text.replace(place, secret)
        return text

    filled: dict[str, Any] = _mapped(settings, put) if places else settings
    return filled
