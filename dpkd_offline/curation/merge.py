"""`merge` and `subset`: make a new dataset of the rows of others, and note who made each of them.

Both select rows by what the parts hold, and then copy the selected rows shard by shard. All tables are claimed before
the prompts are written: from its first file on the new folder belongs to one command, and no table of it is missed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Any

from dpkd_offline.common import console
from dpkd_offline.common.console import progress
from dpkd_offline.common.errors import MismatchError
from dpkd_offline.common.results import Result
from dpkd_offline.config.data import MergeConfig, SubsetConfig
from dpkd_offline.curation.select import Selection, Tables, select_new, select_satisfying
from dpkd_offline.dataset.card import write_card
from dpkd_offline.dataset.catalog import begun_tables, related_table
from dpkd_offline.dataset.dataset import Dataset, PromptSet
from dpkd_offline.dataset.integrity import check_provenance
from dpkd_offline.dataset.layout import PAIRS, PROMPTS, STUDENT_PROMPTS, TOP_K
from dpkd_offline.dataset.provenance import flat
from dpkd_offline.dataset.table import ShardPlan, Table
from dpkd_offline.dataset.writing import check_claim, claim, dataset_output, write_shard

# What `_table.json` of the parts says of a table:
ALIKE = (  # must be the same,
    "model.revision",
    "student.revision",
    "eos_token_ids",
    "tokenizer_fingerprint",
    "template_fingerprint",
    "scored",
)
OWN = {"stage", "prompt_set", "config", "versions", "rule", "parts", "rows", "responses"}  # is of the part alone,
LARGEST = {"vocab_size", "max_new_tokens"}  # is the largest,
LISTED = {"engine", "dtype", "license", "source"}  # is a list of all,
FIRST = {"name", "tokenizer"}  # or is what the first of them calls it.

ONE_KIND = "a merge is of datasets of one template, tokenizer and teacher, and in each round one student"


@dataclass(frozen=True)
class MergeResult(Result):
    """The folder of a new dataset."""

    rows: int
    tables: tuple[str, ...]  # that it has besides its prompts
    left_out: int  # rows of the parts: of a merge those that an earlier part has, of a subset those outside it


def merge(config: MergeConfig) -> MergeResult:
    """Join datasets: the prompts of all, in the order given, and the tables that each of them has whole.

    A prompt that stands in an earlier part, too, is left out with its responses. The same command again goes on after
    the last committed shard.

    Raises:
        DataError: a part is no dataset, or a shard of it is wrong.
        MismatchError: the parts have not one template, tokenizer, teacher and student of a round; an id stands on two
            different prompts; or the folder holds what another command began.
    """
    parts = [Dataset.open(place) for place in config.parts]
    _check_one_kind(parts)
    selection = Selection(parts, _carried(parts))
    left_out = select_new(selection)
    console.info(
        f"merge: {len(selection)} prompts" + (f", and {left_out} that an earlier part has" if left_out else "")
    )
    prompt_sets = [part.prompt_set for part in parts]
    rows = Counter(duplicates=left_out)
    for prompt_set in prompt_sets:
        rows.update(prompt_set.rows)
    joined = replace(
        prompt_sets[0],
        source=_listed([prompt_set.source for prompt_set in prompt_sets]),
        license=_listed([prompt_set.license for prompt_set in prompt_sets]),
        vocab_size=max(prompt_set.vocab_size for prompt_set in prompt_sets),
        rows=dict(rows),
    )
    with dataset_output(config.output, "merge"):
        _copy(config.output, joined, config.shard_size, selection, {"stage": "merge"})
    return MergeResult(config.output, len(selection), tuple(selection.carried[0]), left_out)


def subset(config: SubsetConfig) -> MergeResult:
    """Take the rows that satisfy all rules, in their order, with every table that is whole.

    The same command again goes on after the last committed shard.

    Raises:
        DataError: a shard is wrong, a rule is about tables that are not there, or no row satisfies the rules.
        MismatchError: the folder holds what another command began.
    """
    dataset = Dataset.open(config.dataset)
    selection = Selection([dataset], _carried([dataset]))
    select_satisfying(selection, config)
    left_out = dataset.plan.rows - len(selection)
    console.info(f"subset: {len(selection)} of {dataset.plan.rows} rows satisfy the rules")
    rows = Counter(dataset.prompt_set.rows)
    rows.update(outside_subset=left_out)
    prompt_set = replace(dataset.prompt_set, rows=dict(rows))
    rule = config.model_dump(exclude={"dataset", "output"})
    with dataset_output(config.output, "subset"):
        _copy(config.output, prompt_set, dataset.plan.shard_size, selection, {"stage": "subset", "rule": rule})
    return MergeResult(config.output, len(selection), tuple(selection.carried[0]), left_out)


# --- what the parts are ---------------------------------------------------------------------------------------------


def _check_one_kind(parts: Sequence[Dataset]) -> None:
    """Raise MismatchError unless all prompts were rendered and tokenised in one way."""
    for part in parts[1:]:
        for key in ("template", "template_fingerprint", "tokenizer_fingerprint"):
            own, first = getattr(part.prompt_set, key), getattr(parts[0].prompt_set, key)
            if own != first:
                path = part.root / "dataset.json"
                raise MismatchError(f"{path}: {key} is {own}, that of {parts[0].root} is {first}; {ONE_KIND}")


def _carried(parts: Sequence[Dataset]) -> list[Tables]:
    """Per part the tables, but the prompts, that all parts have whole. Prints which are left out, and why.

    Raises:
        MismatchError: a table's provenance is not of its dataset, or differs where it must not.
    """
    begun = [{table.name: table for table in begun_tables(part) if table.kind is not PROMPTS} for part in parts]
    whole = [{name: table for name, table in tables.items() if not table.pending()} for tables in begun]
    carried: list[Tables] = [{} for _ in parts]
    for name in dict.fromkeys(name for tables in begun for name in tables):
        lacking = [str(part.root) for part, tables in zip(parts, whole, strict=True) if name not in tables]
        if why := f"not whole in {', '.join(lacking)}" if lacking else _unfit(name, whole, carried[0]):
            console.info(f"{name} is left out: {why}")
            continue
        for chosen, tables in zip(carried, whole, strict=True):
            chosen[name] = tables[name]
    for tables in carried:
        for name, table in tables.items():
            _check_alike(table, carried[0][name])
    for part, tables in zip(parts, carried, strict=True):
        provenances = {name: table.require_provenance() for name, table in tables.items()}
        for table in tables.values():
            check_provenance(table, provenances, part)
    return carried


def _unfit(name: str, whole: Sequence[Tables], carried: Collection[str]) -> str | None:
    """Why a table that all parts have is left out of the new dataset; None if it is not."""
    if whole[0][name].kind is not TOP_K:
        return None
    if len(ks := dict.fromkeys(str(tables[name].require_provenance()["top_k"]) for tables in whole)) > 1:
        return f"its K are {', '.join(ks)}"
    pairs = related_table(whole[0][name], PAIRS)
    return None if pairs in carried else f"it belongs to {pairs}"


def _check_alike(table: Table[Any], first: Table[Any]) -> None:
    own, others = flat(table.require_provenance()), flat(first.require_provenance())
    for key in ALIKE:
        if own.get(key) != others.get(key):
            raise MismatchError(
                f"{table.provenance_path}: {key} is {own.get(key)}, that of {first.folder} is {others.get(key)}; "
                f"{ONE_KIND}"
            )


# --- the new dataset ------------------------------------------------------------------------------------------------


def _copy(root: Path, like: PromptSet, shard_size: int, selection: Selection, command: Mapping[str, Any]) -> None:
    """Write the selection as a dataset: who makes each table, the prompts, dataset.json, and then the tables.

    Args:
        like: the new prompt set, but for what follows from its prompts.
        command: the keys of `_table.json` that describe the command.
    """
    digest = selection.digest
    prompt_set = replace(
        like,
        id=digest.id(like.template, like.template_fingerprint, like.tokenizer_fingerprint),
        longest_prompt=digest.longest[0],
        longest_prompt_tokens=digest.longest[1],
    )
    dataset = Dataset(root, prompt_set, ShardPlan(len(selection), shard_size))
    _check_is_ours(root, dataset)
    provenances = {
        table.at(root, dataset.plan): _provenance(name, selection, prompt_set.id, command)
        for name, table in selection.carried[0].items()
    }
    for table, provenance in provenances.items():
        check_claim(table, provenance)
    for table, provenance in provenances.items():
        claim(table, provenance)
    if not Dataset.exists(root):
        Dataset.create(root, prompt_set, selection, shard_size)

    def copy(shard: int, table: Table[Any], ids: Sequence[str]) -> None:
        write_shard(table, shard, selection.read(table.name, shard * shard_size, ids))

    with progress(str(command["stage"]), dataset.plan.rows, "row") as shown, ThreadPoolExecutor() as threads:
        for shard in range(dataset.plan.count):
            if pending := [table for table in provenances if table.entry(shard) is None]:
                ids = dataset.prompts.read_arrow(shard, ["id"])["id"].to_pylist()
                for _ in threads.map(copy, repeat(shard), pending, repeat(ids)):
                    pass  # all of a shard at once: most of the time goes into waiting for the disk
            shown.advance(dataset.plan.rows_of(shard))
    write_card(dataset)


def _check_is_ours(root: Path, dataset: Dataset) -> None:
    """Raise MismatchError where the folder holds another dataset, or prompts of one that never came to be."""
    instead = "repeat the command that began it, or name another folder"
    if Dataset.exists(root):
        existing = Dataset.open(root)
        prompt_set = replace(existing.prompt_set, license=dataset.prompt_set.license)  # which may be written by hand
        if (prompt_set, existing.plan) != (dataset.prompt_set, dataset.plan):
            raise MismatchError(f"{root / 'dataset.json'}: not the dataset that this command makes; {instead}")
    ours = {dataset.prompts.path(shard).name for shard in range(dataset.plan.count)}
    for path in sorted((root / "prompts").glob("*.parquet")):
        if path.name not in ours:
            raise MismatchError(f"{path}: not one of the {len(ours)} shards that this command makes; {instead}")


def _provenance(name: str, selection: Selection, prompt_set: str, command: Mapping[str, Any]) -> dict[str, Any]:
    """What `_table.json` says of a table of parts: what they have in common, and all that each of them says.

    Prompts in a student's tokens are what `generate` would make of the new dataset's, and so said to be that.
    """
    provenances = [carried[name].require_provenance() for carried in selection.carried]
    common = _in_common([{key: value for key, value in one.items() if key not in OWN} for one in provenances])
    common["prompt_set"] = prompt_set
    if selection.carried[0][name].kind is STUDENT_PROMPTS:
        return {"stage": provenances[0]["stage"], **common}
    parts = [
        {"dataset": part.prompt_set.id, "rows": selection.rows_of(number), "made": provenances[number]}
        for number, part in enumerate(selection.parts)
    ]
    return {**command, **common, "parts": parts}


def _in_common(mappings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The keys on which all agree, and those that are needed though they do not."""
    common: dict[str, Any] = {}
    for key in mappings[0]:
        values: list[Any] = [one.get(key) for one in mappings]
        if all(isinstance(value, Mapping) for value in values):
            common[key] = _in_common(values)
        elif key in FIRST or all(value == values[0] for value in values):
            common[key] = values[0]
        elif key in LARGEST:
            common[key] = max(values)
        elif key in LISTED:
            common[key] = _listed(values)
    return common


def _listed(texts: Sequence[Any]) -> Any:
    """Several texts as one, each named once; None where one of them is not known."""
    if None in texts:
        return None
    return ", ".join(dict.fromkeys(one for text in texts for one in text.split(", ")))
