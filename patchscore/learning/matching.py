"""Objectives whose minimiser is the score.

Denoising score matching at the noise level sigma, y = x + sigma z, z ~ N(0, I):

    J(sigma) = E | s(y, sigma) + z / sigma |^2

is the explicit score matching objective E | s - grad log p_sigma |^2 up to a constant (Vincent, Neural
Computation 23 (2011), equation 9-11), so its minimiser is the score of the blurred density p_sigma.
Over many noise levels the terms are weighted by sigma^2, which makes them of one size (Song and Ermon,
NeurIPS 2019, equation 6):

    sum_sigma sigma^2 J(sigma) = E | sigma s(y, sigma) + z |^2 = E | denoise(y, sigma) - x |^2 / sigma^2
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchscore.priors.prior import PatchPrior


def denoising_score_matching(
    prior: PatchPrior, clean: Tensor, sigma: Tensor, *, generator: torch.Generator
) -> Tensor:
    """E | sigma s(x + sigma z, sigma) + z |^2 per pixel, over the pixels that have all their cliques.

    ``clean`` is (B, C, H, W) and ``sigma`` (B,), in one unit; the noise comes from ``generator``, on
    the generator's device. Returns a scalar; 1 is the loss of doing nothing (a score of zero).
    """
    z = torch.randn(clean.shape, generator=generator, device=generator.device, dtype=clean.dtype).to(
        clean.device
    )
    levels = sigma[:, None, None, None]
    residual = levels * prior.score(clean + levels * z, sigma) + z
    return prior.interior(residual).square().mean()
