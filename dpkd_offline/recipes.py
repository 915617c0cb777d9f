"""From a recipe's YAML and flags to the configs of the commands.

Values come from defaults < the recipe's section (`--config`) < what a SLURM array says < flags. Unknown keys fail, with
the place in the file.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dpkd_offline import log
from dpkd_offline.config import C, Config, Recipe, ShardOptions
from dpkd_offline.errors import UsageError


def _mark(node: yaml.Node | None, path: Iterable[str | int]) -> yaml.Mark | None:
    """Where in the YAML text the key at `path` stands (the deepest part of it that exists)."""
    mark = node.start_mark if node else None
    for key in path:
        if not isinstance(node, yaml.MappingNode):
            break
        for key_node, value_node in node.value:
            if key_node.value == str(key):
                mark, node = key_node.start_mark, value_node
                break
        else:
            break
    return mark


def _place(file: Path | None, path: Iterable[str | int]) -> str:
    """`file:line:column: ` of a key, or nothing without a file."""
    if file is None:
        return ""
    mark = _mark(read_yaml(file)[1], path)
    return f"{file}:{mark.line + 1}:{mark.column + 1}: " if mark else f"{file}: "


def _explain(error: ValidationError, config: type[Config]) -> tuple[tuple[str | int, ...], str]:
    first = error.errors()[0]
    where, key = first["loc"], ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(key, config.model_fields, n=1)
        return where, f"unknown key '{key}'" + (f"; did you mean '{close[0]}'?" if close else "")
    if first["type"] == "missing":
        return where, f"'{key}' is required"
    message = first["msg"].removeprefix("Value error, ")
    return where, (f"'{key}': " if key else "") + message[:1].lower() + message[1:]


def read_yaml(path: Path) -> tuple[dict[str, Any], yaml.Node | None]:
    """A YAML mapping and its node tree, which knows lines and columns."""
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        raise UsageError(f"{place}: {error.problem}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: {' '.join(str(error).split())}") from error
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise UsageError(f"{path}:1:1: expected a mapping of sections")
    return data, node


def validated(
    config: type[C], values: Mapping[str, Any], *, file: Path | None = None, section: tuple[str, ...] = ()
) -> C:
    """`values` as a config, or a UsageError that names the place.

    Args:
        file: the recipe that the values (or some of them) came from, for the message.
        section: the path of keys in that recipe under which they stand.
    """
    try:
        return config.model_validate(dict(values))
    except ValidationError as error:
        where, message = _explain(error, config)
        if file is None:
            raise UsageError(message.replace("_", "-") if message.startswith("'") else message) from error
        place = _place(file, (*section, *where))
        raise UsageError(f"{place}{'.'.join(section) + ': ' if section else ''}{message}") from error


def recipe_section(config: type[C], section: str, values: object, given: Mapping[str, Any], file: Path | None) -> C:
    """The `values` of a recipe's section, with what is given beside it (flags, or what the recipe implies)."""
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UsageError(f"{_place(file, (section,))}'{section}' must be a mapping")
    return validated(config, {**values, **given}, file=file, section=(section,) if file else ())


def from_recipe(config: type[C], section: str, file: Path | None, flags: Mapping[str, Any]) -> C:
    """Defaults < the `section` of recipe `file` < `flags`."""
    data: dict[str, Any] = {}
    if file is not None:
        data, _ = read_yaml(file)
        if any(key not in Recipe.model_fields for key in data):
            validated(Recipe, data, file=file)  # raises
        if section not in data:
            raise UsageError(f"{file}: no section '{section}'")
    values = data.get(section)
    if issubclass(config, ShardOptions):
        flags = {**_share_in_array({*flags, *(values if isinstance(values, dict) else ())}), **flags}
    return recipe_section(config, section, values, flags, file)


def read_recipe(file: Path, overrides: Iterable[str] = ()) -> Recipe:
    """A recipe for `distill`, with `section.key=value` overrides (values are YAML)."""
    data, _ = read_yaml(file)
    for override in overrides:
        path, equals, text = override.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise UsageError(f"--set {override}: expected section.key=value")
        target = data
        for key in keys[:-1]:
            target = target.setdefault(key, {})
            if not isinstance(target, dict):
                raise UsageError(f"--set {override}: '{key}' is not a section")
        target[keys[-1]] = yaml.safe_load(text)
    return validated(Recipe, data, file=file)


def slurm_share(environment: Mapping[str, str]) -> dict[str, int]:
    """The options of a worker of a SLURM job array; none outside an array.

    Raises:
        UsageError: the array's ids have gaps, or what SLURM says is not whole.
    """
    if "SLURM_ARRAY_TASK_ID" not in environment:
        return {}
    names = [f"SLURM_ARRAY_TASK_{what}" for what in ("ID", "MIN", "MAX", "STEP", "COUNT")]
    wrong = [name for name in names if not environment.get(name, "").isdecimal()]
    instead = "give --shard-index and --num-shards"
    if wrong:
        raise UsageError(f"{wrong[0]}={environment.get(wrong[0], '')}: expected a whole number; {instead}")
    id_, first, last, step, number = (int(environment[name]) for name in names)
    index, rest = divmod(id_ - first, max(step, 1))
    if step < 1 or rest or (last - first) // step + 1 != number or not 0 <= index < number:
        raise UsageError(
            f"SLURM array: {number} ids from {first} to {last} in steps of {step} have gaps, so that a worker's place "
            f"is not known; {instead}"
        )
    return {"shard_index": index, "num_shards": number}


def _share_in_array(given: set[str]) -> dict[str, int]:
    """What SLURM says about this worker's share, where nobody else does."""
    said = given & ShardOptions.model_fields.keys()
    if len(said) == 2 or not (share := slurm_share(os.environ)):
        return {}
    if said:
        raise UsageError("in a SLURM array give both --shard-index and --num-shards, or neither: then the array says")
    log.info(f"SLURM array: worker {share['shard_index'] + 1} of {share['num_shards']}")
    return share
