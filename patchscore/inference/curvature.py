"""The largest curvature of a log density, which limits the step size of optimisers and samplers.

    L = max_v |J v| / |v|,    J = the Jacobian of the score

Gradient ascent and Langevin steps x + h s(x) are stable for h < 2 / L. A density that is blurred by
sigma has L <= 1 / sigma^2: its Jacobian is (Cov[x | x_sigma] / sigma^2 - I) / sigma^2, and no covariance
is negative. Where no bound is known, L is found by power iteration, with J v from central differences of
the score, so that neither autograd nor a potential is needed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from patchscore.checks import noise_levels
from patchscore.linear_algebra import dimension, expand, largest_eigenvalue
from patchscore.protocols import Bounded, Score


class Curvature(NamedTuple):
    """L of each image, (B,), in one over the squared unit, and how many scores it took to find it."""

    value: Tensor
    evaluations: int


def curvature_bound(model: Score, x: Tensor, sigma: float) -> Curvature:
    """The bound that the model knows (``model.curvature_bound``), else the curvature measured at x.

    One number for all images. A learned score may exceed its bound where it is not the score of any
    density.
    """
    if isinstance(model, Bounded):
        return Curvature(x.real.new_full((len(x),), model.curvature_bound(sigma)), 0)
    measured = curvature(model, x, sigma)
    return measured._replace(value=measured.value.max().expand(len(x)))


def curvature(model: Score, x: Tensor, sigma: float | Tensor) -> Curvature:
    """L at x: (B, C, H, W) -> (B,).

    A local value: the curvature may be larger elsewhere.
    """
    # Large against rounding, and small against sigma, over which the score bends.
    size: Tensor = torch.finfo(x.dtype).eps ** (1 / 3) * expand(noise_levels(sigma, x))
    size = size * dimension(x) ** 0.5
    evaluations = 0

    def jacobian(v: Tensor) -> Tensor:
        nonlocal evaluations
        evaluations += 2
        difference = model.score(x + size * v, sigma) - model.score(x - size * v, sigma)
        return difference / (2 * size)

    value = largest_eigenvalue(jacobian, x)
    return Curvature(value, evaluations)
