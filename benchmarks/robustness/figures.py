"""The figures of the report: tables of coloured numbers, intervals on an axis, and images as PNG.

Decibels from hundredths to tens share one scale, that of the signed square root:

    colour of v     neutral + (end - neutral) sqrt(|v| / 10),    full from 10 dB
    place of v      sign(v) sqrt(|v|)

Orange is below zero and blue above; both tell apart for people who do not see red and green.
"""

from __future__ import annotations

import base64
import io
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import NamedTuple

import numpy as np
from PIL import Image

from benchmarks.robustness.summary import Series
from benchmarks.robustness.training import PATCH_PRIOR
from benchmarks.robustness.views import (
    MEASURES,
    Place,
    Training,
    columns,
    in_order,
    learned,
    number,
    shift_name,
)

FULL = 10.0
WIDTH = 1060  # of all places, where they are few enough
TICKS = -30, -20, -10, -5, -2, -1, -0.3, 0, 0.3, 1, 2, 5, 10, 20, 30
# The neutral colour, and those of values far below and far above zero, on light and on dark paper.
LIGHT = (246, 245, 243), (196, 86, 10), (24, 100, 171)
DARK = (44, 47, 54), (240, 140, 60), (92, 170, 240)
# Of any colour, one of them has a contrast of at least sqrt(21) = 4.58.
INKS = (0, 0, 0), (255, 255, 255)

RGB = tuple[int, int, int]


class Point(NamedTuple):
    """A value and its interval, at a place of the horizontal axis."""

    place: int
    value: float
    low: float
    high: float


class Line(NamedTuple):
    """What one method does at all places; ``look`` is its class in the style sheet."""

    name: str
    look: str
    points: Sequence[Point]


def cell_style(value: float) -> str:
    """Colours of a cell for a value in dB, as properties of CSS: paper and ink, by day and by night."""
    parts = []
    for mode, colours in (("l", LIGHT), ("d", DARK)):
        paper = blend(value, colours)
        ink = max(INKS, key=lambda ink, paper=paper: contrast(paper, ink))  # type: ignore[misc]
        parts.append(f"--{mode}:{_hex(paper)};--{mode}i:{_hex(ink)}")
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
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def plot(title: str, places: Sequence[str], lines: Sequence[Line], unit: str = "dB") -> str:
    """Intervals by place and method, as SVG that takes its colours from the page."""
    values = [v for line in lines for point in line.points for v in (point.low, point.high, 0.0)]
    low, high = min(values), max(values)
    pad = 0.06 * (_root(high) - _root(low)) or 0.3
    left, right, top, bottom = 52, 12, 14, 44
    slot = min(max(84, 6 * len(lines) + 12, WIDTH // max(len(places), 1)), 360)
    width, height = left + right + slot * len(places), 340

    def x(place: float) -> float:
        return left + slot * (place + 0.5)

    def y(value: float) -> float:
        share = (_root(value) - _root(low) + pad) / (_root(high) - _root(low) + 2 * pad)
        return height - bottom - share * (height - top - bottom)

    drawn = [
        f'<svg class="plot" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{escape(title)}">'
    ]
    for place in range(0, len(places), 2):
        drawn.append(
            f'<rect class="band" x="{left + slot * place}" y="{top}" width="{slot}" '
            f'height="{height - top - bottom}"/>'
        )
    shown = [tick for tick in TICKS if top <= y(tick) <= height - bottom]
    for tick in shown:
        if tick == 0 or all(
            abs(y(tick) - y(other)) > 14 for other in (0, *shown) if abs(other) < abs(tick)
        ):
            drawn.append(
                f'<line class="{"zero" if tick == 0 else "grid"}" x1="{left}" x2="{width - right}" '
                f'y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
                f'<text class="tick" x="{left - 6}" y="{y(tick) + 4:.1f}">{_tick(tick)}</text>'
            )
    drawn.append(f'<text class="unit" x="4" y="{top - 2}">{escape(unit)}</text>')
    for place, name in enumerate(places):
        drawn.append(_label(name, x(place), height - bottom + 18))
    step = (slot - 16) / max(len(lines), 1)
    for row, line in enumerate(lines):
        shift = (row - (len(lines) - 1) / 2) * step / slot
        at = [(x(p.place + shift), p) for p in line.points]
        drawn.append(f'<g class="{line.look}">')
        for px, p in at:
            words = f"{line.name}, {places[p.place]}: {number(p.value)} dB"
            interval = f"{number(p.low)} to {number(p.high)}"
            drawn.append(
                f"<g><title>{escape(f'{words} ({interval})')}</title>"
                f'<line x1="{px:.1f}" x2="{px:.1f}" y1="{y(p.low):.1f}" y2="{y(p.high):.1f}"/>'
                f'<rect class="mark" x="{px - 4:.1f}" y="{y(p.value) - 4:.1f}" width="8" height="8" '
                'rx="4"/></g>'
            )
        drawn.append("</g>")
    drawn.append("</svg>")
    return "".join(drawn)


def heat_map(training: Training, measure: str, sigma: float) -> str:
    """Methods by shifts, for one training set, measure and noise level; the PSNR where it has none."""
    keys = [key for key in training.psnr if key[0].sigma == sigma]
    if not keys:
        return ""
    across = columns(place for place, _ in keys)
    sizes = Counter(study for study, _ in across)
    groups = "".join(f'<th scope="colgroup" colspan="{sizes[study]}">{study}</th>' for study in sizes)
    heads = "".join(f'<th scope="col">{escape(shift_name(shift))}</th>' for _, shift in across)
    body = []
    for series in in_order(series for _, series in keys):
        kind = ' class="prior"' if series.method == PATCH_PRIOR else ""
        body.append(f'<tr{kind}><th scope="row">{row_head(series, training.train_set)}</th>')
        for study, shift in across:
            key = Place(study, shift, sigma), series
            cell, value = training.cells[measure].get(key), training.psnr.get(key)
            if cell is None:
                body.append(f'<td class="none">{"" if value is None else f"{value:.2f}"}</td>')
                continue
            mark = "b" if cell.decided else "span"
            body.append(
                f'<td style="{cell_style(cell.mean)}" title="{cell.interval}, {cell.images} images">'
                f"<{mark}>{number(cell.mean)}</{mark}></td>"
            )
        body.append("</tr>")
    return (
        f'<div class="scroll" tabindex="0"><table class="heat"><caption>Trained on '
        f"{escape(training.train_set)}</caption>"
        f'<thead><tr><th rowspan="2" class="left">method</th>{groups}</tr><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def switched(levels: Iterable[float], draw: Callable[[str, float], str]) -> str:
    """What ``draw`` makes of every measure and noise level, with buttons to choose one."""
    counts = Counter(levels)
    sigmas = sorted(counts)
    common = [sigma for sigma in sigmas if counts[sigma] == max(counts.values())]
    start = common[len(common) // 2]
    panels = "".join(
        f'<div class="panel" data-measure="{measure}" data-sigma="{sigma:g}">'
        f"<h4>{name}, noise level {sigma:g}</h4>{draw(measure, sigma)}</div>"
        for measure, (name, _) in MEASURES.items()
        for sigma in sigmas
    )
    names = [(measure, name) for measure, (name, _) in MEASURES.items()]
    switch = _buttons("measure", "Show", names, names[0][0]) + _buttons(
        "sigma", "Noise level", [(f"{sigma:g}", f"{sigma:g}") for sigma in sigmas], f"{start:g}"
    )
    return f'<div class="scope"><div class="switch">{switch}</div>{panels}</div>'


def table(columns: Sequence[str], lines: Sequence[Sequence[str]], left: Sequence[int] = ()) -> str:
    """A table of HTML, of escaped cells, the first of which names the line."""

    def cell(place: int, text: str) -> str:
        if place == 0:
            return f'<th scope="row">{text}</th>'
        return f'<td class="left">{text}</td>' if place in left else f"<td>{text}</td>"

    heads = "".join(
        f'<th scope="col"{" class=left" if i == 0 or i in left else ""}>{name}</th>'
        for i, name in enumerate(columns)
    )
    body = "".join(f"<tr>{''.join(cell(i, text) for i, text in enumerate(line))}</tr>" for line in lines)
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def row_head(series: Series, known: str = "") -> str:
    """The name of a line; what is ``known`` to be the training set is not said again."""
    count = f"{series.training_images} images"
    source = count if known and series.train_set == known else learned(series)
    words = ", ".join(part for part in (series.estimate, source) if part)
    return f"{escape(series.method)}<small>{escape(words)}</small>"


def data_uri(image: np.ndarray, low: float, high: float) -> str:
    """An image (H, W) as a PNG of 8 bits inside an address; ``low`` is black and ``high`` is white."""
    levels = np.clip((image - low) / (high - low or 1.0), 0, 1) * 255
    file = io.BytesIO()
    Image.fromarray(np.rint(levels).astype(np.uint8)).save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _buttons(name: str, words: str, choices: Sequence[tuple[str, str]], start: str) -> str:
    buttons = "".join(
        f'<button type="button" data-name="{name}" data-value="{value}" '
        f'aria-pressed="{str(value == start).lower()}">{label}</button>'
        for value, label in choices
    )
    return f"<fieldset><legend>{words}</legend>{buttons}</fieldset>"


def _label(name: str, x: float, y: float) -> str:
    # Two lines at most, broken at the space nearest to the middle.
    spaces = [i for i, letter in enumerate(name) if letter == " "] if len(name) > 12 else []
    cut = min(spaces, key=lambda i: abs(i - len(name) / 2), default=len(name))
    lines = [part for part in (name[:cut], name[cut + 1 :]) if part]
    return "".join(
        f'<text class="place" x="{x:.1f}" y="{y + 15 * i:.1f}">{escape(part)}</text>'
        for i, part in enumerate(lines)
    )


def _root(value: float) -> float:
    return math.copysign(math.sqrt(abs(value)), value)


def _tick(value: float) -> str:
    return f"{value:+g}".replace("-", "\N{MINUS SIGN}") if value else "0"


def _luminance(colour: RGB) -> float:
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _hex(colour: RGB) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)
