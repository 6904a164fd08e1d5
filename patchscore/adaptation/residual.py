"""What a denoiser leaves of an image, and whether noise that is white and of the level given would.

If D is the posterior mean, the residual r = y - D(y) has, with its derivative J = dD/dy,

    E r r' = sigma^2 (I - E J)

(the second-order Tweedie formula, as cov(x | y) = sigma^2 J). So its size and its correlation between
neighbours say whether the noise is white and of this level, and its size in bright and in dark places
whether it depends on the signal, as photon noise and speckle do. Traces are taken by probes of random
signs (:mod:`patchscore.adaptation.risk`).

Reference: Efron, J. American Statistical Association 106 (2011), section 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from patchscore.adaptation.risk import Response
from patchscore.measurements.noise import estimated_sigma

# A residual outside of these is not that of the noise that was given. They are between what white noise
# of the right level leaves, but for 2 % of images, and other noise: python -m benchmarks.residuals.
VARIANCES = 0.75, 1.25
# Narrower, if the finest wavelet coefficients say the same: a pattern that the prior does not know can
# change the one as much as a wrong level does, but not the other, which is too high on fine texture.
DOUBTED, WITNESS = (0.94, 1.05), 1.05
BRIGHT_OVER_DARK = 0.81, 1.14
# Both but the first widened by so many standard errors of Gaussian noise on as many pixels.
STANDARD_ERRORS = 2.0
CORRELATION = 0.1
# The share of pixels at the ends of the range that forbids to trust the risk.
CLIPPED = 0.003


class Residual(NamedTuple):
    """What is left of an image, beside what noise that is white and of the level given would leave.

    Attributes
    ----------
    variance : the mean square of the residual over what is expected, 1 if all is right
    correlation
        Between neighbours in a column and in a row, above what is expected, in units of sigma^2; 0 if
        the noise is white.
    bright_over_dark
        The variance where the estimate is in its highest quarter, over that in its lowest; 1 if the
        noise does not depend on the signal.
    clipped : the share of further pixels that have the lowest or the highest value of the image
    witness : the noise level by wavelets over the one given
    pixels : how many values there are
    """

    variance: float
    correlation: tuple[float, float]
    bright_over_dark: float
    clipped: float
    witness: float
    pixels: int


def look_at_residual(response: Response, y: Tensor, sigma: float, probes: Tensor) -> Residual:
    """Compare the residual with what white noise of this level would leave."""
    r = (y - response.estimate) / sigma
    trace = (probes * response.moves).mean()
    correlation = []
    for axis in (-2, -1):
        ahead, behind = (slice(1, None), slice(None, -1))
        found = _along(r, axis, ahead).mul(_along(r, axis, behind)).mean()
        # J is symmetric for the gradient of a potential; the mean of both sides serves any score.
        both = _along(probes, axis, ahead) * _along(response.moves, axis, behind)
        both = both + _along(probes, axis, behind) * _along(response.moves, axis, ahead)
        correlation.append(float(found + both.mean() / 2))
    extreme = int(((y == y.amin()) | (y == y.amax())).sum())
    expected = (1 - trace).clamp_min(1e-3)
    return Residual(
        float(r.square().mean() / expected),
        (correlation[0], correlation[1]),
        _bright_over_dark(r, response, probes),
        max(0, extreme - 2) / y.numel(),  # every image has a lowest and a highest pixel
        estimated_sigma(y[0].double().cpu().numpy(), 0) / sigma,
        y.numel(),
    )


def _bright_over_dark(r: Tensor, response: Response, probes: Tensor) -> float:
    """The ratio of the variances in the brightest and in the darkest quarter, each over its own J."""
    level = response.estimate.flatten()
    quarter = max(1, len(level) // 4)
    order = level.argsort()
    squares = r.square().flatten()
    left = (1 - (probes * response.moves).mean(0)).flatten()
    bright, dark = (
        squares[part].mean() / left[part].mean().clamp_min(1e-3)
        for part in (order[-quarter:], order[:quarter])
    )
    return float(bright / dark.clamp_min(1e-12))


def suspicions(residuals: Sequence[Residual]) -> tuple[tuple[str, ...], str | None]:
    """What may be wrong with the noise of images, and why their risk cannot be trusted, in words."""
    warnings, obstacle = [], None
    for number, residual in enumerate(residuals):
        name = f"image {number}: " if len(residuals) > 1 else ""
        if residual.clipped > CLIPPED:
            obstacle = (
                "the image is clipped, so the noise is not Gaussian and the risk cannot be estimated"
            )
            warnings.append(
                f"{name}{100 * residual.clipped:.1f} % of the pixels have the lowest or the highest "
                "value: the image seems clipped, and clipped noise is not Gaussian"
            )
        if max(map(abs, residual.correlation)) > CORRELATION:
            warnings.append(
                f"{name}the residual of neighbouring pixels is correlated by "
                f"{residual.correlation[0]:+.2f} in columns and {residual.correlation[1]:+.2f} in rows: "
                "the noise is not white"
            )
            obstacle = "the noise does not look white, so the risk cannot be estimated"
        # The standard error of a mean of n squares, and of one of two n / 4 over the other.
        chance = STANDARD_ERRORS * math.sqrt(2 / residual.pixels)
        if _outside(residual.bright_over_dark, BRIGHT_OVER_DARK, math.sqrt(8) * chance):
            warnings.append(
                f"{name}the residual has {residual.bright_over_dark:.2f} times the variance in bright "
                "places that it has in dark ones: the noise depends on the signal, as speckle does"
            )
            obstacle = "the noise seems to depend on the signal, so the risk cannot be estimated"
        doubted = _outside(residual.variance, DOUBTED, chance)
        confirmed = (residual.variance > 1) == (residual.witness > WITNESS)
        if (doubted and confirmed) or _outside(residual.variance, VARIANCES):
            word = "more" if residual.variance > 1 else "less"
            warnings.append(
                f"{name}the residual has {residual.variance:.2f} times the variance that is expected: "
                f"there is {word} noise than sigma says, or the prior does not know such images"
            )
            obstacle = "the residual is not that of noise of this level, so the risk cannot be estimated"
    return tuple(warnings), obstacle


def _outside(value: float, bounds: tuple[float, float], chance: float = 0.0) -> bool:
    return not bounds[0] - chance < value < bounds[1] + chance


def _along(values: Tensor, axis: int, part: slice) -> Tensor:
    return values[..., part, :] if axis == -2 else values[..., part]
