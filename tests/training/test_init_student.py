from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import train_config
from helpers.tiny import FAMILIES, build_tokenizer, files_of
from transformers import AutoConfig, AutoModelForCausalLM

from dpkd_offline.common.errors import DataError, MismatchError, StorageError, UnavailableError, UsageError
from dpkd_offline.config.train import InitStudentConfig
from dpkd_offline.models.info import ModelInfo
from dpkd_offline.models.loading import load_model, parameter_count, save_student
from dpkd_offline.training.distributed import Processes
from dpkd_offline.training.init_student import init_student
from dpkd_offline.training.shallower import evenly_spaced, layer_stack, shallower
from dpkd_offline.training.student import load_student


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
    stack, kept = layer_stack(teacher)[1], layer_stack(student)[1]
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


SHAPE = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ROUTED = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 2,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "gpt_neox": {},
    "phi": {},
    "gpt_neo": {
        "attention_types": [[["global"], 3], [["local"], 1]], "num_layers": 4, "num_heads": 4, "hidden_size": 32,
        "window_size": 5, "n_layer": 4,
    },
    "cohere": {},
    "bloom": {"n_layer": 4, "n_head": 4},
    "mixtral": MOE,
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    "gemma2": {"head_dim": 8, "sliding_window": 5},
    "gemma3_text": {"head_dim": 8, "sliding_window": 5, "sliding_window_pattern": 2},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0]},
    "cohere2": {"sliding_window": 5, "sliding_window_pattern": 3},
    "lfm2": {"full_attn_idxs": [1, 3], "block_auto_adjust_ff_dim": False},
    "llama4_text": {
        "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "attention_chunk_size": 5,
        "intermediate_size_mlp": 48, "no_rope_layers": [1, 0, 1, 0], "interleave_moe_layer_step": 2,
    },
    "glm4_moe": {**ROUTED, "head_dim": 8},
    "deepseek_v3": {
        **ROUTED, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
        "n_shared_experts": 1, "num_key_value_heads": 4,
    },
}  # fmt: skip


def random_model(kind: str, **settings: Any) -> Any:
    """With buffers that are stored not at zero, where models are made with them."""
    shape = {} if "n_layer" in settings else SHAPE
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**shape, "vocab_size": 96, **settings}))
    stored = model.state_dict()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4.0)
        for name, buffer in model.named_buffers():
            if name in stored and buffer.is_floating_point():
                buffer.copy_(torch.rand_like(buffer))
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_each_layer_is_one_of_the_teachers(kind: str) -> None:
    """The student's hidden states are those of the teacher's layers called one after the other, each as the teacher
    calls it: with its mask and its positions, on tokens beyond every window."""
    teacher = random_model(kind, **KINDS[kind])
    student = shallower(teacher, 3)
    place, stack = layer_stack(teacher)
    calls: list[tuple[Any, Any, Any]] = []
    hooks = [
        layer.register_forward_hook(lambda m, a, k, out: calls.append((a, k, out)), with_kwargs=True) for layer in stack
    ]
    ids = torch.randint(5, 90, (1, 20))
    with torch.no_grad():
        teacher(input_ids=ids, use_cache=False)
        for hook in hooks:
            hook.remove()
        hidden = calls[0][0][0] if calls[0][0] else calls[0][1]["hidden_states"]
        for layer in evenly_spaced(4, 3):
            args, options, _ = calls[layer]
            options.pop("hidden_states", None)
            output = stack[layer](hidden, *args[1:], **options)
            hidden = output[0] if isinstance(output, tuple) else output
        outputs: list[Any] = []
        layer_stack(student)[1][-1].register_forward_hook(lambda m, a, out: outputs.append(out))
        student(input_ids=ids, use_cache=False)
    last = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
    torch.testing.assert_close(last, hidden)
    kept = dict(zip(evenly_spaced(4, 3), range(3), strict=True))
    for name, tensor in teacher.state_dict().items():
        rest = name.removeprefix(f"{place}.").split(".", 1)
        if not name.startswith(f"{place}."):
            assert torch.equal(student.state_dict()[name], tensor), name
        elif int(rest[0]) in kept:
            mine = student.state_dict()[f"{place}.{kept[int(rest[0])]}.{rest[1]}"]
            assert torch.equal(mine, tensor), name
            assert mine.dtype == tensor.dtype, name


def test_what_a_config_says_of_layers_is_cut_with_them() -> None:
    qwen = random_model("qwen2", **KINDS["qwen2"])
    config = shallower(qwen, 2).config
    assert config.layer_types == [qwen.config.layer_types[0], qwen.config.layer_types[3]]
    assert (config.num_hidden_layers, config.max_window_layers, config.eos_token_id) == (2, 1, 2)
    assert shallower(random_model("smollm3", **KINDS["smollm3"]), 3).config.no_rope_layers == [1, 1, 0]
    moe = shallower(random_model("glm4_moe", **KINDS["glm4_moe"]), 3)
    assert [type(layer.mlp).__name__ for layer in moe.model.layers] == ["Glm4MoeMLP", "Glm4MoeMoE", "Glm4MoeMoE"]
    llama4 = random_model("llama4_text", **KINDS["llama4_text"], eos_token_id=[2, 3, 5, 7])
    config = shallower(llama4, 2).config
    assert (config.moe_layers, config.no_rope_layers, config.eos_token_id) == ([1], [1, 0], [2, 3, 5, 7])


@pytest.mark.parametrize(
    ("kind", "settings", "line"),
    [
        (
            "gpt2",
            {"scale_attn_by_inverse_layer_idx": True, "n_layer": 4, "n_head": 4, "n_embd": 32},
            "layer 1 would not",
        ),
        (
            "jamba",
            {**MOE, "attn_layer_period": 4, "attn_layer_offset": 3},
            "of other kinds",
        ),
    ],
)
def test_layers_that_would_change_are_refused(kind: str, settings: dict[str, Any], line: str) -> None:
    with pytest.raises((UsageError, UnavailableError), match=line) as refusal:
        shallower(random_model(kind, **settings), 2)
    assert "\n" not in str(refusal.value)


def test_unknown_stacks_of_layers_are_refused() -> None:
    teacher = random_model("qwen2")
    teacher.model.layers.append(teacher.model.layers[0])
    with pytest.raises(UsageError, match="does not know the layers of a qwen2"):
        shallower(teacher, 2)


def test_a_stored_buffer_is_saved_with_the_student(tmp_path: Path) -> None:
    """Of an initial student, and of a trained one."""
    teacher = random_model("glm4_moe", **KINDS["glm4_moe"])
    teacher.save_pretrained(tmp_path / "teacher")
    build_tokenizer(chat=False).save_pretrained(tmp_path / "teacher")
    config = json.loads((tmp_path / "teacher" / "config.json").read_text())
    assert config["first_k_dense_replace"] == 2
    init_student(InitStudentConfig(teacher=str(tmp_path / "teacher"), output=tmp_path / "student", layers=3))
    processes = Processes()
    training = train_config(tmp_path, tmp_path / "student", tmp_path / "out", dtype="bfloat16")
    model, weights = load_student(training, processes).to_save(training, processes)
    save_student(model, ModelInfo(str(tmp_path / "teacher")).tokenizer, tmp_path / "trained", "card", weights)
    biases = {k: v for k, v in teacher.state_dict().items() if "e_score_correction_bias" in k}
    assert len(biases) == 2
    for place in ("student", "trained"):
        states = load_model(str(tmp_path / place), "float32").state_dict()
        saved = [v for k, v in states.items() if "e_score_correction_bias" in k]
        assert len(saved) == 2
        assert all(torch.equal(a, b) for a, b in zip(saved, biases.values(), strict=True)), place


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
