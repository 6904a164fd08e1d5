"""The noise level of an image: estimated from the image alone, and what speaks against a level.

    sigma = median |d| / 0.6745,    d the finest diagonal wavelet coefficients

Reference: Donoho and Johnstone, Biometrika 81 (1994), section 3.4.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np

from patchscore.errors import InputError

NORMAL_MEDIAN = 0.6744897501960817  # of the absolute value of standard normal numbers
FEWEST_BLOCKS = 100  # their median gives a noise level to about a tenth
SAMPLE = 2**16  # pixels that quantiles are taken of
# An image with white noise of level sigma has at least this standard deviation. Small images vary.
LEAST_PIXELS, IMPOSSIBLE = 64, 2.0
# How far outside of the noise levels of its training a prior is not to be trusted.
FAR = 3.0
# Where more neighbouring pixels than this are a clipped one and another, sigma is 10 % low or more:
# measured on photographs of 8 bits with noise of 10 to 120.
CLIPPED = 0.15


def estimated_sigma(array: np.ndarray, channel_axis: int | None = None) -> float:
    """The noise level of an image, in its unit, averaged over channels; zero if there is only rounding.

    Too high on fine texture, and too low for noise that is correlated or clipped.
    """
    from skimage.restoration import estimate_sigma  # slow to import

    peak = float(np.abs([array.max(), array.min()], dtype=np.float64).max())
    exponent = int(np.frexp(peak)[1])
    # A power of two changes no digit, and keeps values of any size within the range of squares.
    values = np.ldexp(array.astype(np.float64), -exponent)
    with warnings.catch_warnings():  # of four columns, and of constants, whose estimate is NaN
        warnings.simplefilter("ignore")
        levels = estimate_sigma(values, channel_axis=channel_axis)
    sigma = float(np.mean(np.nan_to_num(levels)))
    return math.ldexp(sigma, exponent) if sigma > 10 * np.finfo(np.float64).eps else 0.0


def estimated_sigma_where(array: np.ndarray, seen: np.ndarray) -> float:
    """The noise level of the pixels that are seen: (H, W) or (H, W, C), and (H, W) booleans.

    From the diagonal Haar coefficients (a - b - c + d) / 2 of all blocks of four pixels that are seen.
    They are more sensitive to texture than longer wavelets, but need no other neighbours.

    Raises :class:`InputError` if fewer than 100 blocks are seen whole.
    """

    def four(values: np.ndarray) -> tuple[np.ndarray, ...]:
        return values[:-1, :-1], values[:-1, 1:], values[1:, :-1], values[1:, 1:]

    whole = np.logical_and.reduce(four(seen))
    if whole.sum() < FEWEST_BLOCKS:
        raise InputError(
            f"only {whole.sum()} blocks of 2 x 2 pixels are measured whole, too few to estimate the "
            "noise level from; give it."
        )
    a, b, c, d = four(array.astype(np.float64))
    return float(np.median(np.abs(a - b - c + d)[whole] / 2) / NORMAL_MEDIAN)


def some_pixels(pixels: np.ndarray) -> np.ndarray:
    """About 65,536 of the pixels (C, H, W), or all of fewer, in float64: (C, n)."""
    step = math.ceil(math.sqrt(max(1.0, pixels[0].size / SAMPLE)))
    return pixels[:, ::step, ::step].reshape(len(pixels), -1).astype(np.float64)


def doubts_about_level(
    pixels: np.ndarray, sigma: float, estimated: bool, trained: Sequence[float] | None, *, relative: bool
) -> list[str]:
    """What speaks against a noise level of an image (C, H, W), in words.

    ``trained`` are the lowest and the highest level of a prior: in the unit of the image, or as
    fractions of its range if they are ``relative``.
    """
    doubts = []
    some = some_pixels(pixels)
    low, high = some.min(), some.max()
    size = float(high - low) or 1.0
    spread = size * float(((some - low) / size).std(1).mean())
    span = float(np.subtract(*np.quantile(some, [0.99, 0.01])))
    if some.size >= LEAST_PIXELS and 0 < IMPOSSIBLE * spread < sigma:
        doubts.append(
            f"sigma is {sigma:.3g}, but all pixels together have a standard deviation of {spread:.3g}: "
            "there is no noise of that level. Give sigma in the unit of the image."
        )
    elif trained is not None and relative and 0 < sigma < trained[0] * span / FAR and not estimated:
        doubts.append(
            f"sigma is {sigma:.3g}, which is {sigma / span:.1g} of the range of the image; the prior "
            f"was trained on {trained[0]:.1g} to {trained[1]:.1g} of it. Give sigma in the unit of the "
            "image."
        )
    elif trained is not None and not relative and not trained[0] / FAR < sigma < FAR * trained[1]:
        doubts.append(
            f"sigma is {sigma:.3g}, and the prior was trained on levels from {trained[0]:.3g} to "
            f"{trained[1]:.3g}: it is unreliable at others. Scale the image and sigma together, or "
            "train a prior for this level."
        )
    if estimated and (share := _clipped(pixels)) > CLIPPED:
        doubts.append(
            f"the noise seems to be clipped, as {100 * share:.0f} % of neighbouring pixels are one at "
            f"the end of the range and one within: its level is more than the estimate of {sigma:.3g}. "
            "Give sigma, or the image before it was clipped."
        )
    return doubts


def _clipped(pixels: np.ndarray) -> float:
    """The share of neighbours of which one has the lowest or the highest value and the other has not."""
    step = math.ceil(pixels.shape[1] * pixels.shape[2] / SAMPLE / 16)
    clipped = (pixels == pixels.min()) | (pixels == pixels.max())
    clipped = clipped[:, ::step]
    return float((clipped[..., 1:] != clipped[..., :-1]).mean()) if pixels.shape[2] > 1 else 0.0
