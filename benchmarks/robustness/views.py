"""What the report shows of the rows: for every training set, means over images with their intervals.

Methods that learn nothing are part of every training set, as what its patch prior is compared with.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.robustness.shifts import REAL
from benchmarks.robustness.summary import Difference, Interval, Results, differences, drops
from benchmarks.robustness.table import REFERENCE, STUDIES, Place, Row, Series
from benchmarks.robustness.training import PATCH_PRIOR

NOISY = "noisy"  # the noisy image itself: no rival


class Training(NamedTuple):
    """What one training set is good for.

    ``psnr`` are means. ``cells`` has the drops, and the differences from the patch prior of the same
    number of training images, or of the most: above zero the patch prior loses. ``differences`` are of
    all patch priors, over two images or more: one has no interval.
    """

    train_set: str
    psnr: Mapping[tuple[Place, Series], float]
    cells: Mapping[str, Mapping[tuple[Place, Series], Interval]]
    differences: Sequence[Difference]

    @property
    def studies(self) -> set[str]:
        """The studies that its patch prior is part of."""
        return {place.study for place, _ in self.psnr}

    def places(self, sigma: float) -> list[Place]:
        """What was measured at a noise level."""
        return columns(place for place, _ in self.psnr if place.sigma == sigma)

    def methods(self, sigma: float) -> list[Series]:
        """Who was measured at a noise level."""
        return in_order(series for place, series in self.psnr if place.sigma == sigma)


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
    psnr = {key: float(np.mean(list(values.values()))) for key, values in Results(rows).values.items()}
    between = [found for found in differences(rows) if found.rival.method != NOISY]
    from_prior = {
        (d.place, d.rival): Interval(-d.psnr.mean, -d.psnr.high, -d.psnr.low, d.psnr.images)
        for d in sorted(between, key=lambda d: d.prior.training_images)
        if d.prior.method == PATCH_PRIOR
    }
    several = [found for found in between if found.psnr.images > 1]
    return Training(name, psnr, {"drop": drops(rows), "difference": from_prior}, several)


def _with_one_level(rows: Sequence[Row]) -> list[Row]:
    """Real pairs, whose level is estimated, at the level of the rest of their study."""
    levels = Counter((row.study, row.sigma) for row in rows if row.shift != REAL)
    common = {study: sigma for (study, sigma), _ in reversed(levels.most_common())}
    return [
        row._replace(sigma=common.get(row.study, row.sigma)) if row.shift == REAL else row
        for row in rows
    ]


def in_order(series: Iterable[Series]) -> list[Series]:
    """Patch priors first, then by name; from few training images to many."""
    return sorted(
        set(series), key=lambda s: (s.method != PATCH_PRIOR, not s.method.startswith(PATCH_PRIOR), s)
    )


def columns(places: Iterable[Place]) -> list[Place]:
    """Studies in their order; in each the reference first, and numbers by size."""

    def key(place: Place) -> tuple[int, bool, list[tuple[bool, float, str]]]:
        parts = re.findall(r"(-?\d+\.?\d*)|(\D+?(?=-?\d|$))", place.shift)
        split = [(bool(digits), float(digits or 0), word) for digits, word in parts]
        return STUDIES.index(place.study), place.shift != REFERENCE, split

    return sorted(set(places), key=key)


def number(value: float, digits: int = 2) -> str:
    """A signed number with a true minus; zero has no sign."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}")
