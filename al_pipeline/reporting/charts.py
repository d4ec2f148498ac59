"""Charts of a report, as SVG to embed in a page or as PNG bytes. Equal data give equal bytes.

Charts contain only fixed words: names and texts of the user stay in HTML, where a browser has fonts for every script.
SVG colors are CSS variables of the page (`--ink`, `--muted`, `--line`, `--paper`, `--accent`, `--second` to `--sixth`),
so that charts follow the page into dark mode.
"""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from al_pipeline.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """A metric at a number of labels, with its interval if known.

    `solid`: draw a filled marker. `new_classes`: a new line begins, since the classes are others than before.
    """

    labels: int
    value: float
    low: float | None = None
    high: float | None = None
    solid: bool = True
    new_classes: bool = False


@dataclass(frozen=True, slots=True)
class _Palette:
    """Colors by purpose. The hues are Okabe and Ito's, which people with color blindness can tell apart."""

    ink: str
    muted: str
    line: str
    accent: str
    second: str
    paper: str
    third: str
    fourth: str
    fifth: str
    sixth: str

    @property
    def lines(self) -> tuple[str, ...]:
        """Colors of all curves except the baseline, which has the second hue."""
        return (self.accent, self.third, self.fourth, self.fifth, self.sixth)


@dataclass(frozen=True, slots=True)
class _Size:
    """A canvas in pixels, with its font size."""

    name: str
    width: int
    height: int
    font: float


_PRINT = _Palette(
    "#1b1f24", "#57606a", "#d8dee4", "#0072b2", "#d55e00", "#ffffff", "#009e73", "#b3578b", "#b07a00", "#3d4fb8"
)
_VARIABLES = ("ink", "muted", "line", "accent", "second", "paper", "third", "fourth", "fifth", "sixth")
_SENTINELS = _Palette(*(f"#01020{index}" for index in range(len(_VARIABLES))))
_WIDE = _Size("wide", 560, 300, 12)
_NARROW = _Size("narrow", 340, 260, 11.5)
_UNITS_PER_INCH = 72

_LOCK = threading.Lock()
"""matplotlib's settings are global to the process, and flows render in threads."""


def learning_curve_svg(
    name: str,
    metric: str,
    curve: Sequence[CurvePoint],
    baseline: Sequence[CurvePoint] = (),
) -> str:
    """The metric against the number of labels, with its interval as a band: a wide and a narrow SVG for one page.

    `name` keeps ids unique in a page with several charts. Returns an empty string if neither line has a point.
    """
    if not curve and not baseline:
        return ""
    points = [_spoken(point) for part in _parts(curve) for point in _by_labels(part)]
    spoken = f"Learning curve: {metric} against labels. " + "; ".join(points)
    return _both(name, spoken, lambda axes, size, colors: _draw_curve(axes, size, colors, metric, curve, baseline))


def comparison_svg(
    name: str, metric: str, lines: Mapping[str, Sequence[CurvePoint]], full: float | None = None, unit: str = "labels"
) -> str:
    """One learning curve with band per strategy, `random` dashed. `full`: score with all labels, a horizontal line.

    `unit`: what the horizontal axis counts.

    Returns a wide and a narrow SVG for one page, like `learning_curve_svg`.
    """
    last = [f"{label} {_spoken(_by_labels(points)[-1], unit)}" for label, points in lines.items() if points]
    spoken = f"Learning curves: {metric} against {unit}. At the end: {'; '.join(last)}"
    return _both(
        name, spoken, lambda axes, size, colors: _draw_comparison(axes, size, colors, metric, lines, full, unit=unit)
    )


def comparison_png(
    metric: str, lines: Mapping[str, Sequence[CurvePoint]], full: float | None = None, unit: str = "labels"
) -> bytes:
    """The chart of `comparison_svg` as PNG on white, 1440 by 840 pixels."""
    size = _Size("print", 720, 420, 13)
    return _png(size, lambda axes: _draw_comparison(axes, size, _PRINT, metric, lines, full, unit=unit))


@dataclass(frozen=True, slots=True)
class Panel:
    """One corpus among several: the metric, the curves, and the score of a model trained on all labels."""

    metric: str
    lines: Mapping[str, Sequence[CurvePoint]]
    full: float | None = None


def panels_png(panels: Mapping[str, Panel], columns: int = 2) -> bytes:
    """Comparisons side by side as PNG on white, each with its name. They share colors; the first has the legend."""
    wide, high, rows = 460, 290, -(-len(panels) // columns)
    size = _Size("print", wide * columns, high * rows, 13)
    with _canvas(size, "print") as figure:
        for number, (name, panel) in enumerate(panels.items()):
            corner = (number % columns * wide, (rows - 1 - number // columns) * high)
            axes = _add_axes(figure, size, corner, (wide, high))
            title = f"{name}: {panel.metric}"
            _draw_comparison(axes, size, _PRINT, title, panel.lines, panel.full, with_legend=number == 0)
        return _on_paper(figure)


def histogram_svg(name: str, label: str, edges: Sequence[float], counts: Sequence[int]) -> str:
    """Counts between neighbouring `edges` (one more than counts) as bars: a wide and a narrow SVG for one page."""
    if not counts or len(edges) != len(counts) + 1:
        return ""
    spoken = f"Histogram of {sum(counts)} items by {label}, from {edges[0]:.2f} to {edges[-1]:.2f}"
    return _both(name, spoken, lambda axes, size, colors: _draw_histogram(axes, colors, label, edges, counts))


def rounds_svg(name: str, metric: str, points: Sequence[CurvePoint]) -> str:
    """A metric against rounds (`labels` of a point is its round), with its interval: a wide and a narrow SVG."""
    if not points:
        return ""
    told = (_spoken(point).replace(" labels ", ": ", 1) for point in _by_labels(points))
    spoken = f"{metric} by round. " + "; ".join(f"round {one}" for one in told)
    return _both(name, spoken, lambda axes, _, colors: _draw_rounds(axes, colors, metric, points))


def learning_curve_png(
    curve: Sequence[CurvePoint], baseline: Sequence[CurvePoint] = (), metric: str = "macro-F1"
) -> bytes:
    """The chart of `learning_curve_svg` as PNG on white, 1440 by 720 pixels."""
    size = _Size("print", 720, 360, 13)
    return _png(size, lambda axes: _draw_curve(axes, size, _PRINT, metric, curve, baseline))


def save_learning_curve(
    path: Path, curve: Sequence[CurvePoint], baseline: Sequence[CurvePoint] = (), metric: str = "macro-F1"
) -> None:
    """Write `learning_curve_png` to `path` atomically."""
    write_bytes(path, learning_curve_png(curve, baseline, metric))


def _png(size: _Size, draw: Callable[[Axes], None]) -> bytes:
    with _figure(size, "print") as (figure, axes):
        draw(axes)
        return _on_paper(figure)


def _on_paper(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.set_facecolor(_PRINT.paper)
    figure.savefig(out, format="png", dpi=2 * _UNITS_PER_INCH, metadata={"Software": None})
    return out.getvalue()


def _spoken(point: CurvePoint, unit: str = "labels") -> str:
    interval = "" if point.low is None or point.high is None else f" ({point.low:.2f} to {point.high:.2f})"
    return (
        f"{'other classes from here: ' if point.new_classes else ''}{point.labels} {unit} {point.value:.2f}{interval}"
    )


def _parts(curve: Sequence[CurvePoint]) -> list[list[CurvePoint]]:
    """The curve, cut where the classes changed; one part if they never did."""
    parts: list[list[CurvePoint]] = [[]]
    for point in curve:
        if point.new_classes and parts[-1]:
            parts.append([])
        parts[-1].append(point)
    return parts


def _by_labels(points: Sequence[CurvePoint]) -> list[CurvePoint]:
    return sorted(points, key=lambda point: point.labels)


def _both(name: str, spoken: str, draw: Callable[[Axes, _Size, _Palette], None]) -> str:
    return "\n".join(_svg(f"{name}-{size.name}", size, spoken, draw) for size in (_WIDE, _NARROW))


def _svg(name: str, size: _Size, spoken: str, draw: Callable[[Axes, _Size, _Palette], None]) -> str:
    out = io.StringIO()
    silent: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with _figure(size, name) as (figure, axes):
        figure.patch.set_visible(False)
        draw(axes, size, _SENTINELS)
        figure.savefig(out, format="svg", metadata=silent)
    return _inline(out.getvalue(), name, size, spoken)


@contextmanager
def _canvas(size: _Size, salt: str) -> Iterator[Figure]:
    """An empty figure with matplotlib's defaults, independent of the user's matplotlibrc."""
    import matplotlib
    from matplotlib.figure import Figure

    with _LOCK, matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {"svg.hashsalt": salt, "svg.fonttype": "none", "font.size": size.font, "text.parse_math": False}
        )
        yield Figure(figsize=(size.width / _UNITS_PER_INCH, size.height / _UNITS_PER_INCH), dpi=_UNITS_PER_INCH)


@contextmanager
def _figure(size: _Size, salt: str) -> Iterator[tuple[Figure, Axes]]:
    """A figure with a single pair of axes that fill it."""
    with _canvas(size, salt) as figure:
        yield figure, _add_axes(figure, size, (0, 0), (size.width, size.height))


def _add_axes(figure: Figure, size: _Size, corner: tuple[int, int], extent: tuple[int, int]) -> Axes:
    """Axes in a part of the figure, with margins for the labels of `_dress`."""
    left, bottom, right, top = 3.2 * size.font, 3.9 * size.font, 1.2 * size.font, 2.6 * size.font
    return figure.add_axes(
        (
            (corner[0] + left) / size.width,
            (corner[1] + bottom) / size.height,
            (extent[0] - left - right) / size.width,
            (extent[1] - bottom - top) / size.height,
        )
    )


def _inline(document: str, name: str, size: _Size, spoken: str) -> str:
    """An SVG document as an element of a page: unique ids, the page's colors and fonts, no external references."""
    body = document[document.index("<svg") :]
    body = body[body.index(">") + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', body))
    body = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m.group(1)}"' if m.group(1) in used else "", body)
    body = re.sub(r'xlink:href="#', f'href="#{name}-', body)
    body = body.replace("url(#", f"url(#{name}-")
    body = re.sub(r"#01020(\d)", lambda match: f"var(--{_VARIABLES[int(match.group(1))]})", body)
    body = re.sub(r"font: ([\d.]+px) [^;\"]+", r"font-size: \1", body)
    body = re.sub(r" ?font-family: [^;\"]+;?", "", body)
    body = re.sub(r"\n\s*", "\n", body)
    opening = (
        f'<svg class="chart-{size.name}" role="img" aria-label="{escape(spoken, quote=True)}" '
        f'viewBox="0 0 {size.width} {size.height}">'
    )
    return opening + body.strip()


def _dress(axes: Axes, colors: _Palette, x_label: str, y_label: str) -> None:
    axes.set_facecolor("none")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(colors.muted)
    axes.tick_params(colors=colors.muted, length=0, pad=5)
    axes.tick_params(axis="x", length=4)
    axes.grid(axis="y", color=colors.line, linewidth=1)
    axes.set_axisbelow(True)
    axes.set_xlabel(x_label, color=colors.muted, labelpad=6)
    axes.annotate(
        y_label, (0, 1), (-3.0, 0.9), xycoords="axes fraction", textcoords="offset fontsize", color=colors.muted
    )


def _draw_curve(
    axes: Axes,
    size: _Size,
    colors: _Palette,
    metric: str,
    curve: Sequence[CurvePoint],
    baseline: Sequence[CurvePoint],
) -> None:
    _dress(axes, colors, "labels", metric)
    *earlier, newest = _parts(curve)
    for part in (*earlier[1:], *([newest] if earlier else [])):
        axes.axvline(part[0].labels, color=colors.muted, linewidth=1, linestyle=(0, (1, 2)), zorder=1)
    old: list[Any] = [(_by_labels(part), colors.muted, "solid", "o", "") for part in earlier]
    for points, color, style, marker, name in (
        *old,
        (_by_labels(baseline), colors.second, (0, (4, 3)), "s", "random sampling"),
        (_by_labels(newest), colors.accent, "solid", "o", "active learning" if baseline else ""),
    ):
        if points:
            _draw_line(axes, points, color, colors.paper, style, marker, name)
    _fit_axes(axes, [*curve, *baseline], curve or baseline)
    if curve and baseline:
        _legend(axes, size, colors)


def _draw_rounds(axes: Axes, colors: _Palette, metric: str, points: Sequence[CurvePoint]) -> None:
    _dress(axes, colors, "round", metric)
    _draw_line(axes, _by_labels(points), colors.accent, colors.paper, "solid", "o", "")
    _fit_axes(axes, points, points)


def _draw_comparison(
    axes: Axes,
    size: _Size,
    colors: _Palette,
    metric: str,
    lines: Mapping[str, Sequence[CurvePoint]],
    full: float | None,
    with_legend: bool = True,
    unit: str = "labels",
) -> None:
    _dress(axes, colors, unit, metric)
    others = [name for name in lines if name != "random"]
    styles: list[Any] = ["solid", (0, (6, 2)), (0, (1.5, 1.5))]
    for name, points in lines.items():
        if not points:
            continue
        number = others.index(name) if name in others else 0
        hue, style = colors.lines[number % len(colors.lines)], styles[number // len(colors.lines) % len(styles)]
        if name == "random":
            hue, style = colors.second, (0, (4, 3))
        _draw_line(axes, _by_labels(points), hue, colors.paper, style, "", name.replace("_", " "))
    drawn = [point for points in lines.values() for point in points]
    if full is not None:
        axes.axhline(full, color=colors.muted, linewidth=1, linestyle=(0, (1, 2)), zorder=1)
    _fit_axes(axes, drawn, drawn)
    if with_legend:
        _legend(axes, size, colors)


def _legend(axes: Axes, size: _Size, colors: _Palette) -> None:
    axes.legend(
        loc="lower right", frameon=False, labelcolor=colors.ink, fontsize=size.font, reverse=True, handlelength=2.6
    )


def _fit_axes(axes: Axes, drawn: Sequence[CurvePoint], marked: Sequence[CurvePoint]) -> None:
    """Fit the axes to everything in `drawn`; label the x axis at the points of `marked` if there is room."""
    from matplotlib.ticker import FixedLocator, MaxNLocator

    lows = [point.value if point.low is None else point.low for point in drawn]
    highs = [point.value if point.high is None else point.high for point in drawn]
    axes.set_ylim(*_value_range(min(lows, default=0.0), max(highs, default=1.0)))
    first, last = min((p.labels for p in drawn), default=0), max((p.labels for p in drawn), default=1)
    margin = max(1.0, 0.04 * (last - first))
    axes.set_xlim(first - margin, last + margin)
    stops = _apart(sorted({point.labels for point in marked}), (last - first) / 12)
    axes.xaxis.set_major_locator(FixedLocator(stops) if len(stops) <= 6 else MaxNLocator(nbins=6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))


def _apart(stops: Sequence[int], least: float) -> list[int]:
    """Those of `stops` (ascending) at least `least` after the last one kept, so that tick labels do not overlap."""
    kept: list[int] = []
    for stop in stops:
        if not kept or stop - kept[-1] >= least:
            kept.append(stop)
    return kept


def _draw_line(
    axes: Axes, points: Sequence[CurvePoint], color: str, paper: str, style: Any, marker: str, name: str
) -> None:
    labels = [point.labels for point in points]
    banded = [(p.labels, p.low, p.high) for p in points if p.low is not None and p.high is not None]
    if len(banded) > 1:
        positions, floor, ceiling = zip(*banded, strict=True)
        axes.fill_between(positions, floor, ceiling, color=color, alpha=0.16, linewidth=0, zorder=2)
    for position, low, high in banded if len(banded) == 1 else ():
        axes.plot([position, position], [low, high], color=color, linewidth=1.6, alpha=0.7, zorder=3)
    axes.plot(
        labels, [point.value for point in points], color=color, linestyle=style, linewidth=2.2, label=name, zorder=4,
        marker=marker, markersize=0 if len(points) > 25 else 6.5, markerfacecolor=color,
        markeredgecolor=color, markeredgewidth=1.6,
    )  # fmt: skip
    hollow = [(point.labels, point.value) for point in points if not point.solid]
    if hollow:
        x, y = zip(*hollow, strict=True)
        axes.plot(
            x, y, linestyle="none", marker=marker, markersize=6.5, markerfacecolor=paper, markeredgecolor=color,
            markeredgewidth=1.6, zorder=5,
        )  # fmt: skip


def _value_range(low: float, high: float) -> tuple[float, float]:
    """The range of a metric's axis: from the tenth below the lowest value up to 1, or to a higher value."""
    bottom = max(0.0, int((low - 0.02) * 10) / 10) if low >= 0 else low
    top = max(1.0, high)
    return bottom, top + 0.03 * (top - bottom)


def _draw_histogram(axes: Axes, colors: _Palette, label: str, edges: Sequence[float], counts: Sequence[int]) -> None:
    from matplotlib.ticker import MaxNLocator

    _dress(axes, colors, label, "items")
    widths = [right - left for left, right in zip(edges, edges[1:], strict=False)]
    axes.bar(list(edges[:-1]), list(counts), width=widths, align="edge", color=colors.accent, edgecolor=colors.paper)
    axes.set_ylim(0, max(1, *counts) * 1.06)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    axes.yaxis.set_major_formatter(lambda count, _: f"{count / 1000:g}k" if count >= 10_000 else f"{count:g}")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.margins(x=0.01)
