"""`distill --dry-run`: what the stages of a recipe read and write at most, the memory they need, and their time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dpkd_offline.common.markdown import markdown_table
from dpkd_offline.config.base import ModelOptions
from dpkd_offline.config.recipe import Recipe
from dpkd_offline.config.train import InitStudentConfig, TrainConfig
from dpkd_offline.models.loading import rehearse_saving
from dpkd_offline.pipeline.checks import Experiment, check_prompts, check_settings, check_templates, engine_of
from dpkd_offline.pipeline.estimate import Estimate, Models, Work
from dpkd_offline.pipeline.shapes import adapter_count, shape_of
from dpkd_offline.pipeline.stages import plan
from dpkd_offline.pipeline.survey import PromptSurvey, survey
from dpkd_offline.pipeline.throughput import RECORD, Throughput, Workload

TITLES = ("stage", "sequences", "tokens", "disk", "memory", "time", "note")
LIMITS = (
    "Sequences, tokens and disk are upper bounds; the disk of train is with its checkpoints. Memory is a\n"
    "lower bound for each copy of a model, or process of train, without the program itself (half a GiB)\n"
    "and what vLLM adds for a larger cache."
)
RATES = f"Time is what such stages took here ({RECORD} of this run and those beside it), by tokens and GPUs."
NO_RATES = "Time is not known: no such stage has run here. Run the recipe with a small generate.limit first."


@dataclass(frozen=True)
class WorkPlan:
    """What the stages of a recipe will do, and what may be wrong with them."""

    works: Sequence[Work]
    workloads: Mapping[str, Workload]  # of the works whose model is known, by their titles
    seconds: Mapping[str, float]  # of the works that had their like here, by their titles
    warnings: Sequence[str]


def plan_of_work(recipe: Recipe, file: Path | None = None) -> WorkPlan:
    """Check a recipe, and count what its stages will do; only prompts, tokenizers and configs of models are read.

    Args:
        file: the file of the recipe, for error messages.

    Raises:
        DataError: a row of the prompts is wrong.
        UsageError: a section of the recipe is wrong, or a stage would certainly fail.
        UnavailableError: a tokenizer or the prompts cannot be loaded, or something that a stage needs is not installed.
    """
    experiment = Experiment(recipe, plan(recipe, file))
    check_experiment(experiment)
    return work_of(experiment, *survey(recipe, experiment.stages))


def check_experiment(experiment: Experiment) -> None:
    """What can be checked without reading prompts; raises as `plan_of_work` does."""
    check_settings(experiment)
    check_templates(experiment)
    rehearse_saving(experiment.model(experiment.origin))


def work_of(experiment: Experiment, training: PromptSurvey, evaluation: PromptSurvey | None) -> WorkPlan:
    """What the stages of an experiment do with these prompts; raises as `plan_of_work` does."""
    recipe = experiment.recipe
    warnings = check_prompts(experiment, training, evaluation)
    models = _models(experiment)
    works = list(Estimate(recipe, experiment.stages, training, evaluation, models, experiment.box).works())
    workloads = _workloads(experiment, works, models)
    throughput = Throughput(recipe.output)
    seconds = {title: throughput.seconds(workload) for title, workload in workloads.items()}
    return WorkPlan(works, workloads, {title: s for title, s in seconds.items() if s is not None}, warnings)


def _models(experiment: Experiment) -> Models:
    recipe, trusts = experiment.recipe, experiment.trusts
    layers = next((s.config.layers for s in experiment.stages if isinstance(s.config, InitStudentConfig)), None)
    adapters: dict[str, int] = {}
    for stage in experiment.stages:
        if isinstance(stage.config, TrainConfig) and (rank := stage.config.lora_rank):
            count = adapter_count(experiment.origin, rank, stage.config.lora_targets, trusts)
            adapters |= {} if count is None else {stage.section: count}
    return Models(shape_of(recipe.teacher, trusts), shape_of(experiment.origin, trusts, layers=layers), adapters)


def _workloads(experiment: Experiment, works: Sequence[Work], models: Models) -> dict[str, Workload]:
    """By the titles of the works; a round's is that of the stage that it repeats."""
    stages = {stage.title: stage for stage in experiment.stages}
    workloads = {}
    for work in works:
        stage = stages.get(work.stage.partition(", round ")[0])
        if stage is not None and work.tokens and (model := models.of(stage, experiment.recipe)) is not None:
            config = stage.config
            objective = config.objective if isinstance(config, TrainConfig) else None
            engine = engine_of(config.engine, config.url) if isinstance(config, ModelOptions) else None
            numbers = model.parameters, work.sequences, work.tokens, work.parts
            workloads[work.stage] = Workload(stage.command, objective, engine, *numbers)
    return workloads


def table_of_work(plan: WorkPlan) -> str:
    """The plan as a Markdown table, all works together in its last row, with what its numbers mean and the warnings."""
    works, seconds = plan.works, plan.seconds
    rows = [[work.stage, *work_cells([(work, seconds.get(work.stage))]), work.note] for work in works]
    _, _, *cells = work_cells([(work, seconds.get(work.stage)) for work in works])
    rows.append(["in all", "", "", *cells, ""])
    warnings = [f"warning: {warning}" for warning in plan.warnings]
    return "\n".join([markdown_table(TITLES, rows), "", LIMITS, RATES if seconds else NO_RATES, *warnings])


def work_cells(works: Sequence[tuple[Work, float | None]]) -> list[str]:
    """Sequences, tokens, disk, memory and time of works together, for people; each comes with its seconds, if known."""
    sequences, tokens = (sum(getattr(work, name) for work, _ in works) for name in ("sequences", "tokens"))
    disk = _or_none(sum, [work.bytes for work, _ in works])
    memory = _or_none(max, [work.memory for work, _ in works])
    known = [seconds for _, seconds in works if seconds is not None]
    all_timed = known and all(seconds is not None for work, seconds in works if work.tokens)
    return [
        f"{sequences:,}" if sequences else "",
        _count(tokens) if tokens else "",
        size_text(disk),
        size_text(memory),
        _time(sum(known)) if all_timed else "",
    ]


def _or_none(combine: Callable[[Iterable[int]], int], sizes: Sequence[int | None]) -> int | None:
    known = [size for size in sizes if size is not None]
    return combine(known) if len(known) == len(sizes) else None


def _count(count: int) -> str:
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= 10 * size:
            return f"{count / size:.0f} {unit}"
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return str(count)


def size_text(count: float | None) -> str:
    """Bytes for people; nothing for none."""
    if not count:
        return "unknown" if count is None else ""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.0f} GiB" if count >= 10 else f"{count:.1f} GiB"


def _time(seconds: float) -> str:
    if seconds < 3600:
        return f"{max(seconds / 60, 1):.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
