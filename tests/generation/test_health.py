"""What is wrong with responses and pairs is said in words, the same however often their making was stopped."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers.tiny import build_model, generate_config, rows, score_config, write_jsonl

from dpkd_offline.config.data import GenerateConfig
from dpkd_offline.dataset.dataset import Dataset, PromptSet
from dpkd_offline.dataset.schema import PreferencePair, Response
from dpkd_offline.dataset.table import ShardPlan
from dpkd_offline.dataset.writing import claim, write_shard
from dpkd_offline.generation.generate import generate
from dpkd_offline.generation.health import dataset_warnings, pair_warnings, response_warnings
from dpkd_offline.generation.score_teacher import score_teacher

Text = tuple[str, int, str]  # a response, its tokens, and how it ended
GOOD: list[Text] = [(f"answer {n}", 10 + n % 3, "stop") for n in range(20)]
OTHER: list[Text] = [(f"own answer {n}", 12 - n % 3, "stop") for n in range(20)]


def changed(texts: Sequence[Text], count: int, text: Text) -> list[Text]:
    return [text] * count + list(texts[count:])


def dataset_of(folder: Path, y_t: Sequence[Text], y_s: Sequence[Text], shard_size: int = 8) -> Dataset:
    """Responses of both and their pairs, without any model."""
    prompt_set = PromptSet("id", "s", "chat", "f", "t", "t", 400, "4", 5, {})
    dataset = Dataset(folder, prompt_set, ShardPlan(len(y_t), shard_size))
    shared = {"model": {"name": "m", "revision": "1"}, "vocab_size": 400, "dtype": "float32", "engine": "e"}
    shared |= {"prompt_set": "id", "tokenizer_fingerprint": "t"}
    for role, texts in (("teacher", y_t), ("student", y_s)):
        table = dataset.responses(role, 0)
        sampling = {"sampling": {"max_new_tokens": 256}, "eos_token_ids": [1]}
        claim(table, {"stage": "generate", **shared, **sampling})
        for shard in range(dataset.plan.count):
            part = list(enumerate(texts))[shard * shard_size : (shard + 1) * shard_size]
            write_shard(table, shard, [Response(str(n), text, [2] * k, end, [], 0) for n, (text, k, end) in part])
    table = dataset.pairs(0)
    claim(table, {"stage": "score-teacher", **shared, "scored": "ids"})
    for shard in range(dataset.plan.count):
        part = list(zip(y_t, y_s, strict=True))[shard * shard_size : (shard + 1) * shard_size]
        write_shard(table, shard, [pair(shard * shard_size + n, t, s) for n, (t, s) in enumerate(part)])
    return dataset


def pair(number: int, y_t: Text, y_s: Text) -> PreferencePair:
    return PreferencePair(
        id=str(number),
        prompt="",
        prompt_ids=[1],
        reference=None,
        chosen=y_t[0],
        chosen_ids=[2] * y_t[1],
        chosen_finish_reason=y_t[2],
        rejected=y_s[0],
        rejected_ids=[2] * y_s[1],
        rejected_finish_reason=y_s[2],
        teacher_chosen_logps=[-1.0] * y_t[1],
        teacher_rejected_logps=[-1.0] * y_s[1],
        chosen_exact=True,
        rejected_exact=True,
        behavior_rejected_logps=[-1.0] * y_s[1],
        round=0,
    )


def test_good_pairs_are_not_worth_a_word(tmp_path: Path) -> None:
    """Nor are a few that are not: nine of twenty cut off, one empty, one the same, y_s not quite twice as long."""
    dataset = dataset_of(tmp_path / "good", GOOD, OTHER)
    assert not response_warnings(dataset, "teacher", 0) and not response_warnings(dataset, "student", 0)
    assert not pair_warnings(dataset, 0)
    y_s = [(GOOD[0][0], 19, "length"), ("", 19, "length"), *((text, 19, "length") for text, _, _ in OTHER[2:9])]
    dataset = dataset_of(tmp_path / "few", GOOD, [*y_s, *((text, 19, "stop") for text, _, _ in OTHER[9:])])
    assert not response_warnings(dataset, "student", 0) and not pair_warnings(dataset, 0)


@pytest.mark.parametrize(
    ("y_t", "y_s", "of_teacher", "of_student"),
    [
        (GOOD, [(text, 256, "length") for text, _, _ in OTHER], [], ["20 of 20 y_s are cut off at 256 tokens: a model",
            "y_s have 256 tokens on average, y_t 11: an objective of pairs may learn their length"]),
        (changed(GOOD, 10, ("cut", 11, "length")), OTHER, ["10 of 20 y_t are cut off at 256 tokens: a model"], []),
        (GOOD, changed(OTHER, 2, (" \n", 11, "stop")), [], ["2 of 20 y_s are empty: see whether the template is"]),
        (GOOD, [*GOOD[:2], *OTHER[2:]], [], ["2 of 20 y_s are the same text as y_t: nothing is learnt from"]),
        ([(text, 3 * k, end) for text, k, end in GOOD], OTHER, [], ["y_s have 11 tokens on average, y_t 33: an"]),
    ],
    ids=["y_s never end", "y_t do not end", "empty", "the same", "y_t are longer"],
)  # fmt: skip
def test_what_is_wrong_with_most_responses_is_said_after_each_stage(
    y_t: list[Text], y_s: list[Text], of_teacher: list[str], of_student: list[str], tmp_path: Path
) -> None:
    dataset = dataset_of(tmp_path, y_t, y_s)
    for said, expected in (
        (response_warnings(dataset, "teacher", 0), of_teacher),
        (response_warnings(dataset, "student", 0), of_student),
        (pair_warnings(dataset, 0), [*of_teacher, *of_student]),
    ):
        assert len(said) == len(expected)
        assert all(sentence.startswith(start) for sentence, start in zip(said, expected, strict=True)), said


def test_nothing_is_said_of_a_table_that_is_not_complete(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, GOOD, [(text, 256, "length") for text, _, _ in OTHER])
    for table in (dataset.responses("student", 0), dataset.pairs(0)):
        table.entry_path(1).unlink()
    assert not response_warnings(dataset, "student", 0) and not pair_warnings(dataset, 0)


def test_a_student_gets_the_limits_of_the_teacher_and_results_say_what_was_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """These models answer until they are cut off. The second half of a stage says what the whole says."""
    model = build_model("llama", tmp_path / "model")
    source = write_jsonl(tmp_path / "prompts.jsonl", rows(6))
    folder, shards = tmp_path / "ds", {"shard_size": 3, "num_shards": 2}
    unset = {"max_new_tokens", "max_length"}
    student = generate_config(folder, "student", model, **shards).model_dump(exclude_unset=True, exclude=unset)

    def config(**values: object) -> GenerateConfig:
        return GenerateConfig.model_validate({**student, **values})

    generate(generate_config(folder, "teacher", model, prompts=str(source), max_new_tokens=7, max_length=200, **shards))
    teacher = generate_config(folder, "teacher", model, max_new_tokens=7, max_length=200, shard_index=1, **shards)
    assert generate(teacher).warnings == generate(teacher).warnings == tuple(dataset_warnings(folder))
    assert not generate(config(seed=1)).warnings  # the other worker's half is missing
    capsys.readouterr()
    result = generate(config(seed=1, shard_index=1))
    table = Dataset.open(folder).responses("student", 0)
    provenance = table.require_provenance()
    assert provenance["sampling"]["max_new_tokens"] == 7 and provenance["config"]["max_length"] == 1024
    assert {len(r.response_ids) for shard in range(2) for r in table.read(shard)} == {7}
    shown = capsys.readouterr().err
    assert result.warnings and result.warnings[0].startswith("6 of 6 y_s are cut off at 7 tokens")
    assert all(f"warning: {sentence}\n" in shown for sentence in result.warnings)
    assert "--max-new-tokens says" not in shown

    told = config(round=1, max_new_tokens=20, num_shards=1, max_length=256)
    result = generate(told)
    assert "warning: y_s may have 20 tokens, as --max-new-tokens says; y_t could have 7\n" in capsys.readouterr().err
    assert any(re.match(r"y_s of round 1 have 20 tokens on average, y_t 7: ", said) for said in result.warnings)
    scored = [score_teacher(score_config(folder, model, round=round)) for round in (0, 1)]
    assert scored[0].warnings[0].startswith("6 of 6 y_t are cut off at 7 tokens")
    assert scored[1].warnings[-1] in result.warnings
    assert score_teacher(score_config(folder, model, round=1)).warnings == scored[1].warnings
    everything = {*generate(teacher).warnings, *result.warnings, *scored[0].warnings, *scored[1].warnings}
    assert {*dataset_warnings(folder)} == everything
