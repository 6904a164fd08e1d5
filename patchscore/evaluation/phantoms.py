"""Synthetic data with known truth: random disks and rectangles, and densities in one dimension.

A phantom is b + (f - b) a_ij, where a_ij is the fraction of pixel (i, j) that the shape covers. If the
shape extends from lower(t) to upper(t) at abscissa t, this is a mixed difference over the corners of the
pixel,

    a_ij = D_x D_y F,    F(x, y) = integral up to x of clip(y, lower(t), upper(t)) dt,

with a closed form for disks and rotated rectangles, so partial volumes are exact. A mixture of normal
densities blurred by noise of level sigma is again a mixture,

    p_sigma(x) = sum_k w_k N(x; m_k, s_k^2 + sigma^2).

Reference: the phantoms and the one-dimensional examples follow J. A. Fessler's 2023 talk on
patch-based score priors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from patchscore.checks import check_counts, check_positive
from patchscore.errors import InputError
from patchscore.randomness import standard_normal

# About what fits in the cache of one core: drawing a chunk takes some fifty passes over it.
CORNERS_PER_CHUNK = 65_536
TINY = torch.finfo(torch.float64).tiny

# F at the corners, (B, size + 1, size + 1), from abscissas and ordinates relative to the centre,
# (B, 1, size + 1) and (B, size + 1, 1), and the parameters of the shape, (B, 1, 1) each.
Cumulative = Callable[..., Tensor]


def disks(
    count: int,
    size: int = 16,
    *,
    center: tuple[float, float] = (0.3, 0.7),
    radius: tuple[float, float] = (0.1, 0.3),
    background: tuple[float, float] = (1.0, 0.1),
    foreground: tuple[float, float] = (1.0, 0.03),
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator,
) -> Tensor:
    """Images of one random disk each: (count, 1, size, size), on the generator's device.

    Parameters
    ----------
    count, size
        The number of images, and their side in pixels.
    center, radius
        Ranges of both coordinates of the centre and of the radius, which are uniform, in units of the
        image's side. With the defaults every disk is inside its image.
    background, foreground
        Mean and standard deviation of the two values of an image, which are normal and independent.
    generator
        All randomness: the same seed gives the same images.

    Raises
    ------
    InputError
        If a number or a range cannot be used.

    Notes
    -----
    The covered fractions are exact up to rounding in float64, below 1e-15 size^2.
    """
    _check(count, size, background, foreground, center=center, radius=radius)
    centers = size * _uniform((count, 2), center, generator)
    radii = size * _uniform((count, 1), radius, generator)
    return _images(_disk, centers, radii, size, background, foreground, dtype, generator)


def rectangles(
    count: int,
    size: int = 16,
    *,
    center: tuple[float, float] = (0.3, 0.7),
    sides: tuple[float, float] = (0.2, 0.7),
    angle: tuple[float, float] = (0.0, math.pi / 2),
    background: tuple[float, float] = (1.0, 0.1),
    foreground: tuple[float, float] = (1.0, 0.03),
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator,
) -> Tensor:
    """Images of one random rectangle each: (count, 1, size, size), on the generator's device.

    Parameters
    ----------
    sides
        Range of both side lengths, which are uniform, in units of the image's side. A corner may lie
        outside the image.
    angle
        Range of the orientation in radians, within a quarter turn. The default gives all orientations,
        since both sides have the same range.
    count, size, center, background, foreground, generator
        As for :func:`disks`, with the same accuracy.

    Raises
    ------
    InputError
        If a number or a range cannot be used.
    """
    _check(count, size, background, foreground, center=center, sides=sides, angle=angle)
    if angle[1] > math.pi / 2:
        raise InputError(
            f"angle is {angle}; expected a range in radians from 0 to {math.pi / 2:.4f}, which gives "
            "all orientations, since both sides have the same range."
        )
    centers = size * _uniform((count, 2), center, generator)
    half_sides = size / 2 * _uniform((count, 2), sides, generator)
    angles = _uniform((count, 1), angle, generator)
    shapes = torch.cat([half_sides, angles], dim=1)
    return _images(_rectangle, centers, shapes, size, background, foreground, dtype, generator)


def gamma_sample(count: int, *, shape: float, scale: float, generator: torch.Generator) -> Tensor:
    """Samples of p(x) = x^(shape - 1) exp(-x / scale), normalised: (count,), in float64.

    Raises
    ------
    InputError
        If a number is not positive.
    """
    check_positive(count=count, shape=shape, scale=scale)
    # PyTorch's own gamma distribution takes no generator.
    seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
    return torch.from_numpy(np.random.default_rng(seed).gamma(shape, scale, count)).to(generator.device)


@dataclass(frozen=True, eq=False)
class ScalarMixture:
    """A mixture of normal densities in one dimension, known exactly at every noise level.

    ``weights``, ``means`` and ``stds`` are (K,) tensors; the weights are positive and are normalised.
    They may carry gradients, so the mixture can be fitted.

    Raises
    ------
    InputError
        If they differ in shape, are not finite, or a weight or a standard deviation is not positive.
    """

    weights: Tensor
    means: Tensor
    stds: Tensor

    def __post_init__(self) -> None:
        shapes = [tuple(t.shape) for t in (self.weights, self.means, self.stds)]
        if len(set(shapes)) > 1 or len(shapes[0]) != 1 or not shapes[0][0]:
            raise InputError(
                f"weights, means and stds have shapes {shapes}; expected one number of each per "
                "component."
            )
        if not self.means.isfinite().all():
            raise InputError(f"means is {self.means.tolist()}; expected finite numbers.")
        for name, values in (("weights", self.weights), ("stds", self.stds)):
            if not ((values > 0) & values.isfinite()).all():
                raise InputError(f"{name} is {values.tolist()}; expected positive, finite numbers.")

    def sample(self, count: int, *, generator: torch.Generator) -> Tensor:
        """Independent samples: (count,)."""
        k = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        return self.means[k] + self.stds[k] * standard_normal(self.means[k], generator)

    def log_prob(self, x: Tensor, sigma: float | Tensor = 0.0) -> Tensor:
        """log p_sigma(x), of the shape of x; ``sigma`` is one noise level, or broadcasts with x."""
        return self._log_components(x, sigma)[0].logsumexp(-1)

    def score(self, x: Tensor, sigma: float | Tensor = 0.0) -> Tensor:
        """(d/dx) log p_sigma(x) = sum_k P(k | x) (m_k - x) / (s_k^2 + sigma^2), of the shape of x."""
        log_components, variance = self._log_components(x, sigma)
        return (log_components.softmax(-1) * (self.means - x[..., None]) / variance).sum(-1)

    def _log_components(self, x: Tensor, sigma: float | Tensor) -> tuple[Tensor, Tensor]:
        """log w_k N(x; m_k, v_k), and v_k = s_k^2 + sigma^2, with components last."""
        sigma = torch.as_tensor(sigma, dtype=self.stds.dtype, device=self.stds.device)
        if not ((sigma >= 0) & (sigma < math.inf)).all():
            raise InputError(f"sigma is {sigma.tolist()}; a noise level is finite and not negative.")
        variance = self.stds.square() + sigma.square()[..., None]
        log_normal = -0.5 * (
            (x[..., None] - self.means).square() / variance + (2 * math.pi * variance).log()
        )
        return self.weights.log().log_softmax(0) + log_normal, variance


def _disk(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """F for upper(t) = -lower(t) = h(t) = sqrt(r^2 - t^2), up to a function of y, which D_x removes.

    This is y t for t up to c(y) = sqrt(r^2 - y^2), and sign(y) H(t) beyond, H the integral of h.
    """
    c = (r.square() - y.square()).clamp_min(0).sqrt()

    def integral(t: Tensor) -> Tensor:
        t = t.clamp(-r, r)
        return 0.5 * (t * (r.square() - t.square()).sqrt() + r.square() * (t / r.clamp_min(TINY)).asin())

    inside = integral(c)
    whole = integral(x)
    return y.sign() * (whole - whole.clamp(-inside, inside)) + y * x.clamp(-c, c)


def _rectangle(x: Tensor, y: Tensor, a: Tensor, b: Tensor, angle: Tensor) -> Tensor:
    """F as a sum over edges: clip(y, lower, upper) is lower + (y - lower)_+ - (y - upper)_+.

    The half sides are a and b. From g_0 to g_1 the positive part of a linear function has the mean
    (g_0+ + g_1+)^2 / (2 |g_0| + 2 |g_1|), without cancellation.
    """
    along = a * angle.cos(), a * angle.sin()
    across = b * angle.sin(), -b * angle.cos()
    left = [-p - q for p, q in zip(along, across, strict=True)]
    bottom = [-p + q for p, q in zip(along, across, strict=True)]
    top = [-value for value in bottom]
    total = torch.zeros(())
    for sign, start, step in (
        (1, left, across),
        (1, bottom, along),
        (-1, left, along),
        (-1, top, across),
    ):
        width, rise = 2 * step[0], 2 * step[1]
        length = torch.minimum((x - start[0]).clamp_min(0), width)
        g0 = y - start[1]
        g1 = g0 - length / width.clamp_min(TINY) * rise
        positive = g1.clamp_min(0).add_(g0.clamp_min(0)).square_()
        total = total + positive.div_(g1.abs_().add_(g0.abs() + TINY)).mul_(0.5 * sign * length)
    return total


def _images(
    cumulative: Cumulative,
    centers: Tensor,
    shapes: Tensor,
    size: int,
    background: tuple[float, float],
    foreground: tuple[float, float],
    dtype: torch.dtype,
    generator: torch.Generator,
) -> Tensor:
    """Draw shapes on their background, in chunks; all random numbers are drawn before."""
    base = _normal(len(centers), background, generator)
    contrast = _normal(len(centers), foreground, generator) - base
    images = torch.empty((len(centers), 1, size, size), dtype=dtype, device=centers.device)
    corners = torch.arange(size + 1, dtype=torch.float64, device=centers.device)
    chunk = max(1, CORNERS_PER_CHUNK // len(corners) ** 2)
    for start in range(0, len(images), chunk):
        these = slice(start, start + chunk)
        x, y = (corners - center[:, None] for center in centers[these].unbind(1))
        shape = (parameter[:, None, None] for parameter in shapes[these].unbind(1))
        area = cumulative(x[:, None, :], y[:, :, None], *shape).diff(dim=1).diff(dim=2).clamp_(0, 1)
        images[these, 0] = torch.addcmul(base[these], contrast[these], area).to(dtype)
    return images


def _uniform(shape: tuple[int, ...], limits: tuple[float, float], generator: torch.Generator) -> Tensor:
    u = torch.rand(shape, dtype=torch.float64, device=generator.device, generator=generator)
    return limits[0] + (limits[1] - limits[0]) * u


def _normal(count: int, moments: tuple[float, float], generator: torch.Generator) -> Tensor:
    z = torch.randn((count, 1, 1), dtype=torch.float64, device=generator.device, generator=generator)
    return moments[0] + moments[1] * z


def _check(
    count: int,
    size: int,
    background: tuple[float, float],
    foreground: tuple[float, float],
    **ranges: tuple[float, float],
) -> None:
    check_counts(count=count, size=size)
    for name, (low, high) in ranges.items():
        if not 0 <= low <= high < math.inf:
            raise InputError(f"{name} is {low, high}; expected a range, lowest first, of at least 0.")
    for name, (mean, std) in (("background", background), ("foreground", foreground)):
        if not (math.isfinite(mean) and 0 <= std < math.inf):
            raise InputError(f"{name} is {mean, std}; expected a mean and a standard deviation.")
