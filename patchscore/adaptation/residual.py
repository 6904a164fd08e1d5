"""The residual of a denoised image, and whether white noise of the given level explains it.

If D is the posterior mean and J = dD/dy its derivative, the residual r = y - D(y) satisfies

    E r r' = sigma^2 (I - E J)

(the second-order Tweedie formula, since cov(x | y) = sigma^2 J). So its variance and its correlation
between neighbours test whether the noise is white and has this level, and its variance in bright and in
dark places tests whether the noise depends on the signal, as photon noise and speckle do. Traces are
estimated with probes of random signs (:mod:`patchscore.adaptation.risk`).

Overestimating sigma by 10 % on fine texture is the hardest error to detect.

Reference: Efron, J. American Statistical Association 106 (2011), section 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from patchscore.adaptation.risk import Response
from patchscore.measurements.noise import estimated_sigma

# A residual outside these bounds is not explained by the given noise. They separate white noise of the
# right level, with a false-positive rate of 2 %, from other noise: python -m benchmarks residuals.
VARIANCES = 0.75, 1.25
# Narrower bounds, used if the finest wavelet coefficients agree. A pattern that the prior does not know
# changes the variance as much as a wrong level does, but not the wavelet estimate, which is too high on
# fine texture.
DOUBTED, WITNESS = (0.94, 1.05), 1.05
BRIGHT_OVER_DARK = 0.81, 1.14
# All but VARIANCES are widened by this many standard errors of Gaussian noise on as many pixels.
STANDARD_ERRORS = 2.0
CORRELATION = 0.1
# The risk estimate is not valid if a larger share of the pixels is at the ends of the range.
CLIPPED = 0.003


class Residual(NamedTuple):
    """Statistics of a residual, relative to what white noise of the given level would leave.

    Attributes
    ----------
    variance : the mean square of the residual over its expected value; 1 if all is right
    correlation
        Between neighbours in a column and in a row, minus its expected value, in units of sigma^2; 0 if
        the noise is white.
    bright_over_dark
        The variance where the estimate is in its highest quarter, over that in its lowest; 1 if the
        noise does not depend on the signal.
    clipped : the share of pixels beyond two that have the lowest or the highest value of the image
    witness : the noise level estimated from wavelets over the given one
    pixels : the number of values
    """

    variance: float
    correlation: tuple[float, float]
    bright_over_dark: float
    clipped: float
    witness: float
    pixels: int


def look_at_residual(response: Response, y: Tensor, sigma: float, probes: Tensor) -> Residual:
    """The statistics of y - D(y), for an image (1, C, H, W) and the response of a denoiser to it."""
    r = (y - response.estimate) / sigma
    trace = (probes * response.moves).mean()
    correlation = []
    for axis in (-2, -1):
        ahead, behind = (slice(1, None), slice(None, -1))
        found = _along(r, axis, ahead).mul(_along(r, axis, behind)).mean()
        # J is symmetric if the score is a gradient; averaging both sides is right for any score.
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
    """The variance in the brightest quarter over the darkest, each relative to its expected value."""
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
    """Warnings about the noise of images, and the reason why their risk cannot be estimated, if any."""
    warnings, obstacle = [], None
    for number, residual in enumerate(residuals):
        found = list(_suspicions(residual))
        name = f"image {number}: " if len(residuals) > 1 else ""
        warnings += [name + warning for warning, _ in found]
        obstacle = found[-1][1] if found else obstacle
    return tuple(warnings), obstacle and f"{obstacle}, so the risk cannot be estimated"


def _suspicions(residual: Residual) -> Iterator[tuple[str, str]]:
    """A warning and a reason for each thing that is wrong with one image."""
    if residual.clipped > CLIPPED:
        yield (
            f"{100 * residual.clipped:.1f} % of the pixels have the lowest or the highest value: the "
            "image seems clipped, and clipped noise is not Gaussian",
            "the image is clipped and the noise not Gaussian",
        )
    if max(map(abs, residual.correlation)) > CORRELATION:
        columns, rows = residual.correlation
        yield (
            f"neighbouring pixels of the residual are correlated, by {columns:+.2f} in columns and "
            f"{rows:+.2f} in rows: the noise is not white",
            "the noise does not look white",
        )
    # The standard error of a mean of n squares, and of the ratio of two means of n / 4.
    chance = STANDARD_ERRORS * math.sqrt(2 / residual.pixels)
    if _outside(residual.bright_over_dark, BRIGHT_OVER_DARK, math.sqrt(8) * chance):
        yield (
            f"the residual has {residual.bright_over_dark:.2f} times the variance in bright places that "
            "it has in dark ones: the noise depends on the signal, as speckle does",
            "the noise seems to depend on the signal",
        )
    doubted = _outside(residual.variance, DOUBTED, chance)
    confirmed = (residual.variance > 1) == (residual.witness > WITNESS)
    if (doubted and confirmed) or _outside(residual.variance, VARIANCES):
        word = "more" if residual.variance > 1 else "less"
        yield (
            f"the residual has {residual.variance:.2f} times the variance that is expected: there is "
            f"{word} noise than sigma says, or the prior does not know such images",
            "the residual does not look like noise of this level",
        )


def _outside(value: float, bounds: tuple[float, float], chance: float = 0.0) -> bool:
    return not bounds[0] - chance < value < bounds[1] + chance


def _along(values: Tensor, axis: int, part: slice) -> Tensor:
    return values[..., part, :] if axis == -2 else values[..., part]
