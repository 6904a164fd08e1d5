"""What changes between training and use: the image, its unit, or the noise.

    y = g (T x + n) + o        T: turn, flip or zoom;  n: the noise;  g: gain;  o: offset

    white        n = s z
    Poisson      n = k / a - x,    k ~ Poisson(a x),     a = mean(x) / s^2      (variance x / a)
    speckle      n = q x z,                              q^2 = s^2 / mean(x^2)  (variance q^2 x^2)
    correlated   n = s (h * z) / |h|                     h: a Gaussian filter one pixel wide
    clipped      n = clip(round(x + s z), 0, 255) - x

with z ~ N(0, I). The mean of the variance is s^2 in all but the last, where clipping lowers it. The
estimate is brought back by (e - o) / g before it is compared with T x.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.ndimage import gaussian_filter
from skimage.transform import rescale

from benchmarks.data import add_noise, digest, middle
from patchscore.errors import InputError

CORRELATION_WIDTH = 1.0  # standard deviation of h in pixels
REAL = "real pairs"
GAINS = 0.1, 0.2, 0.5, 2.0, 5.0, 10.0
OFFSETS = -0.5, 0.5, 2.0  # of the data range
WRONG_LEVELS = 0.8, 1.2


class Problem(NamedTuple):
    """A noisy image, the noise level that a method is told, and what it is compared with.

    ``noisy`` and ``told`` are in the unit of the shifted image, ``clean`` in that of the set.
    """

    clean: np.ndarray
    noisy: np.ndarray
    told: float
    gain: float = 1.0
    offset: float = 0.0

    @property
    def seen(self) -> np.ndarray:
        """``clean`` in the unit of the shifted image, for an oracle."""
        return self.gain * self.clean + self.offset

    @property
    def digest(self) -> str:
        """Of everything that a result depends on beside the method."""
        return digest(self.clean, self.noisy, self.told)

    def restored(self, estimate: np.ndarray) -> np.ndarray:
        """The estimate in the unit of ``clean``."""
        return (estimate - self.offset) / self.gain


def zoomed(image: np.ndarray, factor: float) -> np.ndarray:
    """Cubic interpolation, with a low-pass filter before shrinking; at most as large as it was."""
    kept = middle(image, int(max(image.shape) / max(factor, 1)))
    return np.asarray(rescale(kept, factor, order=3, mode="reflect", anti_aliasing=factor < 1))


def poisson(clean: np.ndarray, sigma: float, generator: np.random.Generator) -> np.ndarray:
    """Counts whose mean is the image, in its unit; negative pixels count as 0.

    Raises :class:`InputError` if the image is nowhere positive.
    """
    light = np.maximum(clean, 0)
    if not light.any():
        raise InputError("the image is nowhere positive, so it has no photons to count.")
    per_unit = light.mean() / sigma**2
    return np.asarray(generator.poisson(per_unit * light) / per_unit)


def speckle(clean: np.ndarray, sigma: float, generator: np.random.Generator) -> np.ndarray:
    """Noise in proportion to the image."""
    contrast = sigma / np.sqrt(np.mean(clean**2))
    return np.asarray(clean * (1 + contrast * generator.standard_normal(clean.shape)))


def correlated(clean: np.ndarray, sigma: float, generator: np.random.Generator) -> np.ndarray:
    """Gaussian noise whose neighbours are alike: periodic, of correlation (h * h)(d) / |h|^2."""
    impulse = np.zeros(clean.shape)
    impulse[0, 0] = 1
    size = np.linalg.norm(gaussian_filter(impulse, CORRELATION_WIDTH, mode="wrap"))
    z = gaussian_filter(generator.standard_normal(clean.shape), CORRELATION_WIDTH, mode="wrap")
    return np.asarray(clean + sigma * z / size)


def clipped(clean: np.ndarray, sigma: float, generator: np.random.Generator) -> np.ndarray:
    """White noise, rounded and clipped to 8 bits."""
    return np.clip(np.rint(clean + sigma * generator.standard_normal(clean.shape)), 0, 255)


NoiseModel = Callable[[np.ndarray, float, np.random.Generator], np.ndarray]
NOISE: dict[str, NoiseModel] = {
    "poisson": poisson,
    "speckle": speckle,
    "correlated": correlated,
    "clipped": clipped,
}
TURNS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"rotated 90": np.rot90, "flipped": np.fliplr}
ZOOMS = {"zoom 2": 2.0, "zoom 1/2": 0.5}
GAIN_SHIFTS = tuple(f"gain {gain:g}" for gain in GAINS) + tuple(f"offset {o:g}" for o in OFFSETS)
GEOMETRY_SHIFTS = (*TURNS, *ZOOMS)
NOISE_SHIFTS = (*(f"sigma x {factor:g}" for factor in WRONG_LEVELS), *NOISE)


def shifted(
    shift: str, image: np.ndarray, sigma: float, *, data_range: float, seed: int, number: int
) -> Problem:
    """The problem that a shift makes of an image; a shift of content changes nothing here.

    A turn or a flip acts on the noisy image, as if the camera had been turned: what a method loses is
    then its own. "sigma x 1.2" tells the method a level that is 1.2 times too high. An offset is in
    units of the data range.
    """
    kind, _, value = shift.rpartition(" ")
    if shift in ZOOMS:
        image = zoomed(image, ZOOMS[shift])
    noisy = add_noise(image, sigma, seed=seed, number=number)
    if shift in TURNS:
        clean, noisy = (np.ascontiguousarray(TURNS[shift](x)) for x in (image, noisy))
        return Problem(clean, noisy, sigma)
    if shift in NOISE:
        entropy = [seed, number, list(NOISE).index(shift)]
        generator = np.random.default_rng(np.random.SeedSequence(entropy))
        return Problem(image, NOISE[shift](image, sigma, generator), sigma)
    match kind:
        case "gain":
            gain = float(value)
            return Problem(image, gain * noisy, gain * sigma, gain=gain)
        case "offset":
            offset = float(value) * data_range
            return Problem(image, noisy + offset, sigma, offset=offset)
        case "sigma x":
            return Problem(image, noisy, float(value) * sigma)
    return Problem(image, noisy, sigma)
