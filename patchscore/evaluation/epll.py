"""Denoising by expected patch log likelihood (EPLL), with half-quadratic splitting.

    minimise    n / (2 sigma^2) |x - y|^2 - sum_c log p(G_c x)

alternately over the image x and one auxiliary patch z_c for each G_c x, with b growing from 1 / sigma^2:

    z_c = argmax_z  log p(z) - b/2 |z - G_c x|^2       (Wiener filter of the most probable component)
    x   = (n / sigma^2 y + b sum_c G_c' z_c) / (n / sigma^2 + b n)

Reference: Zoran and Weiss, "From learning models of natural image patches to whole image restoration",
ICCV 2011, equations 2-6, with the constants of their code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchscore.checks import check_alike, noise_levels
from patchscore.errors import InputError
from patchscore.inference.splitting import half_quadratic_splitting
from patchscore.measurements.likelihoods import GaussianLikelihood
from patchscore.measurements.operators import Identity
from patchscore.priors.mixture import GaussianMixture
from patchscore.priors.patches import PatchGrid

# b sigma^2 of every step.
MULTIPLES = 1, 4, 8, 16, 32


@torch.no_grad()
def epll(noisy: Tensor, sigma: float | Tensor, mixture: GaussianMixture) -> Tensor:
    """Denoise by EPLL: (B, C, H, W) -> (B, C, H, W). Nothing is clipped.

    With b = multiple / sigma^2 for the multiples 1, 4, 8, 16 and 32, and a the average of the
    overlapping z_c, a step is

        x = (y + multiple a) / (1 + multiple)

    which is :func:`~patchscore.inference.splitting.half_quadratic_splitting` at rho = sigma /
    multiple^(1/2). As in the code of Zoran and Weiss, only patches inside the image are used, so pixels
    near the border are in fewer of them, and each patch is restored by the single component that is
    most probable under noise of variance 1 / b.

    Parameters
    ----------
    noisy
        y, (B, C, H, W), in the unit of the mixture.
    sigma
        The noise level in that unit: a number, () or (B,).
    mixture
        Of clean patches. As published: 200 components of 8 x 8 pixels with
        ``fit_mixture(..., zero_mean=True, brightness_invariant=True)``.

    Raises
    ------
    InputError
        If the image does not fit the mixture, or a number is not positive.

    Notes
    -----
    The schedule depends on sigma, so the result is poor if sigma is far off. EPLL estimates the mode,
    which is smoother than the posterior mean.
    """
    if noisy.ndim != 4 or noisy.shape[1] != mixture.channels:
        raise InputError(
            f"noisy has shape {tuple(noisy.shape)}; expected (B, C, H, W) with the {mixture.channels} "
            "channels of the mixture."
        )
    check_alike(noisy, mixture.like, name="noisy", holder="mixture")
    grid = PatchGrid(noisy.shape[-2:], mixture.patch_shape, "open")
    overlap = grid.overlap(noisy)

    def average(x: Tensor, rho: float) -> Tensor:
        return grid.apply(x, x.new_full((len(x),), rho), mixture.map_denoise) / overlap

    def restored(y: Tensor, level: float) -> Tensor:
        likelihood = GaussianLikelihood(y, Identity(), level)
        rhos = [level / multiple**0.5 for multiple in MULTIPLES]
        return half_quadratic_splitting(average, likelihood, y, sigmas=rhos, progress=False).x

    levels = noise_levels(sigma, noisy).tolist()
    return torch.cat([restored(y[None], level) for y, level in zip(noisy, levels, strict=True)])
