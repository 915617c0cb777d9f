"""A dataset of any number of pairs, made in no time without a model, for the benchmarks of memory."""

from __future__ import annotations

import json
import resource
from pathlib import Path

MIB = 2**20
SHARD_ROWS = 256
VOCABULARY = 50_257
PROMPT_TOKENS, RESPONSE_TOKENS = (30, 90), (10, 70)  # fewest and most
LETTERS_PER_TOKEN = 4


def peak() -> int:
    """The most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def build(root: Path, rows: int, vocabulary: int = VOCABULARY, tokenizer: str = "fingerprint", *names: str) -> None:
    """Prompts, both responses and pairs, valid for `verify`; with `names` only the tables called so.

    Args:
        vocabulary: the number of token ids, of which the last ends a response.
        tokenizer: the fingerprint of the tokenizer that the prompts are said to be of.
    """
    import hashlib

    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from dpkd_offline.common.files import write_json
    from dpkd_offline.dataset.columns import ShardStats
    from dpkd_offline.dataset.dataset import Dataset, PromptDigest, PromptSet
    from dpkd_offline.dataset.schema import (
        LOGPS,
        MESSAGES,
        SCHEMA_VERSION,
        STRINGS,
        TOKEN_IDS,
        PreferencePair,
        Prompt,
        Response,
    )
    from dpkd_offline.dataset.table import ShardPlan, Table
    from dpkd_offline.dataset.writing import ROW_GROUP_ROWS

    eos = vocabulary - 1
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
        tokens = random.integers(0, eos, int(lengths.sum()))
        stopped = random.random(len(ids)) < 0.9
        tokens[np.cumsum(lengths)[stopped] - 1] = eos
        finish = pa.array(np.where(stopped, "stop", "length"))
        columns = texts(LETTERS_PER_TOKEN * lengths), lists(lengths, tokens, TOKEN_IDS), finish, logps(lengths)
        return pa.table([ids, *columns, pa.array(np.zeros(len(ids), dtype=np.int32))], schema=Response.schema)

    def write(table: Table[object], shard: int, rows: pa.Table) -> None:
        path = table.path(shard)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(rows, path, compression="zstd", row_group_size=ROW_GROUP_ROWS, write_page_checksum=True)
        data, entry = path.read_bytes(), table.entry_path(shard)
        entry.parent.mkdir(exist_ok=True)
        described = {
            "file": path.name,
            "sha256": hashlib.sha256(data).hexdigest(),
            "bytes": len(data),
            "rows": len(rows),
        }
        facts = ShardStats.of(rows).model_dump()
        entry.write_text(json.dumps({**described, "schema_version": SCHEMA_VERSION, "facts": facts}))

    def prompt_set(id_: str, longest: tuple[str, int]) -> PromptSet:
        return PromptSet(id_, "made", "none", "template", "tokenizer", tokenizer, vocabulary, *longest, {})

    plan, digest = ShardPlan(rows, SHARD_ROWS), PromptDigest()
    dataset = Dataset(root, prompt_set("", ("", 1)), plan)
    tables = dataset.prompts, dataset.responses("teacher", 0), dataset.responses("student", 0), dataset.pairs(0)
    for shard in range(plan.count):
        count = plan.rows_of(shard)
        ids = pa.array([hashlib.sha256(f"{shard}.{row}".encode()).hexdigest()[:16] for row in range(count)])
        lengths = random.integers(*PROMPT_TOKENS, count)
        contents = texts(LETTERS_PER_TOKEN * lengths)
        role = pa.array(["user"] * count)
        one_each = pa.array(np.arange(count + 1, dtype=np.int32))
        message = pa.StructArray.from_arrays([role, contents], fields=list(MESSAGES.value_type))
        prompt_ids = lists(lengths, random.integers(0, eos, int(lengths.sum())), TOKEN_IDS)
        reference = texts(np.full(count, 120))
        prompts = pa.table(
            [
                ids,
                pa.ListArray.from_arrays(one_each, message, type=MESSAGES),
                contents,
                prompt_ids,
                pa.ListArray.from_arrays(one_each, reference, type=STRINGS),
            ],
            schema=Prompt.schema,
        )
        digest.update(prompts)
        y_t, y_s = response(ids), response(ids)
        pairs = pa.table(
            [
                *(ids, contents, prompt_ids, reference),
                *(y_t["response"], y_t["response_ids"], y_t["finish_reason"]),
                *(y_s["response"], y_s["response_ids"], y_s["finish_reason"]),
                *(logps(pa.compute.list_value_length(y["response_ids"]).to_numpy()) for y in (y_t, y_s)),
                *(pa.array(np.ones(count, dtype=np.bool_)) for _ in range(2)),
                *(y_s["logps"], y_s["round"]),
            ],
            schema=PreferencePair.schema,
        )
        for table, rows_of_table in zip(tables, (prompts, y_t, y_s, pairs), strict=True):
            if not names or table.name in names:
                write(table, shard, rows_of_table)
    id_ = digest.id("none", "template", tokenizer)
    Dataset.create(root, prompt_set(id_, digest.longest), [], SHARD_ROWS)  # dataset.json only
    path = root / "dataset.json"
    said_shards = {"rows": rows, "shard_size": SHARD_ROWS, "count": plan.count}
    path.write_text(json.dumps({**json.loads(path.read_text()), "shards": said_shards}))
    model = {"name": "made", "revision": "0"}
    common = {"model": model, "vocab_size": vocabulary, "dtype": "float32", "engine": "none", "prompt_set": id_}
    common |= {"tokenizer_fingerprint": tokenizer}
    sampled = {"stage": "generate", "round": 0, "eos_token_ids": [eos], "sampling": {"max_new_tokens": 70}, **common}
    said_of = (
        {"role": "teacher", **sampled},
        {"role": "student", **sampled},
        {"stage": "score-teacher", "round": 0, "student": model, "scored": "ids", **common},
    )
    for table, who in zip(tables[1:], said_of, strict=True):
        if not names or table.name in names:
            write_json(table.folder / "_table.json", who)
