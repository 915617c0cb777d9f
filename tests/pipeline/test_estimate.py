"""Memory and time that a dry run tells."""

from __future__ import annotations

import os
import runpy
from pathlib import Path

import pytest
from helpers.runs import write_recipe
from helpers.tiny import FAMILIES
from transformers import MambaConfig

from dpkd_offline.config.recipe import read_recipe
from dpkd_offline.config.train import TrainConfig
from dpkd_offline.models.loading import load_model, parameter_count
from dpkd_offline.pipeline.dry_run import plan_of_work, size_text, table_of_work
from dpkd_offline.pipeline.memory import ModelShape, generate_memory, score_memory, train_memory
from dpkd_offline.pipeline.shapes import adapter_count, shape_of
from dpkd_offline.pipeline.throughput import RECORD, Throughput, Workload, record_stage
from dpkd_offline.training.init_student import shallower
from dpkd_offline.training.lora import adapt

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_shape_of_a_model_is_known_without_its_weights(
    family: str, tmp_path: Path, teachers: dict[str, Path]
) -> None:
    folder = teachers[family]
    model = load_model(str(folder), "float32")
    shape = shape_of(str(folder))
    assert shape is not None
    assert (shape.parameters, shape.layers, shape.hidden) == (parameter_count(model), 4, 64)
    assert shape.vocabulary == model.config.vocab_size
    cut = shape_of(str(folder), layers=2)
    assert cut is not None
    assert (cut.parameters, cut.layers) == (parameter_count(shallower(model, 2)), 2)
    without_weights = tmp_path / "config"
    without_weights.mkdir()
    (without_weights / "config.json").write_text((folder / "config.json").read_text())
    assert shape_of(str(without_weights)) == shape
    assert shape_of("nobody/has-this-model") is None
    MambaConfig(num_hidden_layers=2).save_pretrained(tmp_path / "without attention")
    assert shape_of(str(tmp_path / "without attention")) is None


def test_adapters_are_counted_as_peft_makes_them(tmp_path: Path, teachers: dict[str, Path]) -> None:
    for family in FAMILIES:
        for targets in ("all-linear", "c_attn" if family == "gpt2" else "q_proj,v_proj"):
            config = TrainConfig(
                dataset=tmp_path, student=str(teachers[family]), output=tmp_path, lora_rank=3, lora_targets=targets
            )
            adapted = adapt(load_model(config.student, "float32"), config)
            trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
            assert adapter_count(config.student, 3, targets) == trained, (family, targets)


def test_training_holds_eighteen_bytes_a_parameter_and_sixteen_in_float32() -> None:
    shapes = [ModelShape(parameters, 2, 8, 8, 8, 100) for parameters in (0, 1000)]
    small, large = (train_memory(shape, "bfloat16", 10) for shape in shapes)
    assert large - small == 18_000
    small, large = (train_memory(shape, "float32", 10) for shape in shapes)
    assert large - small == 16_000
    assert train_memory(shapes[1], "bfloat16", 10, adapters=10) - train_memory(shapes[0], "bfloat16", 10) == 4000
    assert train_memory(shapes[1], "bfloat16", 10**6, recomputed=True) < train_memory(shapes[1], "bfloat16", 10**6)


def test_the_cache_grows_with_sequences_and_their_lengths() -> None:
    shape = ModelShape(0, 3, 8, 8, 4, 0)
    few, many = (generate_memory(shape, "bfloat16", 5, 3, new) for new in (4, 14))
    assert many - few == 5 * 10 * 3 * 2 * 4 * 2


def test_the_table_fits_a_console_and_says_what_is_unknown(
    tmp_path: Path, teachers: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = read_recipe(write_recipe(tmp_path, teachers["llama"]))
    table = table_of_work(plan_of_work(recipe))
    assert all(len(line) <= 100 for line in table.splitlines())
    assert "unknown" not in table
    monkeypatch.setattr("dpkd_offline.pipeline.dry_run.shape_of", lambda *_, **__: None)
    lines = {
        line.split("|")[1].strip(): line
        for line in table_of_work(plan_of_work(recipe)).splitlines()
        if line.startswith("|")
    }
    assert lines["train"].count("unknown") == 2  # disk and memory
    assert lines["generate: teacher"].count("unknown") == 1


def test_the_table_of_what_it_takes_is_made_by_the_same_formulas() -> None:
    benchmark = runpy.run_path(str(ROOT / "tests" / "benchmarks" / "what_it_takes.py"))
    shapes, lines = benchmark["SHAPES"], benchmark["memory_table"]().splitlines()
    (line,) = [line for line in lines if line.startswith("| 70B")]
    scores = [cell.strip() for cell in line.split("|")][benchmark["STAGES"].index("score-teacher") + 3]
    assert scores == size_text(score_memory(shapes["70B"], "bfloat16", top_k=False)) == "132 GiB"
    assert len(benchmark["disk_table"]().splitlines()) == 2 + len(benchmark["PROMPTS"])


def test_time_follows_from_the_longest_run_of_a_kind(tmp_path: Path) -> None:
    done = Workload("train", "dpkd", None, parameters=1000, sequences=10, tokens=2000)
    run, other = tmp_path / "run", tmp_path / "other"
    run.mkdir()
    other.mkdir()
    record_stage(run, "train", 100.0, 0, 1, done)
    record_stage(run, "train", 3.0, 0, 1, None)  # it went on, and nobody knows how much was left
    record_stage(run, "train", 9.0, 1, 1, done)  # it failed
    record_stage(other, "train", 30.0, 0, 1, Workload("train", "dpkd", None, 1000, 1, 200))
    with (other / RECORD).open("a") as file:
        file.write('{"stage": "train", "seconds": 9.0, "exit_code": 0}\n{"stage": "tr')
    throughput = Throughput(tmp_path / "new")
    assert throughput.seconds(Workload("train", "dpkd", None, 1000, 30, 6000)) == pytest.approx(300)
    assert throughput.seconds(Workload("train", "dpkd", None, 2000, 30, 6000)) is None
    assert throughput.seconds(Workload("train", "kd", None, 1000, 30, 6000)) is None
    assert throughput.seconds(Workload("generate", None, "vllm", 1000, 30, 6000)) is None


def test_files_of_others_beside_a_run_tell_no_time_and_stop_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither lines that are not ours nor something that is no file."""
    (tmp_path / "a").mkdir()
    lines = [b"[]", b'"x"', b"\xff\xfe", b'{"command": "train", "tokens": 0}', b"[" * 100_000, b'{"seconds": "x"}']
    (tmp_path / "a" / "stages.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "b").mkdir()
    os.mkfifo(tmp_path / "b" / "stages.jsonl")
    assert Throughput(tmp_path / "new").seconds(Workload("train", "dpkd", None, 5, 5, 5)) is None
    assert "stages.jsonl: a pipe or a device, not a file" in capsys.readouterr().err
