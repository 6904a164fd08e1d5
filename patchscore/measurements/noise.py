"""The noise level of an image, estimated from the image alone.

    sigma = median |d| / 0.6745,    d the finest diagonal wavelet coefficients

Reference: Donoho and Johnstone, Biometrika 81 (1994), section 3.4.
"""

from __future__ import annotations

import numpy as np


def estimated_sigma(array: np.ndarray, channel_axis: int | None = None) -> float:
    """The noise level of an image, in its unit, averaged over channels; zero if there is only rounding.

    Too high on fine texture, and too low for correlated noise.
    """
    from skimage.restoration import estimate_sigma

    values = array.astype(np.float64)
    if values.min() == values.max():
        return 0.0
    sigma = float(estimate_sigma(values, channel_axis=channel_axis, average_sigmas=True))
    return sigma if sigma > 10 * np.finfo(np.float64).eps * np.abs(values).max() else 0.0
