"""`merge` and `subset`: make a new dataset of the rows of others, and note who made each of them.

Both select rows by what the parts hold, and then copy the selected rows shard by shard. All tables are claimed before
the prompts are written: from its first file on the new folder belongs to one command, and no table of it is missed.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate, repeat
from pathlib import Path
from typing import Any

from dpkd_offline.common import console
from dpkd_offline.common.console import progress
from dpkd_offline.common.errors import DataError, MismatchError
from dpkd_offline.common.locations import Location
from dpkd_offline.common.results import Result
from dpkd_offline.config.data import MergeConfig, SubsetConfig
from dpkd_offline.curation.pair_rules import Pairing
from dpkd_offline.curation.rules import Rules
from dpkd_offline.curation.select import Selection, Tables, select_new, select_satisfying
from dpkd_offline.dataset.card import write_card
from dpkd_offline.dataset.catalog import begun_tables, related_table, require_one_teacher, samples_of_pairs
from dpkd_offline.dataset.dataset import Dataset, PromptSet
from dpkd_offline.dataset.integrity import check_provenance
from dpkd_offline.dataset.layout import PAIRS, PROMPTS, STUDENT_PROMPTS, TEACHER_PROMPTS, TEACHER_RESPONSES, TOP_K
from dpkd_offline.dataset.provenance import flat, several
from dpkd_offline.dataset.schema import TEACHER
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
    "system",
)
OF_TEACHER = (TEACHER_RESPONSES, PAIRS)  # tables that may be of several teachers
OWN = {"stage", "prompt_set", "config", "versions", "rule", "parts", "teachers", "rows", "responses"}  # is of one part,
REUSED = {"reused_from", "reused_student"}  # of pairs by rule, too, which are not those of one table,
LARGEST = {"vocab_size", "max_new_tokens"}  # is the largest,
LISTED = {"engine", "dtype", "license", "source"}  # is a list of all,
FIRST = {"name", "tokenizer"}  # or is what the first of them calls it.

SEVERAL = "--several-teachers keeps the rows of all, each with its teacher's revision"
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

    Of several teachers, where that is asked for, each row of y_t and of pairs says whose it is.

    Raises:
        DataError: a part is no dataset, or a shard of it is wrong.
        MismatchError: the parts have not one template, tokenizer, teacher and student of a round; an id stands on two
            different prompts; or the folder holds what another command began.
    """
    parts = [Dataset.open(place) for place in config.parts]
    _check_one_kind(parts)
    selection = Selection(parts, _carried(parts, config.several_teachers))
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
        system=prompt_sets[0].system if len({prompt_set.system for prompt_set in prompt_sets}) == 1 else None,
        taken=_taken(prompt_sets),
    )
    with dataset_output(config.output, "merge"):
        _copy(config.output, joined, config.shard_size, selection, {"stage": "merge"})
    return MergeResult(config.output, len(selection), tuple(selection.carried[0]), left_out)


def subset(config: SubsetConfig) -> MergeResult:
    """Take the rows that satisfy all rules, in their order, with every table that is whole; or pairs that a rule makes
    of several samples, with the tables that these are made of.

    The same command again goes on after the last committed shard.

    Raises:
        DataError: a shard or a score is wrong, a rule is about tables that are not there, or no row satisfies the
            rules.
        MismatchError: the folder holds what another command began, or the samples were not made in one way.
        UsageError: there is no such student, or a rule cannot be of several samples.
    """
    dataset = Dataset.open(config.dataset, config.student_name)
    if config.pairs is not None:
        require_one_teacher(dataset)
    pairing = None if config.pairs is None else Pairing.open(dataset, config)
    carried = _carried([dataset])[0] if pairing is None else pairing.carried
    selection, rules = Selection([dataset], [carried], pairing), Rules(dataset, carried, pairing, config)
    select_satisfying(selection, rules, config.limit)
    left_out = dataset.plan.rows - selection.prompts_of(0)
    if pairing is None:
        console.info(f"subset: {len(selection)} of {dataset.plan.rows} rows satisfy the rules")
    else:
        console.info(f"subset: {len(selection)} pairs; {left_out} of {dataset.plan.rows} prompts have none")
    rows = Counter(dataset.prompt_set.rows)
    rows.update(outside_subset=left_out)
    prompt_set = replace(dataset.prompt_set, rows=dict(rows))
    with dataset_output(config.output, "subset"):
        command = {"stage": "subset", "rule": rules.as_dict()}
        _copy(config.output, prompt_set, dataset.plan.shard_size, selection, command, rules.vocab_size)
    return MergeResult(config.output, len(selection), tuple(selection.carried[0]), left_out)


def _taken(prompt_sets: Sequence[PromptSet]) -> dict[str, list[str]]:
    """What was taken of the sources of all parts."""
    keys = dict.fromkeys(key for prompt_set in prompt_sets for key in prompt_set.taken)
    return {key: list(dict.fromkeys(n for one in prompt_sets for n in one.taken.get(key, ()))) for key in keys}


# --- what the parts are ---------------------------------------------------------------------------------------------


def _check_one_kind(parts: Sequence[Dataset]) -> None:
    """Raise MismatchError unless all prompts were rendered and tokenised in one way."""
    for part in parts[1:]:
        for key in ("template", "template_fingerprint", "tokenizer_fingerprint"):
            own, first = getattr(part.prompt_set, key), getattr(parts[0].prompt_set, key)
            if own != first:
                path = part.root / "dataset.json"
                raise MismatchError(f"{path}: {key} is {own}, that of {parts[0].root} is {first}; {ONE_KIND}")
        if (part.prompt_set.teacher_prompts is None) != (parts[0].prompt_set.teacher_prompts is None):
            told, other = (part, parts[0]) if part.prompt_set.teacher_prompts else (parts[0], part)
            raise MismatchError(
                f"{told.root / 'dataset.json'}: its teacher sees prompts of its own, that of {other.root} sees "
                f"those of the students; {ONE_KIND}"
            )


def _carried(parts: Sequence[Dataset], several_teachers: bool = False) -> list[Tables]:
    """Per part the tables, but the prompts, that all parts have whole. Prints which are left out, and why.

    Raises:
        MismatchError: a table's provenance is not of its dataset, or differs where it must not.
    """
    begun = [{table.name: table for table in begun_tables(part) if table.kind is not PROMPTS} for part in parts]
    whole = [{name: table for name, table in tables.items() if not table.pending()} for tables in begun]
    carried: list[Tables] = [{} for _ in parts]
    for name in dict.fromkeys(name for tables in begun for name in tables):
        lacking = [str(part.root) for part, tables in zip(parts, whole, strict=True) if name not in tables]
        unfit = None if lacking else _unfit(name, whole, carried[0], several_teachers)
        if why := f"not whole in {', '.join(lacking)}" if lacking else unfit:
            console.info(f"{name} is left out: {why}")
            continue
        for chosen, tables in zip(carried, whole, strict=True):
            chosen[name] = tables[name]
    for tables in carried:
        for name, table in tables.items():
            _check_alike(table, carried[0][name], several_teachers)
    for part, tables in zip(parts, carried, strict=True):
        provenances = {name: table.require_provenance() for name, table in tables.items()}
        for table in tables.values():
            check_provenance(table, provenances, part)
    return carried


def _unfit(name: str, whole: Sequence[Tables], carried: Collection[str], several_teachers: bool) -> str | None:
    """Why a table that all parts have is left out of the new dataset; None if it is not."""
    table, provenances = whole[0][name], [tables[name].require_provenance() for tables in whole]
    if table.sample and len({samples_of_pairs(of) for of in provenances}) > 1:
        return "its y_t or y_s are of the first sample in some"
    if table.kind is not TOP_K:
        return None
    if several_teachers and len({of["model"]["revision"] for of in provenances}) > 1:
        return "its likeliest tokens are those of several teachers, and no student can match more than one"
    for key, what in (("top_k", "K"), ("top_mass", "shares of the mass")):
        if len(values := dict.fromkeys(str(one.get(key)) for one in provenances)) > 1:
            return f"its {what} are {', '.join(values)}"
    if any(one.get("columns") != provenances[0].get("columns") for one in provenances):
        return "its log-probs are float32 in some of the parts, and in half precision in others"
    pairs = related_table(table, PAIRS)
    return None if pairs in carried else f"it belongs to {pairs}"


def _check_alike(table: Table[Any], first: Table[Any], several_teachers: bool) -> None:
    own, others = flat(table.require_provenance()), flat(first.require_provenance())
    for key in ALIKE:
        known = None not in (own.get(key), others.get(key))  # imported responses are nobody's
        of_teacher = key == "model.revision" and table.kind in OF_TEACHER and known
        if own.get(key) != others.get(key) and not (of_teacher and several_teachers):
            raise MismatchError(
                f"{table.provenance_path}: {key} is {own.get(key)}, that of {first.folder} is {others.get(key)}; "
                f"{ONE_KIND}{f'; {SEVERAL}' if of_teacher else ''}"
            )


# --- the new dataset ------------------------------------------------------------------------------------------------


def _copy(
    root: Path,
    like: PromptSet,
    shard_size: int,
    selection: Selection,
    command: Mapping[str, Any],
    vocab_size: int | None = None,
) -> None:
    """Write the selection as a dataset: who makes each table, the prompts, dataset.json, and then the tables.

    Args:
        like: the new prompt set, but for what follows from its prompts.
        command: the keys of `_table.json` that describe the command.
        vocab_size: where all ids that are left in the dataset's own tokens are smaller.
    """
    digest, identity = selection.digest, (like.template, like.template_fingerprint, like.tokenizer_fingerprint)
    if vocab_size is not None:
        like = replace(like, vocab_size=min(vocab_size, like.vocab_size))
    prompt_set = replace(
        like,
        id=digest.id(*identity),
        longest_prompt=digest.longest[0],
        longest_prompt_tokens=digest.longest[1],
        columns=digest.columns,
        teacher_prompts=digest.teacher_prompts(*identity),
    )
    dataset = Dataset(root, prompt_set, ShardPlan(len(selection), shard_size))
    _check_is_ours(root, dataset)
    provenances = {
        table.at(root, dataset.plan): _provenance(name, selection, prompt_set, command, vocab_size)
        for name, table in selection.carried[0].items()
    }
    for table, provenance in provenances.items():
        check_claim(table, provenance)
    for table, provenance in provenances.items():
        claim(table, provenance)
    if not Dataset.exists(root):
        Dataset.create(root, prompt_set, selection, shard_size)

    def copy(shard: int, table: Table[Any], ids: Sequence[str]) -> None:
        rows, runs = selection.read(table.name, shard * shard_size, ids), provenances[table].get("teachers")
        write_shard(table, shard, _with_teachers(rows, runs, shard * shard_size, table.path(shard)) if runs else rows)

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


def _provenance(
    name: str, selection: Selection, prompt_set: PromptSet, command: Mapping[str, Any], vocab_size: int | None
) -> dict[str, Any]:
    """What `_table.json` says of a table of parts: what they have in common, and all that each of them says.

    Prompts as a student or the teacher sees them are what `generate` would make, and so said to be that.
    """
    parts = selection.origins(name)
    provenances = [part["made"] for part in parts]
    common = _in_common([{key: value for key, value in one.items() if key not in OWN} for one in provenances])
    common["prompt_set"], kind = prompt_set.id, selection.carried[0][name].kind
    own_tokens = common["tokenizer_fingerprint"] == prompt_set.tokenizer_fingerprint
    if vocab_size is not None and own_tokens and kind is not TEACHER_PROMPTS:
        common["vocab_size"] = min(vocab_size, common["vocab_size"])
    if kind in (STUDENT_PROMPTS, TEACHER_PROMPTS):
        columns = selection.digest.columns if kind is STUDENT_PROMPTS else selection.digest.columns_of_teacher
        common = {key: value for key, value in common.items() if key != "columns"}
        return {"stage": provenances[0]["stage"], **common, **({"columns": columns} if columns else {})}
    if selection.pairing is not None:
        common = {key: value for key, value in common.items() if key not in REUSED}
    elif runs := _teachers(name, selection, provenances):
        common |= {"model": several({run["revision"]: run["name"] for run in runs}), "teachers": runs}
        common["columns"] = {**common.get("columns", {}), "teacher": str(TEACHER.type)}
    return {**command, **common, "parts": parts}


def _teachers(name: str, selection: Selection, provenances: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Whose the rows of a table are, in their order, where its parts are of several teachers; else nothing."""
    revisions = {one["model"]["revision"] for one in provenances if "model" in one}
    if selection.carried[0][name].kind not in OF_TEACHER or (
        len(revisions) < 2 and not any("teachers" in one for one in provenances)
    ):
        return []
    runs: list[dict[str, Any]] = []
    for part, made in enumerate(provenances):
        of_part = made.get("teachers") or [{**made["model"], "rows": selection.parts[part].plan.rows}]
        counts = selection.rows_among(part, list(accumulate(run["rows"] for run in of_part)))
        for run, rows in zip(of_part, counts, strict=True):
            if rows and runs and runs[-1]["revision"] == run["revision"]:
                runs[-1]["rows"] += rows
            elif rows:
                runs.append({"name": run["name"], "revision": run["revision"], "rows": rows})
    return runs


def _with_teachers(rows: Sequence[Any], runs: Sequence[Mapping[str, Any]], first: int, path: Location) -> list[Any]:
    """Rows of a table from number `first` on, each with the revision of its teacher.

    Raises:
        DataError: a row of a part says that it is another's.
    """
    ends, named = list(accumulate(run["rows"] for run in runs)), []
    for number, row in enumerate(rows, start=first):
        revision = runs[bisect_right(ends, number)]["revision"]
        if row.teacher not in (None, revision):
            raise DataError(f"{path}: prompt '{row.id}': column 'teacher' is not that of _table.json of its part")
        named.append(replace(row, teacher=revision))
    return named


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
