"""The precision in which this machine multiplies matrices fastest."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Literal

from dpkd_offline.common import console
from dpkd_offline.common.gpus import count_gpus

INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16")  # for products of bfloat16, on x86 and ARM


@cache
def fast_dtype() -> Literal["bfloat16", "float32"]:
    """bfloat16 on a GPU, and on a CPU that has instructions for it: elsewhere its products take several times as long
    as those of float32, which is said."""
    import torch  # not where an option says it

    if count_gpus() or _multiplies_bfloat16(torch.cpu.get_capabilities(), torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return "bfloat16"
    console.info("dtype: float32 (this CPU has no instructions for products of bfloat16)")
    return "float32"


def _multiplies_bfloat16(capabilities: Mapping[str, object], library: bool) -> bool:
    """Whether a CPU with these capabilities, and its library of products, do."""
    return library and any(capabilities.get(name) for name in INSTRUCTIONS)
