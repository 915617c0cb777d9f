"""`report`: makes the page of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dpkd_offline.common.files import write_atomically
from dpkd_offline.common.results import Result
from dpkd_offline.config.report import ReportConfig
from dpkd_offline.pipeline.report.blocks import Page
from dpkd_offline.pipeline.report.markdown import markdown_page
from dpkd_offline.pipeline.report.page import html_page
from dpkd_offline.pipeline.report.run import read_run
from dpkd_offline.pipeline.report.sections import page_of
from dpkd_offline.pipeline.report.study import read_study_folder
from dpkd_offline.pipeline.report.study_page import HTML, student_page, study_page
from dpkd_offline.pipeline.study_layout import StudyLayout, read_study

MARKDOWN = "report.md"  # beside report.html


@dataclass(frozen=True)
class ReportResult(Result):
    """report.html, and report.md beside it."""

    markdown: Path


def report(config: ReportConfig) -> ReportResult:
    """Write report.html and report.md of what a folder holds, done or under way; only they are written.

    Of a study they are written into the folders of its students, too.

    Raises:
        DataError: there is nothing to report, or a file is broken.
        MismatchError: responses or shards are not those of the results or manifests beside them.
        StorageError: the disk is full or fails.
    """
    output = config.output or config.folder
    layout = read_study(config.folder)
    if layout is None:
        return write_page(page_of(read_run(config.folder)), output)
    study = read_study_folder(config.folder, layout)
    for student in study.students:
        for run in student.runs:
            if run.training is not None:
                write_page(student_page(study, student, run), output / run.place)
    return write_page(study_page(study, output), output)


def report_study(folder: Path, layout: StudyLayout) -> ReportResult:
    """Write the page of a study alone, without those of its students, which take seconds each."""
    return write_page(study_page(read_study_folder(folder, layout), folder), folder)


def write_page(page: Page, folder: Path) -> ReportResult:
    """Write a page in both forms into a folder."""
    html, markdown = folder / HTML, folder / MARKDOWN
    write_atomically(html, html_page(page).encode(errors="replace"))
    write_atomically(markdown, markdown_page(page).encode(errors="replace"))
    return ReportResult(html, markdown)
