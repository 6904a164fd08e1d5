"""Correlated noise, from the flattest places of an image.

    l_k = k times the standard deviation of diagonal Haar coefficients of k x k means, in blocks

White noise has the same l_k at all scales k, and correlated noise a larger one at coarse scales, but
bounded, and the same everywhere. Texture differs from place to place and keeps growing with the scale.

    correlation(j) = mean of r_i r_{i+j} / mean of r_i^2

over the flatter half of all blocks of 16 x 16 pixels, r the pixels of a block without their plane.

Reference: Liu, Tanaka and Okutomi, IEEE TIP 22 (2013) (the noise level from flat blocks).
"""

from __future__ import annotations

import math

import numpy as np

from patchscore.measurements.noise_model import Noise, autocovariance

SMALLEST = 120  # pixels on a side: three blocks of 5 x 5 means of 8 x 8
# Of the flattest places: the quantile, and how their levels differ from scale to scale and from place to
# place. A logistic regression on training photographs, clean and with white or correlated noise, and on
# cameras. What it decides is measured by python -m benchmarks decisions.
FLAT, NOTHING = 0.2, 1e-3
LIKE_NOISE = np.array([-4.37, 6.27, -1.13, -1.34, -1.19])
SATURATED, UNEQUAL = 0.34, 0.4
BLOCK, LAGS = 16, 2  # of the correlation
ERROR = 0.3  # of the level, relative


def means_of_blocks(y: np.ndarray, size: int) -> np.ndarray:
    """Means of blocks of (..., H, W)."""
    height, width = (n // size * size for n in y.shape[-2:])
    blocks = y[..., :height, :width].reshape(*y.shape[:-2], height // size, size, width // size, size)
    means: np.ndarray = blocks.mean((-3, -1))
    return means


def is_correlated_noise(pixels: np.ndarray) -> bool:
    """Whether the flattest places have noise of a coarse scale: the same everywhere, and bounded.

    Texture differs from place to place, and keeps growing with the scale.
    """
    if min(pixels.shape[1:]) < SMALLEST:
        return False
    levels = [_block_levels(pixels, size) + NOTHING for size in (1, 2, 4, 8)]
    flat = np.log([np.quantile(level, FLAT) for level in levels])
    unequal = math.log(np.median(levels[2])) - flat[2]
    slopes = np.diff(flat)
    like_noise = LIKE_NOISE[0] + LIKE_NOISE[1:] @ [*slopes, unequal]
    bounded = slopes[2] < SATURATED and unequal < UNEQUAL
    return bool(like_noise > 0 or bounded)


def _block_levels(pixels: np.ndarray, size: int) -> np.ndarray:
    """The standard deviation of diagonal Haar coefficients of means, in blocks of 5 x 5, times size."""
    m = means_of_blocks(pixels, size)
    detail = (m[:, :-1, :-1] - m[:, :-1, 1:] - m[:, 1:, :-1] + m[:, 1:, 1:]) / 2
    levels: np.ndarray = size * np.sqrt(means_of_blocks(np.square(detail), 5)).ravel()
    return levels


def correlated_noise(pixels: np.ndarray) -> Noise:
    """The autocovariance of the flatter half of blocks, each without its plane, up to two pixels."""
    blocks = [
        channel[: h // BLOCK * BLOCK, : w // BLOCK * BLOCK]
        .reshape(h // BLOCK, BLOCK, w // BLOCK, BLOCK)
        .swapaxes(1, 2)
        .reshape(-1, BLOCK, BLOCK)
        for channel in pixels
        for h, w in [channel.shape]
    ]
    all_blocks = np.concatenate(blocks)
    place = np.linspace(-1, 1, BLOCK)
    plane = np.stack([np.ones((BLOCK, BLOCK)), *np.meshgrid(place, place)]).reshape(3, -1)
    basis = np.linalg.qr(plane.T)[0]
    flat = all_blocks.reshape(len(all_blocks), -1)
    rest = (flat - flat @ basis @ basis.T).reshape(all_blocks.shape)
    energy = np.square(means_of_blocks(rest, 4)).mean((1, 2))
    chosen = rest[(energy > 0) & (energy <= np.median(energy[energy > 0]))]
    covariance = autocovariance(chosen, LAGS)
    variance = covariance[LAGS, LAGS]
    return Noise(math.sqrt(variance), correlation=covariance / variance, error=ERROR)
