"""What each stage of an experiment reads, writes and holds in memory, from the numbers of its prompts and models.

Responses count as long as they may become. Files count before compression, which halves most of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from dpkd_offline.config.base import ModelOptions
from dpkd_offline.config.data import GenerateConfig, ScoreTeacherConfig
from dpkd_offline.config.evaluate import EvaluateConfig
from dpkd_offline.config.judge import JudgeConfig
from dpkd_offline.config.objectives import OBJECTIVES
from dpkd_offline.config.recipe import Recipe
from dpkd_offline.config.train import MICRO_BATCH_TOKENS, InitStudentConfig, TrainConfig
from dpkd_offline.dataset.table import ShardPlan
from dpkd_offline.evaluation.parts import GROUP
from dpkd_offline.pipeline.box import Box
from dpkd_offline.pipeline.memory import CHECKPOINT, ModelShape, generate_memory, score_memory, train_memory
from dpkd_offline.pipeline.shapes import shape_of
from dpkd_offline.pipeline.stages import Stage
from dpkd_offline.pipeline.survey import PromptSurvey

NO_GPUS = Box(())
TEXT_BYTES = 4  # of a token, about what today's tokenizers make of English
ID_BYTES = LOGP_BYTES = 4
LIKELIEST_BYTES = ID_BYTES + 2  # of each of the teacher's likeliest tokens, whose log-prob is in half precision


@dataclass(frozen=True)
class Work:
    """What a stage does. A size is None where the model is not on this machine."""

    stage: str
    sequences: int = 0  # at most
    tokens: int = 0  # that a model reads or writes, at most
    bytes: int | None = 0  # on the disk, at most
    memory: int | None = 0  # bytes of each of its parts, at least
    parts: int = 1  # copies of a model, or processes of train, that share it
    note: str = ""


@dataclass(frozen=True)
class Models:
    """The shapes of teacher and student; None of one that is not on this machine."""

    teacher: ModelShape | None
    student: ModelShape | None
    adapters: Mapping[str, int] = field(default_factory=dict)  # their parameters, by the section that trains them

    def of(self, stage: Stage, recipe: Recipe) -> ModelShape | None:
        """The model that a stage runs."""
        model = getattr(stage.config, "model", None) or getattr(stage.config, "teacher", None)
        return self.teacher if model == recipe.teacher else self.student


@dataclass(frozen=True)
class Estimate:
    """What the stages of a recipe do with some prompts and models."""

    recipe: Recipe
    stages: Sequence[Stage]
    training: PromptSurvey
    evaluation: PromptSurvey | None
    models: Models
    box: Box = NO_GPUS

    def works(self) -> Iterator[Work]:
        """In the order of the stages; what is done once a round follows `train`."""
        responses = pairs = Work("")
        for stage in self.stages:
            if isinstance(stage.config, InitStudentConfig):
                yield self._init_student(stage)
            elif isinstance(stage.config, GenerateConfig):
                yield (responses := self._generate(stage, stage.config))
            elif isinstance(stage.config, ScoreTeacherConfig):
                yield (pairs := self._score(stage, stage.config))
            elif isinstance(stage.config, TrainConfig):
                yield self._train(stage, stage.config)
                if stage.config.regenerates:
                    yield from self._rounds(responses, pairs)
            elif isinstance(stage.config, EvaluateConfig):
                yield self._evaluate(stage, stage.config)
            elif isinstance(stage.config, JudgeConfig):
                yield self._judge(stage, stage.config)

    @property
    def _sampling(self) -> dict[str, GenerateConfig]:
        """How teacher and student respond."""
        configs = [stage.config for stage in self.stages]
        return {config.role: config for config in configs if isinstance(config, GenerateConfig)}

    @property
    def _new_tokens(self) -> dict[str, int]:
        """Of a response of teacher and student, at most."""
        return {role: config.max_new_tokens for role, config in self._sampling.items()}

    @property
    def _samples(self) -> dict[str, int]:
        """Of a prompt, by teacher and student."""
        return {role: config.samples for role, config in self._sampling.items()}

    def _init_student(self, stage: Stage) -> Work:
        teacher, student = self.models.teacher, self.models.student
        if teacher is None or student is None:
            return Work(stage.title, bytes=None, memory=None)
        student_bytes = student.weights("bfloat16")
        return Work(stage.title, 0, 0, student_bytes, teacher.weights("bfloat16") + student_bytes)

    def _generate(self, stage: Stage, config: GenerateConfig) -> Work:
        rows = self.training.rows * config.samples
        tokens = rows * config.max_new_tokens
        of_token = TEXT_BYTES + ID_BYTES + (LOGP_BYTES if config.role == "student" else 0)
        model, longest = self.models.of(stage, self.recipe), self.training.longest
        memory = _sampling_memory(config, model, longest)
        return Work(stage.title, rows, tokens, tokens * of_token, memory, *self._copies(config, self._shards))

    def _score(self, stage: Stage, config: ScoreTeacherConfig) -> Work:
        new, rows, samples = self._new_tokens, self.training.rows, self._samples
        responses = rows * sum(new.values())  # of one pair of a prompt
        logps = responses + rows * new["student"]  # of the teacher, and of the student that sampled
        size = (self.training.tokens + responses) * (TEXT_BYTES + ID_BYTES) + logps * LOGP_BYTES
        size += responses * config.top_k * LIKELIEST_BYTES
        pairs = max(samples.values())  # of a prompt
        tokens = pairs * self.training.tokens + rows * sum(samples[role] * new[role] for role in new)
        memory = _scoring_memory(config, self.models.teacher, top_k=config.top_k > 0)
        if self.models.teacher is not None and memory is not None and config.audit and not config.audit_url:
            memory = max(memory, score_memory(self.models.teacher, config.audit_dtype or "float32", False))
        copies = self._copies(config, self._shards)
        return Work(stage.title, rows * sum(samples.values()), tokens, pairs * size, memory, *copies)

    def _train(self, stage: Stage, config: TrainConfig) -> Work:
        prompts, longest = self.training, self.training.longest
        rows = config.max_steps * config.batch_size if config.max_steps else prompts.rows * config.epochs
        new = self._read_tokens(config)
        tokens = int(rows * (prompts.tokens / prompts.rows + new))
        student, adapters = self.models.student, self.models.adapters.get(stage.section)
        if student is None:
            return Work(stage.title, rows, tokens, None, None)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        limit = config.micro_batch_tokens or MICRO_BATCH_TOKENS[device]
        micro = min(config.batch_size * (longest + new), max(limit, longest + new))
        if OBJECTIVES[config.objective].data == "references":  # how long these are is not known
            micro = limit
        if config.lm_corpus is not None:
            micro = max(micro, min(limit, config.lm_batch_size * config.lm_length))
        recomputed = bool(config.gradient_checkpointing)
        training = self.box.training(config, student, adapters)
        shards = training.processes if training.sharded else 1
        memory = train_memory(student, config.precision, micro, recomputed=recomputed, adapters=adapters, shards=shards)
        trained = student.parameters if adapters is None else adapters
        students = student.weights(config.precision) * (2 if config.holdout else 1)  # the last, and the best
        note = self.box.note(training.processes, training.way.upper() if training.processes > 1 else "")
        disk = students + 2 * CHECKPOINT * trained
        return Work(stage.title, rows, tokens, disk, memory, training.processes, note)

    @property
    def _shards(self) -> int:
        """Of the dataset."""
        size = next(config.shard_size for config in self._sampling.values())
        return ShardPlan(self.training.rows, size).count

    def _copies(self, config: ModelOptions, groups: int) -> tuple[int, str]:
        """How many copies of a model work on so many groups of requests, and a note."""
        if _is_served(config):
            return 1, "on servers"
        if config.cluster != "none":
            return 1, "on a Ray cluster"
        copies, of_each = self.box.copies(config, groups), config.gpus_of_a_copy
        if not self.box.gpus and of_each > 1:  # planned on another machine
            return copies, f"on {of_each} GPUs"
        what = f"{copies} copies" + (f" of {of_each} GPUs" if of_each > 1 else "") if copies > 1 else ""
        return copies, self.box.note(copies * of_each, what)

    def _read_tokens(self, config: TrainConfig) -> int:
        """Tokens of the responses that an objective reads of a row, at most; of references nothing is known."""
        objective, new = OBJECTIVES[config.objective], self._new_tokens
        if objective.data == "references":
            return 0
        return sum(new[("teacher", "student")[side]] for side in objective.sides)

    def _rounds(self, responses: Work, pairs: Work) -> Iterator[Work]:
        """The stages that make further rounds, of one sample. y_t is scored once; rows that are kept are written again.

        Args:
            responses: the student's in the first round.
            pairs: those of the first round.
        """
        assert self.recipe.regenerate is not None
        share, count = self.recipe.regenerate.share, self.recipe.regenerate.rounds
        rows = int(self.training.rows * share)
        new = rows * self._new_tokens["student"]
        scored = int(self.training.tokens * share) + new
        samples = self._samples
        assert responses.bytes is not None and pairs.bytes is not None
        responses = replace(responses, bytes=responses.bytes // samples["student"], sequences=rows, tokens=new)
        pairs = replace(pairs, bytes=pairs.bytes // max(samples.values()), sequences=rows, tokens=scored)
        for number in range(1, count + 1):
            yield replace(responses, stage=f"generate: student, round {number}")
            yield replace(pairs, stage=f"score-teacher, round {number}")
        student = self.models.student
        size = None if student is None else count * student.weights("bfloat16")
        yield Work("students of the rounds", bytes=size)

    def _evaluate(self, stage: Stage, config: EvaluateConfig) -> Work:
        """Sampling, and then the teacher's scores, one model after the other."""
        prompts, seeds = self.evaluation, len(config.seeds)
        assert prompts is not None
        memory = _sampling_memory(config, self.models.of(stage, self.recipe), prompts.longest)
        scores = _scoring_memory(config, self.models.teacher, top_k=False)
        if memory is not None and scores is not None:
            memory = max(memory, scores)
        tokens = (prompts.tokens + prompts.rows * config.max_new_tokens) * seeds
        copies = self._copies(config, ShardPlan(prompts.rows * seeds, GROUP).count)
        return Work(stage.title, prompts.rows * seeds, tokens, 0, memory, *copies)

    def _judge(self, stage: Stage, config: JudgeConfig) -> Work:
        """Two questions on each response of the student; their tokens are those of a judge that is not looked at."""
        evaluate = next(s.config for s in self.stages if isinstance(s.config, EvaluateConfig))
        assert self.evaluation is not None
        prompts = min(self.evaluation.rows, config.limit or self.evaluation.rows)
        shape = None if config.model is None or config.url else shape_of(config.model, config.trust_remote_code)
        memory, questions = _scoring_memory(config, shape, top_k=False), 2 * prompts * len(evaluate.seeds)
        _, note = self._copies(config, questions)
        return Work(stage.title, questions, memory=memory, note=note)


def _sampling_memory(config: GenerateConfig | EvaluateConfig, model: ModelShape | None, longest: int) -> int | None:
    """Of a model that samples. `longest` are the tokens of a prompt, at most."""
    if _is_served(config):
        return 0
    if model is None:
        return None
    return generate_memory(model, config.precision, config.batch_size, longest, config.max_new_tokens)


def _scoring_memory(config: ModelOptions, teacher: ModelShape | None, *, top_k: bool) -> int | None:
    """Of a teacher that scores."""
    if _is_served(config):
        return 0
    return None if teacher is None else score_memory(teacher, config.precision, top_k)


def _is_served(config: ModelOptions) -> bool:
    """Whether the model lies on servers."""
    return bool(config.url)
