"""What goes out is what was scored: TRL trains on it as we do, and other readers see the same rows."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from helpers.readers import TABLES, our_losses, pairs_of, rows_by_reader, trl_losses
from helpers.tiny import files_of, generate_config, score_config

from dpkd_offline.common.errors import DataError, MismatchError, OutputBusy, UsageError
from dpkd_offline.common.ownership import locked
from dpkd_offline.config.data import ExportConfig
from dpkd_offline.curation.export_pairs import ExportResult, export_pairs
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.generation.generate import generate
from dpkd_offline.generation.score_teacher import score_teacher

Run = Callable[..., subprocess.CompletedProcess[str]]
BATCH = 4


@pytest.fixture(scope="session")
def mixed(
    tmp_path_factory: pytest.TempPathFactory, source: Path, teachers: dict[str, Path], students: dict[str, Path]
) -> dict[str, Path]:
    """Datasets with responses that ended, and others that were cut off."""
    root = tmp_path_factory.mktemp("mixed")
    for family in ("gpt2", "llama"):
        longer = {"max_new_tokens": 100}
        generate(generate_config(root / family, "teacher", teachers[family], prompts=str(source), **longer))
        generate(generate_config(root / family, "student", students[family], **longer))
        score_teacher(score_config(root / family, teachers[family]))
    return {family: root / family for family in ("gpt2", "llama")}


def export(dataset: Path, output: Path, **changes: Any) -> Path:
    export_pairs(ExportConfig(dataset=dataset, output=output, **changes))
    return output


# --- export ---


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_code_in_the_readme_trains_trl_with_our_loss(
    family: str, mixed: dict[str, Path], students: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    pairs = pairs_of(mixed[family])
    assert {p.chosen_finish_reason for p in pairs} == {"stop", "length"}
    theirs = trl_losses(export(mixed[family], tmp_path / "out"), students[family], BATCH, tmp_path)
    assert len(theirs) == 6
    assert theirs == pytest.approx(list(our_losses(pairs, students[family], BATCH)), abs=1e-4)
    assert (tmp_path / "my-student" / "model.safetensors").exists()


def test_every_row_goes_out_with_the_ids_and_the_sums_that_were_scored(mixed: dict[str, Path], tmp_path: Path) -> None:
    exported = export(mixed["gpt2"], tmp_path / "out")
    loaded = datasets.load_dataset(str(exported), split="train", cache_dir=str(tmp_path / "cache"))
    pairs = pairs_of(mixed["gpt2"])
    assert loaded.to_list() == [
        {
            **{name: getattr(p, name) for name in ("id", "prompt", "chosen", "rejected")},
            **{name: getattr(p, name) for name in ("prompt_ids", "chosen_ids", "rejected_ids")},
            "ref_chosen_logps": pytest.approx(sum(p.teacher_chosen_logps)),
            "ref_rejected_logps": pytest.approx(sum(p.teacher_rejected_logps)),
        }
        for p in pairs
    ]
    description = json.loads((exported / "dpkd_offline.json").read_text())
    cut_off = [p for p in pairs if "length" in (p.chosen_finish_reason, p.rejected_finish_reason)]
    assert (description["rows"], description["dropped"], description["cut_off"]) == (22, 0, len(cut_off))
    assert description["longest"] == max(len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) for p in pairs)
    provenance = Dataset.open(mixed["gpt2"]).pairs(0).require_provenance()
    assert (description["teacher"], description["engine"], description["prompt_set"]["id"]) == (
        provenance["model"],
        "transformers",
        provenance["prompt_set"],
    )
    assert str(tmp_path) not in "".join(path.read_text() for path in exported.glob("*.*"))


def test_an_export_is_not_taken_for_another_of_the_same_name(mixed: dict[str, Path], tmp_path: Path) -> None:
    """`datasets` knows what it has in its cache by names and patterns alone."""
    prompts = [
        datasets.load_dataset(
            str(export(mixed[family], tmp_path / family / "out")), split="train", cache_dir=str(tmp_path / "cache")
        )["prompt"]
        for family in ("gpt2", "llama")
    ]
    assert list(prompts[0]) != list(prompts[1])


def test_lines_of_json(mixed: dict[str, Path], tmp_path: Path, run_cli: Run) -> None:
    file = export(mixed["llama"], tmp_path / "out" / "pairs.jsonl", format="jsonl")
    piped = run_cli("export", mixed["llama"], "-", "--format", "jsonl")
    assert (piped.returncode, piped.stdout) == (0, file.read_text())
    lines, pairs = [json.loads(line) for line in piped.stdout.splitlines()], pairs_of(mixed["llama"])
    assert [line["id"] for line in lines] == [p.id for p in pairs]
    first, pair = lines[0], pairs[0]
    assert first == {
        **{name: getattr(pair, name) for name in ("id", "prompt", "chosen", "rejected", "reference")},
        "messages": [{"role": "user", "content": "Describe tea in 2 words.\n\nFor a child."}],
        **{f"{side}_finish_reason": getattr(pair, f"{side}_finish_reason") for side in ("chosen", "rejected")},
        "teacher_chosen_logp": pytest.approx(sum(pair.teacher_chosen_logps)),
        "teacher_rejected_logp": pytest.approx(sum(pair.teacher_rejected_logps)),
        "chosen_tokens": len(pair.chosen_ids),
        "rejected_tokens": len(pair.rejected_ids),
    }
    assert [path.name for path in file.parent.iterdir()] == ["pairs.jsonl"]


def test_pairs_that_were_cut_off_can_be_left_out(mixed: dict[str, Path], tmp_path: Path) -> None:
    ended = [p.id for p in pairs_of(mixed["gpt2"]) if p.chosen_finish_reason == p.rejected_finish_reason == "stop"]
    file = tmp_path / "out.jsonl"
    result = export_pairs(ExportConfig(dataset=mixed["gpt2"], output=file, format="jsonl", truncated="drop"))
    assert result == ExportResult(file, rows=len(ended), dropped=22 - len(ended), cut_off=0, to_stdout=False)
    lines = file.read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ended
    exported = export(mixed["gpt2"], tmp_path / "out", truncated="drop")
    assert datasets.load_dataset(str(exported), split="train", cache_dir=str(tmp_path / "cache"))["id"] == ended
    assert 0 < len(ended) < 22


def test_exports_that_cannot_be(
    mixed: dict[str, Path], datasets_by_family: dict[str, Path], source: Path, teachers: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    with pytest.raises(
        UsageError, match=r"full: holds 'thesis\.txt', and nothing says that it is a TRL export of ours"
    ):
        export(mixed["gpt2"], tmp_path / "full")
    with pytest.raises(UsageError, match=r"full: is a folder; name a file"):
        export(mixed["gpt2"], tmp_path / "full", format="jsonl")
    with pytest.raises(DataError, match=r"pairs/round-000: no pair is left: 22 of 22 dropped: cut off by length"):
        export(datasets_by_family["gpt2"], tmp_path / "none", truncated="drop")
    generate(generate_config(tmp_path / "begun", "teacher", teachers["gpt2"], prompts=str(source)))
    with pytest.raises(DataError, match=r"begun/pairs: no pairs yet; run `dpkd-offline score-teacher` first"):
        export(tmp_path / "begun", tmp_path / "none")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["begun", "full"]


def test_an_export_is_left_as_it_is_and_nothing_else_is_written_over(mixed: dict[str, Path], tmp_path: Path) -> None:
    for name, form in (("folder", "trl"), ("pairs.jsonl", "jsonl")):
        config = ExportConfig(dataset=mixed["gpt2"], output=tmp_path / name, format=form)
        first, whole = export_pairs(config), files_of(tmp_path)
        assert export_pairs(config) == first
        with pytest.raises((MismatchError, UsageError), match=rf"{name}: (holds the export of other|is there already)"):
            export_pairs(config.model_copy(update={"truncated": "drop"}))
        with locked(tmp_path / f".{name}.lock", tmp_path / name, "export"), pytest.raises(OutputBusy, match="now"):
            export_pairs(config)
        assert files_of(tmp_path) == whole
    with pytest.raises(UsageError, match=r"README\.md: is there already, and not this export"):
        export(mixed["gpt2"], tmp_path / "folder" / "README.md", format="jsonl")
    with pytest.raises(DataError, match="/dev/null: a pipe or a device, not a file"):
        export(mixed["gpt2"], Path("/dev/null"), format="jsonl")
    assert files_of(tmp_path) == whole


# --- readers that know nothing of this program ---


def test_other_readers_see_the_same_rows(mixed: dict[str, Path], tmp_path: Path) -> None:
    """datasets, pyarrow, DuckDB and polars, of every table."""
    for config in TABLES:
        rows = rows_by_reader(mixed["llama"], config, tmp_path / "cache")
        assert len(rows["pyarrow"]) == 22
        assert all(read == rows["pyarrow"] for read in rows.values()), config
