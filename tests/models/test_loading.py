from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.runs import train_config
from helpers.tiny import CHAT_TEMPLATE, SMALL, build_tokenizer, generate_config
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen3Config

from dpkd_offline.common.errors import UnavailableError
from dpkd_offline.config.evaluate import EvaluateConfig
from dpkd_offline.config.train import InitStudentConfig
from dpkd_offline.evaluation.evaluate import evaluate
from dpkd_offline.generation.generate import generate
from dpkd_offline.models.info import ModelInfo, tokenizer_fingerprint
from dpkd_offline.models.loading import load_model, rehearse_saving, save_student, saveable
from dpkd_offline.models.weights import check_weights
from dpkd_offline.training.distributed import Processes
from dpkd_offline.training.init_student import init_student
from dpkd_offline.training.student import load_student


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


def test_what_a_save_before_left_in_other_parts_is_gone(students: dict[str, Path], tmp_path: Path) -> None:
    """An engine would read all .safetensors files of the folder."""
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"old")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    model, tokenizer = load_model(str(students["opt"]), "float32"), ModelInfo(str(students["opt"])).tokenizer
    save_student(model, tokenizer, tmp_path, "card")
    assert [path.name for path in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]


def test_all_chat_templates_are_saved_and_replaced(students: dict[str, Path], tmp_path: Path) -> None:
    model = load_model(str(students["llama"]), "float32")
    for second in ("two", "three"):
        tokenizer = build_tokenizer(chat=True)
        tokenizer.chat_template = {"default": CHAT_TEMPLATE, "tools": second}
        save_student(model, tokenizer, tmp_path, "card")
        assert ModelInfo(str(tmp_path)).tokenizer.chat_template == {"default": CHAT_TEMPLATE, "tools": second}


def _set_json(file: str, **values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def _write(file: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_text(text) and None


def _weights(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        save_file(change(load_file(path)), path, metadata={"format": "pt"})

    return apply


def _prefix(prefix: str) -> Callable[[Path], None]:
    return _weights(lambda weights: {prefix + name: tensor for name, tensor in weights.items()})


def _halve(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _halve_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    data = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(data[: len(data) // 2])


def _drop_shard(folder: Path) -> None:
    """Two files and an index, of which one file is not there."""
    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    places = {name: f"model-0000{1 + n % 2}-of-00002.safetensors" for n, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def _adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "the-base"}))


def _poison(key: str, value: float) -> Callable[[Path], None]:
    def change(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        weights[key].view(-1)[3] = value
        return weights

    return _weights(change)


def _quantised(**settings: object) -> Callable[[Path], None]:
    return _set_json("config.json", quantization_config=settings)


UP = "model.layers.2.mlp.up_proj.weight"
# What is done to a model, and what is said of it.
SMALL_FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "config is a list": (_write("config.json", "[]"), "config.json:1:1: expected a JSON object"),
    "config is a text": (_write("config.json", '"x"'), "config.json:1:1: expected a JSON object"),
    "config is cut": (_write("config.json", '{"model_type"'), "config.json:1:14: invalid JSON"),
    "config of an unknown kind": (_set_json("config.json", model_type="nemo"), "nemo"),
    "config with text for a number": (_set_json("config.json", hidden_size="64x"), "hidden_size"),
    "tokenizer config is a list": (_write("tokenizer_config.json", "[]"), "tokenizer_config.json:1:1: expected a JSON"),
    "tokenizer is cut": (_write("tokenizer.json", '{"version"'), "cannot load its tokenizer"),
    "tokenizer is a list": (_write("tokenizer.json", "[]"), "cannot load its tokenizer"),
    "generation is cut": (_write("generation_config.json", '{"eos_token_id": [1, 2'), "generation_config.json:1:23"),
    "generation is a list": (_write("generation_config.json", "[]"), "generation_config.json:1:1"),
    "EOS is a text": (_set_json("generation_config.json", eos_token_id="x"), "eos_token_id is 'x'"),
    "EOS is a list of texts": (
        _set_json("generation_config.json", eos_token_id=[1, "x"]),
        r"eos_token_id is \[1, 'x'\]",
    ),
    "an adapter": (_adapter, "an adapter of the-base; merge it"),
}
STORED: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (_weights(lambda w: {k: v for k, v in w.items() if k != UP}), f"missing {UP}"),
    "all missing": (_weights(lambda w: {"x": torch.zeros(1)}), r"missing lm_head.weight, .* and \d+ more; not of this"),
    "unexpected": (_weights(lambda w: {**w, "score": torch.zeros(1, 64)}), "not of this architecture score$"),
    "behind _orig_mod": (_prefix("_orig_mod."), "take the prefix '_orig_mod.' off"),
    "behind module": (_prefix("module."), "take the prefix 'module.' off"),
    "of another shape": (_weights(lambda w: {**w, UP: w[UP][:32].clone()}), rf"{UP}, stored as \[32, 64\]"),
    "another vocabulary": (_set_json("config.json", vocab_size=408), r"as \[400, 64\], by the config \[408, 64\]"),
    "fewer layers": (_set_json("config.json", num_hidden_layers=3), r"not of this architecture model.layers.3"),
    "half a file": (_halve, "model.safetensors: .*header"),
    "half a pickle": (_halve_pickle, "cannot load it"),
    "a file that is not there": (_drop_shard, "cannot load it: .*model-00002-of-00002.safetensors"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "cannot load it"),
    "not a number": (_poison(UP, float("nan")), f"weights that are not finite numbers: {UP}$"),
    "infinite": (_poison("model.norm.weight", float("inf")), "not finite numbers: model.norm.weight$"),
}  # fmt: skip
QUANTISED: dict[str, tuple[Callable[[Path], None], str]] = {
    "gptq": (_quantised(quant_method="gptq", bits=4, group_size=32), "pip install optimum"),
    "awq": (_quantised(quant_method="awq", bits=4, group_size=32, version="gemm"), "pip install gptqmodel"),
    "bitsandbytes": (_quantised(load_in_4bit=True), "bitsandbytes"),
    "unknown": (_quantised(quant_method="exl3", bits=4), "quantised in exl3, which transformers does not know"),
    "unnamed": (_quantised(bits=4), "quantised in an unknown format"),
    "a text": (_set_json("config.json", quantization_config="x"), "quantised in an unknown format"),
}


@pytest.mark.parametrize("case", SMALL_FILES)
def test_damaged_small_files_are_refused_by_name(case: str, teachers: dict[str, Path], tmp_path: Path) -> None:
    damage, line = SMALL_FILES[case]
    damage(folder := Path(shutil.copytree(teachers["llama"], tmp_path / "model")))
    calls: list[Callable[[], object]] = [lambda: _all_facts(folder), lambda: rehearse_saving(ModelInfo(str(folder)))]
    if "tokenizer" not in case:
        calls.append(lambda: load_model(str(folder), "float32"))
    for call in calls:
        _check_refusal(call, folder, line)


@pytest.mark.parametrize("case", STORED)
def test_weights_that_are_not_the_config_s_are_refused_by_name(
    case: str, teachers: dict[str, Path], tmp_path: Path
) -> None:
    damage, line = STORED[case]
    damage(folder := Path(shutil.copytree(teachers["llama"], tmp_path / "model")))
    _check_refusal(lambda: load_model(str(folder), "float32"), folder, line)
    _check_refusal(lambda: check_weights(ModelInfo(str(folder))), folder, line)


@pytest.mark.parametrize("case", QUANTISED)
def test_quantised_weights_are_not_trained_and_not_misread(
    case: str, teachers: dict[str, Path], tmp_path: Path
) -> None:
    damage, line = QUANTISED[case]
    damage(folder := Path(shutil.copytree(teachers["llama"], tmp_path / "model")))
    _check_refusal(lambda: load_model(str(folder), "float32"), folder, line)
    _check_refusal(lambda: rehearse_saving(ModelInfo(str(folder))), folder, "weights cannot be trained; take the model")
    check_weights(ModelInfo(str(folder)))  # names and shapes of a format are its engine's to know


def test_every_command_refuses_a_model_that_is_not_whole(
    teachers: dict[str, Path], source: Path, tmp_path: Path
) -> None:
    """Before anything is sampled or written."""
    output, small = tmp_path / "output", {"engine": "transformers", "dtype": "float32", "max_length": 256}
    for case in ("missing", "behind _orig_mod", "not a number", "half a pickle"):
        damage, line = STORED[case]
        damage(folder := Path(shutil.copytree(teachers["llama"], tmp_path / case)))
        sampling = generate_config(output, "teacher", folder, prompts=str(source))
        evaluation = EvaluateConfig.model_validate(
            {**small, "model": str(folder), "prompts": str(source), "output": output, "max_new_tokens": 4}
        )
        cut = InitStudentConfig(teacher=str(folder), output=output, layers=2)
        training = train_config(tmp_path, folder, output)
        _check_refusal(partial(generate, sampling), folder, line)
        _check_refusal(partial(evaluate, evaluation), folder, line)
        _check_refusal(partial(load_student, training, Processes()), folder, line)
        _check_refusal(partial(init_student, cut), folder, line)
        assert not output.exists() or not any(output.rglob("*.*")), case


def _all_facts(folder: Path) -> object:
    model = ModelInfo.load(str(folder))
    return model.eos_ids, model.vocab_size


def _check_refusal(call: Callable[[], object], folder: Path, line: str) -> None:
    with pytest.raises(UnavailableError, match=line) as refusal:
        call()
    assert str(refusal.value).startswith(f"model '{folder}': ")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("{}/nothing", "no such folder$"),
        ("./nothing", "no such folder$"),
        ("~/models/nothing", "no such folder$"),
        ("runs/one/student", "no such folder$"),
        ("models/smal", "no such folder$"),  # beside others
        ("a model", "no such folder, and no name that the Hub can have"),
        ("{}/models/small/config.json", "a file; give the folder of the model"),
        ("nobody/nothing", "no such folder, and the Hub does not answer: .*offline mode"),
    ],
)
def test_a_name_without_a_model_is_refused_at_once(
    name: str, line: str, teachers: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(teachers["gpt2"], tmp_path / "models" / "small")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.utils.hub.cached_file", None)  # no library looks for its files
    for call in (ModelInfo.load, lambda model: load_model(model, "float32")):
        with pytest.raises(UnavailableError, match=line):
            call(name.format(tmp_path))


def test_tied_weights_may_be_left_out_or_stored(tmp_path: Path) -> None:
    config = Qwen3Config(**SMALL, num_key_value_heads=1, intermediate_size=64, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(config)
    build_tokenizer(chat=False).save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in weights
    for _ in range(2):
        assert torch.equal(load_model(str(tmp_path), "float32").lm_head.weight, model.lm_head.weight)
        check_weights(ModelInfo(str(tmp_path)))
        save_file(
            {**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()},
            tmp_path / "model.safetensors",
            metadata={"format": "pt"},
        )


def test_contradicting_sampling_settings_go_and_the_rest_stays(
    teachers: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(teachers["llama"], tmp_path / "model"))
    settings = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [1, 2], "repetition_penalty": 1.1}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    rehearse_saving(ModelInfo(str(folder)))
    assert "saved without its temperature, top_p" in capsys.readouterr().err
    model = load_model(str(folder), "float32")
    save_student(model, ModelInfo(str(folder)).tokenizer, tmp_path / "saved", "card")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert {k: v for k, v in saved.items() if k in settings} == {
        "do_sample": False, "eos_token_id": [1, 2], "repetition_penalty": 1.1
    }  # fmt: skip
    sampled = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "eos_token_id": [1, 2]}
    (folder / "generation_config.json").write_text(json.dumps(sampled))
    save_student(load_model(str(folder), "float32"), build_tokenizer(chat=True), tmp_path / "saved", "card")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert {k: v for k, v in saved.items() if k in sampled} == sampled


def test_settings_that_need_each_other_are_kept_together() -> None:
    generation = GenerationConfig(num_beams=4, num_return_sequences=3, eos_token_id=[1, 2])
    generation.temperature = 0.5
    kept, dropped = saveable(generation)
    assert (kept.num_beams, kept.num_return_sequences, kept.eos_token_id, dropped) == (4, 3, [1, 2], ["temperature"])
