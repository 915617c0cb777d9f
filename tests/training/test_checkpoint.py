from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from dpkd_offline.common.errors import MismatchError
from dpkd_offline.training.checkpoint import Position, load_state, save_state


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
