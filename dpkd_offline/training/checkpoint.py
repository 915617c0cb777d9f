"""The trainer's state on disk: committed by one rename, verified when it is read. No pickle.

Each process writes and hashes a file of its own: its parts of what is sharded, and a share of what all of them hold.
Parts are found by their first row, so that a run goes on in any number of processes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from dpkd_offline.common import console
from dpkd_offline.common.errors import DataError, MismatchError
from dpkd_offline.common.files import disk_errors, fsync, read_model, write_json
from dpkd_offline.common.hashing import file_sha256, fingerprint
from dpkd_offline.common.machine import available_memory
from dpkd_offline.training.distributed import Processes

STATE = "state.safetensors"  # of the first process, in a checkpoint's folder, beside state.json
PART = "part"  # a part of a tensor is called part/FIRST_ROW/NAME
HASHED_AT_ONCE = 8  # files
ROOM_FOR_COPIES = 0.5  # of the free memory of a machine
DTYPES = {  # as .safetensors files call them
    **{torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float8_e4m3fn: "F8_E4M3"},
    **{torch.uint8: "U8", torch.int8: "I8", torch.int32: "I32", torch.int64: "I64", torch.bool: "BOOL"},
}


@dataclass(frozen=True)
class Position:
    """Where a run stands: optimizer steps done, and after how many each later round of pairs began or is to begin."""

    step: int
    switches: list[int] = field(default_factory=list)
    choices: dict[str, bool | int] = field(default_factory=dict)  # of settings that the config leaves to the device


class StoredState(Mapping[str, Tensor]):
    """The tensors of a checkpoint, by name. Each is read when it is asked for, and none is kept here.

    They are 12 bytes a parameter, too much for the memory of a machine on which each of several processes holds all.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._places: dict[str, dict[int, tuple[Any, str]]] = {}  # by name and first row: the file, and its name there
        for path in paths:
            # No mapping of a file that is going to be removed.
            file: Any = safe_open(path, framework="pt", backend="pread")
            for key in file.keys():
                row, name = key.split("/", 2)[1:] if key.startswith(f"{PART}/") else ("0", key)
                self._places.setdefault(name, {})[int(row)] = (file, key)

    def __getitem__(self, name: str) -> Tensor:
        parts = [file.get_tensor(key) for _, (file, key) in sorted(self._places[name].items())]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def _rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of a tensor; no others are read."""
        parts = []
        for row, (file, key) in sorted(self._places[name].items()):
            part = file.get_slice(key)
            first, end = max(start, row), min(stop, row + part.get_shape()[0])
            if first < end:
                parts.append(part[first - row : end - row])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def part(self, name: str, like: Tensor) -> Tensor:
        """What this process holds of a tensor that is laid out as another one, on its device; the rest is not read."""
        if not isinstance(like, DTensor):
            return self[name].to(like.device)
        shape, offset = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
        if 0 in shape:  # fewer rows than processes
            local = torch.empty(shape, dtype=like.dtype)
        else:
            local = self._rows(name, offset[0], offset[0] + shape[0])
            local = local[(slice(None), *(slice(o, o + n) for o, n in zip(offset[1:], shape[1:], strict=True)))]
        return DTensor.from_local(
            local.to(like.to_local().device), like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
        )


class _StateRecord(BaseModel):
    """state.json: where the run stands, and the hashes of the files beside it."""

    model_config = ConfigDict(extra="forbid")

    step: NonNegativeInt
    switches: list[NonNegativeInt]
    choices: dict[str, bool | int]
    run: str
    sha256: list[str]  # of the file of each process
    fingerprint: str  # of all the others


def random_states() -> dict[str, Tensor]:
    """The states of torch's generators, as bytes."""
    states = {"random/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["random/cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random(tensors: Mapping[str, Tensor]) -> None:
    """Set torch's generators to what `random_states` returned."""
    torch.set_rng_state(tensors["random/cpu"])
    if "random/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random/cuda"])


def in_order(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As they lie in a checkpoint: those of the widest numbers first, so that all are aligned."""
    return dict(sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])))


def own_parts(tensors: Iterable[tuple[str, Tensor]], rank: int = 0, count: int = 1) -> dict[str, Tensor]:
    """What one of several processes writes: its rows of what is sharded, and of what all hold a share of the bytes.

    Args:
        tensors: of the whole state with their names, the same ones in all processes. What another one writes is not
            kept, so that they may be made one after the other.
    """
    parts, shares = dict[str, Tensor](), [0] * count
    for name, tensor in tensors:
        if isinstance(tensor, DTensor):
            shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
            assert shape[1:] == tensor.shape[1:], "FSDP shards rows"
            if shape[0]:
                parts[f"{PART}/{offset[0]}/{name}"] = tensor.to_local()
            continue
        writer = shares.index(min(shares))
        shares[writer] += tensor.nbytes
        if writer == rank:
            parts[name] = tensor
    return parts


class Saving:
    """A state of the trainer on its way to the disk, as folder/step-N, where `commit` puts it by one rename.

    Of several processes all make one, each with its own tensors, and commit it together.

    Args:
        folder: the run's `checkpoints` folder, which all processes share.
        run: fingerprint of all that must agree for the state to be continued.
        tensors: master weights and optimizer moments, by name. The states of the first one's generators are added.
        background: write in a thread, while the caller goes on; nothing else may change the tensors then.

    Raises:
        StorageError: the disk is full or fails, or is not one that all processes share. The checkpoint before is
            untouched. In the background it is `commit` that raises it.
    """

    def __init__(
        self,
        folder: Path,
        position: Position,
        run: str,
        tensors: Mapping[str, Tensor],
        processes: Processes | None = None,
        background: bool = False,
    ) -> None:
        rank, self._first = (processes.rank, processes.first) if processes else (0, True)
        self._processes, self._final = processes, _place(folder, position.step)
        self._making = folder / f".{self._final.name}"
        self._record = {**asdict(position), "run": run}
        with self._or_removed():
            if self._first:
                sweep_states(folder)
                self._making.mkdir(parents=True)
            if processes:
                processes.wait()
            if not self._making.is_dir():
                raise OSError(
                    f"process {rank} does not see it, and --output must be on a disk that all processes share"
                )
            file, state = _file(self._making, rank), {**in_order(tensors), **(random_states() if self._first else {})}
            if background:
                thread = ThreadPoolExecutor(1)
                self._sha256 = thread.submit(_write_durably, file, state)
                thread.shutdown(wait=False)
            else:
                self._sha256 = Future()
                self._sha256.set_result(_write_durably(file, state))

    def is_written(self) -> bool:
        """Whether the file of this process is written, or cannot be."""
        return self._sha256.done()

    def wait(self) -> None:
        """Wait until it is."""
        wait([self._sha256])

    def commit(self) -> None:
        """Put the state in place once all is written; the older ones go after that. All processes call it."""
        with self._or_removed():
            sha256 = self._sha256.result()
            hashes = self._processes.gather(sha256) if self._processes else [sha256]
            if not self._first:
                return
            record = {**self._record, "sha256": hashes}
            write_json(self._making / "state.json", {**record, "fingerprint": fingerprint(record)})  # fsyncs the folder
            folder = self._final.parent
            if self._final.exists():  # damaged, else the run would have gone on from it
                self._final.rename(folder / f".{self._final.name}-damaged")
            self._making.rename(self._final)
            fsync(folder)
            fsync(folder.parent)
        for other in folder.iterdir():
            if other != self._final:
                shutil.rmtree(other, ignore_errors=True)

    @contextmanager
    def _or_removed(self) -> Iterator[None]:
        with disk_errors(self._final):
            try:
                yield
            except BaseException:
                if self._first:
                    shutil.rmtree(self._making, ignore_errors=True)
                raise


def save_state(
    folder: Path, position: Position, run: str, tensors: Mapping[str, Tensor], processes: Processes | None = None
) -> None:
    """Write and commit the trainer's state, as `Saving` says."""
    Saving(folder, position, run, tensors, processes).commit()


def copies_fit(parts: Mapping[str, Tensor], processes: Processes) -> bool:
    """Whether every machine has room for copies of what its processes keep on a GPU. All processes call it.

    On a CPU there is none: weights and moments are most of what it holds.
    """
    if processes.device.type == "cpu":
        return False
    room = available_memory() * ROOM_FOR_COPIES
    copies = sum(tensor.nbytes for tensor in parts.values()) * processes.on_this_machine
    return processes.smallest(room - copies) > 0


def copied_to_host(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies that no step changes, in the memory of the machine; each part is dropped once it is copied."""
    return {name: parts.pop(name).to("cpu", copy=True) for name in list(parts)}


def _write_durably(file: Path, tensors: Mapping[str, Tensor]) -> str:
    sha256 = write_tensors(file, tensors)
    fsync(file)
    return sha256


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a .safetensors file, one tensor after the other: memory is for one, where they are on a device.

    Returns the sha256 of the file, taken while it is written.
    """
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.itemsize
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for data in (len(text).to_bytes(8, "little"), text):
            digest.update(data)
            file.write(data)
        for tensor in tensors.values():
            whole = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            digest.update(whole)
            file.write(whole)
    return digest.hexdigest()


def sweep_states(folder: Path) -> None:
    """Remove the checkpoints that were not committed, which may be what fills the disk."""
    for stale in folder.glob(".step-*"):
        shutil.rmtree(stale, ignore_errors=True)


def load_state(folder: Path, run: str, processes: Processes | None = None) -> tuple[Position, StoredState] | None:
    """The newest committed state under `folder` that is whole, or None where none was committed.

    Of several processes, all of which call it, the first reads the whole file to check it, and the others open the
    same one.

    Raises:
        DataError: all that were committed are damaged.
        MismatchError: another run left it.
    """
    alone = processes is None or processes.count == 1
    step = _newest_whole(folder, run) if alone or (processes and processes.first) else None
    if processes is not None and not alone:
        step = int(processes.sum({"step": 0.0 if step is None else step + 1.0})["step"]) - 1
    if step is None or step < 0:
        return None
    path = _place(folder, step)
    record = read_model(path / "state.json", _StateRecord)
    position = Position(record.step, record.switches, record.choices)
    return position, StoredState([_file(path, rank) for rank in range(len(record.sha256))])


def _newest_whole(folder: Path, run: str) -> int | None:
    """The step of the newest state that is whole; what was not committed is removed."""
    sweep_states(folder)
    damages = []
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            step = _check_state(path, run)
        except DataError as error:
            damages.append(error)
            continue
        for damage in damages:
            console.info(f"{damage}; an older checkpoint is whole")
        return step
    if damages:
        raise DataError(f"{damages[0]}; put back a whole copy of this checkpoint, or start over with --no-resume")
    return None


def run_of_states(folder: Path) -> str | None:
    """The run that left the committed states under `folder`; None where there is none, or it cannot be known."""
    for path in sorted(folder.glob("step-*/state.json"), reverse=True):
        with suppress(DataError):
            return read_model(path, _StateRecord).run
    return None


def _check_state(path: Path, run: str) -> int:
    """Read all of a committed state, and return its step; a DataError where it is damaged."""
    record = read_model(path / "state.json", _StateRecord)
    if record.fingerprint != fingerprint(record.model_dump(exclude={"fingerprint"})):
        raise DataError(f"{path / 'state.json'}: damaged: not what was written")
    if record.run != run:
        raise MismatchError(
            f"{path}: left by a run with another config, dataset or student; "
            "repeat its command, or take another --output, or --no-resume to start over"
        )
    with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:
        list(pool.map(_check_file, (_file(path, rank) for rank in range(len(record.sha256))), record.sha256))
    return record.step


def _check_file(file: Path, sha256: str) -> None:
    try:
        if file_sha256(file) != sha256:
            raise DataError(f"{file}: damaged: its sha256 is not the one in state.json")
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}") from error


def _file(path: Path, rank: int) -> Path:
    """The file of a process."""
    return path / (f"state-{rank}.safetensors" if rank else STATE)


def _place(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"
