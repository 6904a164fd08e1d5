"""The reverse diffusion: images drawn by taking noise away, one level after the other.

In terms of the signal-to-noise ratio l = 1 / sigma^2, w = x_sigma / sigma^2 is the path that gathers
evidence on the clean image x at a constant rate (stochastic localisation),

    dw = D dl + dB,    D = E[x | x_sigma] = x_sigma + sigma^2 s(x_sigma, sigma)

and one step from u = sigma^2 to v < u, in terms of x_sigma again, is

    x_v = (v / u) x_u + (1 - v / u) D + sqrt(v (u - v) / u) z,    z ~ N(0, I)              (reverse_step)

With D = D(x_u, u) this is Euler's method (the ancestral sampler of DDPM): its error falls with the
number of levels as 1 / n, and its samples are too narrow. With the mean of D(x_u, u) and D(x_v, v), x_v
from Euler's step with the same z, it is Heun's: the noise does not depend on w, so its error falls as 1
/ n^2.

A noisy image y is a point of the path, at its own noise level: from there on it leads to samples of
p(x | y), exact but for the number of levels and the score.

References: Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations",
ICLR 2021, equation 46 and algorithm 2 (ancestral sampling, predictor-corrector); El Alaoui and
Montanari, "An Information-Theoretic View of Stochastic Localization", IEEE Trans. Information Theory 68
(2022), equation 2; Kloeden and Platen, "Numerical Solution of Stochastic Differential Equations" (1992),
section 15.1 (weak order two of Heun's method for additive noise).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from patchscore.checks import check_noise_level, noise_levels
from patchscore.errors import InputError
from patchscore.inference.chain import Chain, Keep, Recorder
from patchscore.inference.curvature import curvature_bound
from patchscore.inference.langevin import UNADJUSTED, langevin_step
from patchscore.inference.schedules import noise_schedule
from patchscore.protocols import Score
from patchscore.randomness import standard_normal

Order = Literal[1, 2]
LEVELS = 20
# The lowest noise level as a share of the first: what is left there is below rounding of the image.
LAST_LEVEL = 1 / 25
# Pixels in flight at once: more make nothing faster, and an interruption would lose more.
PIXELS_CPU = 2**20
PIXELS_GPU = 2**25


def reverse_step(x: Tensor, denoised: Tensor, u: Tensor, v: Tensor, z: Tensor) -> Tensor:
    """x_v given x_u, the denoised image and the noise: (B, C, H, W); u and v are (B, 1, 1, 1)."""
    return (v / u) * x + (1 - v / u) * denoised + (v * (u - v) / u).sqrt() * z


@torch.no_grad()
def sample_denoised(
    prior: Score,
    y: Tensor,
    sigma: float | Tensor,
    n: int = 16,
    *,
    levels: int = LEVELS,
    order: Order = 2,
    keep: Keep = "samples",
    generator: torch.Generator,
    resume: Chain | None = None,
    progress: bool = True,
) -> Chain:
    """Draw n samples of the clean image behind each noisy one: p(x | y = x + sigma z).

    The reverse diffusion begins at y itself, at its own noise level, and ends at 1/25 of it with one
    denoising step. The mean of the samples tends to the posterior mean, and a posterior sample has twice
    the squared error of that, 3.01 dB.

    Parameters
    ----------
    prior
        A prior, or any score of blurred images.
    y
        Noisy images (B, C, H, W), in any unit.
    sigma
        Their noise level: a number, () or (B,), in the same unit.
    levels
        Steps, equal in the cube root of sigma. On a Gaussian the variance of the samples is 12 % too
        small with 10 of the second order, 4 % with 20 and 1 % with 40; of the first order, 37, 21 and 11
        %.
    order
        1 (Euler, one evaluation of the prior a step) or 2 (Heun, two).
    generator, keep, progress
        As of :func:`langevin`.
    resume
        Draws to go on from: n is then the number in all, and the draws are those of one go.

    Returns
    -------
    Chain
        ``samples`` is (n, B, C, H, W); draws are independent. After an interruption from the keyboard:
        as many as there are by then.

    Raises
    ------
    InputError
        Before any work: for settings that do not fit, or more samples than memory holds.

    Notes
    -----
    Fails to be calibrated where the prior is not: the scores at all levels below sigma are those of the
    prior, and they need not be those of one and the same density of clean images.
    """
    sigma = noise_levels(sigma, y)
    _check(order, levels=levels, n=n)
    recorder = Recorder(y, n, keep, generator, resume)
    fractions = noise_schedule(1, LAST_LEVEL, levels + 1)
    limit = PIXELS_CPU if y.device.type == "cpu" else PIXELS_GPU
    together = max(1, limit // y.numel())
    evaluations = 0

    def draw(k: int) -> int:
        nonlocal evaluations
        count = min(together, n - k)
        sigmas = [fraction * sigma.repeat(count) for fraction in fractions]
        x = denoised_path(prior, y.repeat(count, 1, 1, 1), sigmas, order, generator)
        for sample in x.view(count, *y.shape):
            recorder.add(sample)
        evaluations += count * (order * levels + 1)
        return count

    done, reason = recorder.repeat(draw, n, unit="sample", progress=progress)
    return recorder.chain(y, done, evaluations, reason)


@torch.no_grad()
def predictor_corrector(
    posterior: Score,
    x0: Tensor,
    *,
    sigmas: Sequence[float],
    corrections: int = 1,
    step_fraction: float = UNADJUSTED,
    order: Order = 2,
    generator: torch.Generator,
    progress: bool = True,
) -> Chain:
    """Draw one image for each of x0 by a reverse diffusion (predictor) with Langevin steps (corrector).

    Parameters
    ----------
    posterior
        A :class:`Posterior`, or a prior to draw images from nothing.
    x0
        (B, C, H, W): images to begin at, to which noise of the highest level is added; they matter
        little if that is above their spread. Repeat one for several draws.
    sigmas
        From large to small; the draw ends with one denoising step at the last.
    corrections
        Langevin steps at each level after the first, of step_fraction / L with the bound L on the
        curvature (see :func:`annealed_langevin`).
    order
        Of the predictor: 1 (Euler) or 2 (Heun).

    Returns
    -------
    Chain
        One draw, (1, B, C, H, W). After an interruption from the keyboard none, and ``state`` is where
        it stood.

    Raises
    ------
    InputError
        If a setting does not fit.

    Notes
    -----
    For a prior, the error falls with the number of levels as their order says, and corrections bring the
    walk back to the score's own density. For a posterior the likelihood at sigma > 0 is an approximation
    (see :mod:`patchscore.inference.posterior`), so without corrections the draws are not those of
    p(x | y) however many the levels; for denoising use :func:`sample_denoised`, which has no such error.
    """
    for sigma in sigmas:
        check_noise_level(sigma)
    _check(order, levels=len(sigmas) - 1)
    recorder = Recorder(x0, 1, "samples", generator, None)
    x = x0 + sigmas[0] * standard_normal(x0, generator)
    evaluations = 0

    levels = [x.new_full((len(x),), sigma) for sigma in sigmas]

    def descend(k: int) -> int:
        nonlocal x, evaluations
        x = _predicted(posterior, x, levels[k], levels[k + 1], order, generator)
        step_size = step_fraction / curvature_bound(posterior, x, sigmas[k + 1])
        for _ in range(corrections):
            score = posterior.score(x, sigmas[k + 1])
            x = langevin_step(x, score, x.new_full((len(x), 1, 1, 1), step_size), generator)
        evaluations += order + corrections
        return 1

    done, reason = recorder.repeat(descend, len(levels) - 1, unit="level", progress=progress)
    if done == len(levels) - 1:
        x = _denoised(posterior, x, levels[-1])
        recorder.add(x)
        evaluations += 1
    return recorder.chain(x, done, evaluations, reason)


def denoised_path(
    prior: Score, x: Tensor, sigmas: Sequence[Tensor], order: Order, generator: torch.Generator
) -> Tensor:
    """Down all noise levels, (B,) each, and one denoising step at the last: (B, C, H, W)."""
    for sigma, lower in pairwise(sigmas):
        x = _predicted(prior, x, sigma, lower, order, generator)
    return _denoised(prior, x, sigmas[-1])


def _predicted(
    model: Score, x: Tensor, sigma: Tensor, lower: Tensor, order: Order, generator: torch.Generator
) -> Tensor:
    """One step of the reverse diffusion, by Euler's or by Heun's method."""
    u, v = (level[:, None, None, None] ** 2 for level in (sigma, lower))
    z = standard_normal(x, generator)
    denoised = _denoised(model, x, sigma)
    euler = reverse_step(x, denoised, u, v, z)
    if order == 1:
        return euler
    return reverse_step(x, (denoised + _denoised(model, euler, lower)) / 2, u, v, z)


def _denoised(model: Score, x: Tensor, sigma: Tensor) -> Tensor:
    """Tweedie's formula."""
    return x + sigma[:, None, None, None] ** 2 * model.score(x, sigma)


def _check(order: int, **counts: int) -> None:
    if order not in get_args(Order):
        raise InputError(f"order is {order!r}; choose one of {get_args(Order)}.")
    for name, value in counts.items():
        if not (isinstance(value, int) and value > 0):
            raise InputError(f"{name} is {value!r}; expected a positive whole number.")
