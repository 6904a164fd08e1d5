"""Half-quadratic splitting and regularisation by denoising: estimates that use the prior as a denoiser.

D(z, rho) is the denoiser of the prior (its posterior mean under noise rho). Half-quadratic splitting
alternates two steps, while rho falls:

    z = D(x, rho)                                                              the prior's step
    x = argmax_x  log p(y | x) - strength |x - z|^2 / (2 rho^2)                the data's step

This is plug-and-play; with a maximum in place of D it is the penalty method of EPLL. At a fixed point

    grad log p(y | x) + strength (D(x, rho) - x) / rho^2 = 0

so the strength is that of the prior against the data: a power of p_sigma(x). Regularisation by
denoising (RED) finds the fixed point of both steps at one noise level:

    A'(A x - y) / noise_std^2 + weight (x - D(x, sigma)) = 0

Since x - D = -sigma^2 s, with weight = 1 / sigma^2 the solution is the stationary point of
log p(y | x) + log p_sigma(x), so there is no weight to tune.

References: Geman and Yang, IEEE TIP 4 (1995), section III; Zhang et al., "Plug-and-Play Image
Restoration with Deep Denoiser Prior", TPAMI 44 (2022), equations 6-7; Romano, Elad and Milanfar, SIAM J.
Imaging Sci. 10 (2017), equation 37 (the fixed-point iteration); Reehorst and Schniter, IEEE TCI 5 (2019)
(RED as score matching).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from patchscore.checks import (
    check_batch,
    check_counts,
    check_noise_level,
    check_positive,
    check_schedule,
)
from patchscore.errors import InputError
from patchscore.inference.optimize import Solution
from patchscore.linear_algebra import rms
from patchscore.protocols import Denoiser, Likelihood, check_score


@torch.no_grad()
def half_quadratic_splitting(
    denoiser: Denoiser,
    likelihood: Likelihood,
    x0: Tensor,
    *,
    sigmas: Sequence[float],
    strength: float = 1.0,
    repeats: int = 1,
    tolerance: float = 0.0,
    data_tolerance: float | None = None,
    progress: bool = True,
) -> Solution:
    """Half-quadratic splitting (plug-and-play) along a schedule of noise levels.

    Parameters
    ----------
    denoiser
        A prior (calling it denoises), or any function (x, sigma) -> x.
    x0
        Where to start, (B, C, H, W).
    sigmas
        rho of every step. For denoising, from about noise_std to a tenth of it. For deblurring and
        inpainting, from a large level (a fifth of the range of the image). The result depends on this
        schedule, since it balances prior and data.
    strength
        Of the prior against the data, a number without unit.
    repeats, tolerance
        How often a level is repeated at most, while x changes by more than ``tolerance`` (the root mean
        square, in units of rho). What is far from the data needs this: pixels that are not measured, or
        few lines of Fourier space.
    data_tolerance
        Of the data's step, from the x before; by default exact, to the tolerance of the likelihood.

    Raises
    ------
    InputError
        If a noise level is not positive.

    Notes
    -----
    Not a MAP estimate: it maximises an objective only if rho is fixed and the denoiser is itself a
    maximum. The residual is the change of x in units of rho.
    """
    _check_parts(denoiser, likelihood, x0)
    check_schedule(sigmas)
    check_positive(strength=strength)
    check_counts(repeats=repeats)
    x, residual, levels = x0, [[math.nan] * len(x0)], [*sigmas[:1]]
    start = time.perf_counter()
    for sigma in tqdm(sigmas, unit="level", disable=not progress):
        for _ in range(repeats):
            begin = None if data_tolerance is None else x
            z, previous = denoiser(x, sigma), x
            x = likelihood.proximal(z, strength / sigma**2, start=begin, tolerance=data_tolerance)
            residual.append(_change(x, previous, sigma))
            levels.append(sigma)
            if max(residual[-1]) <= tolerance:
                break
    reason = f"all {len(sigmas)} levels of the schedule are done"
    return _solution(x, residual, levels, reason, start)


@torch.no_grad()
def regularization_by_denoising(
    denoiser: Denoiser,
    likelihood: Likelihood,
    x0: Tensor,
    *,
    sigma: float,
    weight: float | None = None,
    tolerance: float = 1e-4,
    max_steps: int = 200,
    progress: bool = True,
) -> Solution:
    """RED at one noise level, by its fixed-point iteration.

        (A'A / noise_std^2 + weight I) x <- A'y / noise_std^2 + weight D(x, sigma)

    Parameters
    ----------
    denoiser
        A prior (calling it denoises), or any function (x, sigma) -> x.
    sigma
        The noise level of the denoiser.
    weight
        Of the regulariser, in one over the squared unit of the image. The default 1 / sigma^2 gives the
        stationary point of the posterior of a score prior.
    tolerance
        Stop when the root mean square change of x is below, in units of sigma.

    Raises
    ------
    InputError
        If a number is not positive.

    Notes
    -----
    May not converge with a denoiser that expands distances; ``reason`` then says that it was stopped.
    """
    _check_parts(denoiser, likelihood, x0)
    check_noise_level(sigma)
    if weight is not None:
        check_positive(weight=weight)
    check_counts(max_steps=max_steps)
    weight = 1 / sigma**2 if weight is None else weight
    x, residual = x0, [[math.nan] * len(x0)]
    reason = f"stopped after {max_steps} steps, before x changed by less than {tolerance:g}"
    start = time.perf_counter()
    with tqdm(total=max_steps, unit="step", disable=not progress) as bar:
        for _ in range(max_steps):
            previous, x = x, likelihood.proximal(denoiser(x, sigma), weight)
            residual.append(_change(x, previous, sigma))
            bar.update()
            if max(residual[-1]) <= tolerance:
                reason = f"converged: x changes by less than {tolerance:g} in units of sigma"
                break
    return _solution(x, residual, [sigma] * len(residual), reason, start)


def _check_parts(denoiser: object, likelihood: object, x0: Tensor) -> None:
    check_batch(x0, "x0")
    check_score(likelihood, "the likelihood")
    if not (callable(denoiser) and hasattr(likelihood, "proximal")):
        raise InputError(
            f"the denoiser is {type(denoiser).__name__} and the likelihood {type(likelihood).__name__}; "
            "expected a function (x, sigma) -> x, and a GaussianLikelihood."
        )


def _change(x: Tensor, previous: Tensor, sigma: float) -> list[float]:
    change: list[float] = (rms(x - previous) / sigma).tolist()
    return change


def _solution(
    x: Tensor, residual: list[list[float]], sigmas: Sequence[float], reason: str, start: float
) -> Solution:
    """With one evaluation of the denoiser in each step."""
    steps, seconds = len(residual) - 1, time.perf_counter() - start
    objective = np.full((len(residual), len(x)), math.nan)
    return Solution(x, objective, np.array(residual), np.array(sigmas), reason, steps, seconds, steps)
