"""What do residuals tell of the noise?

    y = x + n           x: images of no other table;  n: white or not, sigma right or wrong

The guard of adaptation (:mod:`patchscore.adaptation.residual`) compares the residual of a noisy image
with what white noise of the given level would leave, and refuses outside of some bounds. This table says
where they have to be: on photographs held out of the training of the bundled priors, two that come with
scikit-image and the upper halves of two textures, documents and medical slices that serve for training
elsewhere, and synthetic patterns, all cut to their middle. White noise of the right level has to be let
through; other noise has to be refused, or to do no harm: every third image is adapted to as well.

Of every kind of noise there are the range of each statistic, the share of images that are refused, the
change of PSNR from worst to best, and how many lose more than 0.05 dB. It takes three quarters of an
hour on one core.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from typing import NamedTuple

import numpy as np
import torch

import patchscore as ps
from benchmarks.adaptation_jobs import ALL, SHOWN_DOCUMENTS, load
from benchmarks.data import HELD_OUT_EVERY, NamedImage, bundled, middle, spaced
from benchmarks.machine import FOREVER
from benchmarks.methods import version_of
from benchmarks.robustness.claims import HARMLESS
from benchmarks.robustness.shifts import NOISE, shifted
from benchmarks.study import PRIOR, SEED, SIGMAS, Job, Option, Study
from benchmarks.tables import frame_of, markdown
from patchscore.adaptation.residual import suspicions
from patchscore.evaluation.metrics import psnr

SIDE = 128
RIGHT = "white"
LEVELS = tuple(f"sigma x {factor:g}" for factor in (0.8, 0.9, 1.1, 1.2))
NOISES = (RIGHT, *LEVELS, *NOISE)
STATISTICS = "variance", "witness", "bright_over_dark", "correlation", "clipped"
ADAPTED_EVERY, STEPS = 3, 30


class Row(NamedTuple):
    """The residual of one noisy image, and what became of it.

    Attributes
    ----------
    correlation : the further one from 0 of two
    refused : 1 if the guard saw in the residual that the noise is not what was said
    change : of the PSNR by adaptation, in dB; nan for images that were only looked at
    """

    group: str
    image: str
    noise: str
    sigma: float
    seed: int
    version: str
    variance: float
    witness: float
    bright_over_dark: float
    correlation: float
    clipped: float
    refused: int
    change: float


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    """All images under all kinds of noise."""
    prior = ps.load_prior(options.prior)
    yield from jobs_of(prior, list(images())[: options.images], options.sigmas, options.seed)


def jobs_of(
    prior: ps.PatchPrior,
    named: Sequence[tuple[str, NamedImage]],
    sigmas: Sequence[float],
    seed: int = 0,
) -> Iterator[Job]:
    """These images, with the names of their groups, under all kinds of noise."""
    code = version_of(prior)
    for number, (group, image) in enumerate(named):
        for noise, sigma in product(NOISES, sigmas):
            key = group, image.name, noise, sigma, seed, code
            yield Job(partial(measure, prior, image.pixels, number, key), [key])


def images() -> Iterator[tuple[str, NamedImage]]:
    """The images with the names of their groups."""
    groups = {
        "photographs": [*spaced(load("bsd400", ALL)[::HELD_OUT_EVERY], 19), *bundled("camera", "coins")],
        "documents": load("documents", ALL)[:SHOWN_DOCUMENTS],
        "textures": [NamedImage(n, x[: len(x) // 2]) for n, x in bundled("grass", "gravel")],
        "MRI": load("mri_brain/train", 8),
        "CT": load("ct_chest/train", 8),
        "patterns": list(patterns()),
    }
    for group, members in groups.items():
        yield from ((group, NamedImage(name, middle(pixels, SIDE))) for name, pixels in members)


def patterns() -> Iterator[NamedImage]:
    """Stripes, checks and a weave of stripes, in 40..200, of no whole number of pixels."""
    row, column = np.mgrid[:SIDE, :SIDE]
    across, along = (np.sin(2 * np.pi * axis / 5.3) for axis in (row + 0.4 * column, column - 0.4 * row))
    checks = (row // 7 + column // 7) % 2
    weave = np.where((row // 12 + column // 12) % 2, across, along)
    yield NamedImage("stripes", 120 + 80 * across)
    yield NamedImage("checks", 40 + 160.0 * checks)
    yield NamedImage("weave", 120 + 80 * weave)


def measure(
    prior: ps.PatchPrior, clean: np.ndarray, number: int, key: tuple[str, str, str, float, int, str]
) -> list[Row]:
    """One image with one kind of noise: what :func:`patchscore.adapt` reports."""
    _, _, noise, sigma, seed, _ = key
    is_adapted_to = number % ADAPTED_EVERY == 0  # others have no time for a step
    problem = shifted(noise, clean, sigma, data_range=255, seed=seed, number=number)
    adapted, report = ps.adapt(
        prior,
        problem.noisy,
        problem.told,
        generator=torch.Generator().manual_seed(seed),
        max_seconds=FOREVER if is_adapted_to else 1e-9,
        max_steps=STEPS,
        progress=False,
    )
    change = math.nan
    if is_adapted_to:
        before, after = (
            psnr(clean, ps.denoise(problem.noisy, problem.told, prior=p), data_range=255)
            for p in (prior, adapted)
        )
        change = round(after - before, 4)
    (found,) = report.residuals
    correlation: float = max(found.correlation, key=abs)
    statistics = found.variance, found.witness, found.bright_over_dark, correlation, found.clipped
    refused = int(suspicions(report.residuals)[1] is not None)
    return [Row._make((*key, *(round(value, 4) for value in statistics), refused, change))]


def summary(rows: Sequence[Row], options: argparse.Namespace | None = None) -> str:
    """A line for every kind of noise."""
    lines = [["noise", "images", *STATISTICS, "change", "lose", "refused"]]
    by_noise = frame_of(rows).groupby("noise")
    for noise in (noise for noise in NOISES if noise in by_noise.groups):
        found = by_noise.get_group(noise)
        ranges = [f"{found[n].min():.2f} to {found[n].max():.2f}" for n in (*STATISTICS, "change")]
        changes = found.change.dropna()
        lose = f"{(changes < -HARMLESS).sum()} of {len(changes)}"
        lines.append([noise, str(len(found)), *ranges, lose, f"{found.refused.mean():.0%}"])
    return markdown(lines)


STUDY = Study(
    "residuals",
    __doc__,
    Row,
    key=("group", "image", "noise", "sigma"),
    depends=("seed", "version"),
    jobs=jobs,
    summary=summary,
    options=(PRIOR, SIGMAS, Option("images", None, "at most", quick=1, kind=int), SEED),
)
