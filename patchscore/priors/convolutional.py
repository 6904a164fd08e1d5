"""A learned clique that is deep in space: a small convolutional network on a wide patch.

In units of the noise u = v / sigma, with hidden units at every place that the layers above look at,

    z_0 = u,    h_l(p) = sum_q W_l(q) z_{l-1}(p + d_l q) + b_l,    z_l = gelu(h_l),    l = 1 .. D
    phi(v; sigma) = a' z_D
    s_V(v; sigma) = -phi'(v) = -(1/sigma) W_1* (gelu'(h_1) * ... W_D* (gelu'(h_D) * a))

where q runs over k_l x k_l places around the middle and W_l* is the adjoint of the convolution. One
patch of side P = 1 + sum_l d_l (k_l - 1) gives one number, phi. Patches that overlap share hidden units,
so the sum over all of them is one pass over the image, and seeing further costs little.

With k_l = 1 after the first layer it would be :class:`~patchscore.priors.networks.PatchEnergy`.

References: Roth and Black, IJCV 82 (2009) (the field); Cohen and Welling, ICML 2016, equations 10-11
(weights tied over flips and turns); Yu and Koltun, ICLR 2016 (dilated layers).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchscore.errors import InputError
from patchscore.priors.cliques import Potential
from patchscore.priors.engines import cpu, triton
from patchscore.priors.engines.layers import Layers, Precision
from patchscore.priors.networks import uniform
from patchscore.priors.patches import Boundary, PatchGrid
from patchscore.priors.symmetry import PatchSymmetry

# Cliques in flight at once, in square tiles: neighbours compute a rim of hidden units twice.
CLIQUES_PER_TILE_CPU = 2**15
CLIQUES_PER_TILE_GPU = 2**20


class ConvEnergy(Potential):
    """A potential per patch, phi: R^n -> R, of convolutional GELU layers of ``width`` units each.

    The invariances to amplitude scale, brightness, flips and quarter turns are exact. Hidden units
    come in groups of eight, one for each flip and turn, that share weights.

    Parameters
    ----------
    sides : k_l, odd, at least 3
    dilations : d_l, the distance of the places that a layer looks at; 1 in the first layer
    channels : of the image
    width : hidden units per layer, a multiple of 8

    Fails: phi is a clique potential, trained through the assembled score (:func:`patchscore.fit`), and
    only trustworthy at noise levels seen there. It knows no marginals of patches.

    Raises
    ------
    InputError
        If there are not as many dilations as sides, or a number is out of its range.
    """

    scale_invariant = True
    brightness_invariant = True

    def __init__(
        self,
        sides: Sequence[int] = (7, 3, 3),
        dilations: Sequence[int] = (1, 2, 3),
        channels: int = 1,
        width: int = 64,
    ) -> None:
        super().__init__()
        if len(sides) != len(dilations) or not sides or dilations[0] != 1:
            raise InputError(
                f"sides is {list(sides)} and dilations {list(dilations)}; expected one of each for "
                "every layer, and a dilation of 1 in the first."
            )
        if any(side < 3 or side % 2 == 0 for side in sides) or min(dilations) < 1:
            raise InputError(
                f"sides is {list(sides)} and dilations {list(dilations)}; expected odd sides of at "
                "least 3 and positive dilations."
            )
        if channels < 1 or width < 1 or width % 8:
            raise InputError(
                f"width is {width} with {channels} channels; hidden units come in groups of 8, one for "
                "each flip and turn, so the width must be a positive multiple of 8."
            )
        self.sides, self.dilations = list(sides), list(dilations)
        self.channels = channels
        self.width = width
        reach = 1 + sum(d * (side - 1) for side, d in zip(sides, dilations, strict=True))
        self.patch_shape = reach, reach
        symmetries = [
            PatchSymmetry(side, channels if layer == 0 else 1, flips=True, turns=True)
            for layer, side in enumerate(sides)
        ]
        self.symmetries = cast(Sequence[PatchSymmetry], nn.ModuleList(symmetries))
        groups = width // 8
        fan_ins = [channels * sides[0] ** 2, *(width * side**2 for side in sides[1:])]
        self.lift = uniform((groups, fan_ins[0]), fan_in=fan_ins[0])
        self.mixes = nn.ParameterList(
            uniform((groups, width, side**2), fan_in=width * side**2) for side in sides[1:]
        )
        self.biases = nn.ParameterList(uniform((groups,), fan_in=fan_in) for fan_in in fan_ins)
        self.readout = nn.Parameter(torch.zeros(groups))

    def kernels(self) -> list[Tensor]:
        """The plain W_1 .. W_D that the tied weights stand for: (outputs, inputs, k_l, k_l)."""
        first = self.symmetries[0].lift(self.lift)
        first = first - first.mean(1, keepdim=True)  # brightness
        others = [
            symmetry.spread(mix) for symmetry, mix in zip(self.symmetries[1:], self.mixes, strict=True)
        ]
        kernels = [
            weight.view(self.width, -1, side, side)
            for weight, side in zip([first, *others], self.sides, strict=True)
        ]
        return [kernel.contiguous(memory_format=torch.channels_last) for kernel in kernels]  # faster

    def layers(self) -> Layers:
        """The plain network that it stands for."""
        biases = [self._pooled(bias) for bias in self.biases]
        return Layers(self.kernels(), biases, self._pooled(self.readout), self.dilations)

    def energy(self, patches: Tensor, sigma: Tensor) -> Tensor:
        """phi(v; sigma): (B, n, L) -> (B, L), without unit."""
        return self._phi(self._windows(patches / sigma)).view(len(patches), -1)

    def score(self, patches: Tensor, sigma: Tensor) -> Tensor:
        """s_V(v; sigma): (B, n, L) -> (B, n, L), in one over the image's unit."""
        force = self._force(self._windows(patches / sigma), self.kernels())
        return -force.flatten(1).view(len(patches), -1, patches.shape[1]).transpose(1, 2) / sigma

    def field_energy(self, x: Tensor, sigma: Tensor, boundary: Boundary) -> Tensor:
        """sum_c phi(G_c x; sigma): (B, C, H, W) -> (B,), without cutting patches."""
        grid = PatchGrid(x.shape[-2:], self.patch_shape, boundary)
        u = grid.pad(x) / sigma[:, None, None, None]
        total = x.new_zeros(len(x))
        for tile in self._tiles(u):
            total[tile[0]] += self._phi(u[tile]).flatten(1).sum(1)
        return total

    def field_score(
        self, x: Tensor, sigma: Tensor, boundary: Boundary, precision: Precision = "float32"
    ) -> Tensor:
        """sum_c G_c' s_V(G_c x; sigma): (B, C, H, W) -> (B, C, H, W), without cutting patches."""
        size = {"width": self.width, "side": self.sides[0]}
        if precision == "bfloat16" and triton.serves(x, self.parameters(), **size):
            return triton.field_of(self, self.layers, precision).score(x, sigma, boundary)
        if cpu.serves(x, self.parameters()):
            return cpu.field_score(self.layers(), x, sigma, boundary, precision)
        grid = PatchGrid(x.shape[-2:], self.patch_shape, boundary)
        levels = sigma[:, None, None, None]
        u = grid.pad(x) / levels
        kernels = self.kernels()
        total = torch.zeros_like(u)
        for tile in self._tiles(u):
            total[tile] -= self._force(u[tile], kernels)
        return grid.pad_adjoint(total) / levels

    def settings(self) -> dict[str, Any]:
        """The arguments that build this network again."""
        return {
            "sides": self.sides,
            "dilations": self.dilations,
            "channels": self.channels,
            "width": self.width,
        }

    def _phi(self, u: Tensor) -> Tensor:
        """phi of every patch of u: (B, C, h, w) -> (B, h - P + 1, w - P + 1)."""
        last = F.gelu(self._hidden(u, self.kernels())[-1])
        return torch.einsum("k,bkhw->bhw", self._pooled(self.readout), last)

    def _force(self, u: Tensor, kernels: list[Tensor]) -> Tensor:
        """The gradient of the sum of phi over the patches of u, with respect to u."""
        hidden = self._hidden(u, kernels)
        force = self._pooled(self.readout)[:, None, None].to(hidden[-1]).expand_as(hidden[-1])
        for kernel, h, d in zip(
            reversed(kernels), reversed(hidden), reversed(self.dilations), strict=True
        ):
            force = torch.ops.aten.gelu_backward(force, h)
            force = F.conv_transpose2d(force, kernel, dilation=d)
        return force

    def _hidden(self, u: Tensor, kernels: list[Tensor]) -> list[Tensor]:
        """h_1 .. h_D, wherever the patches of u need them."""
        hidden: list[Tensor] = []
        for kernel, bias, d in zip(kernels, self.biases, self.dilations, strict=True):
            z = F.gelu(hidden[-1]) if hidden else u
            hidden.append(F.conv2d(z, kernel, self._pooled(bias), dilation=d))
        return hidden

    def _pooled(self, weight: Tensor) -> Tensor:
        return weight.repeat_interleave(8)

    def _windows(self, patches: Tensor) -> Tensor:
        """(B, n, L) -> (B L, C, P, P)."""
        return patches.transpose(1, 2).reshape(-1, self.channels, *self.patch_shape)

    def _tiles(self, padded: Tensor) -> Iterator[tuple[slice, ...]]:
        """Pieces of the images that hold all cliques once."""
        limit = CLIQUES_PER_TILE_CPU if padded.device.type == "cpu" else CLIQUES_PER_TILE_GPU
        rim = self.patch_shape[0] - 1
        rows, columns = (size - rim for size in padded.shape[-2:])
        height = min(rows, math.isqrt(limit))
        width = min(columns, limit // height)
        depth = limit // (height * width)
        for first, top, left in product(
            range(0, len(padded), depth), range(0, rows, height), range(0, columns, width)
        ):
            yield (
                slice(first, first + depth),
                slice(None),
                slice(top, top + height + rim),
                slice(left, left + width + rim),
            )
