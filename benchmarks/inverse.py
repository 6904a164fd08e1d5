"""Images restored from linear measurements: patch priors beside total variation with an oracle weight.

    y = A x + n,        n ~ N(0, noise_std^2 I)

The problems are those of :mod:`benchmarks.inverse_problems`, on images of test sets. Nothing is chosen on
these images, except by the methods called oracles, which look at the clean image:

    start       what deepinv gives without a prior: its pseudo-inverse, filtered back-projection in CT
    tv          total variation with the best weight for this image, to 0.01 dB
    dpir        deepinv's plug-and-play method DPIR, its settings, with a patch prior as the denoiser
    one-step    the posterior mean, for denoising alone
    restore     :func:`patchscore.restore`, with nothing given but y, A and noise_std
    map         the same with ``estimate="map"``

DPIR is left out in CT: its settings are made for operators of norm one. Seconds are those of one core,
those of an oracle with all that it tries; products are those with A and with its adjoint.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import patchscore as ps
from benchmarks.data import NamedImage, digest
from benchmarks.inverse_problems import PROBLEMS, Measured, import_deepinv, measured
from benchmarks.methods import version_of
from benchmarks.study import SEED, Job, Option, Study
from benchmarks.tables import frame_of, markdown
from patchscore.evaluation.total_variation import TotalVariationSolver, oracle_weight

FAST, LARGE = "natural-gray-fast", "natural-gray"
RESAMPLES = 10_000


class Row(NamedTuple):
    """One method on one image of a problem.

    Attributes
    ----------
    setting : what an oracle chose
    input : a digest of the clean image and the noise level
    seconds : of one core
    products : with A, and with its adjoint
    """

    problem: str
    image: str
    method: str
    psnr: float
    ssim: float
    seconds: float
    products: int
    setting: str
    seed: int
    version: str
    input: str


class Counted:
    """An operator that counts its products."""

    def __init__(self, physics: Any) -> None:
        self.products = 0
        for name in ("A", "A_adjoint"):
            setattr(physics, name, self._counting(getattr(physics, name)))

    def _counting(self, apply: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counted(*arguments: Any, **options: Any) -> Tensor:
            self.products += 1
            return apply(*arguments, **options)

        return counted


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    """Every method on every image of every problem."""
    for name in options.problems:
        for image in PROBLEMS[name].images(options.images):
            yield from jobs_of(name, image, options.methods, options.seed)


def jobs_of(problem: str, image: NamedImage, methods: Sequence[str], seed: int) -> Iterator[Job]:
    """These methods on one image, as far as they are for this problem."""
    content = digest(image.pixels, PROBLEMS[problem].noise_std)
    for method in methods:
        if not suits(method, problem):
            continue
        key, depends = (problem, image.name, method), (seed, version_for(method), content)
        start = Row(*key, np.nan, np.nan, np.nan, 0, "", *depends)
        yield Job(partial(measure, start, image), [(*key, *depends)])


def suits(method: str, problem: str) -> bool:
    """Whether a method is for this problem."""
    if method.startswith("one-step"):
        return problem == "denoise"
    return not (method.startswith("dpir") and problem.startswith("ct"))


@lru_cache
def version_for(method: str) -> str:
    """What the result depends on, beside the input."""
    found = f"torch {torch.__version__} deepinv {version('deepinv')} patchscore {ps.__version__}"
    _, _, prior = method.partition(" ")
    return f"{found}, {version_of(prior_of(prior))}" if prior in (FAST, LARGE) else found


@lru_cache
def prior_of(name: str) -> ps.PatchPrior:
    """A bundled prior, kept in memory."""
    return ps.load_prior(name, "cpu")


def measure(start: Row, image: NamedImage) -> list[Row]:
    """The row of one method on one image."""
    problem = measured(start.problem, image, start.seed)
    problem.physics.A_adjoint(problem.y)  # what is prepared once does not count
    counted = Counted(problem.physics)
    kind, _, prior = start.method.partition(" ")
    begin = time.process_time()
    x, setting = METHODS[kind](problem, prior)
    seconds = time.process_time() - begin
    quality, similarity = round(problem.psnr(x), 4), round(problem.ssim(x), 5)
    cost = {"seconds": round(seconds, 2), "products": counted.products}
    return [start._replace(psnr=quality, ssim=similarity, setting=setting, **cost)]


def by_start(problem: Measured, prior: str) -> tuple[Tensor, str]:
    """The pseudo-inverse, or filtered back-projection."""
    options = {"fbp": True} if hasattr(problem.physics, "fbp") else {}
    return problem.physics.A_dagger(problem.y, **options), ""


def by_total_variation(problem: Measured, prior: str) -> tuple[Tensor, str]:
    """Total variation with the weight of the best PSNR."""
    solver = TotalVariationSolver(problem.y, problem.physics)
    weight, x = oracle_weight(solver, lambda x: -problem.psnr(x), problem.noise_std)
    return x, f"weight {weight:.3g}"


def by_one_step(problem: Measured, prior: str) -> tuple[Tensor, str]:
    """The posterior mean of a noisy image."""
    return prior_of(prior).denoise(problem.y, problem.noise_std), ""


METHODS = {
    "start": by_start,
    "tv": by_total_variation,
    "one-step": by_one_step,
}
SHOWN = (
    "start",
    "tv",
    f"one-step {FAST}",
    f"one-step {LARGE}",
)


def summary(rows: Sequence[Row], options: argparse.Namespace) -> str:
    """Means over the images, and the differences to total variation with their intervals."""
    frame = frame_of(rows)
    return markdown(frame.groupby(["problem", "method"], sort=False).psnr.mean().round(2).reset_index())


STUDY = Study(
    "inverse",
    __doc__,
    Row,
    key=("problem", "image", "method"),
    depends=("seed", "version", "input"),
    jobs=jobs,
    summary=summary,
    options=(
        Option("problems", tuple(PROBLEMS), "kinds of measurements", ("denoise", "pixels"), PROBLEMS),
        Option("methods", SHOWN, "ways to restore", ("start", "tv"), SHOWN),
        Option("images", 6, "of every problem", quick=1),
        SEED,
    ),
)
