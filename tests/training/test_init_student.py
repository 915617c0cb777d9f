from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers.tiny import FAMILIES, files_of
from transformers import AutoModelForCausalLM, BloomConfig, Qwen3Config

from dpkd_offline.common.errors import DataError, MismatchError, StorageError, UsageError
from dpkd_offline.config.train import InitStudentConfig
from dpkd_offline.models.info import ModelInfo
from dpkd_offline.models.loading import load_model, parameter_count
from dpkd_offline.training.init_student import LAYERS, evenly_spaced, init_student, shallower


def test_layers_are_evenly_spaced_with_both_ends() -> None:
    assert evenly_spaced(30, 2) == [0, 29]
    assert evenly_spaced(12, 4) == [0, 4, 7, 11]
    assert evenly_spaced(4, 1) == [0]
    for layers in range(2, 30):
        kept = evenly_spaced(30, layers)
        assert (kept[0], kept[-1], len(set(kept))) == (0, 29, layers)
        assert max(b - a for a, b in pairwise(kept)) <= 29 // (layers - 1) + 1
    for wrong in (0, 30, 31):
        with pytest.raises(UsageError, match="the teacher has 30"):
            evenly_spaced(30, wrong)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_keeps_the_teachers_weights(family: str, teachers: dict[str, Path], tmp_path: Path) -> None:
    config = InitStudentConfig(teacher=str(teachers[family]), output=tmp_path / "student", layers=2)
    folder = init_student(config)
    assert (str(folder), folder.layers) == (str(tmp_path / "student"), 2)
    teacher, student = load_model(str(teachers[family]), "float32"), load_model(str(folder), "float32")
    assert student.config.num_hidden_layers == 2
    assert folder.parameters == parameter_count(student)
    stack, kept = teacher.get_submodule(LAYERS[family]), student.get_submodule(LAYERS[family])
    for mine, theirs in zip(kept, (stack[0], stack[3]), strict=True):
        for name, tensor in theirs.state_dict().items():
            assert torch.equal(mine.state_dict()[name], tensor), name
    assert torch.equal(student.get_input_embeddings().weight, teacher.get_input_embeddings().weight)
    assert torch.equal(student.get_output_embeddings().weight, teacher.get_output_embeddings().weight)
    fingerprints = {ModelInfo(str(place)).tokenizer_fingerprint for place in (folder, teachers[family])}
    assert len(fingerprints) == 1
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        generated = student.generate(ids, max_new_tokens=3, do_sample=False)  # the cache numbers layers anew
        assert torch.isfinite(student(generated).logits).all()
    assert init_student(config) == folder
    with pytest.raises(MismatchError, match="holds an initial student of another command"):
        init_student(config.model_copy(update={"layers": 3}))


def test_all_layers_would_be_the_teacher_itself(teachers: dict[str, Path]) -> None:
    """The mapping of weights is right: a copy that loses one layer equals the teacher without it."""
    teacher = load_model(str(teachers["llama"]), "float32")
    student = shallower(teacher, 3)  # of 4: layers 0, 2 (1.5 rounds to even), 3
    ids = torch.tensor([[5, 6, 7, 8]])
    del teacher.model.layers[1]
    for n, layer in enumerate(teacher.model.layers):
        layer.self_attn.layer_idx = n
    teacher.config.num_hidden_layers = 3
    with torch.no_grad():
        torch.testing.assert_close(student(ids).logits, teacher(ids).logits)


def test_lists_with_an_entry_a_layer_are_cut_too() -> None:
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=1,
    )
    teacher = AutoModelForCausalLM.from_config(config)
    student = shallower(teacher, 2)
    assert student.config.layer_types == [config.layer_types[0], config.layer_types[3]]


def test_unknown_architectures_are_named() -> None:
    config = BloomConfig(vocab_size=64, hidden_size=32, n_layer=4, n_head=4)
    with pytest.raises(UsageError, match="the teacher is a bloom"):
        shallower(AutoModelForCausalLM.from_config(config), 2)


def test_what_a_full_disk_left_goes_on(
    teachers: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = InitStudentConfig(teacher=str(teachers["llama"]), output=tmp_path / "calm" / "student", layers=2)
    init_student(config)
    disturbed = config.model_copy(update={"output": tmp_path / "disturbed" / "student"})

    def full(*_: object) -> None:
        raise StorageError("the disk is full")

    with monkeypatch.context() as patch, pytest.raises(StorageError):
        patch.setattr("dpkd_offline.training.init_student.write_json", full)
        init_student(disturbed.model_copy(update={"layers": 3}))
    assert (disturbed.output / "config.json").exists()
    (disturbed.output / "adapter_config.json").write_text("{}")  # of whatever stood there
    init_student(disturbed)  # of the other nothing counted yet
    assert files_of(disturbed.output) == files_of(config.output)


def test_an_initial_student_is_never_written_over_something_else(teachers: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(teachers["gpt2"], tmp_path / "model")
    before = files_of(tmp_path)
    config = InitStudentConfig(teacher=str(teachers["llama"]), output=tmp_path / "model", layers=2)
    with pytest.raises(UsageError, match=r"model: holds 'config\.json', and nothing says that it is"):
        init_student(config)
    assert files_of(tmp_path) == before
    config = config.model_copy(update={"output": tmp_path / "student"})
    init_student(config)
    (config.output / "init_student.json").write_text('{"made": 3}')
    with pytest.raises(DataError, match=r"init_student\.json: key 'made' is missing or wrong"):
        init_student(config)
