"""What is gained by learning from the noisy image itself?

    y = x + sigma z                              x in 0..255 (one factor for a set of another range)
    before, after = PSNR of the one-step estimate of the prior that was given, and of the adapted one

on images of eight kinds, each adapted to by itself, with BM3D beside. With ``--sets``: 1, 3 or 10 noisy
images of a kind are adapted to at once, and what came of it is used on other images of that kind, beside
a prior that has learned from the same images without noise, in as many steps.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

import patchscore as ps
from benchmarks.adaptation_jobs import GROUPS, Lesson, sets, single
from benchmarks.data import DATA_RANGE, NamedImage, add_noise, digest
from benchmarks.machine import machine
from benchmarks.methods import version_of
from benchmarks.study import PRIOR, SEED, Job, Option, Study
from benchmarks.tables import Values, frame_of, markdown
from patchscore.adaptation.adapt import Report, adapt
from patchscore.adaptation.search import AVERAGE, CROP, WARMUP
from patchscore.evaluation.baselines import bm3d
from patchscore.evaluation.metrics import psnr

RATE = 1e-3
# Of learning from clean images where nothing could be learned from noisy ones.
CLEAN_STEPS = 100


class Row(NamedTuple):
    """One image, denoised with a prior before and after it has learned from some.

    Attributes
    ----------
    group, image, sigma : what is denoised
    learned_from, images : "itself", "noisy" or "clean" images, and how many
    rate, limit : the first learning rate, and the most seconds
    seed : of the noise and of the adaptation
    version, input : of the code and the prior that was given; a digest of all clean images of the lesson
    before, after, bm3d : PSNR in dB, of 255; bm3d is nan where it was not run
    adapted : 1 if the prior was changed
    gain, error : what adaptation reports, as shares of the mean squared error; nan for clean images
    variance, correlation : of the residuals of the images learned from, the furthest from 1 and from 0
    steps, seconds : of learning; the steps are those kept
    machine : the processor and the number of threads
    """

    group: str
    image: str
    sigma: float
    learned_from: str
    images: int
    rate: float
    limit: float
    seed: int
    version: str
    input: str
    before: float
    after: float
    bm3d: float
    adapted: int
    gain: float
    error: float
    variance: float
    correlation: float
    steps: int
    seconds: float
    machine: str


# A prior that has learned, and how: the columns of a row from ``adapted`` to ``seconds``.
Learned = tuple[ps.PatchPrior, tuple[float, ...]]


class Settings(NamedTuple):
    """What all lessons share."""

    prior: ps.PatchPrior
    seed: int
    limit: float


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    """The lessons of all groups at all noise levels."""
    settings = Settings(ps.load_prior(options.prior), options.seed, options.seconds)
    lessons = sets if options.sets else single
    for group in options.groups:
        for sigma in options.sigmas or ((25.0,) if options.sets else (15.0, 25.0, 50.0)):
            yield from jobs_of(list(lessons(group, sigma))[: options.images], settings)


def jobs_of(lessons: Sequence[Lesson], settings: Settings) -> Iterator[Job]:
    """These lessons."""
    version = version_of(settings.prior)
    for lesson in lessons:
        content = digest(*(image.pixels for image in (*lesson.shown, *lesson.tests)))
        end = RATE, settings.limit, settings.seed, version, content
        kinds = ("noisy", "clean") if lesson.also_clean else ("itself",)
        keys = [
            (lesson.group, image.name, lesson.sigma, kind, len(lesson.shown), *end)
            for image in lesson.tests
            for kind in kinds
        ]
        yield Job(partial(measure, lesson, keys, settings), keys)


def measure(lesson: Lesson, keys: Sequence[Values], settings: Settings) -> list[Row]:
    """Learn, and denoise the tests with what was given and with what was learned."""
    here = machine()
    where = f"{here.processor}, {here.torch_threads} threads"
    adapted, report = adapt(
        settings.prior,
        [_noisy(image, lesson.sigma, settings.seed) for image in lesson.shown],
        lesson.sigma,
        generator=torch.Generator().manual_seed(settings.seed),
        max_seconds=settings.limit,
        learning_rate=RATE,
        progress=False,
    )
    learned = [from_noisy(adapted, report)]
    if lesson.also_clean:
        learned.append(from_clean(lesson, report, settings))
    rows: list[Row] = []
    for image in lesson.tests:
        y = _noisy(image, lesson.sigma, settings.seed)
        before = _quality(image, ps.denoise(y, lesson.sigma, prior=settings.prior))
        rival = _quality(image, bm3d(y, lesson.sigma)) if lesson.with_rival else math.nan
        for prior, columns in learned:
            after = _quality(image, ps.denoise(y, lesson.sigma, prior=prior))
            rows.append(Row._make((*keys[len(rows)], before, after, rival, *columns, where)))
    return rows


def from_noisy(prior: ps.PatchPrior, report: Report) -> Learned:
    """What :func:`~patchscore.adaptation.adapt.adapt` has made and reported."""
    variances = [float(residual.variance) for residual in report.residuals]
    correlations = [float(value) for residual in report.residuals for value in residual.correlation]
    variance = max(variances, key=lambda variance: abs(variance - 1))
    correlation: float = max(correlations, key=abs)
    gain = int(report.adapted), round(report.gain, 5), round(report.error, 5)
    residual = round(variance, 4), round(correlation, 4)
    return prior, (*gain, *residual, report.steps, round(report.seconds, 1))


def from_clean(lesson: Lesson, report: Report, settings: Settings) -> Learned:
    """Denoising score matching on the clean images, in as many steps as the search went on for."""
    steps = report.checks[-1].step if report.checks else CLEAN_STEPS
    start = time.perf_counter()
    prior = copy.deepcopy(settings.prior).requires_grad_()
    clean = [image.pixels for image in lesson.shown]
    ps.fit(
        prior,
        clean,
        sigmas=(lesson.sigma, lesson.sigma),
        crop=min(CROP, *(side for pixels in clean for side in pixels.shape)),
        boundary="symmetric",
        steps=steps,
        batch_size=1,
        learning_rate=RATE,
        warmup=WARMUP,
        average=AVERAGE,
        optimizer="soap",
        generator=torch.Generator().manual_seed(settings.seed),
        progress=False,
    )
    seconds = round(time.perf_counter() - start, 1)
    unknown = (math.nan,) * 4
    return prior.requires_grad_(False), (1, *unknown, steps, seconds)


def summary(rows: Sequence[Row], options: argparse.Namespace) -> str:
    """The mean gain, the worst image and the share adapted, by group and noise level."""
    by = ["group", "sigma", *(["images", "learned_from"] if options.sets else [])]
    lines = [
        [*by, "rows", "before", "gain", "worst", "adapted", "gain if adapted", "estimated", "BM3D gain"]
    ]
    for names, found in frame_of(rows).groupby(by, sort=False):
        gains = found.after - found.before
        adapted = found.adapted.astype(bool)
        shares = found.gain[adapted & (found.gain < 1)]
        against = found.bm3d - found.before
        lines.append(
            [
                *map(str, names),
                str(len(found)),
                f"{found.before.mean():.2f}",
                f"{gains.mean():+.2f}",
                f"{gains.min():+.2f}",
                f"{adapted.sum()} of {len(found)}",
                f"{gains[adapted].mean():+.2f}" if adapted.any() else "",
                f"{(-10 * np.log10(1 - shares)).mean():+.2f}" if len(shares) else "",
                f"{against.mean():+.2f}" if against.notna().all() else "",
            ]
        )
    return markdown(lines)


def _noisy(image: NamedImage, sigma: float, seed: int) -> np.ndarray:
    """With noise that belongs to the image, whichever table it is in."""
    return add_noise(image.pixels, sigma, seed=seed, number=zlib.crc32(image.name.encode()))


def _quality(image: NamedImage, estimate: np.ndarray) -> float:
    return round(psnr(image.pixels, estimate, data_range=DATA_RANGE), 4)


STUDY = Study(
    "adaptation",
    __doc__,
    Row,
    key=("group", "image", "sigma", "learned_from", "images", "rate", "limit"),
    depends=("seed", "version", "input"),
    jobs=jobs,
    summary=summary,
    options=(
        Option("sets", False, "noisy images of a kind, beside clean ones"),
        PRIOR,
        Option("groups", GROUPS, "kinds of images", quick=("textures", "documents"), choices=GROUPS),
        Option(
            "sigmas",
            (),
            "noise levels, of 255; without it 15 25 50, and 25 with --sets",
            (25.0,),
            kind=float,
        ),
        Option("seconds", 60.0, "the most, of one adaptation", quick=5.0),
        Option("images", None, "of every kind, at most", quick=1, kind=int),
        SEED,
    ),
    variant="sets",
)
