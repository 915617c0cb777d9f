"""The page of a study, on one that is written by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree.ElementTree import Element

import html5lib
import pytest
from helpers.hand_study import write_study

from dpkd_offline.config.report import ReportConfig
from dpkd_offline.pipeline.report.blocks import Figures, Fold, Items, Links, Page, Section, Table
from dpkd_offline.pipeline.report.markdown import markdown_page
from dpkd_offline.pipeline.report.page import html_page
from dpkd_offline.pipeline.report.report import report
from dpkd_offline.pipeline.report.study import Study, numbers_for_paper, read_study_folder
from dpkd_offline.pipeline.report.study_figures import mean_curve, undominated
from dpkd_offline.pipeline.report.study_page import study_page
from dpkd_offline.pipeline.study_layout import read_study

STUDENTS = ("sft", "kd", "dpkd", "dpkd-without-lm")


def study_in(folder: Path) -> Study:
    layout = read_study(folder)
    assert layout is not None
    return read_study_folder(folder, layout)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return study_in(write_study(tmp_path_factory.mktemp("study") / "a<b>study", STUDENTS))


@pytest.fixture(scope="module")
def page(study: Study) -> Page:
    return study_page(study, study.folder)


def section(page: Page, title: str) -> Section:
    return next(section for section in page.sections if section.title == title)


def test_the_page_begins_with_who_is_best_and_what_is_not_done(page: Page) -> None:
    of_dolly, of_selfinst, states = page.lead
    assert re.match(
        r"`dolly`: The best student in Rouge-L is `dpkd-without-lm` with \d\d\.\d\d: better than the baseline `sft` "
        r"\(\+\d.*\); the teacher has \d\d\.\d\d\. Of the other 2, compared with `sft`, ",
        of_dolly,
    )
    assert of_selfinst.startswith("`selfinst`: ")
    assert states == "Of 8 trainings 5 are done, 1 not trained, 1 ruined and 1 failed."
    titles = [section.title for section in page.sections]
    assert titles[:4] == ["Results", "What to look at", "Training", "Quality and cost"]
    assert titles[4:] == [
        "Rouge-L by length", "The paper's tables", "Responses side by side", "The students", "Time, tokens and memory",
    ]  # fmt: skip


def test_the_table_has_means_over_seeds_and_differences_to_the_baseline(study: Study, page: Page) -> None:
    table = next(block for block in section(page, "Results").blocks if isinstance(block, Table))
    assert table.titles[:3] == ["model", "Rouge-L ↑", "minus `sft`"]
    assert [row[0] for row in table.rows] == ["teacher", "before", *(f"`{name}`" for name in STUDENTS)]
    assert table.strong == (5,)
    by_seed = [
        json.loads((study.folder / f"students/kd/seed-{seed}/evaluation/dolly/results.json").read_text())["rouge_l"][
            "mean"
        ]
        for seed in (40,)
    ]  # with seed 41 it is in training
    assert table.rows[3][1].startswith(f"{by_seed[0]:.2f} [")
    assert table.rows[2][2] == "" and re.match(r"\+\d+\.\d\d \[", table.rows[4][2])


def test_differences_to_the_baseline_are_drawn_as_the_table_has_them(page: Page) -> None:
    figure = next(block for block in section(page, "Results").blocks if isinstance(block, Figures)).figures[0]
    table = next(block for block in section(page, "Results").blocks if isinstance(block, Table))
    assert figure.caption == "Rouge-L minus that of `sft` on `dolly`, with 95 % intervals"
    for student, _, difference, *_ in table.rows[3:]:
        mean, low, high = (float(number) for number in re.findall(r"[+-]?\d+\.\d+", difference))
        name = student.strip("`")
        drawn = re.search(rf" {name} ([+-][\d.]+) \[([+-][\d.]+), ([+-][\d.]+)\], (\w+)", figure.alt)
        assert drawn is not None and [float(n) for n in drawn.groups()[:3]] == pytest.approx(
            [mean, low, high], abs=0.06
        )
        assert drawn[4] == ("better" if low > 0 else "worse" if high < 0 else "cannot")
        assert f">{name}<" in figure.svg
    assert ">sft<" not in figure.svg.replace(">Rouge-L − sft<", "")


def test_failed_and_ruined_students_come_first_in_what_to_look_at(page: Page) -> None:
    (warnings,) = section(page, "What to look at").blocks
    assert isinstance(warnings, Items) and warnings.warn
    assert [warning.split(":")[:2] for warning in warnings.items[:2]] == [
        ["dpkd, seed 41", " ruined"],
        ["dpkd-without-lm, seed 41", " failed"],
    ]
    table = next(block for block in section(page, "The students").blocks if isinstance(block, Table))
    assert [row[-1] for row in table.rows] == [
        "done", "not trained with seed 41", "ruined with seed 41", "failed with seed 41",
    ]  # fmt: skip


def test_each_figure_has_every_student_that_was_measured(page: Page) -> None:
    for title, count in (("Training", 5), ("Quality and cost", 4), ("Rouge-L by length", 2)):
        (of_section,) = (block for block in section(page, title).blocks if isinstance(block, Figures))
        assert len(of_section.figures) == count
        for figure in of_section.figures:
            # Of what it is trained on, sft measures references.
            shown = STUDENTS[1:] if figure.caption.startswith("How likely held-out y_t") else STUDENTS
            assert [s for s in STUDENTS if f">{s}<" in figure.svg] == [s for s in STUDENTS if s in shown], (
                figure.caption
            )
            assert all(student in figure.alt for student in shown)
    assert any(isinstance(block, Fold) for block in section(page, "Rouge-L by length").blocks)


def test_a_line_is_the_mean_over_the_seeds(study: Study) -> None:
    student = study.students[0]
    curve = mean_curve(student, "val_rouge_l")
    curves = [run.training.curves["val_rouge_l"] for run in student.runs if run.training]
    assert curve.steps == [0, 4, 8, 12, 16, 20, 24]
    assert curve.values == pytest.approx([sum(values) / 2 for values in zip(*(c.values for c in curves), strict=True)])


def test_undominated_are_those_that_nobody_beats() -> None:
    points = {"cheap": (1.0, 1.0), "good": (5.0, 9.0), "beaten": (5.0, 3.0), "dear": (9.0, 9.0), "twin": (1.0, 1.0)}
    assert undominated(points) == ["cheap", "good", "twin"]


def test_the_papers_tables_have_the_studys_numbers(study: Study, page: Page) -> None:
    ours = numbers_for_paper(study)
    bucket = [
        json.loads((study.folder / f"students/sft/seed-{seed}/evaluation/dolly/results.json").read_text())["by_length"][
            1
        ]
        for seed in (40, 41)
    ]
    assert ours["sft", "dolly", "rouge_l:1"].mean == pytest.approx(sum(b["rouge_l"] for b in bucket) / 2)
    curves = [run.training.curves for run in study.students[0].runs if run.training]
    assert ours["sft", "", "max_reward"].mean == pytest.approx(
        sum(max(c["val_reward_chosen"].values) for c in curves) / 2
    )
    assert ours["dpkd", "selfinst", "rouge_l"].interval is not None
    assert ("minillm", "dolly", "rouge_l") not in ours
    first = next(block for block in section(page, "The paper's tables").blocks if isinstance(block, Table))
    assert first.rows[1][:2] == ["GPT-2 120M, SFT", "23.3"] and first.rows[1][2] and not first.rows[4][2]


def test_the_page_is_html_5_in_which_texts_of_others_are_text(page: Page) -> None:
    html = html_page(page)
    tree: Element = html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(html)
    assert not [element for element in tree.iter() if element.tag in ("script", "link", "img", "iframe", "b")][1:]
    assert not re.search(r"""(?:src|href)=["'](?!#|data:|students/)""", html)
    assert "&lt;script&gt;alert" in html and "a&lt;b&gt;study" in html
    names = [element.get("id") for element in tree.iter() if element.get("id")]
    assert len(names) == len(set(names))
    outside = re.sub(r"```.*?```", "", markdown_page(page), flags=re.S)  # of fences, in which all is text
    assert "script" in outside and not re.search(r"(?<!\\)<", outside)


def test_report_writes_the_pages_that_the_studys_page_links_to(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", ("sft", "dpkd"), seeds=(7,), sets=("",), paper=None)
    assert report(ReportConfig(folder=folder)).path == folder / "report.html"
    html = (folder / "report.html").read_text()
    places = re.findall(r'href="(students/[^"]*)"', html)
    assert places == [f"students/{name}/seed-7/report.html" for name in ("sft", "dpkd")]
    for place in places:
        own = (folder / place).read_text()
        assert "The student after training is" in own and f"<h1>{place.split('/')[1]}, seed 7</h1>" in own
        assert re.findall(r'href="([^#"]*html)"', own) == ["../../../report.html"]
    assert "The paper" not in html and "1 seed of training" in html


def test_a_study_that_has_just_begun_has_a_page(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", STUDENTS)
    for part in ("students", "evaluation", "starts", "stages.jsonl"):
        (folder / part).rename(tmp_path / part)
    page = study_page(study_in(folder), folder)
    assert page.lead == ["Of 8 trainings 0 are done, 8 not trained."]
    assert not any(isinstance(block, Links) for part in page.sections for block in part.blocks)
    html5lib.HTMLParser(strict=True).parse(html_page(page))
