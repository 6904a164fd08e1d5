"""Half-quadratic splitting and regularisation by denoising: estimates that see the prior as a denoiser.

With D(z, rho) the denoiser of the prior (its posterior mean under noise rho), half-quadratic splitting
takes in turn, while rho falls,

    z = D(x, rho)                                                              the prior's step
    x = argmax_x  log p(y | x) - |x - z|^2 / (2 rho^2)                         the data's step

which is plug-and-play with a denoiser, and with a maximum in place of D the penalty method of EPLL.
Regularisation by denoising (RED) looks for the fixed point of both at one noise level,

    A'(A x - y) / noise_std^2 + weight (x - D(x, sigma)) = 0

and since x - D = -sigma^2 s, with weight 1 / sigma^2 its solution is the stationary point of
log p(y | x) + log p_sigma(x): here RED needs no weight to be tuned.

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

from patchscore.checks import check_noise_level
from patchscore.errors import InputError
from patchscore.inference.optimize import Solution
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
        rho of every step. For denoising, from about noise_std to a tenth of it; for deblurring and
        inpainting from a large level (a fifth of the range of the image). The schedule is what balances
        prior and data, so the result hangs on it.

    Raises
    ------
    InputError
        If a noise level is not positive, or the data's step does not converge.

    Notes
    -----
    Fails as the maximiser of anything: only for a fixed rho, and a denoiser that is a maximum, is it
    one. Its residual is the change of x in units of rho.
    """
    if not sigmas:
        raise InputError("sigmas is empty; give the noise level of every step, from large to small.")
    for sigma in sigmas:
        check_noise_level(sigma)
    x, residual = x0, [[math.nan] * len(x0)]
    start = time.perf_counter()
    for sigma in tqdm(sigmas, unit="step", disable=not progress):
        previous, x = x, likelihood.proximal(denoiser(x, sigma), 1 / sigma**2)
        residual.append(_change(x, previous, sigma))
    reason = f"all {len(sigmas)} levels of the schedule are done"
    levels = [*sigmas[:1], *sigmas]
    return _solution(x, residual, levels, reason, len(sigmas), start)


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
        Of the regulariser, in one over the squared unit of the image; 1 / sigma^2 if not given, which
        makes it the stationary point of the posterior of a score prior.
    tolerance
        Stops when x changes by less, in units of sigma, root mean square.

    Raises
    ------
    InputError
        If a number is not positive, or the data's step does not converge.

    Notes
    -----
    Fails to converge where the denoiser expands distances; the reason then says that the steps ran out.
    """
    check_noise_level(sigma)
    weight = 1 / sigma**2 if weight is None else weight
    if not 0 < weight < math.inf:
        raise InputError(f"weight is {weight}; expected a positive number.")
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
    steps = len(residual) - 1
    return _solution(x, residual, [sigma] * (steps + 1), reason, steps, start)


def _change(x: Tensor, previous: Tensor, sigma: float) -> list[float]:
    change: list[float] = ((x - previous).square().mean((1, 2, 3)).sqrt() / sigma).tolist()
    return change


def _solution(
    x: Tensor,
    residual: list[list[float]],
    sigmas: Sequence[float],
    reason: str,
    evaluations: int,
    start: float,
) -> Solution:
    return Solution(
        x,
        np.full((len(residual), len(x)), math.nan),
        np.array(residual),
        np.array(sigmas),
        reason,
        evaluations,
        time.perf_counter() - start,
    )
