"""From the rows of a source to the prompts of a dataset: filtered, rendered, tokenised, without duplicates."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

from dpkd_offline.common import console
from dpkd_offline.common.errors import DataError, MismatchError, UsageError
from dpkd_offline.common.hashing import fingerprint
from dpkd_offline.common.locations import Location
from dpkd_offline.config.base import PromptOptions
from dpkd_offline.config.data import GenerateConfig, ImportConfig
from dpkd_offline.dataset.dataset import Dataset, PromptDigest, PromptSet
from dpkd_offline.dataset.row_checks import check_rows
from dpkd_offline.dataset.schema import Prompt, full_schema, to_table
from dpkd_offline.dataset.scratch import KeyIndex, Spool
from dpkd_offline.dataset.table import ShardPlan
from dpkd_offline.dataset.writing import end_creation, require_dataset_folder
from dpkd_offline.models.info import ModelInfo
from dpkd_offline.prompts.columns import (
    TEACHER_MESSAGES,
    Content,
    content_of,
    renamed,
    with_conversations_read,
    with_system,
)
from dpkd_offline.prompts.sources import Row, read_rows, source_name
from dpkd_offline.prompts.teacher_view import TeacherView
from dpkd_offline.prompts.templates import (
    column_of,
    knows_no_chat,
    references_of,
    render_content,
    special_token_in,
    template_fingerprint,
    template_name,
    warn_of_template,
    with_template,
)

MALFORMED_SHOWN = 3
FILES_KEPT = 100  # names in dataset.json


@dataclass
class PromptReport:
    """How many rows a source had, and why some are not prompts; it is counted up as prompts are read."""

    rows: int = 0
    too_long: int = 0
    short_reference: int = 0
    duplicates: int = 0
    malformed: int = 0
    other_ids: int = 0  # rows of a prompt that an earlier row has under an id of its own
    files: dict[str, None] = field(default_factory=dict)  # of the source, in their order
    columns: dict[str, None] = field(default_factory=dict)  # that were read, in the order of rows
    unused: dict[str, None] = field(default_factory=dict)  # that hold text, too

    @property
    def dropped(self) -> dict[str, int]:
        return {
            "longer than max-prompt-tokens": self.too_long,
            "with a reference below min-reference-words": self.short_reference,
            "duplicates": self.duplicates,
            "malformed": self.malformed,
        }

    @property
    def kept(self) -> int:
        return self.rows - sum(self.dropped.values())

    def __str__(self) -> str:
        dropped = ", ".join(f"{count} {why}" for why, count in self.dropped.items() if count)
        counts = f"{self.kept} of {self.rows} rows" + (f" (dropped: {dropped})" if dropped else "")
        counts += f", from column{'s'[: len(self.columns) > 1]} {', '.join(self.columns)}" if self.columns else ""
        return counts + (f"; columns not used: {', '.join(self.unused)}" if self.unused else "")

    @property
    def counts(self) -> dict[str, int]:
        """The numbers that a dataset keeps."""
        numbers = {name: value for name, value in vars(self).items() if isinstance(value, int)}
        return {name: value for name, value in numbers.items() if value or name not in ("malformed", "other_ids")}

    @property
    def taken(self) -> dict[str, list[str]]:
        """The files, the columns, and those that hold text and are not used: what a dataset keeps of the source."""
        files = [*self.files][:FILES_KEPT] + (
            [f"and {more} more"] if (more := len(self.files) - FILES_KEPT) > 0 else []
        )
        names = {"files": files, "columns": [*self.columns], "unused": [*self.unused]}
        return {key: value for key, value in names.items() if value}

    def call_columns(self, names: Mapping[str, str]) -> None:
        """Give the columns that were read the names that the source has for them."""
        self.columns = {names.get(name, name): None for name in self.columns}

    def note_columns(self, content: Content) -> None:
        """Remember which columns a row's content is from, and which others hold text."""
        self.columns |= dict.fromkeys(content.columns)
        self.unused |= dict.fromkeys(content.unused)

    def leave_out(self, error: DataError) -> None:
        """Count a malformed row; the first are shown."""
        self.malformed += 1
        if self.malformed <= MALFORMED_SHOWN:
            console.info(f"warning: {error}; left out")


def read_prompts(
    source: str | Location,
    options: PromptOptions,
    model: ModelInfo,
    report: PromptReport,
    *,
    need_reference: bool = False,
    teacher: TeacherView | None = None,
) -> Iterator[Prompt]:
    """The prompts of a source, filtered, rendered and tokenised, in the order of the source.

    An id is the row's own, or a hash of its content. A row that repeats an earlier one is dropped and counted; an id on
    two different rows is an error.

    Args:
        report: counted up with every row; complete when the last prompt is out.
        teacher: notes the prompts that the teacher sees otherwise, each before it is out.

    Raises:
        DataError: a row is malformed, or the chat template does not take it, or the model's embedding does not know
            its tokens; or (at the end) there was no prompt.
        UnavailableError: a named dataset cannot be loaded, or the chat template fails with any prompt.
        UsageError: `template_args` for a template that takes none.
    """
    rows = islice(read_rows(source, keep_wrong=True), options.limit)
    for _, prompt in prompts_of(rows, options, model, report, need_reference=need_reference, teacher=teacher):
        yield prompt
    if not report.kept:
        raise DataError(f"{source}: no prompt is left: {report}")


def prompts_of(
    rows: Iterable[Row],
    options: PromptOptions,
    model: ModelInfo,
    report: PromptReport,
    *,
    need_reference: bool = False,
    beside: tuple[str, ...] = (),
    arranged: Callable[[Row], Row] | None = None,
    column: Callable[[Row], str | None] = lambda row: None,
    teacher: TeacherView | None = None,
) -> Iterator[tuple[Row, Prompt]]:
    """The prompts of some rows as `read_prompts` gives them, each with its row.

    Args:
        beside: columns with responses to the prompt: two rows with one prompt are others where these differ.
        arranged: a row as one whose prompt stands in the columns of a prompt source.
        column: of a row that is to be arranged, the one that it has its prompt in.
        teacher: as of `read_prompts`.
    """
    renderer, also = _Renderer.of(options, model, teacher), () if teacher is None else (TEACHER_MESSAGES,)
    read, ids = (*beside, *also), _RowIds(beside, also, report)

    def entered(source_row: Row) -> tuple[Row, Prompt] | None:
        """A row and its prompt, or None where a filter drops it."""
        row = with_conversations_read(renamed(source_row, options.columns or {}, read))
        if row.fault:
            raise row.fault
        prompt_column = column(row)
        content = content_of(row := arranged(row) if arranged else row, read)
        report.note_columns(content)
        if need_reference and not content.references:
            raise _no_reference(row)
        if (id_ := ids.of(row, content)) is None:
            report.duplicates += 1
            return None
        content = _with_own_system(row, content, options)
        if len(next(iter(content.references), "").split()) < options.min_reference_words:
            report.short_reference += 1
            return None
        prompt = renderer.prompt(row, content, id_, prompt_column, options.max_prompt_tokens)
        report.too_long += prompt is None
        return None if prompt is None else (row, prompt)

    for row in rows:
        report.rows += 1
        if row.file:
            report.files[row.file] = None
        try:
            prompt = entered(row)
        except DataError as error:
            if options.on_bad_row == "stop":
                raise
            report.leave_out(error)
            continue
        if prompt is not None:
            yield prompt


class _RowIds:
    """Which rows say what an earlier one says, and the ids of the others."""

    def __init__(self, beside: tuple[str, ...], also: tuple[str, ...], report: PromptReport) -> None:
        """`beside` are columns with responses, which every row has, `also` such as belong to the prompt where a row has
        them."""
        self._beside, self._also, self._report = beside, also, report
        self._contents, self._ids, self._prompts, self._pairs = KeyIndex(), KeyIndex(), KeyIndex(), KeyIndex()

    def of(self, row: Row, content: Content) -> str | None:
        """The id of a row: its own, or a hash of its content; None where an earlier row has the same content.

        Rows with responses beside the prompt are pairs of it, and there may be several. What stands before `::pair-` in
        their ids is the prompt's: a hash of it; or the row's own id, which the first row that has it keeps as it is.

        Raises:
            DataError: an earlier row has this id and another prompt.
        """
        also = [row.columns[name] for name in self._also if row.columns.get(name) is not None]
        prompt, own = _content_id(content, also), _own_id(row)
        beside = [row.columns[column] for column in self._beside]
        whole = _content_id(content, [*beside, *also]) if beside else prompt
        if self._contents.add([whole], [row.place]):
            return None
        id_ = prompt if own is None else own
        if own is None and self._beside:
            return f"{id_}::pair-{whole}"
        earlier = self._ids.add([id_], [row.place])
        if not self._beside:
            again = None
        elif (again := self._pairs.add([f"{prompt} {id_}"], [row.place])) is None:
            self._report.other_ids += self._prompts.add([prompt], [row.place]) is not None
        if earlier and not again:
            raise DataError(f"{row.place}: column 'id': '{id_}' stands on {earlier[1]} too, with another prompt")
        return f"{id_}::pair-{whole}" if again else id_


def _own_id(row: Row) -> str | None:
    """The id that a row has itself: text, or a number, which pandas makes a float where another row has none."""
    id_ = row.columns.get("id")
    if id_ is None or id_ == "":
        return None
    if isinstance(id_, bool) or not isinstance(id_, str | int | float):
        raise DataError(f"{row.place}: column 'id' must be text or a number, it is {type(id_).__name__}")
    return str(int(id_) if isinstance(id_, float) and id_.is_integer() else id_)


@dataclass(frozen=True)
class _Renderer:
    """What makes prompts of what rows say."""

    model: ModelInfo  # with the chat template that is asked for
    template: str
    arguments: dict[str, Any]
    teacher: TeacherView | None
    raw_is_meant: bool  # the user said which column is raw text
    told: set[str] = field(default_factory=set)  # kinds of prompts that were warned of

    @classmethod
    def of(cls, options: PromptOptions, model: ModelInfo, teacher: TeacherView | None) -> _Renderer:
        model, template, arguments = _template_of(options, model)
        if teacher is not None and teacher.system is not None and template != "chat":
            raise UsageError(f"teacher_system is for a chat template, '{template}' writes no system turn")
        return cls(model, template, arguments, teacher, "prompt" in (options.columns or {}))

    def text(self, row: Row, content: Content, column: str | None) -> tuple[str, list[int]]:
        """The text and the token ids; a DataError where the model does not know one of them."""
        text, ids = render_content(row, content, self.template, self.model.tokenizer, self.arguments, column)
        place = f"{row.place}: column '{column or column_of(content)}'"
        check_known(place, ids, self.model)
        self._look_at(place, content)
        return text, ids

    def _look_at(self, place: str, content: Content) -> None:
        """Say of the first prompt what is probably not meant: raw text for a chat, text that is a special token."""
        if content.kind in self.told:
            return
        if content.kind != "prompt":
            text = "\n".join(str(turn["content"]) for turn in content.messages)
            if (token := special_token_in(text, self.model)) is None:
                return
            what = f"holds '{token}', which '{self.model.name}' is given as a special token, not as text"
        else:
            meant = self.template != "chat" or self.raw_is_meant
            if meant or not knows_no_chat(content.instruction, self.model, self.arguments):
                return
            what = f"is raw text, without the chat template of '{self.model.name}'; "
            what += "--columns instruction=prompt makes a user's turn of it"
        self.told.add(content.kind)
        console.info(f"warning: {place} {what}")

    def prompt(self, row: Row, content: Content, id_: str, column: str | None, longest: int) -> Prompt | None:
        """The prompt that students see; None where it is longer than that in tokens, or what the teacher sees is."""
        text, ids = self.text(row, content, column)
        references = references_of(row, content, text, self.model.tokenizer, self.arguments)
        prompt = Prompt(id_, content.text_messages, text, ids, references, content.conversation)
        of_teacher = self.teacher.prompt(row, content, prompt, partial(self.text, row)) if self.teacher else None
        if any(len(seen.prompt_ids) > longest for seen in (prompt, of_teacher) if seen is not None):
            return None
        if self.teacher is not None and of_teacher is not None:
            self.teacher.note(of_teacher)
        return prompt


def _template_of(options: PromptOptions, model: ModelInfo) -> tuple[ModelInfo, str, dict[str, Any]]:
    """The model with the template that is asked for, that, and its arguments; what spoils responses is said."""
    model = with_template(model, options.template)
    template, arguments = template_name(options.template, model.tokenizer), options.template_args or {}
    if arguments and template != "chat":
        raise UsageError(f"template_args are for a chat template, '{template}' takes none")
    if options.system and template != "chat":
        raise UsageError(f"system is for a chat template, '{template}' writes no system turn")
    warn_of_template(model, template, arguments)
    return model, template, arguments


def _with_own_system(row: Row, content: Content, options: PromptOptions) -> Content:
    """What a row says, behind the system turn of the options if it has none; its id does not depend on that."""
    if options.system is None:
        return content
    if content.kind == "prompt":
        raise DataError(f"{row.place}: column 'prompt' is raw text and takes no system turn; leave --system out")
    return with_system(content, options.system, column_of(content))


def _no_reference(row: Row) -> DataError:
    return DataError(f"{row.place}: column 'reference' is {'empty' if 'reference' in row.columns else 'missing'}")


def _content_id(content: Content, beside: Sequence[object]) -> str:
    parts: list[object] = [content.kind, content.messages, content.instruction, content.input]
    parts += [content.tools] if content.tools else []
    return fingerprint([*parts, *beside])[:16]


def check_known(place: str, token_ids: Sequence[int], model: ModelInfo) -> None:
    """Raise DataError unless the model's embedding has a row for each token, which its tokenizer may not know."""
    if (token := max(token_ids, default=0)) >= model.embedding_rows:
        raise DataError(
            f"{place} has the token '{model.tokenizer.decode([token])}' ({token}), and the embedding of '{model.name}' "
            f"has {model.embedding_rows} rows: the tokenizer has tokens that the model was not resized for"
        )


ROWS_AT_ONCE = 1024


def _prompt_set(
    config: GenerateConfig, model: ModelInfo, spool: Spool[Prompt] | None, teacher: TeacherView
) -> PromptSet:
    """The description of the source's prompts, read one by one; with a spool, they go into it, and into the view."""
    assert config.prompts is not None
    report, digest = PromptReport(), PromptDigest()
    prompts = read_prompts(config.prompts, config, model, report, teacher=teacher)
    while chunk := list(islice(prompts, ROWS_AT_ONCE)):
        rows = to_table(chunk, full_schema(Prompt))
        digest.update(rows, teacher.rows(chunk, keep=spool is not None))
        if spool is not None:
            spool.add(rows)
    return describe_prompts(config, config.prompts, model, report, digest)


def describe_prompts(
    config: GenerateConfig | ImportConfig,
    source: str | Location,
    model: ModelInfo,
    report: PromptReport,
    digest: PromptDigest,
) -> PromptSet:
    """What dataset.json says of prompts, once `report` and `digest` have counted all of them."""
    report.call_columns({str(name): column for name, column in (config.columns or {}).items()})
    console.info(f"prompts: {report}")
    model = with_template(model, config.template)
    template = template_name(config.template, model.tokenizer)
    arguments = config.template_args or {}
    fingerprints = template_fingerprint(template, model.tokenizer, arguments), model.tokenizer_fingerprint
    identity = template, *fingerprints
    return PromptSet(
        id=digest.id(*identity),
        source=source_name(source),
        template=template,
        template_fingerprint=fingerprints[0],
        tokenizer=model.public_name,
        tokenizer_fingerprint=fingerprints[1],
        vocab_size=model.id_bound,
        longest_prompt=digest.longest[0],
        longest_prompt_tokens=digest.longest[1],
        rows=report.counts,
        license=config.license,
        template_args=arguments,
        columns=digest.columns,
        chat_template=model.chat_template,
        system=config.system,
        taken=report.taken,
        teacher_prompts=digest.teacher_prompts(*identity),
    )


def open_or_read(config: GenerateConfig, model: ModelInfo, spool: Spool[Prompt], teacher: TeacherView) -> Dataset:
    """The dataset that exists, checked against the config; or the one that --prompts will make.

    In the latter case the prompts are read into the spool, and into the view where the teacher sees others, and no file
    is written: `Dataset.create` does that.

    Raises:
        DataError: a row of the source is wrong, or one of the dataset has a token that the model does not know.
        MismatchError: the dataset has other prompts, for students or for the teacher, another tokenizer than the
            teacher, other arguments of the template, or another licence.
        UsageError: there is no dataset, and --prompts is missing.
    """
    if not Dataset.exists(config.dataset):
        if config.prompts is None:
            raise UsageError(f"{config.dataset} is no dataset yet; name a source of prompts with --prompts")
        require_dataset_folder(config.dataset)
        prompt_set = _prompt_set(config, model, spool, teacher)
        return Dataset(config.dataset, prompt_set, ShardPlan(len(spool), config.shard_size), config.student_name)
    dataset = Dataset.open(config.dataset, config.student_name)
    end_creation(config.dataset)
    if config.role == "teacher":
        dataset.check_tokenizer(config.model, model.tokenizer_fingerprint)
    _check_teacher_system(dataset, config)
    if config.prompts is not None and _prompt_set(config, model, None, teacher).id != dataset.prompt_set.id:
        raise MismatchError(
            f"{config.dataset / 'dataset.json'}: its prompts are not those of {config.prompts} with these filters; "
            f"leave --prompts out to go on with its own, or take another --dataset"
        )
    if config.license not in (None, dataset.prompt_set.license):
        raise MismatchError(
            f"{config.dataset / 'dataset.json'}: prompt_set.license is {dataset.prompt_set.license!r}, --license is "
            f"{config.license!r}; what is right may be written there by hand, it changes nothing else"
        )
    if dataset.shares_tokenizer(model.tokenizer_fingerprint):
        _check_stored(dataset, config, model)
    return dataset


def _check_teacher_system(dataset: Dataset, config: GenerateConfig) -> None:
    """Raise MismatchError where the teacher of a dataset is told something else than --teacher-system."""
    told = (dataset.prompts_seen_by("teacher").provenance() or {}).get("system")
    if config.teacher_system not in (None, told):
        now = "is told nothing besides" if told is None else f"is told something else: {textwrap.shorten(told, 60)!r}"
        raise MismatchError(
            f"{config.dataset / 'dataset.json'}: the teacher of this dataset {now}; leave --teacher-system out to go "
            f"on with that, or take another --dataset"
        )


def _check_stored(dataset: Dataset, config: GenerateConfig, model: ModelInfo) -> None:
    """Raise unless the prompts of a dataset, as the model sees them, are what the config says and what it knows.

    A student may have another template, other arguments of it or another system turn: then it sees prompts of its own.
    """
    stored = dataset.prompt_set
    for option in ("template_args", "system") if config.role == "teacher" else ():
        asked, own = getattr(config, option), getattr(stored, option)
        if asked not in (None, own):
            raise MismatchError(
                f"{config.dataset / 'dataset.json'}: its prompts were made with {option} {json.dumps(own)}; leave "
                f"--{option.replace('_', '-')} out, or take another --dataset"
            )
    if config.role == "teacher" and config.template != "auto":
        asked_for = with_template(model, config.template)
        if (template_name(config.template, asked_for.tokenizer), asked_for.chat_template) != (
            stored.template,
            stored.chat_template,
        ):
            raise MismatchError(
                f"{config.dataset / 'dataset.json'}: its prompts were made with another template ('{stored.template}'"
                f"{' of a file' if stored.chat_template else ''}); leave --template out, or take another --dataset"
            )
    if dataset.prompt_set.vocab_size > model.embedding_rows:
        prompts = dataset.prompts_seen_by("teacher") if config.role == "teacher" else dataset.prompts
        for shard in range(dataset.plan.count):
            check_rows(prompts.read_arrow(shard, ["prompt_ids"]), prompts.path(shard), model.embedding_rows)
