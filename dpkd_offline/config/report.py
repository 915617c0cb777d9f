"""Config of report."""

from __future__ import annotations

from pydantic import Field

from dpkd_offline.config.base import Config, Folder


class ReportConfig(Config):
    """Make the page of a run.

    Writes report.html and report.md: results, curves, responses side by side, the data, time, settings. Also of a run
    that is under way, and of a folder of train, evaluate or judge alone, or a dataset. Of a study the page compares its
    students, each of which gets one of its own in its folder.
    """

    folder: Folder = Field(description="The folder of the run.")
    output: Folder | None = Field(None, description="Where the two files go; by default into that folder.")
