"""The precision in which this machine multiplies matrices fastest."""

from __future__ import annotations

from functools import cache
from typing import Literal

from dpkd_offline.common import console
from dpkd_offline.common.gpus import count_gpus, gpus_have_bfloat16

INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16")  # for products of bfloat16, on x86 and ARM


@cache
def fast_dtype() -> Literal["bfloat16", "float32"]:
    """bfloat16 on a GPU and a CPU that have instructions for it: elsewhere its products take several times as long as
    those of float32, which is said, and some engines refuse it."""
    import torch  # slow to import, and needed where no option says it

    if count_gpus():
        device, has = "GPU", gpus_have_bfloat16()
    else:
        can = torch.cpu.get_capabilities()
        device, has = "CPU", torch.ops.mkldnn._is_mkldnn_bf16_supported() and any(map(can.get, INSTRUCTIONS))
    if has:
        return "bfloat16"
    console.info(f"dtype: float32 (this {device} has no instructions for products of bfloat16)")
    return "float32"
