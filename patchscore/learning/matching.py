"""Objectives that are minimised by the score s of the blurred density p_sigma.

All equal the Fisher divergence between model and data, in units of the noise and per pixel,

    F(s) = sigma^2 E_y | s(y, sigma) - grad log p_sigma(y) |^2,        y = x + sigma z,  z ~ N(0, I),

up to a constant that does not depend on s. They differ in what they need:

    denoising    clean images x only
    SURE         noisy images y of known noise level only
    Noise2Score  noisy images y of known noise level only, and no divergence

Every objective takes crops and one noise level per crop, and returns a scalar: the mean over the pixels
with all their cliques. :func:`patchscore.fit` draws the levels from a range, which trains at all of them
with weight sigma^2 (Song and Ermon, NeurIPS 2019, equation 6).

References: Vincent, Neural Computation 23 (2011); Stein, Annals of Statistics 9 (1981); Hyvarinen, JMLR
6 (2005); Song, Garg, Shi and Ermon, UAI 2019 (random projections); Kim and Ye, NeurIPS 2021
(Noise2Score).
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchscore.linear_algebra import dot, expand
from patchscore.priors.trainable import Trainable
from patchscore.randomness import standard_normal

# The noise that Noise2Score adds, as a fraction of the noise of the image.
LEAST_ADDED, MOST_ADDED = 0.1, 1.0


def denoising_score_matching(
    prior: Trainable, clean: Tensor, sigma: Tensor, *, generator: torch.Generator
) -> Tensor:
    """E | sigma s(x + sigma z, sigma) + z |^2, from clean images.

    Given x, y is Gaussian with the score -z / sigma, and the mean of that given y is the score of
    p_sigma. So the cross term of the square is that of F, and the rest does not depend on s (Vincent
    2011, equations 9 to 11). The loss equals E | denoise(y) - x |^2 / sigma^2, which is 1 for a score
    of zero.

    ``clean`` is (B, C, H, W) and ``sigma`` (B,), in one unit. ``generator`` draws on its own device.
    """
    z = standard_normal(clean, generator)
    levels = expand(sigma)
    residual = levels * prior.score(clean + levels * z, sigma) + z
    return prior.interior(residual).square().mean()


def sure(prior: Trainable, noisy: Tensor, sigma: Tensor, *, generator: torch.Generator) -> Tensor:
    """Stein's unbiased estimate of E | denoise(y) - x |^2 / sigma^2, from noisy images alone.

    For y = x + sigma z with any x, and denoise(y) = y + sigma^2 s(y, sigma),

        E | denoise(y) - x |^2 = n sigma^2 + sigma^4 E [ |s|^2 + 2 div s ]

    (Stein 1981, theorem 1). This is implicit score matching (Hyvarinen 2005, theorem 1) on the noisy
    images as they are. The divergence is estimated by one random projection per crop, v' (ds/dy) v with
    random signs v (Song et al. 2019, section 3.2). ``sigma`` is the noise level of ``noisy``: call
    :func:`patchscore.fit` with ``sigmas=(level, level)``.

    Biased if the level is wrong, or if the noise is not white and Gaussian.
    """
    y = noisy.detach().requires_grad_()
    with torch.autocast(y.device.type, enabled=False):  # in full precision, since the terms cancel
        score = prior.score(y, sigma)
    signs = torch.randint(0, 2, score.shape, generator=generator, device=generator.device)
    v = torch.zeros_like(score)
    prior.interior(v).copy_(prior.interior(2 * signs.to(score) - 1))
    (gradient,) = torch.autograd.grad(score, y, v, create_graph=True)
    divergence = dot(gradient, v) / prior.interior(v[0]).numel()
    squared = prior.interior(score).square().flatten(1).mean(1)
    return 1 + (sigma**2 * (squared + 2 * divergence)).mean()


def noise2score(prior: Trainable, noisy: Tensor, sigma: Tensor, *, generator: torch.Generator) -> Tensor:
    """E | tau s(y + tau z, (sigma^2 + tau^2)^(1/2)) + z |^2, from noisy images alone.

    Denoising score matching with the noisy images in place of clean ones: additional noise of level tau
    gives samples at level (sigma^2 + tau^2)^(1/2), and their score is learned. tau is log-uniform from
    a tenth of sigma to sigma. A network that sees patches in units of the noise can then be used at
    sigma as well (Kim and Ye 2021 let tau fall to zero instead). ``sigma`` is the noise level of
    ``noisy``: call :func:`patchscore.fit` with ``sigmas=(level, level)``.

    Unreliable for a prior without scale invariance, because it is never trained at level sigma.
    """
    u = torch.rand(len(noisy), generator=generator, device=generator.device, dtype=noisy.dtype)
    tau = LEAST_ADDED * sigma * (MOST_ADDED / LEAST_ADDED) ** u.to(noisy.device)
    z = standard_normal(noisy, generator)
    added = expand(tau)
    residual = added * prior.score(noisy + added * z, (sigma**2 + tau**2).sqrt()) + z
    return prior.interior(residual).square().mean()
