"""Figures: numbers in, SVG text out, for a page in light or dark, of any width.

Each function takes a `name`, which no other figure of the page has, and an `alt` text. The same numbers give the same
text. matplotlib is imported when the first figure is drawn.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dpkd_offline.common.terminal import in_a_line, outgoing
from dpkd_offline.pipeline.report.svg import inline_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 4.4, 2.8  # inches of 72 units: as wide as a small screen
# The page gives each its own shade in light and in dark; these are what a file of a figure alone has.
SERIES = ("#1f6fb4", "#c8501e", "#1a8a66", "#a04a9c", "#a07800", "#5a6b7b")
ORDERED = ("#3b4cc0", "#2a8fbd", "#2e9e6b", "#b58900", "#c8501e")  # of what has an order, such as epochs
TEXT, GRID, BACK = "#16181d", "#c9ccd1", "#fefefe"
COLORS = {
    **{color: f"var(--series-{n}, {color})" for n, color in enumerate(SERIES)},
    **{color: f"var(--ordered-{n}, {color})" for n, color in enumerate(ORDERED) if color not in SERIES},
    TEXT: "currentColor",
    GRID: f"var(--grid, {GRID})",
    BACK: f"var(--back, {BACK})",
}
# So that no two lines differ in colour alone. The counts of colours, dashes and marks have no common factor, so that
# thirty lines are all different.
DASHES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINE = 13.6  # points
MOST_LEGEND_ROWS = 2  # of more the figure grows
LEGEND_LETTERS = 54  # that stand in a row of the legend
LONGEST_LABEL, LONGEST_ROW = 40, 18


@dataclass(frozen=True)
class Series:
    """A line, or the points of a group.

    Attributes:
        label: what the legend calls it.
        x, y: values; a point that is not finite is left out.
        error: half the height of the bar at each point.
        points: whether each value has a mark.
        place: which colour, dash and mark it has, of what is the same in several figures; by default its place here.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float] | None = None
    points: bool = False
    place: int | None = None

    @property
    def finite(self) -> list[tuple[float, float, float]]:
        errors = self.error if self.error is not None else [0.0] * len(self.x)
        rows = zip(self.x, self.y, errors, strict=True)
        return [(x, y, e if math.isfinite(e) else 0.0) for x, y, e in rows if math.isfinite(x) and math.isfinite(y)]


def line_chart(
    name: str,
    alt: str,
    series: Sequence[Series],
    *,
    x_label: str = "step",
    y_label: str = "",
    marks: Mapping[float, str] | None = None,
    share: bool = False,
    groups: Sequence[str] = (),
) -> str:
    """Lines over steps, or over anything.

    Args:
        marks: vertical lines with a word each, such as the first step of a round.
        share: whether the values are shares of a whole, from 0 to 1.
        groups: what the places 0, 1, … of the horizontal axis are called, where it has no numbers.
    """

    def draw(axes: Axes) -> list[Any]:
        if len(places := {x for one in series for x, _, _ in one.finite}) == 1:
            axes.set_xlim(min(places) - 1, min(places) + 1)
        if share:
            axes.set_ylim(-0.03, 1.03)
        handles = []
        for number, one in enumerate(series):
            n, rows = number if one.place is None else one.place, one.finite
            x, y, error = zip(*rows, strict=True) if rows else ((), (), ())
            color, dash = SERIES[n % len(SERIES)], DASHES[n % len(DASHES)]
            marker = MARKERS[n % len(MARKERS)] if one.points or len(rows) == 1 else ""
            (line,) = axes.plot(x, y, color=color, linestyle=dash, marker=marker)
            if one.error is not None:
                axes.errorbar(x, y, error, fmt="none", color=color, elinewidth=1, capsize=2)
            handles.append(line)
        for place, word in (marks or {}).items():
            axes.axvline(place, color=TEXT, linewidth=0.8, linestyle=(0, (2, 2)))
            axes.annotate(
                _label(word),
                (place, 1),
                xycoords=("data", "axes fraction"),
                xytext=(2, -2),
                textcoords="offset points",
                va="top",
                fontsize=8,
            )
        if groups:
            axes.set_xticks(range(len(groups)), [_label(group) for group in groups])
            axes.set_xlim(-0.3, len(groups) - 0.7)
        return handles

    return _figure(name, alt, draw, [one.label for one in series], x_label, y_label, steps=not groups)


def scatter_chart(
    name: str,
    alt: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    ordered: bool = False,
) -> str:
    """Groups of points. `ordered`: the groups have an order, which the colours show."""
    shades = ORDERED if ordered else SERIES

    def draw(axes: Axes) -> list[Any]:
        handles = []
        for number, one in enumerate(series):
            n = number if one.place is None else one.place
            x, y, error = zip(*one.finite, strict=True) if one.finite else ((), (), ())
            last = max(len(series) - 1, 1)
            color = shades[round(n * (len(shades) - 1) / last)] if ordered else shades[n % len(shades)]
            handles.append(axes.scatter(x, y, s=26, color=color, marker=MARKERS[n % len(MARKERS)]))
            if one.error is not None:
                axes.errorbar(x, y, error, fmt="none", color=color, elinewidth=1, capsize=2)
        return handles

    return _figure(name, alt, draw, [one.label for one in series], x_label, y_label)


def bar_chart(
    name: str,
    alt: str,
    groups: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    *,
    y_label: str = "",
    x_label: str = "",
    intervals: Mapping[str, Sequence[tuple[float, float] | None]] | None = None,
) -> str:
    """Bars side by side in groups, one of each series, with an interval where there is one."""

    def draw(axes: Axes) -> list[Any]:
        handles, width = [], 0.8 / max(len(series), 1)
        for n, (label, values) in enumerate(series.items()):
            places = [group + (n - (len(series) - 1) / 2) * width for group in range(len(groups))]
            shown = [0.0 if value is None or not math.isfinite(value) else value for value in values]
            color = SERIES[n % len(SERIES)]
            handles.append(axes.bar(places, shown, width * 0.92, color=color))
            for place, value, interval in zip(places, shown, (intervals or {}).get(label, ()), strict=False):
                if interval is not None:
                    reach = [[max(value - interval[0], 0)], [max(interval[1] - value, 0)]]
                    axes.errorbar([place], [value], reach, fmt="none", color=TEXT, elinewidth=1, capsize=2)
        axes.set_xticks(range(len(groups)), [_label(group) for group in groups])
        axes.grid(False, axis="x")
        return handles

    return _figure(name, alt, draw, list(series), x_label, y_label, steps=False)


def share_chart(name: str, alt: str, rows: Mapping[str, Mapping[str, float]]) -> str:
    """Of each row the parts, in percent of the whole, as one bar from left to right."""
    parts = list(next(iter(rows.values())))

    def draw(axes: Axes) -> list[Any]:
        handles, left = [], [0.0] * len(rows)
        for n, part in enumerate(parts):
            values = [row[part] for row in rows.values()]
            handles.append(axes.barh(range(len(rows)), values, 0.6, left=left, color=SERIES[(0, 5, 1, 2, 3, 4)[n]]))
            for place, (start, value) in enumerate(zip(left, values, strict=True)):
                if value >= 8:  # percent, else the number is wider than the bar
                    axes.text(start + value / 2, place, f"{value:.0f}%", ha="center", va="center", color=BACK)
            left = [start + value for start, value in zip(left, values, strict=True)]
        axes.set_yticks(range(len(rows)), [_label(row, LONGEST_ROW) for row in rows])
        axes.set_xlim(0, 100)
        axes.invert_yaxis()
        axes.grid(False)
        return handles

    height = 1.0 + 0.45 * len(rows)
    return _figure(name, alt, draw, parts, "% of the prompts", "", steps=False, height=height)


def interval_chart(
    name: str,
    alt: str,
    rows: Mapping[str, tuple[float, float, float]],
    verdicts: Mapping[str, Sequence[str]],
    *,
    x_label: str,
) -> str:
    """Rows from above downwards, each a mean with what its interval begins and ends with, and a line at zero.

    Args:
        verdicts: what is said of rows, the last of them that nothing can be said, and of which.
    """
    places = {row: place for place, row in enumerate(rows)}

    def draw(axes: Axes) -> list[Any]:
        handles = []
        for n, of_verdict in enumerate(verdicts.values()):
            color = SERIES[n if n < len(verdicts) - 1 else -1]
            y, x = [places[row] for row in of_verdict], [rows[row][0] for row in of_verdict]
            reach = [[abs(rows[row][end] - rows[row][0]) for row in of_verdict] for end in (1, 2)]
            axes.errorbar(x, y, xerr=reach, fmt="none", color=color, elinewidth=1.2, capsize=2)
            handles.append(axes.scatter(x, y, s=24, color=color, marker=MARKERS[n % len(MARKERS)]))
        axes.axvline(0, color=TEXT, linewidth=0.8)
        axes.set_yticks(range(len(places)), [_label(row, LONGEST_ROW) for row in places])
        axes.set_ylim(len(places) - 0.4, -0.6)
        axes.grid(False, axis="y")
        return handles

    return _figure(name, alt, draw, list(verdicts), x_label, "", height=0.9 + 0.2 * len(rows))


def histogram_chart(
    name: str, alt: str, distributions: Mapping[str, tuple[Sequence[float], Sequence[int]]], *, x_label: str
) -> str:
    """How often values occur, as outlines over common bins.

    Args:
        distributions: of each name distinct values, and how often each occurs.
    """
    values = [value for of, _ in distributions.values() for value in of]
    low, high = min(values), max(values)
    whole = all(float(value).is_integer() for value in values)
    width = (high - low) / 32 or 1.0
    if whole:
        width = max(1.0, math.ceil(width))
    count = int((high - low) // width) + 1
    edges = [low + n * width for n in range(count + 1)]

    def draw(axes: Axes) -> list[Any]:
        from matplotlib.ticker import MaxNLocator

        handles = []
        for n, (of, counts) in enumerate(distributions.values()):
            heights = [0] * count
            for value, times in zip(of, counts, strict=True):
                heights[min(int((value - low) // width), count - 1)] += times
            color = SERIES[n % len(SERIES)]
            handles.append(axes.stairs(heights, edges, color=color, linestyle=DASHES[n % len(DASHES)], linewidth=1.5))
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=whole))
        return handles

    return _figure(name, alt, draw, list(distributions), x_label, "rows", steps=False)


def _label(text: str, longest: int = LONGEST_LABEL) -> str:
    """Text of others in a figure: in a line, visible, without secrets, and not longer than there is room for."""
    shown = outgoing(in_a_line(text))
    return shown if len(shown) <= longest else f"{shown[: longest - 1]}…"


def _figure(
    name: str,
    alt: str,
    draw: Callable[[Axes], list[Any]],
    labels: Sequence[str],
    x_label: str,
    y_label: str,
    *,
    steps: bool = True,
    height: float = HEIGHT,
) -> str:
    """What `draw` puts on axes, which returns what the legend shows beside each label.

    Args:
        steps: whether the horizontal axis may be one of whole numbers only, if it is called `step`.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with _style(name):
        figure = Figure(figsize=(WIDTH, height))
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        handles = draw(axes)
        axes.set_xlabel(_label(x_label))
        axes.set_ylabel(_label(y_label))
        if steps:
            axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=x_label == "step"))
        rows = _legend(figure, handles, labels) if len(labels) > 1 else 0
        figure.set_size_inches(WIDTH, height + max(0, rows - MOST_LEGEND_ROWS) * LINE / 72)
        _place(figure, axes, rows)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return inline_svg(out.getvalue(), name, alt, COLORS)


def _legend(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> int:
    """A legend above the axes, in as few rows as there is room for; returns how many."""
    shown = [_label(label) for label in labels]
    columns = max(1, min(len(shown), LEGEND_LETTERS // (max(map(len, shown)) + 5)))
    rows = math.ceil(len(shown) / columns)
    columns = math.ceil(len(shown) / rows)
    # It is filled column by column, and read row by row.
    order = [n for column in range(columns) for n in range(column, len(shown), columns)]
    # A label that begins with _ would be left out: so they are filled in afterwards, into as much room.
    room = [f"-{shown[n][1:]}" if shown[n].startswith("_") else shown[n] for n in order]
    legend = figure.legend([handles[n] for n in order], room, loc="upper left", ncols=columns)
    for text, n in zip(legend.get_texts(), order, strict=True):
        text.set_text(shown[n])
    return rows


def _place(figure: Figure, axes: Axes, legend_rows: int) -> None:
    """Give the axes all the room that legend and labels leave. matplotlib's own layout takes as long as the drawing."""
    low, high = axes.get_ylim()
    formatter = axes.yaxis.get_major_formatter()
    labels = formatter.format_ticks([tick for tick in axes.get_yticks() if min(low, high) <= tick <= max(low, high)])
    letter, line = 5.4, LINE  # as wide and high as they are at most, in points
    left = 10 + letter * max(map(len, labels), default=0) + line * bool(axes.get_ylabel())
    bottom = 18 + line * bool(axes.get_xlabel())
    top = 7 + line * legend_rows + 9 * bool(formatter.get_offset())
    width, height = (72 * inches for inches in figure.get_size_inches())
    axes.set_position((left / width, bottom / height, (width - left - 8) / width, (height - bottom - top) / height))


@contextmanager
def _style(name: str) -> Iterator[None]:
    """matplotlib's own defaults, whatever the user's are, and ours."""
    import matplotlib
    import matplotlib.style

    ours: dict[Any, Any] = {
        "axes.edgecolor": TEXT,
        "axes.labelcolor": TEXT,
        "axes.linewidth": 0.6,
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 9,
        "grid.color": GRID,
        "grid.linewidth": 0.5,
        "legend.fontsize": 9,
        "legend.frameon": False,
        "legend.borderaxespad": 0.2,
        "legend.columnspacing": 1.2,
        "lines.linewidth": 1.5,
        "lines.markersize": 4.5,
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "text.color": TEXT,
        "text.parse_math": False,  # $ is a letter
        "xtick.color": TEXT,
        "ytick.color": TEXT,
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
    }
    with warnings.catch_warnings(), matplotlib.style.context("default"), matplotlib.rc_context(ours):
        warnings.filterwarnings("ignore", message=".*missing from font.*")  # the page's fonts have it
        yield
