"""How fast, and in how much memory, a large dataset is verified, inspected and streamed to training.

    python tests/benchmarks/million_pairs.py [ROWS ...] [--folder DIR]

Builds a synthetic dataset of each size (by default 100000 and 1000000 pairs; the latter takes 3 GB of disk while it
runs) in a temporary folder, under DIR if that is given, and prints for `verify`, for `inspect` and for one epoch of
the training stream, each in a fresh process: pairs per second, and the most memory that it had beyond the
interpreter with its imports done.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

MIB = 2**20
SHARD_ROWS = 256
VOCABULARY, EOS = 50_257, 50_256
PROMPT_TOKENS, RESPONSE_TOKENS = (30, 90), (10, 70)  # fewest and most
LETTERS_PER_TOKEN = 4
LIMIT = 1024 * MIB


def peak() -> int:
    """The most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def build(root: Path, rows: int) -> None:
    """Prompts, both responses and pairs, valid for `verify`, made without a model."""
    import hashlib

    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from dpkd_offline.dataset import Dataset, PromptDigest, PromptSet
    from dpkd_offline.files import write_json
    from dpkd_offline.records import (
        LOGPS,
        MESSAGES,
        SCHEMA_VERSION,
        STRINGS,
        TOKEN_IDS,
        PreferencePair,
        Prompt,
        Response,
    )
    from dpkd_offline.shards import ROW_GROUP_ROWS, ShardPlan, Table

    random = np.random.default_rng(0)
    letters = random.integers(97, 123, 4 * MIB, dtype=np.uint8).tobytes()

    def texts(lengths: np.ndarray) -> pa.Array:
        ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        start = int(random.integers(0, len(letters) - ends[-1]))
        return pa.StringArray.from_buffers(
            len(lengths), pa.py_buffer(ends.tobytes()), pa.py_buffer(letters[start : start + int(ends[-1])])
        )

    def lists(lengths: np.ndarray, values: np.ndarray, kind: pa.DataType) -> pa.Array:
        ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(ends), pa.array(values, kind.value_type), type=kind)

    def logps(lengths: np.ndarray) -> pa.Array:
        return lists(lengths, -random.exponential(2.0, int(lengths.sum())).astype(np.float32), LOGPS)

    def response(ids: pa.Array) -> pa.Table:
        lengths = random.integers(*RESPONSE_TOKENS, len(ids))
        tokens = random.integers(0, EOS, int(lengths.sum()))
        stopped = random.random(len(ids)) < 0.9
        tokens[np.cumsum(lengths)[stopped] - 1] = EOS
        finish = pa.array(np.where(stopped, "stop", "length"))
        columns = texts(LETTERS_PER_TOKEN * lengths), lists(lengths, tokens, TOKEN_IDS), finish, logps(lengths)
        return pa.table([ids, *columns], schema=Response.schema)

    def write(table: Table[object], shard: int, rows: pa.Table) -> None:
        path = table.path(shard)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(rows, path, compression="zstd", row_group_size=ROW_GROUP_ROWS, write_page_checksum=True)
        data, entry = path.read_bytes(), table.entry_path(shard)
        entry.parent.mkdir(exist_ok=True)
        said = {"file": path.name, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data), "rows": len(rows)}
        entry.write_text(json.dumps({**said, "schema_version": SCHEMA_VERSION}))

    def prompt_set(id_: str, longest: tuple[str, int]) -> PromptSet:
        return PromptSet(id_, "made", "none", "template", "tokenizer", "fingerprint", VOCABULARY, *longest, {})

    plan, digest = ShardPlan(rows, SHARD_ROWS), PromptDigest()
    dataset = Dataset(root, prompt_set("", ("", 1)), plan)
    tables = dataset.prompts, dataset.responses("teacher", 0), dataset.responses("student", 0), dataset.pairs(0)
    for shard in range(plan.count):
        count = plan.rows_of(shard)
        ids = pa.array([hashlib.sha256(f"{shard}.{row}".encode()).hexdigest()[:16] for row in range(count)])
        lengths = random.integers(*PROMPT_TOKENS, count)
        said = texts(LETTERS_PER_TOKEN * lengths)
        role = pa.array(["user"] * count)
        one_each = pa.array(np.arange(count + 1, dtype=np.int32))
        message = pa.StructArray.from_arrays([role, said], fields=list(MESSAGES.value_type))
        prompt_ids = lists(lengths, random.integers(0, EOS, int(lengths.sum())), TOKEN_IDS)
        reference = texts(np.full(count, 120))
        prompts = pa.table(
            [
                ids,
                pa.ListArray.from_arrays(one_each, message, type=MESSAGES),
                said,
                prompt_ids,
                pa.ListArray.from_arrays(one_each, reference, type=STRINGS),
            ],
            schema=Prompt.schema,
        )
        digest.update(prompts)
        y_t, y_s = response(ids), response(ids)
        pairs = pa.table(
            [
                *(ids, said, prompt_ids, reference),
                *(y_t["response"], y_t["response_ids"], y_t["finish_reason"]),
                *(y_s["response"], y_s["response_ids"], y_s["finish_reason"]),
                *(logps(pa.compute.list_value_length(y["response_ids"]).to_numpy()) for y in (y_t, y_s)),
                *(y_s["logps"], pa.array(np.zeros(count, dtype=np.int32))),
            ],
            schema=PreferencePair.schema,
        )
        for table, made in zip(tables, (prompts, y_t, y_s, pairs), strict=True):
            write(table, shard, made)
    id_ = digest.id("none", "template", "fingerprint")
    Dataset.create(root, prompt_set(id_, digest.longest), [], SHARD_ROWS)  # dataset.json only
    path = root / "dataset.json"
    said_shards = {"rows": rows, "shard_size": SHARD_ROWS, "count": plan.count}
    path.write_text(json.dumps({**json.loads(path.read_text()), "shards": said_shards}))
    model = {"name": "made", "revision": "0"}
    common = {"model": model, "vocab_size": VOCABULARY, "dtype": "float32", "engine": "none", "prompt_set": id_}
    sampled = {"stage": "generate", "round": 0, "eos_token_ids": [EOS], "sampling": {"max_new_tokens": 70}, **common}
    write_json(tables[1].folder / "_table.json", {"role": "teacher", **sampled})
    write_json(tables[2].folder / "_table.json", {"role": "student", **sampled})
    write_json(tables[3].folder / "_table.json", {"stage": "score-teacher", "round": 0, "student": model, **common})


def measure(what: str, root: Path) -> None:
    """Do one thing in this process; print its rows/s and its memory as JSON."""
    from dpkd_offline.config import TrainConfig
    from dpkd_offline.dataset import Dataset
    from dpkd_offline.inspection import inspect
    from dpkd_offline.pairs import pair_stream
    from dpkd_offline.verification import verify

    config = TrainConfig(dataset=root, student="none", output=Path("none"))

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
