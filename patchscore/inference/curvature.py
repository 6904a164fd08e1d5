"""The largest curvature of a log density, which bounds the steps of all that climbs or walks on it.

    L = max_v |J v| / |v|,    J = the Jacobian of the score

Gradient ascent and Langevin steps x + h s(x) are stable for h < 2 / L. L is found by power iteration,
with J v from central differences of the score, so that neither autograd nor a potential is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from patchscore.noise import noise_levels, standard_normal

if TYPE_CHECKING:
    from patchscore.inference.posterior import ScoreModel

ITERATIONS = 50
TOLERANCE = 3e-4


def largest_eigenvalue(apply: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """The largest |eigenvalue| of a symmetric map of images, one for each: (B,).

    By power iteration from a random image: an estimate from below, stopped when it grows by less than
    three parts in ten thousand.
    """
    v = standard_normal(like, torch.Generator().manual_seed(0))
    value = like.new_zeros(len(like))
    for _ in range(ITERATIONS):
        v = v / _norm(v).clamp_min(torch.finfo(v.dtype).tiny)
        v = apply(v)
        previous, value = value, _norm(v).flatten()
        if bool((value <= (1 + TOLERANCE) * previous).all()):
            break
    return value


def curvature(model: ScoreModel, x: Tensor, sigma: float | Tensor) -> Tensor:
    """L at x, (B, C, H, W) -> (B,), in one over the squared unit of the image.

    A local value: elsewhere the curvature may be larger.
    """
    # A difference of this size is lost neither in rounding nor in higher orders (the score bends over
    # distances of sigma).
    size: Tensor = torch.finfo(x.dtype).eps ** (1 / 3) * noise_levels(sigma, x)[:, None, None, None]
    size = size * x[0].numel() ** 0.5

    def jacobian(v: Tensor) -> Tensor:
        difference = model.score(x + size * v, sigma) - model.score(x - size * v, sigma)
        return difference / (2 * size)

    return largest_eigenvalue(jacobian, x)


def _norm(v: Tensor) -> Tensor:
    norm: Tensor = v.square().sum((1, 2, 3), keepdim=True).sqrt()
    return norm
