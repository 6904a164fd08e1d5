"""A blur by a known point spread function h.

    (A x)_n = sum_j h_j x_{n + c - j}         c the centre of h

computed by fast Fourier transforms on the grid of x.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from patchscore.checks import check_choice, check_positive
from patchscore.errors import InputError
from patchscore.memory import check_memory

# A Gaussian is cut at four standard deviations, where it is 3e-4 of its peak.
CUT = 4


class Blur:
    """A x = h * x, every channel alike.

    Parameters
    ----------
    kernel
        The point spread function h: (rows, columns), in pixels, its centre at (rows // 2, columns // 2).
        It is not normalised: with a sum of one, the brightness stays.
    boundary
        ``"open"``: y shows only pixels that the whole kernel reaches, so the image is larger than y by
        the kernel less one pixel. This is what a camera does: light from outside the frame falls into
        it. :meth:`frame` cuts the image back to y. ``"periodic"``: left and right, top and bottom are
        neighbours, and shapes stay, as in many simulations.

    Raises
    ------
    InputError
        If the kernel is not a finite two-dimensional array of real numbers, or an image is smaller.
    """

    def __init__(self, kernel: Tensor, boundary: Literal["open", "periodic"] = "open") -> None:
        check_choice(("open", "periodic"), boundary=boundary)
        kernel = torch.as_tensor(kernel)
        if kernel.ndim != 2 or kernel.is_complex() or not bool(kernel.isfinite().all()):
            raise InputError(
                f"the kernel is {kernel.dtype} of shape {tuple(kernel.shape)}; expected finite real "
                "numbers, (rows, columns)."
            )
        self.kernel = kernel.double()
        self.boundary = boundary
        self._spectrum: Tensor | None = None
        self._grid: object = None

    @classmethod
    def gaussian(cls, std: float, boundary: Literal["open", "periodic"] = "open") -> Blur:
        """A Gaussian blur with this standard deviation in pixels, sampled at pixels, of sum one."""
        check_positive(std=std)
        side = 2 * CUT * float(std) + 1
        check_memory(16 * side * side, f"a blur of standard deviation {std:g}")
        reach = math.ceil(CUT * std)
        profile = (-0.5 * (torch.arange(-reach, reach + 1, dtype=torch.float64) / std) ** 2).exp()
        return cls(torch.outer(profile, profile) / profile.sum() ** 2, boundary)

    def A(self, x: Tensor) -> Tensor:
        """The blurred image: (B, C, H, W) -> (B, C, H, W), smaller by the kernel less one if open."""
        spectrum = self._spectrum_on(x)
        return self.frame(torch.fft.irfft2(torch.fft.rfft2(x) * spectrum, s=x.shape[-2:]))

    def A_adjoint(self, y: Tensor) -> Tensor:
        """The correlation with the kernel, zero outside y: the shapes of :meth:`A`, backwards."""
        if self.boundary == "open":
            (above, below), (left, right) = self._margins()
            y = F.pad(y, (left, right, above, below))
        spectrum = self._spectrum_on(y)
        x: Tensor = torch.fft.irfft2(torch.fft.rfft2(y) * spectrum.conj(), s=y.shape[-2:])
        return x

    def frame(self, x: Tensor) -> Tensor:
        """The pixels of an image that y shows: (..., H, W) -> (..., H, W) of y."""
        if self.boundary == "periodic":
            return x
        (above, below), (left, right) = self._margins()
        return x[..., above : x.shape[-2] - below, left : x.shape[-1] - right]

    def _margins(self) -> list[tuple[int, int]]:
        """How far the image is larger than y, before and after, in rows and in columns."""
        return [(side - 1 - side // 2, side // 2) for side in self.kernel.shape]

    def _spectrum_on(self, x: Tensor) -> Tensor:
        """The Fourier transform of the kernel on the grid of x, kept for the next image like x."""
        grid = x.shape[-2:], x.dtype, x.device
        if self._spectrum is None or grid != self._grid:
            rows, columns = self.kernel.shape
            if rows > x.shape[-2] or columns > x.shape[-1]:
                raise InputError(
                    f"the kernel is {rows} x {columns} and the image {x.shape[-2]} x {x.shape[-1]} "
                    "pixels; cut the empty rim of the kernel, or use a larger image."
                )
            padded = F.pad(self.kernel, (0, x.shape[-1] - columns, 0, x.shape[-2] - rows))
            centred = padded.roll((-(rows // 2), -(columns // 2)), (0, 1))
            self._spectrum = torch.fft.rfft2(centred).to(
                x.device, torch.promote_types(x.dtype, torch.complex64)
            )
            self._grid = grid
        return self._spectrum
