"""What surprises a bundled prior, and is that calibrated?

The expectation is learned from the 360 images of ``bsd400`` that the priors learned from, at noise
levels from 4/255 to 60/255. It is measured on the 40 held out, on which the statistic was chosen, beside
training slices of the medical sets and textures; and on sets that no choice was made on:

    exceed    images above the 95 % mark; of photographs 5 %, within binomial error (its 90 % interval)
    auc       P(an image of the set surprises more than a photograph of bsd68), at the same noise level

Images of 8 bits are taken as they are; medical images are stretched to 0..255, each by itself, so that a
noise level means about the same. ``--store`` writes the expectation into the file of the prior.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import binom, mannwhitneyu

import patchscore as ps
from benchmarks.data import DATA_RANGE, add_noise, gray_images
from benchmarks.methods import version_of
from benchmarks.study import SEED, SIGMAS, Job, Option, Study
from benchmarks.tables import frame_of, markdown
from benchmarks.train import split
from patchscore.adaptation.surprise import KEY, Expectation, expect, surprise
from patchscore.priors.zoo import SUFFIX, WEIGHTS, bundled_priors

LEVELS = 4 / 255, 60 / 255
PHOTOGRAPHS = "bsd400 held out", "bsd68"
SHIFTED = "ct_chest/test", "mri_brain/test", "mri_t1_native", "oct_retina", "em_isbi2012", "documents"


class Row(NamedTuple):
    """One prior on one set at one noise level; ``auc`` is nan for photographs."""

    prior: str
    set: str
    sigma: float
    images: int
    exceed: int
    expected_90: str
    median: float
    auc: float | None
    seed: int = 0
    version: str = ""


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    """Every prior, on all sets."""
    for name in options.priors:
        prior = ps.load_prior(name, device="cpu")
        code = version_of(prior)
        if options.store:
            store(prior, _learned(prior, options.seed), name)
        keys = [
            (name, set_name, sigma, options.seed, code)
            for set_name in (*PHOTOGRAPHS, *options.sets)
            for sigma in options.sigmas
        ]
        yield Job(partial(measure, prior, keys, options.images), keys)


def store(prior: ps.PatchPrior, expectation: Expectation, name: str) -> None:
    """Write the prior again, with what it expects in its card."""
    prior.card[KEY] = expectation.card()
    prior.save(str(WEIGHTS / f"{name}{SUFFIX}") if name in bundled_priors() else name)


def measure(
    prior: ps.PatchPrior, keys: Sequence[tuple[str, str, float, int, str]], most: int
) -> list[Row]:
    """The rows of one prior; of every set ``most`` images, or all for None."""
    expectation = _learned(prior, keys[0][3])
    rows = []
    values = {}
    for name, set_name, sigma, seed, code in keys:
        found = np.array(
            [
                surprise(
                    prior,
                    add_noise(clean, sigma, seed=seed, number=number),
                    sigma,
                    expectation=expectation,
                ).value
                for number, clean in enumerate(load(set_name)[:most])
            ]
        )
        values[set_name, sigma] = found
        low, high = binom.interval(0.9, len(found), 0.05)
        usual = set_name in PHOTOGRAPHS
        exceed, median = int((found > 1).sum()), round(float(np.median(found)), 3)
        expected = f"{low:.0f} to {high:.0f}" if usual else ""
        area = None if usual else round(auc(found, values[PHOTOGRAPHS[1], sigma]), 3)
        start = name, set_name, sigma, len(found)
        rows.append(Row(*start, exceed, expected, median, area, seed, code))
    return rows


def auc(shifted: np.ndarray, usual: np.ndarray) -> float:
    """The area under the ROC curve, P(shifted > usual)."""
    return float(mannwhitneyu(shifted, usual).statistic / (len(shifted) * len(usual)))


def load(set_name: str) -> list[np.ndarray]:
    """The images of a set, in 0..255."""
    if set_name == PHOTOGRAPHS[0]:
        return [DATA_RANGE * image for image in split()[1]]
    found = [pixels for _, pixels in gray_images(set_name)]
    if not set_name.startswith(("ct", "mri")):
        return found
    return [DATA_RANGE * (pixels - pixels.min()) / np.ptp(pixels) for pixels in found]


def summary(rows: Sequence[Row], options: argparse.Namespace) -> str:
    """A line for every prior, set and noise level."""
    frame = frame_of(rows)[["prior", "set", "sigma", "images", "exceed", "expected_90", "median", "auc"]]
    return markdown(frame.astype(object).where(frame.notna(), ""))


def _learned(prior: ps.PatchPrior, seed: int) -> Expectation:
    generator = torch.Generator().manual_seed(seed)
    return expect(prior, split()[0], sigmas=LEVELS, generator=generator)


STUDY = Study(
    "surprise",
    __doc__,
    Row,
    key=("prior", "set", "sigma"),
    depends=("seed", "version"),
    jobs=jobs,
    summary=summary,
    options=(
        Option(
            "priors", ("natural-gray", "natural-gray-fast"), "to measure", quick=("natural-gray-fast",)
        ),
        Option("sets", SHIFTED, "other images than photographs", quick=("documents",)),
        SIGMAS,
        Option("images", None, "of every set, at most", quick=4, kind=int),
        SEED,
        Option("store", False, "write what is expected into the priors"),
    ),
)
