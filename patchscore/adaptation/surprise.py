"""How unlike its training images a noisy image is for a prior, as a map and as a number.

With the estimate d = y + sigma^2 s(y, sigma), a Gaussian blur G_k of k pixels, and averages < > over a
region (the image or a window), the features of the region, in units of the noise, are

    c_k = log(< (d - G_k d)^2 > / sigma^2 + 0.01)     contrast of the estimate below k pixels
    e   = -< (y - G_16 y) s(y, sigma) >               local energy, for a Gaussian prior twice that of
                                                      the density; E e = 1 - tr G_16 / n under any prior

f = (c_1, c_2, c_4, c_8, c_32, e) is compared with regions of training images that have the same c_16:
f ~ N(m, D C D), where m and log D are quadratic in c_16. The surprise is the distance

    r^2 = (f - m)' (D C D)^-1 (f - m)

The number ranks r of the image among the r of training images, each under a law fitted without it; the
map shows r of the window around each pixel. A scale-invariant prior has no unit in which to look up a
noise level, so the contrast c_16 in units of the noise takes its place.

References: Stein, Annals of Statistics 9 (1981), lemma 1, for E e; Vovk, Gammerman and Shafer,
"Algorithmic Learning in a Random World" (2005), chapter 2, and Barber, Candes, Ramdas and Tibshirani,
Annals of Statistics 49 (2021), section 3 (conformal p-values, by cross-validation).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from patchscore.checks import check_counts, noise_level_range
from patchscore.errors import InputError
from patchscore.figures import as_html, surprise_figure
from patchscore.images import ImageSource, numeric_array, training_images
from patchscore.measurements.noisy_image import NoisyImage
from patchscore.protocols import Score
from patchscore.randomness import seeded, standard_normal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KEY = "surprise"  # of the card of a prior
SCALES = 16, 1, 2, 4, 8, 32
FLOOR = 0.01  # contrasts below a hundredth of the noise variance are only errors of the estimate
WINDOW = 20.0  # of the map: the standard deviation of a Gaussian, in pixels
SMALLEST = 64
FOLDS = 5
LEVEL = 0.95


class Law(NamedTuple):
    """The Gaussian distribution of the features f of a region, given its contrast c_16.

    Attributes
    ----------
    bounds : of c_16 in training; values beyond them are clipped
    mean, log_std : (3, 6) coefficients of m and of log D as polynomials of c_16, the constant first
    covariance : (6, 6) C
    mark : the distance r that 5 % of training regions exceed
    """

    bounds: np.ndarray
    mean: np.ndarray
    log_std: np.ndarray
    covariance: np.ndarray
    mark: float

    def distance(self, features: np.ndarray) -> np.ndarray:
        """r of features, c_16 first: (..., 7) -> (...)."""
        basis = self._basis(features[..., 0])
        z = (features[..., 1:] - basis @ self.mean) / np.exp(basis @ self.log_std)
        r: np.ndarray = np.sqrt((z * (z @ np.linalg.inv(self.covariance))).sum(-1))
        return r

    @classmethod
    def fit(cls, features: np.ndarray) -> Law:
        """Fit by least squares to the features (N, 7) of N regions, which also give the mark."""
        bounds = np.quantile(features[:, 0], (0.002, 0.998))
        law = cls(bounds, np.zeros((3, 6)), np.zeros((3, 6)), np.eye(6), math.nan)
        basis, f = law._basis(features[:, 0]), features[:, 1:]
        law = law._replace(mean=np.linalg.lstsq(basis, f, rcond=None)[0])
        residual = f - basis @ law.mean
        spread = np.log(residual**2 + 1e-12) / 2
        law = law._replace(log_std=np.linalg.lstsq(basis, spread, rcond=None)[0])
        z = residual / np.exp(basis @ law.log_std)
        law = law._replace(covariance=z.T @ z / len(z))
        if np.linalg.matrix_rank(law.covariance) < 6:
            raise InputError(
                "the contrasts and energies of these images do not vary enough to fit a law; give more "
                "and different images, and a prior whose score is not zero."
            )
        return law._replace(mark=float(np.quantile(law.distance(features), LEVEL)))

    def _basis(self, contrast: np.ndarray) -> np.ndarray:
        c = np.clip(contrast, *self.bounds)
        return np.stack([np.ones_like(c), c, c**2], -1)


class Expectation(NamedTuple):
    """What a prior expects of images like its training images; made by :func:`expect`.

    Attributes
    ----------
    image, window : the laws of whole images and of the windows of the map
    distances : (N,) r of training images under laws fitted without them, in increasing order
    """

    image: Law
    window: Law
    distances: np.ndarray

    def card(self) -> dict[str, Any]:
        """As JSON, for ``prior.card["surprise"]``; 8 kB for 360 images."""
        return {
            "image": [_plain(value, 10) for value in self.image],
            "window": [_plain(value, 10) for value in self.window],
            "distances": _plain(self.distances, 5),
        }

    @classmethod
    def from_card(cls, card: Mapping[str, Any]) -> Expectation:
        """The inverse of :meth:`card`."""
        image, window = (
            Law._make(np.asarray(part) for part in card[name]) for name in ("image", "window")
        )
        return cls(image, window, np.asarray(card["distances"]))


class Surprise(NamedTuple):
    """How unlike the training images a noisy image is.

    Attributes
    ----------
    map
        (H, W) r of the window around each pixel, a Gaussian of 20 pixels, in units of its mark: 5 % of
        the windows of training images exceed 1.
    value
        r of the whole image, in units of its mark: 5 % of training images exceed 1.
    p_value
        The conformal p-value (1 + number of training images with at least this r) / (1 + their number).
        It is at most 0.05 for 5 % of images like the training images. It only ranks the image;
        :attr:`value` says how far off it is.
    y : (H, W) the noisy image, the mean of its channels
    """

    map: np.ndarray
    value: float
    p_value: float
    y: np.ndarray

    def plot(self) -> Figure:
        """The noisy image and the map, on which the 95 % mark is a line."""
        title = (
            f"image: surprise {self.value:.2f} (1: exceeded by 5 % of training images), "
            f"p = {self.p_value:.2g}"
        )
        return surprise_figure(self.y, self.map, title)

    def __repr__(self) -> str:
        height, width = self.map.shape
        return f"Surprise({height} x {width}, value {self.value:.2f}, p = {self.p_value:.2g})"

    def _repr_html_(self) -> str:
        return as_html(self)


def surprise(
    prior: Score, y: Any, sigma: float | None = None, *, expectation: Expectation | None = None
) -> Surprise:
    """Compare a noisy image with the images that the prior was trained on.

    It costs one evaluation of the score. For a prior that is invariant to amplitude and brightness, the
    surprise of a y + c at noise level a sigma equals that of y at sigma.

    Parameters
    ----------
    prior
        Anything with a ``score``: a :class:`~patchscore.priors.prior.PatchPrior` whose card holds an
        expectation, as those of the bundled priors do, or any other with the argument ``expectation``.
    y
        (H, W), or (1, C, H, W) with the channels of the prior: an array or tensor in any unit, at least
        64 pixels wide and high. A gray prior sees each channel by itself.
    sigma
        The standard deviation of its white Gaussian noise, in the unit of y; estimated if not given.
    expectation
        What is expected of training images, from :func:`expect`. By default that of the card.

    Raises
    ------
    InputError
        If there is no expectation, the image has another shape, is small or not finite, or sigma is
        not one positive number.

    Notes
    -----
    Calibrated, up to the error of cross-validation, for images like the training images, also in size,
    with white noise, on average over the noise levels of the expectation; at one fixed level near the
    ends of that range it may be off. A wrong noise level also raises the surprise. An image with the
    contrasts of a photograph at all scales cannot be told from one: a large p-value proves nothing.
    """
    if expectation is None:
        card = getattr(prior, "card", {})
        if KEY not in card:
            raise InputError(
                f'the card of this prior has no entry "{KEY}", so there is nothing to compare with. '
                "Make one from images like its training images: "
                f'prior.card["{KEY}"] = patchscore.expect(prior, images, sigmas=(low, high)).card().'
            )
        expectation = Expectation.from_card(card[KEY])
    y = y if isinstance(y, NoisyImage | np.ma.MaskedArray) else numeric_array(y, name="y")
    shape = y.pixels.shape if isinstance(y, NoisyImage) else np.shape(y)
    stacked = len(shape) == 4 and shape[0] == 1
    whole_image = isinstance(y, NoisyImage) or len(shape) == 2 or stacked
    if not whole_image or min(shape[-2:]) < SMALLEST:
        raise InputError(
            f"y has shape {shape}; expected one image, (H, W) or (1, C, H, W), with at least "
            f"{SMALLEST} x {SMALLEST} pixels: the coarse contrasts need that many."
        )
    noisy = NoisyImage.of(y[0] if stacked else y, sigma, channel_axis=0 if stacked else None, name="y")
    if noisy.sigma == 0:
        raise InputError("no noise was found in y; give sigma if there is some.")
    whole, windows = _features(prior, noisy)
    distance = float(expectation.image.distance(whole))
    return Surprise(
        expectation.window.distance(windows) / expectation.window.mark,
        float(distance / expectation.image.mark),
        p_value(expectation, distance),
        noisy.pixels.mean(0, dtype=np.float64),
    )


def p_value(expectation: Expectation, distance: float) -> float:
    """(1 + #{r_i >= r}) / (1 + N) with the r_i of N training images."""
    n = len(expectation.distances)
    return (1 + n - int(np.searchsorted(expectation.distances, distance))) / (1 + n)


def expect(
    prior: Score,
    images: ImageSource,
    *,
    sigmas: tuple[float, float],
    draws: int = 2,
    generator: torch.Generator | None = None,
    progress: bool = True,
) -> Expectation:
    """Measure what to expect of noisy versions of images like these, between two noise levels.

    Each image is used ``draws`` times, at log-uniform noise levels. With N images, the 95 % mark is
    exceeded by 5 % +- sqrt(0.0475 / N) of such images. To keep the expectation with a prior, set
    ``prior.card["surprise"] = expect(prior, images, sigmas=...).card()``. It must be made again when the
    prior is trained further.

    Parameters
    ----------
    prior
        Anything with a ``score``.
    images
        Clean images as for :func:`patchscore.fit`, at least 20 of at least 64 x 64 pixels: the training
        images of the prior or, better, others like them.
    sigmas
        The lowest and the highest noise level, in the unit of the images.
    draws
        Noise levels for each image.
    generator
        For the noise and its levels; seed 0 by default.
    progress
        Whether to show a bar.

    Raises
    ------
    InputError
        If an image does not fit, the images are too few or too similar, or a noise level is not
        positive.
    """
    low, high = noise_level_range(sigmas)
    check_counts(draws=draws)
    generator = seeded(generator)
    channels = getattr(getattr(prior, "network", None), "channels", 1)
    data = training_images(images, channels=channels, smallest=SMALLEST)
    if len(data) < 20:
        raise InputError(
            f"there are {len(data)} images; expected at least 20, to find the mark that 5 % of them "
            "exceed. Cut large images into several."
        )
    whole, windows, numbers = [], [], []
    step = int(WINDOW)
    for number, clean in enumerate(tqdm(data, unit="image", disable=not progress)):
        for draw in range(draws):
            place = (draw + torch.rand((), generator=generator).item()) / draws
            sigma = low * (high / low) ** place
            x = clean.double()
            y = x + sigma * standard_normal(x, generator)
            features = _features(prior, NoisyImage.of(y, sigma, channel_axis=0))
            whole.append(features[0])
            windows.append(
                features[1][step // 2 :: step, step // 2 :: step].reshape(-1, len(SCALES) + 1)
            )
            numbers.append(number)
    return _expectation(np.stack(whole), np.concatenate(windows), np.array(numbers))


def _expectation(whole: np.ndarray, windows: np.ndarray, numbers: np.ndarray) -> Expectation:
    """From the features of images, (N, 7), of windows, (M, 7), and the number of each image, (N,)."""
    distances = np.empty(len(whole))
    for fold in range(FOLDS):
        out = numbers % FOLDS == fold
        distances[out] = Law.fit(whole[~out]).distance(whole[out])
    distances.sort()
    rank = min(math.ceil(LEVEL * (1 + len(distances))), len(distances))
    image = Law.fit(whole)._replace(mark=float(distances[rank - 1]))
    return Expectation(image, Law.fit(windows), distances)


@torch.no_grad()
def _features(prior: Score, noisy: NoisyImage) -> tuple[np.ndarray, np.ndarray]:
    """c_16, c_1, c_2, c_4, c_8, c_32, e of the image, (7,), and of every window, (H, W, 7)."""
    seen = noisy.seen_by(prior)
    score = seen.sigma * prior.score(seen.y, seen.sigma).double().cpu().numpy()
    score = score.reshape(noisy.pixels.shape)
    u = (noisy.pixels - noisy.pixels.mean(dtype=np.float64)) / noisy.sigma
    d = u + score
    maps = [np.square(d - _blur(d, k)).mean(0) for k in SCALES]
    energy = -((u - _blur(u, SCALES[0])) * score).mean(0)
    parts = np.stack([*maps, energy])
    whole, windows = parts.mean((1, 2)), np.moveaxis(_blur(parts, WINDOW), 0, -1).copy()
    for values in (whole, windows):
        # A mean of squares may be negative by rounding.
        values[..., :-1] = np.log(values[..., :-1].clip(0) + FLOOR)
    return whole, windows


def _blur(x: np.ndarray, pixels: float) -> np.ndarray:
    """G_k of (..., H, W) images with half-sample reflection, for which cosines are eigenvectors."""
    from scipy.fft import dctn, idctn

    rows, columns = (np.square(np.pi * pixels * np.arange(n) / n) for n in x.shape[-2:])
    gain = np.exp(-(rows[:, None] + columns) / 2)
    axes = -2, -1
    blurred: np.ndarray = idctn(gain * dctn(x, axes=axes, norm="ortho"), axes=axes, norm="ortho")
    return blurred


def _plain(values: Any, digits: int) -> Any:
    """Numbers as nested lists, rounded to so many digits."""
    if np.ndim(values) == 0:
        return float(f"{values:.{digits}g}")
    return [_plain(value, digits) for value in values]
