"""Classical denoisers to compare with, behind one signature: (noisy, sigma) -> denoised.

    total variation    argmin_x  1/2 |x - y|^2 + w sigma sum_i |(D x)_i|
    BM3D               groups of similar blocks, shrunk together in a 3-D transform domain, twice

Images are (H, W) in any unit, sigma is in that unit, and the estimate is float64 in it. The packages
see (y - mean(y)) / sigma, so gain and offset change nothing but rounding:

    f(a y + c, a sigma) = a f(y, sigma) + c

References: Rudin, Osher and Fatemi, Physica D 60 (1992); Chambolle, J. Math. Imaging Vis. 20 (2004);
Dabov, Foi, Katkovnik and Egiazarian, IEEE Trans. Image Processing 16 (2007); Makinen, Azzari and Foi,
IEEE Trans. Image Processing 29 (2020), which is what the ``bm3d`` package implements.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from skimage.restoration import denoise_tv_chambolle

from patchscore.errors import InputError
from patchscore.images import numeric_array

# Enough that the tolerance decides when to stop.
TV_ITERATIONS = 2000
ORACLE_TOLERANCE = 1e-5
ORACLE_WEIGHTS = 0.02, 50.0
BM3D_BLOCK = 8


def total_variation(
    noisy: np.ndarray, sigma: float, *, weight: float, tolerance: float = 2e-4
) -> np.ndarray:
    """Minimise 1/2 |x - y|^2 + weight sigma TV(x), by Chambolle's dual projection.

    Parameters
    ----------
    noisy
        (H, W), in any unit.
    sigma
        The noise level, in that unit.
    weight
        The strength in units of sigma, without unit itself: from about 0.4 for texture at low noise
        to 1 for smooth images at high noise.
    tolerance
        It stops when an iteration changes the objective by less than this fraction of its first
        value; the default is scikit-image's. At high noise it stops well before the minimum.

    Raises
    ------
    InputError
        If the image is not two-dimensional and finite, or a number is not positive.

    Notes
    -----
    Fails on texture, which it flattens, and on slopes, which it turns into stairs.
    """
    y, mean = _standardized(noisy, sigma)
    for name, value in (("weight", weight), ("tolerance", tolerance)):
        if not 0 < value < math.inf:
            raise InputError(f"{name} is {value}; expected a positive number.")
    x = denoise_tv_chambolle(y, weight=weight, eps=tolerance, max_num_iter=TV_ITERATIONS)
    return np.asarray(x * sigma + mean)


def total_variation_oracle(noisy: np.ndarray, sigma: float, clean: np.ndarray) -> np.ndarray:
    """Total variation with the weight of the best PSNR: an upper bound for it, as it sees the truth.

    The tolerance is 20 times finer than the default of :func:`total_variation`. Shapes, units and errors
    are those of :func:`oracle_weight`.
    """
    weight = oracle_weight(noisy, sigma, clean)
    return total_variation(noisy, sigma, weight=weight, tolerance=ORACLE_TOLERANCE)


def oracle_weight(noisy: np.ndarray, sigma: float, clean: np.ndarray) -> float:
    """The weight of :func:`total_variation` of the best PSNR, by a bounded search over its logarithm.

    Raises
    ------
    InputError
        If the images are not two-dimensional, finite and of one shape, or sigma is not positive.
    """
    if np.shape(clean) != np.shape(noisy):
        raise InputError(
            f"the clean image has shape {np.shape(clean)} and the noisy one {np.shape(noisy)}; they "
            "must be the same."
        )

    def error(log_weight: float) -> float:
        weight = math.exp(log_weight)
        estimate = total_variation(noisy, sigma, weight=weight, tolerance=ORACLE_TOLERANCE)
        return float(np.mean((estimate - clean) ** 2))

    bounds = np.log(ORACLE_WEIGHTS)
    best = minimize_scalar(error, bounds=bounds, method="bounded", options={"xatol": 0.01})
    return math.exp(best.x)


def bm3d(noisy: np.ndarray, sigma: float) -> np.ndarray:
    """Run BM3D, both stages, with the default profile of the ``bm3d`` package: (H, W) -> (H, W).

    The package computes in float32, on as many threads as it likes, and takes its thresholds for
    similar blocks relative to the range of the noisy image.

    Raises
    ------
    InputError
        If the package is missing, the image is not two-dimensional and finite or is smaller than a
        block of 8 x 8, or sigma is not positive.

    Notes
    -----
    Fails where nothing repeats, and leaves faint block-shaped artefacts at high noise.
    """
    package = import_bm3d()
    y, mean = _standardized(noisy, sigma)
    if min(y.shape) < BM3D_BLOCK:
        raise InputError(
            f"the image is {y.shape[0]} x {y.shape[1]} pixels, smaller than a block of BM3D "
            f"({BM3D_BLOCK} x {BM3D_BLOCK}); use a larger image."
        )
    return np.asarray(package.bm3d(y, 1.0) * sigma + mean)


def has_bm3d() -> bool:
    """Whether BM3D can run here."""
    try:
        import_bm3d()
    except InputError:
        return False
    return True


def import_bm3d() -> Any:
    """Import the ``bm3d`` package.

    Raises
    ------
    InputError
        If it is not installed, or has no binary for this platform.
    """
    try:
        import bm3d as package
    except (ImportError, OSError) as error:
        raise InputError(
            f"BM3D cannot be loaded ({error}). Install it with pip install 'patchscore[bm3d]'; its "
            "licence is for non-commercial use only, and it has binaries for some platforms only."
        ) from error
    return package


def _standardized(noisy: np.ndarray, sigma: float) -> tuple[np.ndarray, float]:
    """Check what comes in through the door of all denoisers; (y - mean(y)) / sigma and mean(y)."""
    noisy = numeric_array(noisy, name="the noisy image").astype(np.float64)
    if noisy.ndim != 2:
        raise InputError(
            f"the noisy image has shape {noisy.shape}; expected (H, W). Denoise channels one by one."
        )
    if not 0 < sigma < math.inf:
        raise InputError(f"sigma is {sigma}; a noise level is positive and finite.")
    mean = float(noisy.mean())
    return (noisy - mean) / sigma, mean
