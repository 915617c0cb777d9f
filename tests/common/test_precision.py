"""Which precision a machine gets where a command is told none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.runs import train_config
from helpers.tiny import generate_config

from dpkd_offline.common import gpus, precision
from dpkd_offline.common.files import read_json
from dpkd_offline.config.base import ModelOptions
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.engines.factory import engine_and_dtype
from dpkd_offline.generation.generate import generate
from dpkd_offline.training.trainer import train


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    precision.fast_dtype.cache_clear()
    yield
    precision.fast_dtype.cache_clear()


def with_cpu(monkeypatch: pytest.MonkeyPatch, count: int = 0, **capabilities: object) -> None:
    monkeypatch.setattr(precision, "count_gpus", lambda: count)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, **capabilities})
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"amx_bf16": True}, "bfloat16"),
        ({"avx512_bf16": True, "amx_bf16": False}, "bfloat16"),
        ({"architecture": "aarch64", "bf16": True}, "bfloat16"),
        ({"architecture": "aarch64", "bf16": False, "neon": True}, "float32"),
        ({"avx512_f": True, "avx512_bf16": False}, "float32"),
        ({}, "float32"),
    ],
)
def test_a_cpu_computes_in_what_it_has_instructions_for(
    capabilities: dict[str, object],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with_cpu(monkeypatch, **capabilities)
    assert [precision.fast_dtype(), precision.fast_dtype()] == [expected, expected]
    assert capsys.readouterr().err.count("dtype: float32") == (expected == "float32")


def test_a_library_without_its_products_is_not_asked_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    with_cpu(monkeypatch, amx_bf16=True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert precision.fast_dtype() == "float32"


def with_gpus(folder: Path, monkeypatch: pytest.MonkeyPatch, names: str, says: str) -> None:
    """GPUs of these names, on a machine of whose GPUs the driver's tool says something."""
    with_cpu(monkeypatch, count=names.count(",") + 1)
    monkeypatch.setattr(gpus, "count_gpus", lambda: names.count(",") + 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", names)
    tool = folder / "nvidia-smi"
    tool.write_text(f'#!/bin/sh\nprintf "{says}"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


@pytest.mark.parametrize(
    ("names", "says", "expected"),
    [
        ("0", "9.0\\n", "bfloat16"),
        ("1,0", "12.0\\n8.6\\n", "bfloat16"),
        ("0", "7.5\\n", "float32"),
        ("GPU-1,GPU-2", "7.0\\n7.5\\n", "float32"),
        ("MIG-1", "No devices were found\\n", "bfloat16"),
    ],
)
def test_a_gpu_computes_in_what_it_has_instructions_for(
    names: str,
    says: str,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with_gpus(tmp_path, monkeypatch, names, says)
    assert ModelOptions().precision == expected
    assert ("this GPU has no instructions" in capsys.readouterr().err) == (expected == "float32")


@pytest.mark.parametrize(("names", "major", "expected"), [("0", 8, "bfloat16"), ("1", 7, "float32")])
def test_of_unlike_gpus_cuda_says_which_this_process_has(
    names: str, major: int, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tool counts them by their places, CUDA by how fast they are."""
    with_gpus(tmp_path, monkeypatch, names, "7.5\\n8.6\\n")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$CUDA_VISIBLE_DEVICES" = {names} ] && echo {major}\n')
    python.chmod(0o755)
    monkeypatch.setattr(gpus.sys, "executable", str(python))
    gpus._smallest.cache_clear()
    assert ModelOptions().precision == expected


def test_a_gpu_of_another_maker_computes_in_bfloat16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(tmp_path, monkeypatch, "0", "")
    (tmp_path / "nvidia-smi").unlink()
    assert ModelOptions().precision == "bfloat16"


def test_what_is_said_counts_and_a_cluster_decides_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with_cpu(monkeypatch)
    assert ModelOptions(dtype="float16").precision == "float16"
    assert ModelOptions(cluster="ray").precision == "bfloat16"  # of nodes that this machine does not know
    assert engine_and_dtype("http", ModelOptions(url=("http://x",))) == {"dtype": "server", "engine": "http"}


@pytest.mark.parametrize(("capability", "expected"), [({"amx_bf16": True}, "bfloat16"), ({}, "float32")])
def test_records_say_what_it_became(
    capability: dict[str, object],
    expected: str,
    source: Path,
    datasets_by_family: dict[str, Path],
    teachers: dict[str, Path],
    students: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_cpu(monkeypatch, **capability)
    generate(generate_config(tmp_path / "d", "teacher", teachers["llama"], prompts=str(source), limit=2, dtype="auto"))
    made = Dataset.open(tmp_path / "d").responses("teacher", 0).require_provenance()
    assert made["dtype"] == made["config"]["dtype"] == expected
    where = (datasets_by_family["llama"], students["llama"], tmp_path / "out")
    train(train_config(*where, dtype="auto", max_steps=1))
    assert read_json(tmp_path / "out" / "training.json")["settings"]["dtype"] == expected
    train(train_config(*where, dtype=expected, max_steps=1))  # the same run, which is done
