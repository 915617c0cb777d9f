"""The command line: Typer wiring, and what becomes of errors. Flags and help come from the configs.

Stages are imported when a command runs: `--help` must not wait for torch.
"""

from __future__ import annotations

import sys

from dpkd_offline.common import process

if __name__ == "__main__" or sys.argv[0].endswith("/dpkd-offline"):  # a program, and not an import of this module
    process.begin()  # before the imports below, which take time

import inspect
import os
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from importlib.metadata import version
from json import dumps
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer
from typer.core import TyperCommand, TyperGroup

import dpkd_offline
from dpkd_offline.common import console
from dpkd_offline.common.errors import (
    DataError,
    DpkdError,
    ReaderGone,
    Stopped,
    StorageError,
    StudentRuined,
    UnavailableError,
    UsageError,
    is_out_of_memory,
    out_of_memory,
)
from dpkd_offline.common.secrets import remember_secrets
from dpkd_offline.config import base as configs
from dpkd_offline.config import data, evaluate, judge, report, train
from dpkd_offline.config.objectives import OBJECTIVES
from dpkd_offline.config.recipe import MissingKeys, Recipe, from_recipe, read_recipe, validated
from dpkd_offline.config.recipe_template import recipe_keys, recipe_template
from dpkd_offline.pipeline.distill import end_with_parent

STAGES, EXPERIMENT, DATASETS = "Stages of an experiment", "A whole experiment", "Datasets"
OWN, OTHER = configs.Config.panel, "Messages and help"
TABLES: dict[str, tuple[str, list[tuple[str, str]]]] = {  # what the help of a command lists besides its options
    "train": ("Objectives", [(info.name, f"{info.help} [{info.source}]") for info in OBJECTIVES.values()]),
    "distill": ("Keys of a recipe", recipe_keys()),
}
WIDEST = 120  # columns
FEW = 5  # choices that are listed beside their option


def _write_sections(formatter: Any, rows: Iterable[tuple[str | None, tuple[str, str]]]) -> None:
    """Write (heading, row) pairs as plain text, each heading once, in the order in which they come."""
    sections: dict[str, list[tuple[str, str]]] = {}
    for heading, row in rows:
        sections.setdefault(heading or OTHER, []).append(row)
    for heading, section in sections.items():
        with formatter.section(heading):
            formatter.write_dl(section, col_max=26)


class PlainCommand(TyperCommand):
    """A command whose options stand under headings, in text that is readable in 80 columns and in a pipe."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        shown = [param for param in self.get_params(ctx) if not getattr(param, "hidden", False)]
        _write_sections(formatter, ((getattr(p, "rich_help_panel", None), _row(p)) for p in shown))
        if self.name in TABLES:
            heading, rows = TABLES[self.name]
            _write_sections(formatter, ((heading, row) for row in rows))

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        arguments = [p for p in self.get_params(ctx) if p.param_type_name == "argument"]
        return ["[OPTIONS]", *(f"{p.metavar}..." if p.nargs == -1 else str(p.metavar) for p in arguments)]


class PlainGroup(TyperGroup):
    """The commands under headings."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        commands = [(name, self.commands[name]) for name in self.list_commands(ctx)]
        _write_sections(
            formatter,
            ((getattr(c, "rich_help_panel", None), (name, c.get_short_help_str(WIDEST))) for name, c in commands),
        )
        _write_sections(formatter, (("Options", _row(p)) for p in self.get_params(ctx)))


def _row(param: Any) -> tuple[str, str]:
    """How an option or argument is written, and its help."""
    if param.param_type_name == "argument":
        return str(param.metavar), param.help or ""
    names = ", ".join(sorted(param.opts, key=len))
    if param.secondary_opts:
        names = names.replace("--", "--[no-]", 1)
    return names if param.is_flag else f"{names} {param.metavar or ''}".rstrip(), param.help or ""


app = typer.Typer(
    cls=PlainGroup,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Distil language models offline with Direct Preference Knowledge Distillation (arXiv 2406.19774).\n\n"
    "First make the data: `generate` samples responses of teacher and student, `score-teacher` adds the teacher's "
    "log-probs. Then `train`, without the teacher. `distill` runs all of it from one recipe.",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": WIDEST},
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


# --- From the field of a config to an option ---


def _flag_type(annotation: Any) -> Any:
    """The type that Typer parses a field as; other values are text, which pydantic checks."""
    kinds = get_args(annotation) if type(None) in get_args(annotation) else (annotation,)
    return kinds[0] if kinds[0] in (int, float, bool, str, Path) else str


def _parameter(name: str, kind: Any, info: Any) -> inspect.Parameter:
    """A parameter of a command, as Typer reads it."""
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, info]
    )


def _argument(name: str, field: Any) -> inspect.Parameter:
    """A positional argument. Typer takes none as well, so that all that is missing is named together."""
    kind = list[str] if get_origin(field.annotation) is tuple else str
    argument = typer.Argument(metavar=name.upper(), help=field.description, rich_help_panel=OWN)
    return _parameter(name, kind, argument)


def _has_several(field: Any) -> bool:
    """Whether an option has several values, which it takes with commas or repeated."""
    return any(get_origin(kind) in (tuple, dict) for kind in (field.annotation, *get_args(field.annotation)))


def _choices(field: Any) -> list[str]:
    return [choice for choice in get_args(field.annotation) if isinstance(choice, str)]


def _help(field: Any) -> str:
    """What a field does, its choices, and its default."""
    text, choices, default = field.description or "", _choices(field), field.default
    if 0 < len(choices) <= FEW:
        text += f" [{'|'.join(choices)}]"
    if field.is_required():
        return f"{text} [required]"
    if isinstance(default, bool):
        default = "on" if default else "off"
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
    return text if shown in (None, "") else f"{text} [default: {shown}]"


def _joined(value: Any, field: Any) -> Any:
    """A value as its config takes it: several with commas between them, unless they are a list there."""
    return ",".join(value) if isinstance(value, list) and field.metadata else value


def _completed(name: str, field: Any) -> Callable[[str], list[tuple[str, str]]] | None:
    """What a shell completes a value to."""
    helps = {info.name: info.help for info in OBJECTIVES.values()} if name == "objective" else {}
    choices = _choices(field)
    if not choices:
        return None
    return lambda incomplete: [(c, helps.get(c, "")) for c in choices if c.startswith(incomplete)]


def _option(name: str, field: Any, panel: str) -> inspect.Parameter:
    """An option, which is none where the user does not give it: then a recipe or the config has the value."""
    flag, kind = "--" + name.replace("_", "-"), _flag_type(field.annotation)
    if kind is bool:
        flag += f"/--no-{name.replace('_', '-')}"
    if _has_several(field):
        kind = list[str]  # may be repeated, too
    metavar = {int: "N", float: "X", Path: "PATH", bool: None}.get(kind, "NAME" if _choices(field) else "TEXT")
    option = typer.Option(
        flag,
        help=_help(field),
        show_default=False,
        metavar=metavar,
        rich_help_panel=panel,
        autocompletion=_completed(name, field),
    )
    return _parameter(name, kind, option)


VERBOSE = typer.Option("--verbose", "-v", rich_help_panel=OTHER, help="Also show what the libraries say.")
QUIET = typer.Option("--quiet", "-q", rich_help_panel=OTHER, help="Show warnings and errors only.")
MESSAGES = (_parameter("verbose", bool, VERBOSE), _parameter("quiet", bool, QUIET))


def _set_verbosity(verbose: bool | None, quiet: bool | None) -> None:
    if verbose and quiet:
        raise UsageError("give --verbose or --quiet, not both")
    if verbose or quiet:
        console.set_verbosity("verbose" if verbose else "quiet")
    console.prepare_libraries()


# --- The commands ---


def _needs(command: str, arguments: tuple[str, ...], names: Iterable[str]) -> str:
    """What a command lacks, as the command line calls it."""
    shown = [n.upper() if n in arguments else "--" + n.replace("_", "-") for n in names]
    return f"{command} needs {configs.in_words(shown)}"


def _register(
    name: str,
    config: type[configs.Config],
    panel: str,
    *,
    arguments: tuple[str, ...] = (),
    stage: bool = False,
    show: Callable[..., object] = lambda config, result: result,
    extra: tuple[inspect.Parameter, ...] = (),
) -> None:
    """Add a command whose arguments and flags are the fields of its config.

    Args:
        arguments: the fields that are positional.
        stage: whether it is a stage of a recipe, so that it takes --config.
        show: what is printed of config and result, and of the flags that are `extra`.
    """
    section = name.replace("-", "_")
    function = {"import": "import_pairs", "export": "export_pairs"}.get(name, section)

    def command(**flags: Any) -> None:
        _set_verbosity(flags.pop("verbose"), flags.pop("quiet"))
        others = {parameter.name: flags.pop(parameter.name) for parameter in extra}
        recipe, place = flags.pop("config", None), flags.pop("section", None) or section
        values = {
            key: value if key in arguments else _joined(value, fields[key])
            for key, value in flags.items()
            if value is not None
        }
        try:
            settings = from_recipe(config, place, recipe, values) if stage else validated(config, values, as_flags=True)
        except MissingKeys as error:
            raise UsageError(_needs(name, arguments, error.names)) from error
        try:
            result = getattr(dpkd_offline, function)(settings)
        except Exception as error:
            if is_out_of_memory(error):
                raise out_of_memory(error, config.model_fields) from error
            raise
        shown = show(settings, result, **others)
        if shown is not None:
            console.result(shown)

    fields = config.fields_in_order()
    parameters = [
        *(_argument(n, fields[n]) for n in arguments),
        *(_option(n, field, config.panel_of(n)) for n, field in fields.items() if n not in arguments),
        *extra,
        *(_recipe_options(section) if stage else ()),
        *MESSAGES,
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__doc__ = config.__doc__
    app.command(name, cls=PlainCommand, rich_help_panel=panel)(command)


def _recipe_options(section: str) -> list[inspect.Parameter]:
    recipe = typer.Option(
        "--config",
        metavar="PATH",
        rich_help_panel="Recipe",
        help=f"Read options from section '{section}' of this recipe (YAML); flags win.",
    )
    other = typer.Option(
        "--section",
        metavar="NAME",
        rich_help_panel="Recipe",
        help="Read them from another section, such as sft for train.",
    )
    return [_parameter("config", Path, recipe), _parameter("section", str, other)]


GPUS = typer.Option("--gpus", metavar="N|auto", rich_help_panel=OWN, help="GPUs that every stage uses, as key gpus.")
ONLY = typer.Option(
    "--only", metavar="NAME,NAME", rich_help_panel=OWN, help="Of a recipe with students, train only these."
)


@app.command("distill", cls=PlainCommand, rich_help_panel=EXPERIMENT)
def _distill(
    recipe: Annotated[
        Path | None,
        typer.Argument(
            metavar="RECIPE", rich_help_panel=OWN, help="Recipe (YAML): one experiment, a section per stage."
        ),
    ] = None,
    init: Annotated[
        bool, typer.Option("--init", rich_help_panel=OWN, help="Write a commented recipe to RECIPE, or else to stdout.")
    ] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="SECTION.KEY=VALUE", rich_help_panel=OWN, help="Change a value; may be repeated."
        ),
    ] = None,
    gpus: Annotated[str, GPUS] = "",
    only: Annotated[list[str] | None, ONLY] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", rich_help_panel=OWN, help="Only print the stages, and how much each reads and writes at most."
        ),
    ] = False,
    verbose: Annotated[bool, VERBOSE] = False,
    quiet: Annotated[bool, QUIET] = False,
) -> None:
    """Run all stages of a recipe.

    Runs each in a process of its own and skips what is done. Prints a table of the teacher, and of the student before
    and after. Of a recipe with students, it trains each of them, on one dataset. Several such commands share the work.
    """
    from dpkd_offline.pipeline.distill import distill

    _set_verbosity(verbose, quiet)
    if init:
        _write_recipe(recipe)
        return
    if recipe is None:
        raise UsageError(_needs("distill", ("recipe",), ["recipe"]))
    values = read_recipe(recipe, [*(set_ or ()), *([f"gpus={gpus}"] if gpus else [])])
    names = [name.strip() for several in only or () for name in several.split(",") if name.strip()]
    if values.students is not None:
        _run_study(values, recipe, names, dry_run)
        return
    if names:
        raise UsageError(f"--only {','.join(names)}: is for a recipe with students, and {recipe} has none")
    if dry_run:
        from dpkd_offline.pipeline.dry_run import plan_of_work, table_of_work

        typer.echo(table_of_work(plan_of_work(values, recipe)))
        return
    result = distill(values, recipe)
    if values.evaluate is not None:
        typer.echo((values.output / "results.md").read_text(encoding="utf-8"), nl=False)
    console.info(f"student: {result}")
    console.info(f"page: {result.page}")
    if result.ruined:
        raise StudentRuined(result.ruined)


def _run_study(recipe: Recipe, file: Path, only: Sequence[str], dry_run: bool) -> None:
    from dpkd_offline.pipeline.study import run_study, study_of

    if dry_run:
        from dpkd_offline.pipeline.study_plan import plan_of_study, table_of_study

        study = study_of(recipe, file)
        study.selected(only)  # before prompts are read
        typer.echo(table_of_study(study, plan_of_study(study, file), only))
        return
    result = run_study(recipe, file, only)
    typer.echo((result.path / "results.md").read_text(encoding="utf-8"), nl=False)
    console.info(f"study: {result}")
    result.raise_failure()


def _write_recipe(file: Path | None) -> None:
    """Write a commented recipe to a new file, or to stdout."""
    if file is None:
        typer.echo(recipe_template(), nl=False)
        return
    try:
        with file.open("x", encoding="utf-8") as new:
            new.write(recipe_template())
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror or error}") from error
    typer.echo(file)


def _evaluation(config: evaluate.EvaluateConfig, results: Any) -> str:
    from dpkd_offline.evaluation.table import results_table

    return results_table({Path(config.model).name: results.results})


def _judgement(config: judge.JudgeConfig, result: Any, json: bool | None) -> str:
    from dpkd_offline.evaluation.judge import needs, summary

    if json:
        return dumps(result.results, indent=2)
    if config.dry_run:
        return needs(result.results)
    return summary(result.results, config.a.name, None if config.b is None else config.b.name)


def _verification(_: data.VerifyConfig, result: Any) -> str:
    return "\n".join(f"{table}: {count} rows, whole" for table, count in result.rows.items())


def _inspection(_: data.InspectConfig, inspection: Any, json: bool | None) -> str:
    from dpkd_offline.curation.inspect import inspection_table

    return dumps(inspection, indent=2) if json else inspection_table(inspection)


def _export(_: data.ExportConfig, result: Any) -> Any:
    return None if result.to_stdout else result


AS_JSON = _parameter("json", bool, typer.Option("--json", rich_help_panel=OTHER, help="Print JSON, for programs."))
_register("generate", data.GenerateConfig, STAGES, stage=True)
_register("score-teacher", data.ScoreTeacherConfig, STAGES, stage=True)
_register("train", train.TrainConfig, STAGES, stage=True)
_register("evaluate", evaluate.EvaluateConfig, STAGES, stage=True, show=_evaluation)
_register("judge", judge.JudgeConfig, STAGES, arguments=("a", "b"), stage=True, show=_judgement, extra=(AS_JSON,))
_register("init-student", train.InitStudentConfig, STAGES, stage=True)
_register("report", report.ReportConfig, EXPERIMENT, arguments=("folder",))
_register("verify", data.VerifyConfig, DATASETS, arguments=("dataset",), show=_verification)
_register("inspect", data.InspectConfig, DATASETS, arguments=("dataset",), show=_inspection, extra=(AS_JSON,))
_register("push", data.PushConfig, DATASETS, arguments=("dataset", "to"))
_register("pull", data.PullConfig, DATASETS, arguments=("url", "dataset"))
_register("merge", data.MergeConfig, DATASETS, arguments=("output", "parts"))
_register("subset", data.SubsetConfig, DATASETS, arguments=("dataset", "output"), stage=True)
_register("import", data.ImportConfig, DATASETS, arguments=("source",))
_register("export", data.ExportConfig, DATASETS, arguments=("dataset", "output"), show=_export)


# --- The process ---


def _check_arguments(arguments: Iterable[str]) -> None:
    """Raise DataError where one is not text: a name of a file goes into records, which are UTF-8."""
    for number, argument in enumerate(arguments, start=1):
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"argument {number}, {os.fsencode(argument)!r}, is not UTF-8 text; rename what it names"
            ) from error


def _known(error: Exception) -> DpkdError | None:
    """What is no bug of ours: the machine's, or of what is installed there. Everything else keeps its traceback."""
    if is_out_of_memory(error):
        return out_of_memory(error, ())
    if isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
        return DataError(f"a name is not UTF-8 text: {os.fsencode(error.object[-200:])!r}; rename what it names")
    if isinstance(error, OSError) and error.errno:
        place = f"{error.filename}: " if error.filename is not None else ""
        return StorageError(f"{place}{error.strerror}; the same command goes on once this is mended")
    if type(error).__module__ == "sqlite3":
        return StorageError(f"the folder of temporary files: {error}; TMPDIR names another one")
    if isinstance(error, ImportError) and not (error.name or "dpkd_offline").startswith("dpkd_offline"):
        return UnavailableError(f"a package that is needed cannot be imported: {error}")
    return None


def _ended(error: Exception) -> tuple[str, int]:
    """What is said of an error, and the exit code."""
    if isinstance(error, DpkdError):
        return str(error), error.exit_code
    if isinstance(error, typer.TyperException):
        close = getattr(error, "possibilities", None)
        return (f"{error.message}; did you mean '{close[0]}'?" if close else error.format_message()), 2
    known = _known(error)
    if known is None or console.is_verbose():
        traceback.print_exception(error)
    return ("", 1) if known is None else (str(known), known.exit_code)


def _run(arguments: list[str]) -> int:
    """Run a command and return its exit code; of a known error one line is left on stderr, never a traceback."""
    try:
        _check_arguments(arguments)
        code = int(app(args=arguments, prog_name="dpkd-offline", standalone_mode=False) or 0)
    except ReaderGone:
        raise
    except Exception as error:
        message, code = _ended(error)
        if message:
            console.error(message)
    sys.stdout.flush()
    return code


def main() -> None:
    """Run a command, and end the process with its exit code."""
    try:
        process.catch_signals()
        remember_secrets(" ".join(sys.argv))
        end_with_parent()
        code = _run(sys.argv[1:] or ["--help"])
        process.done(code)
    except ReaderGone:
        process.die_of_closed_pipe()
    except (Stopped, StorageError) as error:  # by a signal; or what is printed cannot be written
        code = StorageError.exit_code
        process.done(code)
        with suppress(DpkdError):  # stderr cannot be written either
            console.error(str(error))
    sys.exit(code)


if __name__ == "__main__":
    main()
