"""Learning from noisy images alone, beside learning from clean ones.

Priors of one size are trained from one seed, with the same steps on the same crops, at one noise level:

    clean          denoising score matching
    noisy          Stein's unbiased risk (SURE), Noise2Score

The noisy training images are made once and are all that the last two see. All are then scored one-step
on a test set with noise of that level.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch

import patchscore as ps
from benchmarks.data import add_noise, gray_images, psnrs
from benchmarks.study import SEED, Job, Option, Study
from benchmarks.tables import frame_of, markdown
from patchscore.learning.matching import denoising_score_matching, noise2score, sure

# Numbers of training images start far from those of test images, so that no noise is shared.
FIRST_TRAINING_NUMBER = 1_000_000
OBJECTIVES = {
    "denoising score matching, clean images": denoising_score_matching,
    "SURE, noisy images": sure,
    "Noise2Score, noisy images": noise2score,
}


class Row(NamedTuple):
    """One objective: the mean PSNR that its prior reaches, and the seconds of its training."""

    train: str
    test: str
    sigma: float
    objective: str
    psnr: float
    steps: int
    seconds: float
    seed: int = 0
    version: str = ""


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    """One training with every objective."""
    version = f"patchscore {ps.__version__}"
    for name in OBJECTIVES:
        start = Row(
            options.train, options.test, options.sigma, name, 0, options.steps, 0, options.seed, version
        )
        yield Job(partial(measure, start), [(*start[:4], options.steps, options.seed, version)])


def measure(start: Row) -> list[Row]:
    """Train on one set and measure on another."""
    images = [image.pixels for image in gray_images(start.train)]
    objective = OBJECTIVES[start.objective]
    if objective is not denoising_score_matching:
        images = [
            add_noise(image, start.sigma, seed=start.seed, number=FIRST_TRAINING_NUMBER + number)
            for number, image in enumerate(images)
        ]
    torch.manual_seed(start.seed)
    prior = ps.PatchPrior(ps.PatchEnergy(patch_size=9, width=128))
    history = ps.fit(
        prior,
        images,
        sigmas=(start.sigma, start.sigma),
        steps=start.steps,
        objective=objective,
        generator=torch.Generator().manual_seed(start.seed),
    )
    test = [image.pixels for image in gray_images(start.test)]
    found = psnrs(test, partial(ps.denoise, prior=prior), start.sigma, seed=start.seed)
    return [start._replace(psnr=float(found.mean()), seconds=history.seconds)]


def summary(rows: Sequence[Row], options: argparse.Namespace) -> str:
    """A line for every objective."""
    frame = frame_of(rows)
    table = frame[["objective", "test", "sigma"]].copy()
    table["PSNR"] = frame.psnr.map("{:.2f} dB".format)
    table["steps"] = frame.steps
    table["seconds"] = frame.seconds.map("{:.0f}".format)
    return f"{markdown(table)}\n\nOne-step estimates; the seconds are those of training."


STUDY = Study(
    "objectives",
    __doc__,
    Row,
    key=("train", "test", "sigma", "objective", "steps"),
    depends=("seed", "version"),
    jobs=jobs,
    summary=summary,
    options=(
        Option("train", "bsd400", "set to train on", quick="set12"),
        Option("test", "bsd68", "set to measure on", quick="set12"),
        Option("sigma", 25.0, "noise level, of 255"),
        Option("steps", 1500, "of training", quick=30),
        SEED,
    ),
)
