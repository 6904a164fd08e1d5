"""Noise levels at the door, and the noise itself.

A noise level sigma is the standard deviation of white Gaussian noise, in the unit of the image.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchscore.errors import InputError


def noise_levels(sigma: float | Tensor, x: Tensor) -> Tensor:
    """sigma as a (B,) tensor like x; an error if it is not positive, not finite or not one per image."""
    sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
    if sigma.shape not in ((), (1,), (len(x),)):
        raise InputError(
            f"sigma has shape {tuple(sigma.shape)}; expected one number, or one for each of the "
            f"{len(x)} images."
        )
    if not bool(((sigma > 0) & sigma.isfinite()).all()):
        raise InputError(
            f"sigma is {sigma.tolist()}; a noise level is positive and finite, in the image's unit."
        )
    return sigma.expand(len(x))


def check_noise_level(sigma: Any) -> None:
    """Raise :class:`InputError` unless sigma is one positive, finite number."""
    value = np.asarray(sigma)
    if value.dtype.kind not in "uif" or value.ndim != 0:
        raise InputError(
            f"sigma is {sigma!r}; expected one number, the noise level in the unit of the image."
        )
    if not 0 < value < math.inf:
        raise InputError(
            f"sigma is {sigma}; a noise level is positive and finite, in the unit of the image. Leave "
            "it out to have it estimated."
        )


def seeded(generator: torch.Generator | None) -> torch.Generator:
    """The generator, or one of seed 0.

    Raises :class:`InputError` if it is not on the CPU: a run draws the same numbers on every device.
    """
    if generator is None:
        return torch.Generator().manual_seed(0)
    if generator.device.type != "cpu":
        raise InputError(
            f"the generator is on {generator.device}; expected one on the CPU, so that a run draws the "
            "same crops and noise on every device: torch.Generator().manual_seed(0)."
        )
    return generator


def geometric_levels(highest: float, lowest: float, count: int) -> list[float]:
    """``count`` noise levels from high to low, each the same fraction of the one before."""
    return [float(level) for level in np.geomspace(highest, lowest, count)]


def noise_schedule(highest: float, lowest: float, count: int) -> list[float]:
    """``count`` noise levels from high to low whose cube roots are equally spaced.

    Karras et al., NeurIPS 2022, equation 5, with rho = 3: with it the reverse diffusion has the same
    error along directions of a Gaussian in which the noise is large and in which it is small.
    """
    return [float(root**3) for root in np.linspace(highest ** (1 / 3), lowest ** (1 / 3), count)]


def standard_normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """N(0, I) in the shape, dtype and device of a tensor; drawn where the generator is."""
    z = torch.randn(like.shape, dtype=like.dtype, device=generator.device, generator=generator)
    return z.to(like.device)


def estimated_sigma(array: np.ndarray, channel_axis: int | None = None) -> float:
    """The noise level of an image, in its unit, averaged over channels; zero if it is only rounding."""
    from skimage.restoration import estimate_sigma

    values = array.astype(np.float64)
    if values.min() == values.max():
        return 0.0
    sigma = float(estimate_sigma(values, channel_axis=channel_axis, average_sigmas=True))
    return sigma if sigma > 10 * np.finfo(np.float64).eps * np.abs(values).max() else 0.0
