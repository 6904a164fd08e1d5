"""Noise levels from high to low, for all that anneals.

Reference: Karras, Aittala, Aila and Laine, NeurIPS 2022, equation 5.
"""

from __future__ import annotations

import numpy as np


def geometric_levels(highest: float, lowest: float, count: int) -> list[float]:
    """``count`` noise levels from high to low, each the same fraction of the one before."""
    return [float(level) for level in np.geomspace(highest, lowest, count)]


def noise_schedule(highest: float, lowest: float, count: int) -> list[float]:
    """``count`` noise levels from high to low whose cube roots are equally spaced.

    Karras et al., equation 5, with rho = 3: with it the reverse diffusion has the same error along
    directions of a Gaussian in which the noise is large and in which it is small.
    """
    return [float(root**3) for root in np.linspace(highest ** (1 / 3), lowest ** (1 / 3), count)]
