"""Cliques side by side after equal training time.

Every candidate learns from the images that natural-gray is trained on, for the same minutes, and is
measured on the images held out there (not on BSD68 or Set12). A candidate is on the Pareto front if none
with at most its arithmetic reaches a higher PSNR at sigma 25.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch

import patchscore as ps
from benchmarks.study import Job, Option, Study
from benchmarks.tables import frame_of, markdown
from benchmarks.throughput import multiply_adds
from benchmarks.train import held_out_psnr, split, weighted_score_matching

TIMED_SIDE = 512


class Candidate(NamedTuple):
    """A potential, and how it is trained; a ``PatchEnergy`` has layers of one pixel after the first."""

    sides: tuple[int, ...]
    dilations: tuple[int, ...]
    width: int
    optimizer: Literal["adam", "soap"] = "soap"
    learning_rate: float = 8e-3

    @property
    def clique(self) -> str:
        """Which of the two names it has in the tables."""
        return "PatchEnergy" if set(self.sides[1:]) == {1} else "ConvEnergy"

    def build(self) -> ps.ConvEnergy:
        """The network before training."""
        return ps.ConvEnergy(self.sides, self.dilations, width=self.width)


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
    seed: int = 0
    version: str = ""


def conv(sides: str, dilations: str, width: int) -> Candidate:
    """A convolutional potential, with sides and dilations as digits."""
    return Candidate(tuple(map(int, sides)), tuple(map(int, dilations)), width)


def plain(patch_size: int, width: int, depth: int = 2) -> Candidate:
    """A potential of all pixels of a patch."""
    return Candidate((patch_size, *[1] * (depth - 1)), (1,) * depth, width)


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


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    """One training of every candidate."""
    version = f"patchscore {ps.__version__}"
    for name in options.only:
        job = partial(measure, name, options.minutes, options.seed, version)
        yield Job(job, [(name, options.minutes, options.seed, version)])


def measure(name: str, minutes: float, seed: int, version: str) -> list[Row]:
    """Train one candidate and measure it on the images held out."""
    candidate = CANDIDATES[name]
    torch.manual_seed(seed)
    network = candidate.build()
    prior = ps.PatchPrior(network)
    history = ps.fit(
        prior,
        split()[0],
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
    sides, dilations = (" ".join(map(str, d)) for d in (candidate.sides, candidate.dilations))
    shape = network.patch_shape[0], candidate.width, len(candidate.sides), 8, "gelu"
    size = sum(p.numel() for p in network.parameters()), multiply_adds(prior)
    training = candidate.optimizer, candidate.learning_rate, minutes, len(history.loss)
    found = *(round(value, 3) for value in held_out_psnr(prior)), round(microseconds_per_pixel(prior), 3)
    start = name, candidate.clique, sides, dilations
    return [Row._make((*start, *shape, *size, *training, *found, seed, version))]


def microseconds_per_pixel(prior: ps.PatchPrior) -> float:
    """The best of three one-step estimates in float32 of an image of 512 x 512."""
    image = np.random.default_rng(0).random((TIMED_SIDE, TIMED_SIDE))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        ps.denoise(image, 0.1, prior=prior)
        times.append(time.perf_counter() - start)
    return 1e6 * min(times) / TIMED_SIDE**2


def summary(rows: Sequence[Row], options: argparse.Namespace) -> str:
    """The candidates in the order of their arithmetic, those on the Pareto front marked."""
    frame = frame_of(rows).sort_values(["macs_per_pixel", "psnr_25"], ascending=[True, False])
    best = frame.psnr_25.cummax().shift(fill_value=-np.inf)
    frame["pareto"] = np.where(frame.psnr_25 > best, "front", "")
    for level in (15, 25, 50):
        frame[f"PSNR at {level}"] = frame[f"psnr_{level}"].map("{:.2f}".format)
    columns = ["candidate", "parameters", "macs_per_pixel", "PSNR at 15", "PSNR at 25", "PSNR at 50"]
    return markdown(frame[[*columns, "steps", "microseconds_per_pixel", "pareto"]])


STUDY = Study(
    "architectures",
    __doc__,
    Row,
    key=("candidate", "minutes"),
    depends=("seed", "version"),
    jobs=jobs,
    summary=summary,
    options=(
        Option("minutes", 3.0, "of training each", quick=0.05),
        Option("only", tuple(CANDIDATES), "candidates", quick=("patch 7, 64",), choices=CANDIDATES),
        Option("seed", 0, "of the weights and of the training"),
    ),
)
