"""The table of engines: an entry is all that the commands have to know of one."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
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
    assert provenance_of("mine", "bfloat16") == {"dtype": "server", "engine": "mine"}
    with pytest.raises(UsageError, match="engine 'mine' needs --url"):
        choose_engine("mine")
    with pytest.raises(UsageError, match="--url is for engine 'http' or 'mine', not 'transformers'"):
        choose_engine("transformers", ("http://x",))
    with pytest.raises(UsageError, match="the mine engine has its servers"):
        load_engine(ModelInfo("m"), options.model_copy(update={"cluster": "ray"}))
    monkeypatch.setitem(ENGINES, "mine", EngineTraits("mine:Mine", Package("no_such_module", "Mine", "`make mine`")))
    with pytest.raises(UnavailableError, match="engine 'mine': Mine is not installed; `make mine`, or take"):
        choose_engine("mine")
