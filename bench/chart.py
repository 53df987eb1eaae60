"""Bar charts as SVG, by hand: a file that any browser shows, without a plotting library. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, LABEL_WIDTH, VALUE_WIDTH = 920, 330, 100
BAR, GAP, TITLE = 18, 6, 34
COLOURS = ("#4477aa", "#cc6677")


@dataclass(frozen=True)
class Bar:
    """`low` and `high` are the ends of its whisker; `marked` bars have a colour of their own."""

    label: str
    value: float
    low: float
    high: float
    marked: bool = False


@dataclass(frozen=True)
class Panel:
    title: str
    bars: tuple[Bar, ...]


def svg(title: str, panels: list[Panel], note: str = "") -> str:
    """Horizontal bars, a panel below the other, each panel with a scale of its own from 0."""
    body: list[str] = []
    y = 44
    for panel in panels:
        body.append(_text(10, y + 14, panel.title, weight="bold"))
        y += TITLE - GAP
        longest = max((bar.high for bar in panel.bars), default=0) or 1
        for bar in panel.bars:
            body += _bar(bar, y, (WIDTH - LABEL_WIDTH - VALUE_WIDTH) / longest)
            y += BAR + GAP
        y += GAP
    height = y + 34
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
            f'viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="12">',
            '<rect width="100%" height="100%" fill="white"/>',
            _text(10, 26, title, weight="bold", size=16),
            *body,
            _text(10, height - 12, note, colour="#555555"),
            "</svg>\n",
        )
    )


def short(value: float) -> str:
    """Three digits that mean something, without an exponent."""
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def _bar(bar: Bar, y: int, scale: float) -> list[str]:
    x, middle = LABEL_WIDTH, y + BAR / 2
    low, high = x + bar.low * scale, x + bar.high * scale
    return [
        _text(x - 8, y + 13, bar.label, anchor="end"),
        f'<rect x="{x}" y="{y}" width="{bar.value * scale:.1f}" height="{BAR}" '
        f'fill="{COLOURS[bar.marked]}" fill-opacity="0.8"/>',
        f'<path d="M{low:.1f} {middle}H{high:.1f}M{low:.1f} {middle - 4}v8M{high:.1f} {middle - 4}v8" '
        'stroke="black" fill="none"/>',
        _text(high + 8, y + 13, short(bar.value)),
    ]


def _text(
    x: float,
    y: float,
    text: str,
    *,
    anchor: str = "start",
    weight: str = "normal",
    size: int = 12,
    colour: str = "black",
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}" '
        f'font-size="{size}" fill="{colour}">{escape(text)}</text>'
    )
