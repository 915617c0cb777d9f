"""Where the rows of a source lie: in files, in folders of these, in a dataset that `datasets` loads by name."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from dpkd_offline.common import console
from dpkd_offline.common.errors import DataError, DpkdError, UnavailableError, UsageError, first_line
from dpkd_offline.common.files import read_json
from dpkd_offline.common.locations import Location, is_url
from dpkd_offline.prompts.containers import check_names, printable, reader_of

FORMS = ".jsonl, .json, .csv, .tsv (also packed, as .gz or .zst), .parquet or .arrow"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[\w.-]{1,96})?")
OF_A_SPLIT = re.compile(r"(?:^|[-._ ])(train|training|validation|valid|val|dev|test|testing|eval)(?:[-._ 0-9]|$)")
METADATA = {"dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json"}  # beside rows, by `datasets`
SHOWN_FILES = 5
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz", ".7z", ".rar")
LONGEST_CARD = 1 << 20


@dataclass(frozen=True)
class Row:
    """One row of a source, and where it stands."""

    place: str  # file:line
    columns: dict[str, Any]
    fault: DataError | None = None  # why it has no columns
    unread: dict[str, Any] = field(default_factory=dict)  # columns that a user chose not to read
    file: str = ""  # as the source calls it: its name, in a folder its path there; none of a dataset loaded by name


class _Parts(NamedTuple):
    """The parts of NAME[@CONFIG][:SPLIT], of which the name may be that of a folder."""

    name: str
    config: str
    split: str


def read_rows(source: str | Location, *, keep_wrong: bool = False) -> Iterator[Row]:
    """The rows of a file, of a folder of files, or of a `datasets` NAME[@CONFIG][:SPLIT].

    Of a folder, which files are taken is said once.

    Args:
        keep_wrong: rows that cannot be read come out in their turn, with their fault, instead of its being raised.

    Raises:
        DataError: there is no such file, or it, or a row of it, cannot be read.
        UsageError: what lies there is no source of rows.
        UnavailableError: a named dataset cannot be loaded.
    """
    for row in _rows(source):
        if row.fault and not keep_wrong:
            raise row.fault
        yield row


def _rows(source: str | Location) -> Iterator[Row]:
    parts = _parts(source) if isinstance(source, str) else _Parts(str(source), "", "")
    place = Path(parts.name) if isinstance(source, str) else source
    if os.path.isdir(place) if isinstance(place, Path) else place.is_dir():  # the former takes any name
        for file in _files_of(place, parts):
            yield from _rows_of_file(file, _within(file, place))
    elif isinstance(source, str) and not is_path(source):
        yield from _named(source)
    elif parts.config or parts.split:
        raise UsageError(f"{source}: only a folder, or a dataset that is loaded by name, has configs and splits")
    else:
        yield from _rows_of_file(place, printable(Path(place.name)))


def _within(file: Location, folder: Location) -> str:
    """The path of a file in a folder."""
    return printable(Path(os.path.relpath(str(file), str(folder))))


def _rows_of_file(path: Location, called: str) -> Iterator[Row]:
    reader, name = reader_of(path), printable(path)
    exists = os.path.lexists(path) if isinstance(path, Path) else reader is not None or path.exists()
    if not exists:
        raise DataError(f"{name}: no such file or folder")
    if isinstance(path, Path) and not os.path.isfile(path):
        what = "no regular file" if os.path.exists(path) else "a link to nothing"
        raise UsageError(f"{name}: {what}; a source of rows is a file, a folder of files, or the name of a dataset")
    if name.lower().endswith(ARCHIVES):
        raise UsageError(f"{name}: an archive; unpack it, and name the file or the folder that comes out")
    if reader is None:
        raise UsageError(f"{name}: its name must end with {FORMS}; save it, or unpack it, as one of these")
    for number, columns in reader(path):
        place = f"{name}:{number}"
        row = Row(place, {}, columns) if isinstance(columns, DataError) else Row(place, columns)
        yield replace(row, file=called)


# --- names ----------------------------------------------------------------------------------------------------------


def _parts(source: str) -> _Parts:
    """A source whose whole name is that of a file stays whole."""
    name, config, split = source, "", ""
    if not os.path.lexists(name):
        name, _, split = _cut(name, ":")
    if not os.path.lexists(name):
        name, _, config = _cut(name, "@")
    return _Parts(name, config, split)


def _cut(name: str, mark: str) -> tuple[str, str, str]:
    """As str.partition, at the first mark behind the last slash."""
    folder, slash, last = name.rpartition("/")
    before, mark, after = last.partition(mark)
    return folder + slash + before, mark, after


def is_path(source: str) -> bool:
    """Whether a source can only lie on this machine: not be a dataset that is loaded by its name."""
    name = _parts(source).name
    if os.path.lexists(name) or reader_of(Path(name)) is not None or not HUB_NAME.fullmatch(name):
        return True
    return "/" in name and os.path.isdir(Path(name).parent)


def is_missing(source: str) -> bool:
    """Whether a source is a path where nothing lies."""
    return is_path(source) and not os.path.lexists(_parts(source).name)


def source_name(source: str | Location) -> str:
    """What a source is called, without where it lies."""
    if isinstance(source, str) and not is_path(source):
        return source
    return printable(Path(Path(str(source)).name))


# --- folders --------------------------------------------------------------------------------------------------------


def _files_of(folder: Location, parts: _Parts) -> list[Location]:
    """The files of a folder that are taken, in the order of their names: its own, else those of a split below it."""
    name, children = printable(folder), _children(folder)
    if "dataset_dict.json" in children:  # saved by `datasets`, a folder for each split
        splits = read_json(children["dataset_dict.json"]).get("splits")
        if not isinstance(splits, list) or not splits or not all(isinstance(split, str) for split in splits):
            raise DataError(f"{printable(children['dataset_dict.json'])}: 'splits' is no list of names")
        split = _chosen(name, splits, parts)
        if split not in children:
            raise DataError(f"{name}: dataset_dict.json names the split {split!r}, and there is no such folder")
        return _files_of(children[split], _Parts(parts.name, "", ""))
    if {"dataset.json", "prompts"} <= children.keys():
        raise UsageError(f"{name}: a dataset of this program; its prompts are the rows of {name}/prompts")
    if not parts.split and not parts.config:
        files = [child for key, child in children.items() if reader_of(child) is not None and key not in METADATA]
        files = [file for file in files if not file.is_dir()]
        if "state.json" in children and "dataset_info.json" in children:
            files = _saved_files(children)
        if files and not _has_configs(children.get("README.md")):
            _say_files(name, [file.name for file in files], [c for c in children if children[c] not in files])
            return files
    if isinstance(folder, Path):
        return list(_files_of_split(folder, parts))
    raise DataError(f"{name}: no file of rows in this folder, such as {FORMS}; name one of {_some(list(children))}")


def _children(folder: Location) -> dict[str, Location]:
    """What a folder holds but hidden files and what describes others, sorted by name."""
    try:
        children: list[Location] = sorted(folder.iterdir(), key=str)
    except OSError as error:
        raise DataError(f"{printable(folder)}: {error.strerror or error}") from error
    return {child.name: child for child in children if not child.name.startswith((".", "_"))}


def _has_configs(card: Location | None) -> bool:
    """Whether a card says which files are which split, as those of the Hub do. It is asked of this machine's alone."""
    if not isinstance(card, Path) or not card.is_file():
        return False
    with card.open(encoding="utf-8", errors="replace") as file:
        front, mark, _ = file.read(LONGEST_CARD)[3:].partition("\n---")
    return bool(mark) and re.search(r"^configs:", front, re.MULTILINE) is not None


def _saved_files(children: Mapping[str, Location]) -> list[Location]:
    """The files that `Dataset.save_to_disk` says it wrote; others beside them are older."""
    state = read_json(children["state.json"])
    try:
        return [children[file["filename"]] for file in state["_data_files"]]
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{printable(children['state.json'])}: '_data_files' does not name files of this folder"
        ) from error


def _chosen(name: str, splits: Sequence[str], parts: _Parts) -> str:
    """The split that is asked for, or else `train`, where a folder has it."""
    split = parts.split or ("train" if "train" in splits or len(splits) != 1 else splits[0])
    mark = "/" if is_url(name) else ":"  # at a URL a split is a folder
    if split not in splits:
        raise UsageError(
            f"{name}: no split '{split}'; there are {', '.join(splits)}: take {name}{mark}{splits[0]}, say"
        )
    if not parts.split and len(splits) > 1:
        _say(
            f"{name}: the split '{split}' is taken, of {', '.join(splits)}; {name}{mark}{splits[-1]} would take another"
        )
    return split


def _files_of_split(folder: Path, parts: _Parts) -> list[Path]:
    """The files of a split where `datasets` finds them: by the names of files and folders, or by a card."""
    import datasets

    name = printable(folder)
    try:
        builder = datasets.load_dataset_builder(str(folder), parts.config or None)
        by_split = {str(split): list(map(str, files)) for split, files in (builder.config.data_files or {}).items()}
    except Exception as error:  # whatever a card, or a file of another kind, leads to
        raise DataError(
            f"{name}: no file of rows in this folder, and `datasets` finds none below it ({first_line(error)}); name a "
            f"file, or the folder that has some"
        ) from error
    files = [Path(os.path.abspath(file)) for file in by_split[_chosen(name, list(by_split), parts)]]
    root = os.path.abspath(folder)
    if strange := [file for file in files if not file.is_relative_to(root)]:
        raise DataError(f"{name}: its card names {printable(strange[0])}, which does not lie in it")
    _say_files(name, [str(file.relative_to(root)) for file in files], [])
    return files


def _say_files(name: str, files: Sequence[str], others: Sequence[str]) -> None:
    """Which files of a folder are taken; a warning where these are several splits."""
    names = [printable(Path(file)) for file in files]
    others = [printable(Path(other)) for other in others if other not in METADATA]
    _say(f"{name}: {_some(names)}" + (f"; not read: {_some(others)}" if others else ""))
    splits = sorted({word for file in names for word in OF_A_SPLIT.findall(file.rsplit("/")[-1].lower())})
    if len(splits) > 1:
        _say(
            f"warning: {name}: the splits {' and '.join(splits)} are read as one; {name}:{splits[-1]} takes one of them"
        )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN_FILES} more" if len(names) > SHOWN_FILES else ""
    return (", ".join(names[:SHOWN_FILES]) or "nothing") + more


@cache
def _say(line: str) -> None:
    """Said once in a process: a corpus is read again each epoch."""
    console.info(line)


# --- datasets by name -----------------------------------------------------------------------------------------------


def _named(source: str) -> Iterator[Row]:
    import datasets

    name, config, split = _parts(source)
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        check_names(rows.column_names or [], source)
        for number, columns in enumerate(rows, start=1):
            yield Row(f"{source}:{number}", columns)
    except DpkdError:
        raise
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UnavailableError(
            f"'{source}': neither a file nor a dataset that can be loaded: {first_line(error)[:200]}"
        ) from error


# --- text -----------------------------------------------------------------------------------------------------------


def text_in(row: Row, column: str) -> str | None:
    value = row.columns.get(column)
    if value is not None and not isinstance(value, str):
        raise DataError(f"{row.place}: column '{column}' must be a string, it is {type(value).__name__}")
    check_text(value, f"{row.place}: column '{column}'")
    return value


def check_text(text: str | None, place: str) -> None:
    """A DataError for text with a character that is none."""
    if text and "\0" in text:
        raise DataError(f"{place} holds the character NUL (\\u0000), which is no text; take it out")


def read_texts(source: str | Location, column: str = "text") -> Iterator[str]:
    """The texts of a corpus: the same kinds of source, one column."""
    for row in read_rows(source):
        text = text_in(row, column)
        if text is None:
            raise DataError(f"{row.place}: column '{column}' is missing")
        yield text
