"""Linear algebra of batches of images: each (C, H, W) of a batch (B, C, H, W) is one vector.

A complex image is the vector of its real and imaginary parts, with the real inner product

    <a, b> = Re(sum conj(a) b)

Reference for conjugate gradients: Hestenes and Stiefel, J. Research NBS 49 (1952), equations 3:1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from patchscore.errors import InputError
from patchscore.randomness import standard_normal

POWER_ITERATIONS = 50
POWER_TOLERANCE = 3e-4
CONJUGATE_GRADIENT_STEPS = 1000


def expand(values: Tensor) -> Tensor:
    """One number for each image, ready to multiply images: (B,) -> (B, 1, 1, 1)."""
    return values[:, None, None, None]


def dot(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> of each image, real: (B, C, H, W) -> (B,)."""
    return (a.conj() * b).real.flatten(1).sum(1)


def norm(x: Tensor) -> Tensor:
    """|x| of each image: (B, C, H, W) -> (B,)."""
    return dot(x, x).sqrt()


def dimension(x: Tensor) -> int:
    """How many real numbers an image of (B, C, H, W) has: C H W, twice that if it is complex."""
    return x[0].numel() * (2 if x.is_complex() else 1)


def components(x: Tensor) -> Tensor:
    """The real numbers of a tensor: (...), or (..., 2) if it is complex."""
    return torch.view_as_real(x) if x.is_complex() else x


def as_vectors(x: Tensor) -> Tensor:
    """The real numbers of each image: (B, C, H, W) -> (B, dimension)."""
    return components(x).flatten(1)


def rms(x: Tensor) -> Tensor:
    """The root mean square of each image, over all real numbers in it: (B, C, H, W) -> (B,)."""
    return norm(x) / math.sqrt(dimension(x))


def largest_eigenvalue(apply: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """The largest |eigenvalue| of a symmetric map of images, one for each: (B,).

    By power iteration from a random image: an estimate from below, stopped when it grows by less than
    three parts in ten thousand.
    """
    v = standard_normal(like, torch.Generator().manual_seed(0))
    tiny = torch.finfo(v.dtype).tiny
    value = norm(v).new_zeros(len(like))
    for _ in range(POWER_ITERATIONS):
        v = apply(v / expand(norm(v).clamp_min(tiny)))
        previous, value = value, norm(v)
        if bool((value <= (1 + POWER_TOLERANCE) * previous).all()):
            break
    return value


def conjugate_gradients(left: Callable[[Tensor], Tensor], right: Tensor, x: Tensor) -> Tensor:
    """Solve left(x) = right for a symmetric positive definite map, image by image, from a first guess.

    Raises :class:`InputError` if it has not converged to rounding in 1000 steps.
    """
    tiny = torch.finfo(x.dtype).tiny
    tolerance = 10 * torch.finfo(x.dtype).eps * norm(right)
    residual = right - left(x)
    direction, energy = residual, dot(residual, residual)
    for _ in range(CONJUGATE_GRADIENT_STEPS):
        if bool((energy.sqrt() <= tolerance).all()):
            return x
        image = left(direction)
        step = expand(energy / dot(direction, image).clamp_min(tiny))
        x = x + step * direction
        residual = residual - step * image
        previous, energy = energy, dot(residual, residual)
        direction = residual + expand(energy / previous.clamp_min(tiny)) * direction
    raise InputError(
        f"the linear system of the data did not converge in {CONJUGATE_GRADIENT_STEPS} steps of "
        "conjugate gradients: the operator is too badly conditioned for this noise level; scale it to a "
        "norm of about one, or give a larger noise_std."
    )
