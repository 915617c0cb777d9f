"""Tiny models and datasets that many tests use."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the libraries are imported
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # as the command line does; forked processes have it from here
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Tests compare bits, which sums on a GPU do not repeat; what needs one asks for the fixture `gpus`.
GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")
os.environ["CUDA_VISIBLE_DEVICES"] = ""
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # other tests run beside these

import fcntl
import gc
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers.tiny import (
    FAMILIES,
    TURNS,
    build_config,
    build_model,
    build_tokenizer,
    command_line,
    make_dataset,
    rows,
    write_jsonl,
)
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


def pytest_collection_finish() -> None:
    """What is imported lives to the end; each engine that is closed collects garbage, half a second among all of it."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or libraries call it a leak at exit


@pytest.fixture(scope="session")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("teachers")
    return {family: build_model(family, root / family) for family in FAMILIES}


@pytest.fixture(scope="session")
def students(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("students")
    return {family: build_model(family, root / family, seed=1) for family in FAMILIES}


@pytest.fixture(scope="session")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of another family whose tokens are bytes and whose turns end with a token of their own."""
    folder = tmp_path_factory.mktemp("foreign")
    tokenizer = build_tokenizer(chat=False)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["merges"] = []
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(json.dumps(state)), eos_token="</s>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    tokenizer.chat_template = TURNS + "{% if add_generation_prompt %}[assistant]{% endif %}"
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(build_config("gpt2", len(tokenizer)), dtype=torch.float32)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end>")]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", rows(22))


@pytest.fixture(scope="session")
def datasets_by_family(
    tmp_path_factory: pytest.TempPathFactory, source: Path, teachers: dict[str, Path], students: dict[str, Path]
) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("datasets")
    return {family: make_dataset(root / family, source, teachers[family], students[family]) for family in FAMILIES}


@pytest.fixture(scope="module")
def gpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The GPUs, if there are some, for this module alone: each vLLM engine takes nearly all of their memory."""
    with (
        (tmp_path_factory.getbasetemp().parent / "gpus.lock").open("w") as lock,
        pytest.MonkeyPatch.context() as patch,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        patch.delenv("CUDA_VISIBLE_DEVICES")
        if GPUS is not None:
            patch.setenv("CUDA_VISIBLE_DEVICES", GPUS)
        yield


@pytest.fixture
def run_cli() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a command as a user does: a process of its own."""

    def run(*arguments: object, **keywords: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command_line(*arguments), capture_output=True, text=True, timeout=600, **keywords)  # type: ignore[call-overload, no-any-return]

    return run
