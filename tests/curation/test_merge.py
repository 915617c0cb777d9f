"""`merge` and `subset`: the rows of their parts, who made what, refusals, kills, and few shards in memory at once."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from helpers.faults import start
from helpers.memory import in_memory
from helpers.runs import metrics_of, train_config
from helpers.tiny import files_of, generate_config, replace_shard, rows, score_config, write_jsonl

from dpkd_offline import cli
from dpkd_offline.common.errors import DataError, DpkdError, MismatchError
from dpkd_offline.config.data import ImportConfig, MergeConfig, SubsetConfig
from dpkd_offline.curation.import_pairs import import_pairs
from dpkd_offline.curation.inspect import inspect, inspection_table
from dpkd_offline.curation.merge import MergeResult, merge, subset
from dpkd_offline.curation.verify import verify
from dpkd_offline.dataset.catalog import begun_tables
from dpkd_offline.dataset.columns import draws_of
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.dataset.provenance import origins
from dpkd_offline.dataset.schema import PreferencePair, Prompt, to_table
from dpkd_offline.dataset.table import Table
from dpkd_offline.generation.generate import generate
from dpkd_offline.generation.score_teacher import score_teacher
from dpkd_offline.models.info import ModelInfo
from dpkd_offline.models.loading import load_model
from dpkd_offline.training.trainer import train

SOURCES = {"first": rows(14), "second": rows(24)[9:]}  # of both are the rows 9 to 13
OTHERWISE: dict[str, Any] = {"seed": 5, "temperature": 0.9, "max_new_tokens": 120, "shard_size": 4}  # in the second
TABLES = [
    *("prompts", "responses/teacher", "prompts/student", "responses/student/round-000", "pairs/round-000"),
    *(f"students/small/{name}/round-000" for name in ("responses/student", "pairs", "top_k")),
]


@pytest.fixture(scope="module")
def another(tmp_path_factory: pytest.TempPathFactory, students: dict[str, Path]) -> Path:
    """A student that shares no tokenizer with its teacher."""
    folder = tmp_path_factory.mktemp("another") / "another"
    load_model(str(students["llama"]), "float32").save_pretrained(folder)
    tokenizer = ModelInfo(str(students["llama"])).tokenizer
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def parts(
    tmp_path_factory: pytest.TempPathFactory, teachers: dict[str, Path], students: dict[str, Path], another: Path
) -> dict[str, Path]:
    """Two datasets of one teacher, each with a student of another tokenizer, and one called small that shares it."""
    root = tmp_path_factory.mktemp("parts")
    for name, source in SOURCES.items():
        how = {"shard_size": 6} if name == "first" else OTHERWISE
        file = write_jsonl(root / f"{name}.jsonl", source)
        generate(generate_config(root / name, "teacher", teachers["llama"], prompts=str(file), **how))
        generate(generate_config(root / name, "student", another, **how))
        generate(generate_config(root / name, "student", students["llama"], student_name="small", **how))
        score_teacher(score_config(root / name, teachers["llama"], student=str(another)))
        score_teacher(score_config(root / name, teachers["llama"], student_name="small", top_k=3))
    return {name: root / name for name in SOURCES}


@pytest.fixture
def copies(parts: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    return {name: shutil.copytree(folder, tmp_path / name) for name, folder in parts.items()}


def merged(output: Path, *places: object, **options: object) -> Path:
    return merge(MergeConfig.model_validate({"output": output, "parts": places, "shard_size": 5, **options})).path


def taken(dataset: object, output: Path, **rules: object) -> Path:
    return subset(SubsetConfig.model_validate({"dataset": dataset, "output": output, **rules})).path


def rows_of(folder: Path) -> dict[str, list[Any]]:
    tables = {table.name: table for table in begun_tables(Dataset.open(folder))}
    return {name: [row for s in range(table.plan.count) for row in table.read(s)] for name, table in tables.items()}


def ids_of(folder: Path) -> list[str]:
    return [row.id for row in rows_of(folder)["prompts"]]


def made_by(folder: Path, name: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / name / "_table.json").read_text())
    return value


def change(path: Path, **values: object) -> None:
    """Other values of a JSON file; `a__b` is b of a."""
    content = json.loads(path.read_text())
    for key, value in values.items():
        *above, last = key.split("__")
        inner = content
        for name in above:
            inner = inner[name]
        inner[last] = value
    path.write_text(json.dumps(content))


# --- merge ----------------------------------------------------------------------------------------------------------


def test_a_merge_holds_the_rows_of_its_parts_in_order(
    parts: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = merged(tmp_path / "out", *parts.values())
    assert "merge: 24 prompts, and 5 that an earlier part has" in capfd.readouterr().err
    first, second, joined = (rows_of(folder) for folder in (*parts.values(), out))
    assert list(joined) == TABLES
    for name, joined_rows in joined.items():
        assert joined_rows == [*first[name], *second[name][5:]], name
    assert verify(out).rows == dict.fromkeys(TABLES, 24)
    dataset = Dataset.open(out)
    assert (dataset.plan.rows, dataset.plan.shard_size, dataset.plan.count) == (24, 5, 5)
    assert dataset.prompt_set.source == "first.jsonl, second.jsonl"
    counts = {"rows": 14 + 15, "too_long": 0, "short_reference": 0, "duplicates": 5}
    assert dataset.prompt_set.rows == counts
    longest = max(joined["prompts"], key=lambda prompt: len(prompt.prompt_ids))
    assert dataset.prompt_set.longest_prompt_tokens == len(longest.prompt_ids)
    assert "pairs/round-000: 5 of 5 shards, llama (sha256:" in inspection_table(inspect(out))
    assert "first.jsonl, second.jsonl" in (out / "README.md").read_text()
    assert not [name for name in files_of(out) if name.endswith(".tmp")]


def test_what_merge_and_subset_return(parts: dict[str, Path], tmp_path: Path) -> None:
    whole, some = tmp_path / "whole", tmp_path / "some"
    assert merge(MergeConfig(output=whole, parts=tuple(map(str, parts.values())))) == MergeResult(
        whole, rows=24, tables=tuple(TABLES[1:]), left_out=5
    )
    assert subset(SubsetConfig(dataset=str(whole), output=some, limit=7)) == MergeResult(
        some, rows=7, tables=tuple(TABLES[1:]), left_out=17
    )


def test_a_merge_says_who_made_its_parts(copies: dict[str, Path], tmp_path: Path) -> None:
    first, second = copies.values()
    for path in second.glob("**/round-000/_table.json"):
        change(path, **{("model__name" if "responses" not in path.parts else "license"): "big"})
    change(second / "responses/teacher/_table.json", model__name="big", license="mit")
    change(second / "pairs/round-000/_table.json", engine="vllm", dtype="bfloat16")
    for part, license in ((first, "apache-2.0"), (second, "mit")):
        change(part / "dataset.json", prompt_set__license=license)
    out = merged(tmp_path / "out", first, second)
    pairs, y_t = made_by(out, "pairs/round-000"), made_by(out, "responses/teacher")
    assert (pairs["stage"], pairs["engine"], pairs["dtype"]) == ("merge", "transformers, vllm", "float32, bfloat16")
    assert pairs["model"] == made_by(first, "pairs/round-000")["model"]
    assert (pairs["student"]["name"], pairs["scored"], pairs["round"]) == ("another", "text", 0)
    assert y_t["sampling"] == {"max_new_tokens": 120, "top_p": 1.0}
    assert y_t["eos_token_ids"] == [1]
    assert not {"seed", "config", "versions"} & y_t.keys()
    assert (y_t["license"], Dataset.open(out).prompt_set.license) == (
        None,
        "apache-2.0, mit",
    )  # who knows
    for name in TABLES[1:]:
        if name != "prompts/student":
            parts_said = [
                {"dataset": Dataset.open(part).prompt_set.id, "rows": count, "made": made_by(part, name)}
                for part, count in ((first, 14), (second, 10))
            ]
            assert made_by(out, name)["parts"] == parts_said
        assert made_by(out, name)["prompt_set"] == Dataset.open(out).prompt_set.id
    verify(out)
    assert "transformers, vllm float32, bfloat16" in inspection_table(inspect(out))
    card = (out / "README.md").read_text()
    assert "`merge` of 14 and 10 rows, model `llama`" in card
    assert "engine `transformers, vllm` in `float32, bfloat16`" in card


def test_a_merge_is_trained_on_and_gets_another_round(
    parts: dict[str, Path], teachers: dict[str, Path], students: dict[str, Path], another: Path, tmp_path: Path
) -> None:
    out = merged(tmp_path / "out", *parts.values())
    for objective in ("dpkd", "kd"):
        config = train_config(out, students["llama"], tmp_path / objective, max_steps=2, student_name="small")
        train(config.model_copy(update={"objective": objective}))
        assert [step["step"] for step in metrics_of(tmp_path / objective)] == [1, 2]
    assert (
        json.loads((tmp_path / "dpkd" / "training.json").read_text())["prompt_set"] == Dataset.open(out).prompt_set.id
    )
    train(train_config(out, another, tmp_path / "another", max_steps=2))
    for model, name in ((tmp_path / "dpkd", "small"), (another, None)):
        generate(generate_config(out, "student", model, round=1, student_name=name))
        student = None if name else str(model)
        score_teacher(score_config(out, teachers["llama"], round=1, student_name=name, student=student))
    assert verify(out).rows == dict.fromkeys(verify(out).rows, 24)
    assert {"pairs/round-001", "students/small/pairs/round-001"} <= verify(out).rows.keys()
    with pytest.raises(MismatchError, match="was made with stage=merge, this command has stage=generate"):
        generate(generate_config(out, "teacher", teachers["llama"], max_new_tokens=14))


def test_what_was_combined_is_combined_again(parts: dict[str, Path], tmp_path: Path) -> None:
    first, second = parts.values()
    once = merged(tmp_path / "once", first, taken(second, tmp_path / "some", limit=9))
    most = taken(once, tmp_path / "most", share=0.8)
    twice = merged(tmp_path / "twice", most, second)
    assert ids_of(twice) == list(dict.fromkeys([*ids_of(most), *ids_of(second)]))
    assert verify(twice).rows == dict.fromkeys(TABLES, len(ids_of(twice)))
    provenance = made_by(twice, "students/small/top_k/round-000")
    own = [made_by(part, "students/small/top_k/round-000") for part in (first, second, second)]
    assert list(origins(provenance)) == own
    assert (provenance["stage"], provenance["parts"][0]["made"]["stage"]) == ("merge", "subset")
    assert Dataset.open(twice).prompt_set.source == "first.jsonl, second.jsonl"
    change(
        twice / "pairs/round-000/_table.json",
        parts=[{**provenance["parts"][0], "made": {**own[0], "stage": "generate"}}],
    )
    with pytest.raises(
        MismatchError, match=r"pairs/round-000/_table\.json: stage is 'generate', that of the dataset is"
    ):
        verify(twice)
    change(twice / "pairs/round-000/_table.json", parts=[{"dataset": "x"}])
    with pytest.raises(DataError, match=r"_table\.json: key 'parts\.0\.rows' is missing"):
        verify(twice)


def test_imported_responses_are_combined(teachers: dict[str, Path], tmp_path: Path) -> None:
    for name, source in SOURCES.items():
        rows = [{**row, "chosen": f"{row['id']}, of course.", "rejected": "No."} for row in source]
        file = write_jsonl(tmp_path / f"{name}.jsonl", rows)
        import_pairs(
            ImportConfig.model_validate(
                {"source": str(file), "dataset": tmp_path / name, "model": str(teachers["llama"]), "shard_size": 6}
            )
        )
    out = merged(tmp_path / "out", *(tmp_path / name for name in SOURCES))
    provenance = made_by(out, "responses/teacher")
    assert (provenance["stage"], provenance["source"], provenance["column"]) == (
        "merge",
        "first.jsonl, second.jsonl",
        "chosen",
    )
    assert not {"model", "rows", "responses"} & provenance.keys()
    assert verify(out).rows == dict.fromkeys(["prompts", "responses/teacher", "responses/student/round-000"], 24)
    score_teacher(score_config(out, teachers["llama"]))
    some = taken(out, tmp_path / "some", drop_identical=True, limit=7)
    assert verify(some).rows["pairs/round-000"] == 7
    assert "imported from `first.jsonl, second.jsonl`" in (some / "README.md").read_text()


def test_tables_that_not_all_parts_have_alike_are_left_out_and_said(
    copies: dict[str, Path], teachers: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first, second = copies.values()
    shutil.rmtree(second / "pairs")
    shutil.rmtree(second / "students/small/top_k")
    score_teacher(score_config(second, teachers["llama"], student_name="small", top_k=2))
    capfd.readouterr()
    assert list(verify(merged(tmp_path / "out", first, second)).rows) == [
        name for name in TABLES if name != "pairs/round-000" and "top_k" not in name
    ]
    messages = capfd.readouterr().err
    assert f"pairs/round-000 is left out: not whole in {second}\n" in messages
    assert "students/small/top_k/round-000 is left out: its K are 3, 2\n" in messages
    pairs = Dataset.open(first, "small").pairs(0)
    pairs.entry_path(2).unlink()
    assert "top_k" not in " ".join(rows_of(taken(first, tmp_path / "some", limit=3)))
    assert "top_k/round-000 is left out: it belongs to students/small/pairs/round-000\n" in capfd.readouterr().err


def test_a_part_may_be_at_a_url(parts: dict[str, Path], tmp_path: Path) -> None:
    from_folders = merged(tmp_path / "here", *parts.values())
    from_urls = merged(tmp_path / "there", *(in_memory(folder, f"combining-{name}") for name, folder in parts.items()))
    assert files_of(from_urls) == files_of(from_folders)
    some = taken(in_memory(from_folders, "combining-merged"), tmp_path / "some", min_margin=0.5)
    assert files_of(some) == files_of(taken(from_folders, tmp_path / "same", min_margin=0.5))


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "template": (
        lambda part: change(part / "dataset.json", prompt_set__template="alpaca"),
        r"second/dataset\.json: template is alpaca, that of \S+first is chat; a merge is of datasets of one template",
    ),
    "tokenizer": (
        lambda part: change(part / "dataset.json", prompt_set__tokenizer_fingerprint="0"),
        r"second/dataset\.json: tokenizer_fingerprint is 0, that of \S+first is ",
    ),
    "teacher": (
        lambda part: [
            change(p, model__revision="0") for p in (part / "responses/teacher/_table.json", *pairs_of(part))
        ],
        r"second/responses/teacher/_table\.json: model\.revision is 0, that of \S+first/responses/teacher is sha256:",
    ),
    "student": (
        lambda part: [
            change(part / "responses/student/round-000/_table.json", model__revision="0"),
            change(part / "pairs/round-000/_table.json", student__revision="0"),
        ],
        r"second/responses/student/round-000/_table\.json: model\.revision is 0, that of \S+first",
    ),
    "EOS": (
        lambda part: change(part / "responses/teacher/_table.json", eos_token_ids=[1, 2]),
        r"d/responses/teacher/_table\.json: eos_token_ids is \[1, 2\], that of \S+first/responses/teacher is \[1\];",
    ),
    "a table of another dataset": (
        lambda part: change(part / "pairs/round-000/_table.json", prompt_set="0"),
        r"second/pairs/round-000/_table\.json: prompt_set is '0', that of the dataset",
    ),
    "another prompt": (
        lambda part: other_prompt(part),
        r"second/prompts/prompts-00001-of-00004\.parquet: row 0: column 'id': 'row-13' is another prompt in "
        r"\S+first/prompts/prompts-00002-of-00003\.parquet, row 1",
    ),
}


def pairs_of(part: Path) -> list[Path]:
    """What is said of all that the teacher scored."""
    return [path for path in part.glob("**/round-000/_table.json") if "responses" not in path.parts]


def other_prompt(part: Path) -> None:
    prompts = Dataset.open(part).prompts
    first, *others = prompts.read(1)
    changed = Prompt(first.id, first.messages, first.prompt, first.prompt_ids, ["Another reference."])
    replace_shard(prompts, 1, to_table([changed, *others], Prompt.schema))


@pytest.mark.parametrize("name", REFUSED)
def test_parts_that_do_not_belong_together_are_refused(name: str, copies: dict[str, Path], tmp_path: Path) -> None:
    damage, message = REFUSED[name]
    damage(copies["second"])
    with pytest.raises(MismatchError, match=message):
        merged(tmp_path / "out", *copies.values())
    assert not (tmp_path / "out").exists()


def test_a_row_of_another_prompt_is_refused(copies: dict[str, Path], tmp_path: Path) -> None:
    table = Dataset.open(copies["second"]).responses("teacher", 0)
    rows = table.read(2)
    replace_shard(table, 2, to_table([rows[0], rows[2], rows[1], rows[3]], table.record.schema))
    message = r"second/responses/teacher/responses-00002-of-00004\.parquet: row 1: column 'id' is not that of the p"
    for refused in (
        lambda: merged(tmp_path / "out", *copies.values()),
        lambda: taken(copies["second"], tmp_path / "some", max_tokens=500),
    ):
        with pytest.raises(DataError, match=message):
            refused()
    with pytest.raises(DataError, match=r"is only begun: .* `dpkd-offline merge` makes them"):
        verify(tmp_path / "out")


# --- subset ---------------------------------------------------------------------------------------------------------


def margin(pair: PreferencePair) -> float:
    return float(np.mean(pair.teacher_chosen_logps) - np.mean(pair.teacher_rejected_logps))


def whole(pair: PreferencePair) -> bool:
    return "length" not in (pair.chosen_finish_reason, pair.rejected_finish_reason)


def tokens(pair: PreferencePair) -> int:
    return len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))


@dataclass
class Row:
    """What the rules see of a row: of the pairs of all students."""

    id: str
    tokens: int
    whole: bool
    least: float  # of the margins
    most: float


def judged(folder: Path) -> list[Row]:
    tables = rows_of(folder)
    both = zip(tables["pairs/round-000"], tables["students/small/pairs/round-000"], strict=True)
    return [
        Row(
            pairs[0].id,
            max(map(tokens, pairs)),
            all(map(whole, pairs)),
            min(map(margin, pairs)),
            max(map(margin, pairs)),
        )
        for pairs in both
    ]


Rule = tuple[dict[str, Any], Callable[[Row], bool]]


def rule(name: str, judged_rows: list[Row]) -> Rule:
    """Options, and which rows satisfy them; their limits are between what the rows have."""
    tokens = sorted(row.tokens for row in judged_rows)[7]
    least, most = sorted(row.least for row in judged_rows)[3] - 1e-4, max(row.most for row in judged_rows) - 1e-4
    rules: dict[str, Rule] = {
        "max tokens": ({"max_tokens": tokens}, lambda row: row.tokens <= tokens),
        "truncated": ({"drop_truncated": True}, lambda row: row.whole),
        "min margin": ({"min_margin": least}, lambda row: row.least >= least),
        "margins": ({"min_margin": least, "max_margin": most}, lambda row: row.least >= least and row.most <= most),
        "limit": ({"limit": 9}, lambda row: True),
        "rules and the limit": (
            {"min_margin": least, "max_tokens": tokens, "limit": 4},
            lambda row: row.least >= least and row.tokens <= tokens,
        ),
    }
    return rules[name]


@pytest.mark.parametrize("name", ["max tokens", "truncated", "min margin", "margins", "limit", "rules and the limit"])
def test_a_subset_has_the_rows_that_satisfy_the_rules(name: str, parts: dict[str, Path], tmp_path: Path) -> None:
    before, judged_rows = rows_of(parts["second"]), judged(parts["second"])
    rules, satisfies = rule(name, judged_rows)
    wanted = [row.id for row in judged_rows if satisfies(row)][: rules.get("limit")]
    assert 0 < len(wanted) < 15, "the rule is no test"
    out = taken(parts["second"], tmp_path / "out", **rules)
    assert ids_of(out) == wanted
    assert verify(out).rows == dict.fromkeys(TABLES, len(wanted))
    for table, kept in rows_of(out).items():
        assert kept == [row for row in before[table] if row.id in wanted], table
    prompt_set, original = Dataset.open(out).prompt_set, Dataset.open(parts["second"]).prompt_set
    assert (prompt_set.source, prompt_set.rows) == (
        original.source,
        {**original.rows, "outside_subset": 15 - len(wanted)},
    )
    provenance = made_by(out, "pairs/round-000")
    assert {key: value for key, value in provenance["rule"].items() if key in rules} == rules
    (part,) = provenance["parts"]
    assert part == {"dataset": original.id, "rows": len(wanted), "made": made_by(parts["second"], "pairs/round-000")}


def test_identical_responses_are_dropped(copies: dict[str, Path], tmp_path: Path) -> None:
    pairs = Dataset.open(copies["first"], "small").pairs(0)
    rows = [pair.__dict__ for pair in pairs.read(0)]
    for row in (1, 4):
        rows[row] |= {"rejected": rows[row]["chosen"]}
    replace_shard(pairs, 0, to_table([PreferencePair(**row) for row in rows], PreferencePair.schema))
    gone = {f"row-{n}" for n in (1, 4)}
    out = taken(copies["first"], tmp_path / "out", drop_identical=True)
    assert ids_of(out) == [id_ for id_ in ids_of(copies["first"]) if id_ not in gone]


def test_a_share_is_drawn_by_id_and_seed_and_apart_from_what_training_holds_out(
    parts: dict[str, Path], tmp_path: Path
) -> None:
    folder = parts["second"]
    shares = {s: set(ids_of(taken(folder, tmp_path / str(s), share=s))) for s in (0.3, 0.7, 1.0)}
    assert shares[0.3] < shares[0.7] < shares[1.0] == set(ids_of(folder))
    assert set(ids_of(taken(folder, tmp_path / "seed", share=0.3, seed=1))) != shares[0.3]
    several = merged(tmp_path / "all", *parts.values())
    draws = draws_of(pa.chunked_array([ids_of(taken(several, tmp_path / "half", share=0.5))]))
    assert (draws > 0.5).any()


def test_rules_that_cannot_be_are_refused(copies: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"first: no row satisfies the rules"):
        taken(copies["first"], tmp_path / "out", min_margin=1e6)
    for pairs in (copies["first"] / "pairs", copies["first"] / "students"):
        shutil.rmtree(pairs)
    with pytest.raises(DataError, match=r"first/pairs: a rule is about pairs, and none are whole; run `score-teacher`"):
        taken(copies["first"], tmp_path / "out", min_margin=0)
    shutil.rmtree(copies["first"] / "responses")
    with pytest.raises(DataError, match=r"first/responses: a rule is about responses, .* run `generate` first"):
        taken(copies["first"], tmp_path / "out", max_tokens=100)
    assert not (tmp_path / "out").exists()
    assert len(ids_of(taken(copies["first"], tmp_path / "out", limit=4))) == 4


def test_a_subset_is_trained_on(parts: dict[str, Path], students: dict[str, Path], tmp_path: Path) -> None:
    out = taken(parts["second"], tmp_path / "out", limit=8)
    train(train_config(out, students["llama"], tmp_path / "model", max_steps=2, student_name="small"))
    assert len(metrics_of(tmp_path / "model")) == 2


# --- both -----------------------------------------------------------------------------------------------------------


def test_another_command_on_the_same_folder_is_refused(
    parts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = parts.values()
    out = merged(tmp_path / "out", first, second)
    before = files_of(out)
    others: list[tuple[Callable[[], object], str]] = [
        (lambda: merged(out, second, first), r"out/dataset\.json: not the dataset that this command makes; repeat"),
        (lambda: merged(out, first, second, shard_size=6), r"out/dataset\.json: not the dataset"),
        (lambda: taken(first, out, limit=3), r"out/dataset\.json: not the dataset"),
        (lambda: taken(out, out, limit=24), r"out/dataset\.json: not the dataset"),
    ]
    for other, message in others:
        with pytest.raises(MismatchError, match=message):
            other()
    some = taken(second, tmp_path / "some", max_tokens=500)
    with pytest.raises(
        MismatchError, match=r"was made with rule\.max_tokens=500, this command has rule\.max_tokens=501"
    ):
        taken(second, some, max_tokens=501)
    assert merged(out, first, second) == out
    assert files_of(out) == before

    # ... also where it has only begun.
    monkeypatch.setattr(Dataset, "create", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        merged(tmp_path / "begun", first, second)
    monkeypatch.undo()
    with pytest.raises(MismatchError, match="was made with prompt_set="):
        merged(tmp_path / "begun", second, first)
    with pytest.raises(DataError, match="no such file"):
        verify(tmp_path / "begun")
    assert files_of(merged(tmp_path / "begun", first, second)) == before


def test_shards_of_another_plan_are_refused(parts: dict[str, Path], tmp_path: Path) -> None:
    out = merged(tmp_path / "out", *parts.values())
    (out / "dataset.json").unlink()
    with pytest.raises(MismatchError, match=r"prompts-00000-of-00005\.parquet: not one of the 4 shards that this comm"):
        merged(out, *parts.values(), shard_size=6)


def test_a_killed_merge_goes_on_and_never_looks_whole(parts: dict[str, Path], tmp_path: Path) -> None:
    calm, out = merged(tmp_path / "calm", *parts.values(), shard_size=10), tmp_path / "out"
    command = ["merge", out, *parts.values(), "--shard-size", 10]
    kills: Counter[str] = Counter()
    while True:
        number = sum(kills.values())
        point = ("half written", "before link", "before folder fsync")[number % 3]
        process = start(command, point, passes=4 * number)
        process.join(120)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills[point] += 1
        with pytest.raises(DpkdError):
            verify(out)
    assert sum(kills.values()) >= 6
    assert files_of(out) == files_of(calm)


def test_a_shard_of_each_table_is_in_memory_at_a_time_and_read_once(
    parts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: Counter[str] = Counter()
    alive: list[weakref.ref[pa.Table]] = []
    most: Counter[str] = Counter()
    read_arrow = Table.read_arrow

    def counted(table: Table[Any], shard: int, columns: list[str] | None = None) -> pa.Table:
        rows = read_arrow(table, shard, columns)
        reads[str(table.path(shard))] += 1
        alive.append(weakref.ref(rows))
        most["alive"] = max(most["alive"], sum(reference() is not None for reference in alive))
        return rows

    monkeypatch.setattr(Table, "read_arrow", counted)
    merged(tmp_path / "out", *parts.values(), shard_size=3)
    assert most["alive"] <= len(TABLES) + 1
    copied = {path: count for path, count in reads.items() if "/prompts/prompts-" not in path}
    assert set(copied.values()) == {1}
    assert len(copied) == (len(TABLES) - 1) * (3 + 4) - len(TABLES) + 1  # all of the second's first shard is known


def test_the_commands(
    parts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dpkd-offline", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), *capsys.readouterr()

    out, none = tmp_path / "out", tmp_path / "none"
    code, output, messages = run("merge", out, *parts.values(), "--shard-size", 8)
    assert (code, output) == (0, f"{out}\n"), messages
    code, output, messages = run(
        "subset", out, tmp_path / "some", "--min-margin", "-9.5", "--max-tokens", 500, "--share", 0.9
    )
    assert (code, output) == (0, f"{tmp_path / 'some'}\n"), messages
    assert run("verify", tmp_path / "some")[0] == 0
    for arguments, expected, message in (
        (["subset", out, none], 2, "give a rule: --max-tokens, --drop-truncated, "),
        (["subset", out, none, "--seed", 4], 2, "give a rule: "),
        (["subset", out, none, "--min-margin", 2, "--max-margin", 1], 2, "min_margin 2.0 must not be above"),
        (["subset", out, "s3://bucket/none", "--limit", 1], 2, "'output': a folder on this machine is needed"),
        (["merge", out], 2, "merge needs PARTS"),
        (["merge", none, out, tmp_path / "nothing"], 3, "nothing: no such folder"),
        (["merge", out, parts["second"], parts["first"]], 4, "out/dataset.json: not the dataset that this command"),
    ):
        code, output, messages = run(*arguments)
        assert (code, output) == (expected, "")
        assert message in messages.splitlines()[-1]
    assert not none.exists()
