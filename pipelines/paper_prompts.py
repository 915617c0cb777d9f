"""Turn the sets that the paper trains and evaluates on, as they are published, into prompt files.

usage: python pipelines/paper_prompts.py dolly    SOURCE FOLDER   writes train.jsonl, validation.jsonl, test.jsonl
       python pipelines/paper_prompts.py selfinst SOURCE FOLDER   writes selfinst.jsonl
       python pipelines/paper_prompts.py sni      SOURCE FOLDER   writes sni.jsonl

SOURCE is one of these (other files of rows that `generate` reads do, too, if they have the same columns):

dolly     databricks-dolly-15k.jsonl: `instruction`, `context`, `response`. 500 rows are test and 500 validation, drawn
          by a hash of the prompt: the same ones in whatever order the file is. The rest is train.
          MiniLLM's folder of raw.jsonl and valid.jsonl: `instruction`, `input`, `output`. valid.jsonl is test, since it
          is the DollyEval that MiniLLM published. The first 500 of raw.jsonl are validation, as in the code of DPKD's
          authors (--dev-num 500; MiniLLM's has 1000), and the rest is train.
selfinst  human_eval/user_oriented_instructions.jsonl of yizhongw/self-instruct: `instruction`, `instances`; 252 tasks.
          MiniLLM's valid.jsonl: `instruction`, `input`, `output`; the 242 of them that fit its context.
sni       a clone of allenai/natural-instructions: of the 119 tasks in splits/default/test_tasks.txt the first 100
          instances each, as Tk-Instruct evaluates. A folder of task files without that list, or one such file: all of
          them. MiniLLM's 11_/valid.jsonl. Of each only instances whose first reference has 11 words or more.

Every row that is written has `id`, `instruction`, `input` and `reference`. Rows without a reference are left out and
counted. MiniLLM's column `prompt` is dropped: it is Alpaca's template around the others (`--template alpaca`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from dpkd_offline.common.errors import DataError, DpkdError
from dpkd_offline.common.files import parse_json, read_bounded, write_atomically
from dpkd_offline.common.hashing import fingerprint
from dpkd_offline.prompts.sources import Row, check_text, read_rows, text_in

HELD_OUT = 500  # rows of Dolly that are test, and as many that are validation; the paper's numbers, after MiniLLM
FEWEST_WORDS = 11  # of a reference of S-NI
INSTANCES = 100  # of a task of S-NI
LARGEST_TASK = 1 << 29  # bytes


@dataclass(frozen=True)
class Task:
    """One row of a prompt file, and where it was."""

    place: str
    id: str
    instruction: str
    input: str
    references: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """Equal of rows that ask the same."""
        return fingerprint([self.instruction, self.input])

    @property
    def line(self) -> bytes:
        reference: str | list[str] = self.references[0] if len(self.references) == 1 else list(self.references)
        row = {"id": self.id, "instruction": self.instruction, "input": self.input, "reference": reference}
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"


# --- layouts --------------------------------------------------------------------------------------------------------


def task_of(row: Row, id: str) -> Task:
    """A row of Dolly, or of MiniLLM's files.

    Raises:
        DataError: it has other columns, or they hold something else.
    """
    input_column = "context" if "context" in row.columns else "input"
    output_column = "response" if "response" in row.columns else "output"
    for column in ("instruction", input_column, output_column):
        if column not in row.columns:
            raise DataError(
                f"{row.place}: column '{column}' is missing; the row has {', '.join(row.columns) or 'none'}"
            )
    references = references_of(row, output_column)
    return Task(row.place, id, instruction_of(row), (text_in(row, input_column) or "").strip(), references)


def user_oriented(row: Row) -> Iterator[Task]:
    """The tasks of a row of Self-Instruct's evaluation set: one for each of its instances."""
    instances = row.columns["instances"]
    if not isinstance(instances, list) or not instances or not all(isinstance(i, dict) for i in instances):
        raise DataError(f"{row.place}: column 'instances' must be a list of at least one object with input and output")
    id = text_in(row, "id") or f"selfinst-{row.place.rpartition(':')[2]}"
    for number, instance in enumerate(instances):
        name = id if len(instances) == 1 else f"{id}-{number}"
        task = Row(row.place, {"instruction": row.columns.get("instruction"), **instance})
        yield task_of(task, name)


def task_file(path: Path) -> Iterator[Task]:
    """The instances of a task of Super-Natural Instructions. Its file, and no other, is in memory."""
    values = parse_json(read_bounded(path, LARGEST_TASK), path)
    definition = values.get("Definition")  # a list of one string, of older releases a string
    lines = [definition] if isinstance(definition, str) else definition
    if not isinstance(lines, list) or not lines or not all(isinstance(line, str) for line in lines):
        raise DataError(f"{path}: 'Definition' must be a string, or a list of strings")
    if not isinstance(instances := values.get("Instances"), list):
        raise DataError(f"{path}: 'Instances' must be a list")
    for number, instance in enumerate(instances, start=1):
        place = f"{path}: instance {number}"
        if not isinstance(instance, dict):
            raise DataError(f"{place} must be an object with input and output")
        row = Row(place, {"instruction": "\n".join(lines), **instance})
        yield task_of(row, str(instance.get("id") or f"{path.stem}-{number}"))


def instruction_of(row: Row) -> str:
    text = (text_in(row, "instruction") or "").strip()
    if not text:
        raise DataError(f"{row.place}: column 'instruction' is empty")
    return text


def references_of(row: Row, column: str) -> tuple[str, ...]:
    """The references of a row that say anything; several are several right answers."""
    value: Any = row.columns[column]
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in values):
        raise DataError(f"{row.place}: column '{column}' must be a string or a list of strings")
    for text in values:
        check_text(text, f"{row.place}: column '{column}'")
    return tuple(text.strip() for text in values if text.strip())


# --- sets -----------------------------------------------------------------------------------------------------------


def dolly(source: Path, held_out: int) -> Iterator[tuple[str, Task]]:
    """Each row of Dolly with the name of its split."""
    if source.is_dir():
        return _published_split(source, held_out)
    return _drawn_split(source, held_out)


def _published_split(folder: Path, held_out: int) -> Iterator[tuple[str, Task]]:
    for name in ("raw.jsonl", "valid.jsonl"):
        if not (folder / name).is_file():
            raise DataError(f"{folder / name}: no such file; MiniLLM's Dolly is raw.jsonl and valid.jsonl")
    test = {task.prompt for task in _numbered(folder / "valid.jsonl", "dolly-test")}
    yield from (("test", task) for task in _numbered(folder / "valid.jsonl", "dolly-test"))
    for number, task in enumerate(_numbered(folder / "raw.jsonl", "dolly")):
        if task.prompt not in test:  # no prompt of the test set is trained on
            yield "validation" if number < held_out else "train", task


def _drawn_split(source: Path, held_out: int) -> Iterator[tuple[str, Task]]:
    """Reads the file twice: for the hashes of its prompts, and for its rows."""
    asked = Counter(task.prompt for task in _numbered(source, "dolly") if task.references)
    once = sorted(prompt for prompt, rows in asked.items() if rows == 1)  # who asks twice is in train with both rows
    if len(once) <= 2 * held_out:
        raise DataError(
            f"{source}: {len(once)} different prompts; {held_out} for test and {held_out} for validation leave none to "
            f"train on: is it all of Dolly? --held-out takes fewer"
        )
    test, validation = set(once[:held_out]), set(once[held_out : 2 * held_out])
    for task in _numbered(source, "dolly"):
        yield "test" if task.prompt in test else "validation" if task.prompt in validation else "train", task


def _numbered(source: Path, name: str) -> Iterator[Task]:
    """The rows of a file, called by their number in it."""
    return (task_of(row, f"{name}-{number:05d}") for number, row in enumerate(read_rows(source), start=1))


def selfinst(source: Path) -> Iterator[tuple[str, Task]]:
    for number, row in enumerate(read_rows(source), start=1):
        tasks = user_oriented(row) if "instances" in row.columns else [task_of(row, f"selfinst-{number:03d}")]
        yield from (("selfinst", task) for task in tasks)


def sni(source: Path) -> Iterator[tuple[str, Task]]:
    """The instances of the tasks that the set has, with references as long as the paper's."""
    for tasks in _tasks_of(source):
        yield from (("sni", task) for task in tasks if _is_long(task))


def _is_long(task: Task) -> bool:
    return len(next(iter(task.references), "").split()) >= FEWEST_WORDS


def _tasks_of(source: Path) -> Iterator[Iterable[Task]]:
    split = source / "splits" / "default" / "test_tasks.txt"
    if split.is_file():
        names = split.read_text(encoding="utf-8").split()
        files = [source / "tasks" / f"{name}.json" for name in names]
        if missing := [file for file in files if not file.is_file()]:
            raise DataError(f"{missing[0]}: no such file, and {split} names it")
        for file in files:
            yield islice(task_file(file), INSTANCES)
    elif source.is_dir() and (files := sorted(file for file in source.glob("*.json") if file.name[0] != ".")):
        for file in files:
            yield task_file(file)
    elif source.suffix == ".json":
        yield task_file(source)
    else:
        yield _numbered(source, "sni")


# --- files ----------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    split = {"dolly": partial(dolly, held_out=options.held_out), "selfinst": selfinst, "sni": sni}[options.set]
    names = ("train", "validation", "test") if options.set == "dolly" else (options.set,)
    try:
        for name in names:
            path = options.folder / f"{name}.jsonl"
            counts = Counter[str]()
            write_atomically(path, _lines(split(options.source), name, path, counts))
            left_out = f", {counts['left out']} without a reference left out" if counts["left out"] else ""
            print(f"{path}: {counts['rows']:,} rows{left_out}", file=sys.stderr)
    except DpkdError as error:
        print(f"paper_prompts.py: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _lines(tasks: Iterable[tuple[str, Task]], name: str, path: Path, counts: Counter[str]) -> Iterator[bytes]:
    """The lines of the file of one set, which are counted as they come."""
    places: dict[str, str] = {}
    for of, task in tasks:
        if of != name:
            continue
        if not task.references:
            counts["left out"] += 1
            continue
        if first := places.get(task.id):
            raise DataError(f"{task.place}: the id '{task.id}' is that of {first}, too")
        places[task.id] = task.place
        counts["rows"] += 1
        yield task.line
    if not counts["rows"]:
        raise DataError(f"{path}: the source has no row for it")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="paper_prompts.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("set", choices=("dolly", "selfinst", "sni"))
    parser.add_argument("source", type=Path, help="file or folder as it is published")
    parser.add_argument("folder", type=Path, help="where the prompt files go")
    parser.add_argument("--held-out", type=int, default=HELD_OUT, help="rows of Dolly's test, and of its validation")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
