"""A coarser pixel grid: every pixel of y is the mean of factor x factor pixels of x.

A x = mean over blocks,    A' y = y repeated / factor^2,    A A' = I / factor^2
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from patchscore.checks import check_counts
from patchscore.errors import InputError


class Downsample:
    """The image on coarser pixels, as a sensor with larger pixels sees it (super-resolution).

    With a blur before it, such as that of the lens: ``Product(Downsample(2), Blur.gaussian(1.0))``.

    Parameters
    ----------
    factor
        How many times smaller y is, along rows and along columns.

    Raises
    ------
    InputError
        If the factor is not a positive whole number, or does not divide the size of an image.
    """

    def __init__(self, factor: int) -> None:
        check_counts(factor=factor)
        self.factor = factor

    def A(self, x: Tensor) -> Tensor:
        """The means of blocks: (B, C, H, W) -> (B, C, H / factor, W / factor)."""
        height, width = x.shape[-2:]
        if height % self.factor or width % self.factor:
            raise InputError(
                f"the image is {height} x {width} pixels, which is no multiple of the factor "
                f"{self.factor}; crop it."
            )
        return F.avg_pool2d(x, self.factor)

    def A_adjoint(self, y: Tensor) -> Tensor:
        """Every pixel as a block: (B, C, H, W) -> (B, C, factor H, factor W)."""
        blocks = y.repeat_interleave(self.factor, -2).repeat_interleave(self.factor, -1)
        return blocks / self.factor**2
