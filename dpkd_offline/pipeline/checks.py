"""What later stages of a recipe need, checked before the first one runs.

An error is raised where a stage would certainly fail; each names the section and key to change. What may go wrong, or
is probably not meant, is a warning.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path

from dpkd_offline.common.errors import DataError, DpkdError, UnavailableError, UsageError
from dpkd_offline.config.base import ModelOptions, ShardOptions
from dpkd_offline.config.data import GenerateConfig, ScoreTeacherConfig
from dpkd_offline.config.engines import ENGINES
from dpkd_offline.config.evaluate import EvaluateConfig
from dpkd_offline.config.judge import JudgeConfig
from dpkd_offline.config.objectives import OBJECTIVES
from dpkd_offline.config.recipe import Recipe
from dpkd_offline.config.train import TrainConfig
from dpkd_offline.engines.factory import check_options, choose_engine
from dpkd_offline.evaluation.benchmarks import check_tasks, load_task
from dpkd_offline.models.info import ModelInfo
from dpkd_offline.pipeline.box import Box
from dpkd_offline.pipeline.stages import Stage
from dpkd_offline.pipeline.survey import PromptSurvey
from dpkd_offline.prompts.sources import is_missing, read_texts
from dpkd_offline.prompts.templates import template_name, with_template
from dpkd_offline.training.examples import corpus_blocks
from dpkd_offline.training.metrics_log import check_trackers

engine_of = cache(choose_engine)  # which says each choice once
task_of = cache(load_task)


@dataclass(frozen=True)
class Experiment:
    """A recipe with its stages, and what its two models are known to be."""

    recipe: Recipe
    stages: list[Stage]
    models: dict[tuple[str, bool], ModelInfo] = field(default_factory=dict)  # those known already, of any experiment

    @property
    def origin(self) -> str:
        """The model that the student is, or is cut from: it has the same tokenizer and context."""
        return self.recipe.student or self.recipe.teacher

    def origin_of(self, model: str) -> str:
        """The same of a stage's model, which may not exist yet."""
        return self.recipe.teacher if model == self.recipe.teacher else self.origin

    @cached_property
    def box(self) -> Box:
        """The GPUs of the run; raises UsageError where there are fewer than it asks for."""
        return Box.of(self.recipe)

    @cached_property
    def trusts(self) -> bool:
        return any(getattr(stage.config, "trust_remote_code", False) for stage in self.stages)

    @cached_property
    def shares_tokenizer(self) -> bool:
        """Whether teacher and student have the same tokens."""
        return self.model(self.origin).tokenizer_fingerprint == self.model(self.recipe.teacher).tokenizer_fingerprint

    @cached_property
    def max_new_tokens(self) -> dict[str, int]:
        """Of the responses of teacher and student."""
        return {s.config.role: s.config.max_new_tokens for s in self.stages if isinstance(s.config, GenerateConfig)}

    def context(self, model: str) -> int:
        return self.model(self.origin_of(model)).context_length

    def model(self, name: str) -> ModelInfo:
        """What is known of the teacher, or of the origin of the student."""
        return self.models.setdefault((name, self.trusts), ModelInfo(name, self.trusts))


def check_settings(experiment: Experiment) -> None:
    """What can be checked without reading prompts: files, packages, and settings that contradict each other.

    Raises:
        UnavailableError: an engine or a package is not installed.
        UsageError: a file does not exist, or a stage cannot run with these settings.
        DataError: `lm_corpus` is too short.
    """
    recipe = experiment.recipe
    judges = (stage.config.model for stage in experiment.stages if isinstance(stage.config, JudgeConfig))
    for key, model in (
        *(("teacher", recipe.teacher), ("student", recipe.student)),
        *(("judge.model", judge) for judge in judges),
    ):
        if model is not None and _is_path(model) and not Path(model).is_dir():
            raise UsageError(f"{key}: {model}: no such folder")
    for stage in experiment.stages:
        for key in ("prompts", "lm_corpus"):
            source = getattr(stage.config, key, None)
            if isinstance(source, str) and is_missing(source):
                raise UsageError(f"{stage.section}.{key}: {source}: no such file")
    _check_whose_pairs(experiment)
    for stage in experiment.stages:
        if isinstance(stage.config, ShardOptions) and stage.config.num_shards > 1:
            raise UsageError(
                f"{stage.section}.num_shards: distill makes whole tables, and the other shards would be missing; leave "
                f"it out, or share the work by generate and score-teacher themselves"
            )
        if isinstance(stage.config, ModelOptions):
            _check_engine(stage, stage.config)
            _check_gpus(experiment.box, stage, stage.config)
        if isinstance(stage.config, TrainConfig):
            _check_train(experiment, stage.section, stage.config)


FILES = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".txt", ".gz", ".zst")


def _is_path(name: str) -> bool:
    """Whether a name can only be that of a file or folder: not of the Hub, nor of a dataset that is loaded by name."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or name.endswith(("/", *FILES))


def _check_whose_pairs(experiment: Experiment) -> None:
    """The student's responses, their pairs and what is trained on them must be of one student and round."""
    responses = [s for s in experiment.stages if isinstance(s.config, GenerateConfig) and s.config.role == "student"]
    y_s = responses[-1]  # in a study those of the student whose rounds follow, after those of its start
    after = experiment.stages[experiment.stages.index(y_s) :]
    later = [s for s in after if isinstance(s.config, ScoreTeacherConfig) or s.section == "train"]
    for stage in later:
        for key in ("student_name", "round"):
            sampled, wanted = getattr(y_s.config, key), getattr(stage.config, key)
            latest = key == "round" and wanted is None
            if sampled != wanted and not latest:
                raise UsageError(
                    f"{stage.section}.{key}: {wanted!r}, and the student's responses are made with {sampled!r} "
                    f"({y_s.section}.{key}); say the same in all of these sections"
                )


def check_templates(experiment: Experiment) -> None:
    """Raise UsageError where the student cannot be given the prompts by its template."""
    for stage in experiment.stages:
        config = stage.config
        if isinstance(config, GenerateConfig | EvaluateConfig):
            try:
                model = experiment.model(experiment.origin_of(config.model))
                template_name(config.template, with_template(model, config.template).tokenizer)
            except UsageError as error:
                raise UsageError(f"{stage.section}.template: {config.model}: {error}") from error


def _check_gpus(box: Box, stage: Stage, config: ModelOptions) -> None:
    """Raise UsageError where a stage asks for more GPUs than the run has; without one it may be meant for elsewhere."""
    if not box.gpus or config.url or config.cluster != "none":
        return
    copies = 1 if config.replicas == "auto" else config.replicas
    if (needed := copies * config.gpus_of_a_copy) > len(box.gpus):
        many = f"{copies} replicas of {config.gpus_of_a_copy}" if copies > 1 else f"{needed}"
        raise UsageError(f"{stage.section}: {many} GPUs are asked for, and the run has {len(box.gpus)}")


def _check_engine(stage: Stage, config: ModelOptions) -> None:
    try:
        engine = engine_of(config.engine, config.url)
        check_options(engine, config)
    except DpkdError as error:
        raise type(error)(f"{stage.section}.engine: {error}") from error
    if config.cluster == "ray" and not find_spec("ray"):
        raise UnavailableError(f"{stage.section}.cluster: Ray is not installed; `pip install 'dpkd-offline[ray]'`")
    if isinstance(config, EvaluateConfig) and config.tasks:
        _check_tasks(stage, config)
    if ENGINES[engine].served and isinstance(config, EvaluateConfig) and config.model != config.teacher:
        raise UsageError(f"{stage.section}.url: its servers hold one model, and evaluate runs teacher and students")


def _check_tasks(stage: Stage, config: EvaluateConfig) -> None:
    """The benchmarks are loaded, as `evaluate` does, which fetches their data."""
    try:
        for task in check_tasks(config):
            task_of(task)
    except DpkdError as error:
        raise type(error)(f"{stage.section}.tasks: {str(error).removeprefix('--tasks: ')}") from error


def _check_train(experiment: Experiment, section: str, config: TrainConfig) -> None:
    if config.lora_rank and not find_spec("peft"):
        raise UnavailableError(f"{section}.lora_rank: PEFT is not installed; `pip install 'dpkd-offline[lora]'`")
    try:
        check_trackers(config.track)
    except UnavailableError as error:
        raise UnavailableError(f"{section}.track: {error}") from error
    if config.lora_rank and config.lora_output == "adapter" and (section != "train" or experiment.recipe.evaluate):
        raise UsageError(f"{section}.lora_output: later stages need a model that generates; take 'merged'")
    if OBJECTIVES[config.objective].top_k:
        _check_top_k(experiment, section, config)
    if config.lm_corpus is not None:
        _check_corpus(experiment, section, config)


def _check_top_k(experiment: Experiment, section: str, config: TrainConfig) -> None:
    scores = next(s.config for s in experiment.stages if isinstance(s.config, ScoreTeacherConfig))
    if not scores.top_k:
        raise UsageError(
            f"{section}.objective: '{config.objective}' reads the teacher's likeliest tokens, and score_teacher.top_k "
            f"is 0; set that, such as to 50"
        )
    if not experiment.shares_tokenizer:
        raise UsageError(
            f"{section}.objective: '{config.objective}' compares teacher and student token by token, and "
            f"{experiment.origin} has another tokenizer than {experiment.recipe.teacher}; take an objective that "
            f"compares whole responses, such as dpkd"
        )


def _check_corpus(experiment: Experiment, section: str, config: TrainConfig) -> None:
    """One block of the corpus is read, as `train` does at its start."""
    source, context = config.lm_corpus, experiment.context(config.student)
    assert source is not None
    if config.lm_length > context:
        raise UsageError(f"{section}.lm_length: {config.lm_length} tokens, the context of the student has {context}")
    model = experiment.model(experiment.origin)
    try:
        next(corpus_blocks(lambda: read_texts(source), model, config.lm_length))
    except DataError as error:
        raise DataError(f"{section}.lm_corpus: {error}") from error


def check_prompts(experiment: Experiment, training: PromptSurvey, evaluation: PromptSurvey | None) -> list[str]:
    """Whether the prompts serve every stage. Returns warnings.

    Raises:
        UsageError: prompts do not fit into a model, or none has the reference that a stage needs.
    """
    warnings = list(dict.fromkeys(_of_templates(experiment)))
    for stage in experiment.stages:
        if isinstance(stage.config, GenerateConfig):
            _check_room(experiment, stage.section, stage.config, training)
        elif isinstance(stage.config, EvaluateConfig) and evaluation is not None:
            _check_room(experiment, stage.section, stage.config, evaluation)
        elif isinstance(stage.config, ScoreTeacherConfig):
            warnings += _of_scored_lengths(experiment, stage.config, training)
        elif isinstance(stage.config, TrainConfig):
            warnings += _of_references(stage.section, stage.config, training)
            warnings += _of_trained_lengths(experiment, stage.section, stage.config, training)
            warnings += _of_numbers(stage.section, stage.config, training)
    if evaluation is not None and evaluation.known:
        warnings.append(
            f"evaluate.prompts: {evaluation.known} of {evaluation.rows} are prompts that the student is trained on"
        )
    return warnings


def _of_templates(experiment: Experiment) -> Iterator[str]:
    """Whether the student is evaluated with such prompts as it is trained on."""
    configs = [stage.config for stage in experiment.stages]
    of_role = {config.role: config for config in configs if isinstance(config, GenerateConfig)}
    for option in ("template", "template_args", "system"):
        teacher, student = (getattr(of_role.get(role), option, None) for role in ("teacher", "student"))
        trained = teacher if student in (None, "auto") else student
        for config in configs:
            if isinstance(config, EvaluateConfig) and ((asked := getattr(config, option)) or None) != (trained or None):
                yield (
                    f"evaluate.{option}: {asked!r}, and the student is trained on prompts with {trained!r}: it is "
                    f"measured on prompts of another form; say the same in both sections"
                )


def _check_room(
    experiment: Experiment, section: str, config: GenerateConfig | EvaluateConfig, prompts: PromptSurvey
) -> None:
    if not experiment.shares_tokenizer and config.model != experiment.recipe.teacher:
        return  # the student counts other tokens
    limit = min(config.max_length, experiment.context(config.model))
    of_teacher = isinstance(config, GenerateConfig) and config.role == "teacher"
    longest = prompts.longest_of_teacher if of_teacher else prompts.longest
    if longest + config.max_new_tokens > limit:
        raise UsageError(
            f"{section}.max_new_tokens: the longest prompt has {longest} tokens and gets "
            f"{config.max_new_tokens} new ones, max_length and the context of {experiment.origin_of(config.model)} "
            f"give {limit}; lower this or max_prompt_tokens"
        )


def _of_scored_lengths(experiment: Experiment, config: ScoreTeacherConfig, prompts: PromptSurvey) -> Iterator[str]:
    extra = ENGINES[engine_of(config.engine, config.url)].score_extra
    limit = min(config.max_length, experiment.context(config.model) - extra)
    needed = prompts.longest_of_teacher + max(experiment.max_new_tokens.values())
    if needed > limit:
        yield (
            f"score_teacher.max_length: a prompt with its response may have {needed} tokens, and {limit} are allowed; "
            f"score-teacher ends with an error if one is longer"
        )


def _of_trained_lengths(
    experiment: Experiment, section: str, config: TrainConfig, prompts: PromptSurvey
) -> Iterator[str]:
    new = experiment.max_new_tokens
    if OBJECTIVES[config.objective].data == "references" or not experiment.shares_tokenizer:
        return  # their lengths are not known
    longest = prompts.longest + (new["teacher"] if config.responses == "teacher" else max(new.values()))
    limit = min(config.max_length, experiment.context(config.student))
    if longest > limit:
        yield (
            f"{section}.max_length: a prompt with its response may have {longest} tokens; train leaves out those of "
            f"more than {limit}"
        )


def _of_numbers(section: str, config: TrainConfig, prompts: PromptSurvey) -> Iterator[str]:
    """Whether there are enough prompts for what is held out, and enough steps for the rounds."""
    held_out = prompts.held_out(config.holdout)
    if held_out == prompts.rows:
        raise UsageError(f"{section}.holdout: {config.holdout:g} holds out all {held_out} prompts; lower it")
    if config.holdout and not held_out:
        yield (
            f"{section}.holdout: {config.holdout:g} holds out none of {prompts.rows} prompts, so that nothing says "
            f"whether the student gets better; raise it"
        )
        if config.validate_rouge:
            raise UsageError(f"{section}.validate_rouge: no prompt is held out for it; raise holdout")
    an_epoch = -(-(prompts.rows - held_out) // config.batch_size)
    steps = config.max_steps or config.epochs * an_epoch
    first = config.regenerate_every or (config.regenerate_epochs or 0) * an_epoch
    if first >= steps:
        yield f"regenerate.every: the first round would begin after {first} steps, and {section} takes {steps}"


def _of_references(section: str, config: TrainConfig, prompts: PromptSurvey) -> Iterator[str]:
    missing = prompts.rows - prompts.referenced
    if config.validate_rouge and missing == prompts.rows:
        raise UsageError(f"{section}.validate_rouge: it needs references, and no prompt has one; set it to 0")
    if OBJECTIVES[config.objective].data != "references" or not missing:
        return
    if missing == prompts.rows:
        raise UsageError(f"{section}: it trains on references, and no prompt has one; leave this section out")
    yield f"{section}: {missing} of {prompts.rows} prompts have no reference and are left out"
