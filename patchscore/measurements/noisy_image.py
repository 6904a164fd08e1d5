"""A noisy image: its pixels, its noise level, and how accurately that level is known.

    y = (pixels - offset) / unit          what a prior sees
    unit x + offset                       its estimate x, in the unit of the image

The unit is the noise level if the prior is invariant to amplitude, and the offset is the mean if it is
invariant to brightness; otherwise they are 1 and 0. They change estimates by rounding only, and make
float32 accurate enough for images in any unit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchscore.checks import check_noise_level
from patchscore.errors import InputError
from patchscore.images import numeric_array
from patchscore.measurements.noise import estimated_sigma
from patchscore.protocols import Score

# The relative error of a noise level that the user gives, and of an estimated one.
GIVEN_ERROR, ESTIMATED_ERROR = 0.005, 0.1
# Large images are scaled in float64 a part at a time, so that there is no second copy of them.
ROWS_AT_ONCE = 256


@dataclass(frozen=True, eq=False)
class NoisyImage:
    """A noisy image with its noise level, made by :meth:`of`.

    :func:`patchscore.denoise`, :func:`patchscore.adapt` and :func:`patchscore.surprise` take it in place
    of an array and a noise level.

    Attributes
    ----------
    pixels : (C, H, W), with the dtype and the unit of the input
    sigma : the noise level in that unit; 0 if it was estimated and no noise was found
    sigma_error : the relative error of sigma
    channel_axis : the axis of the channels in the input; None for (H, W)
    """

    pixels: np.ndarray
    sigma: float
    sigma_error: float
    channel_axis: int | None = None

    @classmethod
    def of(
        cls,
        image: Any,
        sigma: float | None = None,
        *,
        channel_axis: int | None = None,
        sigma_error: float | None = None,
        name: str = "the image",
    ) -> NoisyImage:
        """Check an image and its noise level. A :class:`NoisyImage` is returned as it is.

        Parameters
        ----------
        image
            A numeric array or tensor in any unit: (H, W), or three-dimensional with a ``channel_axis``.
        sigma
            The noise level in the unit of the image; estimated if not given.
        sigma_error
            Its relative error: by default 0.005 for a level that is given, 0.1 for an estimated one.
        name
            The name of the image in error messages.

        Raises
        ------
        InputError
            If the image is not numeric, not finite or of another shape; if sigma is not one positive
            number; or if a :class:`NoisyImage` comes with another noise level or channel axis.
        """
        if isinstance(image, NoisyImage):
            if any(option is not None for option in (sigma, channel_axis, sigma_error)):
                raise InputError(
                    "a NoisyImage has its own noise level and channels; leave out sigma, sigma_error "
                    "and channel_axis."
                )
            return image
        array = numeric_array(image, name=name)
        pixels = _channels_first(array, channel_axis, name)
        if sigma_error is None:
            sigma_error = ESTIMATED_ERROR if sigma is None else GIVEN_ERROR
        sigma = estimated_sigma(array, channel_axis) if sigma is None else check_noise_level(sigma)
        return cls(pixels, sigma, sigma_error, channel_axis)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of results: float32 for float16 and float32 pixels, else float64."""
        return np.dtype(np.float32 if self.pixels.dtype in (np.float16, np.float32) else np.float64)

    def split(self, channels: int) -> list[NoisyImage]:
        """The images for a prior with so many channels: this one, or each channel for a gray prior.

        Raises :class:`InputError` if the channels do not fit.
        """
        if channels == len(self.pixels):
            return [self]
        if channels != 1:
            raise InputError(
                f"the image has {len(self.pixels)} channel(s) and the prior {channels}; use a gray "
                "prior (each channel is then denoised separately) or one for as many channels."
            )
        return [NoisyImage(pixels[None], self.sigma, self.sigma_error) for pixels in self.pixels]

    def seen_by(self, prior: Score) -> Seen:
        """The image as a tensor for a prior, with its dtype and device.

        For a gray prior each channel is an image of the batch. A score without a network gets all
        channels as one image, in float64.

        Raises :class:`InputError` if the channels do not fit.
        """
        network = getattr(prior, "network", None)
        batch = len(self.split(getattr(network, "channels", len(self.pixels))))
        like = getattr(network, "like", torch.empty(0, dtype=torch.float64))
        centered = getattr(network, "brightness_invariant", False)
        offset = float(self.pixels.mean(dtype=np.float64)) if centered else 0.0
        unit = self.sigma if getattr(prior, "scale_invariant", False) else 1.0
        dtype = np.float32 if like.dtype == torch.float32 else np.float64
        values: np.ndarray = np.empty(self.pixels.shape, dtype)
        for top in range(0, values.shape[1], ROWS_AT_ONCE):
            rows = slice(top, top + ROWS_AT_ONCE)
            values[:, rows] = (self.pixels[:, rows].astype(np.float64) - offset) / unit
        y = torch.from_numpy(values).to(like)
        return Seen(self, y.view(batch, -1, *y.shape[1:]), self.sigma / unit, unit, offset)

    def to_array(self, values: np.ndarray) -> np.ndarray:
        """(C, H, W) values in the shape of the input."""
        return values[0] if self.channel_axis is None else np.moveaxis(values, 0, self.channel_axis)


@dataclass(frozen=True, eq=False)
class Seen:
    """A noisy image as a prior sees it.

    Attributes
    ----------
    image : the noisy image
    y : (B, C, H, W) (pixels - offset) / unit; for a gray prior each channel is an image of the batch
    sigma : the noise level of y
    unit, offset : of y, in the unit of the image
    """

    image: NoisyImage
    y: Tensor
    sigma: float
    unit: float
    offset: float

    def estimate(self, x: Tensor) -> np.ndarray:
        """An estimate like y, in the unit and the shape of the input."""
        values = self._scaled(x)
        np.add(values, self.offset, out=values)
        return self.image.to_array(values)

    def deviation(self, x: Tensor) -> np.ndarray:
        """A standard deviation like y, in the unit and the shape of the input."""
        return self.image.to_array(self._scaled(x))

    def _scaled(self, x: Tensor) -> np.ndarray:
        values = x.reshape(self.image.pixels.shape).cpu().numpy().astype(self.image.dtype)
        np.multiply(values, self.unit, out=values)
        return values


def _channels_first(array: np.ndarray, channel_axis: int | None, name: str) -> np.ndarray:
    """(H, W) or an image with channels, as a view (C, H, W)."""
    if channel_axis is None:
        if array.ndim == 3:
            raise InputError(
                f"{name} has shape {array.shape}; for a colour image say which axis holds the channels "
                "(channel_axis=-1 for (H, W, C)), and denoise the slices of a volume one by one."
            )
        if array.ndim != 2:
            raise InputError(f"{name} has shape {array.shape}; expected two dimensions, (H, W).")
        return array[None]
    if array.ndim != 3 or not -3 <= channel_axis < 3:
        raise InputError(
            f"{name} has shape {array.shape} and channel_axis is {channel_axis}; expected three "
            "dimensions and one of them."
        )
    return np.moveaxis(array, channel_axis, 0)
