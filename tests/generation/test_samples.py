"""Several responses of a prompt: each sample is a table of its own, drawn once, and each response is scored once."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from helpers.faults import POINTS, start
from helpers.tiny import TINY, build_model, files_of, generate_config, replace_shard, rows, score_config, write_jsonl

from dpkd_offline.common.errors import DataError, MismatchError
from dpkd_offline.config.engines import ENGINES
from dpkd_offline.curation.verify import verify
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.dataset.table import Table
from dpkd_offline.engines.transformers import TransformersEngine
from dpkd_offline.generation.generate import generate
from dpkd_offline.generation.score_teacher import score_teacher

ROWS = 22


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A word for each engine that is loaded."""
    seen: list[str] = []
    load = TransformersEngine.__init__

    def init(engine: TransformersEngine, *rest: Any) -> None:
        seen.append("load")
        load(engine, *rest)

    monkeypatch.setattr(TransformersEngine, "__init__", init)
    return seen


@pytest.fixture(scope="module")
def one(
    tmp_path_factory: pytest.TempPathFactory, source: Path, teachers: dict[str, Path], students: dict[str, Path]
) -> Path:
    """A dataset of one sample."""
    folder = tmp_path_factory.mktemp("one") / "ds"
    generate(generate_config(folder, "teacher", teachers["llama"], prompts=str(source)))
    generate(generate_config(folder, "student", students["llama"]))
    score_teacher(score_config(folder, teachers["llama"], top_k=3))
    return folder


@pytest.fixture(scope="module")
def more(one: Path, teachers: dict[str, Path], students: dict[str, Path]) -> Path:
    """The same with four samples of the teacher and three of the student."""
    folder = shutil.copytree(one, one.parent / "more" / "ds")
    generate(generate_config(folder, "teacher", teachers["llama"], samples=4))
    generate(generate_config(folder, "student", students["llama"], samples=3))
    score_teacher(score_config(folder, teachers["llama"], top_k=3))
    return folder


def whole(table: Table[Any]) -> pa.Table:
    return pa.concat_tables([table.read_arrow(shard) for shard in range(table.plan.count)])


def without_cards(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in files_of(folder).items() if name != "README.md"}


def test_a_sample_later_keeps_those_that_are_there(
    one: Path, more: Path, tmp_path: Path, teachers: dict[str, Path], students: dict[str, Path], loads: list[str]
) -> None:
    """Whatever the way to five samples, they are the same bytes; the first is what it is without others."""
    first, four = without_cards(one), without_cards(more)
    assert first == {name: data for name, data in four.items() if not name.startswith("samples/")}
    texts = [whole(of.responses("teacher", 0))["response"].to_pylist() for of in Dataset.open(more).samples()]
    assert len(texts) == 4 and all(len({*row}) > 1 for row in zip(*texts, strict=True))  # drawn with other seeds

    folder = shutil.copytree(more, tmp_path / "ds")
    result = generate(generate_config(folder, "teacher", teachers["llama"], samples=5))
    assert (result.samples, result.rows, result.sampled, loads) == (5, 5 * ROWS, ROWS, ["load"])
    five = without_cards(folder)
    assert {name: five[name] for name in four} == four
    assert {name.split("/")[1] for name in five.keys() - four.keys()} == {"004"}
    assert generate(generate_config(folder, "teacher", teachers["llama"], samples=2)).sampled == 0  # no fewer for it
    scored = score_teacher(score_config(folder, teachers["llama"], top_k=3))
    assert (scored.samples, scored.rows, scored.scored, scored.reused) == (5, 5 * ROWS, ROWS, ROWS)
    assert {name: data for name, data in without_cards(folder).items() if name in four} == four

    at_once = tmp_path / "at-once" / "ds"
    shutil.copytree(one / "prompts", at_once / "prompts")
    shutil.copy(one / "dataset.json", at_once)
    for index in (1, 0):  # as a SLURM array's workers share it
        shared = {"shard_index": index, "num_shards": 2}
        part = generate(generate_config(at_once, "teacher", teachers["llama"], samples=5, **shared))
    assert (part.rows, part.sampled) == (5 * ROWS, 5 * 14)
    made = without_cards(at_once)
    names = [name for name in made if name.endswith(".parquet") and "responses" in name]
    assert len(names) == 5 * 3 and all(made[name] == without_cards(folder)[name] for name in names)


def test_each_response_is_scored_once_and_as_by_itself(
    more: Path, tmp_path: Path, teachers: dict[str, Path], loads: list[str]
) -> None:
    """The scores of a sample equal those of a dataset that has it alone; what two pairs have is scored for one."""
    folder = shutil.copytree(more, tmp_path / "ds")
    for name in ("pairs", "top_k", *(f"samples/{k:03d}/{kind}" for k in (1, 2, 3) for kind in ("pairs", "top_k"))):
        shutil.rmtree(folder / name)
    result = score_teacher(score_config(folder, teachers["llama"], top_k=3))
    assert (result.samples, result.rows, result.scored, result.reused) == (4, 4 * ROWS, 7 * ROWS, ROWS)
    assert loads == ["load"]
    assert {**files_of(more)} == {**files_of(folder)}
    assert verify(folder).rows["samples/003/pairs/round-000"] == ROWS
    dataset = Dataset.open(folder)
    for k, of_sample in enumerate(dataset.samples()):
        alone = tmp_path / f"alone-{k}"
        shutil.copytree(folder, alone, ignore=shutil.ignore_patterns("samples", "pairs", "top_k"))
        for side in ("teacher", "student/round-000"):
            if k and (own := folder / f"samples/{k:03d}/responses/{side}").exists():
                shutil.rmtree(alone / "responses" / side)
                shutil.copytree(own, alone / "responses" / side)
                path = alone / "responses" / side / "_table.json"
                path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "sample"}))
        score_teacher(score_config(alone, teachers["llama"], top_k=3))
        for kind in (Dataset.pairs, Dataset.top_k):
            expected, stored = whole(kind(Dataset.open(alone), 0)), whole(kind(of_sample, 0))
            if k < 3:
                assert stored.equals(expected)
            else:  # y_t was scored without y_s beside it
                close(stored, expected)
    provenance = dataset.of_sample(3).pairs(0).require_provenance()
    assert [provenance[key] for key in ("sample", "teacher_sample", "student_sample")] == [3, 3, 0]


def test_engines_that_mix_groups_have_all_samples_of_a_row_at_once(
    one: Path,
    more: Path,
    tmp_path: Path,
    teachers: dict[str, Path],
    students: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A call for all samples, in which those of a prompt follow each other, and are scored in one request."""
    monkeypatch.setitem(ENGINES, "transformers", replace(ENGINES["transformers"], mixes=True))
    calls: list[list[list[Any]]] = []

    def recorded(verb: str) -> Any:
        original = getattr(TransformersEngine, verb)

        def call(engine: TransformersEngine, groups: Any, argument: Any) -> Any:
            calls.append([list(group) for group in groups])
            return original(engine, iter(calls[-1]), argument)

        return call

    for verb in ("generate", "score"):
        monkeypatch.setattr(TransformersEngine, verb, recorded(verb))
    folder = shutil.copytree(one, tmp_path / "ds")
    generate(generate_config(folder, "teacher", teachers["llama"], samples=4))
    generate(generate_config(folder, "student", students["llama"], samples=3))
    scored = score_teacher(score_config(folder, teachers["llama"], top_k=3))
    assert (scored.samples, scored.scored, scored.reused) == (4, 5 * ROWS, ROWS)
    (of_teacher, of_student, pairs) = calls
    for groups, samples in ((of_teacher, 3), (of_student, 2)):
        assert [len(group) for group in groups] == [8 * samples, 8 * samples, 6 * samples]
        for group in groups:
            prompts = [list(request.prompt_ids) for request in group]
            assert prompts == [prompt for prompt in prompts[::samples] for _ in range(samples)]
            assert len({request.seed for request in group}) == len(group)
    assert {len(request.responses) for group in pairs for request in group} == {5}
    for of_sample, expected in zip(Dataset.open(folder).samples(), Dataset.open(more).samples(), strict=True):
        for table in (lambda of: of.responses("teacher", 0), lambda of: of.pairs(0), lambda of: of.top_k(0)):
            close(whole(table(of_sample)), whole(table(expected)))
    # Beside samples that are copied, and whose scores are taken over, is one that is not.
    assert (
        generate(generate_config(folder, "student", students["llama"], student_name="twin", samples=4)).sampled == ROWS
    )
    assert score_teacher(score_config(folder, teachers["llama"], student_name="twin", top_k=3)).scored == ROWS
    verify(folder)


def close(stored: pa.Table, expected: pa.Table) -> None:
    """The same rows, but for log-probs that differ by rounding."""
    for name in stored.column_names:
        one, other = (table[name].to_pylist() for table in (stored, expected))
        if name.endswith(("logps", "mass")):
            flat = [np.concatenate([np.ravel(row) for row in column]) for column in (one, other)]
            np.testing.assert_allclose(*flat, rtol=0, atol=1e-5)
        else:
            assert one == other, name


def test_further_students_take_over_what_is_scored_of_each_sample(
    more: Path, tmp_path: Path, teachers: dict[str, Path], students: dict[str, Path], foreign: Path
) -> None:
    folder = shutil.copytree(more, tmp_path / "ds")
    answer = generate(generate_config(folder, "student", students["opt"], student_name="opt", samples=2))
    twin = generate(generate_config(folder, "student", students["llama"], student_name="twin", samples=2))
    assert (answer.sampled, twin.sampled) == (2 * ROWS, 0)
    scored = [score_teacher(score_config(folder, teachers["llama"], student_name=name)) for name in ("opt", "twin")]
    # Of 2 · 4 responses of pairs: y_t are scored for the first student, y_s of samples 2 and 3 are those of the first.
    assert [(of.samples, of.scored, of.reused) for of in scored] == [(4, 2 * ROWS, 6 * ROWS), (4, 0, 8 * ROWS)]
    own, other = (Dataset.open(folder, name).of_sample(1).pairs(0) for name in (None, "twin"))
    assert whole(own).equals(whole(other))

    generate(generate_config(folder, "student", foreign, student_name="bytes", samples=2))
    by_text = score_config(folder, teachers["llama"], student_name="bytes", student=str(foreign))
    assert score_teacher(by_text).scored == 6 * ROWS  # another path of scoring: y_t of four samples, y_s of two
    verify(folder)

    generate(generate_config(folder, "student", students["opt"], student_name="opt", samples=3))
    with pytest.raises(MismatchError, match=r"has y_s of sample 0, and now there is a sample 2 of y_s; delete .*/opt/"):
        score_teacher(score_config(folder, teachers["llama"], student_name="opt"))
    shutil.rmtree(folder / "samples/002/students/opt/pairs")
    assert score_teacher(score_config(folder, teachers["llama"], student_name="opt")).scored == ROWS


def test_rounds_have_samples_of_their_own(
    more: Path, tmp_path: Path, teachers: dict[str, Path], students: dict[str, Path]
) -> None:
    folder = shutil.copytree(more, tmp_path / "ds")
    later = build_model("llama", tmp_path / "later", seed=5)
    generate(generate_config(folder, "student", later, round=1, samples=2))
    result = score_teacher(score_config(folder, teachers["llama"], round=1, top_k=3))
    assert (result.samples, result.scored, result.reused) == (2, 2 * ROWS, 2 * ROWS)  # y_t is scored in round 0
    pairs = [Dataset.open(folder).of_sample(1).pairs(round) for round in (0, 1)]
    assert pairs[1].require_provenance()["reused_from"] == 0
    assert whole(pairs[0])["teacher_chosen_logps"].equals(whole(pairs[1])["teacher_chosen_logps"])
    verify(folder)
    with pytest.raises(ValueError, match="samples above 1 is for share 1"):
        generate_config(folder, "student", later, round=1, share=0.5, samples=2)


def test_verify_refuses_a_sample_that_is_not_of_the_first(more: Path, tmp_path: Path) -> None:
    for name, key, value, refusal in (
        ("responses/teacher", "seed", 1, r"seed is 1, that of the first sample is 0; all samples are of one model"),
        ("responses/teacher", "sample", 2, "sample is 2, that of the dataset is 1"),
        ("pairs/round-000", "student_sample", 2, "teacher_sample and student_sample are 1 and 2, of pairs of sample 1"),
    ):
        folder = shutil.copytree(more, tmp_path / f"{key}-{value}")
        path = folder / "samples/001" / name / "_table.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
        with pytest.raises(MismatchError, match=refusal):
            verify(folder)
    folder = shutil.copytree(more, tmp_path / "numbers")
    table = Dataset.open(folder).of_sample(3).pairs(0)
    stored = table.read(1)
    changed = table.read_arrow(1).to_pylist()
    changed[2]["teacher_rejected_logps"][0] -= 0.5
    replace_shard(table, 1, pa.Table.from_pylist(changed, table.schema))
    assert stored[2].teacher_rejected_logps != table.read(1)[2].teacher_rejected_logps
    with pytest.raises(DataError, match="row 2: column 'teacher_rejected_logps' is not that of pairs/round-000"):
        verify(folder)


def stages(folder: Path, source: Path, teacher: Path, student: Path) -> list[list[object]]:
    common = ["--dataset", folder, "--batch-size", 4, *TINY]
    sampling = ["--max-new-tokens", 3, "--shard-size", 1, *common]
    return [
        ["generate", "--role", "teacher", "--model", teacher, "--prompts", source, "--samples", 4, *sampling],
        ["generate", "--role", "student", "--model", student, "--samples", 3, *sampling],
        ["score-teacher", "--model", teacher, "--top-k", 3, *common],
    ]


@pytest.mark.slow
def test_twenty_kills_lose_and_double_nothing(
    tmp_path: Path, teachers: dict[str, Path], students: dict[str, Path]
) -> None:
    """SIGKILLed at every named point of a write, in the tables of every sample."""
    source = write_jsonl(tmp_path / "p.jsonl", rows(8))
    models = teachers["llama"], students["llama"]

    def run(arguments: list[object], point: str | None = None, passes: int = 0) -> int:
        process = start(arguments, point, passes)
        process.join(120)
        assert process.exitcode is not None
        return process.exitcode

    assert [run(arguments) for arguments in stages(tmp_path / "calm", source, *models)] == [0, 0, 0]
    random_, kills = random.Random(0), Counter[str]()
    for arguments, goal in zip(stages(tmp_path / "killed", source, *models), (8, 14, 20), strict=True):
        while kills.total() < goal:
            others = [point for point in POINTS if point != "before rename"]
            # Only the card is renamed, and that often when all shards are there: so it is the last point of a stage.
            point = "before rename" if kills.total() == goal - 1 else others[kills.total() % len(others)]
            passes = 0 if point == "before rename" else random_.randrange(5)
            assert run(arguments, point, passes) == -signal.SIGKILL
            kills[point] += 1
        assert run(arguments) == 0
    calm, killed = (without_folder_names(tmp_path / name) for name in ("calm", "killed"))
    assert killed == calm
    verify(tmp_path / "killed")
    print(f"\n{kills.total()} kills: {dict(kills)}")


def without_folder_names(folder: Path) -> dict[str, bytes]:
    own = re.compile(rb'"dataset": [^\n]*\n')
    return {name: own.sub(b"", data) if name.endswith(".json") else data for name, data in files_of(folder).items()}
