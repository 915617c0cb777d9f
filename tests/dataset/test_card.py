"""The card: what it says is so, `datasets` reads by it what pyarrow reads, and names cannot break it."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.tiny import build_model, generate_config, make_dataset, replace_shard, score_config
from huggingface_hub import DatasetCard

from dpkd_offline.common.errors import MismatchError
from dpkd_offline.curation.verify import verify
from dpkd_offline.dataset import card, writing
from dpkd_offline.dataset.card import write_card
from dpkd_offline.dataset.catalog import begun_tables
from dpkd_offline.dataset.columns import ShardStats
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.dataset.schema import Response, to_table
from dpkd_offline.dataset.writing import write_shard
from dpkd_offline.generation.generate import generate
from dpkd_offline.generation.score_teacher import score_teacher
from dpkd_offline.models.info import ModelInfo

CONFIGS: dict[str, str] = {
    "pairs": "pairs/*",
    "prompts": "prompts",
    "teacher_responses": "responses/teacher",
    "student_responses": "responses/student/*",
    "top_k": "top_k/*",
}
PAIRS = "pairs/round-000"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A teacher whose card names its licence, and a student without a card."""
    root = tmp_path_factory.mktemp("models")
    teacher, student = build_model("llama", root / "big"), build_model("llama", root / "small", seed=1)
    (teacher / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Big\n")
    return teacher, student


@pytest.fixture(scope="module")
def whole_dataset(tmp_path_factory: pytest.TempPathFactory, source: Path, models: tuple[Path, Path]) -> Path:
    """Two rounds of pairs, one of top-k, an audit."""
    folder = tmp_path_factory.mktemp("card") / "ds"
    generate(generate_config(folder, "teacher", models[0], prompts=str(source), license="cc-by-4.0"))
    for round in range(2):
        generate(generate_config(folder, "student", models[1], round=round, seed=round))
        score_teacher(score_config(folder, models[0], round=round, top_k=3 - 3 * round, audit=4))
    return folder


@pytest.fixture
def folder(tmp_path: Path, whole_dataset: Path) -> Path:
    return shutil.copytree(whole_dataset, tmp_path / "copy")


def load(folder: Path, config: str) -> datasets.Dataset:
    return datasets.load_dataset(str(folder), config, split="train", cache_dir=str(folder.parent / "cache"))


def table_of(files: list[Path]) -> pa.Table:
    return pa.concat_tables(pq.ParquetFile(path).read() for path in sorted(files))


def lines_of(folder: Path, section: str) -> list[list[str]]:
    """The cells of the table in a section of the card."""
    text = (folder / "README.md").read_text().split(f"## {section}\n")[1].split("\n## ")[0]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]


def change(path: Path, **values: Any) -> None:
    value = json.loads(path.read_text())
    path.write_text(json.dumps({key: {**value[key], **v} if isinstance(v, dict) else v for key, v in values.items()} | {
        key: value for key, value in value.items() if key not in values
    }))  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS)
def test_datasets_reads_by_the_card_what_pyarrow_reads(config: str, whole_dataset: Path) -> None:
    files, loaded = list(whole_dataset.glob(f"{CONFIGS[config]}/*.parquet")), load(whole_dataset, config)
    assert loaded.to_list() == table_of(files).to_pylist()
    assert loaded.features == datasets.Features.from_arrow_schema(pq.read_schema(files[0]))
    info = datasets.load_dataset_builder(str(whole_dataset), config).info
    assert (info.features, info.splits["train"].num_examples) == (loaded.features, len(loaded))
    assert info.splits["train"].num_bytes == info.dataset_size == loaded.data.nbytes
    assert info.download_size == sum(path.stat().st_size for path in files)


def test_a_table_in_progress_loads(folder: Path) -> None:
    table = Dataset.open(folder).pairs(1)
    table.path(1).unlink()
    table.entry_path(1).unlink()
    shutil.rmtree(folder / "top_k" / "round-000" / "_manifest")  # begun, and no shard is committed
    for path in (folder / "top_k" / "round-000").glob("*.parquet"):
        path.unlink()
    write_card(Dataset.open(folder))
    assert len(load(folder, "pairs")) == 22 + 14
    infos = {info["config_name"] for info in DatasetCard.load(folder / "README.md").data["dataset_info"]}
    assert infos == {"prompts", "teacher_responses", "student_responses"}
    extents = {line[1]: line[2:4] for line in lines_of(folder, "Tables")}
    assert extents["`pairs/round-000`"] == ["22", "3"]
    assert extents["`pairs/round-001`"] == ["14", "2 of 3, in progress"]
    assert extents["`top_k/round-000`"] == ["0", "0 of 3, in progress"]


def test_the_numbers_are_those_of_the_rows(whole_dataset: Path) -> None:
    numbers = {(folder.strip("`"), of): rest for folder, of, *rest in lines_of(whole_dataset, "Numbers")[2:]}
    rows = load(whole_dataset, "pairs").filter(lambda row: row["round"] == 0).to_list()
    mean = {
        name: statistics.fmean(statistics.fmean(row[name]) for row in rows) for name in rows[0] if name[-5:] == "logps"
    }
    for of, side, sampler in (("y_t", "chosen", ""), ("y_s", "rejected", f"{mean['behavior_rejected_logps']:.3f}")):
        assert numbers[PAIRS, of] == [
            f"{statistics.fmean(len(row[f'{side}_ids']) for row in rows):.1f}",
            f"{statistics.fmean(row[f'{side}_finish_reason'] == 'length' for row in rows):.1%}",
            f"{mean[f'teacher_{side}_logps']:.3f}",
            sampler,
        ]
    assert numbers["prompts", "x"][0] == f"{statistics.fmean(len(row['prompt_ids']) for row in rows):.1f}"
    assert numbers["responses/student/round-000", "y"] == [*numbers[PAIRS, "y_s"][:2], "", numbers[PAIRS, "y_s"][3]]
    text = (whole_dataset / "README.md").read_text()
    margin = mean["teacher_chosen_logps"] - mean["teacher_rejected_logps"]
    assert f"- `{PAIRS}`: the margin log p(y_t|x)/|y_t| - log p(y_s|x)/|y_s| is {margin:.3f} nats" in text
    mass = [
        statistics.fmean(statistics.fmean(row[f"{side}_top_mass"]) for row in load(whole_dataset, "top_k"))
        for side in ("chosen", "rejected")
    ]
    assert f"has {mass[0]:.1%} of the probability at a position of y_t, {mass[1]:.1%} at one of y_s" in text
    tokens = sum(
        len(row[f"{side}_ids"])
        for row in load(whole_dataset, "pairs").select(range(22))
        for side in ("chosen", "rejected")
    )
    size = sum(path.stat().st_size for path in whole_dataset.glob("top_k/*/*.parquet"))
    halves = [-logp for row in load(whole_dataset, "top_k") for of in row["chosen_top_logps"] for logp in of]
    assert f"- `top_k/round-000`: {size / tokens:.1f} bytes for each token of a response" in text
    assert "log-probs are in half precision, off by 0.002 nats at most" in text and 4 < max(halves) < 8
    audit = json.loads((whole_dataset / PAIRS / "_audit.json").read_text())
    assert (
        f"- `{PAIRS}`, audit: 4 rows scored again with `transformers` in `float32`: a stored log-prob is off by "
        in text
    )
    assert f"{audit['gap_abs_mean']:.4f} nats, a margin by {audit['margin_gap_abs_mean']:.4f}" in text


def test_who_made_what_and_its_licence(whole_dataset: Path) -> None:
    text = (whole_dataset / "README.md").read_text()
    assert "model `big`, revision `sha256:" in text and "engine `transformers` in `float32`, `transformers 5" in text
    for setting in ("temperature `1.0`", "top_p `1.0`", "max_new_tokens `12`", "seed `1`", "top_k `3`", "(rows 22)"):
        assert setting in text
    licenses = [["prompts from `prompts.jsonl`", "`cc-by-4.0`"], ["responses of `big`", "`apache-2.0`"],
                ["responses of `small`", "not said"]]  # fmt: skip
    assert sorted(lines_of(whole_dataset, "Licences")[2:]) == licenses
    front = DatasetCard.load(whole_dataset / "README.md").data
    assert (front["teacher"], front["student"], front.license, front.size_categories) == (
        ["big"],
        ["small"],
        None,  # since that of a part is not known
        ["n<1K"],
    )


def test_all_licences_known_are_those_of_the_front_matter(folder: Path) -> None:
    for round in range(2):
        change(folder / f"responses/student/round-{round:03d}/_table.json", license="my own, non-commercial")
    write_card(Dataset.open(folder))
    assert DatasetCard.load(folder / "README.md").data.license == ["apache-2.0", "cc-by-4.0", "other"]


def test_the_card_is_a_function_of_the_other_files(
    tmp_path: Path, whole_dataset: Path, folder: Path, source: Path, models: tuple[Path, Path]
) -> None:
    before = (folder / "README.md").read_bytes()
    (folder / "README.md").unlink()
    write_card(Dataset.open(folder))
    assert (folder / "README.md").read_bytes() == before == (whole_dataset / "README.md").read_bytes()
    one, two = tmp_path / "one", tmp_path / "two"
    make_dataset(one, source, *models)
    generate(generate_config(two, "teacher", models[0], prompts=str(source)))
    for worker in (1, 0):
        generate(generate_config(two, "student", models[1], shard_index=worker, num_shards=2))
        done = "3" if worker == 0 else "1 of 3, in progress"
        assert lines_of(two, "Tables")[-1][1:4] == ["`responses/student/round-000`", "22" if done == "3" else "8", done]
    score_teacher(score_config(two, models[0]))
    assert (one / "README.md").read_bytes() == (two / "README.md").read_bytes()


def test_a_card_that_was_put_in_place_of_a_newer_one_is_written_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker looks, another commits the last shard and writes its card, then the first one writes its own."""
    whole, table, write = (folder / "README.md").read_bytes(), Dataset.open(folder).pairs(1), card.write_atomically
    entry = table.entry_path(2).rename(folder.parent / "entry")

    def late(path: Path, data: bytes) -> bool:
        if entry.exists():
            entry.rename(table.entry_path(2))
            write(path, whole)
        return write(path, data)

    monkeypatch.setattr(card, "write_atomically", late)
    write_card(Dataset.open(folder))
    assert (folder / "README.md").read_bytes() == whole


def test_a_card_of_a_stage_before_does_not_outlive_the_next_ones(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker looks, another begins a round, and then the first one writes what it saw: sizes that will be wrong."""
    write, begun = card.write_atomically, folder / "pairs" / "round-001"
    away = begun.rename(folder.parent / "away")

    def late(path: Path, data: bytes) -> bool:
        if away.exists():
            away.rename(begun)
            shutil.rmtree(begun / "_manifest")
            write_card(Dataset.open(folder))
        return write(path, data)

    monkeypatch.setattr(card, "write_atomically", late)
    write_card(Dataset.open(folder))
    assert "0 of 3, in progress" in [line[3] for line in lines_of(folder, "Tables")]
    assert len(load(folder, "pairs")) == 44


HOSTILE = "a|b`c\n---\nlicense: mit\n| <script>alert(1)</script> {braces} # \r\u2028 \\| [x](y) é: - 'q' \"d\" *&!%@"


def test_names_cannot_break_the_card(folder: Path) -> None:
    usual = (folder / "README.md").read_text()
    change(folder / "dataset.json", prompt_set={"template": HOSTILE, "tokenizer": HOSTILE, "source": HOSTILE})
    for path in folder.rglob("_table.json"):
        change(path, model={"name": HOSTILE, "revision": HOSTILE}, license=HOSTILE, engine=HOSTILE)
    write_card(Dataset.open(folder))
    text, front = (folder / "README.md").read_text(), DatasetCard.load(folder / "README.md").data
    assert (front["teacher"], front["student"], front.license) == ([HOSTILE], [HOSTILE], ["cc-by-4.0", "other"])
    assert len(load(folder, "pairs")) == 44
    assert [line for line in text.split("\n") if line.strip() == "---"] == ["---", "---"]
    body = text.split("\n---\n")[1]
    assert "<" not in re.sub(r"`[^`\n]*`", "", body)
    assert body.count("`") % 2 == 0
    for section in ("Tables", "Numbers", "Licences"):
        assert len({len(line) for line in lines_of(folder, section)}) == 1
    assert body.splitlines()[0] == "" and re.findall("^#.*", body, re.M)[1:] == re.findall("^#.*", usual, re.M)[1:]


RENDERED = {"stage": "render", "template": "alpaca", "tokenizer": "tiny", "tokenizer_fingerprint": "t", "vocab_size": 9,
            "prompt_set": "id"}  # fmt: skip


def test_further_students_have_configs_of_their_own(folder: Path) -> None:
    for name in ("pairs/round-000", "responses/student/round-000", "top_k/round-000"):
        shutil.copytree(folder / name, folder / "students" / "opt-tiny" / name)
    for place in ("prompts/student", "students/opt-tiny/prompts/student"):
        shutil.copytree(folder / "prompts", folder / place, ignore=shutil.ignore_patterns("student"))
        (folder / place / "_table.json").write_text(json.dumps(RENDERED))
    write_card(Dataset.open(folder))
    assert len(load(folder, "pairs")) == 44
    for name in ("pairs-opt-tiny", "student_responses-opt-tiny", "top_k-opt-tiny", "student_prompts-opt-tiny",
                 "student_prompts", "prompts"):  # fmt: skip
        assert len(load(folder, name)) == 22
    assert "- `prompts/student`: template `alpaca`, tokenizer `tiny`\n" in (folder / "README.md").read_text()
    assert ["`pairs-opt-tiny`", "`students/opt-tiny/pairs/round-000`", "22", "3"] in [
        line[:4] for line in lines_of(folder, "Tables")
    ]


def test_entries_that_lack_something_are_named(folder: Path) -> None:
    path = Dataset.open(folder).pairs(0).entry_path(1)
    entry = json.loads(path.read_text())
    path.write_text(json.dumps({**entry, "facts": {**entry["facts"], "tokens": None}}))
    with pytest.raises(MismatchError, match=r"pairs-00001-of-00003\.json: key 'facts\.tokens' is missing or wrong"):
        write_card(Dataset.open(folder))


# --- facts ----------------------------------------------------------------------------------------------------------


def test_facts_are_of_the_file_and_verify_says_so_where_they_are_not(folder: Path) -> None:
    for table in begun_tables(Dataset.open(folder)):
        parts = [ShardStats.of(pq.ParquetFile(table.path(shard)).read()) for shard in range(3)]
        assert [entry.facts for entry in table.entries().values()] == parts
        whole, together = ShardStats.of(table_of([table.path(shard) for shard in range(3)])), ShardStats.together(parts)
        assert (together.tokens, together.truncated) == (whole.tokens, whole.truncated)
        assert (together.exact, together.arrow_bytes) == (whole.exact, whole.arrow_bytes)
        assert together.row_means == pytest.approx(whole.row_means, rel=1e-15)
    assert set(verify(folder).rows.values()) == {22}
    path = Dataset.open(folder).pairs(0).entry_path(1)
    true = json.loads(path.read_text())
    mean = true["facts"]["row_means"]["teacher_chosen_logps"]
    for key, value in (("teacher_chosen_logps", math.nextafter(mean, 0)), ("another", 1.0)):
        facts = {**true["facts"], "row_means": {**true["facts"]["row_means"], key: value}}
        path.write_text(json.dumps({**true, "facts": facts}))
        with pytest.raises(MismatchError, match=rf"pairs-00001.*\.json: facts\.row_means\.{key} is"):
            verify(folder)


def test_of_rival_writers_the_entry_is_of_the_file_that_stays(folder: Path) -> None:
    table = Dataset.open(folder).responses("teacher", 0)
    mine, entry = table.read(1), table.entry_path(1)
    theirs = table.read_arrow(1).set_column(1, table.record.schema.field(1), pa.array(["another text"] * 8))
    replace_shard(table, 1, theirs)
    entry.unlink()
    write_shard(table, 1, mine)
    facts = json.loads(entry.read_text())["facts"]
    assert facts == ShardStats.of(theirs).model_dump() != ShardStats.of(to_table(mine, Response.schema)).model_dump()


def test_row_groups_are_small(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = Dataset.open(folder).top_k(0)
    rows, size = table.read(0), table.entries()[0].facts.arrow_bytes
    table.path(0).unlink()
    table.entry_path(0).unlink()
    monkeypatch.setattr(writing, "ROW_GROUP_BYTES", size // 3)
    write_shard(table, 0, rows)
    file = pq.ParquetFile(table.path(0))
    assert [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)] == [2, 2, 2, 2]
    assert file.metadata.row_group(0).column(0).is_stats_set


# --- licences -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "license"),
    [
        (None, None),
        ("# no front matter\n", None),
        ("---\ntags: [x]\n---\n", None),
        ("---\nlicense: llama3.1\n---\n", "llama3.1"),
        ("---\nlicense: [mit, apache-2.0]\n---\n", "mit, apache-2.0"),
        ("---\nlicense: other\nlicense_name: tongyi\n---\n", "other (tongyi)"),
        ("---\nlicense: [mit\n---\n", None),
        ("---\n- a list\n---\n", None),
    ],
)
def test_a_models_licence_is_what_its_card_names(tmp_path: Path, text: str | None, license: str | None) -> None:
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert ModelInfo(str(tmp_path)).license == license


def test_that_of_a_hub_name_comes_from_the_cache(tmp_path: Path) -> None:
    cache = tmp_path / "hub" / "models--org--name"
    for commit, license in (("a" * 40, "mit"), ("b" * 40, "gpl-3.0")):
        (cache / "snapshots" / commit).mkdir(parents=True)
        (cache / "snapshots" / commit / "config.json").write_text('{"model_type": "gpt2"}')
        (cache / "snapshots" / commit / "README.md").write_text(f"---\nlicense: {license}\n---\n")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("b" * 40)
    code = "from dpkd_offline.models.info import *; m = ModelInfo('org/name'); print(m.license, m.identity)"
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "gpl-3.0 " + str({"name": "org/name", "revision": "b" * 40}), done.stderr


def test_a_licence_that_changes_is_no_other_producer(
    folder: Path, source: Path, models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    again = generate_config(folder, "teacher", models[0], prompts=str(source), license="cc-by-4.0")
    Dataset.open(folder).responses("teacher", 0).entry_path(1).unlink()
    monkeypatch.setattr(ModelInfo, "license", "mit")
    generate(again)
    assert json.loads((folder / "responses/teacher/_table.json").read_text())["license"] == "apache-2.0"
    assert json.loads((folder / "dataset.json").read_text())["prompt_set"]["license"] == "cc-by-4.0"
    generate(again.model_copy(update={"license": None}))
    with pytest.raises(MismatchError, match=r"prompt_set\.license is 'cc-by-4\.0', --license is 'mit'"):
        generate(again.model_copy(update={"license": "mit"}))
