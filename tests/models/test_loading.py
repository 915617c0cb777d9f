from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from dpkd_offline.common.errors import UnavailableError
from dpkd_offline.models.info import ModelInfo, tokenizer_fingerprint
from dpkd_offline.models.loading import load_model, save_student


def test_a_saved_student_loads_to_the_same_weights(students: dict[str, Path], tmp_path: Path) -> None:
    for family, folder in students.items():
        model, tokenizer = load_model(str(folder), "float32"), ModelInfo(str(folder)).tokenizer
        save_student(model, tokenizer, tmp_path / family, "# card\n")
        again = load_model(str(tmp_path / family), "float32")
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, again.state_dict()[name]), name
        assert ModelInfo(str(tmp_path / family)).tokenizer_fingerprint == tokenizer_fingerprint(tokenizer)
        names = {path.name for path in (tmp_path / family).iterdir()}
        assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
        assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl")) or name.startswith(".")]
        assert ("chat_template.jinja" in names) == (family == "llama")
        assert len({path.stat().st_mode for path in (tmp_path / family).iterdir()}) == 1  # whoever reads one reads all


def test_what_a_killed_save_left_is_swept(students: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / ".saving-1").mkdir()
    (tmp_path / ".saving-1" / "model.safetensors").write_bytes(b"half")
    model, tokenizer = load_model(str(students["opt"]), "float32"), ModelInfo(str(students["opt"])).tokenizer
    save_student(model, tokenizer, tmp_path, "card")
    assert not (tmp_path / ".saving-1").exists()


def test_models_that_are_not_there_or_not_models(tmp_path: Path, teachers: dict[str, Path]) -> None:
    with pytest.raises(UnavailableError, match="cannot load its tokenizer"):
        ModelInfo.load(str(tmp_path / "nothing"))
    with pytest.raises(UnavailableError, match="cannot load it"):
        load_model(str(tmp_path), "float32")
    broken = tmp_path / "broken"
    shutil.copytree(teachers["gpt2"], broken)
    (broken / "model.safetensors").write_bytes(b"\x00" * 64)
    with pytest.raises(UnavailableError, match=r"broken.*cannot load it"):
        load_model(str(broken), "float32")
