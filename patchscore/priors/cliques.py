"""What a prior is assembled from: something that scores a patch at a noise level.

    s_V(v; sigma)                          Clique: the score alone
    s_V(v; sigma) = -phi'(v; sigma)        Potential: the gradient of a known energy phi

Patches are (B, n, L): n = C P_1 P_2 pixels, L patches of each of B images; sigma is (B, 1, 1).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from patchscore.errors import InputError
from patchscore.priors.engines.layers import Precision
from patchscore.priors.patches import Boundary, PatchGrid
from patchscore.priors.trainable import ScoreNetwork


class Clique(ScoreNetwork):
    """A score for patches.

    Attributes
    ----------
    patch_shape, channels : the patches that it takes
    trained_on : ``"patches"`` (it is the marginal of a patch), ``"crops"`` (a clique potential) or None
    scale_invariant
        Whether a s_V(a v; a sigma) = s_V(v; sigma) for every a > 0.
    brightness_invariant
        Whether s_V(v + c; sigma) = s_V(v; sigma) for every c.
    blurred
        Whether it models images with noise of level sigma. If not, it is a density of clean images
        whatever sigma is, and Tweedie's formula does not hold.
    """

    patch_shape: tuple[int, int]
    scale_invariant: bool = False
    brightness_invariant: bool = False
    blurred: bool = True

    def __repr__(self) -> str:
        rows, columns = self.patch_shape
        channels = f", {self.channels} channels" if self.channels > 1 else ""
        count = sum(parameter.numel() for parameter in self.parameters())
        parameters = f", {count:,} parameters" if count else ""
        return f"{type(self).__name__}(reach {rows} x {columns}{channels}{parameters})"

    @abstractmethod
    def score(self, patches: Tensor, sigma: Tensor) -> Tensor:
        """s_V: (B, n, L) -> (B, n, L), in one over the image's unit."""

    def scorer(self) -> Callable[[Tensor, Tensor], Tensor]:
        """:meth:`score` as a function in which all that is the same for all patches is computed."""
        return self.score

    def field_score(
        self, x: Tensor, sigma: Tensor, boundary: Boundary, precision: Precision = "float32"
    ) -> Tensor:
        """sum_c w_c G_c' s_V(G_c x; sigma) over all patches: (B, C, H, W), (B,) -> (B, C, H, W).

        A clique that has no engine ignores the precision, that of products of float32 numbers.
        """
        grid = PatchGrid(x.shape[-2:], self.patch_shape, boundary)
        return grid.apply(x, sigma, self.scorer())


class Potential(Clique):
    """A clique whose score is the gradient of -phi."""

    @abstractmethod
    def energy(self, patches: Tensor, sigma: Tensor) -> Tensor:
        """phi: (B, n, L) -> (B, L), without unit, up to a constant."""

    def field_energy(self, x: Tensor, sigma: Tensor, boundary: Boundary) -> Tensor:
        """sum_c w_c phi(G_c x; sigma) over all patches of images: (B, C, H, W), (B,) -> (B,)."""
        grid = PatchGrid(x.shape[-2:], self.patch_shape, boundary)
        return grid.total(x, sigma, self.energy)


def uniform(shape: tuple[int, ...], *, fan_in: int) -> nn.Parameter:
    """Weights to begin with: uniform up to 1 / fan_in^(1/2) in absolute value."""
    bound = 1 / math.sqrt(fan_in)
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


def patch_pixels(patch_shape: Sequence[int], channels: int) -> tuple[tuple[int, int], int]:
    """The shape as a pair, and n = channels * rows * columns; an error if one is not positive."""
    if len(patch_shape) != 2 or min(*patch_shape, channels) < 1:
        raise InputError(
            f"patch_shape is {tuple(patch_shape)} with {channels} channels; expected (rows, columns) "
            "and a number of channels, all at least 1."
        )
    rows, columns = patch_shape
    return (rows, columns), channels * rows * columns


def check_tensor(name: str, values: Tensor, shape: tuple[int, ...]) -> None:
    """An error unless the values are real and finite, and of this shape; on meta it has no values."""
    if tuple(values.shape) != shape:
        raise InputError(f"the {name} has shape {tuple(values.shape)}; expected {shape}.")
    if not values.is_floating_point() or not (values.is_meta or bool(values.isfinite().all())):
        raise InputError(f"the {name} has to hold finite floating-point numbers; it is {values.dtype}.")


def stack_shape(name: str, values: Tensor | Sequence[int]) -> tuple[int, ...]:
    """(K, C, rows, columns) of a stack of patches, or of a shape; an error if it is something else."""
    shape = tuple(values.shape) if isinstance(values, Tensor) else tuple(values)
    if len(shape) != 4 or min(shape) < 1:
        raise InputError(
            f"the {name} have shape {shape}; expected (count, channels, rows, columns), all at least 1."
        )
    return shape
