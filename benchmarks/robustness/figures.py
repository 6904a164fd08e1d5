"""The figures of the report: coloured cells, intervals on an axis, and images as PNG.

Decibels from hundredths to tens share one scale, that of the signed square root:

    colour of v     neutral + (end - neutral) sqrt(|v| / 10),    full from 10 dB
    place of v      sign(v) sqrt(|v|)

Orange is below zero and blue above: people who do not see red and green can tell them apart.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image
from skimage.color import rgb2xyz

from benchmarks.robustness.summary import Interval
from benchmarks.robustness.views import number

FULL = 10.0
WIDTH = 1060  # of all places, where they are few enough
TICKS = -30, -20, -10, -5, -2, -1, -0.3, 0, 0.3, 1, 2, 5, 10, 20, 30
# The neutral colour, and those of values far below and far above zero, on light and on dark paper.
LIGHT = (246, 245, 243), (196, 86, 10), (24, 100, 171)
DARK = (44, 47, 54), (240, 140, 60), (92, 170, 240)
# For every colour, one of them has a contrast of at least sqrt(21) = 4.58.
INKS = (0, 0, 0), (255, 255, 255)

RGB = tuple[int, int, int]
# Every value that a template prints is escaped.
TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
)
TEMPLATES.filters |= {"number": number, "short": "{:g}".format, "fixed": "{:.1f}".format}


class Line(NamedTuple):
    """A method: its numbers, each with its place on the axis, and its class in the style sheet."""

    name: str
    look: str
    points: Sequence[tuple[int, Interval]]


def cell_style(value: float) -> str:
    """Colours of a cell for a value in dB, as properties of CSS: paper and ink, by day and by night."""
    parts = []
    for mode, colours in (("l", LIGHT), ("d", DARK)):
        paper = blend(value, colours)
        _, ink = max((contrast(paper, ink), ink) for ink in INKS)
        parts.append(f"--{mode}:#{bytes(paper).hex()};--{mode}i:#{bytes(ink).hex()}")
    return ";".join(parts)


def blend(value: float, colours: tuple[RGB, RGB, RGB]) -> RGB:
    """The colour of a value in dB, between the neutral one and an end."""
    neutral, below, above = colours
    share = math.sqrt(min(abs(value) / FULL, 1))
    end = below if value < 0 else above
    red, green, blue = (round(n + (e - n) * share) for n, e in zip(neutral, end, strict=True))
    return red, green, blue


def contrast(one: RGB, other: RGB) -> float:
    """Contrast of two colours from 1 to 21, as the Web Content Accessibility Guidelines define it."""
    low, high = sorted(float(rgb2xyz(np.array(colour) / 255)[1]) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


def plot(title: str, places: Sequence[str], lines: Sequence[Line]) -> Markup:
    """Intervals by place and method, as SVG that takes its colours from the page."""
    values = [v for line in lines for _, p in line.points for v in (p.low, p.high, 0.0)]
    low, high = _root(min(values)), _root(max(values))
    pad = 0.06 * (high - low) or 0.3
    slot = min(max(84, 6 * len(lines) + 12, WIDTH // len(places)), 360)
    left, right, top, bottom = 52, 52 + slot * len(places), 14, 296

    def x(place: int, row: float = (len(lines) - 1) / 2) -> float:
        beside = (row - (len(lines) - 1) / 2) * (slot - 16) / len(lines)
        return left + slot * (place + 0.5) + beside

    def y(value: float) -> float:
        return bottom - (_root(value) - low + pad) / (high - low + 2 * pad) * (bottom - top)

    shown = [tick for tick in TICKS if top <= y(tick) <= bottom]
    # A tick gives way to one that is closer to zero.
    ticks = [
        tick
        for tick in shown
        if all(abs(y(tick) - y(other)) > 14 for other in shown if abs(other) < abs(tick))
    ]
    drawing = TEMPLATES.get_template("plot.svg").render(
        title=title,
        places=places,
        lines=lines,
        ticks=ticks,
        slot=slot,
        left=left,
        right=right,
        top=top,
        bottom=bottom,
        width=right + 12,
        height=bottom + 44,
        x=x,
        y=y,
        broken=_broken,
    )
    return Markup(drawing)


def data_uri(image: np.ndarray, low: float, high: float) -> str:
    """An image (H, W) as a PNG of 8 bits inside an address; ``low`` is black and ``high`` is white."""
    levels = np.clip((image - low) / (high - low or 1.0), 0, 1) * 255
    file = io.BytesIO()
    Image.fromarray(np.rint(levels).astype(np.uint8)).save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _broken(name: str) -> list[str]:
    """Two lines at most, broken at the space nearest to the middle."""
    spaces = [i for i, letter in enumerate(name) if letter == " "] if len(name) > 12 else []
    cut = min(spaces, key=lambda i: abs(i - len(name) / 2), default=len(name))
    return [part for part in (name[:cut], name[cut + 1 :]) if part]


def _root(value: float) -> float:
    return math.copysign(math.sqrt(abs(value)), value)
