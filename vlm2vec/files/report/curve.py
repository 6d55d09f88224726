"""Line charts as inline SVG, coloured by the page's style."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from math import ceil, floor, isfinite, log10

WIDTH, HEIGHT = 520, 260
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 16, 34


@dataclass(frozen=True)
class Series:
    """A line: points (x, y). Points that are not finite are left out."""

    name: str
    points: list[tuple[float, float]]


def curve(
    series: Series,
    *,
    x_label: str = "step",
    y_label: str = "",
    low: float | None = None,
    high: float | None = None,
    share: bool = False,
    reference: tuple[str, float] | None = None,
) -> str:
    """One line over a light grid.

    Args:
        low, high: limits of the y axis; by default those of the data, rounded outwards.
        share: y values are fractions, shown as percent.
        reference: a named horizontal line.

    Returns:
        `<figure>` with an inline SVG; every point has its values as a tooltip. Fewer than two points give a plain sentence.
    """
    points = [(x, y) for x, y in series.points if isfinite(x) and isfinite(y)]
    if len(points) < 2:
        return f'<p class="note">{escape(series.name)}: too few points were logged to draw a line.</p>'
    values = [y for _, y in points] + ([reference[1]] if reference else [])
    y_ticks = _ticks(min(values) if low is None else low, max(values) if high is None else high)
    x_ticks = _ticks(0, max(x for x, _ in points), inside=True)
    first, last = min(0, points[0][0]), points[-1][0]

    def place(x, y):
        return (
            LEFT + (x - first) / (last - first) * (WIDTH - LEFT - RIGHT),
            TOP + (y_ticks[-1] - y) / (y_ticks[-1] - y_ticks[0]) * (HEIGHT - TOP - BOTTOM),
        )

    def show(y):
        return f"{100 * y:.0f}%" if share else f"{y:g}"

    parts = []
    for tick in y_ticks:
        _, y = place(first, tick)
        parts.append(
            f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{show(tick)}</text>'
        )
    for tick in x_ticks:
        x, _ = place(tick, y_ticks[0])
        parts.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 2}" text-anchor="end">{escape(x_label)}</text>')
    if reference:
        _, y = place(first, reference[1])
        parts.append(
            f'<line class="reference" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick" x="{WIDTH - RIGHT}" y="{y - 6:.1f}" text-anchor="end">{escape(reference[0])}</text>'
        )
    placed = [place(x, y) for x, y in points]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
    ground = f"{placed[0][0]:.1f},{HEIGHT - BOTTOM} {line} {placed[-1][0]:.1f},{HEIGHT - BOTTOM}"
    parts.append(f'<polygon class="area" points="{ground}"/><polyline class="line" points="{line}"/>')
    for (x, y), (step, value) in zip(placed, points):
        parts.append(
            f'<circle class="point" cx="{x:.1f}" cy="{y:.1f}" r="6"><title>{escape(x_label)} {step:g}: '
            f"{_exact(value, share)}</title></circle>"
        )
    x, y = placed[-1]
    parts.append(f'<circle class="end" cx="{x:.1f}" cy="{y:.1f}" r="4"/>')
    caption = f"{escape(series.name)} <b>{_exact(points[-1][1], share)}</b>"
    if y_label:
        caption += f" <span>{escape(y_label)}</span>"
    return (
        f'<figure class="chart"><figcaption>{caption}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(series.name)} over {escape(x_label)}s">{"".join(parts)}</svg></figure>'
    )


def _exact(value, share):
    return f"{100 * value:.1f} %" if share else f"{value:.3g}"


def _ticks(low, high, inside=False):
    """Four to seven round numbers that enclose [low, high], or, with `inside`, that lie in it."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / 5
    unit = 10 ** floor(log10(rough))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough * 0.999)
    begin, end = floor(low / step + 1e-9), (floor if inside else ceil)(high / step + (1e-9 if inside else -1e-9))
    return [round(k * step, 10) for k in range(begin, end + 1)]
