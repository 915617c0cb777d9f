"""The GPUs that this process may use, asked without CUDA: a process that has asked CUDA holds memory of a GPU, and
cannot be forked."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from functools import cache

from dpkd_offline.common.errors import UnavailableError

VISIBLE = "CUDA_VISIBLE_DEVICES"
BFLOAT16_CAPABILITY = 8
ASK = """\
import torch
print(min({} for n in range(torch.cuda.device_count())))
"""
MEMORY = "torch.cuda.get_device_properties(n).total_memory"
CAPABILITY = "torch.cuda.get_device_capability(n)[0]"


def count_gpus() -> int:
    """How many this process may use; the driver's library is asked."""
    import torch

    return torch.cuda.device_count()


def visible_gpus() -> list[str]:
    """Their names, as CUDA_VISIBLE_DEVICES takes them; none on a machine without."""
    count, named = count_gpus(), os.environ.get(VISIBLE)
    names = [str(n) for n in range(count)] if named is None else [name.strip() for name in named.split(",")]
    return names[:count]


def gpus_have_bfloat16() -> bool:
    """Whether every GPU of this process has instructions for bfloat16, as those of compute capability 8.0 and more do
    (A100, RTX 3000, not V100 and T4). Those that the driver's tool does not know, such as parts of one, do.

    Raises:
        UnavailableError: the machine has both, and CUDA cannot be used here.
    """
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # GPUs of another maker
        return True
    majors = map(int, re.findall(r"^(\d+)\.\d+$", asked.stdout, re.MULTILINE))
    has = {major >= BFLOAT16_CAPABILITY for major in majors}
    if len(has) == 2:  # which of them this process has, CUDA knows: it counts the fastest first, the tool does not
        return _smallest(CAPABILITY, tuple(visible_gpus())) >= BFLOAT16_CAPABILITY
    return has != {False}


def only(gpus: Sequence[str]) -> dict[str, str]:
    """What of the environment makes a process see these GPUs alone."""
    return {VISIBLE: ",".join(gpus)}


def memory_of_each(gpus: tuple[str, ...]) -> int:
    """Bytes of the smallest of these GPUs.

    Raises:
        UnavailableError: CUDA cannot be used here.
    """
    return _smallest(MEMORY, gpus)


@cache
def _smallest(number: str, gpus: tuple[str, ...]) -> int:
    """The least of a number that each of these GPUs has, asked in a process of its own, which may use CUDA."""
    asked = subprocess.run(
        [sys.executable, "-c", ASK.format(number)],
        env={**os.environ, **only(gpus)},
        capture_output=True,
        text=True,
        check=False,
    )
    if asked.returncode or not asked.stdout.strip().isdecimal():
        reason = asked.stderr.strip().rpartition("\n")[2][:300]
        raise UnavailableError(f"GPUs {','.join(gpus)} cannot be asked what they are: {reason}")
    return int(asked.stdout)
