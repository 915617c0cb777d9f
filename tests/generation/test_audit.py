"""The audit has no part in what it audits, and ends in one line where there is too little memory."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from helpers.tiny import score_config

import dpkd_offline.generation.audit
import dpkd_offline.models.head
import dpkd_offline.models.logprobs
import dpkd_offline.models.shared_prompt
import dpkd_offline.models.trial
from dpkd_offline.common.errors import UnavailableError
from dpkd_offline.generation.results import ScoreResult
from dpkd_offline.generation.score_teacher import score_teacher


@pytest.fixture
def audited(tmp_path: Path, datasets_by_family: dict[str, Path], teachers: dict[str, Path]):  # type: ignore[no-untyped-def]
    """Audits a dataset that is scored."""
    folder = tmp_path / "ds"
    shutil.copytree(datasets_by_family["llama"], folder)

    def audit() -> ScoreResult:
        return score_teacher(score_config(folder, teachers["llama"], audit=3))

    return audit


def test_an_audit_uses_nothing_of_what_it_audits(audited, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    def fail(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("of the path that is audited")

    for module in ("head", "logprobs", "shared_prompt", "trial", "batch"):
        home = getattr(dpkd_offline.models, module)
        for name, value in vars(home).items():
            if callable(value) and getattr(value, "__module__", "") == home.__name__ and not isinstance(value, type):
                monkeypatch.setattr(home, name, fail)
    monkeypatch.setattr("dpkd_offline.engines.transformers.TransformersEngine", fail)
    assert 0 < audited().audit["gap_abs_max"] < 1e-4


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_too_little_memory_for_an_audit_is_one_line(  # type: ignore[no-untyped-def]
    error: Exception, audited, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: object) -> None:
        raise error

    monkeypatch.setattr(dpkd_offline.generation.audit, "load_model", full)
    with pytest.raises(UnavailableError, match="--audit: in float32 the teacher does not fit into memory"):
        audited()


def test_a_teacher_that_does_not_fit_on_the_gpu_is_audited_on_the_cpu(  # type: ignore[no-untyped-def]
    audited, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load = dpkd_offline.generation.audit.load_model

    def load_where_there_is_room(name: str, dtype: str, trust: bool, device: torch.device) -> object:
        if device.type == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return load(name, dtype, trust, device)

    monkeypatch.setattr(dpkd_offline.generation.audit, "load_model", load_where_there_is_room)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert audited().audit["gap_abs_max"] < 1e-4
    assert "audit: in float32 the teacher does not fit on the GPU; it goes on on the CPU" in capsys.readouterr().err
