"""The table of engines: an entry is all that the commands have to know of one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import get_args

import pytest

from dpkd_offline.common.errors import UnavailableError, UsageError
from dpkd_offline.config.base import ModelOptions
from dpkd_offline.config.engines import ENGINES, EngineName, EngineTraits, Package
from dpkd_offline.engines.factory import choose_engine, load_engine, provenance_of
from dpkd_offline.models.info import ModelInfo


def test_each_name_has_an_entry_and_each_entry_is_an_engine() -> None:
    assert get_args(EngineName) == ("auto", *ENGINES)
    for name, traits in ENGINES.items():
        if traits.package is None or (name != "vllm" and find_spec(traits.package.module)):  # vLLM's takes long
            module, _, engine = traits.home.partition(":")
            loaded = getattr(import_module(f"dpkd_offline.engines.{module}"), engine)
            assert loaded.name == name
            assert all(verb in vars(loaded) for verb in ("versions", "generate", "score", "close"))


def test_an_engine_of_ones_own_is_its_module_and_an_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("mine")
    module.Mine = lambda model, options: (model.name, options.engine)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "dpkd_offline.engines.mine", module)
    monkeypatch.setitem(ENGINES, "mine", EngineTraits("mine:Mine", served=True))
    options = ModelOptions.model_construct(**{**ModelOptions().model_dump(), "engine": "mine", "url": ("http://x",)})
    assert load_engine(ModelInfo("m"), options) == ("m", "mine")
    assert provenance_of("mine", ModelOptions()) == {"dtype": "server", "engine": "mine"}
    with pytest.raises(UsageError, match="engine 'mine' needs --url"):
        choose_engine("mine")
    with pytest.raises(UsageError, match="--url is for engine 'http' or 'mine', not 'transformers'"):
        choose_engine("transformers", ("http://x",))
    with pytest.raises(UsageError, match="the mine engine has its servers"):
        load_engine(ModelInfo("m"), options.model_copy(update={"cluster": "ray"}))
    monkeypatch.setitem(ENGINES, "mine", EngineTraits("mine:Mine", Package("no_such_module", "Mine", "`make mine`")))
    with pytest.raises(UnavailableError, match="engine 'mine': Mine is not installed; `make mine`, or take"):
        choose_engine("mine")


@dataclass
class EngineArgs:
    """The names that a vLLM knows, some of them."""

    model: str = ""
    max_num_seqs: int = 0
    kv_cache_dtype: str = ""
    enforce_eager: bool = False


@pytest.fixture
def vllm_arguments(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, object]]:
    """`llm_arguments` of the vLLM engine, beside a vLLM that is a few names."""
    stub: dict[str, dict[str, object]] = {
        "vllm": {
            "LLM": None,
            "EngineArgs": EngineArgs,
            "SamplingParams": None,
            "TokensPrompt": None,
            "__version__": "9",
        },
        "vllm.sampling_params": {"RequestOutputKind": SimpleNamespace(FINAL_ONLY=2)},
        "vllm.v1.engine.exceptions": {"EngineDeadError": RuntimeError},
    }
    for name, values in stub.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "dpkd_offline.engines.vllm", raising=False)
    arguments = import_module("dpkd_offline.engines.vllm").llm_arguments
    del sys.modules["dpkd_offline.engines.vllm"]  # or monkeypatch would put this one back
    model = SimpleNamespace(name="m", context_length=500, trust_remote_code=False)
    return lambda **changes: arguments(model, ModelOptions.model_validate({"engine": "vllm", **changes}))


def test_options_of_vllms_own_are_passed_on(vllm_arguments: Callable[..., dict[str, object]]) -> None:
    plain = vllm_arguments()
    own = {"max_num_seqs": 256, "kv_cache_dtype": "fp8", "enforce_eager": False}
    told = vllm_arguments(quantization="fp8", engine_args=json.dumps(own), max_length=100)
    assert told == {**plain, **own, "quantization": "fp8", "max_model_len": 101}
    assert plain["quantization"] is None and plain["model"] == "m"
    with pytest.raises(UsageError, match="--engine-args: vLLM 9 has no option 'max_num_sequences'"):
        vllm_arguments(engine_args={"max_num_sequences": 256})


def test_what_changes_numbers_is_part_of_their_identity(tmp_path: Path) -> None:
    own = {"max_num_seqs": 256, "kv_cache_dtype": "fp8"}
    options = ModelOptions(engine="vllm", quantization="fp8", engine_args=own)
    plain = {"dtype": options.precision, "engine": "vllm"}
    assert provenance_of("vllm", options) == {**plain, "quantization": "fp8", "engine_args": {"kv_cache_dtype": "fp8"}}
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "awq", "bits": 4}}')
    (tmp_path / "tokenizer.json").write_text("{}")
    model = ModelInfo(str(tmp_path))
    assert provenance_of("vllm", ModelOptions(), model) == {**plain, "quantization": "awq"}
    assert provenance_of("vllm", ModelOptions(quantization="awq_marlin"), model)["quantization"] == "awq_marlin"
    assert {"quantization", "engine_args"}.isdisjoint(ModelOptions().model_dump())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "transformers", "engine_args": {"max_num_seqs": 2}}, "engine_args is for engine vllm, not 'transf"),
        ({"engine": "http", "url": "http://x", "quantization": "fp8"}, "its servers were started with theirs"),
        ({"engine_args": {"max_model_len": 9}}, "'max_model_len' is not for the user to say: say it by --max-length"),
        ({"engine_args": {"hf_token": "hf_x"}}, "'hf_token' is not for the user to say: set HF_TOKEN"),
        ({"engine_args": "{max_num_seqs: 2}"}, "expected a JSON object such as"),
        ({"engine_args": "[1]"}, "valid dictionary"),
    ],
)
def test_options_that_an_engine_has_not_or_that_are_ours_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelOptions.model_validate(options)


def test_options_for_an_engine_that_auto_did_not_take_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpkd_offline.engines.factory.find_spec", lambda _: None)
    with pytest.raises(UsageError, match="quantization is for engine vllm, not 'transformers': it has none"):
        load_engine(ModelInfo("m"), ModelOptions(quantization="fp8"))
