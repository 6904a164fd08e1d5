"""How far samples can be trusted: all diagnostics in one place.

    mean of the draws of p(x | y) = y + sigma^2 s(y, sigma)                 (Tweedie: mean_gap)
    J = J',    J the Jacobian of the score                                  (a gradient: curl)

From :mod:`patchscore.inference.mixing`: whether chains have converged (``r_hat``,
``effective_sample_size``, ``monte_carlo_error``). From :mod:`patchscore.inference.calibration`: whether
the samples hold the truth as often as they claim (``coverage``, ``rank_statistics``,
``rank_histogram``).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from patchscore.checks import noise_levels
from patchscore.errors import InputError
from patchscore.inference.calibration import (
    Coverage,
    RankHistogram,
    coverage,
    rank_histogram,
    rank_statistics,
)
from patchscore.inference.chain import Chain
from patchscore.inference.mixing import effective_sample_size, monte_carlo_error, r_hat
from patchscore.linear_algebra import as_vectors, dimension, expand, norm, rms, tweedie
from patchscore.protocols import Score
from patchscore.randomness import standard_normal

__all__ = [
    "Coverage",
    "MeanGap",
    "RankHistogram",
    "coverage",
    "curl",
    "effective_sample_size",
    "mean_gap",
    "monte_carlo_error",
    "r_hat",
    "rank_histogram",
    "rank_statistics",
]


class MeanGap(NamedTuple):
    """How far the mean of samples is from one-step Tweedie, one number for each image, (B,).

    Attributes
    ----------
    rms : root mean square over the pixels, in the unit of the image
    z : rms over its Monte Carlo standard error; about 1 if prior and sampler are exact
    """

    rms: Tensor
    z: Tensor


@torch.no_grad()
def mean_gap(chain: Chain, prior: Score, y: Tensor, sigma: float | Tensor) -> MeanGap:
    """Compare the mean of independent samples of p(x | y = x + sigma z) with y + sigma^2 s(y, sigma).

        z^2 = mean((mean - Tweedie)^2) / mean(variance / n)

    Parameters
    ----------
    chain
        From :func:`sample_denoised`; moments are enough.
    y, sigma
        The noisy images (B, C, H, W) and their noise level, a number, () or (B,).

    Raises
    ------
    InputError
        If there are fewer than two draws, or shapes do not fit.

    Notes
    -----
    A large z has two possible causes: the scores at lower levels do not belong to the same density as
    the score at sigma, or the sampler is biased. More levels tell them apart. The square of z is 1 up
    to about sqrt(2 / m), m the number of independent pixels. It does not see errors in the spread of
    the samples, nor a prior that is wrong at all levels alike.
    """
    if chain.mean.shape != y.shape:
        raise InputError(
            f"the chain is of images {tuple(chain.mean.shape)} and y has {tuple(y.shape)}; give the "
            "noisy images that it was drawn for."
        )
    if chain.draws < 2:
        raise InputError(f"a chain of {chain.draws} draws has no standard error; draw at least two.")
    expected = tweedie(y, prior.score(y, sigma), noise_levels(sigma, y))
    gap = rms(chain.mean.to(y) - expected)
    std = norm(chain.std.to(gap)) / dimension(y) ** 0.5
    return MeanGap(gap, gap / std * math.sqrt(chain.draws))


@torch.no_grad()
def curl(
    model: Score,
    x: Tensor,
    sigma: float | Tensor,
    *,
    generator: torch.Generator,
    probes: int = 8,
) -> Tensor:
    """Share of the score's Jacobian that is antisymmetric, at x: (B, C, H, W) -> (B,), from 0 to 1.

        |J - J'| / (2 |J|),    |J - J'|^2 = E (u'J v - v'J u)^2,    |J|^2 = E |J v|^2

    in the Frobenius norm, with u and v uniform on the sphere of squared radius d, the number of pixels.
    J v is computed by central differences, so only a score is needed. The share is 0 for a gradient, 1
    for a rotation.

    Parameters
    ----------
    probes
        Vectors v, used in all pairs. Each costs two evaluations of the score.

    Raises
    ------
    InputError
        If there are fewer than two probes, or a noise level does not fit.

    Notes
    -----
    A random and local estimate, with a relative error of about 1 / probes. Rounding leaves about 1e-4 in
    float32 (more if the image is large against sigma) and 1e-9 in float64. It does not tell whether the
    score is right: it is zero for every potential, good or bad.
    """
    if probes < 2:
        raise InputError(f"probes is {probes}; antisymmetry needs at least two directions.")
    size = torch.finfo(x.dtype).eps ** (1 / 3) * expand(noise_levels(sigma, x))
    v, image = [], []
    for _ in range(probes):
        z = standard_normal(x, generator)
        z = z / expand(rms(z))
        change = model.score(x + size * z, sigma) - model.score(x - size * z, sigma)
        v.append(as_vectors(z))
        image.append(as_vectors(change / (2 * size)))
    vectors, images = torch.stack(v, 1), torch.stack(image, 1)
    products = vectors @ images.mT
    antisymmetric = (products - products.mT).square().sum((1, 2)) / (probes * (probes - 1))
    whole = images.square().sum(2).mean(1).clamp_min(torch.finfo(x.dtype).tiny)
    return (antisymmetric / whole).sqrt() / 2
