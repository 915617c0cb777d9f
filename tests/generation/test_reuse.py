"""Later rounds cost what is new in them, and their tables are those of a round that was made as a whole."""

from __future__ import annotations

import shutil
import signal
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from helpers.faults import start
from helpers.tiny import TINY, build_model, files_of, generate_config, replace_shard, rows, score_config, write_jsonl

from dpkd_offline.common.errors import DataError, Interrupted, MismatchError, UsageError
from dpkd_offline.config.data import GenerateConfig
from dpkd_offline.config.recipe import validated
from dpkd_offline.curation.inspect import inspect
from dpkd_offline.curation.verify import verify
from dpkd_offline.dataset.columns import draws_of
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.dataset.schema import R, to_table
from dpkd_offline.dataset.table import Table
from dpkd_offline.engines.transformers import TransformersEngine
from dpkd_offline.generation.generate import generate
from dpkd_offline.generation.reuse import is_drawn
from dpkd_offline.generation.score_teacher import score_teacher

ROWS = 60
SHARE = 0.1


@dataclass
class Counted:
    """What the engine was asked, by its verbs; a run may be stopped after some answers."""

    loaded: int = 0
    sampled: list[tuple[int, int]] = field(default_factory=list)
    scored: list[tuple[tuple[int, int], int]] = field(default_factory=list)  # and of how many responses
    answers_left: int = 10**6

    def clear(self) -> None:
        self.loaded, self.sampled, self.scored = 0, [], []


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """The real engine, watched."""
    seen = Counted()
    load, sample, score = TransformersEngine.__init__, TransformersEngine.generate, TransformersEngine.score

    def note(groups: Iterable[Sequence[Any]], asked: list[Any], what: Any) -> Iterator[Sequence[Any]]:
        for group in groups:
            assert group  # to Ray, an empty one says that there is no other for the moment
            asked += map(what, group)
            yield group

    def some(answers: Iterator[Any]) -> Iterator[Any]:
        for answer in answers:
            if not seen.answers_left:
                raise Interrupted("stopped")
            seen.answers_left -= 1
            yield answer

    def init(engine: TransformersEngine, *rest: Any) -> None:
        seen.loaded += 1
        load(engine, *rest)

    monkeypatch.setattr(TransformersEngine, "__init__", init)
    monkeypatch.setattr(
        TransformersEngine, "generate", lambda e, g, *r: some(sample(e, note(g, seen.sampled, lambda q: q.key), *r))
    )
    monkeypatch.setattr(
        TransformersEngine,
        "score",
        lambda e, g, *r: some(score(e, note(g, seen.scored, lambda q: (q.key, len(q.responses))), *r)),
    )
    return seen


@pytest.fixture(scope="module")
def later(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student after some training."""
    return build_model("llama", tmp_path_factory.mktemp("later"), seed=5)


@pytest.fixture(scope="module")
def first_round(
    tmp_path_factory: pytest.TempPathFactory, teachers: dict[str, Path], students: dict[str, Path], foreign: Path
) -> Path:
    """Round 0 of two students, one of which has another tokenizer."""
    folder = tmp_path_factory.mktemp("first") / "ds"
    source = write_jsonl(folder.parent / "prompts.jsonl", rows(ROWS))
    generate(generate_config(folder, "teacher", teachers["llama"], prompts=str(source)))
    generate(generate_config(folder, "student", students["llama"]))
    generate(generate_config(folder, "student", foreign, student_name="bytes"))
    score_teacher(score_config(folder, teachers["llama"], top_k=3))
    score_teacher(score_config(folder, teachers["llama"], student=str(foreign), student_name="bytes"))
    return folder


@pytest.fixture
def folder(first_round: Path, tmp_path: Path) -> Path:
    return shutil.copytree(first_round, tmp_path / "ds")


def whole(table: Table[Any]) -> pa.Table:
    return pa.concat_tables([table.read_arrow(shard) for shard in range(table.plan.count)])


def close(rows: pa.Table, expected: pa.Table) -> None:
    """The same rows, but for log-probs that differ by rounding."""
    for name in rows.column_names:
        if name.endswith(("logps", "mass")):
            values = [t[name].combine_chunks().flatten() for t in (rows, expected)]
            assert values[0].equals(values[1]) or np.allclose(
                *(np.concatenate([np.ravel(x) for x in t[name].to_pylist()]) for t in (rows, expected)),
                rtol=0,
                atol=1e-5,
            )
        else:
            assert rows[name].to_pylist() == expected[name].to_pylist(), name


@pytest.mark.parametrize("name", [None, "bytes"], ids=["ids", "text"])
def test_a_tenth_is_a_tenth_of_the_work_and_the_same_rows(
    name: str | None, folder: Path, teachers: dict[str, Path], later: Path, foreign: Path, counted: Counted
) -> None:
    student = later if name is None else foreign
    options = {"student": str(student) if name else None, "student_name": name, "round": 1, "top_k": 0 if name else 3}
    full = shutil.copytree(folder, folder.parent / "full")
    generate(generate_config(full, "student", student, student_name=name, round=1))
    assert len(counted.sampled) == ROWS
    counted.clear()
    score_teacher(score_config(full, teachers["llama"], **options))
    assert sorted(counted.scored) == [((n // 8, n % 8), 1) for n in range(ROWS)]  # y_t is not scored again

    counted.clear()
    config = generate_config(folder, "student", student, student_name=name, round=1, share=SHARE)
    sampled, scored = generate(config), score_teacher(score_config(folder, teachers["llama"], **options))
    drawn = [n for n in range(ROWS) if is_drawn(config, f"row-{n}")]
    places = [(n // 8, n % 8) for n in drawn]
    assert 3 <= len(drawn) <= 10 and {shard for shard, _ in places} < set(range(8))  # a shard has nothing new
    of_shard = Counter(shard for shard, _ in places)
    asked = [(shard, n) for shard, count in of_shard.items() for n in range(count)]  # requests are counted by shard
    assert (sorted(counted.sampled), sorted(counted.scored)) == (asked, [(place, 1) for place in places])
    assert counted.loaded == 2  # once to sample, once to score
    assert (sampled.rows, sampled.sampled) == (ROWS, len(drawn))
    assert (scored.rows, scored.scored, scored.reused) == (ROWS, len(drawn), 2 * ROWS - len(drawn))

    kept = [n for n in range(ROWS) if n not in drawn]
    tenth, regenerated = (Dataset.open(root, name) for root in (folder, full))
    kinds = [lambda d, r: d.responses("student", r), Dataset.pairs, *([] if name else [Dataset.top_k])]
    for table in kinds:
        reusing, before, fresh = (whole(table(*which)) for which in ((tenth, 1), (tenth, 0), (regenerated, 1)))
        assert reusing.take(kept).equals(before.take(kept))
        close(reusing.take(drawn), fresh.take(drawn))
        if "round" in reusing.column_names:
            assert reusing["round"].to_pylist() == [int(n in drawn) for n in range(ROWS)]
    assert tenth.pairs(1).require_provenance()["reused_from"] == 0
    assert set(verify(folder).rows.values()) == set(verify(full).rows.values()) == {ROWS}
    report = inspect(folder)["tables"][tenth.pairs(1).name]
    assert report["of an earlier round"]["mean"] == pytest.approx(len(kept) / ROWS)
    assert "what round 0 has scored is taken over from there" in (folder / "README.md").read_text()


def test_without_a_share_a_round_is_what_it_was(
    folder: Path, teachers: dict[str, Path], later: Path, counted: Counted
) -> None:
    """Scored as a whole where the round before has no pairs: the same numbers as those that are taken over."""
    apart = shutil.copytree(folder, folder.parent / "apart")
    for table in ("pairs", "top_k"):
        shutil.rmtree(apart / table)
    for root in (folder, apart):
        generate(generate_config(root, "student", later, round=1, share=1.0))
        counted.clear()
        score_teacher(score_config(root, teachers["llama"], round=1))
    assert {count for _, count in counted.scored} == {2} and len(counted.scored) == ROWS
    reusing, fresh = (Dataset.open(root) for root in (folder, apart))
    assert fresh.pairs(1).require_provenance()["reused_from"] is None
    assert whole(reusing.responses("student", 1)).equals(whole(fresh.responses("student", 1)))
    close(whole(reusing.pairs(1)), whole(fresh.pairs(1)))
    assert set(verify(apart).rows.values()) == {ROWS}


def test_a_round_that_is_killed_and_goes_on_is_the_same(folder: Path, teachers: dict[str, Path], later: Path) -> None:
    killed = shutil.copytree(folder, folder.parent / "killed" / "ds")
    kills = 0
    for root in (folder, killed):
        common = ["--dataset", root, "--round", 1, "--batch-size", 4, *TINY]
        sample = ["generate", "--role", "student", "--model", later, "--share", 0.3, "--max-new-tokens", 12, *common]
        for arguments in (sample, ["score-teacher", "--model", teachers["llama"], "--top-k", 3, *common]):
            for passes in (3, 8) if root == killed else ():
                process = start(arguments, "before link", passes)
                process.join(120)
                kills += process.exitcode == -signal.SIGKILL
            process = start(arguments)
            process.join(120)
            assert process.exitcode == 0
    assert kills == 4
    assert files_of(killed) == files_of(folder)
    assert set(verify(killed).rows.values()) == {ROWS}


def test_draws_are_even_and_are_not_those_of_the_holdout() -> None:
    ids = [f"row-{n}" for n in range(20_000)]

    def drawn(**values: object) -> np.ndarray:
        config = GenerateConfig.model_validate({"dataset": "d", "role": "student", "model": "m", **values})
        return np.array([is_drawn(config, id_) for id_ in ids])

    first, second = drawn(round=1, share=0.1), drawn(round=2, share=0.1)
    held_out = draws_of(pa.chunked_array([ids])) < 0.1
    assert first.mean() == pytest.approx(0.1, abs=0.007)
    for other in (second, held_out, drawn(round=1, share=0.1, seed=1)):
        assert (first & other).mean() == pytest.approx(0.01, abs=0.003)
    assert not (first & ~drawn(round=1, share=0.2)).any()  # a larger share answers more, and those as well
    assert drawn(round=1, share=1.0).all()


def test_what_cannot_be_kept_is_refused(
    folder: Path, teachers: dict[str, Path], later: Path, foreign: Path, tmp_path: Path
) -> None:
    for role, round in (("teacher", 0), ("student", 0)):
        with pytest.raises(UsageError, match="share below 1 is for role 'student' from round 1 on"):
            values = {"dataset": folder, "role": role, "model": str(later), "round": round, "share": 0.5}
            validated(GenerateConfig, values)
    before = files_of(folder)
    with pytest.raises(DataError, match=r"no round 1; there is: 0; `dpkd-offline generate --role student --round 1`"):
        generate(generate_config(folder, "student", later, round=2, share=0.5))
    with pytest.raises(MismatchError, match=r"round-000/_table\.json: tokenizer_fingerprint is not that of"):
        generate(generate_config(folder, "student", foreign, round=1, share=0.5))
    assert {k: v for k, v in files_of(folder).items() if not k.startswith("prompts/student")} == before
    generate(generate_config(folder, "student", later, round=1, share=0.5))
    with pytest.raises(MismatchError, match=r"share=0\.5, this command has share=0\.4"):
        generate(generate_config(folder, "student", later, round=1, share=0.4))


def test_only_what_would_be_the_same_is_taken_over(
    folder: Path, teachers: dict[str, Path], later: Path, counted: Counted, capsys: pytest.CaptureFixture[str]
) -> None:
    generate(generate_config(folder, "student", later, round=1, share=SHARE))
    other = shutil.copytree(folder, folder.parent / "other")
    score_teacher(score_config(other, teachers["llama"], round=1, dtype="bfloat16"))
    assert "pairs/round-000: has another dtype; nothing is taken over from there" in capsys.readouterr().err
    assert [count for _, count in counted.scored] == [2] * ROWS
    assert set(verify(other).rows.values()) == {ROWS}

    counted.clear()
    score_teacher(score_config(folder, teachers["llama"], round=1, top_k=2))  # round 0 has another k
    dataset = Dataset.open(folder)
    provenances = dataset.pairs(1).require_provenance(), dataset.top_k(1).require_provenance()
    assert [one["reused_from"] for one in provenances] == [0, None]
    assert [count for _, count in counted.scored] == [2] * ROWS
    kept = np.flatnonzero(whole(dataset.pairs(1))["round"].to_numpy() == 0)
    assert whole(dataset.pairs(1)).take(kept).equals(whole(dataset.pairs(0)).take(kept))
    assert set(verify(folder).rows.values()) == {ROWS}


def test_a_round_goes_on_as_it_began(folder: Path, teachers: dict[str, Path], later: Path, counted: Counted) -> None:
    generate(generate_config(folder, "student", later, round=1, share=0.5))
    config = score_config(folder, teachers["llama"], round=1)
    dataset = Dataset.open(folder)

    def begin() -> None:
        counted.answers_left = 10
        with pytest.raises(Interrupted):
            score_teacher(config)
        counted.answers_left = 10**6
        counted.clear()
        assert 0 < len(dataset.pairs(1).entries()) < 8

    begin()
    away = folder.parent / "away"
    (folder / "pairs/round-000").rename(away)
    with pytest.raises(DataError, match="pairs/round-000: is not there, but pairs/round-001 was begun with its log-p"):
        score_teacher(config)
    shutil.rmtree(folder / "pairs/round-001")
    begin()  # without those of round 0, which come back then
    away.rename(folder / "pairs/round-000")
    score_teacher(config)
    assert {count for _, count in counted.scored} == {2}
    assert dataset.pairs(1).require_provenance()["reused_from"] is None
    shutil.rmtree(folder / "pairs/round-000")
    counted.clear()
    score_teacher(config)
    assert not counted.loaded


def test_pairs_of_other_responses_are_not_taken_over(folder: Path, teachers: dict[str, Path], later: Path) -> None:
    generate(generate_config(folder, "student", later, round=1, share=0.5))
    table = Dataset.open(folder).responses("teacher", 0)
    responses = table.read(2)
    responses[3] = replace(responses[3], response_ids=[7, *responses[3].response_ids[1:]])
    replace_shard(table, 2, to_table(responses, table.record.schema))
    with pytest.raises(DataError, match=r"round-000/pairs-00002-.*row 3: column 'chosen_ids' is not that of the resp"):
        score_teacher(score_config(folder, teachers["llama"], round=1))


def change(table: Table[R], number: int, **values: object) -> None:
    """Write other values into a row, manifest and all."""
    shard, row = divmod(number, 8)
    changed = table.read(shard)
    changed[row] = replace(changed[row], **values)
    replace_shard(table, shard, to_table(changed, table.schema))


def test_verify_holds_kept_rows_to_the_round_before(folder: Path, teachers: dict[str, Path], later: Path) -> None:
    config = generate_config(folder, "student", later, round=1, share=0.5)
    generate(config)
    score_teacher(score_config(folder, teachers["llama"], round=1, top_k=3))
    kept = next(n for n in range(ROWS) if not is_drawn(config, f"row-{n}"))
    new = next(n for n in range(ROWS) if is_drawn(config, f"row-{n}"))
    before = files_of(folder)
    responses, pairs, top_k = (
        getattr(Dataset.open(folder), kind)(*args)
        for kind, args in (("responses", ("student", 1)), ("pairs", (1,)), ("top_k", (1,)))
    )
    pair, likeliest = pairs.read(kept // 8)[kept % 8], top_k.read(new // 8)[new % 8]
    changes: list[tuple[Table[Any], int, dict[str, Any], str]] = [
        (responses, kept, {"response": "x"}, "'response' is not that of responses/student/round-000"),
        (responses, new, {"round": 2}, "'round' is not from 0 to 1, the folder's"),
        (pairs, new, {"round": 0}, "'round' is not that of responses/student/round-001"),
        (pairs, kept, {"teacher_rejected_logps": [-9.0] * len(pair.rejected_ids)}, "'teacher_rejected_logps' is not t"),
        (pairs, kept, {"teacher_chosen_logps": [-9.0] * len(pair.chosen_ids)}, "'teacher_chosen_logps' is not that of"),
        (
            top_k,
            new,
            {
                "chosen_top_ids": [
                    [*ids[:2], next(n for n in range(9) if n not in ids)] for ids in likeliest.chosen_top_ids
                ]
            },
            "'chosen_top_ids' is not that of top_k/round-000",
        ),
    ]
    for table, number, values, message in changes:
        change(table, number, **values)
        with pytest.raises(DataError, match=f"{table.path(number // 8).name}: row {number % 8}: column {message}"):
            verify(folder)
        for name, data in before.items():
            (folder / name).write_bytes(data)


def test_a_further_student_costs_its_own_responses_and_a_twin_nothing(
    folder: Path, teachers: dict[str, Path], students: dict[str, Path], later: Path, counted: Counted
) -> None:
    first, teacher = Dataset.open(folder), teachers["llama"]
    generate(generate_config(folder, "student", later, student_name="later"))
    counted.clear()
    scored = score_teacher(score_config(folder, teacher, student_name="later", top_k=3))
    assert sorted(counted.scored) == [((n // 8, n % 8), 1) for n in range(ROWS)]  # y_s; y_t as for the first student
    assert (scored.scored, scored.reused) == (ROWS, ROWS)
    further = Dataset.open(folder, "later")
    for table in (Dataset.pairs, Dataset.top_k):
        own, of_first = (whole(table(dataset, 0)) for dataset in (further, first))
        for name in (name for name in own.column_names if "chosen" in name):
            assert own[name].equals(of_first[name]), name
        assert table(further, 0).require_provenance()["reused_student"] == ""
    apart = shutil.copytree(folder, folder.parent / "apart")
    for kept in ("pairs", "top_k", "students/later/pairs", "students/later/top_k"):
        shutil.rmtree(apart / kept)
    score_teacher(score_config(apart, teacher, student_name="later", top_k=3))
    close(whole(further.pairs(0)), whole(Dataset.open(apart, "later").pairs(0)))

    counted.clear()
    for twin, model, source in (("twin", students["llama"], first), ("a.seed-1", later, further)):
        generate(generate_config(folder, "student", model, student_name=twin))
        score_teacher(score_config(folder, teacher, student_name=twin, top_k=3))
        dataset = Dataset.open(folder, twin)
        for table in (lambda d, r: d.responses("student", r), Dataset.pairs, Dataset.top_k):
            assert whole(table(dataset, 0)).equals(whole(table(source, 0)))
        assert dataset.pairs(0).require_provenance()["reused_student"] == (source.student or "")
    assert (counted.loaded, counted.sampled, counted.scored) == (0, [], [])  # no model was loaded
    assert set(verify(folder).rows.values()) == {ROWS}
    assert "what round 0 of the student `later` has scored is taken over" in (folder / "README.md").read_text()

    generate(generate_config(folder, "student", later, student_name="seed", seed=7))
    assert counted.loaded == 1 and len(counted.sampled) == ROWS
    shutil.rmtree(folder / "students/later/pairs")
    shutil.rmtree(folder / "students/a.seed-1/pairs/round-000/_manifest")
    with pytest.raises(DataError, match=r"students/later/pairs/round-000: is not there, but .* was begun with its"):
        score_teacher(score_config(folder, teacher, student_name="a.seed-1", top_k=3))
