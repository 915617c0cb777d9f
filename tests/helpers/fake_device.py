"""A device that is none: torch calls it `meta`, its tensors lie on the CPU, and what crosses over is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_any, tree_leaves, tree_map_only

DEVICE = torch.device("meta")


class There(Tensor):
    """A tensor on the device."""

    here: Tensor  # its values

    @staticmethod
    def __new__(cls, here: Tensor) -> There:
        more = {"dtype": here.dtype, "layout": here.layout, "strides": here.stride()}
        there: There = Tensor._make_wrapper_subclass(cls, here.shape, device=DEVICE, **more)  # type: ignore[attr-defined]
        there.here = here
        return there

    @classmethod
    def __torch_dispatch__(cls, *_: Any) -> Any:
        raise AssertionError("outside of FakeDevice")


# What a processor waits for, and what takes tensors from either side, as with a GPU.
READS = ("_local_scalar_dense", "equal", "nonzero", "is_nonzero")
MIXED = ("_to_copy", "copy_", "index", "index_put_", "dpkd_offline")  # the last: attention, by segments on the CPU


class FakeDevice(TorchDispatchMode):
    """A context with the device. `crossed` counts reads of it, which a processor waits for, and copies to it."""

    def __init__(self) -> None:
        super().__init__()
        self.crossed: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        is_there = tree_any(lambda value: isinstance(value, There), (args, kwargs))
        target = kwargs.get("device")
        name = str(func).removeprefix("aten.").split(".")[0]
        if target is not None and torch.device(target) == DEVICE:
            kwargs["device"] = torch.device("cpu")
            self.crossed["copies"] += name == "_to_copy" and not is_there
            is_there = True
        elif is_there and (name in READS or target is not None):
            self.crossed["reads"] += 1
            is_there = False
        elif is_there and name == "repeat_interleave" and kwargs.get("output_size") is None:
            self.crossed["reads"] += 1  # of how many there will be
        if is_there and name not in MIXED:
            leaves = tree_leaves((args, kwargs))
            here = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, There) and leaf.ndim]
            assert not here, f"{name} of tensors on two devices"
        plain = tree_map_only(There, lambda value: value.here, (args, kwargs))
        answer = func(*plain[0], **plain[1])
        if not is_there:
            return answer
        known = {id(v.here): v for v in tree_leaves((args, kwargs)) if isinstance(v, There)}
        return tree_map_only(Tensor, lambda value: known[id(value)] if id(value) in known else There(value), answer)
