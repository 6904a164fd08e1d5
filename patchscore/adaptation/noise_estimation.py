"""The noise of an image, estimated from the image alone: what a prior finds most likely.

A prior that is invariant to amplitude has the same constant at every noise level, so its density is an
evidence for the level, and for how the noise grows with brightness. With noise of variance
v(b) = a + g b at brightness b, and f the transform that makes it 1 (generalised Anscombe),

    evidence(a, g) = log p_1(f(y)) + sum_i log f'(y_i)           maximised over a and g

For white noise, g = 0, the maximum is where  -<y, s_sigma(y)> = the number of pixels.

Photographs are alike at all scales, so the mean of 2 x 2 pixels has half of the noise if it is white.
If it has more, and the flattest places say so at coarser scales too, the noise is correlated; its
correlation is then measured in the flatter half of all blocks of 16 x 16 pixels.

References: MacKay, Neural Computation 4 (1992), section 3 (the evidence of a noise level); Liu, Tanaka
and Okutomi, IEEE TIP 22 (2013) (flat blocks).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from patchscore.errors import InputError
from patchscore.images import numeric_array
from patchscore.measurements.noise import some_pixels
from patchscore.measurements.noise_model import Noise
from patchscore.measurements.noisy_image import NoisyImage
from patchscore.priors.prior import PatchPrior
from patchscore.priors.zoo import load_prior

LARGEST = 1024  # pixels on a side that are looked at
TILE, TILES = 96, 4  # the evidence is taken of so many tiles, or of the whole of a smaller image
SMALLEST = 32  # pixels on a side; smaller images have wavelets only
ENDS = 0.05, 0.95  # the quantiles of brightness at which the variance is fitted
# The evidence is searched within these logarithms, of the level over the wavelet estimate and of
# bright over dark. Where dark pixels have no noise at all are false maxima, so steps begin small.
LIMITS, CAUTION = (1.6, 2.5), 4.0
# The decisions, chosen on training photographs and cameras: python -m benchmarks decisions.
GROWS, DECISIVE = 0.3, 5e-4  # log of bright over dark, and the gain of evidence per pixel
FEW_COUNTS, AS_GOOD = (
    2.0,
    0.01,
)  # the tilt and the loss of evidence per pixel with which counts are believed
COARSE = 1.35  # the level of 2 x 2 means over that of pixels, above which noise may be correlated
# Of the flattest places: the quantile, and by how much their levels differ from scale to scale and from
# place to place. Logistic regression on training photographs, clean and with white or correlated noise,
# and on cameras: 98 % of the cameras and 88 % of the correlated noise are found, and of photographs with
# white noise of 0, 1, 2 and 4 of 255 are taken for correlated 11, 7, 3 and 1 %.
FLAT, NOTHING = 0.2, 1e-3
LIKE_NOISE = np.array([-4.37, 6.27, -1.13, -1.34, -1.19])
SATURATED, UNEQUAL = 0.34, 0.4
FEWEST_BLOCKS = 9  # of 5 x 5 means of 8 x 8 pixels
BLOCK, LAGS = 16, 2  # of the correlation
# The relative errors of estimated levels, at least, measured by the same command.
WHITE_ERROR, GROWING_ERROR, CORRELATED_ERROR, SMALL_ERROR = 0.02, 0.1, 0.2, 0.3


def estimate_noise(
    image: Any,
    *,
    channel_axis: int | None = None,
    repeats: Sequence[Any] | None = None,
    prior: PatchPrior | None = None,
    name: str = "the image",
) -> Noise:
    """The noise of an image, from the image alone or from several shots of the same scene.

    Parameters
    ----------
    image
        (H, W), or three-dimensional with a ``channel_axis``, in any unit.
    repeats
        Other shots of the same scene, of the same shape. With them, no prior is needed: the noise is
        what changes from shot to shot.
    prior
        A gray prior that is invariant to amplitude, by default the bundled ``natural-gray-fast``.
    name
        The name of the image in error messages.

    Returns
    -------
    Noise
        White, growing with brightness, or correlated: whatever the image supports. Its ``error`` is the
        relative error of its level. ``sigma`` is 0 if the image has no noise.

    Raises
    ------
    InputError
        If an image is not numeric, not finite or of another shape, or the prior is of another kind.

    Notes
    -----
    All channels have the same noise in this model. Too high where texture is finer than the prior knows,
    above all at levels below one percent of the range. Noise that is correlated over many pixels cannot
    be told from texture; nor can dense texture without noise from correlated noise.
    """
    noisy = NoisyImage.of(image, channel_axis=channel_axis, name=name)
    if repeats is not None:
        return _from_shots([noisy, *(_repeat(shot, noisy) for shot in repeats)])
    prior = load_prior("natural-gray-fast", "cpu") if prior is None else prior
    if not getattr(prior, "scale_invariant", False) or prior.network.channels != 1:
        raise InputError(
            "the prior has several channels, or is not invariant to amplitude; noise is estimated with "
            'a gray one that is: "natural-gray-fast".'
        )
    start = noisy.sigma
    if start == 0:
        return Noise.none()
    if min(noisy.pixels.shape[1:]) < SMALLEST:
        return Noise(start, error=SMALL_ERROR)
    center = float(np.median(some_pixels(noisy.pixels)))
    part = (_middle(noisy.pixels).astype(np.float64) - center) / start
    return _supported(part, -center / start, prior).scaled(start, center)


def noise_and_image(
    image: Any,
    sigma: Any = None,
    *,
    channel_axis: int | None = None,
    name: str = "the image",
) -> tuple[Noise, NoisyImage]:
    """The noise, estimated if it is not given, and the image with noise that is the same everywhere.

    A :class:`NoisyImage` is returned as it is. Where sigma differs from pixel to pixel, the level of the
    image is the root of its mean square.
    """
    if isinstance(image, NoisyImage) or not (sigma is None or isinstance(sigma, Noise)):
        noisy = NoisyImage.of(image, sigma, channel_axis=channel_axis, name=name)
        return Noise(noisy.sigma, error=noisy.sigma_error) if noisy.sigma else Noise.none(), noisy
    noise = sigma or estimate_noise(image, channel_axis=channel_axis, name=name)
    array = numeric_array(image, name=name)
    if not (noise.gain or np.any(noise.sigma)):
        noisy = NoisyImage.of(array, channel_axis=channel_axis, name=name)
        return noise, replace(noisy, sigma=0.0)
    stable = noise.stabilised(array)
    if array.dtype in (np.float16, np.float32):
        stable = stable.astype(np.float32)
    level = float(np.sqrt(np.square(noise.level).mean()))
    return noise, NoisyImage.of(
        stable, level, channel_axis=channel_axis, sigma_error=noise.error, name=name
    )


def _repeat(shot: Any, first: NoisyImage) -> NoisyImage:
    repeat = NoisyImage.of(shot, channel_axis=first.channel_axis, name="a repeat")
    if repeat.pixels.shape != first.pixels.shape:
        raise InputError(
            f"a repeat has (C, H, W) = {repeat.pixels.shape} and the image {first.pixels.shape}; give "
            "shots of the same scene, of the same size."
        )
    return repeat


def _supported(pixels: np.ndarray, zero: float, prior: PatchPrior) -> Noise:
    """The noise that the evidence supports, of pixels (b - center) / start; 0 has become ``zero``."""
    tiles = _tiles(pixels)
    low, high = (float(q) for q in np.quantile(tiles, ENDS))
    white = _best(tiles, (low, high), prior, [0.0])
    noise = white.noise(low, high, zero)
    if high > low:
        growing = _best(tiles, (low, high), prior, [white.middle, 0.0])
        counts = _counts(tiles, zero, prior)
        enough = white.evidence + DECISIVE * tiles.size
        if counts.evidence > enough and (
            growing.tilt > FEW_COUNTS or counts.evidence > growing.evidence - AS_GOOD * tiles.size
        ):
            noise = counts.noise
        elif growing.evidence > enough and growing.tilt > GROWS:
            noise = growing.noise(low, high, zero)
    stable = noise.stabilised(tiles) / noise.level
    coarse = _best(2 * _means(stable, 2), (0.0, 1.0), prior, [0.0]).level
    if coarse > COARSE and _is_noise(pixels):
        return _correlated(pixels)
    least = GROWING_ERROR if noise.gain else WHITE_ERROR
    return replace(noise, error=min(max(least, abs(math.log(coarse)) / 2), 0.5))


class _Fit(NamedTuple):
    """log level at the middle of the brightness, log of bright over dark, and their evidence."""

    middle: float
    tilt: float
    evidence: float

    @property
    def level(self) -> float:
        return math.exp(self.middle)

    def noise(self, low: float, high: float, zero: float) -> Noise:
        """The noise with this variance. What gave no light cannot be told, and is zero if possible."""
        if self.tilt == 0:
            return Noise(self.level)
        dark, bright = (math.exp(2 * self.middle + sign * self.tilt) for sign in (-1, 1))
        gain = (bright - dark) / (high - low)
        no_variance = low - dark / gain
        offset = max(no_variance, zero) if low >= zero else no_variance
        return Noise(math.sqrt(gain * (offset - no_variance)), gain, offset)


class _Counts(NamedTuple):
    noise: Noise
    evidence: float


def _counts(y: np.ndarray, zero: float, prior: PatchPrior) -> _Counts:
    """Poisson noise of whole multiples of one step, and its evidence; -inf if the pixels are others."""
    levels = np.unique(y.round(9))
    step = float(np.diff(levels).min())
    numbers = (levels - zero) / step
    if numbers[0] < -0.5 or np.abs(numbers - np.rint(numbers)).max() > 1e-3:
        return _Counts(Noise.none(), -math.inf)
    noise = Noise(gain=step, offset=zero)
    seen = torch.from_numpy(noise.stabilised(y))
    with torch.no_grad():
        density = prior.log_prob((seen - seen.mean()).to(prior.network.like), 1.0)
    slope = -np.log(step * (y - zero) + 3 / 8 * step**2).sum() / 2
    return _Counts(noise, float(density.sum(dtype=torch.float64)) + float(slope))


def _best(y: np.ndarray, ends: tuple[float, float], prior: PatchPrior, start: Sequence[float]) -> _Fit:
    """The maximum of the evidence for tiles (B, 1, H, W), from a middle and a tilt or a middle alone."""
    from scipy.optimize import minimize

    unit = CAUTION if len(start) > 1 else 1.0

    def objective(values: np.ndarray) -> tuple[float, np.ndarray]:
        at = torch.tensor(values / unit, dtype=torch.float64, requires_grad=True)
        z, log_slope = _stabilised(torch.from_numpy(y), *ends, at)
        with torch.no_grad():
            seen = (z - z.mean()).to(prior.network.like)
            score = prior.score(seen, 1.0)
            evidence = float(prior.log_prob(seen, 1.0).sum(dtype=torch.float64) + log_slope)
        (gradient,) = torch.autograd.grad((z * score).sum() + log_slope, at)
        return -evidence / y.size, -gradient.numpy() / y.size / unit

    with torch.inference_mode(False), torch.enable_grad():
        best = minimize(
            objective,
            unit * np.array(start),
            jac=True,
            method="L-BFGS-B",
            bounds=[(-unit * widest, unit * widest) for widest in LIMITS[: len(start)]],
            options={"maxfun": 15, "maxls": 5, "ftol": 1e-6},
        )
    return _Fit(best.x[0] / unit, best.x[1] / unit if len(start) > 1 else 0.0, -float(best.fun) * y.size)


def _stabilised(y: Tensor, low: float, high: float, at: Tensor) -> tuple[Tensor, Tensor]:
    """f(y) and sum log f'(y), up to constants that do not depend on ``at``.

    The difference of two roots, 2 (r - r_0) / gain, is written without the division by a gain of zero.
    """
    if len(at) == 1:
        return y / at[0].exp(), -y.numel() * at[0]
    dark, bright = (torch.exp(2 * at[0] + sign * at[1]) for sign in (-1, 1))
    gain = (bright - dark) / (high - low)
    floor = 0.01 * torch.minimum(dark, bright).detach()
    middle = torch.tensor((low + high) / 2, dtype=y.dtype)
    here, there = (
        torch.maximum(dark + gain * (b - low) + 3 / 8 * gain.square(), floor) for b in (y, middle)
    )
    return 2 * (y - middle) / (here.sqrt() + there.sqrt()), -here.log().sum() / 2


def _middle(pixels: np.ndarray) -> np.ndarray:
    """At most the middle 1024 x 1024 pixels."""
    top, left = (max(0, n - LARGEST) // 2 for n in pixels.shape[1:])
    return pixels[:, top : top + LARGEST, left : left + LARGEST]


def _tiles(pixels: np.ndarray) -> np.ndarray:
    """Four tiles of each channel, or the whole of a small image: (B, 1, H, W)."""
    height, width = pixels.shape[1:]
    if height * width <= TILES * TILE**2:
        return pixels[:, None]
    tall, wide = min(TILE, height), min(TILE, width)
    places = [
        (int(row * (height - tall)), int(column * (width - wide)))
        for row, column in ((0.2, 0.3), (0.3, 0.8), (0.8, 0.7), (0.7, 0.2))
    ]
    return np.concatenate(
        [pixels[:, None, top : top + tall, left : left + wide] for top, left in places]
    )


def _means(y: np.ndarray, size: int) -> np.ndarray:
    """Means of blocks of (..., H, W)."""
    height, width = (n // size * size for n in y.shape[-2:])
    blocks = y[..., :height, :width].reshape(*y.shape[:-2], height // size, size, width // size, size)
    means: np.ndarray = blocks.mean((-3, -1))
    return means


def _is_noise(pixels: np.ndarray) -> bool:
    """Whether the flattest places have noise of a coarse scale: the same everywhere, and bounded.

    Texture differs from place to place, and keeps growing with the scale.
    """
    if min(pixels.shape[1:]) // 40 < math.isqrt(FEWEST_BLOCKS):
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
    m = _means(pixels, size)
    detail = (m[:, :-1, :-1] - m[:, :-1, 1:] - m[:, 1:, :-1] + m[:, 1:, 1:]) / 2
    levels: np.ndarray = size * np.sqrt(_means(np.square(detail), 5)).ravel()
    return levels


def _correlated(pixels: np.ndarray) -> Noise:
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
    energy = np.square(_means(rest, 4)).mean((1, 2))
    chosen = rest[(energy > 0) & (energy <= np.median(energy[energy > 0]))]
    size = 2 * BLOCK
    power = np.square(np.abs(np.fft.rfft2(chosen, (size, size)))).mean(0)
    pairs = np.square(np.abs(np.fft.rfft2(np.ones((BLOCK, BLOCK)), (size, size))))
    lags = np.arange(-LAGS, LAGS + 1)
    covariance, count = (np.fft.irfft2(p, (size, size))[np.ix_(lags, lags)] for p in (power, pairs))
    covariance = covariance / count
    covariance = (covariance + covariance[::-1, ::-1]) / 2
    variance = covariance[LAGS, LAGS]
    return Noise(math.sqrt(variance), correlation=covariance / variance, error=CORRELATED_ERROR)


def _from_shots(shots: list[NoisyImage]) -> Noise:
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
    for _ in range(5):
        weight = 1 / np.maximum(fitted, 0.05 * v.mean())
        scaled = design * weight[:, None]
        line = np.linalg.lstsq(scaled, v * weight, rcond=None)[0]
        fitted = design @ line
    weight = 1 / np.maximum(fitted, 0.05 * v.mean())
    slope_error = math.sqrt(2 / (len(shots) - 1) / np.square(weight * (x - x.mean())).sum())
    error = math.sqrt(1 / (2 * (len(shots) - 1) * v.size))
    lags = np.arange(-LAGS, LAGS + 1)
    ahead = rest / np.sqrt(np.maximum(fitted, 0.05 * v.mean())).reshape(mean.shape)
    size = [n + LAGS + 1 for n in ahead.shape[2:]]
    power = np.square(np.abs(np.fft.rfft2(ahead, size))).mean((0, 1))
    pairs = np.square(np.abs(np.fft.rfft2(np.ones(ahead.shape[2:]), size)))
    covariance, count = (np.fft.irfft2(p, size)[np.ix_(lags, lags)] for p in (power, pairs))
    correlation = covariance / count / (covariance / count)[LAGS, LAGS]
    others = np.abs(np.delete(correlation.ravel(), correlation.size // 2))
    white = others.max() < 4 / math.sqrt(v.size * (len(shots) - 1))
    options = {} if white else {"correlation": (correlation + correlation[::-1, ::-1]) / 2}
    gain, constant = float(line[1]), float(line[0] - line[1] * x.mean())
    if gain < 4 * slope_error:
        return Noise(math.sqrt(v.mean()), error=error, **options)
    offset = max(0.0, -constant / gain) if mean.min() >= 0 else -constant / gain
    return Noise(math.sqrt(constant + gain * offset), gain, offset, error=error, **options)
