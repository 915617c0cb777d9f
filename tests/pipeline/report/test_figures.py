from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from helpers.tiny import write_jsonl

from dpkd_offline.common.errors import DataError
from dpkd_offline.pipeline.report import figures
from dpkd_offline.pipeline.report.curves import MOST_POINTS, read_curves
from dpkd_offline.pipeline.report.figures import Series
from dpkd_offline.pipeline.report.responses import Scores, examples

NAMES = ["_private $x$", "<b>\x1b", "漢字", "d" * 90]


def lines() -> str:
    values = [Series(name, [0, 1, 2], [n, math.nan, math.inf if n == 1 else 2.0]) for n, name in enumerate(NAMES)]
    return figures.line_chart("f", "an alt <text>", values, marks={1: "round 1"}, y_label="nats")


def points() -> str:
    groups = [Series(name, [n], [1.0], error=[0.1]) for n, name in enumerate(NAMES)]
    return figures.scatter_chart("f", "an alt <text>", groups, x_label="x", y_label="y", ordered=True)


def bars() -> str:
    values = {name: [1.0, None] for name in NAMES}
    return figures.bar_chart("f", "an alt <text>", ["a", "b"], values, intervals={NAMES[0]: [(0.5, 2.0), None]})


def shares() -> str:
    parts = {"wins": 41.0, "ties": 40.0, "losses": 19.0}
    return figures.share_chart("f", "an alt <text>", dict.fromkeys(NAMES, parts))


def intervals() -> str:
    rows = {name: (n, n - 0.5, n + 1.0) for n, name in enumerate(NAMES)}
    return figures.interval_chart("f", "an alt <text>", rows, {"better": [], "worse": NAMES}, x_label="x")


def histogram() -> str:
    return figures.histogram_chart("f", "an alt <text>", {name: ([1.0, 7.0], [3, 1]) for name in NAMES}, x_label="x")


@pytest.mark.parametrize("draw", [lines, points, bars, shares, intervals, histogram])
def test_a_figure_takes_any_name_and_is_the_same_each_time(draw: Callable[[], str]) -> None:
    svg = draw()
    assert svg == draw()
    root = ElementTree.fromstring(svg)
    assert (root.attrib["role"], root.attrib["aria-label"]) == ("img", "an alt <text>")
    words = {element.text for element in root.iter() if element.tag.endswith("text")}
    assert words >= {"_private $x$", "<b>\\u001b", "漢字"}
    ids = re.findall(r' id="([^"]*)"', svg)
    assert len(ids) == len(set(ids)) and all(name.startswith("f-") for name in ids)
    assert set(re.findall(r'(?:url\(|href=")#([^")]*)', svg)) == set(ids)
    assert "http" not in svg.replace('xmlns="http://www.w3.org/2000/svg"', "") and "<metadata" not in svg
    assert set(re.findall(r"(?:fill|stroke): ([^;\"]*)", svg)) <= {"none", *figures.COLORS.values(), "currentColor"}


def test_a_figure_does_not_heed_the_users_matplotlibrc(monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib

    plain = lines()
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "lines.linewidth": 9}):
        assert lines() == plain


def test_a_long_metrics_file_is_thinned_to_means(tmp_path: Path) -> None:
    path, count = tmp_path / "metrics.jsonl", 50 * MOST_POINTS
    rows = [{"step": n, "loss": float(n % 50)} for n in range(1, count + 1)]
    write_jsonl(path, [*rows, {"step": count, "val_loss_kd": 1.0}])
    curves = read_curves(path)
    assert (len(curves["loss"].steps), curves["loss"].steps[-1], curves.steps) == (MOST_POINTS, count, count)
    assert set(curves["loss"].values) == {24.5}
    assert curves["val_loss_kd"].values == [1.0] and not curves["none"]
    with path.open("ab") as file:
        file.write(b"x" * (1 << 21))
    with pytest.raises(DataError, match=rf"metrics\.jsonl:{count + 2}: not a JSON object"):
        read_curves(path)


def test_examples_are_the_best_the_worst_and_what_changed_most(tmp_path: Path) -> None:
    def scores(values: list[float]) -> Scores:
        rows = [
            {"seed": 1, "id": f"{n}", "prompt": f"p{n}", "response": "", "rouge_l": v} for n, v in enumerate(values)
        ]
        path = write_jsonl(tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl", rows)
        read, place = Scores(path, 1), 0
        for n, line in enumerate(path.read_bytes().splitlines(keepends=True)):
            read.first[str(n)], place = (values[n], n + 1, place), place + len(line)
        return read

    before, after = scores([10.0] * 20), scores([float(n) for n in range(20)])
    groups = dict(examples({"student-before": before, "student-after": after}, "student-before", "student-after"))
    prompts = {title: [example.question[0].text for example in of] for title, of in groups.items()}
    assert prompts["What got better the most"] == ["p19", "p18", "p17"]
    assert prompts["What got worse the most"] == ["p0", "p1", "p2"]
    assert prompts["The best responses"] == ["p16", "p15", "p14"]  # those that do not stand above
    assert prompts["The worst responses"] == ["p3", "p4", "p5"]
    drawn = prompts.pop("Drawn at random")
    assert len(drawn) == 3 and not set(drawn) & {prompt for shown in prompts.values() for prompt in shown}
    assert groups["The best responses"][0].detail == "Rouge-L: student before 10, student after 16"
