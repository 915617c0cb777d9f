"""`subset --pairs`: pairs by rule of several samples, by the teacher's log-probs or by scores that others gave."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.faults import start
from helpers.runs import metrics_of, train_config
from helpers.tiny import files_of, generate_config, rows, score_config, write_jsonl

from dpkd_offline.common.errors import DataError, DpkdError, MismatchError, UsageError
from dpkd_offline.config.data import MergeConfig, SubsetConfig
from dpkd_offline.curation.merge import merge, subset
from dpkd_offline.curation.verify import verify
from dpkd_offline.dataset.catalog import begun_tables
from dpkd_offline.dataset.columns import draws_of
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.generation.generate import generate
from dpkd_offline.generation.score_teacher import score_teacher
from dpkd_offline.training.preflight import log_correction
from dpkd_offline.training.trainer import train

PROMPTS = 11  # in shards of 8
TABLES = ["prompts", "responses/teacher", "responses/student/round-000", "pairs/round-000", "top_k/round-000"]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory, teachers: dict[str, Path], students: dict[str, Path]) -> Path:
    """Three samples of the teacher and two of the student, with the teacher's likeliest tokens."""
    folder = tmp_path_factory.mktemp("samples")
    prompts = str(write_jsonl(folder / "prompts.jsonl", rows(PROMPTS)))
    generate(generate_config(folder / "all", "teacher", teachers["llama"], prompts=prompts, samples=3))
    generate(generate_config(folder / "all", "student", students["llama"], samples=2))
    score_teacher(score_config(folder / "all", teachers["llama"], top_k=3))
    return folder / "all"


@pytest.fixture(scope="module")
def scored(samples: Path) -> list[dict[str, Any]]:
    """Scores of all responses, with ties, in no order."""
    draw = random.Random(3)
    scores = [
        {"id": f"row-{n}", "sample": k, "score": draw.randrange(4) / 2, "role": role}
        for n in range(PROMPTS)
        for role, count in (("teacher", 3), ("student", 2))
        for k in range(count)
    ]
    draw.shuffle(scores)
    return scores


def paired(dataset: object, output: Path, rule: str, **options: object) -> Path:
    return subset(SubsetConfig.model_validate({"dataset": dataset, "output": output, "pairs": rule, **options})).path


def read(folder: Path, name: str) -> list[Any]:
    table = next(table for table in begun_tables(Dataset.open(folder)) if table.name == name)
    return [row for shard in range(table.plan.count) for row in table.read(shard)]


class Sampled:
    """All rows of a dataset with samples, by table and sample."""

    def __init__(self, folder: Path, student: str | None = None) -> None:
        views = Dataset.open(folder, student).samples()

        def all_rows(table: Any) -> list[Any]:
            shards = range(table.plan.count) if table.folder.exists() else []
            return [row for shard in shards for row in table.read(shard)]

        self.y_t = [found for view in views if (found := all_rows(view.responses("teacher", 0)))]
        self.y_s = [found for view in views if (found := all_rows(view.responses("student", 0)))]
        self.pairs = [all_rows(view.pairs(0)) for view in views]
        self.top = [all_rows(view.top_k(0)) for view in views]


def mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


def expected(of: Sampled, rule: str, scores: list[dict[str, Any]] | None = None) -> list[tuple[int, int, int, float]]:
    """Row, sample of y_t, sample of y_s and the difference of their scores, for each pair."""
    given = {(s["role"], s["id"], s["sample"]): s["score"] for s in scores or []}
    out = []
    for n, pair in enumerate(of.pairs[0]):
        teacher = [mean(of.pairs[t][n].teacher_chosen_logps) for t in range(len(of.y_t))]
        student = [mean(of.pairs[s][n].teacher_rejected_logps) for s in range(len(of.y_s))]
        if scores is not None:
            teacher = [given["teacher", pair.id, t] for t in range(len(of.y_t))]
            student = [given["student", pair.id, s] for s in range(len(of.y_s))]
        best, worst = teacher.index(max(teacher)), student.index(min(student))
        chosen = {
            "each": [(t, s) for t in range(len(teacher)) for s in range(len(student))],
            "best": [(best, 0)],
            "best-worst": [(best, worst)],
        }[rule]
        out += [(n, t, s, teacher[t] - student[s]) for t, s in chosen]
    return out


def check(out: Path, of: Sampled, wanted: list[tuple[int, int, int, float]], several: bool, student: str = "") -> None:
    """That all tables of a dataset hold just these pairs."""
    y_t, y_s = read(out, "responses/teacher"), read(out, f"{student}responses/student/round-000")
    pairs, prompts = read(out, f"{student}pairs/round-000"), read(out, "prompts")
    top = read(out, f"{student}top_k/round-000") if of.top[0] else [None] * len(pairs)
    assert len(prompts) == len(wanted)
    for prompt, teacher, student_, pair, likeliest, (n, t, s, _) in zip(
        prompts, y_t, y_s, pairs, top, wanted, strict=True
    ):
        id_ = of.pairs[0][n].id + (f"::pair-t{t}s{s}" if several else "")
        assert prompt.id == id_
        assert teacher == replace(of.y_t[t][n], id=id_)
        assert student_ == replace(of.y_s[s][n], id=id_)
        from_t = {k: getattr(of.pairs[t][n], k) for k in vars(pair) if "chosen" in k}
        from_s = {k: getattr(of.pairs[s][n], k) for k in vars(pair) if "rejected" in k or k == "round"}
        assert pair == replace(of.pairs[0][n], id=id_, **from_t, **from_s)
        if likeliest is not None:
            from_t = {k: getattr(of.top[t][n], k) for k in vars(likeliest) if "chosen" in k}
            assert likeliest == replace(of.top[s][n], id=id_, **from_t)


@pytest.mark.parametrize("by", ["logp", "scores"])
@pytest.mark.parametrize("rule", ["each", "best", "best-worst"])
def test_pairs_by_each_rule_are_those_of_plain_python(
    samples: Path, scored: list[dict[str, Any]], rule: str, by: str, tmp_path: Path
) -> None:
    of, several = Sampled(samples), rule == "each"
    scores = scored if by == "scores" else None
    wanted = expected(of, rule, scores)
    options: dict[str, object] = {}
    if scores is not None:
        options["scores"] = write_jsonl(tmp_path / "scores.jsonl", scores)
        options |= {"min_gap": -9} if several else {}
    out = paired(samples, tmp_path / "out", rule, **options)
    check(out, of, wanted, several)
    assert verify(out).rows == dict.fromkeys(TABLES, len(wanted))

    # ... those whose scores differ by enough, and whose teacher's margin is large enough, in the order of the prompts.
    gap = sorted(difference for *_, difference in wanted)[len(wanted) // 2]
    some = paired(samples, tmp_path / "some", rule, **{**options, "min_gap": gap})
    check(some, of, left := [pair for pair in wanted if pair[-1] >= gap], several)
    assert 0 < len(left) < len(wanted)
    margins = paired(samples, tmp_path / "margins", rule, **options, min_margin=0.5, limit=4)
    left = [
        (n, t, s, difference)
        for n, t, s, difference in wanted
        if mean(of.pairs[t][n].teacher_chosen_logps) - mean(of.pairs[s][n].teacher_rejected_logps) >= 0.5
    ]
    check(margins, of, left[:4], several)


def test_of_equal_scores_the_lowest_sample_is_taken(samples: Path, tmp_path: Path) -> None:
    scores = [
        {"id": f"row-{n}", "sample": k, "score": {0: 1, 1: 2, 2: 2}[k] if role == "teacher" else -1, "role": role}
        for n in range(PROMPTS)
        for role, count in (("teacher", 3), ("student", 2))
        for k in range(count)
    ]
    out = paired(samples, tmp_path / "out", "best-worst", scores=write_jsonl(tmp_path / "s.jsonl", scores))
    check(out, Sampled(samples), [(n, 1, 0, 3.0) for n in range(PROMPTS)], several=False)


def test_a_student_with_a_name_and_other_tokens(teachers: dict[str, Path], foreign: Path, tmp_path: Path) -> None:
    folder, prompts = tmp_path / "all", str(write_jsonl(tmp_path / "prompts.jsonl", rows(5)))
    generate(generate_config(folder, "teacher", teachers["gpt2"], prompts=prompts, samples=2))
    generate(generate_config(folder, "student", foreign, student_name="bytes", samples=3))
    score_teacher(score_config(folder, teachers["gpt2"], student=str(foreign), student_name="bytes"))
    of = Sampled(folder, "bytes")
    for rule in ("each", "best-worst"):
        out = paired(folder, tmp_path / rule, rule, student_name="bytes")
        check(out, of, expected(of, rule), rule == "each", "students/bytes/")
        assert set(verify(out).rows) == {
            *("prompts", "responses/teacher", "students/bytes/prompts/student"),
            *(f"students/bytes/{name}/round-000" for name in ("responses/student", "pairs")),
        }
    with pytest.raises(UsageError, match="no student 'other'; there is: bytes"):
        paired(folder, tmp_path / "none", "each", student_name="other")


def test_who_made_what_by_which_rule_is_said(
    samples: Path, scored: list[dict[str, Any]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    scores = write_jsonl(tmp_path / "judge.jsonl", scored)
    wanted = expected(Sampled(samples), "best-worst", scored)
    out = paired(samples, tmp_path / "out", "best-worst", scores=scores)
    assert f"subset: {PROMPTS} pairs; 0 of {PROMPTS} prompts have none" in capfd.readouterr().err
    pairs, y_t = (json.loads((out / f"{name}/_table.json").read_text()) for name in ("pairs/round-000", TABLES[1]))
    sha256 = hashlib.sha256(scores.read_bytes()).hexdigest()
    assert pairs["rule"]["scores"] == {"file": "judge.jsonl", "sha256": sha256}
    assert (pairs["rule"]["pairs"], pairs["rule"]["samples"]) == ("best-worst", {"teacher": 3, "student": 2})
    assert [(part["sample"], part["rows"], part["rows_of_y_t"]) for part in pairs["parts"]] == [
        (k, sum(s == k for _, _, s, _ in wanted), sum(t == k for _, t, _, _ in wanted)) for k in range(3)
    ]
    assert [part["rows"] for part in y_t["parts"]] == [part["rows_of_y_t"] for part in pairs["parts"]]
    assert [part["made"].get("sample", 0) for part in y_t["parts"]] == [0, 1, 2]
    assert "sample" not in y_t and y_t["sampling"]["max_new_tokens"] == 12
    assert (
        "`subset`: pairs `best-worst` of 3 y_t and 2 y_s of each prompt by the scores in `judge.jsonl`, model `llama`"
    ) in (out / "README.md").read_text()
    assert Dataset.open(out).prompt_set.rows["outside_subset"] == 0


def test_pairs_by_rule_are_trained_on_and_get_another_round(
    samples: Path, teachers: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    out = paired(samples, tmp_path / "out", "each", share=0.7)
    for objective in ("dpkd", "kd"):
        train(train_config(out, students["llama"], tmp_path / objective, max_steps=2, objective=objective))
        assert len(metrics_of(tmp_path / objective)) == 2
    generate(generate_config(out, "student", tmp_path / "dpkd", round=1, share=0.5))
    score_teacher(score_config(out, teachers["llama"], round=1))
    assert "pairs/round-001" in verify(out).rows
    again = subset(SubsetConfig(dataset=out, output=tmp_path / "again", limit=5)).path
    assert verify(again).rows["pairs/round-000"] == 5


def test_all_pairs_of_a_prompt_are_held_out_or_none(samples: Path, tmp_path: Path) -> None:
    ids = [f"row-{n}" for n in range(200)]
    of_prompts = draws_of(pa.chunked_array([ids]))
    for suffix in ("::pair-t2s0", "::pair-0a9f", "::pair-00::pair-t0s11"):
        assert (draws_of(pa.chunked_array([[id_ + suffix for id_ in ids]])) == of_prompts).all()
    assert (draws_of(pa.chunked_array([["a::pair-T1", "a::pair-", "a::pair", "::pair-a b"]])) != of_prompts[0]).all()
    # A share takes a prompt with all of its pairs, too.
    out = paired(samples, tmp_path / "out", "each", share=0.5)
    prompts = [prompt.id.partition("::pair-")[0] for prompt in read(out, "prompts")]
    assert 0 < len(set(prompts)) < PROMPTS
    assert len(prompts) == 6 * len(set(prompts))


def test_killed_and_repeated_is_the_same_to_the_byte(
    samples: Path, scored: list[dict[str, Any]], tmp_path: Path
) -> None:
    scores = write_jsonl(tmp_path / "scores.jsonl", scored)
    calm, out = tmp_path / "calm", tmp_path / "out"
    paired(samples, calm, "best-worst", scores=scores)
    command = ["subset", samples, out, "--pairs", "best-worst", "--scores", scores]
    kills = 0
    while True:
        point = ("half written", "before link", "before folder fsync")[kills % 3]
        process = start(command, point, passes=4 * kills)
        process.join(120)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
        with pytest.raises(DpkdError):
            verify(out)
    assert kills >= 5
    assert files_of(out) == files_of(calm)
    scores.write_text(scores.read_text() + "\n")
    with pytest.raises(MismatchError, match=r"was made with rule\.scores\.sha256="):
        paired(samples, out, "best-worst", scores=scores)


def test_scores_may_stand_in_files_of_other_kinds(samples: Path, scored: list[dict[str, Any]], tmp_path: Path) -> None:
    of_teacher = [{k: v for k, v in s.items() if k != "role"} for s in scored if s["role"] == "teacher"]
    header = "id,sample,score,why\n"
    cells = "".join(f"{s['id']},{s['sample']},{s['score']},\n" for s in of_teacher)
    files = [write_jsonl(tmp_path / "s.jsonl", of_teacher), tmp_path / "s.csv", tmp_path / "s.json.gz"]
    files[1].write_text(header + cells)
    files[2].write_bytes(gzip.compress(json.dumps(of_teacher).encode()))
    pq.write_table(pa.Table.from_pylist(of_teacher), tmp_path / "s.parquet")
    files.append(tmp_path / "s.parquet")
    wanted = expected(of := Sampled(samples), "best", scored)
    for number, file in enumerate(files):
        check(paired(samples, tmp_path / f"out-{number}", "best", scores=file), of, wanted, several=False)


WRONG: dict[str, tuple[Callable[[list[dict[str, Any]]], object], str]] = {
    "an unknown id": (
        lambda s: s[4].update(id="row-99"),
        r"s\.jsonl:5: column 'id': no prompt of \S+ is called 'row-99'",
    ),
    "no id": (lambda s: s[4].pop("id"), r"s\.jsonl:5: column 'id' is missing"),
    "an unknown sample": (
        lambda s: s[4].update(sample=3, role="student"),
        r"s\.jsonl:5: column 'sample' is 3, the student has 2 samples, counted from 0",
    ),
    "no number of a sample": (lambda s: s[4].update(sample=1.5), r"s\.jsonl:5: column 'sample' is 1\.5, and must be"),
    "an unknown role": (lambda s: s[4].update(role="judge"), r"s\.jsonl:5: column 'role' is 'judge', and must be t"),
    "no number": (lambda s: s[4].update(score="good"), r"s\.jsonl:5: column 'score' is 'good', and must be a finite"),
    "infinite": (lambda s: s[4].update(score="inf"), r"s\.jsonl:5: column 'score' is 'inf', and must be a finite"),
    "too large": (lambda s: s[4].update(score=10**400), r"s\.jsonl:5: column 'score' is 1000"),
    "true": (lambda s: s[4].update(score=True), r"s\.jsonl:5: column 'score' is True"),
    "nothing": (lambda s: s[4].update(score=None), r"s\.jsonl:5: column 'score' is None"),
    "twice": (
        lambda s: s.append(s[0]),
        r"s\.jsonl:56: column 'id': 'row-\d+', sample \d of the \w+ has a score already",
    ),
    "missing": (
        lambda s: s.remove(
            next(one for one in s if (one["id"], one["sample"], one["role"]) == ("row-9", 1, "student"))
        ),
        r"s\.jsonl: no row with id 'row-9', sample 1 and role student: 1 of 22 scores of the student are missing",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_scores_that_cannot_be_are_refused_with_file_row_and_column(
    samples: Path, scored: list[dict[str, Any]], wrong: str, tmp_path: Path
) -> None:
    change, message = WRONG[wrong]
    scores = [dict(score) for score in scored]
    change(scores)
    with pytest.raises(DataError, match=message):
        paired(samples, tmp_path / "out", "best-worst", scores=write_jsonl(tmp_path / "s.jsonl", scores))
    assert not (tmp_path / "out").exists()


def test_samples_that_are_missing_or_unlike_are_refused(
    samples: Path, teachers: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    copy = shutil.copytree(samples, tmp_path / "copy")
    provenance = copy / "samples/001/pairs/round-000/_table.json"
    provenance.write_text(provenance.read_text().replace('"float32"', '"bfloat16"'))
    with pytest.raises(MismatchError, match=r"001/pairs/round-000/_table.json: dtype is bfloat16, that of sample 0 "):
        paired(copy, tmp_path / "out", "each")
    shutil.rmtree(copy / "samples/002/top_k")
    shutil.copytree(samples / "samples/001/pairs", copy / "samples/001/pairs", dirs_exist_ok=True)
    assert "top_k/round-000" not in verify(paired(copy, tmp_path / "no-top-k", "each")).rows
    shutil.rmtree(copy / "samples/002/pairs")
    with pytest.raises(DataError, match=r"samples/002/pairs/round-000: not there, .*; run `dpkd-offline score-tea"):
        paired(copy, tmp_path / "out", "each")
    shutil.rmtree(copy / "samples/001/responses/teacher")
    with pytest.raises(DataError, match=r"samples/002/responses/teacher: sample 1 is missing; run `dpkd-offline gene"):
        paired(copy, tmp_path / "out", "each")
    with pytest.raises(UsageError, match=r"has several samples, and --min-score is of the one y_t of a row; say with"):
        subset(SubsetConfig(dataset=samples, output=tmp_path / "out", scores=tmp_path / "s", min_score=1))
    assert not (tmp_path / "out").exists()


def test_pairs_by_rule_are_combined_again(samples: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    both = [paired(samples, tmp_path / rule, rule) for rule in ("each", "best-worst")]
    joined = merge(MergeConfig.model_validate({"output": tmp_path / "joined", "parts": both})).path
    assert verify(joined).rows["pairs/round-000"] == 7 * PROMPTS
    for folder, is_said in ((both[0], False), (both[1], True), (joined, True)):
        capfd.readouterr()
        log_correction(Dataset.open(folder), 0)
        assert ("y_s are the worst of several samples" in capfd.readouterr().err) is is_said
    # ... and so are samples, whole.
    some = subset(SubsetConfig(dataset=samples, output=tmp_path / "some", limit=5)).path
    check(paired(some, tmp_path / "of-some", "best"), Sampled(some), expected(Sampled(some), "best"), several=False)


def test_one_sample_of_each_role_keeps_its_ids(samples: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(samples, tmp_path / "one", ignore=shutil.ignore_patterns("samples"))
    out = paired(folder, tmp_path / "out", "each", min_gap=0.25)
    margins = {
        pair.id: mean(pair.teacher_chosen_logps) - mean(pair.teacher_rejected_logps)
        for pair in read(folder, "pairs/round-000")
    }
    assert [pair.id for pair in read(out, "pairs/round-000")] == [i for i, margin in margins.items() if margin >= 0.25]
