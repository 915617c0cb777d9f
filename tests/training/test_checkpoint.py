from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import cast

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from dpkd_offline.common.errors import MismatchError
from dpkd_offline.training import checkpoint
from dpkd_offline.training.checkpoint import Position, StoredState, in_order, load_state, save_state
from dpkd_offline.training.distributed import Processes


def test_state_round_trips_and_the_newest_wins(tmp_path: Path) -> None:
    tensors = {"master/a": torch.randn(3, 2), "step/a": torch.tensor(4.0)}
    save_state(tmp_path, Position(1), "run", {k: v * 0 for k, v in tensors.items()})
    save_state(tmp_path, Position(2), "run", tensors)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000002"]
    position, loaded = load_state(tmp_path, "run") or (None, {})
    assert position == Position(2)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_a_half_written_checkpoint_is_not_there(tmp_path: Path) -> None:
    save_state(tmp_path, Position(1), "run", {"a": torch.ones(2)})
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".step-00000002-77")
    (tmp_path / ".step-00000002-77" / "state.safetensors").write_bytes(b"half")
    state = load_state(tmp_path, "run")
    assert state is not None and state[0] == Position(1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_the_state_of_another_run_is_refused(tmp_path: Path) -> None:
    assert load_state(tmp_path, "run") is None
    save_state(tmp_path, Position(1), "run", {"a": torch.ones(2)})
    with pytest.raises(MismatchError, match="left by a run with another config"):
        load_state(tmp_path, "other")


def test_a_process_reads_its_own_parts_of_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put together they are the whole, also where there are fewer rows than processes; no rank reads a tensor whole."""
    tensors = {"master/a": torch.randn(7, 3), "master/b": torch.randn(2), "step/a": torch.tensor(4.0)}
    save_state(tmp_path, Position(2), "run", tensors)
    _, state = load_state(tmp_path, "run") or pytest.fail("no state")
    store = FakeStore()
    parts: dict[str, list[torch.Tensor]] = {"master/a": [], "master/b": []}
    for rank in range(3):
        torch.distributed.init_process_group("fake", rank=rank, world_size=3, store=store)
        try:
            mesh = init_device_mesh("cpu", (3,))
            with monkeypatch.context() as patch:
                patch.setattr(StoredState, "__getitem__", None)
                for name, found in parts.items():
                    like = distribute_tensor(torch.zeros_like(tensors[name]), mesh, [Shard(0)], src_data_rank=None)
                    part = state.part(name, like)
                    assert (part.shape, part.placements) == (like.shape, like.placements)
                    found.append(part.to_local())
        finally:
            torch.distributed.destroy_process_group()
    assert [len(part) for part in parts["master/b"]] == [1, 1, 0]
    for name, found in parts.items():
        assert torch.equal(torch.cat(found), tensors[name]), name


def test_only_the_first_process_checks_the_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        count, first = 2, False

        def sum(self, numbers: dict[str, float]) -> dict[str, float]:
            assert numbers == {"step": 0.0}
            return {"step": 3.0}  # what the first one adds

    save_state(tmp_path, Position(2), "run", {"a": torch.ones(2)})
    (tmp_path / ".step-00000003").mkdir()
    monkeypatch.setattr(checkpoint, "file_sha256", None)
    position, state = load_state(tmp_path, "run", cast(Processes, Other())) or pytest.fail("no state")
    assert position == Position(2) and torch.equal(state["a"], torch.ones(2))
    assert (tmp_path / ".step-00000003").exists()  # the first one sweeps


def test_a_checkpoint_holds_one_tensor_at_a_time_and_is_hashed_while_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a file that the library reads, of every dtype that a state has."""
    tensors = {
        "a": torch.randn(3, 2),
        "step": torch.tensor(4.0),
        "half": torch.randn(5).bfloat16(),
        "bytes": torch.arange(3, dtype=torch.uint8),
        "none": torch.empty(0, 2),
    }
    asked: list[torch.Size] = []
    monkeypatch.setattr(checkpoint, "gather_full", lambda tensor: asked.append(tensor.shape) or tensor)
    monkeypatch.setattr(checkpoint, "file_sha256", None)
    save_state(tmp_path, Position(1), "run", tensors)
    assert asked[: len(tensors)] == [tensor.shape for tensor in in_order(tensors).values()]
    file = tmp_path / "step-00000001" / "state.safetensors"
    record = json.loads((file.parent / "state.json").read_text())
    assert record["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    loaded = load_file(file)
    assert all(
        torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
