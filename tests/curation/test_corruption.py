"""Whatever is wrong with a dataset or a recipe, a command says so: one line that names the place, and its exit code."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from helpers.damages import (
    Damage,
    both,
    cut,
    edited,
    flip,
    half,
    link_out,
    link_to_zeros,
    null,
    other_kind,
    put_first,
    put_last,
    recipe,
    remove,
    retyped,
    same_id_everywhere,
    schema,
    socket_at,
    source,
    table_of,
    text,
    values,
    without_pairs,
)
from helpers.tiny import TINY, vouch

from dpkd_offline import cli
from dpkd_offline.common.errors import DataError, DpkdError, MismatchError
from dpkd_offline.curation.verify import verify
from dpkd_offline.dataset.catalog import begun_tables
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.dataset.provenance import flat

STUDENT = "responses/student/round-000"
TEACHER = "responses/teacher"
PAIRS = "pairs/round-000"
HUGE = 5000  # a token id that no tiny model knows


@dataclass(frozen=True)
class Case:
    kind: str
    what: str
    damage: Damage
    code: int
    message: str  # a pattern in the line on stderr
    command: str = "verify"


FILE = {
    "prompts": r"prompts/prompts-00001-of-00003\.parquet",
    TEACHER: r"responses/teacher/responses-00001-of-00003\.parquet",
    STUDENT: r"responses/student/round-000/responses-00001-of-00003\.parquet",
    PAIRS: r"pairs/round-000/pairs-00001-of-00003\.parquet",
}
ENTRY = {name: "{}/_manifest/{}".format(*path.rsplit("/", 1)).replace("parquet", "json") for name, path in FILE.items()}


def place(name: str, row: int, column: str) -> str:
    return rf"{FILE[name]}: row {row}: column '{column}':? "


GOOD_RECIPE = "teacher: t\nstudent: s\noutput: o\ngenerate:\n  prompts: p\n"
HASH = ": its sha256 is not the one in "
TOKENIZERS = "only students may have others"

LOGPS = (
    (STUDENT, "logps", "response_ids", "verify"),
    (STUDENT, "logps", "response_ids", "inspect"),
    (PAIRS, "teacher_chosen_logps", "chosen_ids", "verify"),
    (PAIRS, "teacher_chosen_logps", "chosen_ids", "train"),
    (PAIRS, "teacher_rejected_logps", "rejected_ids", "verify"),
    (PAIRS, "behavior_rejected_logps", "rejected_ids", "verify"),
)


def on_logps(kind: str, change: Callable[[list[float]], list[float]], message: str) -> list[Case]:
    """A change to each column of log-probs."""
    return [
        Case(
            kind,
            f"{name if column == 'logps' else column}{', in ' + command if command != 'verify' else ''}"
            f"{'' if kind == 'length' else ' ' + str(change([0.0])[0])}",
            values(name, 6, **{column: change}),
            3,
            place(name, 6, column) + message + (of if kind == "length" else ""),
            command,
        )
        for name, column, of, command in LOGPS
    ]


def nothing(folder: Path) -> None:
    """The dataset is whole; what it is used with is wrong."""


LARGE = b" " * (5 << 20)
PLAN = {"rows": 10**12, "shard_size": 1, "count": 10**12}
KINDS = (
    ("pipe", os.mkfifo, "a pipe or a device, not a file"),
    ("link to a device", link_to_zeros, "a pipe or a device, not a file|a link that leads out of the dataset"),
    ("folder", os.mkdir, "a folder, not a file"),
    ("socket", socket_at, "cannot be read: No such device or address"),
)
OTHER_KINDS = (
    ("dataset.json", "dataset.json", r"dataset\.json", ("verify", "inspect", "train", "score", "generate")),
    ("_table.json", "pairs/*/_table.json", r"_table\.json", ("verify", "inspect", "train")),
    ("entry", "pairs/*/_manifest/*-00001-*", r"pairs-00001-of-00003\.json", ("inspect", "verify", "train")),
    ("shard", "pairs/*/*-00001-*", r"pairs-00001-of-00003\.parquet", ("inspect", "train")),
)


CASES = [
    # Parquet, cut short or with a byte changed
    Case("damaged file", "cut in half", cut(TEACHER, 0.5), 4, ENTRY[TEACHER] + ": bytes is"),
    Case("damaged file", "empty", cut("prompts", 0), 4, ENTRY["prompts"] + ": bytes is"),
    Case("damaged file", "cut, in train", cut(PAIRS, 0.9), 4, FILE[PAIRS] + HASH, "train"),
    Case("damaged file", "cut, in score-teacher", without_pairs(cut(STUDENT, 0.9)), 4, FILE[STUDENT] + HASH, "score"),
    Case("damaged file", "first byte", flip(PAIRS, 0), 4, FILE[PAIRS] + HASH),
    Case("damaged file", "data", flip(STUDENT, 0.3), 4, FILE[STUDENT] + HASH),
    Case("damaged file", "data, in inspect", flip(STUDENT, 0.3), 4, FILE[STUDENT] + HASH, "inspect"),
    Case("damaged file", "footer", flip("prompts", 0.95), 4, FILE["prompts"] + HASH),
    Case("damaged file", "footer, in train", flip(PAIRS, 0.95), 4, FILE[PAIRS] + HASH, "train"),
    Case("damaged file", "cut, vouched for", cut(PAIRS, 0.5, True), 3, FILE[PAIRS] + ": not a readable Parquet"),
    Case("damaged file", "empty, vouched for", cut(PAIRS, 0, True), 3, FILE[PAIRS] + ": not a readable Parquet"),
    Case("damaged file", "page, vouched for", flip(PAIRS, 0.3, True), 3, FILE[PAIRS] + ": not a readable Parquet"),
    # schema
    Case("schema", "missing", schema("prompts", lambda t: t.drop_columns(["references"])), 3,
         FILE["prompts"] + ": column 'references' is missing"),
    Case("schema", "missing, in train", schema(PAIRS, lambda t: t.drop_columns(["teacher_chosen_logps"])), 3,
         FILE[PAIRS] + ": column 'teacher_chosen_logps' is missing", "train"),
    Case("schema", "one more", schema(TEACHER, lambda t: t.append_column("score", pa.array([1.0] * len(t)))), 3,
         FILE[TEACHER] + ": column 'score' is unknown"),
    Case("schema", "renamed", schema(STUDENT, lambda t: t.rename_columns({"logps": "logprobs"})), 3,
         FILE[STUDENT] + ": column 'logps' is missing"),
    Case("schema", "twice", schema(STUDENT, lambda t: t.append_column(t.schema.field("id"), t["id"])), 3,
         FILE[STUDENT] + ": column 'id' stands twice"),
    Case("schema", "ids of 64 bits", retyped("prompts", "prompt_ids", pa.list_(pa.int64())), 3,
         FILE["prompts"] + r": column 'prompt_ids' is list<.*int64.*, the format has list<.*int32"),
    Case("schema", "log-probs of 64 bits", retyped(PAIRS, "teacher_rejected_logps", pa.list_(pa.float64())), 3,
         FILE[PAIRS] + r": column 'teacher_rejected_logps' is list<.*double", "inspect"),
    Case("schema", "another text type", retyped(TEACHER, "response", pa.large_string()), 3,
         FILE[TEACHER] + ": column 'response' is large_string not null, the format has string not null"),
    Case("schema", "another order", schema(TEACHER, lambda t: t.select(t.column_names[::-1])), 3,
         FILE[TEACHER] + ": the columns are not in the order id, response"),
    Case("schema", "fewer rows", schema(PAIRS, lambda t: t.slice(1)), 3,
         FILE[PAIRS] + ": 7 rows, the shard plan says 8", "train"),
    # nulls
    Case("null", "id", null("prompts", 2, "id"), 3, place("prompts", 2, "id") + "is null"),
    Case("null", "token id", null("prompts", 7, "prompt_ids", True), 3, place("prompts", 7, "prompt_ids") + "is null"),
    Case("null", "finish reason", null(TEACHER, 0, "finish_reason"), 3, place(TEACHER, 0, "finish_reason") + "is null"),
    Case("null", "log-probs", null(STUDENT, 4, "logps"), 3, place(STUDENT, 4, "logps") + "is null", "inspect"),
    Case("null", "log-prob", null(STUDENT, 4, "logps", True), 3, place(STUDENT, 4, "logps") + "is null"),
    Case("null", "text", null(PAIRS, 5, "chosen"), 3, place(PAIRS, 5, "chosen") + "is null"),
    Case("null", "round", null(PAIRS, 6, "round"), 3, place(PAIRS, 6, "round") + "is null"),
    Case("null", "teacher's log-prob, in train", null(PAIRS, 3, "teacher_chosen_logps", True), 3,
         place(PAIRS, 3, "teacher_chosen_logps") + "is null", "train"),
    # token ids that no model has, and lists without any
    Case("token id", "prompt", values("prompts", 1, prompt_ids=[5, HUGE]), 3,
         place("prompts", 1, "prompt_ids") + r"holds a token id that a vocabulary of \d+ has not"),
    Case("token id", "teacher", values(TEACHER, 2, response_ids=put_first(HUGE)), 3,
         place(TEACHER, 2, "response_ids") + "holds a token id that a vocabulary"),
    Case("token id", "student", values(STUDENT, 3, response_ids=put_first(HUGE)), 3,
         place(STUDENT, 3, "response_ids") + "holds a token id that a vocabulary"),
    Case("token id", "chosen, in train", values(PAIRS, 4, chosen_ids=put_first(HUGE)), 3,
         place(PAIRS, 4, "chosen_ids") + "holds a token id that a vocabulary", "train"),
    Case("token id", "rejected", values(PAIRS, 5, rejected_ids=put_first(HUGE)), 3,
         place(PAIRS, 5, "rejected_ids") + "holds a token id that a vocabulary"),
    Case("token id", "prompt of a pair, in train", values(PAIRS, 6, prompt_ids=[HUGE]), 3,
         place(PAIRS, 6, "prompt_ids") + "holds a token id that a vocabulary", "train"),
    Case("token id", "negative", values(TEACHER, 7, response_ids=put_first(-1)), 3,
         place(TEACHER, 7, "response_ids") + "holds a negative token id"),
    Case("token id", "no prompt", values("prompts", 7, prompt_ids=[]), 3,
         place("prompts", 7, "prompt_ids") + "is empty"),
    Case("token id", "no response, in inspect", values(TEACHER, 7, response_ids=[], logps=[]), 3,
         place(TEACHER, 7, "response_ids") + "is empty", "inspect"),
    # log-probs: one per token, finite, not above zero
    *on_logps("length", half, "has not one log-prob per token of "),
    *on_logps("not finite", put_last(float("nan")), "holds a log-prob that is not finite"),
    *on_logps("not finite", put_last(float("-inf")), "holds a log-prob that is not finite")[:2],
    *on_logps("positive", put_last(0.5), "holds a positive log-prob"),
    *on_logps("positive", put_last(float("inf")), "holds a log-prob that is not finite")[:1],
    # ids
    Case("id", "twice in a shard", values("prompts", 3, id="row-8"), 3,
         place("prompts", 3, "id") + "'row-8' stands in prompts-00001-of-00003.parquet, row 0, too"),
    Case("id", "twice in the dataset", values("prompts", 2, id="row-0"), 3,
         place("prompts", 2, "id") + "'row-0' stands in prompts-00000-of-00003.parquet, row 0, too"),
    Case("id", "twice, in every table", same_id_everywhere, 3, place("prompts", 2, "id") + "'row-0' stands in"),
    Case("id", "of another row", values(TEACHER, 4, id="row-0"), 3,
         place(TEACHER, 4, "id") + "is not the id of the prompt"),
    Case("id", "of no row", values(STUDENT, 4, id="x"), 3, place(STUDENT, 4, "id") + "is not the id of the prompt"),
    Case("id", "of another pair", values(PAIRS, 4, id="row-13"), 3,
         place(PAIRS, 4, "id") + "is not the id of the prompt"),
    Case("id", "of another row, in score-teacher", without_pairs(values(TEACHER, 4, id="row-0")), 3,
         place(TEACHER, 4, "id"), "score"),
    Case("id", "twice in a source", source('{"id": 1, "instruction": "a"}\n{"id": 1, "instruction": "b"}\n'), 3,
         r"p\.jsonl:2: column 'id': '1' stands on .*p\.jsonl:1 too", "enter"),
    # shards, manifest entries and tables that are not there
    Case("missing", "prompts", remove("prompts/*-00001-*"), 3, FILE["prompts"] + ": no such file, though its manifest"),
    Case("missing", "pairs", remove("pairs/*/*-00001-*"), 3, FILE[PAIRS] + ": no such file, though its manifest"),
    Case("missing", "pairs, in train", remove("pairs/*/*-00001-*"), 3, FILE[PAIRS] + ": not committed", "train"),
    Case("missing", "entry", remove("responses/teacher/_manifest/*-00001-*"), 3,
         FILE[TEACHER] + ": not committed; responses/teacher is only begun: 1 of 3 shards are missing"),
    Case("missing", "entry, in train", remove("pairs/*/_manifest/*-00001-*"), 3, FILE[PAIRS] + ": not committed",
         "train"),
    Case("missing", "entry, in score-teacher", without_pairs(remove("responses/student/*/_manifest/*-00001-*")), 3,
         FILE[STUDENT] + r": not committed \(1 of 3 shards", "score"),
    Case("missing", "the rest of a table", remove("pairs/*/*-0000[12]-*", "pairs/*/_manifest/*-0000[12]-*"), 3,
         FILE[PAIRS] + ": not committed; pairs/round-000 is only begun: 2 of 3 shards "
         "are missing, `dpkd-offline score-teacher` makes them"),
    Case("missing", "table", remove("pairs/*"), 3, r"pairs: no pairs yet", "train"),
    Case("missing", "provenance", remove("pairs/*/_table.json"), 3, r"pairs/round-000/_table\.json: no such file"),
    Case("missing", "dataset", remove("dataset.json"), 3, r"dataset\.json: no such file"),
    # what is no regular file, and what is larger than anything of ours
    *(Case("other kind", f"{name} a {what}, in {command}", other_kind(path, make), 3, f"{message}: {ending}", command)
      for name, path, message, commands in OTHER_KINDS
      for what, make, ending in KINDS
      for command in (commands if what == "pipe" else commands[:1])),
    *(Case("plan", f"of 10^12 shards, in {command}", edited("dataset.json", shards=PLAN), 3,
           r"-of-1000000000000\.parquet: not committed; the plan of .*dataset\.json has 1000000000000 shards", command)
      for command in ("verify", "inspect", "train", "score", "generate")),
    Case("plan", "of a row more than there is", edited("dataset.json", shards__rows=23), 4,
         r"00002-of-00003\.json: rows is 6, there is 7", "inspect"),
    Case("large", "dataset.json", text("dataset.json", LARGE), 3, r"dataset\.json: longer than 4,194,304 bytes"),
    Case("large", "entry", text("prompts/_manifest/prompts-00001-of-00003.json", LARGE), 3,
         r"prompts-00001-of-00003\.json: longer than 4,194,304 bytes", "inspect"),
    Case("large", "number", edited("pairs/*/_table.json", vocab_size=10**300), 3,
         "key 'vocab_size' is missing or wrong"),
    Case("large", "nesting", text("dataset.json", b'{"a": ' + b"[" * 300 + b"]" * 300 + b"}"), 3,
         r"dataset\.json: invalid JSON: 301 objects and lists within each other"),
    Case("not finite", "in _table.json", edited("pairs/*/_table.json", seed=float("nan")), 3,
         r"_table\.json: invalid JSON: Out of range float values"),
    Case("audit", "not an object", text("pairs/round-000/_audit.json", b"[1]"), 3,
         r"_audit\.json:1:1: expected a JSON object", "inspect"),
    Case("audit", "no rows", text("pairs/round-000/_audit.json", b'{"rows": "many"}'), 3,
         r"_audit\.json: key 'rows' is missing or wrong", "inspect"),
    # manifest entries that are not of their file
    Case("hash", "another", edited("pairs/*/_manifest/*-00001-*", sha256="0" * 64), 4, FILE[PAIRS] + HASH),
    Case("hash", "none", edited("pairs/*/_manifest/*-00001-*", sha256=...), 4,
         ENTRY[PAIRS] + ": key 'sha256' is missing or wrong", "train"),
    Case("hash", "no text", edited("prompts/_manifest/*-00001-*", sha256=7), 4,
         ENTRY["prompts"] + ": key 'sha256' is missing or wrong", "inspect"),
    Case("hash", "another size", edited("prompts/_manifest/*-00001-*", bytes=7), 4, ENTRY["prompts"] + ": bytes is 7"),
    Case("hash", "other rows", edited("prompts/_manifest/*-00001-*", rows=9), 4, ENTRY["prompts"] + ": rows is 9"),
    Case("hash", "a file outside", edited("prompts/_manifest/*-00001-*", file="../../x.parquet"), 4,
         ENTRY["prompts"] + r": file is '\.\./\.\./x\.parquet'"),
    Case("hash", "an absolute file", edited("prompts/_manifest/*-00001-*", file="/etc/passwd"), 4,
         ENTRY["prompts"] + ": file is '/etc/passwd'"),
    Case("hash", "another version", edited("pairs/*/_manifest/*-00001-*", schema_version=2), 4,
         ENTRY[PAIRS] + ": schema version 2, this program reads 1", "train"),
    Case("hash", "no JSON", text("prompts/_manifest/prompts-00001-of-00003.json", b"{"), 3,
         ENTRY["prompts"] + r":1:2: invalid JSON"),
    Case("hash", "no object", text("prompts/_manifest/prompts-00001-of-00003.json", b"[]"), 3,
         ENTRY["prompts"] + ":1:1: expected a JSON object"),
    Case("hash", "a link", link_out("prompts/*-00001-*"), 4, FILE["prompts"] + ": a link that leads out"),
    Case("hash", "a linked folder", link_out("pairs"), 4, r"pairs/round-000: a link that leads out"),
    Case("hash", "a shard of another plan", lambda folder: shutil.copy(
        folder / "prompts/prompts-00000-of-00003.parquet", folder / "prompts/prompts-00000-of-00009.parquet"), 3,
         r"prompts/prompts-00000-of-00009\.parquet: no shard of this dataset"),
    # who made it, from what
    Case("provenance", "tokenizer", edited("dataset.json", prompt_set__tokenizer_fingerprint="0"), 4,
         r"teacher/_table\.json: tokenizer_fingerprint is '[0-9a-f]+', that of the dataset is '0'"),
    Case("provenance", "tokenizer, in score-teacher",
         without_pairs(edited("dataset.json", prompt_set__tokenizer_fingerprint="0")), 4,
         rf"dataset\.json: the prompts were tokenised by llama \(0\).*{TOKENIZERS}", "score"),
    Case("provenance", "tokenizer of pairs", edited("pairs/*/_table.json", tokenizer_fingerprint="0"), 4,
         r"pairs/round-000/_table\.json: tokenizer_fingerprint is '0', that of the dataset"),
    Case("provenance", "scored by text", edited("pairs/*/_table.json", scored="text"), 4,
         r"pairs/round-000/_table\.json: scored is 'text', that of the dataset is 'ids'"),
    Case("provenance", "not exact", values(PAIRS, 4, rejected_exact=False), 3,
         place(PAIRS, 4, "rejected_exact") + "is false, though"),
    Case("provenance", "model of another tokenizer, in train", nothing, 4,
         r"pairs/round-000/_table\.json: these pairs are in the tokens of llama, and .* has another tokenizer",
         "train other"),
    Case("provenance", "model of another tokenizer, in score-teacher", remove("pairs"), 4,
         rf"dataset\.json: .*{TOKENIZERS}", "score other"),
    Case("provenance", "template", edited("dataset.json", prompt_set__template_fingerprint="0"), 4,
         r"dataset\.json: prompt_set\.id is not"),
    Case("provenance", "prompt set", edited("dataset.json", prompt_set__id="0"), 4,
         r"responses/teacher/_table\.json: prompt_set is '[0-9a-f]+', that of the dataset is '0'"),
    Case("provenance", "pairs of another prompt set", edited("pairs/*/_table.json", prompt_set="0"), 4,
         r"pairs/round-000/_table\.json: prompt_set is '0', that of the dataset"),
    Case("provenance", "another prompt", values("prompts", 2, prompt="x"), 3,
         place(PAIRS, 2, "prompt") + "is not that"),
    Case("provenance", "another reference", both(values("prompts", 2, references=["x"]), remove("pairs")), 4,
         r"dataset\.json: prompt_set\.id is not"),
    Case("provenance", "longest prompt", edited("dataset.json", prompt_set__longest_prompt_tokens=3), 4,
         r"dataset\.json: the longest prompt is 'row-\d+' of \d+ tokens, not"),
    Case("provenance", "teacher", edited("responses/teacher/_table.json", model__revision="0"), 4,
         r"pairs/round-000/_table\.json: model is"),
    Case("provenance", "teacher, in score-teacher",
         without_pairs(edited("responses/teacher/_table.json", model__revision="0")), 4,
         r"responses/teacher/_table\.json: .* score with the teacher that sampled", "score"),
    Case("provenance", "role", edited("responses/teacher/_table.json", role="student"), 4,
         r"teacher/_table\.json: role is"),
    Case("provenance", "no engine, in inspect", edited("responses/teacher/_table.json", engine=...), 3,
         r"responses/teacher/_table\.json: key 'engine' is missing", "inspect"),
    Case("provenance", "vocabulary", edited("responses/teacher/_table.json", vocab_size="many"), 3,
         r"responses/teacher/_table\.json: key 'vocab_size' is missing or wrong"),
    Case("provenance", "shard plan", edited("dataset.json", shards__count=4), 3,
         r"dataset\.json: shards: 22 rows, 8 a shard, are 3 shards, not 4"),
    Case("provenance", "no rows", edited("dataset.json", shards__rows=0), 3, r"dataset\.json: key 'shards\.rows'"),
    # pairs that are not of these responses, responses that do not end as they say
    *(Case("pair", column, values(PAIRS, 3, **{column: new}), 3, place(PAIRS, 3, column) + "is not ")
      for column, new in (
          ("prompt", "x"), ("prompt_ids", [5]), ("reference", "x"), ("chosen", "x"), ("rejected", "x"), ("round", 1),
          ("chosen_ids", put_first(7)), ("rejected_ids", put_first(7)),
          ("behavior_rejected_logps", put_last(-77.0)))),
    Case("pair", "finish reason", values(PAIRS, 3, chosen_finish_reason="tired"), 3,
         place(PAIRS, 3, "chosen_finish_reason") + "is neither 'stop' nor 'length'"),
    Case("pair", "stop without EOS", values(TEACHER, 3, finish_reason="stop", response_ids=put_last(7)), 3,
         place(TEACHER, 3, "finish_reason") + "is 'stop', but the last token is no EOS"),
    Case("pair", "EOS without stop", values(STUDENT, 3, finish_reason="length", response_ids=put_last(1)), 3,
         place(STUDENT, 3, "finish_reason") + "is 'length', but the last token is an EOS"),
    # recipes
    Case("recipe", "unknown key", recipe(GOOD_RECIPE + "  temprature: 1\n"), 2,
         r"r\.yaml:6:3: generate: unknown key 'temprature'; did you mean 'temperature'", "distill"),
    Case("recipe", "unknown section", recipe(GOOD_RECIPE + "trian:\n  beta: 1\n"), 2,
         r"r\.yaml:6:1: unknown key 'trian'; did you mean 'train'", "distill"),
    Case("recipe", "wrong type", recipe(GOOD_RECIPE + "train:\n  beta: much\n"), 2, r"r\.yaml:7:3: train: 'beta'",
         "distill"),
    Case("recipe", "wrong choice", recipe(GOOD_RECIPE + "train:\n  objective: dpo\n"), 2, r"r\.yaml:7:3: .*'objective'",
         "distill"),
    Case("recipe", "section of another kind", recipe(GOOD_RECIPE + "train: 7\n"), 2, r"r\.yaml:6:1: 'train'",
         "distill"),
    Case("recipe", "no YAML", recipe(GOOD_RECIPE + "train: {beta: 1\n"), 2, r"r\.yaml:7:1: expected", "distill"),
    Case("recipe", "a tab", recipe("teacher: t\n\tstudent: s\n"), 2, r"r\.yaml:2:1: found character", "distill"),
    Case("recipe", "a list", recipe("- teacher\n- student\n"), 2, r"r\.yaml:1:1: expected a mapping", "distill"),
    Case("recipe", "not UTF-8", recipe(b"teacher: \xff\n"), 2, r"r\.yaml: not UTF-8", "distill"),
    Case("recipe", "a control character", recipe("teacher: \x00\n"), 2, r"r\.yaml: ", "distill"),
    Case("recipe", "without teacher", recipe(GOOD_RECIPE.replace("teacher: t\n", "")), 2,
         r"r\.yaml.* 'teacher' is required", "distill"),
    Case("recipe", "two students", recipe(GOOD_RECIPE + "init_student:\n  layers: 2\n"), 2,
         r"r\.yaml.* give either student .* or init_student", "distill"),
    Case("recipe", "empty", recipe(""), 2, r"r\.yaml.* is required", "distill"),
    Case("recipe", "no section for the command", recipe(GOOD_RECIPE), 2, r"r\.yaml: no section 'train'",
         "train recipe"),
    Case("recipe", "wrong type, in the command", recipe(GOOD_RECIPE + "train:\n  epochs: 0\n"), 2,
         r"r\.yaml:7:3: train: 'epochs'", "train recipe"),
]  # fmt: skip
CLASSES = {
    *("damaged file", "schema", "null", "token id", "length", "not finite", "positive", "id", "missing", "hash"),
    *("provenance", "pair", "recipe"),
}
ATTACKS = {"audit", "plan", "large", "other kind"}  # few of each, which all commands meet in the same functions


def test_there_are_enough_of_each_kind() -> None:
    counts = Counter(case.kind for case in CASES)
    assert counts.keys() == CLASSES | ATTACKS
    assert min(counts[kind] for kind in CLASSES) >= 6
    assert len(CASES) >= 72
    assert len({(case.kind, case.what) for case in CASES}) == len(CASES)


# --- the commands that meet it --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, students: dict[str, Path]) -> Path:
    """A student whose tokenizer knows one token more."""
    from dpkd_offline.models.info import ModelInfo

    folder = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(students["llama"], folder)
    tokenizer = ModelInfo(str(folder)).tokenizer
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    return folder


def arguments(command: str, folder: Path, teacher: Path, student: Path, other: Path) -> list[object]:
    if command.endswith(" other"):
        teacher = student = other
    data = ["--dataset", folder]
    train = ["train", "--student", student, "--output", folder.parent / "out", *data]
    generate = ["generate", "--role", "student", "--round", 1, "--model", student, *TINY]
    recipe = folder.parent / "r.yaml"
    return {
        "verify": ["verify", folder],
        "inspect": ["inspect", folder],
        "train": train,
        "train recipe": [*train, "--config", recipe],
        "score": ["score-teacher", "--model", teacher, *data, *TINY],
        "generate": [*generate, *data],
        "enter": [*generate, "--dataset", folder.parent / "new", "--prompts", folder.parent / "p.jsonl"],
        "distill": ["distill", recipe],
    }[command.removesuffix(" other")]  # fmt: skip


def run_here(values: list[object], monkeypatch: pytest.MonkeyPatch) -> object:
    """The command line in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["dpkd-offline", *map(str, values)])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return ended.value.code


PROGRESS = ("prompts: ", "engine: ", "check ", "verify: ", "inspect ", "score-teacher: ", "Loading weights")


def check(case: Case, code: object, output: str, errors: str) -> None:
    assert code == case.code, errors
    assert output == ""
    lines = [line for line in errors.splitlines() if line and not line.startswith(PROGRESS)]
    assert len(lines) == 1, errors
    assert re.search("^dpkd-offline: .*" + case.message, lines[0]), lines[0]


@pytest.fixture
def folder(tmp_path: Path, datasets_by_family: dict[str, Path]) -> Path:
    return shutil.copytree(datasets_by_family["llama"], tmp_path / "ds")


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind}-{case.what}".replace(" ", "-"))
def test_one_line_says_what_is_wrong_and_where(
    case: Case,
    folder: Path,
    teachers: dict[str, Path],
    students: dict[str, Path],
    other: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    case.damage(folder)
    capfd.readouterr()
    code = run_here(arguments(case.command, folder, teachers["llama"], students["llama"], other), monkeypatch)
    check(case, code, *capfd.readouterr())
    assert not (folder.parent / "out").exists()


PROCESSES = {
    ("damaged file", "data"),
    ("not finite", "teacher_chosen_logps, in train nan"),
    ("id", "of another row, in score-teacher"),
    ("provenance", "no engine, in inspect"),
    ("recipe", "unknown key"),
}
IN_A_PROCESS = [case for case in CASES if (case.kind, case.what) in PROCESSES]


@pytest.mark.slow
@pytest.mark.parametrize("case", IN_A_PROCESS, ids=lambda case: case.kind.replace(" ", "-"))
def test_so_does_a_process_of_its_own(
    case: Case,
    folder: Path,
    teachers: dict[str, Path],
    students: dict[str, Path],
    other: Path,
    run_cli: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    assert len(IN_A_PROCESS) == len(PROCESSES)
    case.damage(folder)
    done = run_cli(*arguments(case.command, folder, teachers["llama"], students["llama"], other), cwd=folder.parent)
    check(case, done.returncode, done.stdout, done.stderr)


# --- bytes at random ------------------------------------------------------------------------------------------------


def flips(data: bytes, random: np.random.Generator, count: int) -> Iterator[bytes]:
    """The data with one other byte, many times over."""
    places, masks = random.integers(0, len(data), count), random.integers(1, 256, count)
    for place, mask in zip(places.tolist(), masks.tolist(), strict=True):
        yield data[:place] + bytes([data[place] ^ mask]) + data[place + 1 :]


def test_every_flipped_byte_and_every_cut_of_a_shard_is_noticed(folder: Path) -> None:
    random = np.random.default_rng(0)
    shards = [(table, shard) for table in begun_tables(Dataset.open(folder)) for shard in range(table.plan.count)]
    outcomes: Counter[str] = Counter()
    for table, shard in shards:
        path = table.path(shard)
        data = path.read_bytes()
        cuts = [data[:length] for length in random.integers(0, len(data), 20).tolist()]
        for damaged in (*flips(data, random, -(-2000 // len(shards))), *cuts):
            path.write_bytes(damaged)
            with pytest.raises((DataError, MismatchError)) as caught:
                table.read_arrow(shard)
            assert path.name in str(caught.value)
            outcomes[type(caught.value).__name__] += 1
        path.write_bytes(data)
    print(f"\n{outcomes.total()} flips and cuts of {len(shards)} shards: {dict(outcomes)}")
    assert outcomes.total() >= 2000 + 20 * len(shards)
    verify(folder)


def test_a_flipped_byte_that_the_manifest_vouches_for_is_an_error_or_another_table(folder: Path) -> None:
    """Where the hash is right, the format's own checks are left: a page's checksum, the schema, the values."""
    random = np.random.default_rng(1)
    table = table_of(folder, PAIRS)
    data, outcomes = table.path(1).read_bytes(), Counter[str]()
    for damaged in flips(data, random, 300):
        table.path(1).write_bytes(damaged)
        vouch(table, 1)
        try:
            verify(folder)
            outcomes["read as something else"] += 1
        except DpkdError as error:
            outcomes[type(error).__name__] += 1
    print(f"\n300 flips that are vouched for: {dict(outcomes)}")
    assert outcomes["DataError"] > 150


# Nobody but people reads these; and a vocabulary may be said to be larger than it is, and any token to end responses of
# which none has ended.
FOR_PEOPLE = {
    "dataset.json": r"prompt_set\.(source|tokenizer|vocab_size|license|rows\..*|taken\..*)",
    "_table.json": r"(config|versions)\..*|model\.name|student\.name|dtype|engine|seed|vocab_size|sampling\..*|round|"
    "license|eos_token_ids",
}


def test_flipped_bytes_of_json_are_noticed_or_harmless(folder: Path) -> None:
    random = np.random.default_rng(2)
    outcomes: Counter[tuple[str, str]] = Counter()
    for path in sorted(folder.rglob("*.json")):
        data = path.read_bytes()
        kind = path.name if path.name in FOR_PEOPLE else "manifest"
        for damaged in flips(data, random, 150 if kind in FOR_PEOPLE else 40):
            path.write_bytes(damaged)
            try:
                verify(folder)
            except DpkdError as error:
                outcomes[kind, type(error).__name__] += 1
                continue
            before, after = flat(json.loads(data)), flat(json.loads(damaged))
            changed = {key for key in before if before[key] != after.get(key)}
            assert all(re.fullmatch(FOR_PEOPLE.get(kind, ""), key) for key in changed), changed
            outcomes[kind, "for people only" if changed else "the same value"] += 1
        path.write_bytes(data)
    print("".join(f"\n{kind}, {outcome}: {count}" for (kind, outcome), count in sorted(outcomes.items())))
    assert outcomes["manifest", "MismatchError"] > 80
    assert not outcomes["manifest", "for people only"]
