"""The front door: a noisy image in, a clean image out.

The estimate is the posterior mean E[clean | noisy = y], in one step (Tweedie's formula):

    x = y + sigma^2 s(y, sigma)

and how sure one can be of it, the posterior standard deviation of every pixel, is that of samples drawn
by the reverse diffusion (:mod:`patchscore.inference.diffusion`).
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Tensor

from patchscore.adaptation.adapt import adapt as adapt_prior
from patchscore.checks import check_noise_level
from patchscore.errors import InputError
from patchscore.images import numeric_array
from patchscore.inference.diffusion import sample_denoised
from patchscore.measurements.noise import estimated_sigma
from patchscore.priors.prior import PatchPrior
from patchscore.priors.zoo import find_device, load_prior


@overload
def denoise(
    image: Any,
    sigma: float | None = None,
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
    sigma: float | None = None,
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
    sigma: float | None = None,
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
    """Remove white Gaussian noise of standard deviation ``sigma`` from an image.

    Parameters
    ----------
    image
        A numeric array of any real type, in any unit: (H, W), or three-dimensional with the axis of
        the channels given. Neither clipped nor rescaled.
    sigma
        The noise level in the unit of the image. If None, it is estimated from the finest wavelet
        coefficients (Donoho and Johnstone 1994, by ``skimage.restoration.estimate_sigma``), which
        takes fine texture for noise.
    prior
        The name of a bundled prior, the path of a prior file, or a :class:`PatchPrior`.
    channel_axis
        The axis of the channels, None for a gray image. With a gray prior each channel is denoised by
        itself.
    device
        ``"auto"``, ``"cpu"``, ``"cuda"``, ... A :class:`PatchPrior` stays where it is on ``"auto"``.
    adapt
        Whether the prior first learns from the noisy image itself, for up to a minute
        (:func:`patchscore.adapt`, which also tells what was seen). It is kept as it is where that would
        not help; what may be wrong with the image or its noise level is a warning.
    return_std
        Whether to return the posterior standard deviation of every pixel as well. It takes about 40
        times as long as the estimate for each of the samples.
    samples
        Posterior samples that the standard deviation is taken of: known to 1 / sqrt(2 (samples - 1)) of
        itself at each pixel, 18 % for 16.
    generator
        Of the adaptation and the samples; seed 0 if not given.
    progress
        Whether progress bars are shown.

    Returns
    -------
    estimate : ndarray
        The one-step estimate in the same shape and unit: float32 for float16 and float32 images,
        else float64. Computed in tiles: memory grows with the image, not with image times patch.
    std : ndarray
        Only with ``return_std``: of the true image about the estimate, in the same shape and unit.

    Raises
    ------
    InputError
        Before any work: for an image with NaN or infinite pixels, not numeric, or of the wrong shape; a
        noise level that is not one positive number; an unknown prior or device.

    Notes
    -----
    Fails where the noise is not white, Gaussian and of one level over the image, and outside of the
    noise levels that the prior was trained at (``patchscore info`` tells).
    """
    array = numeric_array(image)
    channels = _channels_first(array, channel_axis)
    if sigma is not None:
        check_noise_level(sigma)
    if return_std and not (isinstance(samples, int) and samples > 1):
        raise InputError(f"samples is {samples!r}; a standard deviation needs two or more.")
    sigma = estimated_sigma(array, channel_axis) if sigma is None else float(sigma)
    prior = _on_device(prior, device)
    generator = generator or torch.Generator().manual_seed(0)
    network = prior.network
    if network.channels not in (1, len(channels)):
        raise InputError(
            f"the image has {len(channels)} channel(s) and the prior {network.channels}; use a gray "
            "prior (each channel is then denoised by itself) or one for as many channels."
        )
    dtype = np.float32 if array.dtype in (np.float16, np.float32) else np.float64
    if sigma == 0:
        warnings.warn(
            "the estimated noise level is zero, so the image is returned as it is; give sigma if there "
            "is noise in it.",
            stacklevel=2,
        )
        return (array.astype(dtype), np.zeros_like(array, dtype)) if return_std else array.astype(dtype)

    if adapt:
        prior = _adapted(prior, channels, sigma, generator, progress)
    # By the invariances this changes nothing but rounding: float32 then serves for any unit.
    offset = channels.mean(dtype=np.float64) if network.brightness_invariant else 0.0
    unit = sigma if prior.scale_invariant else 1.0
    scaled = np.empty(channels.shape, np.float32)
    np.subtract(channels, offset, out=scaled, dtype=np.float64, casting="same_kind")
    np.divide(scaled, unit, out=scaled)
    y = torch.from_numpy(scaled).to(network.like)
    y = y[:, None] if network.channels == 1 else y[None]

    def in_unit_of_image(x: Tensor, offset: float) -> np.ndarray:
        values = x.reshape(channels.shape).cpu().numpy().astype(dtype, copy=False)
        np.multiply(values, unit, out=values)
        np.add(values, offset, out=values)
        return values[0] if channel_axis is None else np.moveaxis(values, 0, channel_axis)

    with torch.inference_mode():
        estimate = in_unit_of_image(prior.denoise(y, sigma / unit), offset)
    if not return_std:
        return estimate
    chain = sample_denoised(
        prior, y, sigma / unit, samples, keep="moments", generator=generator, progress=progress
    )
    return estimate, in_unit_of_image(chain.std, 0.0)


def _channels_first(array: np.ndarray, channel_axis: int | None) -> np.ndarray:
    """(H, W) or an image with channels, as a view (C, H, W)."""
    if channel_axis is None:
        if array.ndim == 3:
            raise InputError(
                f"the image has shape {array.shape}; for a colour image say which axis holds the "
                "channels (channel_axis=-1 for (H, W, C)), and denoise the slices of a volume one by "
                "one."
            )
        if array.ndim != 2:
            raise InputError(f"the image has shape {array.shape}; expected two dimensions, (H, W).")
        return array[None]
    if array.ndim != 3 or not -3 <= channel_axis < 3:
        raise InputError(
            f"the image has shape {array.shape} and channel_axis is {channel_axis}; expected three "
            "dimensions and one of them."
        )
    return np.moveaxis(array, channel_axis, 0)


def _adapted(
    prior: PatchPrior, channels: np.ndarray, sigma: float, generator: torch.Generator, progress: bool
) -> PatchPrior:
    """The prior adapted to (C, H, W): to each channel as an image if it is for one channel."""
    y = torch.from_numpy(channels.astype(np.float64))
    images = list(y[:, None]) if prior.network.channels == 1 else [y]
    adapted, report = adapt_prior(prior, images, sigma, generator=generator, progress=progress)
    for text in report.warnings:
        warnings.warn(text, stacklevel=3)
    return adapted


def _on_device(prior: str | Path | PatchPrior, device: str | torch.device) -> PatchPrior:
    if not isinstance(prior, PatchPrior):
        return load_prior(prior, device)
    where = prior.network.like.device if device == "auto" else find_device(device)
    return prior if prior.network.like.device == where else copy.deepcopy(prior).to(where)
