"""What the rows of the robustness study say: drops, paired differences and their intervals.

    drop of a method             = mean PSNR in distribution - mean PSNR under the shift
    difference from a rival      = mean over images of (PSNR of the patch prior - PSNR of the rival)
    difference of the drops      = drop of the rival - drop of the patch prior

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

from benchmarks.robustness.contenders import ADAPTED, BUNDLED
from benchmarks.robustness.table import REFERENCE, STUDIES, Row
from benchmarks.robustness.training import PATCH_PRIOR

DRAWS = 4000
LEVEL = 0.95
FEW = 100  # training images of the headline, at most
INSIDE = "in distribution"


class Series(NamedTuple):
    """A method and what it has learned from."""

    method: str
    estimate: str
    train_set: str
    training_images: int


class Interval(NamedTuple):
    """A mean difference and its interval."""

    mean: float
    low: float
    high: float


class Drop(NamedTuple):
    """What a method loses under a shift, in dB; ``worst_image`` is the one of the lowest PSNR."""

    study: str
    shift: str
    sigma: float
    series: Series
    images: int
    reference: float
    shifted: float
    drop: float
    worst_image: str
    worst: float


class Difference(NamedTuple):
    """The patch prior beside a rival that has learned from the same images, or from none, in dB.

    ``psnr`` is above zero where the patch prior is better, ``drop`` where it loses less; that is None
    where there is no reference. ``worst_image`` is where it does worst beside the rival.
    """

    study: str
    shift: str
    sigma: float
    prior: Series
    rival: Series
    images: int
    psnr: Interval
    drop: Interval | None
    worst_image: str
    worst: float


# The PSNR of a series under a shift at a noise level, by (test set, image, seed).
Values = dict[tuple[str, str, int], float]


class Results:
    """The PSNR of all rows, by what they are about."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.values: dict[tuple[str, str, float, Series], Values] = defaultdict(dict)
        self.series: dict[Series, None] = {}
        for row in rows:
            series = Series(row.method, row.estimate, row.train_set, row.training_images)
            self.series[series] = None
            key = row.study, row.shift, row.sigma, series
            self.values[key][row.test_set, row.image, row.seed] = row.psnr
        self.references: dict[tuple[str, str], set[str]] = defaultdict(set)
        for study, shift, _, series in list(self.values):
            if series.method == PATCH_PRIOR:
                self.references[study, shift] |= {
                    test_set
                    for (s, r, _, other), values in self.values.items()
                    if (s, r, other) == (study, REFERENCE, series)
                    for test_set, _, _ in values
                }

    def shifted(self, study: str, shift: str, sigma: float, series: Series) -> Values:
        """The PSNR under a shift."""
        return self.values.get((study, shift, sigma, series), {})

    def reference(self, study: str, shift: str, sigma: float, series: Series) -> Values:
        """The PSNR in distribution: on the sets that the patch prior was trained for."""
        values = self.shifted(study, REFERENCE, sigma, series)
        return {key: x for key, x in values.items() if key[0] in self.references[study, shift]}


def drops(rows: Sequence[Row]) -> list[Drop]:
    """The drop of every method under every shift for which there are rows in distribution."""
    results = Results(rows)
    found = []
    for (study, shift, sigma, series), values in results.values.items():
        reference = results.reference(study, shift, sigma, series)
        if shift == REFERENCE or not reference:
            continue
        inside, outside = (float(np.mean(list(x.values()))) for x in (reference, values))
        worst = min(values, key=values.__getitem__)
        found.append(
            Drop(
                study,
                shift,
                sigma,
                series,
                len(values),
                inside,
                outside,
                inside - outside,
                worst[1],
                values[worst],
            )
        )
    return found


def differences(rows: Sequence[Row], *, seed: int = 0) -> list[Difference]:
    """The patch prior beside every rival, for every training set and number of training images."""
    results = Results(rows)
    found = []
    for (study, shift, sigma, prior), own in list(results.values.items()):
        for rival in results.series:
            theirs = results.shifted(study, shift, sigma, rival)
            common = [key for key in own if key in theirs]
            if not common or not _comparable(prior, rival):
                continue
            gaps = {key: own[key] - theirs[key] for key in common}
            before = [results.reference(study, shift, sigma, s) for s in (prior, rival)]
            inside = {key: before[0][key] - before[1][key] for key in before[0] if key in before[1]}
            worst = min(gaps, key=gaps.__getitem__)
            found.append(
                Difference(
                    study,
                    shift,
                    sigma,
                    prior,
                    rival,
                    len(gaps),
                    interval(np.array(list(gaps.values())), seed=seed),
                    _drop_interval(gaps, inside, seed) if shift != REFERENCE and inside else None,
                    worst[1],
                    gaps[worst],
                )
            )
    return found


def interval(values: np.ndarray, less: np.ndarray | None = None, *, seed: int = 0) -> Interval:
    """mean(values) - mean(less), and its bootstrap interval of 95 %; the two are resampled apart."""
    generator = np.random.default_rng(seed)
    tail = 50 * (1 - LEVEL)
    means, mean = _resampled(values, generator), float(values.mean())
    if less is not None:
        means, mean = means - _resampled(less, generator), mean - float(less.mean())
    low, high = np.percentile(means, [tail, 100 - tail])
    return Interval(mean, float(low), float(high))


def headline(rows: Sequence[Row]) -> list[list[str]]:
    """Lines for a table: the mean PSNR of every method, in distribution and under the shifts, in dB.

    Of every training set there is the patch prior with the most training images up to ``FEW``, with
    what has learned from the same images and what has learned nothing here. A column is of the images,
    noise levels and shifts that all methods in it share, so that it can be read from top to bottom;
    the best is bold. In distribution is that of the study of content.
    """
    results = Results(rows)
    trained: dict[tuple[str, str], Series] = {}
    for study, _, _, series in results.values:
        if series.method == PATCH_PRIOR and series.training_images <= FEW:
            place = study, series.train_set
            trained[place] = max(series, trained.get(place, series))
    columns: dict[str, dict[tuple[str, str], dict[object, float]]] = defaultdict(dict)
    for (study, train_set), prior in trained.items():
        for (other, shift, sigma, series), values in results.values.items():
            beside = series == prior or _comparable(prior, series) or series.method in (BUNDLED, ADAPTED)
            title = study if shift != REFERENCE else INSIDE if study == "content" else ""
            if title and beside and other == study and (study, shift, sigma, prior) in results.values:
                found: dict[object, float] = {
                    (train_set, shift, sigma, *key): psnr for key, psnr in values.items()
                }
                columns[title].setdefault(series[:2], {}).update(found)
    means: dict[str, dict[tuple[str, str], float]] = {}
    for title in (INSIDE, *STUDIES):
        common = set.intersection(*map(set, columns[title].values())) if columns[title] else set()
        if common:
            means[title] = {
                name: float(np.mean([psnr for key, psnr in values.items() if key in common]))
                for name, values in columns[title].items()
            }
    names = sorted(
        {name for column in means.values() for name in column},
        key=lambda name: (not name[0].startswith(PATCH_PRIOR), name),
    )
    lines = [["method", *means]]
    for name in names:
        cells = []
        for column in means.values():
            text = f"{column[name]:.2f}" if name in column else ""
            cells.append(f"**{text}**" if text and column[name] == max(column.values()) else text)
        lines.append([", ".join(name), *cells])
    return lines


def comparison(rows: Sequence[Row], study: str) -> list[list[str]]:
    """Lines for a table of one study: the patch prior beside every rival, with intervals."""
    lines = [
        ["shift", "sigma", "training", "rival", "PSNR over it", "its drop over ours", "worst image"]
    ]
    chosen = differences([row for row in rows if row.study == study])
    for d in sorted(chosen, key=lambda d: (_order(d.study, d.shift), d.sigma, d.prior, d.rival)):
        lines.append(
            [
                d.shift,
                f"{d.sigma:g}",
                f"{d.prior.training_images} of {d.prior.train_set}",
                f"{d.rival.method}, {d.rival.estimate}",
                _text(d.psnr),
                _text(d.drop) if d.drop else "",
                f"{d.worst_image} ({d.worst:+.2f})",
            ]
        )
    return lines


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


def _drop_interval(
    gaps: dict[tuple[str, str, int], float], inside: dict[tuple[str, str, int], float], seed: int
) -> Interval:
    """The rival's drop less that of the patch prior; image by image where the images are the same."""
    if gaps.keys() <= inside.keys():
        return interval(np.array([gap - inside[key] for key, gap in gaps.items()]), seed=seed)
    return interval(np.array(list(gaps.values())), np.array(list(inside.values())), seed=seed)


def _resampled(values: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The means of resampled values: (DRAWS,)."""
    drawn = generator.integers(len(values), size=(DRAWS, len(values)))
    means: np.ndarray = values[drawn].mean(1)
    return means


def _order(study: str, shift: str) -> tuple[int, bool, str]:
    return STUDIES.index(study), shift != REFERENCE, shift


def _text(found: Interval) -> str:
    return f"{found.mean:+.2f} ({found.low:+.2f} to {found.high:+.2f})"
