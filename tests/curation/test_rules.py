"""Rules of `subset` about scores, repetition, scripts and the ids that a model knows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import regex
import torch
from helpers.runs import metrics_of, train_config
from helpers.tiny import build_config, build_tokenizer, generate_config, make_dataset, replace_shard, rows, write_jsonl
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from dpkd_offline.common.errors import DataError, MismatchError
from dpkd_offline.config.data import SubsetConfig
from dpkd_offline.curation.merge import subset
from dpkd_offline.curation.rules import is_written_in
from dpkd_offline.curation.verify import verify
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.dataset.schema import PreferencePair, Response, TopK, to_table
from dpkd_offline.generation.generate import generate
from dpkd_offline.training.trainer import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, teachers: dict[str, Path], students: dict[str, Path]) -> Path:
    root = tmp_path_factory.mktemp("rules")
    source = write_jsonl(root / "prompts.jsonl", rows(12))
    return make_dataset(root / "data", source, teachers["llama"], students["llama"], top_k=3)


def taken(dataset: object, output: Path, **rules: object) -> Path:
    return subset(SubsetConfig.model_validate({"dataset": dataset, "output": output, **rules})).path


def pairs_of(folder: Path) -> list[PreferencePair]:
    table = Dataset.open(folder).pairs(0)
    return [row for shard in range(table.plan.count) for row in table.read(shard)]


def ids_of(folder: Path) -> list[str]:
    return [pair.id for pair in pairs_of(folder)]


def test_rows_whose_y_t_has_a_score_stay(folder: Path, tmp_path: Path) -> None:
    scores = [{"id": id_, "score": number % 5} for number, id_ in enumerate(ids_of(folder))]
    file = write_jsonl(tmp_path / "reward.jsonl", scores)
    out = taken(folder, tmp_path / "out", scores=file, min_score=3)
    assert ids_of(out) == [score["id"] for score in scores if int(score["score"]) >= 3]
    rule = json.loads((out / "pairs/round-000/_table.json").read_text())["rule"]
    assert (rule["min_score"], rule["scores"]["file"]) == (3, "reward.jsonl")
    with pytest.raises(DataError, match=r"reward\.jsonl: no row with id 'row-11', sample 0 and role teacher: 1 of 12"):
        taken(folder, tmp_path / "none", scores=write_jsonl(file, scores[:-1]), min_score=3)
    with pytest.raises(DataError, match=r"no row satisfies the rules: 12 of 12 dropped: 12 by --min-score"):
        taken(folder, tmp_path / "none", scores=write_jsonl(file, scores), min_score=5)


def test_no_response_repeats_more_of_its_4_grams(folder: Path, tmp_path: Path) -> None:
    def repeats(tokens: Sequence[int]) -> float:
        seen, again = set(), 0
        for start in range(len(tokens) - 3):
            again += (gram := tuple(tokens[start : start + 4])) in seen
            seen.add(gram)
        return again / max(len(tokens) - 3, 1)

    pairs = pairs_of(folder)
    most = {pair.id: max(repeats(pair.chosen_ids), repeats(pair.rejected_ids)) for pair in pairs}
    limit = sorted(most.values())[len(most) // 2]
    wanted = [id_ for id_, share in most.items() if share <= limit]
    assert 0 < len(wanted) < len(pairs) or limit == 0
    assert ids_of(taken(folder, tmp_path / "out", max_repetition=limit)) == wanted


@pytest.mark.parametrize(
    ("text", "scripts", "is_written"),
    [
        ("A short answer.", ["Latin"], True),
        ("Çà et là, naïve Straße", ["Latin"], True),
        ("Короткий ответ", ["Latin"], False),
        ("Короткий ответ: API", ["Cyrillic"], False),
        ("Этот ответ немного длиннее, в нём есть API", ["Cyrillic"], True),
        ("これはコーヒーです。漢字", ["Han", "Hiragana", "Katakana"], True),
        ("これはコーヒーです。漢字", ["Han"], False),
        ("3.14 = π", ["Latin"], False),
        ("42!", ["Latin"], True),
        ("", ["Arabic"], True),
    ],
)
def test_the_script_of_a_text_is_that_of_its_letters(text: str, scripts: list[str], is_written: bool) -> None:
    script = regex.compile("|".join(rf"\p{{Script={name}}}" for name in scripts))
    assert is_written_in(text, script) is is_written


def test_rows_whose_y_t_is_of_a_script_stay(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    dataset = Dataset.open(copy)
    texts = {id_: "Привет" if number % 3 == 0 else "Hello" for number, id_ in enumerate(ids_of(folder))}
    for table, record, column in (
        (dataset.responses("teacher", 0), Response, "response"),
        (dataset.pairs(0), PreferencePair, "chosen"),
    ):
        for shard in range(table.plan.count):
            changed = [record(**{**row.__dict__, column: texts[row.id]}) for row in table.read(shard)]
            replace_shard(table, shard, to_table(changed, record.schema))
    for scripts, wanted in (("Latin", {"Hello"}), ("Cyrillic", {"Привет"}), ("Latin,Cyrillic", {"Hello", "Привет"})):
        out = taken(copy, tmp_path / scripts, script=scripts)
        assert ids_of(out) == [id_ for id_, text in texts.items() if text in wanted]
    with pytest.raises(ValidationError, match="'Klingon' is no script of Unicode, such as Latin, Cyrillic"):
        taken(copy, tmp_path / "none", script="Klingon")


def test_rows_with_ids_that_a_smaller_model_does_not_know_go(
    folder: Path, students: dict[str, Path], tmp_path: Path
) -> None:
    top = Dataset.open(folder).top_k(0)
    likeliest: dict[str, TopK] = {row.id: row for shard in range(top.plan.count) for row in top.read(shard)}

    def largest(pair: PreferencePair) -> int:
        of_top = likeliest[pair.id]
        positions: list[list[int]] = [*of_top.chosen_top_ids, *of_top.rejected_top_ids]
        return max(*pair.prompt_ids, *pair.chosen_ids, *pair.rejected_ids, *(id_ for ids in positions for id_ in ids))

    ids = {pair.id: largest(pair) for pair in pairs_of(folder)}
    known = sorted(ids.values())[len(ids) // 2]
    small = tmp_path / "small"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(build_config("llama", known), dtype=torch.float32).save_pretrained(small)
    build_tokenizer(chat=True).save_pretrained(small)
    with pytest.raises(DataError, match=f"holds a token id that a vocabulary of {known} has not"):
        train(train_config(folder, small, tmp_path / "none", max_steps=1))
    out = taken(folder, tmp_path / "out", known_to=str(small))
    assert ids_of(out) == [id_ for id_, most in ids.items() if most < known]
    verify(out)
    assert Dataset.open(out).prompt_set.vocab_size == known
    provenance: dict[str, Any] = json.loads((out / "pairs/round-000/_table.json").read_text())
    assert (provenance["vocab_size"], provenance["rule"]["known_to"]) == (known, {"name": "small", "vocab_size": known})
    for objective in ("dpkd", "kd"):
        train(train_config(out, small, tmp_path / objective, max_steps=1, objective=objective))
        assert len(metrics_of(tmp_path / objective)) == 1
    generate(generate_config(out, "student", small, round=1, share=0.5))  # and responses of the round before stay
    with pytest.raises(
        MismatchError, match=r"--known-to \S+: its tokenizer is not that of \S+data, so that it gets th"
    ):
        other = build_tokenizer(chat=True)
        other.add_tokens(["<new>"])
        other.save_pretrained(small)
        taken(folder, tmp_path / "none", known_to=str(small))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_gap": 1}, "min_gap is for pairs that a rule makes of several samples: give pairs, too"),
        ({"student_name": "small", "limit": 1}, "student_name is for pairs that a rule makes"),
        ({"min_score": 1}, "min_score needs scores, a file of them"),
        ({"scores": "s.jsonl"}, "give a rule: --max-tokens, --drop-truncated, "),
        ({"scores": "s.jsonl", "limit": 1}, "scores are for pairs best or best-worst, min_gap or min_score"),
        ({"scores": "s.jsonl", "pairs": "each"}, "scores are for pairs best or best-worst, min_gap or min_score"),
        ({"pairs": "worst"}, "Input should be 'each', 'best' or 'best-worst'"),
        ({"max_repetition": 1}, "less than 1"),
        ({"pairs": "each", "min_gap": float("nan")}, "finite number"),
    ],
)
def test_rules_that_need_each_other(options: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=message):
        SubsetConfig.model_validate({"dataset": "data", "output": tmp_path / "out", **options})
