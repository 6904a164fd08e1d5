"""Cliques side by side after equal training time.

Every candidate learns from the images that natural-gray is trained on, for the same minutes, and is
measured on the images held out there (not on BSD68 or Set12). A candidate is on the Pareto front if none
with at most its arithmetic reaches a higher PSNR at sigma 25.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from timeit import repeat
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
    """The layers of a ConvEnergy, and its training; a PatchEnergy has sides of 1 after the first."""

    sides: tuple[int, ...]
    dilations: tuple[int, ...]
    width: int
    optimizer: Literal["adam", "soap"] = "soap"
    learning_rate: float = 8e-3


class Row(NamedTuple):
    """One candidate: its size, its training, and what it reaches on the images held out."""

    candidate: str
    sides: str
    dilations: str
    width: int
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


CANDIDATES = {
    "patch 11, Adam": Candidate((11, 1), (1, 1), 256, "adam", 2e-3),
    "patch 7, 64": Candidate((7, 1), (1, 1), 64),
    "patch 7, 128": Candidate((7, 1), (1, 1), 128),
    "patch 11, 256": Candidate((11, 1), (1, 1), 256),
    "patch 11, 256, deep": Candidate((11, 1, 1), (1, 1, 1), 256),
    "patch 15, 256": Candidate((15, 1), (1, 1), 256),
    "conv 2 layers, 32": Candidate((5, 3), (1, 2), 32),
    "conv 3 layers, 32": Candidate((5, 3, 3), (1, 2, 3), 32),
    "conv 3 layers, 64": Candidate((7, 3, 3), (1, 2, 3), 64),
    "conv 3 layers, 64, wide": Candidate((9, 3, 3), (1, 3, 5), 64),
    "conv 4 layers, 32": Candidate((5, 3, 3, 3), (1, 1, 2, 3), 32),
    "conv 4 layers, 64": Candidate((7, 3, 3, 3), (1, 2, 3, 3), 64),
    "conv 5 layers, 48": Candidate((7, 3, 3, 3, 3), (1, 1, 2, 3, 2), 48),
    "conv 5 layers, 64": Candidate((7, 3, 3, 3, 3), (1, 1, 2, 3, 2), 64),
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
    network = ps.ConvEnergy(candidate.sides, candidate.dilations, width=candidate.width)
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
    size = sum(p.numel() for p in network.parameters()), multiply_adds(prior)
    training = candidate.optimizer, candidate.learning_rate, minutes, len(history.loss)
    found = (round(value, 3) for value in (*held_out_psnr(prior), microseconds_per_pixel(prior)))
    shape = name, sides, dilations, candidate.width
    return [Row._make((*shape, *size, *training, *found, seed, version))]


def microseconds_per_pixel(prior: ps.PatchPrior) -> float:
    """The best of three one-step estimates in float32 of an image of 512 x 512."""
    image = np.random.default_rng(0).random((TIMED_SIDE, TIMED_SIDE))
    times = repeat(lambda: ps.denoise(image, 0.1, prior=prior), number=1, repeat=3)
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
