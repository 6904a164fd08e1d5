"""The noise of several shots of one scene: what changes from shot to shot.

    variance(x) = sigma^2 + gain (x - offset)         a line through variance against mean, by weights
    correlation(j) = mean of r_i r_{i+j} / mean of r_i^2

with r the differences of the shots from their mean, divided by their standard deviation. The gain and
the correlation are taken for zero if they are within four standard errors of it.

Reference: Foi, Trimeche, Katkovnik and Egiazarian, IEEE TIP 17 (2008), section III.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from patchscore.measurements.noise_model import Noise, autocovariance
from patchscore.measurements.noisy_image import NoisyImage

LAGS = 2
ROUNDS = 5  # of weighted least squares
LEAST = 0.05  # of the mean variance, in weights
SIGNIFICANT = 4.0


def noise_of_shots(shots: Sequence[NoisyImage]) -> Noise:
    """From two or more shots of one scene: their variance about their mean."""
    stack = np.stack([shot.pixels for shot in shots]).astype(np.float64)
    mean = stack.mean(0)
    rest = (stack - mean) * math.sqrt(len(shots) / (len(shots) - 1))
    variance = np.square(rest).mean(0)
    if not variance.any():
        return Noise.none()
    # A line through the variances, weighted by its own inverse square, as they are chi squared.
    x, v = mean.ravel(), variance.ravel()
    design = np.stack([np.ones_like(x), x - x.mean()], 1)
    fitted = np.full_like(v, v.mean())
    for _ in range(ROUNDS):
        weight = 1 / np.maximum(fitted, LEAST * v.mean())
        line = np.linalg.lstsq(design * weight[:, None], v * weight, rcond=None)[0]
        fitted = design @ line
    degrees = len(shots) - 1
    slope_error = math.sqrt(2 / degrees / np.square(weight * (x - x.mean())).sum())
    error = math.sqrt(1 / (2 * degrees * v.size))
    whitened = rest / np.sqrt(np.maximum(fitted, LEAST * v.mean())).reshape(mean.shape)
    correlation = autocovariance(whitened, LAGS)
    correlation = correlation / correlation[LAGS, LAGS]
    others = np.abs(np.delete(correlation.ravel(), correlation.size // 2))
    white = others.max() < SIGNIFICANT / math.sqrt(degrees * v.size)
    options = {} if white else {"correlation": correlation}
    gain, constant = float(line[1]), float(line[0] - line[1] * x.mean())
    if gain < SIGNIFICANT * slope_error:
        return Noise(math.sqrt(v.mean()), error=error, **options)
    offset = max(0.0, -constant / gain) if mean.min() >= 0 else -constant / gain
    return Noise(math.sqrt(constant + gain * offset), gain, offset, error=error, **options)
