"""The report of the robustness benchmark: one HTML file, which asks the network for nothing.

    drop          PSNR under a shift - PSNR without it            of one method
    difference    PSNR of a method - PSNR of the patch prior      on the same noisy images

Where the patch prior loses comes first. Images, style and script are in the file, and its content policy
forbids to load anything. The same rows give the same bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from html import escape
from pathlib import Path
from string import Template
from typing import NamedTuple

import numpy as np

from benchmarks.robustness.claims import no_verdict
from benchmarks.robustness.figures import (
    Line,
    Point,
    cell_style,
    data_uri,
    heat_map,
    plot,
    row_head,
    switched,
    table,
)
from benchmarks.robustness.prices import price_table
from benchmarks.robustness.summary import Difference, Series
from benchmarks.robustness.table import REFERENCE, STUDIES, Budget, Row
from benchmarks.robustness.training import PATCH_PRIOR
from benchmarks.robustness.views import (
    MEASURES,
    NOISY,
    Place,
    Training,
    columns,
    in_order,
    learned,
    number,
    series_name,
    shift_name,
    trainings,
)
from patchscore.errors import InputError
from patchscore.evaluation.metrics import psnr
from patchscore.storage import replacing

HERE = Path(__file__).parent
COLOURS, SHAPES = 13, 3  # of the style sheet
CAPTIONS = {
    "phantoms": "Objects of another kind than those that were learned.",
    "gain": "The same images in another unit: times a gain, or with an offset added.",
    "content": "Images of other things than those that were learned.",
    "scanner": "Medical images from another kind of scanner, or of another contrast.",
    "geometry": "The same images turned, flipped or resampled.",
    "noise": "Another noise than the method expects, or a level that is told wrongly.",
}
# The classes of the style sheet that tell a method and an estimate apart.
Looks = dict[tuple[str, str], str]


class Picture(NamedTuple):
    """Two restorations of one image to be laid over each other, all (H, W) in one unit.

    ``left`` and ``right`` are compared by PSNR of ``data_range``; ``right`` is that of the patch prior.
    A picture whose left side is closer to the clean image is shown with the losses.
    """

    title: str
    caption: str
    clean: np.ndarray
    noisy: np.ndarray
    left_label: str
    left: np.ndarray
    right_label: str
    right: np.ndarray
    data_range: float


def write_report(
    path: str | Path, rows: Sequence[Row], budgets: Sequence[Budget], pictures: Sequence[Picture]
) -> None:
    """Write the report to ``path``, whole or not at all.

    Raises
    ------
    InputError
        If there are no rows of the patch prior, or the file cannot be written.
    """
    found = trainings(rows)
    if not found:
        present = ", ".join(sorted({row.method for row in rows})) or "no method at all"
        raise InputError(
            f"the report compares with the method {PATCH_PRIOR!r}, and these rows are of {present}; "
            f"run the benchmark with {PATCH_PRIOR!r} among its methods."
        )
    note = no_verdict(budgets)
    lost = sorted((p for p in pictures if _lead(p) > 0), key=_lead, reverse=True)
    others = [p for p in pictures if not _lead(p) > 0]
    looks = _looks(in_order(series for training in found for _, series in training.psnr))
    page = Template((HERE / "report.html").read_text(encoding="utf-8")).substitute(
        style=(HERE / "report.css").read_text(encoding="utf-8"),
        script=(HERE / "report.js").read_text(encoding="utf-8"),
        headline=f'<p class="lead">{note}</p>' if note else _headline(rows, found),
        losses=("" if note else _losses(found)) + _gallery(lost, 0),
        matrix=_matrix(found),
        prices=_prices(rows),
        studies="".join(_study(study, found, looks) for study in STUDIES),
        pictures=_gallery(others, len(lost)) or "<p>No others were made.</p>",
        budget=_budgets(budgets),
        method=_method(rows),
    )
    with replacing(path) as beside:
        beside.write_text(page, encoding="utf-8", newline="\n")


def _headline(rows: Sequence[Row], found: Sequence[Training]) -> str:
    compared = [difference for training in found for difference in training.differences]
    ahead = sum(difference.psnr.low > 0 for difference in compared)
    behind = sum(difference.psnr.high < 0 for difference in compared)
    images = len({(row.test_set, row.image) for row in rows})
    shifts = len({(row.study, row.shift) for row in rows if row.shift != REFERENCE})
    return (
        f'<p class="lead">{len({row.method for row in rows})} methods, {images} test images, {shifts} '
        f"shifts. Of {len(compared)} comparisons on the same noisy images, a patch prior is "
        f'<span class="loss">behind in {behind}</span> and ahead in {ahead}; in '
        f"{len(compared) - ahead - behind} the 95&nbsp;% interval holds zero.</p>"
    )


def _losses(found: Sequence[Training]) -> str:
    compared = [difference for training in found for difference in training.differences]
    lost = sorted((d for d in compared if d.psnr.high < 0), key=lambda d: d.psnr.mean)
    drops = [(cell, *key) for t in found for key, cell in t.cells["drop"].items()]
    own = min((drop for drop in drops if drop[2].method == PATCH_PRIOR), default=None)
    words = ""
    if own is not None:
        cell, place, series = own
        words = (
            f" The deepest drop of a patch prior is {number(cell.mean)}&nbsp;dB ({cell.interval}): "
            f"trained on {escape(learned(series))}, on {escape(str(place))}, at noise level "
            f"{place.sigma:g}."
        )
    if not lost:
        return f"<p>No other method is ahead of it by more than the interval.{words}</p>"
    deepest: dict[tuple[str, ...], list[Difference]] = {}
    for difference in lost:
        deepest.setdefault(_pair(difference), []).append(difference)
    counts = Counter(_pair(difference) for difference in compared)
    digest = [
        [*_loss(own_lost[0]), f"{len(own_lost)} of {counts[pair]}"] for pair, own_lost in deepest.items()
    ]
    names = "ahead", "by, dB", "of", "where", "noise level", "interval", "worst image"
    return (
        f"<p>By how much at most, to each method that is ahead by more than the interval.{words}</p>"
        f"{table((*names, 'ahead in'), digest, left=(2, 3, 6))}"
        f"<details><summary>All {len(lost)} losses</summary>"
        f"{table(names, [_loss(difference) for difference in lost], left=(2, 3, 6))}</details>"
    )


def _pair(difference: Difference) -> tuple[str, ...]:
    return (difference.prior.method, *difference.rival[:2])


def _loss(difference: Difference) -> list[str]:
    low, high = number(-difference.psnr.high), number(-difference.psnr.low)
    return [
        row_head(difference.rival),
        f'<span class="loss">{number(-difference.psnr.mean)}</span>',
        f"{escape(difference.prior.method)}<small>{escape(learned(difference.prior))}</small>",
        escape(str(Place(*difference[:3]))),
        f"{difference.sigma:g}",
        f"{low} to {high}",
        f"{escape(difference.worst_image)} ({number(-difference.worst)})",
    ]


def _matrix(found: Sequence[Training]) -> str:
    levels = [place.sigma for training in found for place, _ in training.psnr]
    key = "".join(f'<i style="{cell_style(v)}">{number(v, 0)}</i>' for v in (-10, -3, -1, 0, 1, 3, 10))

    def draw(measure: str, sigma: float) -> str:
        tables = "".join(heat_map(training, measure, sigma) for training in found)
        return (
            f'<p>{MEASURES[measure][1]}</p><div class="key" aria-hidden="true"><span>worse</span>{key}'
            "<span>better, dB</span></div><p><small>Bold: the interval does not hold zero. Without "
            f"colour: the PSNR itself.</small></p>{tables}"
        )

    return switched(levels, draw)


def _prices(rows: Sequence[Row]) -> str:
    head, *lines = [[escape(text) for text in line] for line in price_table(rows)]
    if not lines:
        return "<p>No method has learned from two sets and was measured on one of them.</p>"
    # An interval goes below its mean.
    cells = [
        [text.replace(" (", "<small>(").replace(")", ")</small>") for text in line] for line in lines
    ]
    return (
        "<p>PSNR that a one-step estimate loses on the same noisy images, in dB, by having learned from "
        "another set instead of their own, of as many images. Below zero, the other images taught more."
        f"</p>{table(head, cells, left=(1,))}"
    )


def _looks(order: Sequence[Series]) -> Looks:
    """A colour for every method, and a shape for every estimate of it."""
    looks: Looks = {}
    estimates: dict[str, dict[str, None]] = {}
    for series in order:
        if series.method == NOISY:
            continue
        of_method = estimates.setdefault(series.method, {})
        of_method.setdefault(series.estimate)
        colour, shape = list(estimates).index(series.method), list(of_method).index(series.estimate)
        looks[series[:2]] = f"m{colour % COLOURS} s{shape % SHAPES}"
    return looks


def _study(study: str, found: Sequence[Training], looks: Looks) -> str:
    charts = []
    for training in found:
        levels = [place.sigma for place, _ in training.psnr if place.study == study]
        if levels:
            draw = partial(_chart, study, training, looks)
            charts.append(f"<p>Trained on {escape(training.train_set)}.</p>{switched(levels, draw)}")
    return f"<h3>{study.capitalize()}</h3><p>{CAPTIONS[study]}</p>{''.join(charts)}" if charts else ""


def _chart(study: str, training: Training, looks: Looks, measure: str, sigma: float) -> str:
    cells = {
        key: cell
        for key, cell in training.cells[measure].items()
        if (key[0].study, key[0].sigma) == (study, sigma) and key[1].method != NOISY
    }
    if not cells:
        return "<p>There is nothing to compare at this noise level.</p>"
    shifts = [shift for _, shift in columns(place for place, _ in cells)]
    order = in_order(series for _, series in cells)
    most = {series[:2]: series.training_images for series in order}
    lines = [
        Line(
            series_name(series),
            looks[series[:2]] + " hollow" * (series.training_images < most[series[:2]]),
            sorted(Point(shifts.index(p.shift), *c[:3]) for (p, s), c in cells.items() if s == series),
        )
        for series in order
    ]
    legend = "".join(f'<li class="{line.look}">{escape(line.name)}</li>' for line in lines)
    numbers = [
        [
            row_head(series),
            escape(shift_name(place.shift)),
            number(cell.mean),
            cell.interval,
            str(cell.images),
        ]
        for (place, series), cell in sorted(
            cells.items(), key=lambda item: (shifts.index(item[0][0].shift), -item[1].mean)
        )
    ]
    drawing = plot(f"{study}: {MEASURES[measure][0]}", [shift_name(shift) for shift in shifts], lines)
    listing = table(("method", "shift", "mean, dB", "interval", "images"), numbers, left=(1,))
    return (
        "<p><small>Hollow: fewer training images. The axis is a signed square root.</small></p>"
        f'<ul class="legend">{legend}</ul><div class="scroll" tabindex="0">{drawing}</div>'
        f"<details><summary>The numbers</summary>{listing}</details>"
    )


def _gallery(pictures: Sequence[Picture], first: int) -> str:
    cards = "".join(_card(picture, count) for count, picture in enumerate(pictures, first))
    return f'<div class="cards">{cards}</div>' if cards else ""


def _card(picture: Picture, count: int) -> str:
    low, high = float(picture.clean.min()), float(picture.clean.max())
    left, right, clean, noisy = (
        data_uri(image, low, high)
        for image in (picture.left, picture.right, picture.clean, picture.noisy)
    )
    quality = [
        psnr(picture.clean, image, data_range=picture.data_range)
        for image in (picture.left, picture.right)
    ]
    names = escape(picture.left_label), escape(picture.right_label)
    peeks = [("clean", clean)] + ([("noisy", noisy)] if noisy not in (left, right) else [])
    overs = "".join(f'<img class="over {kind}" src="{uri}" alt="{kind}">' for kind, uri in peeks)
    buttons = "".join(
        f'<button type="button" data-over="{kind}" aria-pressed="false">{kind}</button>'
        for kind, _ in peeks
    )
    return (
        f'<figure class="card" id="picture-{count}"><div class="stage">'
        f'<img class="after" src="{right}" alt="{names[1]}"><img class="before" src="{left}" '
        f'alt="{names[0]}"><input type="range" min="0" max="100" value="50" '
        f'aria-label="{names[0]} to the left, {names[1]} to the right"><span class="bar"></span>'
        f'<b class="a">{names[0]}</b><b class="z">{names[1]}</b>{overs}</div>'
        f'<div class="peek">{buttons}</div><figcaption><h4>{escape(picture.title)}</h4>'
        f"<p>{names[0]} {quality[0]:.2f} dB, {names[1]} {quality[1]:.2f} dB. {escape(picture.caption)}"
        "</p></figcaption></figure>"
    )


def _budgets(budgets: Sequence[Budget]) -> str:
    return table(
        ("method", "images", "parameters", "seconds", "steps", "what was tuned, and how", "machine"),
        [
            [
                f"{escape(budget.method)}<small>{escape(budget.train_set)}</small>",
                str(budget.training_images),
                f"{budget.parameters:,}".replace(",", "\N{THIN SPACE}"),
                f"{budget.training_seconds:.0f}",
                str(budget.steps),
                escape(budget.tuned),
                escape(budget.machine),
            ]
            for budget in budgets
        ],
        left=(5, 6),
    )


def _method(rows: Sequence[Row]) -> str:
    machines = escape("; ".join(sorted({row.machine for row in rows})))
    seeds = ", ".join(str(seed) for seed in sorted({row.seed for row in rows}))
    used = sorted(
        {
            (Series(row.method, row.estimate, row.train_set, row.training_images), row.version)
            for row in rows
        }
    )
    versions = table(
        ("method", "estimate that is scored", "version"),
        [
            [row_head(series._replace(estimate="")), escape(series.estimate), escape(version)]
            for series, version in used
        ],
        left=(1, 2),
    )
    return f"<p>Seed {seeds}; {len(rows)} measurements, on {machines}.</p>{versions}"


def _lead(picture: Picture) -> float:
    """How far the left side is ahead of the right one, in dB; NaN where both are exact."""
    left, right = (
        psnr(picture.clean, image, data_range=picture.data_range)
        for image in (picture.left, picture.right)
    )
    return left - right
