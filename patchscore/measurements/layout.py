"""How a measurement lies in a tensor, and the image behind it in what goes out."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from patchscore.errors import InputError
from patchscore.measurements.adapters import as_operator
from patchscore.measurements.likelihoods import GaussianLikelihood

SINGLE = torch.float16, torch.bfloat16, torch.float32, torch.complex64


class Layout(NamedTuple):
    """How a measurement lies in a tensor (B, ...), and an image (B, C, H, W) in what goes out.

    Attributes
    ----------
    given : the measurement as it came
    is_array : whether it came as an array, without a batch
    channel_axis : of that array
    shape : of one measurement, if the operator says so
    """

    given: Tensor
    is_array: bool = False
    channel_axis: int | None = None
    shape: tuple[int, ...] | None = None

    @classmethod
    def of(cls, y: Any, operator: Any, channel_axis: int | None) -> Layout:
        """The layout of y: a tensor with a batch, or an array without one.

        Raises :class:`InputError` if it is neither, or has no such axis.
        """
        if isinstance(y, Tensor):
            return cls(y)
        try:
            array = np.asarray(y)
        except ValueError:  # ragged lists
            array = np.asarray(None)
        if array.dtype.kind not in "uifc" or np.ma.is_masked(y):
            raise InputError(
                f"y is a {type(y).__name__} of {array.dtype}; expected an array of real or complex "
                "numbers. For missing values, use patchscore.Mask or an infinite noise_std there."
            )
        is_axis = isinstance(channel_axis, int | np.integer) and not isinstance(channel_axis, bool)
        if channel_axis is not None and not (is_axis and array.ndim == 3 and -3 <= channel_axis < 3):
            raise InputError(
                f"y has shape {array.shape} and channel_axis is {channel_axis!r}; expected three "
                "dimensions and one of them, -3 to 2."
            )
        widest = np.dtype(np.complex128 if array.dtype.kind == "c" else np.float64)
        dtype = array.dtype.newbyteorder("=") if array.itemsize <= widest.itemsize else widest
        given = torch.from_numpy(np.array(array, dtype, order="C"))
        return cls(given, True, channel_axis, getattr(as_operator(operator), "y_shape", None))

    def likelihood(self, operator: Any, noise_std: Any, like: Tensor) -> GaussianLikelihood:
        """That of the measurement; its tensors are like this one."""
        if isinstance(noise_std, np.ndarray) and noise_std.dtype.kind in "uif":
            noise_std = torch.from_numpy(np.array(noise_std, np.float64, order="C"))
        if isinstance(noise_std, Tensor) and noise_std.ndim and not noise_std.is_complex():
            one_for_each = noise_std.shape == self.given.shape
            noise_std = (self.measurement(noise_std) if one_for_each else noise_std).to(like)
        dtype = like.dtype.to_complex() if self.given.is_complex() else like.dtype
        return GaussianLikelihood(
            self.measurement(self.given).to(like.device, dtype), operator, noise_std
        )

    def measurement(self, values: Tensor) -> Tensor:
        """An array like the measurement as a batch of one."""
        if self.is_array and self.shape is not None:
            return values.reshape(1, *self.shape)
        return self.image(values)

    def image(self, values: Any) -> Tensor:
        """An array like the image as a batch of one."""
        tensor = torch.as_tensor(values)
        if not self.is_array:
            return tensor
        if self.channel_axis is not None:
            return tensor.movedim(self.channel_axis, 0)[None]
        return tensor[None, None] if tensor.ndim == 2 else tensor[None]

    def result(self, x: Tensor) -> Any:
        """(B, C, H, W) as the measurement came: a tensor there, or an array."""
        if self.given.dtype not in SINGLE:
            x = x.to(torch.complex128 if x.is_complex() else torch.float64)
        if not self.is_array:
            return x.to(self.given.device)
        values = x[0].cpu().numpy()
        if self.channel_axis is not None:
            return np.moveaxis(values, 0, self.channel_axis)
        return values[0] if len(values) == 1 else values
