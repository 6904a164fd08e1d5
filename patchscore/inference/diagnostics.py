"""How far samples can be trusted: mixing of the chains, and agreement with the score itself.

    R-hat^2 = variance of all chains together / variance within a chain                   (mixing)
    mean of the draws of p(x | y) = y + sigma^2 s(y, sigma)                               (Tweedie)
    J = J',    J the Jacobian of the score                                  (a gradient has no curl)

Whether the truth is where the samples say is measured in :mod:`patchscore.inference.calibration`, and
its functions can be had from here.

Reference: Vehtari et al., "Rank-Normalization, Folding, and Localization: An Improved R-hat", Bayesian
Analysis 16 (2021), equations 1-14 (computed by the package arviz).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
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

Kind = Literal["bulk", "tail", "mean"]
LEAST_DRAWS = 4  # of each chain, since each is split in two


def r_hat(chain: Chain | Tensor) -> Tensor:
    """R-hat of every pixel, rank-normalised and split: (n, B, C, H, W) -> (C, H, W).

    The B images are chains of one posterior, begun far apart. Near 1 they agree; above 1.01 they have
    not mixed.

    Parameters
    ----------
    chain
        With its samples; or numbers from them, (n, B, ...), such as ``chain.samples.mean((2, 3, 4))``.

    Raises
    ------
    InputError
        If there are no samples, fewer than 4 draws or 2 chains, or arviz is missing.

    Notes
    -----
    Lies if all chains missed the same mode, which is likely where they began at the same place, and for
    images of different posteriors in one batch. Of many pixels some are above 1.01 by chance: look at
    the map. Slow directions, such as the brightness of a region, show in no single pixel: test
    statistics of the image too. NaN where no draw differs. About 1 ms a pixel: thin large images,
    ``chain.samples[..., ::8, ::8]``.
    """
    return _by_trace(chain, 2, _arviz().rhat)


def effective_sample_size(chain: Chain | Tensor, kind: Kind = "bulk") -> Tensor:
    """Independent draws that the B chains are worth together: (n, B, C, H, W) -> (C, H, W).

        B n / (1 + 2 sum_t rho_t),    rho_t the autocorrelation at lag t

    Parameters
    ----------
    chain
        As of :func:`r_hat`; one chain will do.
    kind
        ``"bulk"`` of ranks, for the centre of the distribution; ``"tail"``, the lesser of those of
        the 5 % and the 95 % quantile; ``"mean"``, for the error of the mean.

    Raises
    ------
    InputError
        As of :func:`r_hat`, but for the number of chains, and for an unknown kind.

    Notes
    -----
    Lies, far too high, about a chain that has not left its first mode: look at :func:`r_hat` first. An
    estimate below 100 per chain is itself unsure. NaN where no draw differs.
    """
    if kind not in get_args(Kind):
        raise InputError(f"kind is {kind!r}; choose one of {get_args(Kind)}.")
    arviz = _arviz()
    return _by_trace(chain, 1, lambda trace: arviz.ess(trace, method=kind))


def monte_carlo_error(chain: Chain | Tensor) -> Tensor:
    """Standard error of the mean of all draws, std / sqrt(ESS): (n, B, C, H, W) -> (C, H, W).

    Of the B chains of one posterior together, in the unit of the image. Input, errors and lies as of
    :func:`effective_sample_size`.
    """
    return _by_trace(chain, 1, _arviz().mcse)


class MeanGap(NamedTuple):
    """How far the mean of samples is from one-step Tweedie, one number for each image, (B,).

    Attributes
    ----------
    rms : root mean square over the pixels, in the unit of the image
    z : rms over its Monte Carlo standard error; about 1 if prior and sampler are exact
    in_std : rms over the posterior standard deviation; 1 / sqrt(n) if they are exact
    """

    rms: Tensor
    z: Tensor
    in_std: Tensor


@torch.no_grad()
def mean_gap(
    chain: Chain,
    prior: Score,
    y: Tensor,
    sigma: float | Tensor,
    *,
    effective_draws: float | None = None,
) -> MeanGap:
    """Compare the mean of samples of p(x | y = x + sigma z) with y + sigma^2 s(y, sigma).

        z^2 = mean((mean - Tweedie)^2) / mean(variance / n)

    Parameters
    ----------
    chain
        Of :func:`sample_denoised`; moments are enough.
    y, sigma
        The noisy images (B, C, H, W) and their noise level, a number, () or (B,).
    effective_draws
        Instead of n, if the draws are correlated; see :func:`effective_sample_size`.

    Raises
    ------
    InputError
        If there are fewer than two draws, or shapes do not fit.

    Notes
    -----
    Where z is large, the scores at the levels below sigma are not those of the density that the score at
    sigma is of, or the sampler is biased; more levels tell the two apart. The square of z is 1 up to
    about sqrt(2 / m), m the number of pixels that are independent. Fails to see errors in the spread of
    the samples, and a prior that is wrong at all levels alike.
    """
    if chain.mean.shape != y.shape:
        raise InputError(
            f"the chain is of images {tuple(chain.mean.shape)} and y has {tuple(y.shape)}; give the "
            "noisy images that it was drawn for."
        )
    draws = chain.draws if effective_draws is None else effective_draws
    if chain.draws < 2 or not 0 < draws < math.inf:
        raise InputError(
            f"a chain of {chain.draws} draws, {draws} of them effective, has no standard error; draw at "
            "least two."
        )
    level = noise_levels(sigma, y)[:, None, None, None]
    tweedie = y + level**2 * prior.score(y, sigma)
    rms = (chain.mean.to(y) - tweedie).flatten(1).square().mean(1).sqrt()
    std = chain.variance.to(y).flatten(1).mean(1).sqrt()
    return MeanGap(rms, rms / std * math.sqrt(draws), rms / std)


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

    in the Frobenius norm; u and v are uniform on the sphere of squared radius d, the number of pixels.
    J v is from central differences, so that a score is all it takes. Zero for a gradient, 1 for a
    rotation.

    Parameters
    ----------
    probes
        Vectors v, in all pairs; at a cost of two evaluations each.

    Raises
    ------
    InputError
        If there are fewer than two probes, or a noise level does not fit.

    Notes
    -----
    A random estimate, good to about 1 / probes of itself, and a local one. Rounding leaves about 1e-4 in
    float32 (more if the image is large against sigma) and 1e-9 in float64. Fails to say whether the
    score is right: zero for every potential, good or bad.
    """
    if probes < 2:
        raise InputError(f"probes is {probes}; antisymmetry takes at least two directions.")
    size = torch.finfo(x.dtype).eps ** (1 / 3) * noise_levels(sigma, x)[:, None, None, None]
    v, image = [], []
    for _ in range(probes):
        z = standard_normal(x, generator)
        z = z * (z[0].numel() / z.square().sum((1, 2, 3), keepdim=True)).sqrt()
        change = model.score(x + size * z, sigma) - model.score(x - size * z, sigma)
        v.append(z.flatten(1))
        image.append((change / (2 * size)).flatten(1))
    vectors, images = torch.stack(v, 1), torch.stack(image, 1)
    products = vectors @ images.mT
    antisymmetric = (products - products.mT).square().sum((1, 2)) / (probes * (probes - 1))
    whole = images.square().sum(2).mean(1).clamp_min(torch.finfo(x.dtype).tiny)
    return (antisymmetric / whole).sqrt() / 2


def _by_trace(chain: Chain | Tensor, chains: int, measure: Callable[[np.ndarray], Any]) -> Tensor:
    """measure(trace) of the trace (chains, draws) of every pixel."""
    draws = chain if isinstance(chain, Tensor) else chain.samples
    if draws is None:
        raise InputError('the chain kept its moments only; draw with keep="samples".')
    if draws.ndim < 2 or len(draws) < LEAST_DRAWS or draws.shape[1] < chains:
        raise InputError(
            f"samples have shape {tuple(draws.shape)}; expected (n, B, ...), at least {LEAST_DRAWS} "
            f"draws of at least {chains} chains of one posterior: repeat x0 for more chains."
        )
    if not bool(draws.isfinite().all()):
        raise InputError("the samples have values that are NaN or infinite.")
    traces = draws.detach().reshape(*draws.shape[:2], -1).permute(2, 1, 0).double().cpu().numpy()
    # Chains that stand still at different places have an infinite R-hat, which is right.
    with np.errstate(divide="ignore", invalid="ignore"):
        values = [float(measure(trace)) if np.ptp(trace) > 0 else math.nan for trace in traces]
    return torch.tensor(values, dtype=torch.float64).view(draws.shape[2:])


def _arviz() -> Any:
    try:
        with warnings.catch_warnings():
            # On import, it announces its next release.
            warnings.filterwarnings("ignore", r"\s*ArviZ is undergoing", FutureWarning)
            import arviz
    except ImportError as error:
        raise InputError(
            f"arviz cannot be loaded ({error}). Install it with pip install 'patchscore[diagnostics]'."
        ) from error
    return arviz
