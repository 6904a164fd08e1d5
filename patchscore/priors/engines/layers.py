"""The plain network that a learned clique stands for, as an engine takes it, and PyTorch's own engine.

    z_0 = u,    h_l(p) = sum_q W_l(q) z_{l-1}(p + d_l q) + b_l,    z_l = gelu(h_l),    l = 1 .. D
    phi = a' z_D
    f_D = gelu'(h_D) * a,    f_{l-1} = gelu'(h_{l-1}) * W_l* f_l,    s = -(1/sigma) W_1* f_1

with u = x / sigma. A network that is not scale invariant takes u = x, adds c log(sigma) to h_1, and its
energy is phi / sigma. Every layer is a valid convolution over places, and W_l* is its adjoint. A network
on patches sees one place in all layers but the first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchscore.linear_algebra import expand
from patchscore.priors.patches import Boundary, PatchGrid

Precision = Literal["float32", "bfloat16"]
Offsets = Literal["each", "common"]

# Units of one layer in flight at once. On a CPU the hidden units of a tile should stay in the cache, on
# a GPU a tile should fill the device.
UNITS_PER_TILE_CPU = 2**20
UNITS_PER_TILE_GPU = 2**26
LARGEST = 1e30


class Layers(NamedTuple):
    """Tied weights, expanded.

    Attributes
    ----------
    kernels : W_1 .. W_D, (outputs, inputs, k_l, k_l)
    biases : b_1 .. b_D, (outputs,)
    readout : a
    dilations : d_1 .. d_D, the distance of the places that a layer looks at; 1 in the first
    offsets : whether W_1 is blind to a constant in each channel, to a common one, or to none (None)
    noise : c, (outputs,); None if the network is scale invariant
    """

    kernels: Sequence[Tensor]
    biases: Sequence[Tensor]
    readout: Tensor
    dilations: Sequence[int]
    offsets: Offsets | None = None
    noise: Tensor | None = None

    @property
    def patch_shape(self) -> tuple[int, int]:
        """The patch that one phi is of, P x P."""
        pairs = zip(self.kernels, self.dilations, strict=True)
        side = 1 + sum(d * (kernel.shape[-1] - 1) for kernel, d in pairs)
        return side, side

    @property
    def rim(self) -> int:
        """How many more rows of h_1 than of phi there are."""
        return self.patch_shape[0] - self.kernels[0].shape[-1]

    def centred(self, x: Tensor) -> Tensor:
        """x less the median of some pixels, where W_1 is blind to it: bright images keep their digits.

        A median, since the mean of an image with one pixel of 1e30 would take the digits of all others.
        """
        if self.offsets is None:
            return x
        values = x.detach().flatten(2 if self.offsets == "each" else 1)
        some = values[..., :: math.isqrt(values.shape[-1]) + 1]
        return x - some.median(-1).values.reshape(len(x), -1, 1, 1)

    def normalised(self, x: Tensor, sigma: Tensor) -> Tensor:
        """u, within what float32 can multiply: the network is linear long before."""
        u = self.centred(x)
        return u if self.noise is not None else (u / expand(sigma)).clamp(-LARGEST, LARGEST)

    def energy(self, x: Tensor, sigma: Tensor) -> Tensor:
        """phi of every patch of x: (B, C, h, w), (B,) -> (B, h - P + 1, w - P + 1)."""
        with exact_products():
            last = F.gelu(self._hidden(x, sigma)[-1])
            energy = torch.einsum("k,bkhw->bhw", self.readout, last)
        return energy if self.noise is None else energy / sigma[:, None, None]

    def score(self, x: Tensor, sigma: Tensor, weights: Tensor | None = None) -> Tensor:
        """-sum_c w_c G_c' phi'(G_c x) over the patches of x: (B, C, h, w) -> (B, C, h, w)."""
        with exact_products():
            hidden = self._hidden(x, sigma)
            force = self.readout[:, None, None].to(hidden[-1])
            force = (force if weights is None else force * weights).expand_as(hidden[-1])
            (first, *others), (_, *dilations) = self.kernels, self.dilations
            for kernel, d in zip(reversed(others), reversed(dilations), strict=True):
                force = _adjoint(torch.ops.aten.gelu_backward(force, hidden.pop()), kernel, d)
            force = _first_adjoint(torch.ops.aten.gelu_backward(force, hidden.pop()), first)
        return -force / expand(sigma)

    def _hidden(self, x: Tensor, sigma: Tensor) -> list[Tensor]:
        """h_1 .. h_D, wherever the patches of x need them."""
        z = self.normalised(x, sigma)
        hidden: list[Tensor] = []
        for kernel, bias, d in zip(self.kernels, self.biases, self.dilations, strict=True):
            hidden.append(_convolution(F.gelu(hidden[-1]) if hidden else z, kernel, bias, d))
            if self.noise is not None and len(hidden) == 1:
                hidden[0] = hidden[0] + self.noise[:, None, None] * expand(sigma).log()
        return hidden


class LayeredNetwork(Protocol):
    """A network that stands for :class:`Layers`."""

    scale_invariant: bool

    def layers(self) -> Layers:
        """The plain network."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """What the layers are made from."""


def field_energy(layers: Layers, x: Tensor, sigma: Tensor, boundary: Boundary) -> Tensor:
    """sum_c w_c phi(G_c x; sigma): (B, C, H, W), (B,) -> (B,)."""
    grid = PatchGrid(x.shape[-2:], layers.patch_shape, boundary)
    padded, total = grid.pad(x), x.new_zeros(len(x))
    for window, weights in grid.pieces(padded, _places_per_tile(layers, x), layers.rim):
        images = window[0]
        energy = layers.energy(padded[window], sigma[images])
        total[images] += (energy if weights is None else energy * weights).flatten(1).sum(1)
    return total


def field_score(layers: Layers, x: Tensor, sigma: Tensor, boundary: Boundary) -> Tensor:
    """sum_c w_c G_c' s_V(G_c x; sigma): (B, C, H, W), (B,) -> (B, C, H, W)."""
    grid = PatchGrid(x.shape[-2:], layers.patch_shape, boundary)
    padded = grid.pad(x)
    total = torch.zeros_like(padded)
    for window, weights in grid.pieces(padded, _places_per_tile(layers, x), layers.rim):
        total[window] += layers.score(padded[window], sigma[window[0]], weights)
    return grid.pad_adjoint(total)


@contextmanager
def exact_products() -> Iterator[None]:
    """No TensorFloat-32: on GPUs PyTorch takes it for convolutions, at 1e-2 of the score."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    cudnn = torch.backends.cudnn
    try:
        with cudnn.flags(cudnn.enabled, cudnn.benchmark, None, cudnn.deterministic, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def _convolution(z: Tensor, kernel: Tensor, bias: Tensor, d: int) -> Tensor:
    """W z + b. Over one place it is a product of matrices, for which F.conv2d takes a slower way."""
    if kernel.shape[-1] == 1:
        return F.linear(z.movedim(1, -1), kernel[..., 0, 0], bias).movedim(-1, 1)
    return F.conv2d(z, kernel, bias, dilation=d)


def _adjoint(force: Tensor, kernel: Tensor, d: int) -> Tensor:
    """W* f."""
    if kernel.shape[-1] == 1:
        return F.linear(force.movedim(1, -1), kernel[..., 0, 0].T).movedim(-1, 1)
    return F.conv_transpose2d(force, kernel, dilation=d)


def _first_adjoint(force: Tensor, kernel: Tensor) -> Tensor:
    """W_1* f. A convolution to few channels is slow, so each row of W_1 gets a channel, 1 x k_1."""
    _, channels, side, _ = kernel.shape
    if force.shape[2:] == (1, 1):
        return F.linear(force[..., 0, 0], kernel.flatten(1).T).view(-1, channels, side, side)
    return summed_rows(F.conv2d(force, row_kernels(kernel), padding=(0, side - 1)), side)


def row_kernels(kernel: Tensor) -> Tensor:
    """The adjoint of each row of W_1 by itself: (outputs, C, k, k) -> (C k, outputs, 1, k)."""
    return kernel.flip(-1).flatten(1, 2)[:, :, None].transpose(0, 1)


def summed_rows(rows: Tensor, side: int) -> Tensor:
    """What the rows of patches put into an image: (B, C k, h, w) -> (B, C, h + k - 1, w)."""
    rows = rows.unflatten(1, (-1, side))
    height = rows.shape[3] + side - 1
    # Row i belongs i pixels further down: with a line of zeros more than the image has, it gets there.
    skewed = F.pad(rows, (0, 0, 0, side)).flatten(2, 3)[:, :, : side * height]
    image: Tensor = skewed.unflatten(2, (side, height)).sum(2)
    return image


def _places_per_tile(layers: Layers, x: Tensor) -> int:
    units = UNITS_PER_TILE_CPU if x.device.type == "cpu" else UNITS_PER_TILE_GPU
    return max(1, units // len(layers.readout))
