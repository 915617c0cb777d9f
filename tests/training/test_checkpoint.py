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

from dpkd_offline.common.errors import DataError, MismatchError, StorageError
from dpkd_offline.training import checkpoint
from dpkd_offline.training.checkpoint import Position, StoredState, load_state, own_parts, random_states, save_state
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


class Rank:
    """One of several processes, which run one after the other: what it asks the others for is there before."""

    def __init__(self, rank: int, hashes: list[str]) -> None:
        self.rank, self.count, self.first, self.hashes = rank, len(hashes), rank == 0, hashes

    def wait(self) -> None:
        pass

    def gather(self, value: str) -> list[str]:
        self.hashes[self.rank] = value
        return self.hashes


STATE = {"master/a": torch.randn(7, 3), "master/b": torch.randn(2), "exp_avg/c": torch.randn(9).bfloat16()}
WHOLE = {"step/a": torch.tensor(4.0), "master/@/0": torch.randn(5), "buffer": torch.arange(6, dtype=torch.int64)}


def parts_of_ranks(count: int) -> list[dict[str, torch.Tensor]]:
    """What each of several processes writes of a state that is sharded in part."""
    parts = []
    for rank in range(count):
        torch.distributed.init_process_group("fake", rank=rank, world_size=count, store=FakeStore())
        try:
            mesh = init_device_mesh("cpu", (count,))
            sharded = {k: distribute_tensor(v, mesh, [Shard(0)], src_data_rank=None) for k, v in STATE.items()}
            parts.append(own_parts({**sharded, **WHOLE}.items(), rank, count))
        finally:
            torch.distributed.destroy_process_group()
    return parts


def saved_by(count: int, folder: Path) -> list[dict[str, torch.Tensor]]:
    """The others leave their files where the first one makes the checkpoint; the first one comes last here."""
    hashes, parts = [""] * count, parts_of_ranks(count)
    making = folder / ".step-00000002"
    for rank in reversed(range(count)):
        making.mkdir(parents=True, exist_ok=True)
        with pytest.MonkeyPatch.context() as patch:
            if rank == 0:
                patch.setattr(checkpoint, "sweep_states", lambda _: making.rename(folder / "kept"))
                patch.setattr(Rank, "wait", lambda _: [f.rename(making / f.name) for f in (folder / "kept").iterdir()])
            save_state(folder, Position(2), "run", parts[rank], cast(Processes, Rank(rank, hashes)))
    return parts


@pytest.mark.parametrize("count", [2, 3, 4])
def test_each_process_writes_a_share_and_any_number_goes_on(count: int, tmp_path: Path) -> None:
    parts = saved_by(count, tmp_path)
    sizes = [sum(t.nbytes for t in of_rank.values()) for of_rank in parts]
    assert sum(sizes) == sum(t.nbytes for t in (*STATE.values(), *WHOLE.values()))
    files = sorted(path.name for path in (tmp_path / "step-00000002").iterdir())
    assert files == sorted(
        ["state.json", "state.safetensors", *(f"state-{rank}.safetensors" for rank in range(1, count))]
    )
    _, state = load_state(tmp_path, "run") or pytest.fail("no state")
    assert {*state} == {*STATE, *WHOLE, *random_states()}
    for name, tensor in {**STATE, **WHOLE}.items():
        assert torch.equal(state[name], tensor) and state[name].dtype == tensor.dtype, name
    for others in (1, 2, 5):
        for name, tensor in STATE.items():
            rows = []
            for rank in range(others):
                torch.distributed.init_process_group("fake", rank=rank, world_size=others, store=FakeStore())
                try:
                    mesh = init_device_mesh("cpu", (others,))
                    like = distribute_tensor(torch.zeros_like(tensor), mesh, [Shard(0)], src_data_rank=None)
                    rows.append(state.part(name, like).to_local())
                finally:
                    torch.distributed.destroy_process_group()
            assert torch.equal(torch.cat(rows), tensor), (name, others)


def test_what_all_hold_is_written_once_in_equal_shares() -> None:
    tensors = {str(n): torch.zeros(50 + 37 * n % 100) for n in range(40)}
    parts = [own_parts(tensors.items(), rank, 3) for rank in range(3)]
    assert sorted(name for of_rank in parts for name in of_rank) == sorted(tensors)
    sizes = [sum(t.nbytes for t in of_rank.values()) for of_rank in parts]
    assert max(sizes) - min(sizes) <= max(t.nbytes for t in tensors.values())


def test_a_file_of_any_process_that_is_missing_or_damaged_is_seen(tmp_path: Path) -> None:
    saved_by(3, tmp_path)
    file = tmp_path / "step-00000002" / "state-2.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(DataError, match=r"state-2.safetensors: damaged"):
        load_state(tmp_path, "run")
    file.unlink()
    with pytest.raises(DataError, match=r"state-2.safetensors: no such file"):
        load_state(tmp_path, "run")


def test_processes_that_share_no_disk_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        StorageError,
        match=r"step-00000001: cannot be written: process 1 does not see it, and --output must be on a disk that all",
    ):
        save_state(tmp_path, Position(1), "run", {"a": torch.ones(2)}, cast(Processes, Rank(1, ["of the first", ""])))
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_is_hashed_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a file that the library reads, of every dtype that a state has."""
    tensors = {
        "a": torch.randn(3, 2),
        "step": torch.tensor(4.0),
        "half": torch.randn(5).bfloat16(),
        "bytes": torch.arange(3, dtype=torch.uint8),
        "none": torch.empty(0, 2),
    }
    monkeypatch.setattr(checkpoint, "file_sha256", None)
    save_state(tmp_path, Position(1), "run", tensors)
    file = tmp_path / "step-00000001" / "state.safetensors"
    record = json.loads((file.parent / "state.json").read_text())
    assert record["sha256"] == [hashlib.sha256(file.read_bytes()).hexdigest()]
    loaded = load_file(file)
    assert all(
        torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
