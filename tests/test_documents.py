"""The documents: links lead somewhere, commands and code are what the program takes, lists are complete.

Blocks are marked by their language, and each is held to it: `sh` is parsed by the real command line (and the run of
README.md happens, on tiny models), `python` is run, `json` are prompts, `yaml` is a recipe or some of its sections,
`text` is only shown.
"""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from helpers.tiny import rows, write_jsonl
from typer.core import TyperGroup

import dpkd_offline
from dpkd_offline.cli import app
from dpkd_offline.common import errors
from dpkd_offline.config.objectives import OBJECTIVES
from dpkd_offline.config.recipe import Recipe
from dpkd_offline.config.recipe_template import recipe_keys_table
from dpkd_offline.dataset.schema import PreferencePair, Prompt, Response, TopK
from dpkd_offline.pipeline.stages import plan
from dpkd_offline.prompts.columns import content_of, layouts_table
from dpkd_offline.prompts.sources import Row

ROOT = Path(__file__).parents[1]
README, DATA, PIPELINES, PACKAGE, BENCHMARKS = DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "data" / "README.md",
    ROOT / "pipelines" / "README.md",
    ROOT / "dpkd_offline" / "README.md",
    ROOT / "tests" / "benchmarks" / "README.md",
]
LONGEST_README = 12_500  # bytes

# The functions that the commands call.
STAGES = {
    "generate": "dpkd_offline.generation.generate.generate",
    "score-teacher": "dpkd_offline.generation.score_teacher.score_teacher",
    "train": "dpkd_offline.training.trainer.train",
    "evaluate": "dpkd_offline.evaluation.evaluate.evaluate",
    "judge": "dpkd_offline.evaluation.judge.judge",
    "init-student": "dpkd_offline.training.init_student.init_student",
    "distill": "dpkd_offline.pipeline.distill.distill",
    "distill --dry-run": "dpkd_offline.pipeline.dry_run.plan_of_work",
    "distill, of a study": "dpkd_offline.pipeline.study.run_study",
    "distill --dry-run, of a study": "dpkd_offline.pipeline.study_plan.plan_of_study",
    "verify": "dpkd_offline.curation.verify.verify",
    "report": "dpkd_offline.pipeline.report.report.report",
    "inspect": "dpkd_offline.curation.inspect.inspect",
    "merge": "dpkd_offline.curation.merge.merge",
    "subset": "dpkd_offline.curation.merge.subset",
    "export": "dpkd_offline.curation.export_pairs.export_pairs",
    "import": "dpkd_offline.curation.import_pairs.import_pairs",
    "push": "dpkd_offline.sharing.push.push",
    "pull": "dpkd_offline.sharing.pull.pull",
}
# What makes a command small enough for tiny models; options that are given twice count as the last says.
ENGINE = {"engine": "transformers", "dtype": "float32", "max_length": 256}
SMALL = {
    "generate": {**ENGINE, "max_new_tokens": 8},
    "score-teacher": ENGINE,
    "train": {"dtype": "float32", "max_steps": 2},
    "evaluate": {**ENGINE, "max_new_tokens": 8, "seeds": "1"},
    "init-student": {"layers": 2},
}


@dataclass(frozen=True)
class Block:
    """A fenced block of a document."""

    document: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{name_of(self.document)}:{self.line}"


def name_of(document: Path) -> str:
    return str(document.relative_to(ROOT))


def blocks(language: str, *documents: Path) -> list[Block]:
    fenced = []
    for document in documents or DOCUMENTS:
        text = document.read_text()
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            line = text[: match.start()].count("\n") + 1
            fenced.append(Block(document, line, match[1], match[2]))
    return [block for block in fenced if block.language == language]


def prose(document: Path) -> str:
    """The text without blocks and comments."""
    return re.sub(r"^```.*?^```$|<!--.*?-->", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)


def inline_code(document: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(document).replace("\\|", "|"))


def table_below(document: Path, heading: str) -> list[list[str]]:
    """The rows of the first table below a heading, cell by cell."""
    _, _, text = document.read_text().partition(f"\n## {heading}\n")
    lines = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert lines, f"{name_of(document)}: no table below '{heading}'"
    _, _, *body = (re.split(r"(?<!\\)\|", line.strip().strip("|")) for line in lines[0].splitlines())
    return [[cell.strip() for cell in row] for row in body]


def names_in(cells: list[str]) -> list[str]:
    """What the cells of a column name in backticks."""
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


# --- Links and names ---


def anchors(document: Path) -> list[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(document), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        if target.startswith(("https://", "http://")):
            continue
        file, _, anchor = target.partition("#")
        place = (document.parent / file).resolve() if file else document
        assert place.exists(), target
        if anchor:
            assert anchor in anchors(place), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_files_that_are_named_exist(document: Path) -> None:
    for code in inline_code(document):
        for path in re.findall(r"(?<![\w./-])[\w.-]+/[\w./-]+\.(?:py|yaml|sh|svg)\b", code):
            assert any((root / path).exists() for root in (ROOT, ROOT / "dpkd_offline", document.parent)), path


def test_every_document_is_linked_from_the_first_and_has_its_contents() -> None:
    text = prose(README)
    for document in DOCUMENTS[1:]:
        assert f"({name_of(document)})" in text
        listed = re.findall(r"^- \[.*\]\(#(.*)\)$", document.read_text(), re.MULTILINE)
        sections = [a for a in anchors(document) if a != anchors(document)[0]]
        assert listed == sections, name_of(document)


def test_the_readme_is_short() -> None:
    assert len(README.read_bytes()) <= LONGEST_README


# --- Lists ---


def test_the_tree_lists_every_file() -> None:
    (tree,) = (block.text for block in blocks("text", PACKAGE) if block.text.startswith("dpkd_offline/\n"))
    listed, folder = [], ""
    for indent, name, sentence in re.findall(r"^( +)(\S+) *(.*)$", tree, re.MULTILINE):
        if name.endswith("/"):
            folder = name
        else:
            assert sentence, f"{name}: nothing is said of it"
            listed.append(folder + name if len(indent) > 2 else name)
    package = ROOT / "dpkd_offline"
    files = [str(path.relative_to(package)) for path in package.rglob("*.py")]
    assert sorted(listed) == sorted(file for file in files if not file.endswith("/__init__.py"))


def test_the_columns_are_those_of_the_schema() -> None:
    shown = {
        place: set(columns.strip("`").split(", ")) for place, columns in table_below(DATA, "Columns of the tables")
    }
    for prefix, record in {
        "prompts/": Prompt,
        "responses/": Response,
        "pairs/": PreferencePair,
        "top_k/": TopK,
    }.items():
        (columns,) = (
            shown[place] for place in shown if place.startswith(f"`{prefix}") and "student/`" not in place[:20]
        )
        assert columns == set(record.schema.names)
    row = names_in([cells[0] for cells in table_below(README, "Your own models")])
    assert row == PreferencePair.schema.names


def test_every_objective_section_and_exit_code_is_listed() -> None:
    assert names_in([row[0] for row in table_below(PACKAGE, "Objectives")]) == list(OBJECTIVES)
    sections = {"teacher", "student", "output", "gpus"} | set(
        names_in([row[0] for row in table_below(PIPELINES, "The sections")])
    )
    assert sections == set(Recipe.model_fields)
    codes = {int(row[0]) for row in table_below(PIPELINES, "Exit codes")}
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.DpkdError)]
    assert codes == {0} | {c.exit_code for c in classes if c.exit_code != 1}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_options_in_sentences_exist(document: Path) -> None:
    program = typer.main.get_command(app)
    assert isinstance(program, TyperGroup)
    options = {
        option
        for command in program.commands.values()
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    for code in inline_code(document):
        if code.split()[0] in program.commands or code.startswith("--"):
            for option in re.findall(r"(?<!\S)--[a-z][a-z-]*", code):
                assert option in options | {"--help"}, code


@pytest.mark.parametrize(
    ("document", "name"), [(PIPELINES, "keys"), (DATA, "layouts"), (README, "memory"), (README, "disk")]
)
def test_tables_that_the_program_writes_are_what_it_writes(document: Path, name: str) -> None:
    estimates = runpy.run_path(str(BENCHMARKS.parent / "what_it_takes.py"))
    writers = {
        "keys": recipe_keys_table,
        "layouts": layouts_table,
        "memory": estimates["memory_table"],
        "disk": estimates["disk_table"],
    }
    _, _, shown = document.read_text().partition(f"<!-- {name}:begin -->\n")
    assert shown.partition(f"\n<!-- {name}:end -->")[0] == writers[name]()


# --- Blocks ---


def test_every_block_says_what_it_is() -> None:
    for document in DOCUMENTS:
        fences = re.findall(r"^```(.*)$", document.read_text(), re.MULTILINE)[::2]
        assert set(fences) <= {"sh", "python", "json", "yaml", "text"}, name_of(document)


@pytest.mark.parametrize("block", blocks("json"), ids=str)
def test_json_is_taken_as_prompts(block: Block) -> None:
    for line in block.text.splitlines():
        row = Row(str(block), json.loads(line))
        assert content_of(row).unused == ()


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_yaml_is_a_recipe(block: Block) -> None:
    """A whole one, or sections of one."""
    whole = {"teacher": "BIG", "student": "SMALL", "output": "o", "generate": {"prompts": "p"}}
    plan(Recipe.model_validate({**whole, **yaml.safe_load(block.text)}))


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a shell block, word by word, with the variables that it sets put in."""
    variables: dict[str, str] = {}
    for line in text.replace("\\\n", " ").splitlines():
        for part in line.split(" && "):
            words = [re.sub(r"\$(\w+)", lambda m: variables[m[1]], word) for word in shlex.split(part, comments=True)]
            if words and re.fullmatch(r"\w+=.*", words[0]):
                name, _, value = words[0].partition("=")
                variables[name] = value
            elif words:
                yield words


class _Reached(BaseException):
    """A command was accepted; what it would do is not done."""


def check_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Hold a command line to what it names: ours is parsed, with all its values; of others what is of this project."""
    program, *arguments = words
    if program in ("accelerate", "torchrun"):
        program, arguments = "dpkd-offline", arguments[arguments.index("dpkd_offline.cli") + 1 :]
    if program == "dpkd-offline":

        def reached(*_: Any, **__: Any) -> None:
            raise _Reached

        with monkeypatch.context() as patch:
            for stage in STAGES.values():
                patch.setattr(stage, reached)
            if "--init" in arguments:  # it writes a recipe and does no more
                app(args=arguments, standalone_mode=False)
                Path(arguments[1]).unlink()
                return
            with pytest.raises(_Reached):
                app(args=arguments, standalone_mode=False)
    elif program == "just":
        task = arguments[0] if arguments else "default"
        recipes = re.findall(r"^([\w-]+)(?: [^:\n]*)?:(?!=)", (ROOT / "justfile").read_text(), re.MULTILINE)
        assert task in recipes, f"just {task}"
    elif program == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        for package in arguments[1:]:
            name, _, extra = package.rstrip("]").partition("[")
            assert name in ("rust-just", project["name"])
            assert not extra or extra in project["optional-dependencies"]
    elif program == "python":
        assert (ROOT / arguments[0]).exists()
    else:
        assert words[:2] == ["vllm", "serve"]


@pytest.fixture
def recipe_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipes that commands of the documents name."""
    texts = [block.text for block in blocks("yaml", PIPELINES)]
    (tmp_path / "pipelines").symlink_to(ROOT / "pipelines")
    (tmp_path / "recipe.yaml").write_text(texts[0])
    (tmp_path / "study.yaml").write_text(next(text for text in texts if "\nstudents:" in text))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("block", blocks("sh"), ids=str)
def test_commands_are_accepted(block: Block, recipe_folder: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in commands(block.text):
        check_command(words, monkeypatch)


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_commands_in_sentences_are_accepted(
    document: Path, recipe_folder: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for code in inline_code(document):
        program, *rest = code.split()
        if (program == "dpkd-offline" and len(rest) > 1) or (program in ("just", "pip") and rest):
            for words in commands(code):
                check_command(words, monkeypatch)


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory, teachers: dict[str, Path]) -> Path:
    """A folder with what the documents call BIG, and the prompts that they name."""
    folder = tmp_path_factory.mktemp("workshop")
    shutil.copytree(teachers["llama"], folder / "BIG")
    write_jsonl(folder / "prompts.jsonl", rows(12))
    write_jsonl(folder / "held-out.jsonl", rows(16)[12:])
    return folder


def small(words: list[str]) -> list[str]:
    """A command, small enough for tiny models."""
    more = SMALL.get(words[0], {})
    return [*words, *(text for name, value in more.items() for text in ("--" + name.replace("_", "-"), str(value)))]


def test_the_run_of_the_readme_happens_as_it_says(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workshop)
    section = README.read_text().partition("## Your own models")[2].partition("\n## ")[0]
    for block in blocks("sh", README):
        if block.text in section:
            for _, *words in commands(block.text):
                app(args=small(words), standalone_mode=False)
    assert (workshop / "my-student" / "config.json").exists()
    assert (workshop / "results" / "results.json").exists()


def test_python_runs(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, block in enumerate(blocks("python")):
        folder = tmp_path / str(number)
        shutil.copytree(workshop / "BIG", folder / "BIG")
        shutil.copytree(workshop / "BIG", folder / "SMALL")
        for name in ("prompts.jsonl", "held-out.jsonl"):
            shutil.copy(workshop / name, folder / name)
        with monkeypatch.context() as patch:
            patch.chdir(folder)
            for command, options in SMALL.items():
                name = command.replace("-", "_")
                patch.setattr(dpkd_offline, name, partial(getattr(dpkd_offline, name), **options), raising=False)
            exec(compile(block.text, str(block), "exec"), {})
