"""Seconds beside other methods on the same cores, and the peak of memory.

    ratio = seconds of the other / seconds of patchscore      one for each round, then their median

In each round every method denoises ``camera`` (512 x 512) at sigma 25 of 255 once, one after the other,
so that a slow drift of the machine hits all of them. The memory is that of a fresh process, for an image
of 2048 x 2048 pixels. The lines of the study throughput follow. Close other programs first.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from skimage.data import camera
from skimage.restoration import denoise_nl_means

import patchscore as ps
from benchmarks import throughput
from benchmarks.machine import in_fresh_process, peak_bytes, time_in_turn
from benchmarks.methods import by_epll
from benchmarks.study import Job, Option, Study
from benchmarks.throughput import SIGMA, Row, row_of
from patchscore.evaluation.baselines import bm3d, has_bm3d, total_variation
from patchscore.priors.engines.cpu import has_bfloat16

TV_WEIGHT = 1.0
# scikit-image's advice for noise of a known level, with its patches of 5 x 5 in the fast mode.
NON_LOCAL_STRENGTH = 0.8
LARGE_SIDE = 2048
LEAST_RATIO = 5.0
MOST_MEGABYTES = 1000.0
# Of the image in float64, in which it is made, and what tiles and threads need, in MB.
MOST_COPIES = 3
MOST_WORKSPACE = 200


class Memory(NamedTuple):
    """Peaks of resident memory in bytes.

    Attributes
    ----------
    baseline : after everything is imported and the prior is loaded
    peak : after an image was made and denoised
    """

    baseline: int
    peak: int


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    """Everything at once, as it has to be measured side by side."""
    if options.mixture is None:
        print("EPLL is left out; give the file of its mixture by --mixture.\n", file=sys.stderr)
    yield Job(partial(measure, options))


def measure(options: argparse.Namespace) -> list[Row]:
    """The lines of this study, and those of the study throughput."""
    seconds = time_denoisers(options.prior, rounds=options.rounds, mixture=options.mixture)
    memory = in_fresh_process(peak_memory, options.prior)
    return [*report(options.prior, seconds, memory), *throughput.measure(options)]


def time_denoisers(prior: str, *, rounds: int, mixture: Path | None = None) -> dict[str, list[float]]:
    """Time patchscore and others.

    TV and non-local means are those of scikit-image, the first with its default tolerance, the second in
    its fast mode. BM3D takes part if it is installed, EPLL if there is the file of a ``mixture``.

    Raises :class:`InputError` if the prior or the mixture cannot be loaded, or there is no round.
    """
    noisy = _noisy(camera())
    loaded = ps.load_prior(prior, "cpu")
    denoisers: dict[str, Callable[[], object]] = {
        "tv": lambda: total_variation(noisy, SIGMA, weight=TV_WEIGHT),
        "non-local means": lambda: denoise_nl_means(
            noisy, patch_size=5, patch_distance=6, h=NON_LOCAL_STRENGTH * SIGMA, sigma=SIGMA
        ),
        "patchscore": lambda: ps.denoise(noisy, SIGMA, prior=loaded),
    }
    if has_bfloat16():
        fast = loaded.with_precision("bfloat16")
        denoisers["patchscore, bfloat16"] = lambda: ps.denoise(noisy, SIGMA, prior=fast)
    if mixture is not None:
        restore = by_epll(mixture).run
        denoisers["epll"] = lambda: restore(noisy, SIGMA, noisy)
    if has_bm3d():
        denoisers["bm3d"] = lambda: bm3d(noisy, SIGMA)
    return time_in_turn(denoisers, rounds=rounds)


def report(prior: str, seconds: Mapping[str, Sequence[float]], memory: Memory) -> list[Row]:
    """Summarise the measurements and hold them against the targets."""
    row = partial(row_of, prior)
    rows = [row(f"{method}, 512 x 512", "s", values) for method, values in seconds.items()]
    for method, values in seconds.items():
        if method != "patchscore":
            ratios = np.divide(values, seconds["patchscore"])
            least = LEAST_RATIO if method == "bm3d" else None
            rows.append(row(f"{method} / patchscore", "", ratios, at_least=least))
    above = (memory.peak - memory.baseline) / 1e6
    image = 8 * LARGE_SIDE**2 / 1e6
    peak = [memory.peak / 1e6]
    return [
        *rows,
        row(f"peak memory, {LARGE_SIDE} x {LARGE_SIDE}", "MB", peak, at_most=MOST_MEGABYTES),
        row("peak above the loaded prior", "MB", [above], at_most=image * MOST_COPIES + MOST_WORKSPACE),
    ]


def peak_memory(prior: str, side: int = LARGE_SIDE) -> Memory:
    """The memory that denoising a ``side`` x ``side`` image takes, in a fresh process."""
    loaded = ps.load_prior(prior, "cpu")
    baseline = peak_bytes()
    image = camera()
    copies = -(-side // len(image))
    ps.denoise(_noisy(np.tile(image, (copies, copies))[:side, :side]), SIGMA, prior=loaded)
    return Memory(baseline, peak_bytes())


def _noisy(image: np.ndarray) -> np.ndarray:
    # In place, as the peak of memory counts.
    noisy = np.random.default_rng(0).standard_normal(image.shape)
    noisy *= SIGMA
    noisy += image
    return noisy


STUDY = Study(
    "speed",
    __doc__,
    Row,
    key=throughput.KEY,
    jobs=jobs,
    summary=throughput.summary,
    options=(
        *throughput.OPTIONS,
        Option("mixture", None, "the file of EPLL's mixture, from python -m benchmarks epll", kind=Path),
    ),
)
