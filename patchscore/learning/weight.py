"""A factor on the score at each noise level, for an assembly that is right but for its size.

The factor that minimises the denoising score matching objective E | sigma alpha s(y, sigma) + z |^2 is

    alpha(sigma) = - E[ z' sigma s(y, sigma) ] / E | sigma s(y, sigma) |^2,      y = x + sigma z
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from patchscore.errors import InputError
from patchscore.images import ImageSource, random_crop, training_images
from patchscore.priors.prior import PatchPrior


def fit_score_weight(
    prior: PatchPrior,
    images: ImageSource,
    *,
    sigmas: Sequence[float],
    crop: int = 40,
    crops: int = 256,
    generator: torch.Generator | None = None,
) -> PatchPrior:
    """The same prior with the factor alpha(sigma) fitted on clean images, at each of the noise levels.

    Crops are taken as images of their own, under the boundary of the prior. The relative standard error
    of alpha is about (crop sqrt(crops))^-1 times a constant of order one. Between the levels it is
    interpolated, beyond them constant; the noise levels, and so the factor, are in the unit of the
    images: a prior with a factor that varies is no longer invariant to the amplitude.

    Raises
    ------
    InputError
        If the images do not fit, or a noise level is not positive.
    """
    levels = [float(sigma) for sigma in sigmas]
    if not levels or min(levels) <= 0:
        raise InputError(f"sigmas is {levels}; expected one or more positive noise levels.")
    generator = generator or torch.Generator().manual_seed(0)
    plain = prior.with_score_weight({})
    like = prior.network.like
    data = training_images(images, channels=prior.network.channels, smallest=crop)
    clean = torch.stack([random_crop(data, crop, generator) for _ in range(crops)]).to(like)
    weight = {}
    with torch.no_grad():
        for sigma in levels:
            z = torch.randn(clean.shape, generator=generator, dtype=like.dtype).to(like)
            score = sigma * plain.score(clean + sigma * z, sigma)
            weight[sigma] = float(-(z * score).sum() / score.square().sum())
    return prior.with_score_weight(weight)
