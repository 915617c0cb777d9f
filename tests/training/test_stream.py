from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from helpers.runs import make_pairs

from dpkd_offline.common.errors import DataError
from dpkd_offline.config.train import TrainConfig
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.models.info import ModelInfo
from dpkd_offline.training.examples import corpus_blocks, pair_source, pair_stream, reference_stream
from dpkd_offline.training.stream import (
    WINDOW_SHARDS,
    Example,
    ExampleSource,
    HeldOutExamples,
    Mask,
    Stream,
    prefetch,
    scan,
)


def train_config(dataset: Path, student: Path | str = "s", **changes: object) -> TrainConfig:
    return TrainConfig.model_validate(
        {"dataset": dataset, "student": str(student), "output": "o", "holdout": 0.0, **changes}
    )


def ids(batches: Iterator[list[Example]]) -> list[list[str]]:
    return [[e.id for e in batch] for batch in batches]


def test_each_epoch_has_every_pair_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    dataset = make_pairs(tmp_path, 103, shard_size=4)  # more shards than a window
    stream, round = pair_stream(dataset, train_config(tmp_path, seed=3), 10**6)
    assert (len(stream), round) == (103, 0)
    epochs = [[e.id for e in stream.epoch(n)] for n in range(3)]
    for epoch in epochs:
        assert sorted(map(int, epoch)) == list(range(103))
    assert epochs[0] != epochs[1] != epochs[2]
    again, _ = pair_stream(dataset, train_config(tmp_path, seed=3), 10**6)
    assert [e.id for e in again.epoch(1)] == epochs[1]
    other, _ = pair_stream(dataset, train_config(tmp_path, seed=4), 10**6)
    assert [e.id for e in other.epoch(1)] != epochs[1]


def test_rows_of_many_shards_are_mixed(tmp_path: Path) -> None:
    stream, _ = pair_stream(make_pairs(tmp_path, 96, shard_size=8), train_config(tmp_path), 10**6)
    first = [int(e.id) // 8 for e in islice(stream.epoch(0), 16)]
    assert len(set(first)) > 6


def test_the_order_is_that_of_shuffled_windows_of_shuffled_shards(tmp_path: Path) -> None:
    """Written again, row by row: what a checkpoint of an older run counts on."""
    dataset = make_pairs(tmp_path, 150, shard_size=4)
    stream, _ = pair_stream(dataset, train_config(tmp_path, seed=5, truncated="drop"), 10**6)
    for epoch in range(2):
        random, expected = np.random.default_rng([5, epoch]), []
        shards = random.permutation(dataset.plan.count)
        for start in range(0, len(shards), WINDOW_SHARDS):
            places = [
                (shard, row)
                for shard in shards[start : start + WINDOW_SHARDS]
                for row, pair in enumerate(dataset.pairs(0).read(int(shard)))
                if pair.chosen_finish_reason == "stop"
            ]
            for shard, row in random.permutation(np.array(places)):
                pair = dataset.pairs(0).read(int(shard))[row]
                responses = pair.chosen_ids, pair.rejected_ids
                teacher = pair.teacher_chosen_logps, pair.teacher_rejected_logps
                behavior = [], pair.behavior_rejected_logps
                expected.append(Example(pair.id, pair.prompt_ids, responses, teacher, behavior))
        assert list(stream.epoch(epoch)) == expected


def test_a_student_that_does_not_know_every_token_is_refused(tmp_path: Path) -> None:
    dataset = make_pairs(tmp_path, 9, shard_size=4)
    assert len(pair_stream(dataset, train_config(tmp_path), 7)[0]) == 9
    with pytest.raises(
        DataError, match=r"row 0: column 'rejected_ids' holds a token id that a vocabulary of 6 has not"
    ):
        pair_stream(dataset, train_config(tmp_path), 6)


def test_resuming_anywhere_gives_the_same_rest(tmp_path: Path) -> None:
    stream, _ = pair_stream(make_pairs(tmp_path, 86, shard_size=4), train_config(tmp_path), 10**6)
    whole = ids(islice(stream.batches(8), 22))
    assert len(whole) == 2 * 11
    assert [len(b) for b in whole[:11]] == [8] * 10 + [6]
    for start in range(len(whole)):
        assert ids(islice(stream.batches(8, start), 22 - start)) == whole[start:]


def test_examples_carry_the_sums_of_the_teacher(tmp_path: Path) -> None:
    stream, _ = pair_stream(make_pairs(tmp_path, 9, shard_size=4), train_config(tmp_path), 10**6)
    for e in stream.epoch(0):
        assert e.responses == ([2, 3], [4, 5, 6])
        assert [sum(logps) for logps in e.teacher_logps] == [-1.5, -3.0 - float(e.id)]
        assert len(e.prompt_ids) == int(e.id) % 5 + 1


def test_a_scan_reads_every_shard_once_and_a_stream_only_what_it_gives(tmp_path: Path) -> None:
    config = train_config(tmp_path, holdout=0.3, drift_every=1, drift_pairs=7, validate_limit=5)
    source = pair_source(make_pairs(tmp_path, 200, shard_size=4), config, 0, 10**6, False, False)
    (table, columns), read = source.tables[0], []

    class Noted:
        def __getattr__(self, name: str) -> Any:
            return getattr(table, name)

        def read_arrow(self, shard: int, wanted: list[str]) -> Any:
            read.append(shard)
            assert wanted == columns
            return table.read_arrow(shard, wanted)

    source = replace(source, tables=[(Noted(), columns)])
    split = scan(source, config)
    assert read == list(range(50))
    stream = Stream(source, split, config)
    assert len(read) == 50
    training, held_out = {e.id for e in stream.epoch(0)}, {e.id for e in stream.held_out.read()}
    assert len(training) == len(stream) == 200 - stream.held_out.count
    assert len(held_out) == 5 and not held_out & training
    assert len({e.id for e in stream.drift_examples()} & training) == 7
    smallest = sorted((shard, row) for _, shard, row in sorted(split.validation)[:2])
    assert [e.id for e in stream.held_out.read(2)] == [str(4 * shard + row) for shard, row in smallest]
    read.clear()
    next(stream.epoch(1, len(stream) - 1))
    assert len(read) <= WINDOW_SHARDS  # of the last window alone


@pytest.mark.parametrize("replay", [0.0, 0.4])
def test_each_row_is_of_the_round_that_is_its_turn(replay: float, tmp_path: Path) -> None:
    """Written again, row by row: what a checkpoint of an older run counts on."""
    config = train_config(tmp_path, seed=5, regenerate_every=1, replay=replay, drift_pairs=30)
    source = pair_source(make_pairs(tmp_path, 40, shard_size=8), config, 0, 10**6, False, False)

    def is_in(round: int, id_: str) -> bool:
        return round == 0 or int(id_) % (4 - round) != 0

    def of_round(round: int) -> ExampleSource:
        def faults(tables: Sequence[pa.Table]) -> dict[str, Mask]:
            ids_of = tables[0]["id"].to_pylist()
            return {why: np.array([not is_in(round, i) for i in ids_of]) for why in ("truncated", "too long")}

        def examples(tables: Sequence[pa.Table]) -> Callable[[int], Example]:
            original = source.examples(tables)
            return lambda row: replace(original(row), prompt_ids=[round])

        return replace(source, faults=faults, examples=examples)

    stream = Stream(of_round(0), scan(of_round(0), config), config)
    drift = [e.id for e in stream.drift_examples()]
    assert len(drift) == 30
    for latest in (1, 2):
        stream.add_round(of_round(latest))
        for epoch in range(2):
            random = {shard: np.random.default_rng([5, epoch, shard, latest]) for shard in range(5)}
            earlier = {shard: (random[shard].random(8), random[shard].integers(0, latest, 8)) for shard in range(5)}
            rounds = Counter[int]()
            for example in stream.epoch(epoch):
                shard, row = divmod(int(example.id), 8)
                turn = int(earlier[shard][1][row]) if earlier[shard][0][row] < replay else latest
                while not is_in(turn, example.id):
                    turn -= 1
                assert example.prompt_ids == [turn]
                rounds[turn] += 1
            assert rounds.total() == 40 and len(rounds) == latest + 1
        now = list(stream.drift_examples())
        assert [e.id for e in now] == [id_ for id_ in drift if is_in(latest, id_)]
        assert all(e.prompt_ids == [latest] for e in now)


def test_truncated_and_long_pairs_can_be_dropped(tmp_path: Path) -> None:
    dataset = make_pairs(tmp_path, 40, shard_size=8)
    stream, _ = pair_stream(dataset, train_config(tmp_path, truncated="drop"), 10**6)
    assert {int(e.id) for e in stream.epoch(0)} == {n for n in range(40) if n % 4}
    stream, _ = pair_stream(dataset, train_config(tmp_path, max_length=5), 10**6)
    assert {int(e.id) for e in stream.epoch(0)} == {n for n in range(40) if n % 5 + 1 + 3 <= 5}


def test_a_row_is_left_out_for_the_first_reason_that_it_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of 40 rows 16 are too long, and of the others 6 cut off, whether they would be held out or not."""
    too_long, cut_off = ([n % 5 + 1 + 3 > 6 for n in range(40)], [n % 4 == 0 for n in range(40)])
    wanted = [not (long or cut) for long, cut in zip(too_long, cut_off, strict=True)]
    config = train_config(tmp_path, truncated="drop", max_length=6, holdout=0.4)
    dataset = make_pairs(tmp_path, 40, shard_size=8)
    source = pair_source(dataset, config, 0, 10**6, False, False)
    split = scan(source, config)
    assert split.rows == 40
    assert split.dropped == {
        "longer than 6 tokens (--max-length, or the context of the student)": 16,
        "cut off by length (--truncated drop)": 6,
    }
    assert "check pairs/round-000: 40/40 rows" in capsys.readouterr().err
    stream = Stream(source, split, config)
    training, held_out = [int(e.id) for e in stream.epoch(0)], [int(e.id) for e in stream.held_out.read()]
    assert 0 < len(held_out) == stream.held_out.count < 18 and len(training) == len(stream)
    assert sorted(training + held_out) == [n for n in range(40) if wanted[n]]
    assert np.concatenate([source.keep(tables) for _, tables in source.read_checked()]).tolist() == wanted


def test_values_that_no_scan_has_checked_are_checked_when_they_are_read(tmp_path: Path) -> None:
    source = pair_source(make_pairs(tmp_path, 20, shard_size=4), train_config(tmp_path), 0, 10**6, False, False)
    checked: list[tuple[int, list[str]]] = []
    source = replace(source, check=lambda shard, tables: checked.append((shard, tables[0]["id"].to_pylist())))
    draws = [(0.1, 3, 2), (0.2, 0, 1), (0.3, 3, 0)]
    assert [e.id for e in source.examples_at(draws)] == ["1", "12", "14"]
    assert checked == []
    assert [e.id for e in HeldOutExamples(source, draws, 3, checked=False).read()] == ["1", "12", "14"]
    assert checked == [(0, ["0", "1", "2", "3"]), (3, ["12", "13", "14", "15"])]


def test_references_end_with_eos(datasets_by_family: dict[str, Path], teachers: dict[str, Path]) -> None:
    folder = datasets_by_family["llama"]
    model = ModelInfo(str(teachers["llama"]))
    stream, tokenizer = reference_stream(Dataset.open(folder), train_config(folder), model), model.tokenizer
    assert len(stream) == 22
    for example in stream.epoch(0):
        (response,) = example.responses
        assert response[-1] == tokenizer.eos_token_id
        assert "is a thing that people like" in tokenizer.decode(response)


def test_a_damaged_shard_stops_before_the_first_step(tmp_path: Path) -> None:
    dataset = make_pairs(tmp_path, 20, shard_size=4)
    path = dataset.pairs(0).path(3)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    with pytest.raises(Exception, match=r"pairs-00003-of-00005\.parquet: its sha256"):
        pair_stream(dataset, train_config(tmp_path), 10**6)


def test_missing_pairs_are_named(tmp_path: Path) -> None:
    dataset = make_pairs(tmp_path, 20, shard_size=4)
    (dataset.pairs(0).folder / "_manifest" / "pairs-00002-of-00005.json").unlink()
    with pytest.raises(DataError, match=r"pairs-00002-of-00005\.parquet: not committed \(1 of 5 shards"):
        pair_stream(dataset, train_config(tmp_path), 10**6)
    with pytest.raises(DataError, match="no pairs yet"):
        pair_stream(Dataset(tmp_path / "other", dataset.prompt_set, dataset.plan), train_config(tmp_path), 10**6)


def test_the_next_item_is_made_while_one_is_in_use() -> None:
    made = [threading.Event() for _ in range(3)]

    def items() -> Iterator[int]:
        for number, event in enumerate(made):
            event.set()
            yield number

    coming = prefetch(items())
    assert next(coming) == 0
    assert made[1].wait(10)  # though nobody has asked for it
    assert not made[2].is_set()
    assert list(coming) == [1, 2]


def test_what_fails_ahead_fails_where_it_is_asked_for() -> None:
    def items() -> Iterator[int]:
        yield 0
        raise DataError("a shard is damaged")

    coming = prefetch(items())
    assert next(coming) == 0
    with pytest.raises(DataError, match="a shard is damaged"):
        next(coming)


def test_corpus_blocks_are_the_text_over_and_over(teachers: dict[str, Path]) -> None:
    model = ModelInfo(str(teachers["gpt2"]))
    tokenizer = model.tokenizer
    texts = ["Describe tea.", "Explain a river.", "Praise chess."]
    tokens = [t for text in texts for t in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    per_pass = len(tokens) // 5
    blocks = list(islice(corpus_blocks(lambda: iter(texts), model, 5), 2 * per_pass))
    assert np.concatenate(blocks[:per_pass]).tolist() == tokens[: 5 * per_pass]
    assert blocks[per_pass:] == blocks[:per_pass]
    with pytest.raises(DataError, match="fewer than 5000 tokens"):
        next(corpus_blocks(lambda: iter(texts), model, 5000))
