from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from helpers.tiny import FAMILIES, files_of, generate_config, replace_shard, score_config

from dpkd_offline.common.errors import DataError, MismatchError, UsageError
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.dataset.schema import to_table
from dpkd_offline.dataset.table import Table
from dpkd_offline.generation.generate import generate
from dpkd_offline.generation.pairing import PairSource
from dpkd_offline.generation.score_teacher import score_teacher
from dpkd_offline.models.info import ModelInfo
from dpkd_offline.models.loading import load_model


@pytest.mark.parametrize("family", FAMILIES)
def test_pairs_hold_the_teachers_log_probs_of_both_responses(
    family: str, datasets_by_family: dict[str, Path], teachers: dict[str, Path]
) -> None:
    dataset = Dataset.open(datasets_by_family[family])
    teacher = load_model(str(teachers[family]), "float32")
    for shard in range(dataset.plan.count):
        tables = dataset.prompts, dataset.responses("teacher", 0), dataset.responses("student", 0), dataset.pairs(0)
        for prompt, y_t, y_s, pair in zip(*(table.read(shard) for table in tables), strict=True):
            assert (pair.id, pair.prompt, pair.prompt_ids) == (prompt.id, prompt.prompt, prompt.prompt_ids)
            assert (pair.chosen, pair.chosen_ids, pair.chosen_finish_reason) == (
                y_t.response,
                y_t.response_ids,
                y_t.finish_reason,
            )
            assert (pair.rejected, pair.rejected_ids) == (y_s.response, y_s.response_ids)
            assert pair.behavior_rejected_logps == y_s.logps
            assert pair.reference == prompt.references[0]
            for ids, logps in (
                (pair.chosen_ids, pair.teacher_chosen_logps),
                (pair.rejected_ids, pair.teacher_rejected_logps),
            ):
                with torch.no_grad():
                    logits = teacher(torch.tensor([[*pair.prompt_ids, *ids]])).logits[0].double()
                expected = [
                    logits[len(pair.prompt_ids) - 1 + n].log_softmax(-1)[token].item() for n, token in enumerate(ids)
                ]
                torch.testing.assert_close(
                    torch.tensor(logps).double(), torch.tensor(expected).double(), rtol=0, atol=1e-4
                )


def test_another_teacher_than_the_one_that_sampled_is_refused(
    datasets_by_family: dict[str, Path], students: dict[str, Path]
) -> None:
    folder = datasets_by_family["opt"]
    before = files_of(folder)
    with pytest.raises(MismatchError, match="score with the teacher that sampled"):
        score_teacher(score_config(folder, students["opt"]))
    assert files_of(folder) == before


def test_pairs_scored_with_other_settings_are_refused(
    datasets_by_family: dict[str, Path], teachers: dict[str, Path]
) -> None:
    with pytest.raises(MismatchError, match="dtype=float32, this command has dtype=bfloat16"):
        score_teacher(score_config(datasets_by_family["opt"], teachers["opt"], dtype="bfloat16"))


def test_missing_responses_are_named_with_the_command_that_makes_them(
    tmp_path: Path, source: Path, teachers: dict[str, Path]
) -> None:
    with pytest.raises(DataError, match=r"/ds: no such folder; `dpkd-offline generate"):
        score_teacher(score_config(tmp_path / "ds", teachers["opt"]))
    generate(generate_config(tmp_path / "ds", "teacher", teachers["opt"], prompts=str(source)))
    with pytest.raises(
        DataError,
        match=r"3 of 3 shards of responses/student/round-000 are missing\); run `dpkd-offline generate --role student",
    ):
        score_teacher(score_config(tmp_path / "ds", teachers["opt"]))


def test_rows_that_do_not_belong_together_are_refused(
    tmp_path: Path, datasets_by_family: dict[str, Path], teachers: dict[str, Path]
) -> None:
    folder = tmp_path / "ds"
    shutil.copytree(datasets_by_family["opt"], folder)
    shutil.rmtree(folder / "pairs")
    dataset = Dataset.open(folder)
    table = dataset.responses("student", 0)
    replace_shard(table, 0, table.read_arrow(0).take(list(range(7, -1, -1))))
    with pytest.raises(DataError, match="column 'id'"):
        score_teacher(score_config(folder, teachers["opt"]))


def test_sequences_that_do_not_fit_are_named(
    tmp_path: Path, datasets_by_family: dict[str, Path], teachers: dict[str, Path]
) -> None:
    folder = tmp_path / "ds"
    shutil.copytree(datasets_by_family["opt"], folder)
    shutil.rmtree(folder / "pairs")
    with pytest.raises(UsageError, match=r"prompt 'row-\d+' with its responses has \d+ tokens, max-length .* give 20"):
        score_teacher(score_config(folder, teachers["opt"], max_length=20))
    assert not (folder / "pairs").exists()


def test_only_sequences_that_might_not_fit_are_looked_at(
    tmp_path: Path, datasets_by_family: dict[str, Path], teachers: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = Dataset.open(datasets_by_family["opt"])
    tables = dataset.prompts, dataset.responses("teacher", 0), dataset.responses("student", 0)
    longest = max(
        len(prompt.prompt_ids) + max(len(y_t.response_ids), len(y_s.response_ids))
        for shard in range(3)
        for prompt, y_t, y_s in zip(*(table.read(shard) for table in tables), strict=True)
    )
    config = score_config(dataset.root, teachers["opt"])
    source = PairSource.open(dataset, config, ModelInfo(config.model))
    source.check_lengths(longest, config.model)
    with pytest.raises(UsageError, match=rf"has {longest} tokens, max-length .* give {longest - 1}"):
        source.check_lengths(longest - 1, config.model)
    monkeypatch.setattr(Table, "read_arrow", None)
    source.check_lengths(dataset.prompt_set.longest_prompt_tokens + 12, config.model)


def test_provenance_says_who_with_what(datasets_by_family: dict[str, Path], teachers: dict[str, Path]) -> None:
    provenance = json.loads((datasets_by_family["gpt2"] / "pairs" / "round-000" / "_table.json").read_text())
    assert provenance["model"]["name"] == "gpt2"
    assert provenance["model"]["revision"].startswith("sha256:")
    assert (provenance["engine"], provenance["dtype"]) == ("transformers", "float32")
    assert provenance["stage"] == "score-teacher"
    assert {"transformers", "torch"} <= provenance["versions"].keys()
    assert provenance["student"]["revision"] != provenance["model"]["revision"]
    sampled = json.loads((datasets_by_family["gpt2"] / "responses" / "teacher" / "_table.json").read_text())
    assert sampled["sampling"] == {"max_new_tokens": 12, "temperature": 1.0, "top_p": 1.0}
    assert sampled["eos_token_ids"] == [1]


def test_the_teachers_likeliest_tokens_are_stored_beside_the_pairs(
    tmp_path: Path, datasets_by_family: dict[str, Path], teachers: dict[str, Path]
) -> None:
    folder = tmp_path / "ds"
    shutil.copytree(datasets_by_family["llama"], folder)
    before = files_of(folder / "pairs")
    score_teacher(score_config(folder, teachers["llama"], top_k=5))  # the pairs are there; only the top-k is missing
    assert files_of(folder / "pairs") == before
    dataset = Dataset.open(folder)
    model = load_model(str(teachers["llama"]), "float32")
    for shard in range(dataset.plan.count):
        for pair, top in zip(dataset.pairs(0).read(shard), dataset.top_k(0).read(shard), strict=True):
            assert top.id == pair.id
            ids = torch.tensor([[*pair.prompt_ids, *pair.rejected_ids]])
            with torch.no_grad():
                logps = model(input_ids=ids).logits[0, len(pair.prompt_ids) - 1 : -1].double().log_softmax(-1)
            values, order = logps.topk(5)
            assert top.rejected_top_ids == order.tolist()
            torch.testing.assert_close(torch.tensor(top.rejected_top_logps).double(), values, rtol=2**-11, atol=1e-4)
            mass = torch.tensor(top.rejected_top_mass).double()
            torch.testing.assert_close(mass, values.exp().sum(-1), rtol=0, atol=1e-4)
            assert len(top.chosen_top_ids) == len(top.chosen_top_mass) == len(pair.chosen_ids)
    rows = load_dataset(str(folder), "top_k", split="train")
    assert rows[0]["id"] == "row-0" and len(rows) == 22
    with pytest.raises(MismatchError, match="top_k=5, this command has top_k=6"):
        score_teacher(score_config(folder, teachers["llama"], top_k=6))


def test_an_audit_measures_the_gap_to_float32(
    tmp_path: Path, datasets_by_family: dict[str, Path], teachers: dict[str, Path]
) -> None:
    folder = tmp_path / "ds"
    shutil.copytree(datasets_by_family["llama"], folder)
    result = score_teacher(score_config(folder, teachers["llama"], audit=7))
    same = json.loads((folder / "pairs/round-000/_audit.json").read_text())
    assert (result.path, result.audit) == (folder / "pairs/round-000", same)
    assert (result.rows, result.scored, result.reused) == (22, 0, 0)
    all_pairs = [pair for shard in range(3) for pair in Dataset.open(folder).pairs(0).read(shard)]
    y_t, y_s = (
        sum(sum(logps) / len(logps) for logps in (getattr(p, f"teacher_{side}_logps") for p in all_pairs)) / 22
        for side in ("chosen", "rejected")
    )
    assert (result.chosen_logp, result.rejected_logp, result.margin) == pytest.approx((y_t, y_s, y_t - y_s))
    assert same["rows"] == 7
    assert same["gap_abs_max"] < 1e-4
    table = Dataset.open(folder).pairs(0)
    for shard in range(3):  # a teacher whose log-probs are all a tenth of a nat too low
        pairs = [replace(p, teacher_chosen_logps=[x - 0.1 for x in p.teacher_chosen_logps]) for p in table.read(shard)]
        replace_shard(table, shard, to_table(pairs, table.record.schema))
    score_teacher(score_config(folder, teachers["llama"], audit=100))
    wrong = json.loads((folder / "pairs/round-000/_audit.json").read_text())
    tokens = [(len(p.chosen_ids), len(p.rejected_ids)) for shard in range(3) for p in table.read(shard)]
    share = sum(chosen for chosen, _ in tokens) / sum(map(sum, tokens))
    assert (wrong["rows"], wrong["tokens"]) == (22, sum(map(sum, tokens)))
    assert wrong["gap_mean"] == pytest.approx(-0.1 * share, abs=1e-4)
    assert wrong["margin_gap_abs_mean"] == pytest.approx(0.1, abs=1e-4)
