"""What is wrong with a run is named with what there is, before the first step."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.runs import train_config
from helpers.tiny import generate_config, score_config
from transformers import AutoModelForCausalLM

from dpkd_offline.common.errors import DataError, DpkdError, UsageError
from dpkd_offline.config.data import ExportConfig, SubsetConfig
from dpkd_offline.curation.export_pairs import export_pairs
from dpkd_offline.curation.merge import subset
from dpkd_offline.generation.generate import generate
from dpkd_offline.generation.score_teacher import score_teacher
from dpkd_offline.training.preflight import preflight
from dpkd_offline.training.trainer import train


def export(folder: Path, output: Path, **changes: object) -> None:
    export_pairs(ExportConfig.model_validate({"dataset": folder, "output": output, **changes}))


@pytest.fixture(scope="module")
def two_students(
    datasets_by_family: dict[str, Path],
    teachers: dict[str, Path],
    students: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A dataset whose pairs are of the student `small` alone; the first one has none."""
    folder = tmp_path_factory.mktemp("datasets") / "named"
    shutil.copytree(datasets_by_family["opt"], folder)
    shutil.rmtree(folder / "pairs")
    generate(generate_config(folder, "student", students["opt"], student_name="small"))
    score_teacher(score_config(folder, teachers["opt"], student_name="small"))
    return folder


def test_a_name_or_round_that_is_not_there_is_answered_with_those_that_are(
    two_students: Path, teachers: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    uses: tuple[Callable[..., object], ...] = (
        lambda **how: train(train_config(two_students, students["opt"], tmp_path / "out", **how)),
        lambda **how: export(two_students, tmp_path / "out", **how),
        lambda **how: score_teacher(score_config(two_students, teachers["opt"], **how)),
    )
    for use in uses:
        with pytest.raises(UsageError, match=r"/named: no student 'smal'; there is: small$"):
            use(student_name="smal")
        with pytest.raises(
            DataError, match=r"small/(pairs|responses/student): no round 3; there is: 0; `dpkd-offline "
        ):
            use(student_name="small", round=3)
    for use in uses[:2]:
        with pytest.raises(
            DataError, match=r"pairs: the student without a name has none; there is: --student-name sma"
        ):
            use()
    with pytest.raises(UsageError, match="no student 'smal'; there is: small"):
        generate(generate_config(two_students, "student", students["opt"], student_name="smal", round=1, share=0.5))
    with pytest.raises(DataError, match=r"/nowhere: no such folder; `dpkd-offline generate --prompts"):
        train(train_config(tmp_path / "nowhere", students["opt"], tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_where_nothing_is_left_the_reasons_are_counted(
    datasets_by_family: dict[str, Path], students: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """These models answer until they are cut off."""
    folder, student = datasets_by_family["llama"], students["llama"]
    with pytest.raises(DataError, match=r"no pair is left to train on: 22 of 22 dropped: 22 cut off by length"):
        preflight(train_config(folder, student, tmp_path / "out", truncated="drop"))
    with pytest.raises(DataError, match=r"no pair is left: 22 of 22 dropped: cut off by length"):
        export(folder, tmp_path / "out", truncated="drop")
    with pytest.raises(DataError, match=r"no row satisfies the rules: 22 of 22 dropped: 22 by --drop-truncated"):
        subset(SubsetConfig(dataset=folder, output=tmp_path / "out", drop_truncated=True, max_tokens=300))
    with pytest.raises(DataError, match=r"22 of 22 dropped: 22 longer than 9 tokens \(--max-length, or the context"):
        preflight(train_config(folder, student, tmp_path / "out", max_length=9, truncated="drop"))
    with pytest.raises(DataError, match=r"22 of 22 dropped: 22 held out \(--holdout 0\.999\)"):
        preflight(train_config(folder, student, tmp_path / "out", holdout=0.999))
    assert not (tmp_path / "out").exists()
    lengths = sorted(len(e.prompt_ids) + 12 for e in preflight(train_config(folder, student, tmp_path)).stream.epoch(0))
    capsys.readouterr()
    inputs = preflight(train_config(folder, student, tmp_path / "out", max_length=lengths[-1] - 1))
    assert 22 > len(inputs.stream) == sum(length < lengths[-1] for length in lengths) > 11
    assert f"{22 - len(inputs.stream)} of 22 pairs are left out: " in capsys.readouterr().err
    inputs = preflight(train_config(folder, student, tmp_path / "out", max_length=lengths[0]))
    assert f"warning: {22 - len(inputs.stream)} of 22 pairs are left out: " in capsys.readouterr().err


def test_examples_beyond_the_students_context_are_not_read(
    datasets_by_family: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    """Its positions end there, whatever max_length allows."""
    folder = datasets_by_family["llama"]
    short = tmp_path / "short"
    shutil.copytree(students["llama"], short)
    lengths = sorted(len(e.prompt_ids) + 12 for e in preflight(train_config(folder, short, tmp_path)).stream.epoch(0))
    model = AutoModelForCausalLM.from_pretrained(short)
    model.config.max_position_embeddings = lengths[10]
    model.config.save_pretrained(short)
    inputs = preflight(train_config(folder, short, tmp_path / "out", max_length=1024))
    assert len(inputs.stream) == sum(length <= lengths[10] for length in lengths) < 22
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"text": "tea and bread"}\n' * 90)
    with pytest.raises(UsageError, match=rf"--lm-length: 250 tokens, the context of .*short has {lengths[10]}"):
        preflight(train_config(folder, short, tmp_path / "out", lm_corpus=str(corpus), lm_length=250))


@pytest.mark.parametrize("holdout", [0.0, 0.4])
def test_weights_that_are_not_numbers_are_named_and_not_the_pairs(
    holdout: float, datasets_by_family: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    student = tmp_path / "student"
    model = AutoModelForCausalLM.from_pretrained(students["gpt2"])
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = float("nan")
    model.save_pretrained(student)
    for path in students["gpt2"].glob("tokenizer*"):
        shutil.copyfile(path, student / path.name)
    with pytest.raises(DpkdError) as caught:
        train(train_config(datasets_by_family["gpt2"], student, tmp_path / "out", holdout=holdout))
    assert "h.1.mlp.c_fc.weight" in str(caught.value) and "row-" not in str(caught.value)
    assert "not finite" in str(caught.value)


def test_a_run_that_blows_up_says_that_its_rate_is_too_high(
    datasets_by_family: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    config = train_config(
        datasets_by_family["gpt2"],
        students["gpt2"],
        tmp_path / "out",
        learning_rate=1e36,
        max_steps=6,
        warmup_ratio=0.0,
    )
    with pytest.raises(DataError, match=r"the student's .* after step \d .*not finite.*lower --learning-rate"):
        train(config)
