"""A noisy image as it comes in: its pixels, its noise level, and how well that level is known.

    y = (pixels - offset) / unit          what a prior sees
    pixels = unit x + offset              what its answer x means

The unit is the noise level if the prior is invariant to amplitude, and the offset is the mean if it is
invariant to brightness. Both change an estimate by no more than rounding, and let float32 serve for
images in any unit.
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

# The relative error of a noise level that somebody gives, and of one that is estimated.
GIVEN_ERROR, ESTIMATED_ERROR = 0.005, 0.1


@dataclass(frozen=True, eq=False)
class NoisyImage:
    """A noisy image, made once by :meth:`of`; every function that takes an image takes this as well.

    Attributes
    ----------
    pixels : (C, H, W), in the dtype and the unit that they came in
    sigma : the noise level in that unit; 0 if it was estimated and no noise was found
    sigma_error : how far off sigma may be, as a share of it
    channel_axis : where the caller keeps the channels; None for (H, W)
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
            What an error message calls the image.

        Raises
        ------
        InputError
            If the image is not numeric, not finite or of another shape, or sigma is not one positive
            number; or for a noise level or channels beside a :class:`NoisyImage`, which has its own.
        """
        if isinstance(image, NoisyImage):
            if (sigma, channel_axis, sigma_error) != (None, None, None):
                raise InputError(
                    "a NoisyImage has its own noise level and channels; leave out sigma, sigma_error "
                    "and channel_axis."
                )
            return image
        array = numeric_array(image, name=name)
        pixels = _channels_first(array, channel_axis, name)
        if sigma_error is None:
            sigma_error = ESTIMATED_ERROR if sigma is None else GIVEN_ERROR
        if sigma is None:
            sigma = estimated_sigma(array, channel_axis)
        else:
            check_noise_level(sigma)
        return cls(pixels, float(sigma), sigma_error, channel_axis)

    @property
    def dtype(self) -> np.dtype:
        """Of results: float32 for float16 and float32 pixels, else float64."""
        return np.dtype(np.float32 if self.pixels.dtype in (np.float16, np.float32) else np.float64)

    def split(self, channels: int) -> list[NoisyImage]:
        """The images that a prior for so many channels sees: this one, or each channel by itself.

        Raises :class:`InputError` if the prior is for another number of channels, and not for one.
        """
        if channels == len(self.pixels):
            return [self]
        if channels != 1:
            raise InputError(
                f"the image has {len(self.pixels)} channel(s) and the prior {channels}; use a gray "
                "prior (each channel is then denoised by itself) or one for as many channels."
            )
        return [NoisyImage(pixels[None], self.sigma, self.sigma_error) for pixels in self.pixels]

    def seen_by(self, prior: Score) -> Seen:
        """The image as tensors for a prior, in its dtype and on its device.

        A gray prior sees each channel as an image of its own. A score without a network sees all
        channels together, in float64.

        Raises :class:`InputError` if the channels do not fit.
        """
        network = getattr(prior, "network", None)
        batch = len(self.split(getattr(network, "channels", len(self.pixels))))
        like = getattr(network, "like", torch.empty(0, dtype=torch.float64))
        centered = getattr(network, "brightness_invariant", False)
        offset = float(self.pixels.mean(dtype=np.float64)) if centered else 0.0
        unit = self.sigma if getattr(prior, "scale_invariant", False) else 1.0
        values = self.pixels.astype(np.float64)
        values -= offset
        values /= unit
        y = torch.from_numpy(values).to(like)
        return Seen(self, y.view(batch, -1, *y.shape[1:]), self.sigma / unit, unit, offset)

    def to_array(self, values: np.ndarray) -> np.ndarray:
        """(C, H, W) in the shape that the image came in."""
        return values[0] if self.channel_axis is None else np.moveaxis(values, 0, self.channel_axis)


@dataclass(frozen=True, eq=False)
class Seen:
    """A noisy image as a prior sees it.

    Attributes
    ----------
    image : what it was made of
    y : (B, C, H, W) (pixels - offset) / unit; each channel an image of the batch for a gray prior
    sigma : the noise level of y
    unit, offset : of y, in the unit of the image
    """

    image: NoisyImage
    y: Tensor
    sigma: float
    unit: float
    offset: float

    def estimate(self, x: Tensor) -> np.ndarray:
        """Images like y, in the shape, the unit and the float type of the caller."""
        values = self._scaled(x)
        np.add(values, self.offset, out=values)
        return self.image.to_array(values)

    def deviation(self, x: Tensor) -> np.ndarray:
        """Standard deviations of such images, which have no offset."""
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
