"""`train` with every objective, on a dataset that the other commands made."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.runs import NO_SPEEDS, metrics_of, train_config
from helpers.tiny import make_dataset, replace_shard, score_config

from dpkd_offline.common.errors import DataError, MismatchError, UsageError
from dpkd_offline.config.recipe import validated
from dpkd_offline.config.train import TrainConfig
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.dataset.schema import to_table
from dpkd_offline.generation.score_teacher import score_teacher
from dpkd_offline.models.info import ModelInfo
from dpkd_offline.training.examples import pair_stream
from dpkd_offline.training.objectives import OBJECTIVES
from dpkd_offline.training.trainer import train

WORD_LEVEL = [name for name, objective in OBJECTIVES.items() if objective.top_k]
OF_ALL = {"step", "loss", "loss_kd", "grad_norm", "learning_rate", "padding", *NO_SPEEDS}


@pytest.fixture(scope="module")
def with_top_k(
    tmp_path_factory: pytest.TempPathFactory, source: Path, teachers: dict[str, Path], students: dict[str, Path]
) -> dict[str, Path]:
    """Datasets with the 8 likeliest tokens, by family."""
    root = tmp_path_factory.mktemp("top-k")
    return {name: make_dataset(root / name, source, teachers[name], students[name], top_k=8) for name in students}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_lowers_its_loss(
    objective: str, with_top_k: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    """All 22 examples a step, so that each step's loss is that of the same batch."""
    settings: dict[str, Any] = {"objective": objective, "batch_size": 22, "micro_batch_tokens": 700, "max_steps": 10}
    train(train_config(with_top_k["llama"], students["llama"], tmp_path / "out", **settings))
    metrics = metrics_of(tmp_path / "out")
    assert len(metrics) == 10
    for facts in metrics:
        assert facts.keys() == OF_ALL | set(OBJECTIVES[objective].reports)
        assert all(map(math.isfinite, facts.values()))
    measure = "reverse_kl" if objective == "minillm" else "loss"  # whose loss is no measure
    assert metrics[-1][measure] < metrics[0][measure]
    if "margin" in metrics[0]:
        assert metrics[-1]["margin"] > metrics[0]["margin"]
    if objective in ("kd", "rkl"):
        measured = "forward_kl" if objective == "kd" else "reverse_kl"
        assert [m[measured] for m in metrics] == pytest.approx([m["loss"] for m in metrics], rel=1e-5)
    if objective == "minillm":  # before the first step, the student is the one that sampled
        assert (metrics[0]["weight"], metrics[0]["behavior_kl"]) == pytest.approx((1.0, 0.0), abs=1e-3)
        assert metrics[0]["clipped"] == 0.0 < metrics[-1]["clipped"]


@pytest.mark.parametrize(
    ("objective", "family"),
    [("dpkd", "gpt2"), ("kd", "opt"), ("akl", "gpt2"), ("dpkd-token", "opt"), ("minillm", "llama")],
)
def test_objectives_in_bfloat16_go_where_float32_does(
    objective: str, family: str, with_top_k: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    metrics = {}
    for dtype in ("float32", "bfloat16"):
        output = tmp_path / dtype
        train(train_config(with_top_k[family], students[family], output, objective=objective, dtype=dtype))
        metrics[dtype] = metrics_of(output)
    measure = "reverse_kl" if objective == "minillm" else "loss"
    for rough, exact in zip(metrics["bfloat16"], metrics["float32"], strict=True):
        assert all(map(math.isfinite, rough.values()))
        assert rough[measure] == pytest.approx(exact[measure], rel=0.1)


def test_micro_batches_do_not_change_what_is_reported(
    with_top_k: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    for objective in ("dpkd-token", "minillm", "distillm-2"):
        for tokens in (1, 6000):
            output = tmp_path / f"{objective}-{tokens}"
            settings: dict[str, Any] = {"objective": objective, "micro_batch_tokens": tokens, "max_steps": 1}
            train(train_config(with_top_k["opt"], students["opt"], output, **settings))
        (one,), (all_,) = (metrics_of(tmp_path / f"{objective}-{tokens}") for tokens in (1, 6000))
        for name in {*OBJECTIVES[objective].reports, "loss"}:
            assert one[name] == pytest.approx(all_[name], rel=1e-4, abs=1e-6), name


def test_all_objectives_of_pairs_see_the_same_ones(
    with_top_k: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    """Also those whose loss reads one of the two responses only: both decide whether a pair stays."""
    folder = shutil.copytree(with_top_k["llama"], tmp_path / "dataset")
    table, known = Dataset.open(folder).pairs(0), ModelInfo(str(students["llama"])).vocab_size
    for shard in range(table.plan.count):
        reasons = [("stop", "stop"), ("length", "stop"), ("stop", "length")] * 3
        rows = [
            replace(pair, chosen_finish_reason=chosen, rejected_finish_reason=rejected)
            for pair, (chosen, rejected) in zip(table.read(shard), reasons, strict=False)
        ]
        replace_shard(table, shard, to_table(rows, table.schema))
        lengths = [len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) for p in rows]
    changes: list[dict[str, Any]] = [{"truncated": "drop"}, {"max_length": sorted(lengths)[len(lengths) // 2]}]
    for change in changes:
        seen = set()
        for name, objective in OBJECTIVES.items():
            if objective.data == "pairs":
                config = train_config(folder, students["llama"], tmp_path, objective=name, **change)
                stream, _ = pair_stream(Dataset.open(folder), config, known, objective.top_k)
                seen.add(tuple(e.id for e in stream.epoch(0)))
        (ids,) = seen
        assert 0 < len(ids) < 22, change


@pytest.mark.parametrize("objective", WORD_LEVEL)
def test_without_the_likeliest_tokens_the_command_that_stores_them_is_named(
    objective: str, datasets_by_family: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    config = train_config(datasets_by_family["llama"], students["llama"], tmp_path / "out", objective=objective)
    with pytest.raises(DataError, match="run `dpkd-offline score-teacher --round 0 --top-k K` first") as error:
        train(config)
    assert "\n" not in str(error.value)
    assert not config.output.exists()


DAMAGES: dict[str, tuple[Callable[[Any], dict[str, Any]], str]] = {
    "of another prompt": (lambda row: {"id": "row-x"}, "'id' is not that of the pair in pairs/round-000"),
    "a token that nobody knows": (
        lambda row: {"rejected_top_ids": [[400, *ids[1:]] for ids in row.rejected_top_ids]},
        "'rejected_top_ids' holds a token id that a vocabulary of 400 has not",
    ),
    "a token twice": (
        lambda row: {"chosen_top_ids": [[ids[1], *ids[1:]] for ids in row.chosen_top_ids]},
        "'chosen_top_ids' names a token twice at a position",
    ),
    "not a number": (
        lambda row: {"chosen_top_logps": [[math.nan] * 8 for _ in row.chosen_top_logps]},
        "'chosen_top_logps' holds a log-prob that is positive or not finite",
    ),
    "a position too few": (
        lambda row: {"rejected_top_ids": row.rejected_top_ids[1:]},
        "'rejected_top_ids' has not one entry per token of rejected_ids",
    ),
    "more than everything": (
        lambda row: {
            "chosen_top_logps": [[0.0] * 8 for _ in row.chosen_top_logps],
            "chosen_top_mass": [8.0 for _ in row.chosen_top_mass],
        },
        "'chosen_top_mass' is more than 1",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_likeliest_tokens_are_refused_before_the_first_step(
    damage: str, with_top_k: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    change, message = DAMAGES[damage]
    folder = tmp_path / "dataset"
    shutil.copytree(with_top_k["llama"], folder)
    table = Dataset.open(folder).top_k(0)
    rows = table.read(1)
    rows[2] = replace(rows[2], **change(rows[2]))
    replace_shard(table, 1, to_table(rows, table.schema))
    config = train_config(folder, students["llama"], tmp_path / "out", objective="kd")
    with pytest.raises(DataError) as error:
        train(config)
    assert str(error.value).endswith(f"top_k-00001-of-00003.parquet: row 2: column {message}")
    assert not config.output.exists()


def test_other_likeliest_tokens_make_another_run(
    with_top_k: dict[str, Path], students: dict[str, Path], teachers: dict[str, Path], source: Path, tmp_path: Path
) -> None:
    config = train_config(with_top_k["opt"], students["opt"], tmp_path / "out", objective="kd", max_steps=1)
    train(config)
    (before,) = metrics_of(config.output)
    other = tmp_path / "other"
    shutil.copytree(with_top_k["opt"], other, ignore=shutil.ignore_patterns("top_k"))
    score_teacher(score_config(other, teachers["opt"], top_k=2))
    with pytest.raises(MismatchError, match="holds a trained student of another command"):
        train(config.model_copy(update={"dataset": other}))
    train(config.model_copy(update={"dataset": other, "resume": False}))
    (after,) = metrics_of(config.output)
    assert after["forward_kl"] < before["forward_kl"]  # of a coarser partition


@pytest.mark.slow
def test_the_command_refuses_in_one_line(
    run_cli: Callable[..., subprocess.CompletedProcess[str]],
    datasets_by_family: dict[str, Path],
    students: dict[str, Path],
    tmp_path: Path,
) -> None:
    values = {"dataset": datasets_by_family["opt"], "student": students["opt"], "output": tmp_path / "out"}
    flags = [part for name, value in values.items() for part in (f"--{name}", value)]
    done = run_cli("train", *flags, "--objective", "rkl")
    assert done.returncode == 3
    assert done.stderr.strip().splitlines()[-1].endswith("run `dpkd-offline score-teacher --round 0 --top-k K` first")
    assert "Traceback" not in done.stderr


def test_an_anchor_is_reported_beside_the_loss_of_the_pairs(
    with_top_k: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"beta": 2.0, "max_steps": 2, "chosen_nll_weight": 0.5}
    train(train_config(with_top_k["opt"], students["opt"], tmp_path, **settings))
    for facts in metrics_of(tmp_path):
        assert facts["loss_nll"] == pytest.approx(-facts["logps_chosen"], rel=1e-5)
        assert facts["loss"] == pytest.approx(facts["loss_kd"] + 0.5 * facts["loss_nll"])


def test_defaults_are_those_of_the_objective() -> None:
    places = {"dataset": "d", "student": "s", "output": "o"}
    configs = {name: TrainConfig.model_validate({**places, "objective": name}) for name in OBJECTIVES}
    pairwise = {"dpkd", "dpkd-sum", "ipo", "cpo", "simpo"}
    assert {name for name, config in configs.items() if config.beta == 0.1} == {"dpkd-sum", "cpo", "dpkd-token"}
    assert {config.beta for config in configs.values()} == {0.1, 2.0}
    assert pairwise == {name for name, objective in OBJECTIVES.items() if objective.off_policy}
    assert {name for name, config in configs.items() if config.off_policy == "token"} == pairwise
    assert {name for name, config in configs.items() if config.chosen_nll_weight} == pairwise - {"cpo"}
    assert {(config.tau, config.gamma) for config in configs.values()} == {(0.1, 0.5)}
    for option in ({"off_policy": "token"}, {"chosen_nll_weight": 1}):
        with pytest.raises(UsageError, match="objective 'kd' does not compare y_t with y_s"):
            validated(TrainConfig, {**places, "objective": "kd", **option})
    assert TrainConfig.model_validate({**places, "objective": "cpo", "beta": 0.3}).beta == 0.3


@pytest.mark.parametrize(
    ("objective", "setting", "message"),
    [
        ("dpkd", {"gamma": 0.7}, "objective 'dpkd' has no gamma; it belongs to simpo"),
        ("simpo", {"tau": 0.7}, "objective 'simpo' has no tau; it belongs to ipo"),
        ("kd", {"tau": 0.7}, "objective 'kd' does not compare y_t with y_s, so that it has no tau; it belongs to ipo"),
    ],
)
def test_a_setting_of_another_objective_is_refused(objective: str, setting: dict[str, float], message: str) -> None:
    values = {"dataset": "d", "student": "s", "output": "o", "objective": objective}
    with pytest.raises(UsageError, match=f"^{message}$"):
        validated(TrainConfig, {**values, **setting})
    resolved = TrainConfig.model_validate(values).model_dump()  # what distill hands to the stage names all of them
    assert TrainConfig.model_validate(resolved).model_dump() == resolved


def test_the_weights_are_one_at_first_and_say_how_stale_y_s_are(
    with_top_k: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"beta": 2.0, "max_steps": 6, "batch_size": 22, "micro_batch_tokens": 900}
    for off_policy in ("token", "none"):
        train(
            train_config(with_top_k["gpt2"], students["gpt2"], tmp_path / off_policy, off_policy=off_policy, **settings)
        )
    corrected, plain = (metrics_of(tmp_path / name) for name in ("token", "none"))
    assert (corrected[0]["weight"], corrected[0]["clipped"]) == pytest.approx((1.0, 0.0), abs=1e-3)
    assert corrected[-1]["weight"] < 0.95 and corrected[-1]["drift"] > 0.02
    assert plain[-1]["drift"] > corrected[-1]["drift"]  # pushed down for ever
    assert not {"weight", "clipped"} & plain[0].keys()
    training = json.loads((tmp_path / "token" / "training.json").read_text())
    assert training["settings"]["off_policy"] == "token"


def test_y_s_of_a_colder_student_are_named(
    datasets_by_family: dict[str, Path], students: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = shutil.copytree(datasets_by_family["opt"], tmp_path / "dataset")
    path = dataset / "responses" / "student" / "round-000" / "_table.json"
    provenance = json.loads(path.read_text())
    provenance["sampling"]["temperature"] = 0.7
    path.write_text(json.dumps(provenance))
    for off_policy in ("token", "none"):
        train(train_config(dataset, students["opt"], tmp_path / off_policy, max_steps=1, off_policy=off_policy))
        warned = "warning: y_s were sampled at temperature 0.7, top-p 1.0; the off-policy" in capsys.readouterr().err
        assert warned == (off_policy == "token")


def test_y_t_can_be_learned_before_there_are_pairs(
    datasets_by_family: dict[str, Path], students: dict[str, Path], foreign: Path, tmp_path: Path
) -> None:
    """What seqkd makes of the teacher's responses alone is what it makes of pairs with them."""
    alone = shutil.copytree(
        datasets_by_family["llama"], tmp_path / "alone", ignore=shutil.ignore_patterns("pairs", "student", "top_k")
    )
    settings: dict[str, Any] = {"objective": "seqkd", "holdout": 0.2, "validate_responses": 4}
    train(train_config(datasets_by_family["llama"], students["llama"], tmp_path / "pairs", **settings))
    with pytest.raises(DataError, match="no pairs yet"):
        train(train_config(alone, students["llama"], tmp_path / "teacher", **settings))
    train(train_config(alone, students["llama"], tmp_path / "teacher", responses="teacher", **settings))
    pairs, teacher = (metrics_of(tmp_path / name) for name in ("pairs", "teacher"))
    for ours, theirs in zip(teacher, pairs, strict=True):
        for name in ours.keys() - NO_SPEEDS.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=1e-6), name
    train(train_config(alone, foreign, tmp_path / "foreign", responses="teacher", **settings))
    assert metrics_of(tmp_path / "foreign")[-2]["loss"] > 0
    with pytest.raises(UsageError, match="objective 'dpkd' needs pairs; seqkd alone reads"):
        validated(TrainConfig, {"dataset": "d", "student": "s", "output": "o", "responses": "teacher"})
