"""Image quality against the clean image: PSNR and SSIM.

    PSNR = 10 log10(R^2 / mean((x - e)^2))                                        in dB
    SSIM = mean of (2 m_x m_e + C1) (2 s_xe + C2) / ((m_x^2 + m_e^2 + C1) (s_x^2 + s_e^2 + C2))

x is the truth, e the estimate and R the data range; m, s^2 and s_xe are local means, variances and
covariances, C1 = (0.01 R)^2 and C2 = (0.03 R)^2. Computed by scikit-image, in float64; nothing is
clipped or quantised. The two images have one shape and one unit. The data range is that of the unit (255
for 8-bit images), not of these pixels. :class:`InputError` is raised if shapes differ, a pixel is not
finite, or the data range is not positive.

Reference: Wang, Bovik, Sheikh and Simoncelli, IEEE Trans. Image Processing 13 (2004).
"""

from __future__ import annotations

import numpy as np
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from patchscore.checks import check_positive
from patchscore.errors import InputError
from patchscore.images import numeric_array

SSIM_WINDOW = 11


def psnr(clean: np.ndarray, estimate: np.ndarray, *, data_range: float) -> float:
    """The peak signal-to-noise ratio in dB; infinite for identical images."""
    clean, estimate = _pair(clean, estimate, data_range)
    with np.errstate(divide="ignore"):
        return float(peak_signal_noise_ratio(clean, estimate, data_range=data_range))


def ssim(
    clean: np.ndarray, estimate: np.ndarray, *, data_range: float, channel_axis: int | None = None
) -> float:
    """The mean structural similarity, 1 for identical images, with the settings of Wang et al.

    These are a Gaussian window with a standard deviation of 1.5 and 11 pixels, and local moments
    divided by the sum of the weights. Windows that cross the border are left out, and the index is
    averaged over the channels of ``channel_axis``, None for a gray image. Raises :class:`InputError`
    also for images with fewer than 11 pixels along another axis.
    """
    clean, estimate = _pair(clean, estimate, data_range)
    sides = list(clean.shape)
    if channel_axis is not None:
        del sides[channel_axis]
    if min(sides) < SSIM_WINDOW:
        raise InputError(
            f"the images have shape {clean.shape}; SSIM needs at least {SSIM_WINDOW} pixels along every "
            "axis, the size of its window; for colour images give channel_axis."
        )
    return float(
        structural_similarity(
            clean,
            estimate,
            data_range=data_range,
            channel_axis=channel_axis,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
    )


def _pair(clean: np.ndarray, estimate: np.ndarray, data_range: float) -> tuple[np.ndarray, np.ndarray]:
    """Both images as float64, checked."""
    clean = numeric_array(clean, name="the clean image")
    estimate = numeric_array(estimate, name="the estimate")
    if clean.shape != estimate.shape:
        raise InputError(
            f"the clean image has shape {clean.shape} and the estimate {estimate.shape}; they must be "
            "the same."
        )
    check_positive(data_range=data_range)
    return clean.astype(np.float64), estimate.astype(np.float64)
