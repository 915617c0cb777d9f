from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from dpkd_offline.common import machine
from dpkd_offline.common.machine import available_memory

GIB = 2**30
V1, V2 = "4:cpu,cpuacct:/\n3:memory:/slurm/job_7\n0::/\n", "0::/slurm/job_7\n"


def group(folder: Path, version: int, limit: str, taken: int, files: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{taken}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{'total_' if version == 1 else ''}inactive_file {files}\n")


@pytest.mark.parametrize("version", [1, 2])
def test_a_job_that_is_given_less_than_the_machine_has(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine_has = psutil.virtual_memory()._replace(available=64 * GIB)
    monkeypatch.setattr(machine, "virtual_memory", lambda: machine_has)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(V1 if version == 1 else V2)
    assert available_memory(tmp_path) == 64 * GIB  # where groups are not to be seen
    base = tmp_path / "sys/fs/cgroup" / ("memory" if version == 1 else "")
    no_limit = "max" if version == 2 else "9223372036854771712"
    group(base / "slurm/job_7", version, no_limit, 3 * GIB, GIB)
    assert available_memory(tmp_path) == 64 * GIB
    group(base / "slurm", version, str(16 * GIB), 10 * GIB, 2 * GIB)  # of all jobs together
    assert available_memory(tmp_path) == 8 * GIB
    group(base / "slurm/job_7", version, str(4 * GIB), 3 * GIB, GIB)
    assert available_memory(tmp_path) == 2 * GIB


def test_this_machine() -> None:
    assert 0 < available_memory() <= psutil.virtual_memory().total
