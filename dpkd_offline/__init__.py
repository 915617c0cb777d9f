"""dpkd-offline: Direct Preference Knowledge Distillation, data first, then training (arXiv 2406.19774).

    import dpkd_offline as d

    d.generate(dataset="my-data", role="teacher", model="BIG", prompts="prompts.jsonl")
    d.generate(dataset="my-data", role="student", model="SMALL")
    d.score_teacher(dataset="my-data", model="BIG")
    d.train(dataset="my-data", student="SMALL", output="my-student")

Each command of the command line is a function. Its keywords are the command's options, with _ for -; or give it a
config as the single positional argument. `help(d.train)` lists them. A wrong keyword raises UsageError, a ValueError.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, overload

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from inspect import Signature
    from os import PathLike

    from dpkd_offline.config.base import Config
    from dpkd_offline.config.data import (
        ExportConfig,
        GenerateConfig,
        ImportConfig,
        InspectConfig,
        MergeConfig,
        PullConfig,
        PushConfig,
        ScoreTeacherConfig,
        SubsetConfig,
        VerifyConfig,
    )
    from dpkd_offline.config.evaluate import EvaluateConfig
    from dpkd_offline.config.judge import JudgeConfig
    from dpkd_offline.config.recipe import Recipe
    from dpkd_offline.config.report import ReportConfig
    from dpkd_offline.config.train import InitStudentConfig, TrainConfig
    from dpkd_offline.curation import export_pairs as _export_pairs
    from dpkd_offline.curation import import_pairs as _import_pairs
    from dpkd_offline.curation import merge as _merge
    from dpkd_offline.curation.verify import VerifyResult
    from dpkd_offline.evaluation import evaluate as _evaluate
    from dpkd_offline.evaluation import judge as _judge
    from dpkd_offline.generation import generate as _generate
    from dpkd_offline.generation import score_teacher as _score_teacher
    from dpkd_offline.pipeline.distill import DistillResult
    from dpkd_offline.pipeline.report import report as _report
    from dpkd_offline.pipeline.study import StudyResult
    from dpkd_offline.sharing.pull import PullResult
    from dpkd_offline.sharing.push import PushResult
    from dpkd_offline.training import init_student as _init_student
    from dpkd_offline.training import trainer as _trainer
    from dpkd_offline.training.losses import dpkd_loss

    C = TypeVar("C", contravariant=True)
    R = TypeVar("R", covariant=True)

    class Command(Protocol[C, R]):
        """A command: takes its config, or the config's fields as keywords."""

        @overload
        def __call__(self, config: C, /) -> R: ...
        @overload
        def __call__(self, **settings: Any) -> R: ...

    def _typed(run: Callable[[C], R]) -> Command[C, R]: ...

    generate = _typed(_generate.generate)
    score_teacher = _typed(_score_teacher.score_teacher)
    train = _typed(_trainer.train)
    evaluate = _typed(_evaluate.evaluate)
    judge = _typed(_judge.judge)
    init_student = _typed(_init_student.init_student)
    report = _typed(_report.report)
    merge = _typed(_merge.merge)
    subset = _typed(_merge.subset)
    export_pairs = _typed(_export_pairs.export_pairs)
    import_pairs = _typed(_import_pairs.import_pairs)
    verify: Command[VerifyConfig, VerifyResult]
    inspect: Command[InspectConfig, dict[str, Any]]
    push: Command[PushConfig, PushResult]
    pull: Command[PullConfig, PullResult]


def _verify(config: VerifyConfig) -> VerifyResult:
    from dpkd_offline.curation.verify import verify

    return verify(config.dataset)


def _inspect(config: InspectConfig) -> dict[str, Any]:
    from dpkd_offline.curation.inspect import inspect

    return inspect(config.dataset, config.samples)


def _push(config: PushConfig) -> PushResult:
    from dpkd_offline.sharing.push import push

    return push(config.dataset, config.to, private=config.private)


def _pull(config: PullConfig) -> PullResult:
    from dpkd_offline.sharing.pull import pull

    return pull(config.url, config.dataset, config.table, config.round)


# Everything is imported on first use: `import dpkd_offline` must not wait for torch.
_COMMANDS: dict[str, tuple[str, str | Callable[[Any], Any]]] = {  # the config of each, and what runs it
    "evaluate": ("EvaluateConfig", "evaluation.evaluate"),
    "export_pairs": ("ExportConfig", "curation.export_pairs"),
    "generate": ("GenerateConfig", "generation.generate"),
    "import_pairs": ("ImportConfig", "curation.import_pairs"),
    "init_student": ("InitStudentConfig", "training.init_student"),
    "inspect": ("InspectConfig", _inspect),
    "judge": ("JudgeConfig", "evaluation.judge"),
    "merge": ("MergeConfig", "curation.merge"),
    "pull": ("PullConfig", _pull),
    "push": ("PushConfig", _push),
    "report": ("ReportConfig", "pipeline.report.report"),
    "score_teacher": ("ScoreTeacherConfig", "generation.score_teacher"),
    "subset": ("SubsetConfig", "curation.merge"),
    "train": ("TrainConfig", "training.trainer"),
    "verify": ("VerifyConfig", _verify),
}
_HOME = {
    "EvaluateConfig": "config.evaluate",
    "ExportConfig": "config.data",
    "GenerateConfig": "config.data",
    "ImportConfig": "config.data",
    "InitStudentConfig": "config.train",
    "InspectConfig": "config.data",
    "JudgeConfig": "config.judge",
    "MergeConfig": "config.data",
    "PullConfig": "config.data",
    "PushConfig": "config.data",
    "Recipe": "config.recipe",
    "ReportConfig": "config.report",
    "ScoreTeacherConfig": "config.data",
    "SubsetConfig": "config.data",
    "TrainConfig": "config.train",
    "VerifyConfig": "config.data",
    "dpkd_loss": "training.losses",
}

__all__ = [
    "EvaluateConfig",
    "ExportConfig",
    "GenerateConfig",
    "ImportConfig",
    "InitStudentConfig",
    "InspectConfig",
    "JudgeConfig",
    "MergeConfig",
    "PullConfig",
    "PushConfig",
    "Recipe",
    "ReportConfig",
    "ScoreTeacherConfig",
    "SubsetConfig",
    "TrainConfig",
    "VerifyConfig",
    "distill",
    "dpkd_loss",
    "evaluate",
    "export_pairs",
    "generate",
    "import_pairs",
    "init_student",
    "inspect",
    "judge",
    "merge",
    "pull",
    "push",
    "report",
    "score_teacher",
    "subset",
    "train",
    "verify",
]


def distill(
    recipe: Recipe | str | PathLike[str] | None = None, /, *, set: Iterable[str] = (), **keys: Any
) -> DistillResult | StudyResult:
    """Run all stages of a recipe, each in a process of its own, skipping what is done.

    Returns the student's folder, and how the run went; of a recipe with students the study's folder, and what came of
    each student.

    Args:
        recipe: the path of a YAML file, or a Recipe; or give the keys of one as keywords.
        set: changes to the values of a file, such as `["train.beta=0.5"]`.

    Raises:
        UsageError: a key or a value of the recipe is wrong; nothing has run.
        StageFailed: a stage ended with an error, which it has printed; the same call goes on there.
    """
    from pathlib import Path

    from dpkd_offline.common.console import prepare_libraries
    from dpkd_offline.common.errors import UsageError
    from dpkd_offline.config.recipe import Recipe, read_recipe, validated
    from dpkd_offline.pipeline.distill import distill
    from dpkd_offline.pipeline.study import run_study

    prepare_libraries()
    is_file = recipe is not None and not isinstance(recipe, Recipe)
    if (keys and recipe is not None) or (set and not is_file):
        raise UsageError("distill: give a file, to which set may be added, or a Recipe, or the keys of one")
    if isinstance(recipe, Recipe):
        values, file = recipe, None
    elif recipe is None:
        values, file = validated(Recipe, keys), None
    else:
        values, file = read_recipe(Path(recipe), set), Path(recipe)
    return distill(values, file) if values.students is None else run_study(values, file)


def _command(name: str) -> Callable[..., Any]:
    """The function of a command: from a config, or the config's fields as keywords, to its result."""
    home, runs = _COMMANDS[name]
    kind: type[Config] = getattr(import_module(f"dpkd_offline.{_HOME[home]}"), home)

    def command(config: Config | None = None, /, **settings: Any) -> Any:
        from dpkd_offline.common.console import prepare_libraries
        from dpkd_offline.common.errors import UsageError
        from dpkd_offline.config.base import in_words
        from dpkd_offline.config.recipe import MissingKeys, validated

        prepare_libraries()
        if config is None:
            try:
                config = validated(kind, settings)
            except MissingKeys as error:
                raise UsageError(f"{name} needs {in_words(error.names)}") from error
        elif settings or not isinstance(config, kind):
            raise UsageError(f"{name} takes keywords, or one {home}")
        run = getattr(import_module(f"dpkd_offline.{runs}"), name) if isinstance(runs, str) else runs
        return run(config)

    command.__name__ = command.__qualname__ = name
    settings = [f"    {field}: {info.description}" for field, info in kind.fields_in_order().items()]
    command.__doc__ = "\n".join(
        [f"{kind.__doc__}\n", "Args:", f"    config: a {home}, in place of keywords.", *settings]
    )
    command.__signature__ = _signature(kind)  # type: ignore[attr-defined]
    return command


def _signature(kind: type[Config]) -> Signature:
    """What an editor or a notebook shows."""
    from inspect import Parameter, Signature

    keywords = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=Parameter.empty if f.is_required() else f.default)
        for name, f in kind.fields_in_order().items()
    ]
    return Signature([Parameter("config", Parameter.POSITIONAL_ONLY, default=None), *keywords])


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("dpkd-offline")
    if name in _COMMANDS:
        value = globals()[name] = _command(name)
        return value
    if name in _HOME:
        return getattr(import_module(f"dpkd_offline.{_HOME[name]}"), name)
    raise AttributeError(f"module 'dpkd_offline' has no attribute '{name}'")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
