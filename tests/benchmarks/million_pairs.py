"""How fast, and in how much memory, a large dataset is verified, inspected and streamed to training.

    python tests/benchmarks/million_pairs.py [ROWS ...] [--folder DIR]

Builds a synthetic dataset of each size (by default 100000 and 1000000 pairs; the latter takes 3 GB of disk while it
runs) in a temporary folder, under DIR if that is given, and prints for `verify`, for `inspect` and for one epoch of
the training stream, each in a fresh process: pairs per second, and the most memory that it had beyond the
interpreter with its imports done.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from made_pairs import MIB, build, peak

LIMIT = 1024 * MIB


def measure(what: str, root: Path) -> None:
    """Do one thing in this process; print its rows/s and its memory as JSON."""
    from dpkd_offline.config.train import TrainConfig
    from dpkd_offline.curation.inspect import inspect
    from dpkd_offline.curation.verify import verify
    from dpkd_offline.dataset.dataset import Dataset
    from dpkd_offline.training.examples import pair_stream

    config = TrainConfig(dataset=root, student="none", output=Path("none"), holdout=0.0)

    def survey_and_epoch() -> None:
        stream, _ = pair_stream(Dataset.open(root), config, 2**31)
        print(f"  check before the first step: {len(stream) / (time.monotonic() - started):,.0f} pairs/s")
        epoch = time.monotonic()
        count = sum(1 for _ in stream.epoch(0))
        assert count == len(stream)
        print(f"  one epoch of the stream:     {count / (time.monotonic() - epoch):,.0f} pairs/s")

    todo: dict[str, Callable[[], object]] = {
        "verify": lambda: verify(root),
        "inspect": lambda: inspect(root),
        "train": survey_and_epoch,
    }
    base, started, worked = peak(), time.monotonic(), time.process_time()
    todo[what]()
    rows, seconds, memory = Dataset.open(root).plan.rows, time.monotonic() - started, peak() - base
    print(
        f"{what:<8} {rows:>9,} pairs  {rows / seconds:>8,.0f} pairs/s  {seconds:>6.1f} s  "
        f"({time.process_time() - worked:.1f} s of CPU)  {memory / MIB:>6.0f} MiB over {base / MIB:.0f} MiB"
    )
    assert memory < LIMIT, "more than 1 GiB"


def main() -> None:
    if sys.argv[1:2] == ["build"]:
        return build(Path(sys.argv[2]), int(sys.argv[3]))
    if sys.argv[1:2] == ["measure"]:
        return measure(sys.argv[2], Path(sys.argv[3]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=int, nargs="*", default=[100_000, 1_000_000])
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    # Each step is a process of its own: a parent with much memory would hand its peak down.
    step = [sys.executable, __file__]
    for rows in options.rows:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            root, started = Path(folder) / "dataset", time.monotonic()
            subprocess.run([*step, "build", str(root), str(rows)], check=True)
            size = sum(path.stat().st_size for path in root.rglob("*.parquet"))
            print(f"built {rows:,} pairs, {size / 1e9:.2f} GB, in {time.monotonic() - started:.0f} s", flush=True)
            for what in ("verify", "inspect", "train"):
                subprocess.run([*step, "measure", what, str(root)], check=True, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
