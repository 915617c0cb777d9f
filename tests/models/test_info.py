from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest

from dpkd_offline.common.errors import UnavailableError
from dpkd_offline.models.info import ModelInfo


def test_facts_are_read_once_and_only_when_asked_for(teachers: dict[str, Path], tmp_path: Path) -> None:
    ModelInfo(str(tmp_path / "nowhere"))
    folder = Path(shutil.copytree(teachers["llama"], tmp_path / "model"))
    model = ModelInfo.load(str(folder))
    assert model.tokenizer is model.tokenizer
    (folder / "config.json").write_text("not JSON")
    assert model.identity["revision"].startswith("sha256:")
    with pytest.raises(UnavailableError, match="cannot read its config"):
        _ = model.vocab_size
    shutil.copyfile(teachers["llama"] / "config.json", folder / "config.json")
    assert (model.vocab_size, model.context_length, model.eos_ids) == (len(model.tokenizer), 256, [1])
    shutil.rmtree(folder)
    assert (model.vocab_size, model.eos_ids) == (len(model.tokenizer), [1])


def test_a_pickled_one_reads_the_files_of_its_machine(teachers: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(teachers["llama"], tmp_path / "model"))
    model = ModelInfo.load(str(folder), trust_remote_code=True)
    sent = pickle.dumps(model)
    assert len(sent) < 1000
    arrived = pickle.loads(sent)
    assert (arrived, arrived.tokenizer_fingerprint) == (model, model.tokenizer_fingerprint)
    shutil.rmtree(folder)
    with pytest.raises(UnavailableError, match="cannot load its tokenizer"):
        _ = pickle.loads(sent).tokenizer


def test_loading_names_the_model(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="nothing': cannot load its tokenizer"):
        ModelInfo.load(str(tmp_path / "nothing"))
