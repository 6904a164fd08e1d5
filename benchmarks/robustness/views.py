"""What the report shows of the rows: for every training set, means over images with their intervals.

    drop          PSNR under a shift - PSNR in distribution       of one method: below zero is lost
    difference    PSNR of a method - PSNR of the patch prior      on the same noisy images

Methods that learn nothing are part of every training set, as what its patch prior is compared with.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.robustness.shifts import REAL
from benchmarks.robustness.summary import Difference, Results, Series, differences, interval
from benchmarks.robustness.table import REFERENCE, STUDIES, Row
from benchmarks.robustness.training import PATCH_PRIOR

# The cells of a training: what they are called, and what they are.
MEASURES = {
    "drop": (
        "Drop from in-distribution",
        "PSNR under the shift less PSNR in distribution, of the same method: below zero is lost.",
    ),
    "difference": (
        "Difference from the patch prior",
        "PSNR less that of the patch prior on the same noisy images: above zero the patch prior loses.",
    ),
}
NOISY = "noisy"  # the noisy image itself: no rival


class Place(NamedTuple):
    """Where something was measured: a study, a shift and a noise level."""

    study: str
    shift: str
    sigma: float

    def __str__(self) -> str:
        name = shift_name(self.shift)
        return name if name.startswith(self.study) else f"{self.study}: {name}"


class Cell(NamedTuple):
    """A mean over images and its interval, in dB."""

    mean: float
    low: float
    high: float
    images: int

    @property
    def interval(self) -> str:
        """In words."""
        return f"{number(self.low)} to {number(self.high)}"

    @property
    def decided(self) -> bool:
        """Whether the interval does not hold zero; one image has none."""
        return self.images > 1 and (self.low > 0 or self.high < 0)


Cells = Mapping[tuple[Place, Series], Cell]


class Training(NamedTuple):
    """What one training set is good for.

    ``psnr`` are means. ``cells`` has the drops, and the differences from the patch prior of the same
    number of training images, or of the most. ``differences`` are of all patch priors, over two
    images or more: one has no interval.
    """

    train_set: str
    psnr: Mapping[tuple[Place, Series], float]
    cells: Mapping[str, Cells]
    differences: Sequence[Difference]


def trainings(rows: Sequence[Row]) -> list[Training]:
    """The rows by what the patch prior has learned from."""
    rows = sorted(_with_one_level(rows))
    conditions: dict[str, set[tuple[str, str, str]]] = {}
    for row in rows:
        if row.method == PATCH_PRIOR:
            conditions.setdefault(row.train_set, set()).add((row.study, row.shift, row.test_set))
    return [
        _training(name, [row for row in rows if (row.study, row.shift, row.test_set) in its])
        for name, its in conditions.items()
    ]


def _training(name: str, rows: Sequence[Row]) -> Training:
    results = Results(rows)
    psnr = {}
    drops = {}
    for (study, shift, sigma, series), values in results.values.items():
        key = Place(study, shift, sigma), series
        psnr[key] = float(np.mean(list(values.values())))
        reference = results.reference(study, shift, sigma, series)
        if shift != REFERENCE and reference:
            if values.keys() <= reference.keys():
                found = interval(np.array([x - reference[image] for image, x in values.items()]))
            else:
                found = interval(np.array(list(values.values())), np.array(list(reference.values())))
            drops[key] = Cell(*found, len(values))
    between = [found for found in differences(rows) if found.rival.method != NOISY]
    from_prior = {
        (Place(*d[:3]), d.rival): Cell(-d.psnr.mean, -d.psnr.high, -d.psnr.low, d.images)
        for d in sorted(between, key=lambda d: d.prior.training_images)
        if d.prior.method == PATCH_PRIOR
    }
    several = [found for found in between if found.images > 1]
    return Training(name, psnr, {"drop": drops, "difference": from_prior}, several)


def _with_one_level(rows: Sequence[Row]) -> list[Row]:
    """Real pairs, whose level is estimated, at the level of the rest of their study."""
    levels = {
        study: Counter(row.sigma for row in rows if row.study == study and row.shift != REAL)
        for study in {row.study for row in rows if row.shift == REAL}
    }
    return [
        row._replace(sigma=levels[row.study].most_common(1)[0][0])
        if row.shift == REAL and levels[row.study]
        else row
        for row in rows
    ]


def in_order(series: Iterable[Series]) -> list[Series]:
    """Patch priors first, then by name; from few training images to many."""
    return sorted(
        set(series), key=lambda s: (s.method != PATCH_PRIOR, not s.method.startswith(PATCH_PRIOR), s)
    )


def columns(places: Iterable[Place]) -> list[tuple[str, str]]:
    """Studies in their order; in each the reference first, and numbers by size."""

    def key(column: tuple[str, str]) -> tuple[int, bool, list[tuple[bool, float, str]]]:
        study, shift = column
        parts = re.findall(r"(-?\d+\.?\d*)|(\D+?(?=-?\d|$))", shift)
        split = [(bool(digits), float(digits or 0), word) for digits, word in parts]
        return STUDIES.index(study), shift != REFERENCE, split

    return sorted({place[:2] for place in places}, key=key)


def series_name(series: Series) -> str:
    """In one line."""
    return ", ".join(part for part in (series.method, series.estimate, learned(series)) if part)


def learned(series: Series) -> str:
    """What a method has learned from, in words."""
    return f"{series.training_images} of {series.train_set}" if series.train_set else ""


def shift_name(shift: str) -> str:
    """In words."""
    return "in distribution" if shift == REFERENCE else shift


def number(value: float, digits: int = 2) -> str:
    """A signed number with a true minus; zero has no sign."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}")
