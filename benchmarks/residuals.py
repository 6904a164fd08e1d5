"""What do residuals tell of the noise?  python -m benchmarks.residuals

    y = x + n           x: images of no other table;  n: white or not, sigma told or mistold

The guard of adaptation (:mod:`patchscore.adaptation.residual`) compares the residual of a noisy image
with what white noise of the level told would leave, and refuses outside of some bounds. They stand where
this table says: photographs held out of the training of the bundled priors, two that come with scikit-
image and the upper halves of two textures, documents and medical slices that serve for training
elsewhere, and synthetic patterns, all cut to their middle. White noise of the right level is to be let
through, other noise refused, or else to do no harm: every third image is adapted to as well. Of every
kind of noise there are the range of each statistic, the share of images that are refused, the change of
PSNR from worst to best, and how many lose more than 0.05 dB. It takes three quarters of an hour on one
core; a run that was stopped goes on after its last image. After a change of code, delete the table.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import patchscore as ps
from benchmarks.adaptation_jobs import ALL, SHOWN_DOCUMENTS, bundled, load
from benchmarks.data import NamedImage, prepare_table, read_table, write_table
from benchmarks.quality import prior_digest
from benchmarks.robustness.command import markdown
from benchmarks.robustness.sets import HELD_OUT_EVERY, middle, spaced
from benchmarks.robustness.shifts import NOISE, shifted
from benchmarks.robustness.summary import HARMLESS
from patchscore.adaptation.residual import suspicions
from patchscore.evaluation.metrics import psnr

SIDE = 128
SIGMAS = 15.0, 25.0, 50.0
RIGHT = "white"
LEVELS = tuple(f"sigma x {factor:g}" for factor in (0.8, 0.9, 1.1, 1.2))
NOISES = (RIGHT, *LEVELS, *NOISE)
STATISTICS = "variance", "witness", "bright_over_dark", "correlation", "clipped"
SEED = 0
ADAPTED_EVERY, STEPS = 3, 30


class Row(NamedTuple):
    """The residual of one noisy image, and what became of it.

    Attributes
    ----------
    correlation : the further one from 0 of two
    refused : 1 if the guard saw in the residual that the noise is not what was told
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


KEY = Row._fields.index("variance")


def main() -> None:
    """Measure the residuals, and print the ranges of every kind of noise."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.residuals",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--prior", default="natural-gray", metavar="NAME|FILE")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/residuals.csv"))
    options = parser.parse_args()

    prepare_table(options.out)
    print(summary(measure(ps.load_prior(options.prior), list(images()), SIGMAS, options.out)))


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
    prior: ps.PatchPrior, named: Sequence[tuple[str, NamedImage]], sigmas: Sequence[float], out: Path
) -> list[Row]:
    """The rows of all images under all kinds of noise: what :func:`patchscore.adapt` reports.

    Those that the table ``out`` holds are taken from it, others are written to it, image by image.
    """
    version = f"patchscore {ps.__version__} prior {prior_digest(prior)}"
    table = {row[:KEY]: row for row in read_table(out, Row)}
    rows: list[Row] = []
    for number, (group, image) in enumerate(tqdm(named, unit="image")):
        is_adapted_to = number % ADAPTED_EVERY == 0  # others have no time for a step
        for noise, sigma in product(NOISES, sigmas):
            key = group, image.name, noise, sigma, SEED, version
            if key in table:
                rows.append(table[key])
                continue
            problem = shifted(noise, image.pixels, sigma, data_range=255, seed=SEED, number=number)
            adapted, report = ps.adapt(
                prior,
                problem.noisy,
                problem.told,
                generator=torch.Generator().manual_seed(SEED),
                max_seconds=math.inf if is_adapted_to else 1e-9,
                max_steps=STEPS,
                progress=False,
            )
            change = math.nan
            if is_adapted_to:
                before, after = (
                    psnr(image.pixels, ps.denoise(problem.noisy, problem.told, prior=p), data_range=255)
                    for p in (prior, adapted)
                )
                change = round(after - before, 4)
            (found,) = report.residuals
            correlation: float = max(found.correlation, key=abs)
            table[key] = Row(
                *key,
                round(found.variance, 4),
                round(found.witness, 4),
                round(found.bright_over_dark, 4),
                round(correlation, 4),
                round(found.clipped, 4),
                int(suspicions(report.residuals)[1] is not None),
                change,
            )
            rows.append(table[key])
        write_table(out, Row._fields, list(table.values()))
    return rows


def summary(rows: Sequence[Row]) -> str:
    """A table in markdown, with a line for every kind of noise."""
    columns = *STATISTICS, "change"
    lines = [["noise", "images", *columns, "lose", "refused"]]
    for noise in NOISES:
        ours = [row for row in rows if row.noise == noise]
        line = [noise, str(len(ours))]
        for name in columns:
            values = np.array([getattr(row, name) for row in ours])
            line.append(f"{np.nanmin(values):.2f} to {np.nanmax(values):.2f}")
        changes = [row.change for row in ours if not math.isnan(row.change)]
        line.append(f"{sum(change < -HARMLESS for change in changes)} of {len(changes)}")
        lines.append([*line, f"{np.mean([row.refused for row in ours]):.0%}"])
    return markdown(lines)


if __name__ == "__main__":
    main()
