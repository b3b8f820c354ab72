"""Curves and bars as SVG that stands in a page: drawn by matplotlib, in the colours of page.css, light or dark."""

import functools
import io
import itertools
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Size = tuple[int, int]  # width, height
Values = Sequence[float] | np.ndarray

MOST_POINTS = 400  # of a line: more is not seen, and makes the page large
MOST_OF_MARKS = 2  # times the highest mark: a histogram goes no further, or one value would squeeze all others
POINTS_PER_INCH = 72
WIDE, SMALL = (420, 200), (320, 160)  # width and height, in px where a chart is shown at its own size
MARGINS = 52, 8, 14, 20  # left, right, top, bottom
# matplotlib takes no CSS variables: each colour that it is given stands for one of page.css.
COLOURS = {
    "series-1": "#010101", "series-2": "#010102", "series-3": "#010103", "muted": "#010104", "grid": "#010105",
}  # fmt: skip
STYLE = {
    "svg.fonttype": "path", "svg.hashsalt": "page", "font.size": 10, "text.color": COLOURS["muted"],
    "font.family": "sans-serif", "axes.edgecolor": COLOURS["grid"], "axes.labelcolor": COLOURS["muted"],
    "axes.facecolor": "none", "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
    "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "grid.color": COLOURS["grid"],
    "xtick.color": COLOURS["muted"], "ytick.color": COLOURS["muted"], "xtick.labelsize": 10, "ytick.labelsize": 10,
    "xtick.major.size": 0, "ytick.major.size": 0, "ytick.minor.size": 0, "lines.solid_capstyle": "round",
}  # fmt: skip

_numbers = itertools.count()  # so that two charts of a page share no id


@dataclass(frozen=True)
class Line:
    """One curve, and how the key below the chart names it; `colour` is a variable of page.css."""

    label: str
    x: Values
    y: Values
    colour: str = "series-1"
    dashed: bool = False
    faint: bool = False  # behind the others, without a place in the key
    dots: bool = False  # a dot at each value: there are few


@dataclass(frozen=True)
class Chart:
    """A drawn chart: `svg` is markup; `keys` are the lines that the key names."""

    title: str
    note: str
    svg: str
    keys: Sequence[Line] = ()


def line_chart(
    title: str,
    note: str,
    lines: Sequence[Line],
    size: Size = SMALL,
    mark: tuple[float, float] | None = None,
) -> Chart:
    """Curves over steps; `mark` is a point to be seen. Logarithmic where the values span more than a factor of ten."""

    def draw(axes: "Axes") -> None:
        for line in lines:
            axes.plot(
                line.x, line.y, color=COLOURS[line.colour], linestyle="--" if line.dashed else "-",
                linewidth=0.8 if line.faint else 1.5, alpha=0.3 if line.faint else 1, zorder=2 if line.faint else 3,
                marker="o" if line.dots else "", markersize=3.5,
            )  # fmt: skip
        if mark:
            axes.plot(
                *mark,
                "o",
                markersize=9,
                markerfacecolor="none",
                markeredgecolor=COLOURS["series-2"],
                zorder=4,
                clip_on=False,
            )
        _scale(axes, lines)

    keys = [line for line in lines if not line.faint]
    return Chart(title, note, _svg(f"{title}. {note}", size, draw), keys if len(keys) > 1 else ())


def histogram(title: str, note: str, values: Sequence[int], marks: dict[int, str]) -> Chart:
    """How many values lie where; `marks` are values to be seen, with their words. Far beyond them all is one bar."""
    longest = max(values)
    top = min(max([longest, *(mark for mark in marks if mark <= 2 * longest)]), MOST_OF_MARKS * max([*marks, 1]))
    shown = [min(value, top) for value in values]  # those beyond stand in the last bar

    def draw(axes: "Axes") -> None:
        axes.hist(shown, bins=np.linspace(0, top * 1.04 + 1, 41).tolist(), color=COLOURS["series-1"])
        for mark, words in marks.items():
            if mark <= top:
                axes.axvline(mark, color=COLOURS["series-2"], linestyle="--", linewidth=1.2)
                axes.text(mark, 1.02, words, transform=axes.get_xaxis_transform(), ha="center", va="bottom")
        axes.locator_params("y", integer=True, nbins=4)
        axes.xaxis.set_major_formatter("{x:,.0f}")

    return Chart(title, note, _svg(f"{title}. {note}", WIDE, draw))


def smooth(values: Values, share: float = 0.04) -> np.ndarray:
    """The mean around each value, over a `share` of all of them."""
    window = np.ones(min(len(values), max(9, 2 * int(len(values) * share / 2) + 1)))
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def thin_out(x: Values, y: Values) -> tuple[np.ndarray, np.ndarray]:
    """At most MOST_POINTS points: the means of as many groups of neighbours."""
    groups = min(len(x), MOST_POINTS)
    return tuple(  # type: ignore[return-value]
        np.array([part.mean() for part in np.array_split(np.asarray(values, dtype=float), max(1, groups))])
        for values in (x, y)
    )


def _scale(axes: "Axes", lines: Sequence[Line]) -> None:
    """By the lines to be read, and nine tenths of the faint ones: single steps far outside would flatten them."""
    values = np.concatenate([np.percentile(line.y, [5, 95]) if line.faint else np.asarray(line.y) for line in lines])
    low, high = float(values.min()), float(values.max())
    axes.margins(x=0.02)
    if low > 0 and high / low > 10:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.4, high * 1.4)
    elif high > low:
        axes.set_ylim(low - 0.2 * (high - low), high + 0.2 * (high - low))
    else:
        axes.set_ylim(low - (abs(low) or 1) * 0.1, high + (abs(high) or 1) * 0.1)
    steps = {float(step) for line in lines for step in line.x}
    if len(steps) == 1:  # or the same number would stand at every tick
        axes.set_xlim(min(steps) - 1, min(steps) + 1)
    axes.locator_params("x", integer=True, nbins=6)
    if axes.get_yscale() == "linear":
        axes.locator_params("y", nbins=4)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:.4g}")
    axes.yaxis.set_minor_formatter("")


def _room(size: Size) -> tuple[float, float, float, float]:
    """Left, bottom, width and height of the drawing in a chart of `size`: beside it stand the numbers of its axes."""
    (width, height), (left, right, top, bottom) = size, MARGINS
    return left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height


def _svg(words: str, size: Size, draw: Any) -> str:
    """The chart as markup for a page, with `words` for who cannot see it. ImportError where matplotlib is missing."""
    context, figure_class = _matplotlib()
    with context(STYLE):
        figure = figure_class(figsize=(size[0] / POINTS_PER_INCH, size[1] / POINTS_PER_INCH))
        axes = figure.add_axes(_room(size))
        draw(axes)
        file = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    return _as_part_of_a_page(file.getvalue(), words)


@functools.cache
def _matplotlib() -> tuple[Any, Any]:
    """Takes half a second the first time. Quiet: a home folder that it cannot write to is no matter of the run's."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    return rc_context, Figure


def _as_part_of_a_page(svg: str, words: str) -> str:
    from markupsafe import Markup, escape

    svg = re.sub(
        r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.DOTALL
    )
    svg = re.sub(r' (?:xmlns(?::xlink)?|width|height|version)="[^"]*"', "", svg, count=5)
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    own = f"c{next(_numbers)}-"
    svg = re.sub(r'((?<=\s)id="|xlink:href="#|url\(#)', rf"\1{own}", svg)
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(words)}"', 1))
