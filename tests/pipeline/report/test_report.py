"""The page of a run: what it says, that it is HTML and asks for nothing, and that what others wrote is text in it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.pages import elements, parsed, text_of, write_judgement, write_metrics, write_run, write_scores
from helpers.tiny import files_of
from markdown_it import MarkdownIt
from markdown_it.token import Token

import dpkd_offline
from dpkd_offline.common.errors import DataError, MismatchError
from dpkd_offline.common.ownership import output_folder
from dpkd_offline.pipeline.report.report import ReportResult

DATASET = Path(__file__).parents[2] / "golden" / "v1"  # two rounds, top-k, and a further student
HOSTILE = (
    "<script>alert(1)</script></td>\"'`|*_**b**_ [x](javascript:alert(1)) \x1b[31m\u202e&lt; <b> $x$ ```\n# no title"
)
SHOWN = """<script>alert(1)</script></td>"'"""  # what a reader sees of it first, wherever it stands


def report(folder: Path, output: Path | None = None) -> ReportResult:
    return dpkd_offline.report(folder=folder, output=output)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "mine", DATASET)


def test_the_page_says_what_the_run_holds_in_order_and_asks_for_nothing(run: Path, tmp_path: Path) -> None:
    result = report(run, tmp_path / "page")
    assert (str(result), result.markdown) == (str(tmp_path / "page/report.html"), tmp_path / "page/report.md")
    document, html = parsed(result.path), result.path.read_text()
    headings = [text_of(element) for name, element in elements(document) if name == "h2"]
    assert headings == [
        *("Results", "What to look at", "Training", "The paper's figures", "Responses side by side", "The data"),
        *("Time, tokens and memory", "Who made what"),
    ]
    text = text_of(document)
    for said in (
        "The student after training is better in Rouge-L (6.00 → 13.50, 56% of the gap to the teacher)",
        "By the judge m, m is better than before: it wins 61.0 % [52.0, 70.0].",
        "step 20: log q is worse than the best",
        "6 prompts from",
        "1 min 20 s",
        "Fig. 5: Rouge-L by words of the reference",
        "Fig. 1: verdicts of the judge",
        "Figures 3 and 4 need KLD and reverse KLD",
        "student after 19",
    ):
        assert said in text, said
    names = {name for name, _ in elements(document)}
    assert not names & {"script", "iframe", "img", "object", "form", "svg:script", "svg:image", "svg:foreignObject"}
    for name, element in elements(document):
        assert not [key for key in element.attrib if key.startswith("on")], name
        for key in ("src", "href", "{http://www.w3.org/1999/xlink}href"):
            assert element.attrib.get(key, "#").startswith(("#", "data:,")), element.attrib
    assert "url(http" not in html and "@import" not in html
    ids = [element.attrib["id"] for _, element in elements(document) if "id" in element.attrib]
    assert len(ids) == len(set(ids))
    links = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', html))
    assert {a or b for a, b in links} <= set(ids)
    figures = [element for name, element in elements(document) if name == "svg:svg"]
    assert len(figures) > 12
    for figure in figures:
        assert figure.attrib["role"] == "img" and len(figure.attrib["aria-label"]) > 20
    assert len(html) < 1_000_000
    before = result.path.read_bytes(), result.markdown.read_bytes()
    report(run, tmp_path / "page")
    assert (result.path.read_bytes(), result.markdown.read_bytes()) == before


def tokens(markdown: str) -> Iterator[Token]:
    """What GitHub's Markdown makes of a text, as far as it is more than text."""
    waiting = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(markdown)
    while waiting:
        token = waiting.pop(0)
        yield token
        waiting = [*(token.children or ()), *waiting]


def test_what_others_wrote_is_text_in_both_forms(tmp_path: Path) -> None:
    folder = write_run(tmp_path / 'mi"<i>ne', DATASET, HOSTILE, HOSTILE)
    write_scores(folder / "evaluation" / 'x"><b>bold', [1.0] * 12, HOSTILE, HOSTILE)
    plan = json.loads((folder / "dataset" / "dataset.json").read_text())
    plan["prompt_set"]["source"] = HOSTILE
    (folder / "dataset" / "dataset.json").write_text(json.dumps(plan))
    plain = report(write_run(tmp_path / "plain", DATASET))
    page = report(folder)
    document, html = parsed(page.path), page.path.read_text()
    assert {n for n, _ in elements(document)} == {n for n, _ in elements(parsed(plain.path))}
    text = text_of(document)
    assert text.count(SHOWN) > 20 and 'mi"<i>ne' in text and 'x"><b>bold' in text
    assert "\x1b" not in html and "\u202e" not in html and "\\u001b[31m\\u202e" in text
    markdown = page.markdown.read_text()
    assert "\x1b" not in markdown and "\u202e" not in markdown and markdown.count("<script>alert(1)") > 20
    kinds = {token.type for token in tokens(markdown)}
    assert kinds == {token.type for token in tokens(plain.markdown.read_text())}
    assert not kinds & {"html_block", "html_inline", "link_open", "image", "em_open", "strong_open", "s_open"}
    headings = [t for t in tokens(markdown) if t.type == "heading_open" and t.tag == "h2"]
    assert len(headings) == len(
        [t for t in tokens(plain.markdown.read_text()) if t.type == "heading_open" and t.tag == "h2"]
    )


def test_a_run_under_way_is_shown_as_far_as_it_is_and_only_read(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("student-sft"))
    stages = [
        (["judge", "evaluation/student-after"], "the student after training is not evaluated"),
        (["student/training.json", "evaluation"], "training is at step 40, and not done"),
        (["student"], "the student is not trained yet"),
        (["dataset/pairs", "dataset/responses/student"], "6 prompts from"),
        (["dataset/dataset.json"], "there is no dataset yet"),
    ]
    with (folder / "student" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "lo')  # a line that is being written
    for gone, said in stages:
        for path in (folder / name for name in gone):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        before = files_of(folder)
        with output_folder(folder, "distillation", "distill", known=("stages.jsonl",)):
            page = report(folder)
        assert said in text_of(parsed(page.path))
        after = files_of(folder)
        assert {name: data for name, data in after.items() if name not in ("report.html", "report.md")} == {
            name: data for name, data in before.items() if name not in ("report.html", "report.md")
        }


def test_a_part_has_a_page_of_its_own(run: Path, tmp_path: Path) -> None:
    write_judgement(tmp_path / "judge")
    (tmp_path / "judge" / ".dpkd-offline.json").write_text('{"kind": "judgement", "run": "r"}')
    for folder, kind, said in (
        (run / "dataset", "dataset", "6 pairs. The teacher gives a token of its own responses y_t -"),
        (run / "student", "training", "The best student is that of step 40, by val_logps_chosen: -2, -3 before"),
        (run / "evaluation/student-after", "evaluation", "Rouge-L 13.50, 95 % interval 12.50 to 14.50, on 12"),
        (tmp_path / "judge", "judgement", "the orders disagree, or neither is preferred"),
    ):
        document = parsed(report(folder, tmp_path / kind).path)
        text = text_of(document)
        assert said in text, text[:2000]
        assert kind in text
    unscored = shutil.copytree(run / "dataset", tmp_path / "unscored", ignore=lambda _, names: {"pairs"} & set(names))
    assert "No pairs are scored yet; rows that are there: prompts 6" in text_of(parsed(report(unscored).path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="nothing to report; name a folder of distill"):
        report(tmp_path / "empty")
    with pytest.raises(DataError, match="no such folder"):
        report(tmp_path / "none")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("stages.jsonl", '{"stage": 3}\n', "stages.jsonl:1: key 'stage' is missing or wrong"),
        ("student/metrics.jsonl", "[]\n", "metrics.jsonl:1: not a JSON object"),
        ("student/training.json", "{", "training.json:1:2: invalid JSON"),
        ("student/training.json", '{"run": "r", "steps": 3, "settings": 5}', "training.json: key 'settings'"),
        ("judge/results.json", '{"form": "pairwise"}', "judge/results.json: key 'judge' is missing"),
        ("evaluation/teacher/results.json", '{"sets": 4}', "key 'sets' is wrong"),
        ("evaluation/teacher/results.json", '{"prompts": 1}', "teacher/results.json: key 'seeds' is missing"),
        ("dataset/dataset.json", "{}", "dataset.json: format None"),
    ],
)
def test_a_broken_file_is_named_in_a_line(run: Path, tmp_path: Path, file: str, content: str, message: str) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / file).write_text(content)
    with pytest.raises((DataError, MismatchError)) as caught:
        report(folder)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (folder / "report.html").exists()


def test_responses_that_are_not_those_of_the_results_are_refused(tmp_path: Path) -> None:
    write_scores(tmp_path / "e", [1.0, 2.0])
    with (tmp_path / "e" / "responses.jsonl").open("a") as file:
        file.write('{"seed": 30, "id": "x", "prompt": "", "response": "", "rouge_l": 1}\n')
    with pytest.raises(MismatchError, match="was changed after the results"):
        report(tmp_path / "e")
    with (tmp_path / "e" / "responses.jsonl").open("a") as file:
        file.write("[]\n")
    with pytest.raises(DataError, match=r"responses\.jsonl:6: "):
        report(tmp_path / "e")


def test_the_papers_figures_are_drawn_where_the_kl_are_measured(tmp_path: Path) -> None:
    kls = {"val_forward_kl_first": 1.0, "val_reverse_kl": 2.0, "val_reverse_kl_first": 1.5, "val_forward_kl": 1.0}
    write_metrics(tmp_path / "student", 40, **kls, val_top_k_mass=0.97)
    text = text_of(parsed(report(tmp_path / "student").path))
    assert "Fig. 3: reward of y_t against reverse KLD, held out, by epoch" in text
    assert "Fig. 4: KLD and reverse KLD of the first token" in text and "Fig. 4: the same per token" in text
    assert "which hold 97.0% of its probability" in text and "Figures 3 and 4 need" not in text
    assert "round 1" in text  # in the figure of the drift
