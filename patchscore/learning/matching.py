"""Objectives whose minimiser is the score s of the blurred density p_sigma.

All are the Fisher divergence between model and data, in units of the noise and per pixel,

    F(s) = sigma^2 E_y | s(y, sigma) - grad log p_sigma(y) |^2,        y = x + sigma z,  z ~ N(0, I),

up to a constant that does not depend on s; they differ in what they need to know:

    explicit     the target grad log p_sigma itself
    implicit     only samples y, but the divergence of s, exactly or by random projections
    denoising    only clean images x
    SURE         only noisy images y of known level
    Noise2Score  only noisy images y of known level, and no divergence

Every objective takes crops and one noise level for each, and returns a scalar: the mean over the pixels
that have all their cliques. Levels all equal train at one noise level; levels drawn from a range, as
:func:`patchscore.fit` does, train at all of them, weighted by sigma^2 (Song and Ermon, NeurIPS 2019,
equation 6).

References: Hyvarinen, JMLR 6 (2005); Vincent, Neural Computation 23 (2011); Song, Garg, Shi and Ermon,
UAI 2019 (sliced); Stein, Annals of Statistics 9 (1981); Kim and Ye, NeurIPS 2021 (Noise2Score).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from patchscore.priors.trainable import Trainable

# The noise that Noise2Score adds, as a fraction of the noise that is there.
LEAST_ADDED, MOST_ADDED = 0.1, 1.0


class Score(Protocol):
    """grad log p_sigma(y): (B, C, H, W) and (B,) -> (B, C, H, W)."""

    def __call__(self, y: Tensor, sigma: Tensor, /) -> Tensor:
        """The score."""


def denoising_score_matching(
    prior: Trainable, clean: Tensor, sigma: Tensor, *, generator: torch.Generator
) -> Tensor:
    """E | sigma s(x + sigma z, sigma) + z |^2, from clean images.

    Conditionally on x, y is Gaussian with the score -z / sigma, whose mean given y is that of p_sigma.
    The cross term of the square is therefore that of F, and the rest does not depend on s (Vincent 2011,
    equations 9 to 11). It equals E | denoise(y) - x |^2 / sigma^2; 1 is the loss of a score of zero.

    ``clean`` is (B, C, H, W) and ``sigma`` (B,), in one unit. The noise is drawn by ``generator`` on its
    own device.
    """
    z = _normal(clean, generator)
    levels = sigma[:, None, None, None]
    residual = levels * prior.score(clean + levels * z, sigma) + z
    return prior.interior(residual).square().mean()


def explicit_score_matching(
    prior: Trainable, clean: Tensor, sigma: Tensor, *, generator: torch.Generator, target: Score
) -> Tensor:
    """F(s) itself: sigma^2 E | s(y, sigma) - target(y, sigma) |^2.

    The target is the score of a known density, or that of the blurred training set (a kernel density
    estimate with a Gaussian kernel of width sigma). Bind it with ``functools.partial`` for
    :func:`patchscore.fit`.
    """
    levels = sigma[:, None, None, None]
    y = clean + levels * _normal(clean, generator)
    residual = levels * (prior.score(y, sigma) - target(y, sigma))
    return prior.interior(residual).square().mean()


def implicit_score_matching(
    prior: Trainable, clean: Tensor, sigma: Tensor, *, generator: torch.Generator
) -> Tensor:
    """sigma^2 E [ |s(y, sigma)|^2 + 2 div s(y, sigma) ], with the exact divergence.

    In F, the cross term -2 E[s' grad log p_sigma] is 2 E[div s] after integration by parts (Hyvarinen
    2005, theorem 1), so the target drops out: F plus a constant.

    One backward pass for every pixel: for small crops. Use :func:`sliced_score_matching` for others.
    """
    y = clean + sigma[:, None, None, None] * _normal(clean, generator)
    y, score = _differentiable_score(prior, y, sigma)
    basis = torch.eye(score[0].numel(), dtype=y.dtype, device=y.device).view(-1, 1, *score.shape[1:])
    inside = [e for e in basis if prior.interior(e).any()]
    divergence = torch.stack([_quadratic(y, score, e.expand_as(score)) for e in inside]).sum(0)
    return _implicit(prior, score, divergence / len(inside), sigma)


def sliced_score_matching(
    prior: Trainable, clean: Tensor, sigma: Tensor, *, generator: torch.Generator
) -> Tensor:
    """:func:`implicit_score_matching` with the divergence by a random projection, E[v' (ds/dy) v].

    v has independent signs, one projection for every crop (Song et al. 2019, section 3.2, with the norm
    term exact: "SSM-VR"; Hutchinson's estimator of a trace).
    """
    y = clean + sigma[:, None, None, None] * _normal(clean, generator)
    y, score = _differentiable_score(prior, y, sigma)
    return _implicit(prior, score, _projected_divergence(prior, y, score, generator), sigma)


def sure(prior: Trainable, noisy: Tensor, sigma: Tensor, *, generator: torch.Generator) -> Tensor:
    """Stein's unbiased estimate of E | denoise(y) - x |^2 / sigma^2, from noisy images alone.

    For y = x + sigma z with any x, and denoise(y) = y + sigma^2 s(y, sigma),

        E | denoise(y) - x |^2 = n sigma^2 + sigma^4 E [ |s|^2 + 2 div s ]

    (Stein 1981, theorem 1), which is implicit score matching on the noisy images as they are. The
    divergence is by a random projection. ``noisy`` has noise of the levels ``sigma``: give
    :func:`patchscore.fit` ``sigmas=(level, level)``.

    Fails if the level is wrong or the noise is not white and Gaussian: the estimate is then biased.
    """
    y, score = _differentiable_score(prior, noisy, sigma)
    return 1 + _implicit(prior, score, _projected_divergence(prior, y, score, generator), sigma)


def noise2score(prior: Trainable, noisy: Tensor, sigma: Tensor, *, generator: torch.Generator) -> Tensor:
    """E | tau s(y + tau z, (sigma^2 + tau^2)^(1/2)) + z |^2, from noisy images alone.

    Denoising score matching that takes the noisy images for clean ones: more noise of level tau makes
    samples of p at the level (sigma^2 + tau^2)^(1/2), whose score it finds. tau is log-uniform from a
    tenth of sigma to sigma, and the network, which sees patches in units of the noise, carries over to
    sigma itself (Kim and Ye 2021 reach it by letting tau fall to zero). ``noisy`` has noise of the
    levels ``sigma``: give :func:`patchscore.fit` ``sigmas=(level, level)``.

    Fails for a prior without scale invariance, which has never seen the level sigma itself.
    """
    u = torch.rand(len(noisy), generator=generator, device=generator.device, dtype=noisy.dtype)
    tau = LEAST_ADDED * sigma * (MOST_ADDED / LEAST_ADDED) ** u.to(noisy.device)
    z = _normal(noisy, generator)
    added = tau[:, None, None, None]
    residual = added * prior.score(noisy + added * z, (sigma**2 + tau**2).sqrt()) + z
    return prior.interior(residual).square().mean()


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    z = torch.randn(like.shape, generator=generator, device=generator.device, dtype=like.dtype)
    return z.to(like.device)


def _differentiable_score(prior: Trainable, y: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """y and s(y, sigma), ready for a divergence: in full precision, which differences of terms need."""
    y = y.detach().requires_grad_()
    with torch.autocast(y.device.type, enabled=False):
        return y, prior.score(y, sigma)


def _projected_divergence(
    prior: Trainable, y: Tensor, score: Tensor, generator: torch.Generator
) -> Tensor:
    """v' (ds/dy) v per pixel of the interior, for a random sign v there: (B,)."""
    signs = torch.randint(0, 2, score.shape, generator=generator, device=generator.device)
    v = torch.zeros_like(score)
    prior.interior(v).copy_(prior.interior(2 * signs.to(score) - 1))
    return _quadratic(y, score, v) / prior.interior(v[0]).numel()


def _quadratic(y: Tensor, score: Tensor, v: Tensor) -> Tensor:
    """v' (ds/dy) v for every image: (B,)."""
    (gradient,) = torch.autograd.grad(score, y, v, create_graph=True)
    return (gradient * v).flatten(1).sum(1)


def _implicit(prior: Trainable, score: Tensor, divergence: Tensor, sigma: Tensor) -> Tensor:
    """sigma^2 (|s|^2 + 2 div s) per pixel, from the divergence per pixel of every image."""
    squared = prior.interior(score).square().flatten(1).mean(1)
    return (sigma**2 * (squared + 2 * divergence)).mean()
