from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.tiny import build_tokenizer

from dpkd_offline.common.errors import MismatchError, UnavailableError
from dpkd_offline.models.info import ModelInfo, tokenizer_fingerprint
from dpkd_offline.models.loading import load_model, save_student
from dpkd_offline.training.checkpoint import Position, load_state, save_state


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


def test_state_round_trips_and_the_newest_wins(tmp_path: Path) -> None:
    tensors = {"master/a": torch.randn(3, 2), "step/a": torch.tensor(4.0)}
    save_state(tmp_path, Position(1), "run", {k: v * 0 for k, v in tensors.items()})
    save_state(tmp_path, Position(2), "run", tensors)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000002"]
    position, loaded = load_state(tmp_path, "run") or (None, {})
    assert position == Position(2)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_a_half_written_checkpoint_is_not_there(tmp_path: Path) -> None:
    save_state(tmp_path, Position(1), "run", {"a": torch.ones(2)})
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".step-00000002-77")
    (tmp_path / ".step-00000002-77" / "state.safetensors").write_bytes(b"half")
    state = load_state(tmp_path, "run")
    assert state is not None and state[0] == Position(1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_the_state_of_another_run_is_refused(tmp_path: Path) -> None:
    assert load_state(tmp_path, "run") is None
    save_state(tmp_path, Position(1), "run", {"a": torch.ones(2)})
    with pytest.raises(MismatchError, match="left by a run with another config"):
        load_state(tmp_path, "other")


def test_tokenizer_fingerprints(teachers: dict[str, Path], students: dict[str, Path]) -> None:
    prints = {f: ModelInfo(str(teachers[f])).tokenizer_fingerprint for f in teachers}
    assert prints["llama"] == ModelInfo(str(students["llama"])).tokenizer_fingerprint
    other = build_tokenizer(chat=True)
    other.add_tokens(["<new>"])
    assert tokenizer_fingerprint(other) != prints["llama"]
    other = build_tokenizer(chat=True)
    other.eos_token = "<pad>"
    assert tokenizer_fingerprint(other) != prints["llama"]


def test_the_identity_of_a_model_is_its_weights_not_its_place(teachers: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(teachers["opt"], tmp_path / "copy")
    original, copy = ModelInfo(str(teachers["opt"])).identity, ModelInfo(str(tmp_path / "copy")).identity
    assert original["revision"] == copy["revision"]
    assert (original["name"], copy["name"]) == ("opt", "copy")
    weights = tmp_path / "copy" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert ModelInfo(str(tmp_path / "copy")).identity["revision"] != original["revision"]


def test_what_ends_a_response(teachers: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(teachers["llama"], folder)
    assert ModelInfo(str(folder)).eos_ids == [1]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [4, 7]}))
    assert ModelInfo(str(folder)).eos_ids == [1, 4, 7]


def test_context_lengths(teachers: dict[str, Path]) -> None:
    assert {ModelInfo(str(folder)).context_length for folder in teachers.values()} == {256}


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
