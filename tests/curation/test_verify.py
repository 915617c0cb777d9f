from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from helpers.tiny import replace_shard, score_config, vouch

from dpkd_offline.common.errors import DataError, DpkdError, MismatchError
from dpkd_offline.curation.inspect import inspect, inspection_table
from dpkd_offline.curation.verify import VerifyResult, verify
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.dataset.schema import PreferencePair, to_table
from dpkd_offline.generation.score_teacher import score_teacher


@pytest.fixture
def folder(tmp_path: Path, datasets_by_family: dict[str, Path]) -> Path:
    shutil.copytree(datasets_by_family["llama"], tmp_path / "ds")
    return tmp_path / "ds"


def change_pair(folder: Path, row: int, **values: object) -> None:
    """Write another value into row `row` of pairs shard 1, manifest and all."""
    table = Dataset.open(folder).pairs(0)
    rows = [pair.__dict__ for pair in table.read(1)]
    rows[row] = {**rows[row], **values}
    replace_shard(table, 1, to_table([PreferencePair(**r) for r in rows], PreferencePair.schema))


def test_a_whole_dataset_is_whole(folder: Path) -> None:
    rows = {"prompts": 22, "responses/teacher": 22, "responses/student/round-000": 22, "pairs/round-000": 22}
    assert verify(folder) == VerifyResult(folder, rows)


WRONG = {
    "short log-probs": ({"teacher_chosen_logps": [-1.0]}, "row 3: column 'teacher_chosen_logps' has not one log-prob"),
    "NaN": ({"rejected_ids": [5], "teacher_rejected_logps": [float("nan")], "behavior_rejected_logps": [-1.0]},
            "row 3: column 'teacher_rejected_logps' holds a log-prob that is not finite"),
    "infinite": ({"rejected_ids": [5], "teacher_rejected_logps": [-1.0], "behavior_rejected_logps": [-float("inf")]},
                 "row 3: column 'behavior_rejected_logps' holds a log-prob that is not finite"),
    "positive": ({"chosen_ids": [5, 1], "teacher_chosen_logps": [-1.0, 0.5]},
                 "row 3: column 'teacher_chosen_logps' holds a positive log-prob"),
    "negative id": ({"prompt_ids": [4, -2]}, "row 3: column 'prompt_ids' holds a negative token id"),
    "no prompt": ({"prompt_ids": []}, "row 3: column 'prompt_ids' is empty"),
    "no response": ({"chosen_ids": [], "teacher_chosen_logps": []}, "row 3: column 'chosen_ids' is empty"),
    "finish reason": ({"chosen_finish_reason": "tired"}, "row 3: column 'chosen_finish_reason' is neither"),
    "another prompt": ({"id": "row-0"}, "row 3: column 'id' is not the id of the prompt in this row"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_values_are_placed(name: str, folder: Path) -> None:
    values, message = WRONG[name]
    change_pair(folder, 3, **values)
    with pytest.raises(DataError) as caught:
        verify(folder)
    assert "pairs-00001-of-00003.parquet: " + message in str(caught.value)


def test_an_id_may_stand_once(folder: Path) -> None:
    prompts = Dataset.open(folder).prompts
    rows = prompts.read_arrow(1)
    twice = pa.array(["row-0", *rows["id"].to_pylist()[1:]])
    replace_shard(prompts, 1, rows.set_column(0, rows.schema.field(0), twice))
    with pytest.raises(
        DataError, match=r"prompts-00001.*row 0: column 'id': 'row-0' stands in prompts-00000.*, row 0, too"
    ):
        verify(folder)


def test_damaged_and_missing_files(folder: Path) -> None:
    path = Dataset.open(folder).pairs(0).path(2)
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    for place in random.integers(0, len(whole), 40).tolist():
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 64]) + whole[place + 1 :])
        with pytest.raises(MismatchError, match="pairs-00002-of-00003"):
            verify(folder)
    for length in (0, 3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(MismatchError, match="pairs-00002-of-00003"):
            verify(folder)
    path.unlink()
    with pytest.raises(DataError, match=r"pairs-00002-of-00003\.parquet: no such file, though"):
        verify(folder)


def test_a_file_that_is_no_parquet_but_vouched_for(folder: Path) -> None:
    prompts = Dataset.open(folder).prompts
    prompts.path(0).write_bytes(b"PAR1 nothing PAR1")
    vouch(prompts, 0)
    with pytest.raises(DpkdError, match=r"prompts-00000-of-00003\.parquet: not a readable Parquet file"):
        verify(folder)


def test_the_commands(folder: Path, run_cli: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = run_cli("verify", folder)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "pairs/round-000: 22 rows, whole")
    done = run_cli("inspect", folder, "--json")
    assert (done.returncode, json.loads(done.stdout)["prompts"]) == (0, 22)
    assert "teacher margin per token" in run_cli("inspect", folder).stdout
    change_pair(folder, 0, prompt_ids=[])
    done = run_cli("verify", folder)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.splitlines()[-1].endswith("pairs-00001-of-00003.parquet: row 0: column 'prompt_ids' is empty")


def test_a_table_that_is_only_begun_is_called_that(folder: Path) -> None:
    table = Dataset.open(folder).pairs(0)
    for shard in (1, 2):
        table.path(shard).unlink()
        table.entry_path(shard).unlink()
    with pytest.raises(DataError, match=r"pairs-00001.* only begun: 2 of 3 shards are missing, `dpkd-offline score-t"):
        verify(folder)
    shutil.rmtree(table.folder)
    assert "pairs/round-000" not in verify(folder).rows


def test_pairs_alone_can_be_verified(folder: Path) -> None:
    """Who shares a dataset may leave the responses out: pairs have all that training needs."""
    shutil.rmtree(folder / "responses")
    assert verify(folder).rows == {"prompts": 22, "pairs/round-000": 22}


def test_a_dataset_behind_a_link_is_whole(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    assert len(verify(tmp_path / "link").rows) == 4


@pytest.fixture
def with_top_k(folder: Path, teachers: dict[str, Path]) -> Path:
    score_teacher(score_config(folder, teachers["llama"], top_k=4, audit=5))
    return folder


def test_the_likeliest_tokens_are_verified_and_inspected(with_top_k: Path) -> None:
    assert verify(with_top_k).rows["top_k/round-000"] == 22
    inspection = inspect(with_top_k)
    mass = inspection["tables"]["top_k/round-000"]["chosen top mass per token"]
    assert 0 < mass["mean"] <= 1
    assert inspection["tables"]["pairs/round-000"]["audit"]["rows"] == 5
    assert "audit: 5 rows against transformers float32" in inspection_table(inspection)


WRONG_TOP_K = {
    "an entry short": (
        {"chosen_top_mass": [0.5]},
        "column 'chosen_top_mass' has not one entry per token of chosen_ids",
    ),
    "fewer than k": (
        lambda row: {"chosen_top_ids": [ids[:3] for ids in row.chosen_top_ids]},
        "column 'chosen_top_ids' has not 4 entries at each position",
    ),
    "out of vocabulary": (
        lambda row: {"rejected_top_ids": [[60000] * 4 for _ in row.rejected_top_ids]},
        "column 'rejected_top_ids' holds a token id that a vocabulary of 400 has not",
    ),
    "positive": (
        lambda row: {"rejected_top_logps": [[0.5, -9.0, -9.0, -9.0] for _ in row.rejected_top_ids]},
        "column 'rejected_top_logps' holds a log-prob that is positive",
    ),
    "not a number": (
        lambda row: {"chosen_top_logps": [[float("nan")] * 4 for _ in row.chosen_top_ids]},
        "column 'chosen_top_logps' holds a log-prob that is positive or not finite",
    ),
    "out of order": (
        lambda row: {"chosen_top_logps": [logps[::-1] for logps in row.chosen_top_logps]},
        "column 'chosen_top_logps' is not in order",
    ),
    "a token twice": (
        lambda row: {"chosen_top_ids": [[5, 5, 6, 7] for _ in row.chosen_top_ids]},
        "column 'chosen_top_ids' names a token twice at a position",
    ),
    "another mass": (
        lambda row: {"chosen_top_mass": [mass / 2 for mass in row.chosen_top_mass]},
        "column 'chosen_top_mass' is not the sum",
    ),
}


@pytest.mark.parametrize("name", WRONG_TOP_K)
def test_wrong_likeliest_tokens_are_placed(name: str, with_top_k: Path) -> None:
    change, message = WRONG_TOP_K[name]
    table = Dataset.open(with_top_k).top_k(0)
    rows = table.read(1)
    rows[2] = replace(rows[2], **(change(rows[2]) if callable(change) else change))
    replace_shard(table, 1, to_table(rows, table.schema))
    with pytest.raises(DataError) as error:
        verify(with_top_k)
    assert f"top_k-00001-of-00003.parquet: row 2: {message}" in str(error.value)


def test_likeliest_tokens_without_their_pairs_are_refused(with_top_k: Path) -> None:
    shutil.rmtree(with_top_k / "pairs")
    with pytest.raises(DataError, match="belongs to pairs of round 0 that are not there"):
        verify(with_top_k)
