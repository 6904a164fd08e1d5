"""Half-quadratic splitting and regularisation by denoising: estimates that use the prior as a denoiser.

D(z, rho) is the denoiser of the prior (its posterior mean under noise rho). Half-quadratic splitting
alternates two steps, while rho falls:

    z = D(x, rho)                                                              the prior's step
    x = argmax_x  log p(y | x) - |x - z|^2 / (2 rho^2)                         the data's step

This is plug-and-play; with a maximum in place of D it is the penalty method of EPLL. Regularisation by
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

from patchscore.checks import check_counts, check_noise_level, check_positive, check_schedule
from patchscore.inference.optimize import Solution
from patchscore.linear_algebra import rms
from patchscore.protocols import Denoiser, Likelihood


@torch.no_grad()
def half_quadratic_splitting(
    denoiser: Denoiser,
    likelihood: Likelihood,
    x0: Tensor,
    *,
    sigmas: Sequence[float],
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

    Raises
    ------
    InputError
        If a noise level is not positive, or the data's step does not converge.

    Notes
    -----
    Not a MAP estimate: it maximises an objective only if rho is fixed and the denoiser is itself a
    maximum. The residual is the change of x in units of rho.
    """
    check_schedule(sigmas)
    x, residual = x0, [[math.nan] * len(x0)]
    start = time.perf_counter()
    for sigma in tqdm(sigmas, unit="step", disable=not progress):
        previous, x = x, likelihood.proximal(denoiser(x, sigma), 1 / sigma**2)
        residual.append(_change(x, previous, sigma))
    reason = f"all {len(sigmas)} levels of the schedule are done"
    return _solution(x, residual, [*sigmas[:1], *sigmas], reason, start)


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
        If a number is not positive, or the data's step does not converge.

    Notes
    -----
    May not converge with a denoiser that expands distances; ``reason`` then says that it was stopped.
    """
    check_noise_level(sigma)
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
