"""Are posterior samples of photographs as wide as the truth is far?

Ten photographs of ``bsd68``, their middle 64 x 64 pixels, white Gaussian noise, n samples of each by
the reverse diffusion of ``patchscore.sample_denoised``. With m the mean square error of the posterior
mean and v the mean posterior variance, an exact prior and sampler give v = m, so that one sample has the
error 2 m:

    cost of a sample    10 log10((m + v) / m) = 3.01 dB,    m = |mean of n - truth|^2 - v / n
    coverage            90 % of the pixels lie in the central 90 % interval of the samples

The schedule (levels and order) is not chosen here: its error is known from a Gaussian, where it narrows
the samples by 21 % with 20 levels of the first order and by 4 % with 20 of the second.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple, get_args

import numpy as np
import torch

import patchscore as ps
from benchmarks.data import DATA_RANGE, NamedImage, add_noise, gray_images, middle
from benchmarks.methods import prior_digest
from benchmarks.study import PRIOR, SEED, Job, Option, Study
from benchmarks.tables import frame_of
from patchscore.evaluation.metrics import psnr
from patchscore.inference.diagnostics import coverage
from patchscore.inference.diffusion import Order

SET, EVERY, SIDE = "bsd68", 7, 64


class Row(NamedTuple):
    """One photograph under one schedule; errors are squared, in grey levels."""

    image: str
    sigma: float
    levels: int
    order: int
    samples: int
    seed: int
    prior: str
    tweedie_psnr: float
    mean_psnr: float
    error_of_mean: float
    variance: float
    coverage: float
    seconds: float


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    """Every photograph."""
    prior = ps.load_prior(options.prior)
    schedule = options.sigma, options.levels, options.order, options.samples, options.seed
    for image in gray_images(SET)[::EVERY][: options.images]:
        key = image.name, *schedule[:-1], prior_digest(prior), options.seed
        yield Job(partial(measure, prior, image, *schedule), [key])


def measure(
    prior: ps.PatchPrior,
    image: NamedImage,
    sigma: float,
    levels: int,
    order: Order,
    samples: int,
    seed: int,
) -> list[Row]:
    """One photograph under one schedule."""
    clean = middle(image.pixels, SIDE)
    like = prior.network.like
    y = torch.from_numpy(add_noise(clean, sigma, seed=seed, number=0))[None, None].to(like)
    truth = torch.from_numpy(clean)[None, None].to(like)
    start = time.perf_counter()
    chain = ps.sample_denoised(
        prior,
        y,
        sigma,
        samples,
        levels=levels,
        order=order,
        generator=torch.Generator().manual_seed(seed),
        progress=False,
    )
    seconds = time.perf_counter() - start
    assert chain.samples is not None
    with torch.no_grad():
        tweedie = prior.denoise(y, sigma)
    variance = chain.variance.mean().item()
    error = (chain.mean - truth).square().mean().item() - variance / samples
    quality = _psnr(truth, tweedie), _psnr(truth, chain.mean), error, variance
    share = round(coverage(chain.samples, truth, 0.9).share, 5)
    schedule = image.name, sigma, levels, order, samples, seed, prior_digest(prior)
    return [Row._make((*schedule, *(round(value, 4) for value in quality), share, round(seconds, 1)))]


def summary(rows: Sequence[Row], options: argparse.Namespace) -> str:
    """The averages over photographs, for every schedule."""
    lines = []
    schedule = ["prior", "sigma", "samples", "levels", "order"]
    for (prior, sigma, samples, levels, order), found in frame_of(rows).groupby(schedule):
        gap = found.mean_psnr - found.tweedie_psnr
        cost = 10 * np.log10(1 + found.variance.mean() / found.error_of_mean.mean())
        shares = 100 * found.coverage
        lines += [
            f"prior {prior}, {len(found)} photographs, sigma {sigma:g}, {samples} samples, {levels} "
            f"levels of order {order}, {found.seconds.sum():.0f} s",
            f"mean of {samples} samples over one-step: {gap.mean():+.2f} dB "
            f"({gap.min():+.2f} to {gap.max():+.2f})",
            f"a sample costs {cost:.2f} dB against the posterior mean (exact: 3.01)",
            f"90 % intervals hold {shares.mean():.1f} % ({shares.min():.1f} to {shares.max():.1f})",
        ]
    return "\n".join(lines)


def _psnr(truth: torch.Tensor, estimate: torch.Tensor) -> float:
    arrays = (image[0, 0].double().numpy() for image in (truth, estimate))
    return psnr(*arrays, data_range=DATA_RANGE)


STUDY = Study(
    "calibration",
    __doc__,
    Row,
    key=("image", "sigma", "levels", "order", "samples", "prior"),
    depends=("seed",),
    jobs=jobs,
    summary=summary,
    options=(
        PRIOR,
        Option("sigma", 25.0, "noise level, of 255"),
        Option("samples", 64, "of each photograph", quick=19),
        Option("levels", 20, "of the diffusion", quick=5),
        Option("order", 2, "of its steps", choices=get_args(Order)),
        Option("images", 10, "photographs", quick=1),
        SEED,
    ),
)
