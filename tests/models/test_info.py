from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
from helpers.tiny import build_tokenizer

from dpkd_offline.common.errors import UnavailableError
from dpkd_offline.models.info import ModelInfo, tokenizer_fingerprint


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
    with pytest.raises(UnavailableError, match="no such folder"):
        _ = pickle.loads(sent).tokenizer


def test_loading_names_the_model(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="nothing': no such folder"):
        ModelInfo.load(str(tmp_path / "nothing"))


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


def test_rows_of_the_embedding_are_those_of_the_weights(teachers: dict[str, Path], tmp_path: Path) -> None:
    for family, folder in teachers.items():
        copy = Path(shutil.copytree(folder, tmp_path / family))
        config = json.loads((copy / "config.json").read_text())
        rows = config["vocab_size"]
        (copy / "config.json").write_text(json.dumps({**config, "vocab_size": rows + 8}))
        assert (ModelInfo(str(copy)).embedding_rows, ModelInfo(str(copy)).vocab_size) == (rows, rows + 8), family
        (copy / "model.safetensors").write_bytes(b"half")
        with pytest.raises(UnavailableError, match=r"model.safetensors cannot be read"):
            _ = ModelInfo(str(copy)).embedding_rows
        (copy / "model.safetensors").unlink()
        assert ModelInfo(str(copy)).embedding_rows == rows + 8
