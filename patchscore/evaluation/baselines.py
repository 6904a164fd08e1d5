"""Other denoisers to compare with, all with the signature (noisy, sigma) -> denoised.

    total variation    argmin_x  1/2 |x - y|^2 + w sigma sum_i |(D x)_i|
    non-local means    x_i = sum_j w_ij y_j / sum_j w_ij,   w_ij = exp(-max(d_ij - 2, 0) / h^2),
                       d_ij the mean square difference of the patches around i and j, over sigma^2
    wavelets           soft thresholds t = sigma^2 / std(clean) in every subband, over all small shifts
    BM3D               groups of similar blocks, shrunk together in a 3-D transform domain, twice

Images are (H, W) in any unit, sigma is in the same unit, and so is the estimate, in float64. The
packages get (y - mean(y)) / sigma, so gain and offset change nothing but rounding:

    f(a y + c, a sigma) = a f(y, sigma) + c

All raise :class:`InputError` if an image is not two-dimensional and finite, or a number not positive.
:func:`on_arrays` gives the same signature to what works on tensors: EPLL, priors, samplers.

References: Rudin, Osher and Fatemi, Physica D 60 (1992); Chambolle, J. Math. Imaging Vis. 20 (2004);
Buades, Coll and Morel, CVPR 2005; Chang, Yu and Vetterli, IEEE Trans. Image Processing 9 (2000)
(BayesShrink); Coifman and Donoho, Lecture Notes in Statistics 103 (1995) (cycle spinning); Dabov, Foi,
Katkovnik and Egiazarian, IEEE Trans. Image Processing 16 (2007); Makinen, Azzari and Foi, IEEE Trans.
Image Processing 29 (2020), which is what the ``bm3d`` package implements.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pywt
import torch
from scipy.optimize import minimize_scalar
from skimage.restoration import cycle_spin, denoise_nl_means, denoise_tv_chambolle, denoise_wavelet
from torch import Tensor

from patchscore.checks import check_noise_level, check_positive
from patchscore.errors import InputError
from patchscore.images import numeric_array
from patchscore.inference.diffusion import LEVELS, sample_denoised
from patchscore.protocols import Score

# So many that the tolerance decides when to stop.
TV_ITERATIONS = 2000
ORACLE_TOLERANCE = 1e-5
ORACLE_WEIGHTS = 0.02, 50.0
BM3D_BLOCK = 8
# The best on training photographs at sigma 15, 25 and 50 of 255, among patches of 3, 5 and 7 in windows
# of 15 and 23, and among BayesShrink and VisuShrink, soft and hard, Haar to Daubechies 8.
NLM_PATCH, NLM_REACH = 5, 7
WAVELET, WAVELET_LEVELS, WAVELET_SHIFTS = "db2", 4, 3

Denoiser = Callable[[np.ndarray, float], np.ndarray]


def total_variation(
    noisy: np.ndarray, sigma: float, *, weight: float, tolerance: float = 2e-4
) -> np.ndarray:
    """Minimise 1/2 |x - y|^2 + weight sigma TV(x), by Chambolle's dual projection.

    Parameters
    ----------
    weight
        The strength as a multiple of sigma: from about 0.4 for texture at low noise to 1 for smooth
        images at high noise.
    tolerance
        The iteration stops when the objective changes by less than this fraction of its first value.
        The default is that of scikit-image; at high noise it stops well before the minimum.

    Notes
    -----
    It flattens texture and turns slopes into stairs.
    """
    check_positive(weight=weight, tolerance=tolerance)
    settings = {"weight": weight, "eps": tolerance, "max_num_iter": TV_ITERATIONS}
    return _standardized(noisy, sigma, partial(denoise_tv_chambolle, **settings))


def total_variation_oracle(noisy: np.ndarray, sigma: float, clean: np.ndarray) -> np.ndarray:
    """Total variation with the weight that gives the best PSNR, which only the clean image can tell.

    The tolerance is 20 times finer than the default of :func:`total_variation`.
    """
    weight = oracle_weight(noisy, sigma, clean)
    return total_variation(noisy, sigma, weight=weight, tolerance=ORACLE_TOLERANCE)


def oracle_weight(noisy: np.ndarray, sigma: float, clean: np.ndarray) -> float:
    """The weight of :func:`total_variation` with the best PSNR, by a bounded search on a log scale."""
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


def non_local_means(noisy: np.ndarray, sigma: float, *, strength: float = 0.6) -> np.ndarray:
    """Average pixels whose 5 x 5 patches look alike, within 7 pixels: (H, W) -> (H, W).

    ``strength`` is h as a multiple of sigma: 0.6 is best for photographs at sigma 15 to 50 of 255.

    Notes
    -----
    Pixels keep their noise where nothing repeats nearby. This is scikit-image's fast mode, which sums 16
    of the 25 squares of a patch and sets weights below exp(-5) to zero.
    """
    check_positive(strength=strength)
    settings = {"patch_size": NLM_PATCH, "patch_distance": NLM_REACH, "h": strength, "sigma": 1.0}
    return _standardized(noisy, sigma, partial(denoise_nl_means, fast_mode=True, **settings))


def wavelets(noisy: np.ndarray, sigma: float) -> np.ndarray:
    """Shrink wavelet coefficients (BayesShrink), averaged over 4 x 4 shifts: (H, W) -> (H, W).

    Daubechies wavelets with two vanishing moments on up to four levels; no parameters. Raises
    :class:`InputError` also for an image with fewer than 6 pixels on a side.

    Notes
    -----
    Less accurate near the border, because shifts are circular; leaves ripples beside edges.
    """

    def shrunk(y: np.ndarray) -> np.ndarray:
        levels = min(WAVELET_LEVELS, pywt.dwtn_max_level(y.shape, WAVELET))
        if levels == 0:
            raise InputError(
                f"the image is {y.shape[0]} x {y.shape[1]} pixels, too small for one level of wavelets "
                "(6 x 6); use a larger image."
            )
        settings = {"sigma": 1.0, "wavelet": WAVELET, "wavelet_levels": levels, "method": "BayesShrink"}
        x = cycle_spin(y, denoise_wavelet, max_shifts=WAVELET_SHIFTS, workers=1, func_kw=settings)
        return np.asarray(x)

    return _standardized(noisy, sigma, shrunk)


def bm3d(noisy: np.ndarray, sigma: float) -> np.ndarray:
    """Run BM3D, both stages, with the default profile of the ``bm3d`` package: (H, W) -> (H, W).

    The package computes in float32, chooses its number of threads, and sets its thresholds for similar
    blocks relative to the range of the noisy image. Raises :class:`InputError` also if the package is
    missing or the image is smaller than a block of 8 x 8.

    Notes
    -----
    Weak where nothing repeats, and leaves faint block-shaped artefacts at high noise.
    """
    package = import_bm3d()

    def filtered(y: np.ndarray) -> np.ndarray:
        if min(y.shape) < BM3D_BLOCK:
            raise InputError(
                f"the image is {y.shape[0]} x {y.shape[1]} pixels, smaller than a block of BM3D "
                f"({BM3D_BLOCK} x {BM3D_BLOCK}); use a larger image."
            )
        return np.asarray(package.bm3d(y, 1.0))

    return _standardized(noisy, sigma, filtered)


def has_bm3d() -> bool:
    """Whether the ``bm3d`` package can be loaded."""
    try:
        import_bm3d()
    except InputError:
        return False
    return True


def import_bm3d() -> Any:
    """The ``bm3d`` package; :class:`InputError` if it is missing or has no binary for this platform."""
    try:
        import bm3d as package
    except (ImportError, OSError) as error:
        raise InputError(
            f"BM3D cannot be loaded ({error}). Install it with pip install 'patchscore[bm3d]'; its "
            "licence is for non-commercial use only, and it has binaries for some platforms only."
        ) from error
    return package


def on_arrays(restore: Callable[[Tensor, float], Tensor], like: Tensor) -> Denoiser:
    """A denoiser of arrays (H, W) from one of tensors (1, 1, H, W), in the same unit.

    Parameters
    ----------
    restore
        (tensor, sigma) -> tensor: ``prior.denoise`` for the one-step estimate,
        ``partial(epll, mixture=mixture)``, or :func:`mean_of_samples` with its options bound.
    like
        A tensor with the precision and the device of ``restore``, such as ``prior.network.like``.
    """

    def denoised(noisy: np.ndarray, sigma: float) -> np.ndarray:
        y = torch.from_numpy(_checked(noisy, sigma)).to(like)
        with torch.no_grad():
            return restore(y[None, None], sigma)[0, 0].double().cpu().numpy()

    return denoised


def mean_of_samples(
    noisy: Tensor,
    sigma: float,
    *,
    prior: Score,
    samples: int,
    levels: int = LEVELS,
    generator: torch.Generator,
) -> Tensor:
    """The average of posterior samples from :func:`patchscore.sample_denoised`; one sample for 1.

    (B, C, H, W) -> (B, C, H, W). The prior must be trained for noise levels from sigma to sigma / 25.
    Raises the errors of :func:`patchscore.sample_denoised`.
    """
    return sample_denoised(
        prior, noisy, sigma, samples, levels=levels, keep="moments", generator=generator, progress=False
    ).mean


def _standardized(
    noisy: np.ndarray, sigma: float, denoise: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Denoise (y - mean(y)) / sigma, and return to the unit of y."""
    y = _checked(noisy, sigma)
    mean = float(y.mean())
    return np.asarray(denoise((y - mean) / sigma) * sigma + mean)


def _checked(noisy: np.ndarray, sigma: float) -> np.ndarray:
    """The noisy image as float64; an error if it is not (H, W), or sigma is not positive."""
    noisy = numeric_array(noisy, name="the noisy image").astype(np.float64)
    if noisy.ndim != 2:
        raise InputError(
            f"the noisy image has shape {noisy.shape}; expected (H, W). Denoise channels one by one."
        )
    check_noise_level(sigma)
    return noisy
