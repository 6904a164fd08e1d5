"""A noisy image in, a clean image out.

    x = y + sigma^2 s(y, sigma)          E[clean | noisy = y] in one step (Tweedie's formula)

The uncertainty, the posterior standard deviation of every pixel, is measured on samples from the reverse
diffusion (:mod:`patchscore.inference.diffusion`).
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Tensor

from patchscore.adaptation.adapt import adapt as adapt_prior
from patchscore.adaptation.noise_estimation import estimate_noise
from patchscore.errors import InputError
from patchscore.inference.diffusion import sample_denoised
from patchscore.images import numeric_array
from patchscore.measurements.noise_model import Noise
from patchscore.measurements.noisy_image import NoisyImage, Seen
from patchscore.priors.prior import PatchPrior
from patchscore.priors.zoo import bundled_priors, find_device, load_prior
from patchscore.randomness import seeded

LEVEL_RATIO = 1.25  # of neighbouring noise levels, where the level differs from pixel to pixel


@overload
def denoise(
    image: Any,
    sigma: float | Noise | None = None,
    *,
    prior: str | Path | PatchPrior = ...,
    channel_axis: int | None = ...,
    device: str | torch.device = ...,
    adapt: bool = ...,
    return_std: Literal[False] = ...,
    generator: torch.Generator | None = ...,
    progress: bool = ...,
) -> np.ndarray: ...


@overload
def denoise(
    image: Any,
    sigma: float | Noise | None = None,
    *,
    prior: str | Path | PatchPrior = ...,
    channel_axis: int | None = ...,
    device: str | torch.device = ...,
    adapt: bool = ...,
    return_std: Literal[True],
    samples: int = ...,
    generator: torch.Generator | None = ...,
    progress: bool = ...,
) -> tuple[np.ndarray, np.ndarray]: ...


def denoise(
    image: Any,
    sigma: float | Noise | None = None,
    *,
    prior: str | Path | PatchPrior = "natural-gray",
    channel_axis: int | None = None,
    device: str | torch.device = "auto",
    adapt: bool = False,
    return_std: bool = False,
    samples: int = 16,
    generator: torch.Generator | None = None,
    progress: bool = True,
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """Remove noise from an image: what is estimated from it, or what is given.

    White Gaussian noise of level sigma is removed by the prior. Noise that grows with brightness is made
    white by a generalised Anscombe transform, whose exact unbiased inverse gives the estimate. Correlated
    noise is removed like white noise of the same strength at low frequencies
    (:class:`~patchscore.Noise`).

    Parameters
    ----------
    image
        A numeric array of any real type, in any unit: (H, W), or three-dimensional with a
        ``channel_axis``. It is neither clipped nor rescaled. Or a
        :class:`~patchscore.measurements.noisy_image.NoisyImage`.
    sigma
        The noise level in the unit of the image, or its :class:`~patchscore.Noise`. By default it is
        estimated from the image (:func:`~patchscore.estimate_noise`).
    prior
        The name of a bundled prior, the path of a prior file, or a :class:`PatchPrior`.
    channel_axis
        The axis of the channels, None for a gray image. A gray prior denoises each channel separately.
    device
        ``"auto"``, ``"cpu"``, ``"cuda"``, ... With ``"auto"``, a :class:`PatchPrior` stays where it is.
    adapt
        Whether the prior first learns from the noisy image itself, for up to a minute
        (:func:`patchscore.adapt`). It stays as it is if that would not help. Suspected errors of the
        image or its noise level are reported as warnings.
    return_std
        Whether to return the posterior standard deviation of every pixel as well. Each sample takes
        about 40 times as long as the estimate.
    samples
        How many posterior samples the standard deviation is computed from. Its relative error at each
        pixel is 1 / sqrt(2 (samples - 1)): 18 % for 16 samples.
    generator
        For the adaptation and the samples; seed 0 by default.
    progress
        Whether progress bars are shown.

    Returns
    -------
    estimate : ndarray
        The one-step estimate in the same shape and unit: float32 for float16 and float32 images,
        else float64. It is computed in tiles, so the memory needed does not depend on the patch size.
    std : ndarray
        Only with ``return_std``: the standard deviation of the clean image given the noisy one, in the
        same shape and unit.

    Raises
    ------
    InputError
        Before any work: if the image is not numeric, not finite or of the wrong shape; if sigma is not
        one positive number; or if the prior or the device is unknown.

    Notes
    -----
    Where noise is correlated, what remains of it is smoother than the noise was: a prior learned for
    white noise has no other. Unreliable at noise levels that the prior was not trained for
    (``patchscore info`` lists them).
    """
    prior = _on_device(prior, device)
    noise, noisy = _noise_and_image(image, sigma, channel_axis)
    if return_std and np.ndim(noise.sigma):
        raise InputError("return_std needs one noise level, and sigma has several.")
    if return_std and not (isinstance(samples, int | np.integer) and samples > 1):
        raise InputError(f"samples is {samples!r}; a standard deviation needs two or more.")
    noisy.split(prior.network.channels)  # checks them before any work
    generator = seeded(generator)
    if noisy.sigma == 0:
        warnings.warn(
            "the estimated noise level is zero, so the image is returned as it is; give sigma if there "
            "is noise in it.",
            stacklevel=2,
        )
        same = noisy.to_array(noisy.pixels.astype(noisy.dtype))
        return (same, np.zeros_like(same)) if return_std else same
    doubts: Sequence[str] = ()
    if adapt:
        prior, report = adapt_prior(prior, noisy, generator=generator, progress=progress)
        doubts = report.warnings
    else:
        doubts = noisy.doubts(prior)
    seen = noisy.seen_by(prior)
    for text in doubts:
        warnings.warn(text, stacklevel=2)
    with torch.inference_mode():
        estimate = seen.estimate(_one_step(prior, seen, noise))
    estimate = noise.restored(estimate).astype(noisy.dtype, copy=False)
    if not return_std:
        return estimate
    chain = sample_denoised(
        prior, seen.y, seen.sigma, samples, keep="moments", generator=generator, progress=progress
    )
    deviation = seen.deviation(chain.std)
    return estimate, noise.std(estimate) * deviation if noise.gain else deviation


def _noise_and_image(
    image: Any, sigma: float | Noise | None, channel_axis: int | None
) -> tuple[Noise, NoisyImage]:
    """The noise, and the image with noise that does not depend on the signal."""
    if isinstance(image, NoisyImage):
        sigma = sigma if not isinstance(sigma, Noise) else sigma.level
    if isinstance(image, NoisyImage) or not (sigma is None or isinstance(sigma, Noise)):
        noisy = NoisyImage.of(image, sigma, channel_axis=channel_axis)
        return Noise(noisy.sigma, error=noisy.sigma_error) if noisy.sigma else Noise.none(), noisy
    noise = estimate_noise(image, channel_axis=channel_axis) if sigma is None else sigma
    array = numeric_array(image)
    if not (noise.gain or np.any(noise.sigma)):
        return noise, NoisyImage.of(array, channel_axis=channel_axis)
    narrow = array.dtype in (np.float16, np.float32)
    stable = (
        noise.stabilised(array).astype(np.float32) if narrow and noise.gain else noise.stabilised(array)
    )
    level = float(np.sqrt(np.square(noise.level).mean()))
    return noise, NoisyImage.of(stable, level, channel_axis=channel_axis, sigma_error=noise.error)


def _one_step(prior: PatchPrior, seen: Seen, noise: Noise) -> Tensor:
    """The one-step estimate; where levels differ, interpolated between estimates at levels 1.25 apart."""
    levels = np.asarray(noise.level)
    if levels.ndim == 0 or levels.min() == levels.max():
        return prior.denoise(seen.y, seen.sigma)
    channels = levels[:, None, None] if levels.ndim == 1 else levels
    try:
        channels = np.broadcast_to(channels, seen.image.pixels.shape)
    except ValueError as error:
        raise InputError(
            f"sigma has shape {levels.shape} and the image (C, H, W) = {seen.image.pixels.shape}; give "
            "one for each channel, or a map (H, W)."
        ) from error
    place = torch.from_numpy(np.log(channels / seen.unit)).to(seen.y).view_as(seen.y)
    low, high = float(place.min()), float(place.max())
    count = 2 + int((high - low) / math.log(LEVEL_RATIO))
    place = (place - low) * ((count - 1) / (high - low))
    estimate = torch.zeros_like(seen.y)
    for number, level in enumerate(np.geomspace(math.exp(low), math.exp(high), count)):
        weight = (1 - (place - number).abs()).clamp_min(0)
        estimate += weight * prior.denoise(seen.y, float(level))
    return estimate


def _on_device(prior: str | Path | PatchPrior, device: str | torch.device) -> PatchPrior:
    if not isinstance(prior, str | Path | PatchPrior):
        raise InputError(
            f"the prior is {prior!r:.100}; expected a PatchPrior, a name (one of "
            f"{', '.join(bundled_priors())}) or a file."
        )
    if not isinstance(prior, PatchPrior):
        return load_prior(prior, device)
    where = find_device(device)
    where = prior.network.device if device == "auto" else where
    return prior if prior.network.device == where else copy.deepcopy(prior).to(where)
