"""How large should a patch be? From 3 x 3 pixels to the whole image, learned in equal time.

    steps = seconds / (seconds per step)      of one core, not of a clock
    over 9 = mean over images of (PSNR of a size - PSNR of 9 x 9 patches)

The networks are those of :mod:`benchmarks.patch_size_networks`. The seconds of a step are measured once
for every network, in time of the processor: other programs do not change what is learned. A run that
goes on where another was stopped takes them from the table of costs.

All learn from crops of 32 x 32 pixels and denoise images of that size; of a photograph, nine such tiles,
each as an image by itself. The learning rate is the best of three after a third of the time, on held-out
images of the training set, once for every network and kind of image. Other held-out images are measured
on; bsd68 and set12 are not touched, as sizes are compared to choose one.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import patchscore as ps
from benchmarks import data as sets
from benchmarks.data import add_noise, gray_images
from benchmarks.patch_size_networks import (
    NINE,
    SIDE,
    UNETS,
    Candidate,
    Cost,
    Prior,
    candidates,
    cost,
    denoised,
    trained,
)
from benchmarks.robustness.training import NETWORK_RANGE
from benchmarks.study import Job, Option, Study
from benchmarks.tables import frame_of, markdown, read_table, write_table
from patchscore.errors import InputError
from patchscore.evaluation.metrics import psnr, ssim

TILED_SIDE = 3 * SIDE
RATES = 3e-3, 1e-2, 3e-2
UNET_RATES = 1e-3, 3e-3, 1e-2
SHARE_OF_A_TRIAL = 1 / 3


class Domain(NamedTuple):
    """A kind of image: what is learned from, what else is measured on, and how.

    Attributes
    ----------
    counts : numbers of training images; the learning rate is tuned with the second
    sigmas : noise levels, in the unit of the images
    measured : images of every test set, at most
    """

    train_set: str
    shifted: tuple[str, ...]
    counts: tuple[int, ...]
    sigmas: tuple[float, ...]
    measured: int


DOMAINS = {
    "phantoms": Domain("disks", ("rectangles",), (10, 100, 400), (0.5, 1.0), 64),
    "photographs": Domain(
        "bsd400", ("documents", "ct_chest/train", "mri_brain/train"), (10, 100, 360), (25.0, 50.0), 24
    ),
}


class Lesson(NamedTuple):
    """A candidate and what it learns from; the seed chooses images, weights, crops and noise."""

    domain: str
    candidate: Candidate
    images: int
    seed: int
    seconds: float


class Row(NamedTuple):
    """One trained network on one test set at one noise level.

    Attributes
    ----------
    images, seed, seconds, steps, rate : of the training; seconds of one core
    shifted : whether the test set is another than that of the training; 0 or 1
    measured : number of test images, over which the rest are means
    psnr, ssim : in dB, of the data range of the images (10 for phantoms), and without unit
    image_psnr : of every test image, in their order, with blanks between
    """

    domain: str
    size: str
    width: int
    images: int
    seed: int
    seconds: float
    steps: int
    rate: float
    test_set: str
    shifted: int
    sigma: float
    measured: int
    psnr: float
    ssim: float
    image_psnr: str
    version: str = ""


def lessons(domains: Sequence[str], *, seeds: int, seconds: float) -> list[Lesson]:
    """All trainings; those of the second seed on only with the fewest images, and last."""
    return [
        Lesson(domain, candidate, count, seed, seconds)
        for seed in range(seeds)
        for place in range(1 if seed else 3)
        for domain in domains
        for count in [DOMAINS[domain].counts[place]]
        for candidate in candidates()
    ]


def learning_images(domain: Domain, count: int, seed: int) -> list[np.ndarray]:
    """Some images to learn from, with a data range of 10; of one seed, fewer are among more."""
    images = sets.training_images(domain.train_set, count=domain.counts[-1], seed=seed).learn
    chosen = np.random.default_rng(seed).permutation(len(images))[:count]
    return [_scale(domain) * images[number] for number in chosen]


def choosing_images(domain: Domain) -> np.ndarray:
    """Held-out images that the learning rate is chosen on: (n, H, W)."""
    held_out = sets.training_images(domain.train_set, count=1, seed=0).choose
    return np.stack([sets.middle(image, TILED_SIDE) for image in held_out])


def measured_images(domain: Domain, test_set: str) -> np.ndarray:
    """Images to measure on: (n, H, W). Those of the training set are neither learned nor chosen on."""
    if test_set == domain.train_set and test_set not in sets.PHANTOMS:
        held_out = gray_images(test_set)[:: sets.HELD_OUT_EVERY][len(choosing_images(domain)) :]
        found = [sets.middle(image.pixels, TILED_SIDE) for image in held_out[: domain.measured]]
    else:
        images = sets.test_images(test_set, count=domain.measured, side=TILED_SIDE, seed=0)
        found = [image.pixels for image in images]
    return np.stack(found)


def quality(prior: Prior, clean: np.ndarray, sigma: float, domain: Domain) -> tuple[np.ndarray, float]:
    """The PSNR of every image, and the mean SSIM, of the one-step estimate."""
    scale, data_range = _scale(domain), sets.data_range(domain.train_set)
    noisy = np.stack([add_noise(x, sigma, seed=0, number=n) for n, x in enumerate(clean)])
    pairs = list(zip(clean, denoised(prior, scale * noisy, scale * sigma) / scale, strict=True))
    return (
        np.array([psnr(x, estimate, data_range=data_range) for x, estimate in pairs]),
        float(np.mean([ssim(x, estimate, data_range=data_range) for x, estimate in pairs])),
    )


def chosen_rate(lesson: Lesson, steps: int) -> float:
    """The learning rate of the best mean PSNR over both noise levels after a share of the steps."""
    domain = DOMAINS[lesson.domain]
    images = learning_images(domain, domain.counts[1], seed=0)
    clean = choosing_images(domain)

    def value(rate: float) -> float:
        few = max(1, round(SHARE_OF_A_TRIAL * steps))
        try:
            prior = trained(lesson.candidate, images, rate=rate, steps=few, seed=0)
        except InputError:  # the loss was no longer finite
            return -math.inf
        return float(np.mean([quality(prior, clean, sigma, domain)[0] for sigma in domain.sigmas]))

    return max(UNET_RATES if lesson.candidate.size in UNETS else RATES, key=value)


def measure(lesson: Lesson, path: Path) -> list[Row]:
    """Train and measure on all test sets; the learning rate is that in ``path``, or chosen now."""
    steps = max(1, round(lesson.seconds / cost_of(lesson.candidate, path).seconds_per_step))
    setting = lesson.domain, *lesson.candidate, lesson.seconds
    known = [r.rate for r in read_table(path, Row) if (r.domain, r.size, r.width, r.seconds) == setting]
    rate = known[0] if known else chosen_rate(lesson, steps)
    domain = DOMAINS[lesson.domain]
    images = learning_images(domain, lesson.images, lesson.seed)
    prior = trained(lesson.candidate, images, rate=rate, steps=steps, seed=lesson.seed)
    rows = []
    for test_set in (domain.train_set, *domain.shifted):
        clean = measured_images(domain, test_set)
        for sigma in domain.sigmas:
            values, similarity = quality(prior, clean, sigma, domain)
            values = values.round(3)
            rows.append(
                Row(
                    lesson.domain,
                    *lesson.candidate,
                    lesson.images,
                    lesson.seed,
                    lesson.seconds,
                    steps,
                    rate,
                    test_set,
                    int(test_set != domain.train_set),
                    sigma,
                    len(clean),
                    round(float(values.mean()), 3),
                    round(similarity, 4),
                    " ".join(f"{value:.3f}" for value in values),
                    f"patchscore {ps.__version__}",
                )
            )
    return rows


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    """All trainings; :class:`InputError` if there is no time or no seed."""
    if not 0 < options.seconds < math.inf or options.seeds < 1:
        raise InputError("--seconds and --seeds are positive numbers.")
    torch.set_num_threads(1)
    todo = lessons(options.domains, seeds=options.seeds, seconds=options.seconds)
    yield from jobs_of(todo[: options.trainings], options.out)


def jobs_of(todo: Sequence[Lesson], path: Path) -> Iterator[Job]:
    """These trainings, those of 9 x 9 patches before others of their setting; rows go to ``path``."""
    for lesson in todo:
        domain = DOMAINS[lesson.domain]
        start = lesson.domain, *lesson.candidate, lesson.images, lesson.seed, lesson.seconds
        keys = [
            (*start, test_set, sigma, f"patchscore {ps.__version__}")
            for test_set in (domain.train_set, *domain.shifted)
            for sigma in domain.sigmas
        ]
        yield Job(partial(measure, lesson, path), keys)


def cost_of(candidate: Candidate, path: Path) -> Cost:
    """What a network costs: from the table that belongs to ``path``, or measured into it."""
    costs = {found[:2]: found for found in read_table(cost_path(path), Cost)}
    if candidate not in costs:
        costs[candidate] = cost(candidate)
        write_table(cost_path(path), Cost._fields, list(costs.values()))
    return costs[candidate]


def cost_path(path: Path) -> Path:
    """The table of costs that belongs to a table of rows: ``x.csv`` -> ``x-cost.csv``."""
    return path.with_name(f"{path.stem}-cost{path.suffix}")


def image_psnr(row: Row) -> np.ndarray:
    """The PSNR of every test image."""
    return np.array(row.image_psnr.split(), dtype=float)


def over_nine(rows: Sequence[Row]) -> list[np.ndarray]:
    """Of every row the PSNR of its images less that of 9 x 9 patches on the same images."""

    def same(row: Row) -> tuple[object, ...]:
        return row.domain, row.images, row.seed, row.seconds, row.test_set, row.sigma

    nine = {same(row): image_psnr(row) for row in rows if (row.size, row.width) == NINE}
    return [image_psnr(row) - nine.get(same(row), np.nan) for row in rows]


def summary(rows: Sequence[Row], options: argparse.Namespace | None = None) -> str:
    """PSNR in distribution and shifted, and what it is over 9 x 9 patches, in dB.

    Means over test sets, noise levels and seeds.
    """
    lines = [
        ["images of", "number", "network", "width", "in distribution", "over 9", "shifted", "over 9"]
    ]
    by = ["domain", "size", "width", "images"]
    frame = frame_of(rows).assign(over_nine=[gaps.mean().round(3) for gaps in over_nine(rows)])
    for (domain, size, width, count), found in frame.groupby(by, sort=False):
        cells = [domain, str(count), size, str(width)]
        for shifted in (0, 1):
            some = found[found.shifted == shifted]
            cells += [f"{np.mean(some.psnr.array):.2f}", f"{np.mean(some.over_nine.array):+.2f}"]
        lines.append(cells)
    return markdown(lines)


def _scale(domain: Domain) -> float:
    """From the unit of the images to that of the networks."""
    return NETWORK_RANGE / sets.data_range(domain.train_set)


STUDY = Study(
    "patch-size",
    __doc__,
    Row,
    key=("domain", "size", "width", "images", "seed", "seconds", "test_set", "sigma"),
    jobs=jobs,
    summary=summary,
    options=(
        Option("domains", tuple(DOMAINS), "kinds of images", quick=("phantoms",), choices=DOMAINS),
        Option("seconds", 8.0, "of one core, of a training", quick=1.0),
        Option("seeds", 2, "with the fewest images", quick=1),
        Option("trainings", None, "only the first so many", quick=2, kind=int),
    ),
)
