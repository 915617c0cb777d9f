"""From the rows of a source to the prompts of a dataset: filtered, rendered, tokenised, without duplicates."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
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
from dpkd_offline.dataset.schema import Prompt, to_table
from dpkd_offline.dataset.scratch import KeyIndex, Spool
from dpkd_offline.dataset.table import ShardPlan
from dpkd_offline.dataset.writing import end_creation, require_dataset_folder
from dpkd_offline.models.info import ModelInfo
from dpkd_offline.prompts.columns import Content, content_of, renamed
from dpkd_offline.prompts.sources import Row, read_rows, source_name
from dpkd_offline.prompts.templates import (
    column_of,
    render_content,
    template_fingerprint,
    template_name,
    warn_of_template,
)

MALFORMED_SHOWN = 3


@dataclass
class PromptReport:
    """How many rows a source had, and why some are not prompts; it is counted up as prompts are read."""

    rows: int = 0
    too_long: int = 0
    short_reference: int = 0
    duplicates: int = 0
    malformed: int = 0
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
        return {name: value for name, value in numbers.items() if value or name != "malformed"}

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
) -> Iterator[Prompt]:
    """The prompts of a source, filtered, rendered and tokenised, in the order of the source.

    An id is the row's own, or a hash of its content. A row that repeats an earlier one is dropped and counted; an id on
    two different rows is an error.

    Args:
        report: counted up with every row; complete when the last prompt is out.

    Raises:
        DataError: a row is malformed, or the chat template does not take it, or the model's embedding does not know
            its tokens; or (at the end) there was no prompt.
        UnavailableError: a named dataset cannot be loaded, or the chat template fails with any prompt.
        UsageError: `template_args` for a template that takes none.
    """
    rows = islice(read_rows(source, keep_wrong=True), options.limit)
    for _, prompt in prompts_of(rows, options, model, report, need_reference=need_reference):
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
) -> Iterator[tuple[Row, Prompt]]:
    """The prompts of some rows as `read_prompts` gives them, each with its row.

    Args:
        beside: further columns of what a row says: two rows with one prompt are others where these differ.
        arranged: a row as one whose prompt stands in the columns of a prompt source.
        column: of a row that is to be arranged, the one that it has its prompt in.
    """
    template, arguments = _template_of(options, model)
    contents, ids = KeyIndex(), KeyIndex()

    def entered(source_row: Row) -> tuple[Row, Prompt] | None:
        """A row and its prompt, or None where a filter drops it."""
        row = renamed(source_row, options.columns or {}, beside)
        if row.fault:
            raise row.fault
        prompt_column = column(row)
        row = arranged(row) if arranged else row
        content = content_of(row, beside)
        report.note_columns(content)
        if need_reference and not content.references:
            raise _no_reference(row)
        content_id = _content_id(content, [row.columns[column] for column in beside])
        if contents.add([content_id], [row.place]):
            report.duplicates += 1
            return None
        id_ = str(row.columns["id"]) if row.columns.get("id") is not None else content_id
        if twice := ids.add([id_], [row.place]):
            raise DataError(f"{row.place}: column 'id': '{id_}' stands on {twice[1]} too, with another prompt")
        if len(next(iter(content.references), "").split()) < options.min_reference_words:
            report.short_reference += 1
            return None
        text, token_ids = render_content(row, content, template, model.tokenizer, arguments, prompt_column)
        check_known(f"{row.place}: column '{prompt_column or column_of(content)}'", token_ids, model)
        if len(token_ids) > options.max_prompt_tokens:
            report.too_long += 1
            return None
        return row, Prompt(id_, content.messages, text, token_ids, content.references)

    for row in rows:
        report.rows += 1
        try:
            prompt = entered(row)
        except DataError as error:
            if options.on_bad_row == "stop":
                raise
            report.leave_out(error)
        else:
            if prompt is not None:
                yield prompt


def _template_of(options: PromptOptions, model: ModelInfo) -> tuple[str, dict[str, Any]]:
    """The template and its arguments, of which is said what spoils responses."""
    template, arguments = template_name(options.template, model.tokenizer), options.template_args or {}
    if arguments and template != "chat":
        raise UsageError(f"template_args are for a chat template, '{template}' takes none")
    warn_of_template(model, template, arguments)
    return template, arguments


def _no_reference(row: Row) -> DataError:
    return DataError(f"{row.place}: column 'reference' is {'empty' if 'reference' in row.columns else 'missing'}")


def _content_id(content: Content, beside: Sequence[object]) -> str:
    parts = [content.kind, content.messages, content.instruction, content.input]
    return fingerprint([*parts, *beside])[:16]


def check_known(place: str, token_ids: Sequence[int], model: ModelInfo) -> None:
    """Raise DataError unless the model's embedding has a row for each token, which its tokenizer may not know."""
    if (token := max(token_ids, default=0)) >= model.embedding_rows:
        raise DataError(
            f"{place} has the token '{model.tokenizer.decode([token])}' ({token}), and the embedding of '{model.name}' "
            f"has {model.embedding_rows} rows: the tokenizer has tokens that the model was not resized for"
        )


ROWS_AT_ONCE = 1024


def _prompt_set(config: GenerateConfig, model: ModelInfo, spool: Spool[Prompt] | None) -> PromptSet:
    """The description of the source's prompts, read one by one; with a spool, they go into it."""
    assert config.prompts is not None
    report, digest = PromptReport(), PromptDigest()
    prompts = read_prompts(config.prompts, config, model, report)
    while chunk := list(islice(prompts, ROWS_AT_ONCE)):
        rows = to_table(chunk, Prompt.schema)
        digest.update(rows)
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
    console.info(f"prompts: {report}")
    template = template_name(config.template, model.tokenizer)
    arguments = config.template_args or {}
    fingerprints = template_fingerprint(template, model.tokenizer, arguments), model.tokenizer_fingerprint
    return PromptSet(
        id=digest.id(template, *fingerprints),
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
    )


def open_or_read(config: GenerateConfig, model: ModelInfo, spool: Spool[Prompt]) -> Dataset:
    """The dataset that exists, checked against the config; or the one that --prompts will make.

    In the latter case the prompts are read into the spool, and no file is written: `Dataset.create` does that.

    Raises:
        DataError: a row of the source is wrong, or one of the dataset has a token that the model does not know.
        MismatchError: the dataset has other prompts, another tokenizer than the teacher, other arguments of the
            template, or another licence.
        UsageError: there is no dataset, and --prompts is missing.
    """
    if not Dataset.exists(config.dataset):
        if config.prompts is None:
            raise UsageError(f"{config.dataset} is no dataset yet; name a source of prompts with --prompts")
        require_dataset_folder(config.dataset)
        prompt_set = _prompt_set(config, model, spool)
        return Dataset(config.dataset, prompt_set, ShardPlan(len(spool), config.shard_size), config.student_name)
    dataset = Dataset.open(config.dataset, config.student_name)
    end_creation(config.dataset)
    if config.role == "teacher":
        dataset.check_tokenizer(config.model, model.tokenizer_fingerprint)
    if config.prompts is not None and _prompt_set(config, model, None).id != dataset.prompt_set.id:
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


def _check_stored(dataset: Dataset, config: GenerateConfig, model: ModelInfo) -> None:
    """Raise unless the prompts of a dataset, as they are, are what the config says and what the model knows."""
    stored = dataset.prompt_set.template_args
    if config.template_args not in (None, stored):
        raise MismatchError(
            f"{config.dataset / 'dataset.json'}: its prompts were made with template_args {json.dumps(stored)}; leave "
            f"--template-args out, or take another --dataset"
        )
    if dataset.prompt_set.vocab_size > model.embedding_rows:
        for shard in range(dataset.plan.count):
            rows = dataset.prompts.read_arrow(shard, ["prompt_ids"])
            check_rows(rows, dataset.prompts.path(shard), model.embedding_rows)
