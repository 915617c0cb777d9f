"""The program that runs a stage in several processes on this machine, as torch's and Accelerate's launchers would.

Those end with 1 whatever the processes ended with, and `distill` has to know why a stage ended: by this one's code.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from dpkd_offline.common.errors import Interrupted
from dpkd_offline.common.process import SIGNALS, STDIN

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}  # as Accelerate's launcher says it
WAYS: dict[str, dict[str, str]] = {"ddp": {}, "fsdp": FSDP}
POLL_SECONDS = 0.2
LAST_SECONDS = 60.0  # that the others may take to end after the first one that failed


def launched(processes: int, way: str, command: Sequence[str]) -> list[str]:
    """The command that runs another one in so many processes, by `ddp` or `fsdp`."""
    return [sys.executable, "-m", __name__, str(processes), way, *command]


def run(processes: int, way: str, command: Sequence[str]) -> int:
    """Start the processes, hand on signals, and wait for all. Returns the exit code of the first one that failed, or
    minus the number of the signal that ended it."""
    common = {**os.environ, "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), **WAYS[way]}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    common.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    ranks = [
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # whose end says that this process has ended
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(processes)
    ]

    def hand_on(number: int, _: Any) -> None:
        for rank in ranks:
            rank.send_signal(number)  # nothing, to one that has ended

    for number in SIGNALS:
        signal.signal(number, hand_on)
    return _ended(ranks)


def _ended(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    failure, last = 0, float("inf")
    while [rank for rank in ranks if rank.poll() is None]:
        time.sleep(POLL_SECONDS)
        if not failure and (codes := [rank.returncode for rank in ranks if rank.returncode]):
            # One that was killed told the others nothing, and they wait for it.
            failure, last = codes[0], time.monotonic() + (LAST_SECONDS if min(codes) > 0 else 0.0)
        if time.monotonic() > last:
            for rank in ranks:
                rank.kill()
    return failure or next((rank.returncode for rank in ranks if rank.returncode), 0)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _end_with_parent() -> None:
    """End when nobody holds the other end of the standard input: then the processes end, too, by theirs."""

    def watch() -> None:
        os.read(STDIN, 1)
        os._exit(Interrupted.exit_code)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """Run it, and end as the first process that failed has ended."""
    _end_with_parent()
    code = run(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
    if code < 0:
        if -code in SIGNALS:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


if __name__ == "__main__":
    main()
