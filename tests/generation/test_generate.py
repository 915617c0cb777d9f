from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import FAMILIES, build_config, build_tokenizer, files_of, generate_config, rows, write_jsonl
from transformers import AutoModelForCausalLM

from dpkd_offline.common.errors import MismatchError, UsageError
from dpkd_offline.curation.verify import verify
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.dataset.schema import Prompt
from dpkd_offline.dataset.scratch import Spool
from dpkd_offline.engines.base import row_seed
from dpkd_offline.generation.generate import generate
from dpkd_offline.models.info import ModelInfo
from dpkd_offline.prompts import reader
from dpkd_offline.prompts.reader import open_or_read
from dpkd_offline.prompts.teacher_view import TeacherView


@pytest.mark.parametrize("family", FAMILIES)
def test_every_prompt_gets_a_response_in_its_row(
    family: str, datasets_by_family: dict[str, Path], teachers: dict[str, Path]
) -> None:
    dataset = Dataset.open(datasets_by_family[family])
    tokenizer = ModelInfo(str(teachers[family])).tokenizer
    assert (dataset.plan.rows, dataset.plan.count) == (22, 3)
    assert dataset.prompt_set.template == ("chat" if family == "llama" else "alpaca")
    for role in ("teacher", "student"):
        for shard in range(3):
            prompts, responses = dataset.prompts.read(shard), dataset.responses(role, 0).read(shard)
            assert [p.id for p in prompts] == [r.id for r in responses]
            for response in responses:
                assert response.response == tokenizer.decode(response.response_ids, skip_special_tokens=True)
                # The teacher's own are not kept: score-teacher makes them anew, by prefill.
                assert len(response.logps) == (len(response.response_ids) if role == "student" else 0)


def test_roles_rounds_and_prompts_draw_differently(datasets_by_family: dict[str, Path]) -> None:
    dataset = Dataset.open(datasets_by_family["llama"])
    teacher, student = (dataset.responses(role, 0).read(0) for role in ("teacher", "student"))
    assert [r.response_ids for r in teacher] != [r.response_ids for r in student]
    seeds = {
        row_seed(*parts)
        for parts in ((0, "teacher", 0, "a"), (0, "student", 0, "a"), (0, "student", 1, "a"), (1, "teacher", 0, "a"))
    }
    assert len(seeds) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)  # what engines take


def test_a_row_does_not_depend_on_its_neighbours(
    tmp_path: Path, datasets_by_family: dict[str, Path], teachers: dict[str, Path]
) -> None:
    """The same prompts in another order and other shards: the same responses, by id."""
    source = write_jsonl(tmp_path / "reversed.jsonl", rows(22)[::-1])
    config = generate_config(
        tmp_path / "ds", "teacher", teachers["llama"], prompts=str(source), shard_size=5, batch_size=3
    )
    generate(config)
    responses, expected = (
        {
            r.id: (r.response_ids, r.finish_reason)
            for s in range(d.plan.count)
            for r in d.responses("teacher", 0).read(s)
        }
        for d in (Dataset.open(tmp_path / "ds"), Dataset.open(datasets_by_family["llama"]))
    )
    assert responses == expected


def test_workers_share_the_shards(tmp_path: Path, source: Path, teachers: dict[str, Path]) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    result = generate(generate_config(alone, "teacher", teachers["opt"], prompts=str(source)))
    table = Dataset.open(alone).responses("teacher", 0)
    responses = [response for shard in range(3) for response in table.read(shard)]
    assert (result.path, result.rows, result.sampled) == (alone / "responses" / "teacher", 22, 22)
    assert result.tokens == sum(len(r.response_ids) for r in responses)
    assert result.cut_off == sum(r.finish_reason == "length" for r in responses)
    for index, (rows_of_worker, rows_so_far) in ((1, (8, 8)), (0, (14, 22))):
        result = generate(
            generate_config(together, "teacher", teachers["opt"], prompts=str(source), shard_index=index, num_shards=2)
        )
        assert (result.sampled, result.rows) == (rows_of_worker, rows_so_far)
    assert {k: v for k, v in files_of(alone).items() if k.endswith(".parquet")} == {
        k: v for k, v in files_of(together).items() if k.endswith(".parquet")
    }


def test_workers_may_read_the_prompts_at_the_same_time(
    tmp_path: Path, datasets_by_family: dict[str, Path], source: Path, teachers: dict[str, Path]
) -> None:
    model = ModelInfo(str(teachers["gpt2"]))
    config = generate_config(tmp_path / "ds", "teacher", teachers["gpt2"], prompts=str(source))

    def enter() -> None:
        with Spool(config.dataset, Prompt) as spool, TeacherView(config.dataset) as teacher:
            dataset = open_or_read(config, model, spool, teacher)
            together.wait()  # all have read; all write
            Dataset.create(config.dataset, dataset.prompt_set, spool, config.shard_size)

    together = threading.Barrier(3)
    with ThreadPoolExecutor(3) as workers:
        for worker in [workers.submit(enter) for _ in range(3)]:
            worker.result()
    alone = {k: v for k, v in files_of(datasets_by_family["gpt2"]).items() if k.startswith(("prompts/", "dataset"))}
    assert files_of(tmp_path / "ds") == alone


def test_prompts_are_read_as_a_stream(
    tmp_path: Path, datasets_by_family: dict[str, Path], source: Path, teachers: dict[str, Path], monkeypatch: Any
) -> None:
    """Few at a time, the same dataset."""
    monkeypatch.setattr(reader, "ROWS_AT_ONCE", 3)
    generate(generate_config(tmp_path / "ds", "teacher", teachers["llama"], prompts=str(source)))
    files, expected = files_of(tmp_path / "ds"), files_of(datasets_by_family["llama"])
    assert {k for k in files if files[k] != expected[k]} <= {"README.md", "responses/teacher/_table.json"}
    prompt_set = Dataset.open(tmp_path / "ds").prompt_set
    prompts = [p for shard in range(3) for p in Dataset.open(tmp_path / "ds").prompts.read(shard)]
    longest = max(prompts, key=lambda p: len(p.prompt_ids))
    assert (prompt_set.longest_prompt, prompt_set.longest_prompt_tokens) == (longest.id, len(longest.prompt_ids))


def test_the_vocabulary_is_the_models_where_its_embedding_is_padded(tmp_path: Path, source: Path) -> None:
    tokenizer, model = build_tokenizer(chat=True), tmp_path / "padded"
    padded = AutoModelForCausalLM.from_config(build_config("llama", len(tokenizer) + 600), dtype=torch.float32)
    padded.save_pretrained(model)
    tokenizer.save_pretrained(model)
    generate(generate_config(tmp_path / "ds", "teacher", model, prompts=str(source)))
    dataset = Dataset.open(tmp_path / "ds")
    table = dataset.responses("teacher", 0)
    assert dataset.prompt_set.vocab_size == table.require_provenance()["vocab_size"] == len(tokenizer) + 600
    sampled = {i for shard in range(3) for response in table.read(shard) for i in response.response_ids}
    assert max(sampled) >= len(tokenizer)
    assert verify(tmp_path / "ds").rows == {"prompts": 22, "responses/teacher": 22}


def test_the_same_command_again_does_nothing(tmp_path: Path, source: Path, teachers: dict[str, Path]) -> None:
    config = generate_config(tmp_path / "ds", "teacher", teachers["gpt2"], prompts=str(source))
    result = generate(config)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "ds").rglob("*")}
    assert generate(config) == replace(result, sampled=0)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "ds").rglob("*")} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 5}, "seed=0, this command has seed=5"),
        ({"temperature": 0.5}, r"sampling\.temperature=1\.0, this command has sampling\.temperature=0\.5"),
        ({"dtype": "bfloat16"}, "dtype=float32, this command has dtype=bfloat16"),
        ({"model": "students"}, r"model\.revision=sha256:"),
    ],
)
def test_other_settings_on_the_same_responses_are_refused(
    change: dict[str, object],
    message: str,
    datasets_by_family: dict[str, Path],
    students: dict[str, Path],
    teachers: dict[str, Path],
) -> None:
    folder = datasets_by_family["llama"]
    before = files_of(folder)
    model = students["llama"] if "model" in change else teachers["llama"]
    values = {k: v for k, v in change.items() if k != "model"}
    with pytest.raises(MismatchError, match=message):
        generate(generate_config(folder, "teacher", model, **values))
    assert files_of(folder) == before


def test_other_prompts_or_another_tokenizer_are_refused(
    tmp_path: Path, datasets_by_family: dict[str, Path], teachers: dict[str, Path]
) -> None:
    folder = datasets_by_family["llama"]
    other = write_jsonl(tmp_path / "other.jsonl", rows(5))
    with pytest.raises(MismatchError, match="its prompts are not those of"):
        generate(generate_config(folder, "student", teachers["llama"], prompts=str(other)))
    with pytest.raises(MismatchError, match="only students may have others"):
        generate(generate_config(folder, "teacher", teachers["llama"].parent / "changed"))


@pytest.fixture(autouse=True)
def changed_tokenizer(teachers: dict[str, Path]) -> None:
    """A model whose tokenizer knows one token more."""
    folder = teachers["llama"].parent / "changed"
    if not folder.exists():
        import shutil

        shutil.copytree(teachers["llama"], folder)
        tokenizer = ModelInfo(str(folder)).tokenizer
        tokenizer.add_tokens(["<new>"])
        tokenizer.save_pretrained(folder)


def test_prompts_that_do_not_fit_are_refused_before_anything_is_written(
    tmp_path: Path, source: Path, teachers: dict[str, Path]
) -> None:
    with pytest.raises(UsageError, match=r"prompt 'row-\d+' of \d+ tokens and 250 new ones need"):
        generate(
            generate_config(tmp_path / "ds", "teacher", teachers["llama"], prompts=str(source), max_new_tokens=250)
        )
    with pytest.raises(UsageError, match="name a source of prompts"):
        generate(generate_config(tmp_path / "ds", "teacher", teachers["llama"]))
    assert not (tmp_path / "ds").exists()
