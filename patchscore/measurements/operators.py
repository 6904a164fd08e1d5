"""Linear measurements of images: operators A with their adjoints A'."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from patchscore.errors import InputError
from patchscore.protocols import Operator
from patchscore.randomness import standard_normal


class Identity:
    """A = I: denoising."""

    def A(self, x: Tensor) -> Tensor:
        """The image as it is."""
        return x

    def A_adjoint(self, y: Tensor) -> Tensor:
        """The measurement as it is."""
        return y


class Mask:
    """A = diag(mask): some pixels are measured, the others are to be filled in (inpainting).

    Parameters
    ----------
    mask
        True where a pixel is measured; any shape that broadcasts to (B, C, H, W). The values of y
        elsewhere are ignored.

    Raises
    ------
    InputError
        If the mask is not of booleans.
    """

    def __init__(self, mask: Tensor) -> None:
        if mask.dtype != torch.bool:
            raise InputError(
                f"the mask is {mask.dtype}; expected torch.bool, True where a pixel is measured: "
                "mask != 0."
            )
        self.mask = mask

    def A(self, x: Tensor) -> Tensor:
        """The measured pixels of x, zero elsewhere."""
        return x * self.mask

    A_adjoint = A


def check_adjoint(operator: Operator, x: Tensor, y: Tensor) -> None:
    """An error unless <A u, v> = <u, A' v> for random u and v, and the shapes fit.

    <a, b> = Re sum conj(a) b, so images may be real where measurements are complex.
    """
    image = operator.A(x)
    if image.shape != y.shape:
        raise InputError(
            f"y has shape {tuple(y.shape)}, but A of an image {tuple(x.shape)} (the shape of "
            f"A_adjoint(y)) has {tuple(image.shape)}; give the measurement that this operator makes."
        )
    generator = torch.Generator().manual_seed(0)
    u, w = standard_normal(x, generator), standard_normal(y, generator)
    a_u = operator.A(u)
    tiny = torch.finfo(y.dtype).tiny
    # With a part along A u the products are large, so that an error of scale shows at any size.
    v = w + a_u * (w.norm() / a_u.norm().clamp_min(tiny))
    forward = (a_u.conj() * v).real.sum()
    backward = (u.conj() * operator.A_adjoint(v)).real.sum()
    mismatch = ((forward - backward).abs() / (a_u.norm() * v.norm()).clamp_min(tiny)).item()
    if not mismatch <= math.sqrt(torch.finfo(y.dtype).eps):
        raise InputError(
            f"A_adjoint is not the adjoint of A: <A u, v> = {forward.item():.6g} and <u, A' v> = "
            f"{backward.item():.6g} for random u and v, a mismatch of {mismatch:.2g}; gradients would "
            "be wrong. Filtered back-projections and pseudo-inverses are not adjoints; the adjoint of "
            "complex weights has their conjugates."
        )
