from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest
from helpers.tiny import replace_shard

from dpkd_offline.common.errors import DataError, DpkdError, Interrupted, MismatchError, StorageError
from dpkd_offline.dataset.dataset import Dataset, PromptSet
from dpkd_offline.dataset.schema import Prompt, Response, from_table, to_table
from dpkd_offline.dataset.table import ShardPlan
from dpkd_offline.dataset.writing import check_claim, claim, commit_results, write_shard

PROMPT_SET = PromptSet("id", "source", "chat", "f", "tokenizer", "t", 400, "p9", 2, {"read": 10})


def prompts(count: int) -> list[Prompt]:
    return [
        Prompt(f"p{n}", [{"role": "user", "content": "x"}], "x", [n, n + 1], ["ref"] * (n % 2)) for n in range(count)
    ]


def responses(ids: list[str]) -> list[Response]:
    return [Response(i, "text", [5, 6, 1], "stop", [-0.5, -1.25, -2.0], 0) for i in ids]


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return Dataset.create(tmp_path / "ds", PROMPT_SET, prompts(10), shard_size=4)


def test_records_round_trip() -> None:
    assert from_table(to_table(prompts(5), Prompt.schema), Prompt) == prompts(5)
    assert from_table(to_table(responses(["a"]), Response.schema), Response) == responses(["a"])
    assert to_table(prompts(5), Prompt.schema).schema.equals(Prompt.schema)


def test_the_shard_plan_covers_every_row_once() -> None:
    for rows in range(1, 30):
        for size in range(1, 12):
            plan = ShardPlan(rows, size)
            assert sum(plan.rows_of(shard) for shard in range(plan.count)) == rows
            assert min(plan.rows_of(shard) for shard in range(plan.count)) > 0


def test_a_dataset_opens_as_it_was_made(dataset: Dataset) -> None:
    again = Dataset.open(dataset.root)
    assert (again.prompt_set, again.plan) == (PROMPT_SET, ShardPlan(10, 4))
    assert [p for shard in range(3) for p in again.prompts.read(shard)] == prompts(10)
    assert (dataset.root / "prompts" / "prompts-00002-of-00003.parquet").exists()


def test_pending_shards_are_those_without_a_manifest_entry(dataset: Dataset) -> None:
    table = dataset.responses("teacher", 0)
    assert table.pending() == [0, 1, 2]
    write_shard(table, 1, responses(["p4", "p5", "p6", "p7"]))
    assert (table.pending(), table.pending(0, 2), table.pending(1, 2)) == ([0, 2], [0, 2], [])
    shutil.copy(table.path(1), table.path(0))  # data without its entry: a writer died in between
    assert table.pending() == [0, 2]
    with pytest.raises(DataError, match="not committed"):
        table.read(0)
    with pytest.raises(
        DataError, match=r"2 of 3 shards of responses/teacher are missing\); run `dpkd-offline generate`"
    ):
        table.require_complete("dpkd-offline generate")


def test_results_in_any_order_become_whole_shards(dataset: Dataset) -> None:
    table = dataset.responses("teacher", 0)
    places = [(2, 1), (0, 3), (0, 0), (2, 0), (0, 2), (1, 0), (0, 1), (1, 3), (1, 1), (1, 2)]
    order: list[int] = []

    def write(shard: int, values: list[int]) -> None:
        order.append(shard)
        assert values == [10 * shard + n for n in range(len(values))]
        write_shard(table, shard, responses([f"p{4 * shard + n}" for n in range(len(values))]))

    commit_results(table.plan, {0: 4, 1: 4, 2: 2}, [((s, n), 10 * s + n) for s, n in places], write, label="test")
    assert order == [2, 0, 1]
    assert table.pending() == []


def test_the_same_rows_give_the_same_bytes(dataset: Dataset, tmp_path: Path) -> None:
    other = Dataset.create(tmp_path / "other", PROMPT_SET, prompts(10), shard_size=4)
    for shard in range(3):
        assert dataset.prompts.path(shard).read_bytes() == other.prompts.path(shard).read_bytes()


def test_every_flipped_byte_of_a_shard_is_noticed(dataset: Dataset) -> None:
    path = dataset.prompts.path(0)
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(MismatchError, match=r"prompts-00000-of-00003\.parquet: its sha256"):
            dataset.prompts.read(0)


def test_arrow_reads_a_shard_from_memory_of_its_own(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's its threads may let go of last, after the read: while the interpreter ends, that aborts the process."""
    sources: list[Any] = []

    class Kept(pq.ParquetFile):  # type: ignore[misc]
        def __init__(self, source: Any, **options: Any) -> None:
            sources.append(source)
            super().__init__(source, **options)

    monkeypatch.setattr(pq, "ParquetFile", Kept)
    data = dataset.prompts.path(0).read_bytes()
    references = sys.getrefcount(data)
    assert from_table(dataset.prompts.parse(0, data), Prompt) == prompts(4)
    assert sources and sys.getrefcount(data) == references
    for source in sources:
        source.seek(0)
        assert source.read() == data


def test_other_schemas_and_row_counts_are_refused(dataset: Dataset) -> None:
    table = pq.read_table(dataset.prompts.path(0))
    replace_shard(dataset.prompts, 0, table.drop_columns(["prompt_ids"]))
    with pytest.raises(DataError, match="column 'prompt_ids' is missing"):
        dataset.prompts.read(0)
    replace_shard(dataset.prompts, 0, table.slice(1))
    with pytest.raises(DataError, match="3 rows, the shard plan says 4"):
        dataset.prompts.read(0)


def test_a_table_has_one_producer(dataset: Dataset) -> None:
    table = dataset.responses("student", 0)
    provenance = {
        **{
            "stage": "generate",
            "dtype": "float32",
            "engine": "e",
            "prompt_set": "id",
            "vocab_size": 400,
            "tokenizer_fingerprint": "t",
        },
        **{"model": {"name": "m", "revision": "1"}, "eos_token_ids": [1], "sampling": {"max_new_tokens": 5}},
        **{"seed": 0, "versions": {"torch": "1"}},
    }
    check_claim(table, provenance)
    claim(table, provenance)
    claim(table, {**provenance, "versions": {"torch": "2"}})
    with pytest.raises(MismatchError, match=r"made with model\.revision=1, this command has model\.revision=2"):
        claim(table, {**provenance, "model": {"name": "m", "revision": "2"}})
    with pytest.raises(MismatchError, match="seed=0, this command has seed=5"):
        check_claim(table, {**provenance, "seed": 5})
    assert table.provenance() == provenance


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "version 2; this program reads dpkd-offline version 1"),
        ({"format": "other"}, "format other version 1"),
        ({"shards": {}}, r"key 'shards\.rows' is missing or wrong: field required"),
        ({"prompt_set": {"id": "x"}}, r"key 'prompt_set\.source' is missing"),
    ],
)
def test_foreign_dataset_files_are_refused(dataset: Dataset, change: dict[str, object], message: str) -> None:
    path = dataset.root / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(DpkdError, match=message):
        Dataset.open(dataset.root)


def test_another_tokenizer_is_refused(dataset: Dataset) -> None:
    dataset.check_tokenizer("m", "t")
    with pytest.raises(MismatchError, match="were tokenised by tokenizer"):
        dataset.check_tokenizer("m", "other")


def test_the_datasets_library_reads_every_table(datasets_by_family: dict[str, Path], tmp_path: Path) -> None:
    folder = datasets_by_family["llama"]
    dataset = Dataset.open(folder)
    expected = {
        "pairs": dataset.pairs(0),
        "prompts": dataset.prompts,
        "teacher_responses": dataset.responses("teacher", 0),
        "student_responses": dataset.responses("student", 0),
    }
    for name, table in expected.items():
        loaded = datasets.load_dataset(str(folder), name, split="train", cache_dir=str(tmp_path))
        assert list(loaded) == [row for shard in range(table.plan.count) for row in table.read_arrow(shard).to_pylist()]


def test_no_absolute_path_and_no_user_is_written(datasets_by_family: dict[str, Path]) -> None:
    folder = datasets_by_family["gpt2"]
    for path in folder.rglob("*"):
        if path.is_file():
            assert str(folder.parent).encode() not in path.read_bytes(), path
            assert b"/tmp/" not in path.read_bytes(), path


def test_what_is_whole_is_committed_whatever_ends_the_run(dataset: Dataset) -> None:
    table = dataset.responses("teacher", 0)

    def results() -> Iterator[tuple[tuple[int, int], int]]:
        yield from (((0, n), n) for n in range(4))
        yield (1, 0), 0
        raise Interrupted("stopped")

    def write(shard: int, values: list[int]) -> None:
        write_shard(table, shard, responses([f"p{n}" for n in values]))

    with pytest.raises(Interrupted):
        commit_results(table.plan, {0: 4, 1: 4, 2: 2}, results(), write, label="test")
    assert table.pending() == [1, 2]


def test_an_error_in_writing_ends_the_run(dataset: Dataset) -> None:
    def write(shard: int, values: list[int]) -> None:
        raise StorageError("full")

    with pytest.raises(StorageError, match="full"):
        commit_results(dataset.plan, {0: 4}, [((0, n), n) for n in range(4)], write, label="test")


def test_prompts_of_a_run_that_died_are_not_taken_for_others(dataset: Dataset) -> None:
    (dataset.root / "dataset.json").unlink()
    other = [replace(prompt, prompt="another text") for prompt in prompts(10)]
    with pytest.raises(
        DataError, match=r"holds other prompts, of a command that did not finish; delete .*/prompts and repeat"
    ):
        Dataset.create(dataset.root, PROMPT_SET, other, shard_size=4)
    assert Dataset.create(dataset.root, PROMPT_SET, prompts(10), shard_size=4).prompts.pending() == []


def test_shards_that_nobody_claimed_are_not_taken_over(dataset: Dataset) -> None:
    table = dataset.responses("teacher", 0)
    write_shard(table, 0, responses([f"p{n}" for n in range(4)]))
    with pytest.raises(MismatchError, match="shards stand beside it; delete"):
        claim(table, {"stage": "generate"})
