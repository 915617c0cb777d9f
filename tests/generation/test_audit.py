"""The audit has no part in what it audits, and ends in one line where there is too little memory."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from helpers.fake_server import FakeServer, serving
from helpers.tiny import score_config

import dpkd_offline.generation.audit
import dpkd_offline.models.head
import dpkd_offline.models.logprobs
import dpkd_offline.models.shared_prompt
import dpkd_offline.models.trial
from dpkd_offline.common.errors import UnavailableError, UsageError
from dpkd_offline.curation.inspect import inspect, inspection_table
from dpkd_offline.generation.results import ScoreResult
from dpkd_offline.generation.score_teacher import score_teacher
from dpkd_offline.models.info import ModelInfo


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


def test_a_second_engine_is_compared_with_and_named(audited, tmp_path: Path, teachers: dict[str, Path]) -> None:  # type: ignore[no-untyped-def]
    """The stored numbers are float32's, so that the gap is that of bfloat16, and of a server that makes up its own."""
    folder, teacher = tmp_path / "ds", teachers["llama"]
    near = audited().audit
    low = score_teacher(score_config(folder, teacher, audit=3, audit_engine="transformers", audit_dtype="bfloat16"))
    assert low.audit["against"]["engine"] == "transformers" and low.audit["against"]["dtype"] == "bfloat16"
    assert low.audit["tokens"] == near["tokens"] and 1e-3 < low.audit["gap_abs_mean"] < 0.1
    words = "audit: 3 rows against transformers bfloat16"
    assert words in inspection_table(inspect(folder))
    assert "scored again with `transformers` in `bfloat16`" in (folder / "README.md").read_text()
    with serving(FakeServer(ModelInfo(str(teacher)).tokenizer)) as (url,):
        served = score_teacher(score_config(folder, teacher, audit=3, audit_url=url, max_length=200)).audit
    assert (served["against"]["engine"], served["against"]["dtype"]) == ("http", "server")
    assert served["against"]["versions"]["vllm"] == "0.32.0" and served["gap_abs_mean"] > 0.1
    assert url not in "".join(path.read_text() for path in folder.rglob("*.json"))
    for changes, message in (
        ({"audit_engine": "transformers"}, "--audit-engine transformers in float32 is what scores"),
        ({"audit_url": "http://x", "engine": "http", "url": "http://x"}, "--audit-url names a server of --url"),
    ):
        with pytest.raises(UsageError, match=message):
            score_teacher(score_config(folder, teacher, audit=3, **changes))
    for changes, message in (
        ({"audit": 0, "audit_engine": "vllm"}, "audit_engine says what an audit compares with; give --audit N"),
        ({"audit_dtype": "bfloat16"}, "audit_dtype is that of --audit-engine"),
        ({"audit_engine": "vllm", "audit_url": "http://x"}, "give one of them"),
    ):
        with pytest.raises(ValueError, match=message):
            score_config(folder, teacher, **{"audit": 3, **changes})
