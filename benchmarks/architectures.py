"""Cliques side by side after equal training time: python -m benchmarks.architectures.

Every candidate learns from the images that :mod:`benchmarks.natural_gray` trains on, for the same
minutes, and is measured on the images held out there (not on BSD68 or Set12). A candidate is on the
Pareto front if none with at most its arithmetic reaches a higher PSNR at sigma 25. A run that was
stopped goes on with the candidates that are missing in the table.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import patchscore as ps
from benchmarks.data import prepare_table, read_table, write_table
from benchmarks.natural_gray import held_out_psnr, split, weighted_score_matching
from patchscore.priors.energy import ConvEnergy

TIMED_SIDE = 512


class Candidate(NamedTuple):
    """A network, and how it is trained; what is not said is as for ``natural-gray``."""

    build: Callable[[], ConvEnergy]
    optimizer: Literal["adam", "soap"] = "soap"
    learning_rate: float = 8e-3


class Row(NamedTuple):
    """One candidate: its size, its training, and what it reaches on the images held out."""

    candidate: str
    clique: str
    sides: str
    dilations: str
    reach: int
    width: int
    depth: int
    tied: int
    activation: str
    parameters: int
    macs_per_pixel: int
    optimizer: str
    learning_rate: float
    minutes: float
    steps: int
    psnr_15: float
    psnr_25: float
    psnr_50: float
    microseconds_per_pixel: float
    pareto: str


def conv(sides: str, dilations: str, width: int) -> Candidate:
    """A convolutional potential, with sides and dilations as digits."""
    digits = [int(k) for k in sides], [int(d) for d in dilations]
    return Candidate(partial(ConvEnergy, *digits, width=width))


def plain(patch_size: int, width: int, depth: int = 2) -> Candidate:
    """A potential of all pixels of a patch."""
    return Candidate(partial(ps.PatchEnergy, patch_size, 1, width, depth))


CANDIDATES = {
    "patch 11, Adam": plain(11, 256)._replace(optimizer="adam", learning_rate=2e-3),
    "patch 7, 64": plain(7, 64),
    "patch 7, 128": plain(7, 128),
    "patch 11, 256": plain(11, 256),
    "patch 11, 256, deep": plain(11, 256, 3),
    "patch 15, 256": plain(15, 256),
    "conv 2 layers, 32": conv("53", "12", 32),
    "conv 3 layers, 32": conv("533", "123", 32),
    "conv 3 layers, 64": conv("733", "123", 64),
    "conv 3 layers, 64, wide": conv("933", "135", 64),
    "conv 4 layers, 32": conv("5333", "1123", 32),
    "conv 4 layers, 64": conv("7333", "1233", 64),
    "conv 5 layers, 48": conv("73333", "11232", 48),
    "conv 5 layers, 64": conv("73333", "11232", 64),
}


def measure(name: str, candidate: Candidate, minutes: float) -> Row:
    """Train one candidate and measure it on the images held out."""
    train, _ = split()
    torch.manual_seed(0)
    network = candidate.build()
    prior = ps.PatchPrior(network)
    history = ps.fit(
        prior,
        train,
        sigmas=(1 / 255, 60 / 255),
        crop=80,
        boundary="symmetric",
        minutes=minutes,
        batch_size=4,
        learning_rate=candidate.learning_rate,
        warmup=100,
        objective=weighted_score_matching,
        optimizer=candidate.optimizer,
        mixed_precision=True,
        progress=False,
    )
    low, middle, high = held_out_psnr(prior)
    sides, dilations = network.sides, network.dilations
    return Row(
        name,
        type(network).__name__,
        " ".join(map(str, sides)),
        " ".join(map(str, dilations)),
        network.patch_shape[0],
        network.width,
        len(sides),
        8,
        "gelu",
        sum(p.numel() for p in network.parameters()),
        macs_per_pixel(network),
        candidate.optimizer,
        candidate.learning_rate,
        minutes,
        len(history.loss),
        round(low, 3),
        round(middle, 3),
        round(high, 3),
        round(microseconds_per_pixel(prior), 3),
        "",
    )


def macs_per_pixel(network: ConvEnergy) -> int:
    """Products per pixel of the score: every weight once forward and once back."""
    return 2 * sum(kernel.numel() for kernel in network.kernels())


def microseconds_per_pixel(prior: ps.PatchPrior) -> float:
    """The best of three one-step estimates in float32 of an image of 512 x 512."""
    image = np.random.default_rng(0).random((TIMED_SIDE, TIMED_SIDE))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        ps.denoise(image, 0.1, prior=prior)
        times.append(time.perf_counter() - start)
    return 1e6 * min(times) / TIMED_SIDE**2


def with_front(rows: list[Row]) -> list[Row]:
    """The rows in the order of their arithmetic, those on the Pareto front marked."""
    rows = sorted(rows, key=lambda row: (row.macs_per_pixel, -row.psnr_25))
    best = -np.inf
    marked = []
    for row in rows:
        marked.append(row._replace(pareto="front" if row.psnr_25 > best else ""))
        best = max(best, row.psnr_25)
    return marked


def main() -> None:
    """Train and measure the candidates that are missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=3.0, help="each (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=CANDIDATES, metavar="NAME", default=CANDIDATES)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/architectures.csv"))
    options = parser.parse_args()
    prepare_table(options.out)
    rows = {(row.candidate, row.minutes): row for row in read_table(options.out, Row)}
    for name in tqdm(options.only):
        key = name, options.minutes
        if key not in rows:
            rows[key] = measure(name, CANDIDATES[name], options.minutes)
            write_table(options.out, Row._fields, with_front(list(rows.values())))
    for row in with_front(list(rows.values())):
        quality = " ".join(f"{value:.2f}" for value in (row.psnr_15, row.psnr_25, row.psnr_50))
        print(f"{row.candidate:24} {row.macs_per_pixel:>8} {quality} {row.steps:>6} {row.pareto}")


if __name__ == "__main__":
    main()
