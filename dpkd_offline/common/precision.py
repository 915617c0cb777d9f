"""The precision in which this machine multiplies matrices fastest."""

from __future__ import annotations

from functools import cache
from typing import Literal

from dpkd_offline.common import console
from dpkd_offline.common.gpus import count_gpus

INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16")  # for products of bfloat16, on x86 and ARM


@cache
def fast_dtype() -> Literal["bfloat16", "float32"]:
    """bfloat16 on a GPU, and on a CPU that has instructions for it: elsewhere its products take several times as long
    as those of float32, which is said."""
    import torch  # slow to import, and needed where no option says it

    can = torch.cpu.get_capabilities()
    if count_gpus() or (torch.ops.mkldnn._is_mkldnn_bf16_supported() and any(map(can.get, INSTRUCTIONS))):
        return "bfloat16"
    console.info("dtype: float32 (this CPU has no instructions for products of bfloat16)")
    return "float32"
