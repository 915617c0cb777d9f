"""The command line: Typer wiring and nothing else. Flags and help come from the configs."""

from __future__ import annotations

import inspect
import json
import os
import signal
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer

from dpkd_offline.common import console
from dpkd_offline.common.errors import DpkdError, Interrupted, StudentRuined, UsageError
from dpkd_offline.common.locations import is_url, located
from dpkd_offline.config import base as configs
from dpkd_offline.config import data, evaluate, train
from dpkd_offline.config.recipe import from_recipe, read_recipe, validated
from dpkd_offline.pipeline.distill import end_with_parent

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Distil language models offline with Direct Preference Knowledge Distillation (arXiv 2406.19774).\n\n"
    "First the data: `generate` samples responses of teacher and student, `score-teacher` adds the teacher's "
    "log-probs. Then `train`, without the teacher. `distill` runs all of it from one recipe.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"dpkd-offline {version('dpkd-offline')}")
        raise typer.Exit


@app.callback()
def _root(
    _: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def _flag_type(annotation: Any) -> Any:
    """The type that Typer parses a field as; what it cannot say is text, and pydantic's to check."""
    kinds = get_args(annotation) if type(None) in get_args(annotation) else (annotation,)
    return kinds[0] if kinds[0] in (int, float, bool, str, Path) else str


def _argument(name: str, field: Any) -> inspect.Parameter:
    kind = list[str] if get_origin(field.annotation) is tuple else str
    argument = typer.Argument(metavar=name.upper(), help=field.description, show_default=False)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[kind, argument])


def _option(name: str, field: Any) -> inspect.Parameter:
    flag = "--" + name.replace("_", "-")
    help_ = field.description or ""
    choices = [c for c in get_args(field.annotation) if isinstance(c, str)]
    kind = _flag_type(field.annotation)
    if choices:
        help_ += f" [{'|'.join(choices)}]"
    if field.is_required():
        help_ += " [required]"
    elif field.default is not None and not isinstance(field.default, bool):
        shown = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        help_ += f" [default: {shown}]"
    elif isinstance(field.default, bool):
        help_ += f" [default: {'on' if field.default else 'off'}]"
        flag += f"/--no-{name.replace('_', '-')}"
    option = typer.Option(flag, help=help_, show_default=False)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _given(flags: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in flags.items() if value is not None}


def _register(name: str, config: type[configs.Config], parameters: list[Any], command: Callable[..., None]) -> None:
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__doc__ = config.__doc__
    app.command(name)(command)


def _tool(name: str, config: type[configs.Config], run: Callable[[Any], None], arguments: tuple[str, ...]) -> None:
    """Register a command that is no stage of a recipe: the fields of its config are arguments and flags."""
    parameters = [
        _argument(field_name, field) if field_name in arguments else _option(field_name, field)
        for field_name, field in config.model_fields.items()
    ]
    parameters.sort(key=lambda p: p.name not in arguments)
    _register(name, config, parameters, lambda **flags: run(validated(config, _given(flags))))


def _command(name: str, config: type[configs.Config], run: Callable[[Any], None]) -> None:
    """Register a command whose flags are the fields of its config."""
    section = name.replace("-", "_")

    def command(**flags: Any) -> None:
        recipe, key = flags.pop("config"), flags.pop("section") or section
        run(from_recipe(config, key, recipe, _given(flags)))

    recipe_option = typer.Option("--config", help=f"Recipe (YAML) whose section '{section}' is read; flags win.")
    section_option = typer.Option("--section", help="Another section of the recipe, such as sft for train.")
    parameters = [
        *(_option(field_name, field) for field_name, field in config.model_fields.items()),
        inspect.Parameter(
            "config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[Path | None, recipe_option]
        ),
        inspect.Parameter(
            "section", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, section_option]
        ),
    ]
    _register(name, config, parameters, command)


# Stages are imported when a command runs: `--help` must not wait for torch.


def _generate(config: data.GenerateConfig) -> None:
    from dpkd_offline.generation.generate import generate

    typer.echo(generate(config))


def _score_teacher(config: data.ScoreTeacherConfig) -> None:
    from dpkd_offline.generation.score_teacher import score_teacher

    typer.echo(score_teacher(config))


def _train(config: train.TrainConfig) -> None:
    from dpkd_offline.training.trainer import train

    console.result(train(config))


def _evaluate(config: evaluate.EvaluateConfig) -> None:
    from dpkd_offline.evaluation.evaluate import evaluate
    from dpkd_offline.evaluation.table import results_table

    typer.echo(results_table({Path(config.model).name: evaluate(config)}))


def _init_student(config: train.InitStudentConfig) -> None:
    from dpkd_offline.training.init_student import init_student

    typer.echo(init_student(config))


def _import(config: data.ImportConfig) -> None:
    from dpkd_offline.curation.import_pairs import import_pairs

    typer.echo(import_pairs(config))


def _export(config: data.ExportConfig) -> None:
    from dpkd_offline.curation.export_pairs import export_pairs

    if (output := export_pairs(config)) is not None:
        typer.echo(output)


def _merge(config: data.MergeConfig) -> None:
    from dpkd_offline.curation.merge import merge

    typer.echo(merge(config))


def _subset(config: data.SubsetConfig) -> None:
    from dpkd_offline.curation.merge import subset

    typer.echo(subset(config))


_command("generate", data.GenerateConfig, _generate)
_command("score-teacher", data.ScoreTeacherConfig, _score_teacher)
_command("train", train.TrainConfig, _train)
_command("evaluate", evaluate.EvaluateConfig, _evaluate)
_command("init-student", train.InitStudentConfig, _init_student)
_tool("import", data.ImportConfig, _import, arguments=("source",))
_tool("export", data.ExportConfig, _export, arguments=("dataset", "output"))
_tool("merge", data.MergeConfig, _merge, arguments=("output", "parts"))
_tool("subset", data.SubsetConfig, _subset, arguments=("dataset", "output"))


@app.command("distill")
def _distill(
    recipe: Annotated[Path, typer.Argument(help="Recipe (YAML): one experiment, a section per stage.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a value; may be repeated.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print the stages, with what each is going to read and write.")
    ] = False,
) -> None:
    """Run all stages of a recipe.

    Each in a process of its own, skipping what is done. Prints a table of teacher, student before and student after.
    """
    from dpkd_offline.pipeline.distill import distill

    values = read_recipe(recipe, set_ or ())
    if dry_run:
        from dpkd_offline.pipeline.dry_run import plan_of_work, table_of_work

        typer.echo(table_of_work(plan_of_work(values, recipe)))
        return
    student = distill(values, recipe)
    if values.evaluate is not None:
        typer.echo((values.output / "results.md").read_text(encoding="utf-8"), nl=False)
    typer.echo(f"student: {student}", err=True)
    if student.ruined:
        raise StudentRuined(student.ruined)


DATASET = Annotated[str, typer.Argument(metavar="DIR", help="The dataset directory, or the URL of one.")]


@app.command("verify")
def _verify(dataset: DATASET) -> None:
    """Check that a dataset is whole.

    Hashes, schemas, every value, and that prompts, responses and pairs are of each other.
    """
    from dpkd_offline.curation.verify import verify

    for table, rows in verify(located(dataset)).items():
        typer.echo(f"{table}: {rows} rows, whole")


@app.command("inspect")
def _inspect(
    dataset: DATASET,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show what a dataset holds.

    Counts, lengths, truncation, the teacher's log-probs and margin, and who made each table.
    """
    from dpkd_offline.curation.inspect import inspect as inspect_dataset
    from dpkd_offline.curation.inspect import inspection_table

    found = inspect_dataset(located(dataset))
    typer.echo(json.dumps(found, indent=2) if as_json else inspection_table(found))


@app.command("push")
def _push(
    dataset: Annotated[str, typer.Argument(metavar="DIR", help="The dataset directory.")],
    to: Annotated[
        str, typer.Argument(metavar="URL", help="hf://datasets/OWNER/NAME[@BRANCH], s3://, gs://, ... or a folder.")
    ],
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private, where the Hub has none of that name.")
    ] = False,
) -> None:
    """Bring a dataset to other teams.

    Only what is not there yet travels; what is committed there stays. On the Hub all of it is one commit.
    """
    from dpkd_offline.sharing.push import push

    typer.echo(push(_folder(dataset), to, private=private))


@app.command("pull")
def _pull(
    url: Annotated[
        str, typer.Argument(metavar="URL", help="hf://datasets/OWNER/NAME[@REVISION], s3://, gs://, ... or a folder.")
    ],
    dataset: Annotated[str, typer.Argument(metavar="DIR", help="The dataset directory; it may hold a part already.")],
    table: Annotated[
        list[str] | None, typer.Option(help="A table, such as pairs or responses/teacher; may be repeated.")
    ] = None,
    round: Annotated[int | None, typer.Option(help="Of tables that have rounds, only this one.")] = None,
) -> None:
    """Bring a dataset of another team here.

    All of it, or some tables with what they need. Every shard is held against its hash before it has its name.
    """
    from dpkd_offline.sharing.pull import pull

    typer.echo(pull(url, _folder(dataset), table or (), round))


def _folder(place: str) -> Path:
    if is_url(place):
        raise UsageError(f"{located(place)}: a folder on this machine is needed")
    return Path(place)


def _end(message: str, code: int) -> None:
    if message:
        shown = "".join(c if c.isprintable() else "?" for c in " ".join(message.split()))  # it may quote anything
        sys.stderr.write(f"dpkd-offline: {shown}\n")
    sys.stdout.flush()
    sys.exit(code)


def _interrupt(number: int, _: object) -> None:
    name = signal.Signals(number).name
    raise Interrupted(f"stopped by {name}; the same command goes on from what is committed")


def main() -> None:
    """Run a command: a known error is one line on stderr and its exit code, never a traceback."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    end_with_parent()
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # the last two are what a cluster sends
        signal.signal(name, _interrupt)
    try:
        code = app(args=sys.argv[1:] or ["--help"], standalone_mode=False)
    except DpkdError as error:
        _end(str(error), error.exit_code)
    except typer.TyperException as error:
        _end(error.format_message(), 2)
    else:
        sys.exit(code or 0)


if __name__ == "__main__":
    main()
