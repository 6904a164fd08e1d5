"""Linear algebra of batches of images: each (C, H, W) of a batch (B, C, H, W) is one vector.

A complex image is the vector of its real and imaginary parts, with the real inner product

    <a, b> = Re(sum conj(a) b)

Reference for conjugate gradients: Hestenes and Stiefel, J. Research NBS 49 (1952), equations 3:1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from patchscore.randomness import standard_normal

POWER_ITERATIONS = 50
POWER_TOLERANCE = 3e-4
TOLERANCE = 1e-6
CONJUGATE_GRADIENT_STEPS = 1000


def expand(values: Tensor, dimensions: int = 4) -> Tensor:
    """One number for each image, ready to multiply images: (B,) -> (B, 1, 1, 1)."""
    return values.view(-1, *[1] * (dimensions - 1))


def tweedie(x: Tensor, score: Tensor, sigma: Tensor) -> Tensor:
    """x + sigma^2 s, with sigma of (B,): its square alone may be no number in float32."""
    return x + expand(sigma) * (expand(sigma) * score)


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


class Solved(NamedTuple):
    """The solution of a linear system, as far as it was reached.

    Attributes
    ----------
    x : the solution, image by image
    residual : (B,) |right - left(x)| / |right|, as the recursion has it
    steps : how often the map was applied
    converged : whether every residual is below the tolerance
    """

    x: Tensor
    residual: Tensor
    steps: int
    converged: bool


def conjugate_gradients(
    left: Callable[[Tensor], Tensor],
    right: Tensor,
    *,
    tolerance: float = TOLERANCE,
    max_steps: int = CONJUGATE_GRADIENT_STEPS,
) -> Solved:
    """Solve left(x) = right for a symmetric positive definite map, image by image, from x = 0.

    It stops at a residual of ``tolerance``, but not below ten roundings, or after ``max_steps``. From
    another start, solve for the difference to it.
    """
    tiny, rounding = torch.finfo(right.dtype).tiny, torch.finfo(right.dtype).eps
    x, residual, direction = torch.zeros_like(right), right, right
    size = norm(right)
    goal = max(tolerance, 10 * rounding) * size
    energy = dot(right, right)
    steps = 0
    while steps < max_steps and bool((energy.sqrt() > goal).any()):
        image = left(direction)
        steps += 1
        step = expand(energy / dot(direction, image).clamp_min(tiny), x.ndim)
        x = x + step * direction
        residual = residual - step * image
        previous, energy = energy, dot(residual, residual)
        direction = residual + expand(energy / previous.clamp_min(tiny), x.ndim) * direction
    reached = energy.sqrt()
    return Solved(x, reached / size.clamp_min(tiny), steps, bool((reached <= goal).all()))
