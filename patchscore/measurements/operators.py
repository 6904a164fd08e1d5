"""Linear measurements of images: operators A with their adjoints A'."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from patchscore.errors import InputError
from patchscore.protocols import Operator
from patchscore.randomness import standard_normal

PROBES = 3
# Operators that take float64 may hold numbers of float32, such as a filter, and round them twice.
ROUNDED = 4 * torch.finfo(torch.float32).eps


def broadcasts(values: Tensor, to: Tensor) -> bool:
    """Whether values broadcast to the shape of another tensor, and not beyond."""
    try:
        return bool(torch.broadcast_shapes(values.shape, to.shape) == to.shape)
    except RuntimeError:
        return False


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
        True where a pixel is measured; any shape that broadcasts to (B, C, H, W). What y holds elsewhere
        is ignored, NaN too.

    Raises
    ------
    InputError
        If the mask is not of booleans.
    """

    def __init__(self, mask: Tensor) -> None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise InputError(
                f"the mask is {getattr(mask, 'dtype', type(mask).__name__)}; expected torch.bool, True "
                "where a pixel is measured: "
                "mask != 0."
            )
        self.mask = mask

    def A(self, x: Tensor) -> Tensor:
        """The measured pixels of x, zero elsewhere."""
        if not broadcasts(self.mask, x):
            raise InputError(
                f"the mask has shape {tuple(self.mask.shape)} and the image {tuple(x.shape)}; expected "
                "a shape that broadcasts to that of the image, such as (H, W)."
            )
        return torch.where(self.mask, x, 0)

    A_adjoint = A


def measured(y: Tensor, operator: Operator, weights: float | Tensor = 1.0) -> Tensor:
    """y with zeros where nothing is measured: what stands there would only cost digits.

    An error if y is not finite elsewhere.
    """
    while isinstance(operator, Product):
        operator = operator.left
    if isinstance(operator, Mask):
        y = operator.A(y)
    if isinstance(weights, Tensor):
        y = torch.where(weights > 0, y, 0)
    if not bool(y.isfinite().all()):
        raise InputError(
            "y has values that are NaN or infinite; leave these measurements out, with a Mask that is "
            "False there or with infinite noise: noise_std=torch.where(y.isfinite(), noise_std, "
            "torch.inf)."
        )
    return y


class Weights:
    """A = diag(weights): every measurement has a weight of its own, or all have one number.

    It whitens independent noise if the weights are 1 / noise_std.
    """

    def __init__(self, weights: float | Tensor) -> None:
        self.weights = weights

    def A(self, x: Tensor) -> Tensor:
        """The weighted measurements."""
        return x * self.weights

    A_adjoint = A


class Product:
    """A = left right: the right one happens to the image first."""

    def __init__(self, left: Operator, right: Operator) -> None:
        self.left = left
        self.right = right

    def A(self, x: Tensor) -> Tensor:
        """Left (right x)."""
        return self.left.A(self.right.A(x))

    def A_adjoint(self, y: Tensor) -> Tensor:
        """right' (left' y)."""
        return self.right.A_adjoint(self.left.A_adjoint(y))


def check_adjoint(operator: Operator, x: Tensor, y: Tensor, name: str = "the operator") -> None:
    """An error unless <A u, v> = <u, A' v> for random u and v, and the shapes fit.

    <a, b> = Re sum conj(a) b, so images may be real where measurements are complex. In float64 if the
    operator computes in it: a single wrong pixel of many is far below the rounding of float32.
    """
    shape = operator.A(x).shape
    if shape != y.shape:
        raise InputError(
            f"y has shape {tuple(y.shape)}, but A of an image {tuple(x.shape)} (the shape of "
            f"A_adjoint(y)) has {tuple(shape)}; give the measurement that this operator makes."
        )
    generator = torch.Generator().manual_seed(0)
    x, y = _in_double(operator, x, y, generator)
    tiny = torch.finfo(y.dtype).tiny
    for _ in range(PROBES):
        u, w = standard_normal(x, generator), standard_normal(y, generator)
        a_u = operator.A(u)
        # With a part along A u the products are large, so that an error of scale shows at any size.
        v = w + a_u * (w.norm() / a_u.norm().clamp_min(tiny))
        forward = (a_u.conj() * v).real.sum()
        backward = (u.conj() * operator.A_adjoint(v)).real.sum()
        mismatch = ((forward - backward).abs() / (a_u.norm() * v.norm()).clamp_min(tiny)).item()
        if not mismatch <= max(ROUNDED, math.sqrt(torch.finfo(y.dtype).eps)):
            raise InputError(
                f"A_adjoint of {name} is not the adjoint of its A: <A u, v> = {forward.item():.6g} and "
                f"<u, A' v> = {backward.item():.6g} for random u and v, a mismatch of {mismatch:.2g}; "
                "gradients would be wrong. Filtered back-projections and pseudo-inverses are not "
                "adjoints; the adjoint of complex weights has their conjugates."
            )


def _in_double(
    operator: Operator, x: Tensor, y: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """x and y in float64 if the operator computes in it, else as they are."""
    try:
        wide_x, wide_y = (t.to(torch.promote_types(t.dtype, torch.float64)) for t in (x, y))
        image = operator.A(standard_normal(wide_x, generator))
        operator.A_adjoint(wide_y)
    except Exception:  # operators of other libraries have their own errors for another dtype
        return x, y
    # Some take float64 and compute in float32: no digit of the result is then beyond float32.
    rounded = torch.equal(image.to(y.dtype).to(image.dtype), image)
    return (x, y) if rounded or image.dtype != wide_y.dtype else (wide_x, wide_y)
