"""What the rows of the robustness study say: drops, paired differences and their intervals.

    drop of a method             = mean PSNR under the shift - mean PSNR in distribution
    difference from a rival      = mean over images of (PSNR of the patch prior - PSNR of the rival)
    difference of the drops      = drop of the patch prior - drop of the rival

Test sets differ in how hard they are, so a drop under a shift of content says little alone; in the
difference of two drops on the same images that cancels. Intervals are percentiles of a bootstrap over
images (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13): they are a little
too narrow for few images, by sqrt((n - 1) / n) and by the normal in the place of Student's t.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from benchmarks.robustness.contenders import ADAPTED, BUNDLED
from benchmarks.robustness.table import REFERENCE, STUDIES, Place, Row, Series
from benchmarks.robustness.training import PATCH_PRIOR

DRAWS = 4000
LEVEL = 0.95
FEW = 100  # training images of the headline, at most
INSIDE = "in distribution"


class Interval(NamedTuple):
    """A mean over images and its interval, in dB."""

    mean: float
    low: float
    high: float
    images: int

    @property
    def decided(self) -> bool:
        """Whether the interval does not hold zero; one image has none."""
        return self.images > 1 and (self.low > 0 or self.high < 0)

    def __str__(self) -> str:
        return f"{self.mean:+.2f} ({self.low:+.2f} to {self.high:+.2f})"


class Difference(NamedTuple):
    """The patch prior beside a rival that has learned from the same images, or from none, in dB.

    ``psnr`` is above zero where the patch prior is better, ``drop`` where it loses less; that is None
    where there is no reference. ``worst_image`` is where it does worst beside the rival.
    """

    place: Place
    prior: Series
    rival: Series
    psnr: Interval
    drop: Interval | None
    worst_image: str
    worst: float


# The PSNR of a series at a place, by (test set, image, seed).
Values = dict[tuple[str, str, int], float]


class Results:
    """The PSNR of all rows, by what they are about."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.values: dict[tuple[Place, Series], Values] = defaultdict(dict)
        for row in rows:
            self.values[row.place, row.series][row.test_set, row.image, row.seed] = row.psnr
        sets: dict[tuple[str, Series], set[str]] = defaultdict(set)
        for row in rows:
            if row.shift == REFERENCE:
                sets[row.study, row.series].add(row.test_set)
        self._references: dict[tuple[str, str], set[str]] = defaultdict(set)
        for place, series in self.values:
            if series.method == PATCH_PRIOR:
                self._references[place[:2]] |= sets[place.study, series]

    def reference(self, place: Place, series: Series) -> Values:
        """The PSNR in distribution: on the sets that the patch prior was trained for."""
        values = self.values.get((place._replace(shift=REFERENCE), series), {})
        return {key: x for key, x in values.items() if key[0] in self._references[place[:2]]}


def drops(rows: Sequence[Row]) -> dict[tuple[Place, Series], Interval]:
    """The drop of every method under every shift for which there are rows in distribution."""
    results = Results(rows)
    return {
        (place, series): _gap(values, reference)
        for (place, series), values in results.values.items()
        if place.shift != REFERENCE and (reference := results.reference(place, series))
    }


def differences(rows: Sequence[Row]) -> list[Difference]:
    """The patch prior beside every rival, for every training set and number of training images."""
    results = Results(rows)
    everyone = dict.fromkeys(row.series for row in rows)
    found = []
    for (place, prior), own in results.values.items():
        for rival in everyone:
            theirs = results.values.get((place, rival), {})
            gaps = _less(own, theirs)
            if not gaps or not _comparable(prior, rival):
                continue
            inside = _less(results.reference(place, prior), results.reference(place, rival))
            worst = min(gaps, key=gaps.__getitem__)
            drop = _gap(gaps, inside) if place.shift != REFERENCE and inside else None
            psnr = interval(list(gaps.values()))
            found.append(Difference(place, prior, rival, psnr, drop, worst[1], gaps[worst]))
    return found


def interval(values: Sequence[float], less: Sequence[float] | None = None, *, seed: int = 0) -> Interval:
    """mean(values) - mean(less), and its bootstrap interval of 95 %; the two are resampled apart."""
    generator = np.random.default_rng(seed)
    tail = 50 * (1 - LEVEL)
    means, mean = _resampled(values, generator), np.mean(values)
    if less is not None:
        means, mean = means - _resampled(less, generator), mean - np.mean(less)
    low, high = np.percentile(means, [tail, 100 - tail])
    return Interval(float(mean), float(low), float(high), len(values))


def headline(rows: Sequence[Row]) -> list[list[str]]:
    """Lines for a table: the mean PSNR of every method, in distribution and under the shifts, in dB.

    Of every training set there is the patch prior with the most training images up to ``FEW``, with
    what has learned from the same images and what has learned nothing here. A column is of the images,
    noise levels and shifts that all methods in it share, so that it can be read from top to bottom;
    the best is bold. In distribution is that of the study of content.
    """
    few = [row for row in rows if row.method == PATCH_PRIOR and row.training_images <= FEW]
    priors = {(row.study, row.train_set): row.series for row in sorted(few, key=lambda row: row.series)}
    chosen = []
    for (study, train_set), prior in priors.items():
        places = {row.place for row in few if row.series == prior and row.study == study}
        for row in rows:
            beside = row.series == prior or _comparable(prior, row.series)
            title = study if row.shift != REFERENCE else INSIDE if study == "content" else ""
            if title and row.place in places and (beside or row.method in (BUNDLED, ADAPTED)):
                chosen.append((title, train_set, row))
    columns = {}
    for column in (INSIDE, *STUDIES):
        # A line for every noisy image, a column for every method.
        values: dict[tuple[str, str], dict[object, float]] = defaultdict(dict)
        for title, train_set, row in chosen:
            if title == column:
                key = train_set, row.place, row.test_set, row.image, row.seed
                values[row.series[:2]][key] = row.psnr
        shared = pd.DataFrame(values).dropna()
        if len(shared):
            columns[column] = shared.mean()
    means = pd.DataFrame(columns)
    text = means.map("{:.2f}".format).where(means.notna(), "")
    text = text.where(means != means.max(), "**" + text + "**")
    names = sorted(means.index, key=lambda name: (not name[0].startswith(PATCH_PRIOR), name))
    return [["method", *columns], *([", ".join(name), *text.loc[name]] for name in names)]


def comparison(rows: Sequence[Row], study: str) -> list[list[str]]:
    """Lines for a table of one study: the patch prior beside every rival, with intervals."""
    chosen = differences([row for row in rows if row.study == study])
    return [
        ["shift", "sigma", "training", "rival", "PSNR over it", "its drop over ours", "worst image"],
        *(
            [
                d.place.shift,
                f"{d.place.sigma:g}",
                d.prior.learned,
                f"{d.rival.method}, {d.rival.estimate}",
                str(d.psnr),
                str(d.drop or ""),
                f"{d.worst_image} ({d.worst:+.2f})",
            ]
            for d in sorted(chosen, key=lambda d: (d.place.shift != REFERENCE, d[:3]))
        ),
    ]


def _comparable(prior: Series, rival: Series) -> bool:
    """Whether the rival is not trained, or has learned from the same images in the same time."""
    tuned_alike = rival.estimate.startswith("tuned") and rival.train_set == prior.train_set
    classical = not rival.train_set or tuned_alike
    if prior.method == PATCH_PRIOR:
        trained_here = rival.method not in (PATCH_PRIOR, BUNDLED, ADAPTED)
        return classical or (rival[2:] == prior[2:] and trained_here)
    if prior.method == BUNDLED:
        return classical or rival.method == ADAPTED
    return prior.method == ADAPTED and classical


def _less(values: Values, others: Values) -> Values:
    """How far the values are above others, where there are both."""
    return {key: x - others[key] for key, x in values.items() if key in others}


def _gap(values: Values, reference: Values) -> Interval:
    """The mean less that of the reference; image by image where the images are the same."""
    if values.keys() <= reference.keys():
        return interval(list(_less(values, reference).values()))
    return interval(list(values.values()), list(reference.values()))


def _resampled(values: Sequence[float], generator: np.random.Generator) -> np.ndarray:
    """The means of resampled values: (DRAWS,)."""
    drawn = generator.integers(len(values), size=(DRAWS, len(values)))
    means: np.ndarray = np.asarray(values)[drawn].mean(1)
    return means
