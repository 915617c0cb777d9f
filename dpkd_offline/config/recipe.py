"""A recipe, and the way from its YAML and from flags to the configs of the commands.

Values come from defaults < the recipe's section (`--config`) < what a SLURM array says < flags. Unknown keys fail, with
the place in the file."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from dpkd_offline.common import console
from dpkd_offline.common.errors import DataError, UsageError
from dpkd_offline.common.files import opened
from dpkd_offline.common.secrets import put_back, remember_secrets
from dpkd_offline.config.base import STUDENT_NAME, AutoOrCount, C, Config, Folder, Seeds, ShardOptions, in_words

LONGEST_RECIPE = 1 << 20  # bytes
LONGEST_NAME = 40  # characters of a student's name in a study: the dataset's has its seed, too
QUOTED = re.compile("'([^']*)'")
ORDER = {"extra_forbidden": 0, "missing": 2}  # what is named first, where several things are wrong


class Regeneration(Config):
    """Section `regenerate` of a recipe: when the student answers the prompts anew, and how many of them."""

    when: Literal["steps", "epochs", "drift"] = Field(
        "steps", description="What starts a round: a number of steps or epochs, or the student's drift."
    )
    every: int | None = Field(
        None, gt=0, description="Steps or epochs between rounds. With drift: steps between measures of it."
    )
    above: float | None = Field(None, gt=0, description="Start a round when the drift is above X nats per token.")
    rounds: int = Field(3, gt=0, description="Most rounds after the first.")
    share: float = Field(1.0, gt=0, le=1, description="Share of the prompts, drawn by seed, that a round answers.")
    replay: float = Field(0.0, ge=0, lt=1, description="Share of the pairs in training that come from earlier rounds.")

    @model_validator(mode="after")
    def _when_and_how_much(self) -> Self:
        if self.when == "drift" and self.above is None:
            raise ValueError("when: drift needs above, such as 0.1 nats a token")
        if self.when != "drift" and (self.every is None or self.above is not None):
            raise ValueError(f"when: {self.when} needs every, and no above")
        return self

    def for_train(self) -> dict[str, Any]:
        """The settings of `train` that follow from it."""
        name = {"steps": "regenerate_every", "epochs": "regenerate_epochs", "drift": "drift_every"}[self.when]
        settings = {name: self.every, "regenerate_above": self.above, "regenerate_rounds": self.rounds}
        return {key: value for key, value in settings.items() if value is not None} | {"replay": self.replay}


def _folder_name(name: str) -> str:
    if not re.fullmatch(STUDENT_NAME, name) or len(name) > LONGEST_NAME:
        raise ValueError(
            f"{name!r} names a folder: letters, digits, '.', '_' and '-', of which the first is a letter or a digit, "
            f"{LONGEST_NAME} at most"
        )
    return name


class StudentChanges(Config):
    """A student of a study: what it has other than the recipe. What is null has the recipe's section removed."""

    init_student: dict[str, Any] | None = Field(None, description="Merged into init_student; in place of student.")
    student: str | None = Field(None, description="Another student to start from; in place of init_student.")
    sft: dict[str, Any] | None = Field(None, description="Merged into sft.")
    warm_start: dict[str, Any] | None = Field(None, description="Merged into warm_start.")
    train: dict[str, Any] = Field(default_factory=dict, description="Merged into train.")
    regenerate: dict[str, Any] | None = Field(None, description="Merged into regenerate.")


class Recipe(Config):
    """A whole experiment for `distill`: models and output, and a section per stage."""

    _student: str | None = PrivateAttr(None)  # whose changes are in it, for the places of mistakes

    teacher: str = Field(description="The teacher: model folder or Hub name.")
    student: str | None = Field(
        None, description="The student to start from: model folder or Hub name. Not with init_student."
    )
    output: Folder = Field(description="Folder of everything that the run writes.")
    gpus: AutoOrCount = Field(
        "auto",
        exclude_if=lambda value: value == "auto",
        description="How many GPUs every stage uses: copies of a model where responses are made and scored, and "
        "processes of train, with FSDP where a GPU has no memory for all of the student. auto: all that are visible.",
    )
    init_student: dict[str, Any] | None = Field(
        None, description="Options of init-student, to cut the student from the teacher."
    )
    sft: dict[str, Any] | None = Field(
        None, description="Options of train, to fine-tune the student on references first (objective sft)."
    )
    warm_start: dict[str, Any] | None = Field(
        None, description="Options of train, to train the student on y_t first (objective seqkd), before it answers."
    )
    generate: dict[str, Any] = Field(description="Options of generate, for teacher and student.")
    generate_teacher: dict[str, Any] | None = Field(
        None, description="Options of generate for the teacher, in place of generate."
    )
    generate_student: dict[str, Any] | None = Field(
        None, description="Options of generate for the student, in place of generate."
    )
    score_teacher: dict[str, Any] = Field(default_factory=dict, description="Options of score-teacher.")
    subset: dict[str, Any] | None = Field(
        None, description="Options of subset: which rows, or pairs of several samples, the student is trained on."
    )
    train: dict[str, Any] = Field(default_factory=dict, description="Options of train.")
    regenerate: Regeneration | None = Field(
        None, description="When the student answers the prompts anew during training (rounds)."
    )
    evaluate: dict[str, Any] | None = Field(
        None, description="Options of evaluate, for the teacher and the student before and after."
    )
    judge: dict[str, Any] | None = Field(
        None, description="Options of judge, for the student after against the student before. Needs evaluate."
    )
    students: dict[Annotated[str, AfterValidator(_folder_name)], StudentChanges] | None = Field(
        None,
        min_length=1,
        description="A study: students by their names, each with what it changes of init_student, student, sft, "
        "warm_start, train and regenerate. Mappings are merged key by key; null removes a section.",
    )
    seeds: Seeds | None = Field(
        None, description="Seeds of training; each student is trained once with each. By default train.seed alone."
    )
    baseline: str | None = Field(None, description="The student of the study that the others are compared with.")
    paper: Literal["gpt2", "opt"] | None = Field(
        None, description="The paper's setting that the study repeats: its tables are shown beside the study's."
    )

    @model_validator(mode="after")
    def _one_student(self) -> Self:
        if (self.student is None) == (self.init_student is None):
            raise ValueError("give either student (a model) or init_student (layers of the teacher)")
        return self

    @property
    def of_student(self) -> str | None:
        """The student of a study whose changes are in this recipe."""
        return self._student

    @model_validator(mode="after")
    def _one_dataset(self) -> Self:
        if self.subset is not None and self.students is not None:
            raise ValueError("subset is of one student; make the dataset of a study first, by the command of this name")
        return self

    @field_validator("students", mode="before")
    @classmethod
    def _nothing_changed(cls, students: object) -> object:
        """`NAME:` without anything is a student of the recipe as it is."""
        if not isinstance(students, dict):
            return students
        return {name: {} if changes is None else changes for name, changes in students.items()}

    @field_validator("students")
    @classmethod
    def _no_twins(cls, students: dict[str, StudentChanges] | None) -> dict[str, StudentChanges] | None:
        names: dict[str, str] = {}
        for name, changes in (students or {}).items():
            if (other := names.setdefault(name.lower(), name)) != name:
                raise ValueError(f"{other!r} and {name!r} are one folder where upper and lower case are the same")
            if "seed" in changes.train:
                raise ValueError(f"'{name}.train.seed': the seeds are those of the study; say them in seeds")
        return students

    @field_validator("seeds", "baseline", "paper")
    @classmethod
    def _of_a_study(cls, value: Any, info: ValidationInfo) -> Any:
        students = info.data.get("students")
        if value is not None and students is None and "students" in info.data:
            raise ValueError("is of a study, and there are no students")
        if info.field_name == "seeds" and value is not None and "seed" in info.data.get("train", {}):
            raise ValueError("say it here or in train.seed, not in both")
        if info.field_name == "baseline" and value is not None and students and value not in students:
            raise ValueError(
                f"no student is called {value!r}{suggestion(value, students)}; there is: {in_words([*students])}"
            )
        return value

    @model_validator(mode="after")
    def _something_to_judge(self) -> Self:
        if self.judge is not None and self.evaluate is None:
            raise ValueError("judge needs the responses of evaluate: give that section, too")
        return self


def recipe_of_student(recipe: Recipe, name: str, seed: int, file: Path | None = None) -> Recipe:
    """The ordinary recipe of one student of a study, trained with one seed.

    Args:
        file: the file of the recipe, for error messages.

    Raises:
        UsageError: what the student changes makes no recipe.
    """
    assert recipe.students is not None
    changes, values = recipe.students[name], recipe.model_dump(exclude_unset=True)
    for key in ("students", "seeds", "baseline", "paper"):
        values.pop(key, None)
    for key in changes.model_fields_set:
        change, section = getattr(changes, key), values.get(key)
        values[key] = {**section, **change} if isinstance(change, dict) and isinstance(section, dict) else change
    for key, other in (("student", "init_student"), ("init_student", "student")):
        if key in changes.model_fields_set and getattr(changes, key) is not None:
            if other not in changes.model_fields_set:
                values.pop(other, None)
    values["train"] = {**(values.get("train") or {}), "seed": seed}
    own = validated(Recipe, values, file=file, student=name)
    own._student = name
    return own


class MissingKeys(UsageError):
    """Keys without a default have no value."""

    def __init__(self, place: str, names: Sequence[str]) -> None:
        others = in_words([f"'{name}'" for name in names[1:]])
        also = f", and so {'is' if len(names) == 2 else 'are'} {others}" if others else ""
        super().__init__(f"{place}'{names[0]}' is required{also}")
        self.names = names


def _deepest(node: yaml.Node | None, path: Iterable[str | int]) -> tuple[yaml.Mark | None, int]:
    """Where in the YAML text the deepest part of `path` that exists stands, and how many keys lead to it."""
    mark, depth = node.start_mark if node else None, 0
    for key in path:
        if not isinstance(node, yaml.MappingNode):
            break
        for key_node, value_node in node.value:
            if key_node.value == str(key):
                mark, node, depth = key_node.start_mark, value_node, depth + 1
                break
        else:
            break
    return mark, depth


def _as_written(file: Path, path: tuple[str | int, ...], student: str | None) -> tuple[str | int, ...]:
    """The path of a key in the file: a student's section may have it from the student, or from the recipe."""
    if student is None:
        return path
    own: tuple[str | int, ...] = ("students", student, *path)
    node = read_yaml(file)[1]
    if not path:
        return own
    inside_own, inside = _deepest(node, own)[1] - 2, _deepest(node, path)[1]
    return own if inside_own > 0 and inside_own >= inside else path


def _place(file: Path | None, path: Iterable[str | int]) -> str:
    """`file:line:column: ` of a key, or nothing without a file."""
    if file is None:
        return ""
    mark, _ = _deepest(read_yaml(file)[1], path)
    return f"{file}:{mark.line + 1}:{mark.column + 1}: " if mark else f"{file}: "


def suggestion(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'X'?`, where something is called almost so."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def _explain(error: ErrorDetails, config: type[Config]) -> str:
    loc = [part for part in error["loc"] if part != "[key]"]
    key = ".".join(map(str, loc))
    if error["type"] == "extra_forbidden":
        if config is Recipe and loc[0] == "students":
            known = StudentChanges.model_fields
            if loc[-1] in Recipe.model_fields:
                return f"'{key}': of a recipe's sections a student changes {in_words([*known])}; the others are for all"
        else:
            known = config.model_fields
        return f"unknown key '{key}'{suggestion(str(loc[-1]), known)}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "literal_error":
        message += suggestion(str(error["input"]), QUOTED.findall(message))
    return (f"'{key}': " if key else "") + message[:1].lower() + message[1:]


def read_yaml(path: Path) -> tuple[dict[str, Any], yaml.Node | None]:
    """A YAML mapping and its node tree, which knows lines and columns."""
    try:
        with opened(path) as file:
            text = file.read(LONGEST_RECIPE).decode()
        remember_secrets(text)  # before anything is said of them
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except DataError as error:
        raise UsageError(str(error)) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        raise UsageError(f"{place}: {error.problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # of values that no date or number has, and of depth
        raise UsageError(f"{path}: {' '.join(str(error).split())}") from error
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise UsageError(f"{path}:1:1: expected a mapping of sections")
    return data, node


def validated(
    config: type[C],
    values: Mapping[str, Any],
    *,
    file: Path | None = None,
    section: tuple[str, ...] = (),
    student: str | None = None,
    as_flags: bool = False,
) -> C:
    """`values` as a config, or a UsageError that names the place.

    Args:
        file: the recipe that the values (or some of them) came from, for the message.
        section: the path of keys in that recipe under which they stand.
        student: of a study, whose changes are among them.
        as_flags: whether the message names settings as the command line does, with dashes.

    Raises:
        MissingKeys: keys without a default are missing; of what is wrong this is the last to be named.
    """
    try:
        return config.model_validate(dict(values))
    except ValidationError as error:
        errors = error.errors()
        first = min(errors, key=lambda e: ORDER.get(e["type"], 1))
        prefix = ""
        if file:
            path = _as_written(file, (*section, *first["loc"]), student)
            shown = path[: len(path) - len(first["loc"])]
            prefix = _place(file, path) + (".".join(map(str, shown)) + ": " if shown else "")
        if first["type"] == "missing":
            raise MissingKeys(prefix, [".".join(map(str, e["loc"])) for e in errors]) from error
        message = _explain(first, config)
        raise UsageError(prefix + (message.replace("_", "-") if as_flags and message[0] == "'" else message)) from error


def recipe_section(
    config: type[C],
    section: str,
    values: object,
    fixed: Mapping[str, Any],
    file: Path | None,
    *,
    student: str | None = None,
    as_flags: bool = False,
) -> C:
    """The `values` of a recipe's section, under those that are `fixed` beside it: flags, or what `distill` sets."""
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UsageError(f"{_place(file, (section,))}'{section}' must be a mapping")
    path = (section,) if file else ()
    return validated(config, {**values, **fixed}, file=file, section=path, student=student, as_flags=as_flags)


def from_recipe(config: type[C], section: str, file: Path | None, flags: Mapping[str, Any]) -> C:
    """Defaults < the `section` of recipe `file` < `flags`."""
    data: dict[str, Any] = {}
    if file is not None:
        data = put_back(read_yaml(file)[0])
        if any(key not in Recipe.model_fields for key in data):
            validated(Recipe, data, file=file)  # raises
        if section not in data:
            raise UsageError(f"{file}: no section '{section}'")
    values = data.get(section)
    if issubclass(config, ShardOptions):
        flags = {**_share_in_array({*flags, *(values if isinstance(values, dict) else ())}), **flags}
    return recipe_section(config, section, values, flags, file, as_flags=file is None)


def read_recipe(file: Path, overrides: Iterable[str] = ()) -> Recipe:
    """A recipe for `distill`, with `section.key=value` overrides (values are YAML)."""
    data, _ = read_yaml(file)
    remember_secrets(" ".join(overrides := list(overrides)))
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
        try:
            target[keys[-1]] = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise UsageError(f"--set {override}: {' '.join(str(error).split())}") from error
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


def _share_in_array(settings: set[str]) -> dict[str, int]:
    """The worker's share as SLURM has it, unless `settings`, the names that have a value, hold it."""
    own = settings & ShardOptions.model_fields.keys()
    if len(own) == 2 or not (share := slurm_share(os.environ)):
        return {}
    if own:
        raise UsageError("in a SLURM array give both --shard-index and --num-shards, or neither: then the array says")
    console.info(f"SLURM array: worker {share['shard_index'] + 1} of {share['num_shards']}")
    return share
