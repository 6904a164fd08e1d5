"""A noisy image: its pixels, its noise level, and how accurately that level is known.

    y = (pixels - offset) / unit          what a prior sees
    pixels + unit (x - y)                 its estimate x, in the unit of the image

The unit is the noise level if the prior is invariant to amplitude, and the offset is the median if it is
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
from patchscore.images import check_no_marks, numeric_array
from patchscore.measurements.noise import doubts_about_level, estimated_sigma, some_pixels
from patchscore.measurements.noise_model import GIVEN_ERROR
from patchscore.protocols import Score

# The relative error of a noise level that was estimated from wavelets.
ESTIMATED_ERROR = 0.1
# A prior needs room for sums of pixels.
ROOM = {np.float32: 1e30, np.float64: 1e300}
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
        check_no_marks(array, some_pixels(pixels), name, sigma)
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
        offset = float(np.median(some_pixels(self.pixels))) if centered else 0.0
        unit = self.sigma if getattr(prior, "scale_invariant", False) else 1.0
        dtype = np.float32 if like.dtype == torch.float32 else np.float64
        ends = float(self.pixels.max()) - offset, offset - float(self.pixels.min())
        if max(ends) > ROOM[dtype] * unit:
            raise InputError(
                f"the image has values up to {max(ends):.3g} and sigma is {self.sigma:.3g}, which is "
                "more than the prior can hold: scale the image to about [0, 1] and give its noise level."
            )
        values: np.ndarray = np.empty(self.pixels.shape, dtype)
        for rows in _parts(values):
            values[:, rows] = (self.pixels[:, rows].astype(np.float64) - offset) / unit
        y = torch.from_numpy(values).to(like)
        return Seen(self, y.view(batch, -1, *y.shape[1:]), self.sigma / unit, unit, offset)

    def doubts(self, prior: Score) -> list[str]:
        """What speaks against the noise level, or for a wrong unit, in words."""
        card = getattr(prior, "card", {})
        trained = card.get("training", {}).get("sigmas")
        relative = getattr(prior, "scale_invariant", False)
        if relative and "0..1" not in str(card.get("data")):
            trained = None  # the range of the training images is not known
        estimated = self.sigma_error > GIVEN_ERROR
        return doubts_about_level(self.pixels, self.sigma, estimated, trained, relative=relative)

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
        return self._in_unit(x, self.y)

    def deviation(self, x: Tensor) -> np.ndarray:
        """A standard deviation like y, in the unit and the shape of the input."""
        return self._in_unit(x)

    def _in_unit(self, x: Tensor, y: Tensor | None = None) -> np.ndarray:
        """unit x; or pixels + unit (x - y), in which pixels far above the noise keep their digits."""
        pixels = self.image.pixels
        values: np.ndarray = np.empty(pixels.shape, self.image.dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            for rows in _parts(values):
                part = x.reshape(pixels.shape)[:, rows]
                part = part if y is None else part - y.reshape(pixels.shape)[:, rows]
                scaled = self.unit * part.cpu().double().numpy()
                values[:, rows] = scaled if y is None else pixels[:, rows] + scaled
        if not np.isfinite(values).all():
            raise InputError(
                f"the result has values beyond {values.dtype}, or the prior is broken: scale the image "
                "to about [0, 1], and give its noise level."
            )
        return self.image.to_array(values)


def _parts(values: np.ndarray) -> list[slice]:
    """The rows of (C, H, W), a part at a time."""
    return [slice(top, top + ROWS_AT_ONCE) for top in range(0, values.shape[1], ROWS_AT_ONCE)]


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
    axis = isinstance(channel_axis, int | np.integer) and not isinstance(channel_axis, bool)
    if array.ndim != 3 or not (axis and -3 <= channel_axis < 3):
        raise InputError(
            f"{name} has shape {array.shape} and channel_axis is {channel_axis!r}; expected three "
            "dimensions and one of them, -3 to 2."
        )
    return np.moveaxis(array, channel_axis, 0)
