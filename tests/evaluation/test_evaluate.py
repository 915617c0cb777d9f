from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import FAMILIES, files_of, rows, write_jsonl

from dpkd_offline.common.errors import DataError, MismatchError, OutputBusy, StorageError, UsageError
from dpkd_offline.common.ownership import output_folder
from dpkd_offline.config.base import ModelOptions
from dpkd_offline.config.evaluate import EvaluateConfig
from dpkd_offline.engines.base import Engine
from dpkd_offline.evaluation import evaluate as module
from dpkd_offline.evaluation import parts
from dpkd_offline.evaluation.evaluate import evaluate
from dpkd_offline.evaluation.summary import difference_of
from dpkd_offline.metrics.intervals import interval_of_mean
from dpkd_offline.metrics.text import rouge_l
from dpkd_offline.models.info import ModelInfo
from dpkd_offline.models.loading import load_model


def evaluate_config(model: Path, source: Path, output: Path, **changes: object) -> EvaluateConfig:
    values = {
        "model": str(model),
        "prompts": str(source),
        "output": output,
        "engine": "transformers",
        "dtype": "float32",
        "max_new_tokens": 10,
        "max_length": 256,
        "seeds": [10, 20],
    }
    return EvaluateConfig.model_validate({**values, **changes})


def responses_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "responses.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("family", FAMILIES)
def test_results_are_means_over_prompts_then_over_seeds(
    family: str, source: Path, students: dict[str, Path], teachers: dict[str, Path], tmp_path: Path
) -> None:
    config = evaluate_config(students[family], source, tmp_path, teacher=str(teachers[family]), beta=0.5)
    result = evaluate(config)
    responses, results = responses_of(tmp_path), result.results
    assert str(result) == str(tmp_path)
    assert len(responses) == 44
    assert {(r["seed"], r["id"]) for r in responses} == {(seed, f"row-{n}") for seed in (10, 20) for n in range(22)}
    assert len({r["response"] for r in responses}) > 22  # seeds draw differently
    references = {row["id"]: row["reference"] for row in rows(22)}
    for row in responses:
        assert row["rouge_l"] == rouge_l(row["response"], [references[row["id"]]])
    for measure in ("rouge_l", "exact_match", "teacher_nll", "reward", "tokens"):
        by_seed = [sum(r[measure] for r in responses if r["seed"] == seed) / 22 for seed in (10, 20)]
        assert results[measure]["by_seed"] == pytest.approx(by_seed)
        assert results[measure]["mean"] == pytest.approx(sum(by_seed) / 2)
        assert results[measure]["spread"] == pytest.approx(abs(by_seed[0] - by_seed[1]) / 2**0.5)
        by_prompt = [sum(r[measure] for r in responses if r["id"] == f"row-{n}") / 2 for n in range(22)]
        assert results[measure]["interval"] == pytest.approx(interval_of_mean(by_prompt))
    buckets = results["by_length"]
    assert [bucket["prompts"] for bucket in buckets] == [22, 0, 0]
    assert buckets[0]["rouge_l"] == pytest.approx(results["rouge_l"]["mean"])
    assert json.loads((tmp_path / "results.json").read_text()) == results


def test_results_by_length_add_up_to_the_whole(students: dict[str, Path], tmp_path: Path) -> None:
    values = [{"instruction": f"Say {n}.", "reference": " ".join(["tea"] * n)} for n in (1, 3, 4, 5, 9, 10)]
    source = write_jsonl(tmp_path / "p.jsonl", values)
    config = evaluate_config(students["gpt2"], source, tmp_path / "out", seeds=[1], length_borders="3,8")
    results = evaluate(config).results
    buckets = results["by_length"]
    assert [(b["above"], b["to"], b["prompts"]) for b in buckets] == [(0, 3, 2), (3, 8, 2), (8, None, 2)]
    for measure in ("rouge_l", "exact_match"):
        whole = sum(bucket["prompts"] * bucket[measure] for bucket in buckets) / 6
        assert whole == pytest.approx(results[measure]["mean"])


def test_several_sets_are_what_each_is_alone_and_the_model_is_loaded_once(
    source: Path, students: dict[str, Path], teachers: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = write_jsonl(tmp_path / "other.jsonl", rows(30)[22:])
    config = evaluate_config(students["gpt2"], source, tmp_path / "one", teacher=str(teachers["gpt2"]))
    alone = {
        name: evaluate(config.model_copy(update={"prompts": str(prompts), "output": tmp_path / name})).results
        for name, prompts in (("one", source), ("two", other))
    }
    loads, load = [], module.load_engine
    monkeypatch.setattr(module, "load_engine", lambda *words: (loads.append(words[0].name), load(*words))[1])
    values = {**config.model_dump(exclude={"prompts"}), "prompts": f"one={source},two={other}"}
    together = EvaluateConfig.model_validate({**values, "output": tmp_path / "both"})
    result = evaluate(together)
    assert result.results == {"sets": alone} == json.loads((tmp_path / "both" / "results.json").read_text())
    assert loads == [str(students["gpt2"]), str(teachers["gpt2"])]
    for name in alone:
        lines = (tmp_path / "both" / name / "responses.jsonl").read_bytes()
        assert lines == (tmp_path / name / "responses.jsonl").read_bytes()
    assert evaluate(together).results == result.results and len(loads) == 2
    assert str(tmp_path) not in (tmp_path / "both" / "evaluate.yaml").read_text()
    with pytest.raises(MismatchError, match="holds an evaluation of another command"):
        evaluate(config.model_copy(update={"output": tmp_path / "both"}))


def test_at_temperature_zero_the_likeliest_tokens_are_taken_once(
    source: Path, students: dict[str, Path], tmp_path: Path
) -> None:
    config = evaluate_config(students["llama"], source, tmp_path, temperature=0.0, limit=5, seeds=[3, 4])
    assert evaluate(config).results["seeds"] == [3]
    model, tokenizer = load_model(str(students["llama"]), "float32"), ModelInfo(str(students["llama"])).tokenizer
    for row in responses_of(tmp_path):
        ids = tokenizer(row["prompt"], return_tensors="pt", add_special_tokens=False)["input_ids"]
        greedy = model.generate(ids, max_new_tokens=10, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]  # type: ignore[operator]
        assert row["response"] == tokenizer.decode(greedy, skip_special_tokens=True)


def test_thoughts_are_neither_scored_nor_counted_as_words(
    students: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = iter(["<think>tea tea</think> a cup of tea", "<think>for ever and ever"])
    monkeypatch.setattr(parts.Sampling, "_texts", lambda _self, responses: [next(texts) for _ in responses])
    values = [{"id": str(n), "instruction": f"Say {n}.", "reference": "a cup of tea"} for n in range(2)]
    source = write_jsonl(tmp_path / "p.jsonl", values)
    config = evaluate_config(students["gpt2"], source, tmp_path / "out", seeds=[1], thinking_end="</think>")
    results = evaluate(config).results
    assert [row["rouge_l"] for row in responses_of(tmp_path / "out")] == [100.0, 0.0]
    assert [row["answer"] for row in responses_of(tmp_path / "out")] == ["a cup of tea", ""]
    assert results["unfinished_thoughts"] == 0.5
    assert results["length_ratio"] == 4 / 8
    assert results["made"]["thinking_end"] == "</think>"


def test_two_evaluations_are_compared_prompt_by_prompt(
    source: Path, students: dict[str, Path], teachers: dict[str, Path], tmp_path: Path
) -> None:
    config = evaluate_config(students["llama"], source, tmp_path / "before", teacher=str(teachers["llama"]))
    evaluate(config)
    changes = {"model": str(teachers["llama"]), "output": tmp_path / "after", "against": tmp_path / "before"}
    difference = evaluate(config.model_copy(update=changes)).results["difference"]
    nll = [
        {row["id"]: row["teacher_nll"] for row in responses_of(tmp_path / name) if row["seed"] == seed}
        for name in ("before", "after")
        for seed in (10, 20)
    ]
    gains = [(nll[2][n] + nll[3][n] - nll[0][n] - nll[1][n]) / 2 for n in nll[0]]
    assert difference["teacher_nll"]["mean"] == pytest.approx(sum(gains) / len(gains))
    assert difference["teacher_nll"]["interval"] == pytest.approx(interval_of_mean(gains))
    assert difference["teacher_nll"]["verdict"] == "better"  # it is the teacher itself
    assert difference["prompts"] == 22
    closed = difference_of(tmp_path / "before", tmp_path / "after", tmp_path / "after")["teacher_nll"]["gap_closed"]
    assert closed == 1.0
    strange = write_jsonl(tmp_path / "q.jsonl", [{**row, "reference": "else"} for row in rows(22)])
    values = {"prompts": str(strange), "output": tmp_path / "else", "against": tmp_path / "before"}
    with pytest.raises(MismatchError, match="prompt 'row-0' has other references"):
        evaluate(config.model_copy(update=values))
    with pytest.raises(
        DataError, match=r"none/responses\.jsonl: no such file; name a folder that evaluate has written"
    ):
        evaluate(config.model_copy(update={"against": tmp_path / "none"}))


def test_teacher_nll_and_reward_are_those_of_the_definition(
    source: Path, students: dict[str, Path], teachers: dict[str, Path], tmp_path: Path
) -> None:
    config = evaluate_config(
        students["llama"],
        source,
        tmp_path,
        teacher=str(teachers["llama"]),
        beta=0.5,
        seeds=[1],
        limit=3,
        max_new_tokens=4,
    )
    evaluate(config)
    tokenizer = ModelInfo(str(students["llama"])).tokenizer
    p, q = (load_model(str(m["llama"]), "float32") for m in (teachers, students))
    checked = 0
    for row in responses_of(tmp_path):
        prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        ids = tokenizer(row["response"], add_special_tokens=False)["input_ids"]
        ids += [tokenizer.eos_token_id] * (row["finish_reason"] == "stop")
        if len(ids) != row["tokens"]:
            continue  # the text does not say which tokens were sampled
        sequence = torch.tensor([[*prompt, *ids]])
        with torch.no_grad():
            log_p, log_q = (
                m(sequence)
                .logits[0, len(prompt) - 1 : -1]
                .log_softmax(-1)
                .gather(1, sequence[0, len(prompt) :, None])
                .sum()
                .item()
                for m in (p, q)
            )
        assert row["teacher_nll"] == pytest.approx(-log_p / len(ids), rel=1e-3)
        assert row["reward"] == pytest.approx(0.5 * (log_q - log_p) / len(ids), rel=1e-2, abs=1e-3)
        assert 0 < row["accepted"] <= 100
        checked += 1
    assert checked


def test_the_teachers_own_reward_is_zero(source: Path, teachers: dict[str, Path], tmp_path: Path) -> None:
    results = evaluate(evaluate_config(teachers["opt"], source, tmp_path, teacher=str(teachers["opt"]), seeds=[1]))
    assert results.results["reward"]["mean"] == pytest.approx(0.0, abs=1e-5)


def test_finished_evaluations_are_not_repeated(source: Path, students: dict[str, Path], tmp_path: Path) -> None:
    config = evaluate_config(students["gpt2"], source, tmp_path, seeds=[1])
    results = evaluate(config)
    before = (tmp_path / "results.json").stat().st_mtime_ns
    assert evaluate(config) == results
    assert (tmp_path / "results.json").stat().st_mtime_ns == before
    assert evaluate(config.model_copy(update={"batch_size": 3})) == results  # how it is computed is nobody's business
    whole = files_of(tmp_path)
    with pytest.raises(MismatchError, match="holds an evaluation of another command, config or model"):
        evaluate(config.model_copy(update={"seeds": (2,)}))
    assert files_of(tmp_path) == whole


def test_a_teacher_with_another_tokenizer_scores_the_text(
    source: Path, students: dict[str, Path], teachers: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(teachers["llama"], tmp_path / "other")
    tokenizer = ModelInfo(str(tmp_path / "other")).tokenizer
    tokenizer.add_tokens(["<new>"])  # which no text holds
    tokenizer.save_pretrained(tmp_path / "other")
    for name, teacher in (("ids", teachers["llama"]), ("text", tmp_path / "other")):
        evaluate(evaluate_config(students["llama"], source, tmp_path / name, teacher=str(teacher)))
    compared = 0
    for by_ids, by_text in zip(responses_of(tmp_path / "ids"), responses_of(tmp_path / "text"), strict=True):
        again = len(tokenizer(by_ids["response"])["input_ids"]) + (by_ids["finish_reason"] == "stop")
        if again == by_ids["tokens"]:  # what was sampled is how the text is spelled
            assert [by_text[m] for m in ("teacher_nll", "reward")] == pytest.approx(
                [by_ids[m] for m in ("teacher_nll", "reward")], abs=1e-4
            )
            compared += 1
    assert compared >= 2


def test_references_are_needed(source: Path, students: dict[str, Path], tmp_path: Path) -> None:
    bare = write_jsonl(tmp_path / "bare.jsonl", [{"instruction": "x"}])
    with pytest.raises(DataError, match=r"bare\.jsonl:1: column 'reference' is missing"):
        evaluate(evaluate_config(students["gpt2"], bare, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_references_beyond_ascii_are_compared_by_words_of_unicode_and_said_to_be(
    students: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = [{"instruction": "a", "reference": "莱茵河"}, {"instruction": "b", "reference": "the Rhine"}]
    source = write_jsonl(tmp_path / "p.jsonl", values)
    result = evaluate(evaluate_config(students["gpt2"], source, tmp_path / "out", seeds=[1], max_new_tokens=2))
    assert result.results["rouge_l_unicode"] == 1
    assert "Rouge-L: 1 of 2 prompts have references with letters beyond a-z" in capsys.readouterr().err
    source = write_jsonl(tmp_path / "q.jsonl", values[1:])
    result = evaluate(evaluate_config(students["gpt2"], source, tmp_path / "ascii", seeds=[1], max_new_tokens=2))
    assert "rouge_l_unicode" not in result.results


def test_a_killed_evaluation_goes_on_with_the_groups_that_it_lacks(
    source: Path, students: dict[str, Path], teachers: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "GROUP", 8)
    config = evaluate_config(students["llama"], source, tmp_path / "calm" / "out", teacher=str(teachers["llama"]))
    evaluate(config)
    killed = config.model_copy(update={"output": tmp_path / "killed" / "out"})
    written, sampled, full = parts.Stage.write, [], [("sampled", 3), ("scored", 2)]

    def write(stage: parts.Stage, group: int, rows: list[parts.Row]) -> None:
        if full and (stage.folder.name, group) == full[0]:
            raise StorageError("the disk is full")
        if stage.folder.name == "sampled":
            sampled.append(group)
        written(stage, group, rows)

    monkeypatch.setattr(parts.Stage, "write", write)
    while full:
        with pytest.raises(StorageError):
            evaluate(killed)
        full.pop(0)
    with pytest.raises(MismatchError, match="of another command"):  # its responses would be mixed with these
        evaluate(killed.model_copy(update={"temperature": 0.5}))
    evaluate(killed)
    assert sampled == [0, 1, 2, 3, 4, 5]  # each once
    assert files_of(killed.output) == files_of(config.output)


def test_results_stand_beside_the_responses_that_they_are_of(
    source: Path, students: dict[str, Path], tmp_path: Path
) -> None:
    config = evaluate_config(students["gpt2"], source, tmp_path / "out", seeds=[1])
    evaluate(config)
    whole = files_of(config.output)
    (config.output / "responses.jsonl").write_text("{}\n")
    evaluate(config)
    assert files_of(config.output) == whole
    (config.output / "results.json").write_text('{"prompts": 22}')
    with pytest.raises(DataError, match=r"results\.json: key 'seeds' is missing or wrong"):
        evaluate(config)
    for name in ("notes", "model"):
        shutil.copytree(students["gpt2"], tmp_path / name)
        with pytest.raises(UsageError, match="nothing says that it is an evaluation of ours"):
            evaluate(config.model_copy(update={"output": tmp_path / name}))
    with output_folder(config.output, "evaluation", "evaluate"), pytest.raises(OutputBusy, match="writes it now"):
        evaluate(config)


def test_the_teacher_has_a_parallelism_of_its_own(
    source: Path, students: dict[str, Path], teachers: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, load = [], module.load_engine

    def loaded(model: ModelInfo, options: ModelOptions, groups: int) -> Engine:
        sizes.append((Path(model.name).parent.name[:8], options.tensor_parallel_size))
        return load(model, options, groups)

    monkeypatch.setattr(module, "load_engine", loaded)
    config = evaluate_config(students["opt"], source, tmp_path / "a", teacher=str(teachers["opt"]), limit=2, seeds=[1])
    evaluate(config.model_copy(update={"tensor_parallel_size": 2, "teacher_tensor_parallel_size": 4}))
    evaluate(config.model_copy(update={"tensor_parallel_size": 2, "output": tmp_path / "b"}))
    assert sizes == [("students", 2), ("teachers", 4), ("students", 2), ("teachers", 2)]
    assert (tmp_path / "a" / "results.json").read_text() == (tmp_path / "b" / "results.json").read_text()
