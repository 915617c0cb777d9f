"""Which engine runs a model, and loading it. What is known of each: `config/engines.py`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeVar

from dpkd_offline.common import console
from dpkd_offline.common.errors import UnavailableError, UsageError
from dpkd_offline.config.base import ModelOptions
from dpkd_offline.config.engines import ENGINES
from dpkd_offline.engines.base import Engine, LoadEngine
from dpkd_offline.models.info import ModelInfo
from dpkd_offline.models.weights import check_weights

T = TypeVar("T")


def choose_engine(name: str, url: Sequence[str] = ()) -> str:
    """The engine that is meant by `name`: `auto` is servers where their URLs are given, else what is installed.

    Says which one `auto` took on this machine.

    Raises:
        UsageError: servers without a URL, or a URL for another engine.
        UnavailableError: the engine's package is not installed.
    """
    if name == "auto":
        return _choose_installed(served=bool(url))
    traits = ENGINES[name]
    if traits.served and not url:
        raise UsageError(f"engine '{name}' needs --url, the base URL of a vLLM server")
    if url and not traits.served:
        served = " or ".join(f"'{other}'" for other in ENGINES if ENGINES[other].served)
        raise UsageError(f"--url is for engine {served}, not '{name}'")
    if (package := traits.package) is not None and not find_spec(package.module):
        raise UnavailableError(
            f"engine '{name}': {package.title} is not installed; {package.install}, or take --engine transformers"
        )
    return name


def _choose_installed(served: bool) -> str:
    """The first engine of the table that is installed, and as served as asked for."""
    missing: list[str] = []
    for name, traits in ENGINES.items():
        if traits.served == served:
            if traits.package is None or find_spec(traits.package.module):
                why = f" ({', '.join(missing)} is not installed)" if missing else ""
                if not served:
                    console.info(f"engine: {name}{why}")
                return name
            missing.append(traits.package.title)
    raise AssertionError("an engine that needs no package is always there")


def engine_and_dtype(engine: str, options: ModelOptions) -> dict[str, str]:
    """What a model is run by, and in what. A server has loaded the model in a dtype of its own."""
    return {"dtype": "server" if ENGINES[engine].served else options.precision, "engine": engine}


def provenance_of(engine: str, options: ModelOptions, model: ModelInfo | None = None) -> dict[str, Any]:
    """What of an engine belongs to the identity of its numbers.

    `quantization` is that of the options, else that of the model's config, where there is one. Of `engine_args` those
    are left out that plan time and memory.
    """
    quantization = options.quantization or (None if model is None else model.quantization)
    args = {name: value for name, value in (options.engine_args or {}).items() if name not in ENGINES[engine].plans}
    return {
        **engine_and_dtype(engine, options),
        **({"quantization": quantization} if quantization else {}),
        **({"engine_args": args} if args else {}),
    }


def check_options(name: str, options: ModelOptions) -> None:
    """Raise UsageError where the options name some of an engine's own, and the one that `auto` took has none."""
    if fault := options.options_fault(name):
        raise UsageError(fault)


def together(samples: Sequence[T], engine: Engine | None) -> list[list[T]]:
    """Which samples of a dataset an engine is given at once: all, unless it keeps to groups, in which the arithmetic of
    a response would then depend on how many samples there are."""
    mixes = engine is not None and ENGINES[engine.name].mixes
    return [[*samples]] if samples and mixes else [[sample] for sample in samples]


def load_engine(model: ModelInfo, options: ModelOptions, groups: int | None = None) -> Engine:
    """Load `model` into the engine that the options name.

    Args:
        groups: of requests that will come, if that is known: of more replicas some would have nothing to do.

    Raises:
        UsageError: http without a URL, a server that takes shorter sequences, or more replicas than GPUs for them.
        MismatchError: servers of different models, or of another tokenizer.
        UnavailableError: the engine is not installed, or cannot load the model, or no server answers.
    """
    name = choose_engine(options.engine, options.url)
    check_options(name, options)
    if not ENGINES[name].served:
        options = options.model_copy(update={"engine": name, "dtype": options.precision})  # the same in every copy
    if options.cluster == "ray":
        if ENGINES[name].served:
            raise UsageError(
                f"--cluster ray runs engines on its nodes; the {name} engine has its servers: leave one out"
            )
        if not find_spec("ray"):
            raise UnavailableError("cluster 'ray': Ray is not installed; `pip install 'dpkd-offline[ray]'`")
        from dpkd_offline.engines.ray_cluster import RayEngine

        return RayEngine(load_engine, model, options)
    if ENGINES[name].loads_silently:
        check_weights(model)
    if not ENGINES[name].served and options.replicas != 1:
        from dpkd_offline.engines.replicas import ReplicasEngine, replica_places

        if len(places := replica_places(options, groups)) > 1:
            return ReplicasEngine(load_engine, model, options, places)
    load: LoadEngine = getattr(engine_module(name), ENGINES[name].home.partition(":")[2])
    return load(model, options)


def engine_module(name: str) -> Any:
    """The module of an engine. Importing it tells the engine's library how to run here, before that is imported."""
    return import_module(f"dpkd_offline.engines.{ENGINES[name].home.partition(':')[0]}")
