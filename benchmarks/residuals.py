"""What do residuals tell of the noise?  python -m benchmarks.residuals

    y = x + n           x: images of no other table;  n: white or not, sigma told or mistold

The guard of adaptation (:mod:`patchscore.learning.residual`) compares the residual of a noisy image with
what white noise of the level told would leave, and refuses outside of some bounds. They stand where this
table says: photographs held out of the training of the bundled priors, two that come with scikit-image
and the upper halves of two textures, two documents, training slices of the medical sets, and synthetic
patterns, all cut to their middle. White noise of the right level is to be let through, all other noise
refused. Of every kind of noise there is the range of each statistic and the share of images that are
refused.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import patchscore as ps
from benchmarks.adaptation_jobs import ALL, MOVING_DOCUMENTS, bundled, load
from benchmarks.data import NamedImage, prepare_table, write_table
from benchmarks.quality import prior_digest
from benchmarks.robustness.sets import HELD_OUT_EVERY, middle, spaced
from benchmarks.robustness.shifts import NOISE, shifted

SIDE = 128
SIGMAS = 15.0, 25.0, 50.0
RIGHT = "white"
LEVELS = tuple(f"sigma x {factor:g}" for factor in (0.8, 0.9, 1.1, 1.2))
NOISES = (RIGHT, *LEVELS, *NOISE)
STATISTICS = "variance", "witness", "bright_over_dark", "correlation", "clipped"
SEED = 0


class Row(NamedTuple):
    """The residual of one noisy image; the correlation is the further one from 0 of two."""

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
    rows = measure(ps.load_prior(options.prior), list(images()), SIGMAS)
    write_table(options.out, Row._fields, rows)
    print(summary(rows))


def images() -> Iterator[tuple[str, NamedImage]]:
    """The images with the names of their groups."""
    groups = {
        "photographs": [*spaced(load("bsd400", ALL)[::HELD_OUT_EVERY], 20), *bundled("camera", "coins")],
        "documents": load("documents", ALL)[:MOVING_DOCUMENTS],
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
    prior: ps.PatchPrior, named: Sequence[tuple[str, NamedImage]], sigmas: Sequence[float]
) -> list[Row]:
    """The rows of all images under all kinds of noise: what :func:`patchscore.adapt` reports."""
    version = f"patchscore {ps.__version__} prior {prior_digest(prior)}"
    rows = []
    for number, (group, image) in enumerate(tqdm(named, unit="image")):
        for noise, sigma in product(NOISES, sigmas):
            problem = shifted(noise, image.pixels, sigma, data_range=255, seed=SEED, number=number)
            generator = torch.Generator().manual_seed(SEED)
            report = ps.adapt(
                prior, problem.noisy, problem.told, generator=generator, max_steps=1, progress=False
            ).report
            (found,) = report.residuals
            rows.append(
                Row(
                    group,
                    image.name,
                    noise,
                    sigma,
                    SEED,
                    version,
                    round(found.variance, 4),
                    round(found.witness, 4),
                    round(found.bright_over_dark, 4),
                    round(max(found.correlation, key=abs), 4),
                    round(found.clipped, 4),
                    int(not report.checks),
                )
            )
    return rows


def summary(rows: Sequence[Row]) -> str:
    """A table in markdown: the range of every statistic, and the share refused."""
    lines = [("noise", "images", *STATISTICS, "refused"), ("---",) * (len(STATISTICS) + 3)]
    for noise in NOISES:
        ours = [row for row in rows if row.noise == noise]
        ranges = [
            f"{min(values):.2f} to {max(values):.2f}"
            for name in STATISTICS
            for values in [[float(getattr(row, name)) for row in ours]]
        ]
        lines.append((noise, str(len(ours)), *ranges, f"{np.mean([row.refused for row in ours]):.0%}"))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
