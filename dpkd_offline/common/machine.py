"""What this machine has to spare."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from psutil import virtual_memory

# Where a kernel of either kind keeps a group's limit, what it takes, and in memory.stat what it would give back.
OF_ALL = ("memory.max", "memory.current", "inactive_file")
OF_MEMORY = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may still take: what the machine has, or where a job or a container is given less, what
    is left of that. A process that takes more is killed without a word."""
    of_machine: int = virtual_memory().available
    return min([of_machine, *_left_in_groups(root)])


def _left_in_groups(root: Path) -> Iterator[int]:
    """What is left of each limit on a control group that this process is in, or on one around it."""
    groups = root / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        limit, taken, given_back = OF_MEMORY if controllers else OF_ALL
        group = base / path.strip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(base):
                break
            if (folder / limit).exists() and (most := (folder / limit).read_text().strip()) != "max":
                facts = dict(fact.split() for fact in (folder / "memory.stat").read_text().splitlines())
                yield int(most) - int((folder / taken).read_text()) + int(facts.get(given_back, 0))
