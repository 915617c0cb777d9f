"""Tests that need a GPU; `just gpu` runs them. With GPU_TESTS_ON=cpu those that can run on a CPU, to try the tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from helpers.tiny import build_model, make_dataset


@pytest.fixture(scope="session")
def device(tmp_path_factory: pytest.TempPathFactory) -> torch.device:
    return torch.device(os.environ.get("GPU_TESTS_ON", "cuda"))


@pytest.fixture(scope="module", autouse=True)
def _on_gpu(gpus: None, device: torch.device) -> None:
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU")


@pytest.fixture
def only_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("of a GPU alone")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A teacher and a student."""
    root = tmp_path_factory.mktemp("models")
    return build_model("llama", root / "teacher"), build_model("llama", root / "student", seed=1)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, source: Path, models: tuple[Path, Path]) -> Path:
    """Made on the GPU, with the teacher's likeliest tokens."""
    return make_dataset(tmp_path_factory.mktemp("pairs") / "dataset", source, *models, top_k=4)
