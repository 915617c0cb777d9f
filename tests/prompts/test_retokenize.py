from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from helpers.spaced import KINDS, spaced_model, spaced_tokenizer
from helpers.tiny import build_tokenizer, files_of, generate_config, replace_shard, rows, score_config, write_jsonl

from dpkd_offline.common.errors import DataError, MismatchError, UsageError
from dpkd_offline.config.data import ExportConfig, ImportConfig, SubsetConfig
from dpkd_offline.config.train import TrainConfig
from dpkd_offline.curation.export_pairs import export_pairs
from dpkd_offline.curation.import_pairs import import_pairs
from dpkd_offline.curation.inspect import inspect
from dpkd_offline.curation.merge import subset
from dpkd_offline.curation.verify import verify
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.dataset.schema import PreferencePair, to_table
from dpkd_offline.generation.generate import generate
from dpkd_offline.generation.pairing import retokenized
from dpkd_offline.generation.score_teacher import score_teacher
from dpkd_offline.models.info import ModelInfo
from dpkd_offline.models.loading import load_model
from dpkd_offline.prompts.retokenize import ResponseTokenizer, prompts_for
from dpkd_offline.training.examples import corpus_blocks, pair_stream, reference_stream
from dpkd_offline.training.trainer import train


def make(folder: Path, source: Path, teacher: Path, student: Path, name: str | None = None) -> Dataset:
    if not folder.exists():
        generate(generate_config(folder, "teacher", teacher, prompts=str(source)))
    generate(generate_config(folder, "student", student, student_name=name, max_new_tokens=4))
    score_teacher(score_config(folder, teacher, student=str(student), student_name=name))
    return Dataset.open(folder, name)


def train_config(folder: Path, student: Path, output: Path, **changes: object) -> TrainConfig:
    values = {
        "dataset": folder,
        "student": str(student),
        "output": output,
        "dtype": "float32",
        "max_steps": 2,
        "holdout": 0.0,
    }
    return TrainConfig.model_validate({**values, **changes})


@pytest.fixture(scope="module")
def crossed(
    tmp_path_factory: pytest.TempPathFactory, source: Path, teachers: dict[str, Path], foreign: Path
) -> Dataset:
    return make(tmp_path_factory.mktemp("crossed") / "ds", source, teachers["llama"], foreign)


def test_each_model_sees_its_own_tokens_of_the_same_text(
    crossed: Dataset, teachers: dict[str, Path], foreign: Path
) -> None:
    of_teacher, of_student = ModelInfo(str(teachers["llama"])).tokenizer, ModelInfo(str(foreign)).tokenizer
    teacher = load_model(str(teachers["llama"]), "float32")
    end = of_student.convert_tokens_to_ids("<end>")
    assert crossed.pairs(0).require_provenance()["scored"] == "text"
    seen = 0
    for shard in range(crossed.plan.count):
        for prompt, pair in zip(crossed.prompts.read(shard), crossed.pairs(0).read(shard), strict=True):
            (message,) = prompt.messages
            assert pair.prompt == f"[user]{message['content']}<end>[assistant]"
            assert pair.prompt_ids == of_student(pair.prompt)["input_ids"]
            stopped = pair.chosen_finish_reason == "stop"
            assert pair.chosen_ids == of_student(pair.chosen)["input_ids"] + [end] * stopped
            asked = of_teacher(pair.rejected)["input_ids"] + [1] * (pair.rejected_finish_reason == "stop")
            assert len(pair.teacher_rejected_logps) == len(asked)
            assert len(pair.behavior_rejected_logps) == len(pair.rejected_ids)
            with torch.inference_mode():
                logits = teacher(torch.tensor([prompt.prompt_ids + asked])).logits[0].double()
            logps = logits.log_softmax(-1)[len(prompt.prompt_ids) - 1 : -1].gather(-1, torch.tensor(asked)[:, None])
            assert pair.teacher_rejected_logps == pytest.approx(logps[:, 0].tolist(), abs=1e-4)
            seen += pair.rejected_exact
    assert seen > 0


def test_what_is_not_the_same_text_is_counted(crossed: Dataset) -> None:
    assert all(rows == crossed.plan.rows for rows in verify(crossed.root).rows.values())
    report = inspect(crossed.root)["tables"]["pairs/round-000"]
    pairs = [pair for shard in range(crossed.plan.count) for pair in crossed.pairs(0).read(shard)]
    for side in ("chosen", "rejected"):
        assert report[f"{side} not exact"]["mean"] == np.mean([not getattr(p, f"{side}_exact") for p in pairs])
    lost = [p for p in pairs if not p.rejected_exact]
    assert any("\ufffd" in p.rejected for p in lost)  # half a character that was cut off, or never was one


def test_the_card_tells_of_both_spellings(crossed: Dataset, tmp_path: Path) -> None:
    text, loaded = (crossed.root / "README.md").read_text(), {}
    of = {"pairs": crossed.pairs(0), "prompts": crossed.prompts, "student_prompts": crossed.student_prompts}
    for config, table in of.items():
        loaded[config] = datasets.load_dataset(str(crossed.root), config, split="train", cache_dir=str(tmp_path))
        rows = [row for shard in range(table.plan.count) for row in table.read_arrow(shard).to_pylist()]
        assert loaded[config].to_list() == rows
    exact = [f"{np.mean(loaded['pairs'][f'{side}_exact']):.1%}" for side in ("chosen", "rejected")]
    assert f"with nothing lost on the way in {exact[0]} of y_t and {exact[1]} of y_s" in text
    own = np.mean([np.mean(logps) for logps in loaded["pairs"]["teacher_chosen_logps"]])
    (line,) = (line for line in text.splitlines() if line.startswith("| `pairs/round-000` ") and "| y_t " in line)
    assert f"| {own:.3f} " in line
    assert "- `prompts/student`: template `chat`, tokenizer `foreign" in text


def test_references_end_as_the_model_ends_a_turn(crossed: Dataset, foreign: Path, tmp_path: Path) -> None:
    """Which is not what its tokenizer calls EOS: a student taught that would close y_s otherwise than y_t is closed."""
    model = ModelInfo(str(foreign))
    end = model.tokenizer.convert_tokens_to_ids("<end>")
    assert end != model.tokenizer.eos_token_id and end in model.eos_ids
    config = train_config(crossed.root, foreign, tmp_path, max_length=250)
    examples = list(reference_stream(crossed, config, model).epoch(0))
    assert examples and {example.responses[0][-1] for example in examples} == {end}


def test_the_student_trains_on_its_own_tokens(crossed: Dataset, foreign: Path, tmp_path: Path) -> None:
    config = train_config(crossed.root, foreign, tmp_path / "out", holdout=0.3, validate_rouge=3, validate_limit=4,
                          validate_max_new_tokens=8, max_length=250)  # fmt: skip
    train(config)
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["loss"]) for line in lines if "loss" in line)
    assert any("val_rouge_l" in line for line in lines)
    train(train_config(crossed.root, foreign, tmp_path / "sft", objective="sft", max_length=250))
    example = next(iter(pair_stream(crossed, config, 10**6)[0].epoch(0)))
    assert len(example.teacher_logps[1]) != len(example.responses[1])
    assert example.prompt_ids in [p.prompt_ids for s in range(3) for p in crossed.student_prompts.read(s)]


@pytest.mark.parametrize("objective", ["kd", "rkl", "akl", "minillm", "dpkd-token"])
def test_objectives_that_compare_tokens_refuse(crossed: Dataset, foreign: Path, tmp_path: Path, objective: str) -> None:
    with pytest.raises(UsageError, match=f"do not share a tokenizer, and objective '{objective}' compares them token"):
        train(train_config(crossed.root, foreign, tmp_path / "out", objective=objective))
    assert not (tmp_path / "out").exists()


def test_the_student_is_named_and_the_right_one(
    crossed: Dataset, teachers: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(crossed.root, tmp_path / "ds")
    shutil.rmtree(tmp_path / "ds" / "pairs")
    config = score_config(tmp_path / "ds", teachers["llama"])
    with pytest.raises(UsageError, match=r"round-000/_table\.json: .* name it with --student"):
        score_teacher(config)
    with pytest.raises(MismatchError, match="sampled with another tokenizer than that of --student"):
        score_teacher(config.model_copy(update={"student": str(students["llama"])}))
    with pytest.raises(UsageError, match="--top-k is for students that share"):
        score_teacher(config.model_copy(update={"student": str(students["llama"]), "top_k": 2}))
    with pytest.raises(MismatchError, match=r"prompts/student was made with .*--student-name"):
        other = tmp_path / "other"
        shutil.copytree(students["llama"], other)
        tokenizer = ModelInfo(str(other)).tokenizer
        tokenizer.add_tokens(["<new>"])
        tokenizer.save_pretrained(other)
        generate(generate_config(tmp_path / "ds", "student", other, round=1))


def test_identical_tokenizers_of_two_names_give_the_log_probs_of_ids(
    tmp_path: Path, source: Path, teachers: dict[str, Path], students: dict[str, Path]
) -> None:
    renamed = tmp_path / "renamed"
    shutil.copytree(students["llama"], renamed)
    tokenizer = ModelInfo(str(renamed)).tokenizer
    tokenizer.add_tokens(["<never said>"])
    tokenizer.save_pretrained(renamed)
    by_ids = make(tmp_path / "ds", source, teachers["llama"], students["llama"])
    before = files_of(tmp_path / "ds")
    by_text = make(tmp_path / "ds", source, teachers["llama"], renamed, name="renamed")
    assert by_text.pairs(0).require_provenance()["scored"] == "text"
    compared = 0
    for shard in range(by_ids.plan.count):
        for one, other in zip(by_ids.pairs(0).read(shard), by_text.pairs(0).read(shard), strict=True):
            assert one.rejected_ids == other.rejected_ids  # the same weights and seeds
            assert one.teacher_chosen_logps == pytest.approx(other.teacher_chosen_logps, abs=1e-3)
            if other.rejected_exact:
                assert one.teacher_rejected_logps == pytest.approx(other.teacher_rejected_logps, abs=1e-3)
                compared += 1
    assert compared >= 3
    after = files_of(tmp_path / "ds")
    assert {name for name in before if before[name] != after[name]} <= {"README.md"}
    assert {name.split("/")[0] for name in after.keys() - before.keys()} == {"students"}
    assert verify(tmp_path / "ds").rows.keys() >= {"pairs/round-000", "students/renamed/pairs/round-000"}


def test_prompts_are_rendered_where_nothing_was_stored_for_the_student(crossed: Dataset, foreign: Path) -> None:
    model = ModelInfo(str(foreign))
    stored, rendered = crossed.student_prompts, prompts_for(Dataset.open(crossed.root, "nobody"), model)
    assert prompts_for(crossed, model).name == stored.name
    assert rendered.name == "prompts"
    assert [rendered.read_arrow(s) for s in range(3)] == [stored.read_arrow(s) for s in range(3)]


def test_a_response_ends_as_its_model_was_taught(foreign: Path) -> None:
    tokenizer = ModelInfo(str(foreign)).tokenizer
    end = tokenizer.convert_tokens_to_ids("<end>")
    assert ResponseTokenizer(tokenizer, "chat", [1, end]).end == end
    assert ResponseTokenizer(tokenizer, "alpaca", [1, end]).end == 1
    assert ResponseTokenizer(tokenizer, "chat", [1]).end == 1
    ids, exact = ResponseTokenizer(tokenizer, "chat", [1, end]).encode(
        ["[assistant]"] * 4, ["a", "a", "", ""], ["stop", "length", "stop", "length"]
    )
    (a,) = tokenizer("a")["input_ids"]
    assert ids == [[a, end], [a], [end], [end]]
    assert exact == [True, True, True, False]


def test_several_turns_need_a_chat_template(
    tmp_path: Path, teachers: dict[str, Path], students: dict[str, Path]
) -> None:
    turns = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    source = write_jsonl(tmp_path / "p.jsonl", [{"id": "talk", "messages": turns}, *rows(3)])
    generate(generate_config(tmp_path / "ds", "teacher", teachers["llama"], prompts=str(source)))
    bare = tmp_path / "bare"
    shutil.copytree(students["llama"], bare)
    (bare / "chat_template.jinja").unlink()
    tokenizer = ModelInfo(str(bare)).tokenizer
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(bare)
    with pytest.raises(Exception, match=r"prompts-0.*parquet: row 0: prompt 'talk': column 'messages' needs"):
        generate(generate_config(tmp_path / "ds", "student", bare))
    assert not (tmp_path / "ds" / "prompts" / "student").exists()


def test_pairs_whose_text_gives_other_tokens_can_be_left_out(crossed: Dataset, tmp_path: Path) -> None:
    copied = Dataset.open(Path(shutil.copytree(crossed.root, tmp_path / "ds")))
    pairs = [pair for shard in range(copied.plan.count) for pair in copied.pairs(0).read(shard)]
    first = [replace(p, chosen_exact=k % 3 > 0, rejected_exact=k % 2 > 0) for k, p in enumerate(pairs[:8])]
    replace_shard(copied.pairs(0), 0, to_table(first, PreferencePair.schema))
    exact = [pair.id for pair in (*first, *pairs[len(first) :]) if pair.chosen_exact and pair.rejected_exact]
    assert exact
    subset(SubsetConfig(dataset=copied.root, output=tmp_path / "some", drop_inexact=True))
    some = Dataset.open(tmp_path / "some")
    assert [pair.id for shard in range(some.plan.count) for pair in some.pairs(0).read(shard)] == exact


def test_pairs_go_out_in_the_tokens_of_the_student(crossed: Dataset, foreign: Path, tmp_path: Path) -> None:
    assert isinstance(crossed.root, Path)
    export_pairs(ExportConfig(dataset=crossed.root, output=tmp_path / "trl"))
    rows = pq.read_table(tmp_path / "trl" / "data").to_pylist()
    for row, pair in zip(rows, [pair for shard in range(3) for pair in crossed.pairs(0).read(shard)], strict=True):
        assert (row["prompt_ids"], row["chosen_ids"]) == (pair.prompt_ids, pair.chosen_ids)
        assert row["ref_chosen_logps"] == pytest.approx(sum(pair.teacher_chosen_logps))
    assert f"template `chat`, tokenizer `{foreign.name}`." in " ".join(
        (tmp_path / "trl" / "README.md").read_text().split()
    )


def test_imported_text_ends_as_the_chat_template_ends_a_turn(foreign: Path, tmp_path: Path) -> None:
    row = {"prompt": [{"role": "user", "content": "Tea?"}], "chosen": "Yes.<end>", "rejected": "No."}
    source = write_jsonl(tmp_path / "p.jsonl", [row])
    import_pairs(ImportConfig(source=str(source), dataset=tmp_path / "ds", model=str(foreign)))
    tokenizer, dataset = ModelInfo(str(foreign)).tokenizer, Dataset.open(tmp_path / "ds")
    responses = [dataset.responses(role, 0).read(0)[0].response_ids for role in ("teacher", "student")]
    assert [tokenizer.decode(ids) for ids in responses] == ["Yes.<end>", "No.<end>"]


ASKED = "### Instruction:\nDescribe tea in 3 words.\n\n### Response:\n"
ANSWERS = ["people like it", "a river", "  two spaces", "\n\nin 3 lines\n", "salt, a violin", "the moon on day 4."]


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_follow_their_prompt_where_a_tokenizer_begins_with_a_space(kind: str) -> None:
    """What stands behind a prompt is its continuation, with no space that the text does not have."""
    tokenizer = spaced_tokenizer(kind)
    of_model = ResponseTokenizer(tokenizer, "alpaca", [2])
    decode, shown = partial(tokenizer.decode, clean_up_tokenization_spaces=False), 0
    for prompt in (ASKED, "Say tea:", "Describe"):
        before, alone = tokenizer(prompt)["input_ids"], [tokenizer(text)["input_ids"] for text in ANSWERS]
        ids, exact = of_model.encode([prompt] * len(ANSWERS), ANSWERS, ["length"] * len(ANSWERS))
        for text, tokens, by_itself in zip(ANSWERS, ids, alone, strict=True):
            assert decode(before + tokens) == prompt + text
            together = tokenizer(prompt + text)["input_ids"]
            if together[: len(before)] == before:
                assert tokens == together[len(before) :]
            shown += tokens != by_itself
        assert all(exact)
        assert of_model.encodes_to([prompt] * len(ANSWERS), ANSWERS, [[*tokens, 2] for tokens in ids]) == exact
        assert not of_model.encodes_to([prompt], ["people like it"], alone[:1])[0]
        assert of_model.continuations([prompt], ["people like it"]) == ids[:1]
    assert shown >= 9
    unknown, exact = of_model.encode([ASKED], ["☕ and tea"], ["stop"])  # which no token of this tokenizer is of
    assert exact == [False] and unknown[0][-1] == 2


@pytest.mark.parametrize("kind", KINDS)
def test_the_space_that_a_template_leaves_to_the_tokenizer_is_there(kind: str) -> None:
    tokenizer = spaced_tokenizer(kind)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}[ask] {{ m.content }} [say]"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    prompt, text = "[ask] a river [say]", "people like it"
    (ids,), (exact,) = ResponseTokenizer(tokenizer, "chat", [2]).encode([prompt], [text], ["stop"])
    whole = f"{prompt} {text}</s>"
    assert exact and tokenizer(prompt)["input_ids"] + ids == tokenizer(whole)["input_ids"]
    (ids,), (exact,) = ResponseTokenizer(tokenizer, "none", [2]).encode([prompt], [text], ["stop"])
    assert exact and tokenizer(prompt)["input_ids"] + ids == tokenizer(f"{prompt}{text}</s>")["input_ids"]


def test_tokens_of_bytes_are_those_of_the_text_alone(foreign: Path) -> None:
    """Wherever they stand: what was right stays as it is, to the bit."""
    for tokenizer in (build_tokenizer(chat=True), ModelInfo(str(foreign)).tokenizer):
        of_model = ResponseTokenizer(tokenizer, "chat", [tokenizer.eos_token_id])
        texts = [*ANSWERS, " in", "1234", "'s", "\n", " ", "é☕", "half \ufffd", "</s>", "people  \n like"]
        alone = [tokenizer(text)["input_ids"] for text in texts]
        texts_again = [tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in alone]
        for prompt in (ASKED, "<|user|>a</s><|assistant|>", "[user]a<end>[assistant]", "tea \n", "tea ", "12", "é"):
            ids, exact = of_model.encode([prompt] * len(texts), texts, ["length"] * len(texts))
            assert (ids, exact) == (alone, [a == b for a, b in zip(texts, texts_again, strict=True)])


def test_a_teacher_of_words_scores_what_its_tokenizer_makes_of_prompt_and_response(
    source: Path, students: dict[str, Path], tmp_path: Path
) -> None:
    """log p is that of the tokens that continue the prompt, in score-teacher and for a student of words in sft."""
    words = spaced_model(tmp_path / "words", "normalizer")
    dataset = make(tmp_path / "ds", source, words, students["llama"])
    tokenizer, model, told = ModelInfo(str(words)).tokenizer, load_model(str(words), "float32"), 0
    for shard in range(dataset.plan.count):
        for prompt, pair in zip(dataset.prompts.read(shard), dataset.pairs(0).read(shard), strict=True):
            whole = tokenizer(prompt.prompt + pair.rejected)["input_ids"]
            if not pair.rejected_exact or whole[: len(prompt.prompt_ids)] != prompt.prompt_ids:
                continue
            told += tokenizer(pair.rejected)["input_ids"] != whole[len(prompt.prompt_ids) :]
            whole += [2] * (pair.rejected_finish_reason == "stop")
            with torch.inference_mode():
                logps = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
            asked = torch.tensor(whole[len(prompt.prompt_ids) :])
            expected = logps[len(prompt.prompt_ids) - 1 : -1].gather(-1, asked[:, None])[:, 0]
            assert pair.teacher_rejected_logps == pytest.approx(expected.tolist(), abs=1e-4)
    assert told > 0
    config, info = train_config(dataset.root, words, tmp_path / "out", max_length=500), ModelInfo(str(words))
    by_id = {prompt.id: prompt for shard in range(dataset.plan.count) for prompt in dataset.prompts.read(shard)}
    for example in reference_stream(dataset, config, info).epoch(0):
        prompt, (response,) = by_id[example.id], example.responses
        assert tokenizer.decode([*example.prompt_ids, *response[:-1]]) == tokenizer.decode(
            tokenizer(prompt.prompt + prompt.references[0])["input_ids"]
        )


def test_text_with_a_token_that_the_embedding_has_not_is_refused(
    crossed: Dataset, teachers: dict[str, Path], foreign: Path, tmp_path: Path
) -> None:
    """Of a student who gets y_t by text, of references, and of a corpus."""
    student = Path(shutil.copytree(foreign, tmp_path / "student"))
    tokenizer = ModelInfo(str(student)).tokenizer
    tokenizer.add_tokens(["like very much"])
    tokenizer.save_pretrained(student)
    model, config = ModelInfo(str(student)), train_config(crossed.root, student, tmp_path / "out", max_length=250)
    with pytest.raises(DataError, match="prompt 'row-0': column 'references' has the token 'like very much'"):
        reference_stream(Dataset.open(crossed.root), config, model)
    with pytest.raises(DataError, match="lm-corpus: row 2: column 'text' has the token 'like very much'"):
        next(corpus_blocks(lambda: iter(["tea", "people like very much"]), model, 50))
    first = crossed.responses("teacher", 0).read(0)[0]
    with pytest.raises(DataError, match=f"prompt '{first.id}': column 'response' has the token 'like very much'"):
        asked = crossed.prompts.read(0)[:1], ResponseTokenizer(ModelInfo(str(teachers["llama"])).tokenizer, "chat", [1])
        read = asked[0], ResponseTokenizer(tokenizer, "chat", [1])
        retokenized([replace(first, response="people like very much")], asked, read, model)
