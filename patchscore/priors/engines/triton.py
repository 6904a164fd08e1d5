"""Scores of whole images on a GPU: patches and hidden units stay on the chip, or within a budget.

    s(x) = -sum_c w_c G_c' phi'(G_c x / sigma) / sigma

If all layers above the first have k_l = 1, as those of a network on patches, one kernel does everything
for a tile of cliques. Otherwise there is one kernel per layer and direction. Choices:

- No atomic additions. A clique adds to P^2 pixels, which would be P^2 atomic additions per pixel, with a
  result that depends on their order. Instead a program first sums along rows what its patches put into
  the same pixel, so that about P numbers per clique leave the chip, and a second kernel adds them up in
  a fixed order: the score is the same to the last bit every time.
- The last layer and its adjoint are one loop over units, as in attention with W_D for keys and values:
  h_D is never held as a whole. gelu' of the other layers stays in registers.
- A layer k x k reads each hidden unit k^2 times, and one erf costs more than the products that it feeds:
  so gelu(h) and gelu'(h) are stored, not h, and each is computed once. gelu'(h) is applied where a force
  is written, and the last force goes through the adjoint of the first layer without being written.
- The mean of a patch is taken out before rounding to bfloat16, and comes back as (W_1 1) m / sigma.

Multiply-adds per pixel, up and down: 2 (n w + (D - 1) w^2) = 193 000 for 11 x 11 patches, w = 256 and
D = 2; 154 000 for sides (7, 3, 3) and w = 64.

References: Dao et al., NeurIPS 2022 (the loop over keys); Tillet et al., MAPL 2019 (Triton).
"""

from __future__ import annotations

import importlib.metadata
import os
from contextlib import nullcontext
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from patchscore.errors import InputError
from patchscore.priors.engines.layers import LayeredNetwork, Layers, Precision
from patchscore.priors.engines.triton_launch import (
    PART,
    Tiles,
    Weights,
    conv_forces,
    least_block,
    patch_forces,
    power_of_two,
)
from patchscore.priors.patches import Boundary, PatchGrid

# What the kernels need of the compiler: gathers within a tensor, and tuples as arguments.
OLDEST_TRITON = 3, 3
LARGEST_WIDTH = 512
LARGEST_SIDE = 33


class Field:
    """The weights of a network as the kernels take them, and the score of whole images.

    Parameters
    ----------
    layers : on the device of the images
    precision
        Of the operands of products, which are summed in float32. ``"float32"`` takes three products of
        TF32 for each, which keeps 21 bits.
    tiles : how the kernels are cut up; the first of :func:`tile_sizes` that fits if not given

    Raises
    ------
    InputError
        If the network is too wide, or its first layer too large, to be held on the chip.
    """

    def __init__(
        self, layers: Layers, precision: Precision = "float32", tiles: Tiles | None = None
    ) -> None:
        width, _, side, _ = layers.kernels[0].shape
        if width > LARGEST_WIDTH or side > LARGEST_SIDE:
            raise InputError(
                f"the network has {width} units and a first layer of {side} x {side}; the kernels for "
                f"GPUs hold at most {LARGEST_WIDTH} units and {LARGEST_SIDE} x {LARGEST_SIDE} pixels; "
                "use a smaller network, or float32"
            )
        if tiles is not None and tiles.block < least_block(side):
            raise InputError(
                f"programs have {tiles.block} places; a first layer of {side} x {side} needs at least "
                f"{least_block(side)}, so that it reaches no further than the next program."
            )
        self.patch_shape = layers.patch_shape
        self._centred = layers.centred
        self.weights = _packed(layers, torch.bfloat16 if precision == "bfloat16" else torch.float32)
        on_patches = len(layers.kernels) <= 3 and all(len(k[0, 0]) == 1 for k in layers.kernels[1:])
        self._forces = patch_forces if on_patches else conv_forces
        self._tiles = [tiles] if tiles else tile_sizes(self.weights, on_patches=on_patches)

    def score(self, x: Tensor, sigma: Tensor, boundary: Boundary) -> Tensor:
        """s(x) of float32 images: (B, C, H, W), (B,) -> (B, C, H, W).

        Raises :class:`InputError` if no way to cut up the kernels fits on the device.
        """
        from triton.runtime.errors import OutOfResources

        grid = PatchGrid(x.shape[-2:], self.patch_shape, boundary)
        with torch.no_grad(), torch.cuda.device(x.device) if x.is_cuda else nullcontext():
            padded = grid.pad(self._centred(x)).contiguous()
            while self._tiles:
                total = torch.zeros_like(padded)
                try:
                    self._forces(self.weights, grid, padded, sigma.contiguous(), total, self._tiles[0])
                except OutOfResources:
                    self._tiles.pop(0)
                else:
                    return grid.pad_adjoint(total)
        raise InputError(
            f"no kernel for layers of {self.weights.width} units fits into the shared memory of "
            f"{x.device}; use a smaller network, or float32"
        )


def tile_sizes(weights: Weights, *, on_patches: bool) -> list[Tiles]:
    """What to try, best first, until one fits into the shared memory of a device.

    Forces, and gelu' of all layers of a network on patches, are in registers. As compiled for compute
    capability 9.0 these spill none within a loop in bfloat16: 11 x 11 patches, w = 256 and D = 2 take 64
    cliques on 8 warps, 255 registers and 74 KiB, so one program per multiprocessor; sides (7, 3, 3) and
    w = 64 take 128 places on 8 warps, 102 registers and 72 KiB, so two. Three products of TF32 hold
    operands twice, so in float32 blocks are smaller, and at w = 256 some registers do spill.
    """
    half = weights.lift.dtype == torch.bfloat16
    depth = len(weights.dilations)
    held = max(weights.width, weights.lift.shape[1] if depth == 1 else 0)
    held *= depth if on_patches else 1 if half else 2
    most = min(128, power_of_two((2**15 if half else 2**13) // held + 1) // 2)
    least = least_block(weights.side)
    chunk, stages = (32, 2) if on_patches or not half else (64, 3)
    blocks = [block for block in (128, 64, 32, 16) if least <= block <= max(least, most)]
    sizes = [Tiles(block, chunk, 8 if block > 16 else 4, stages) for block in blocks]
    return [*sizes, Tiles(least, 16, 8 if least > 16 else 4, 1)]


def field_of(network: LayeredNetwork, precision: Precision) -> Field:
    """The field of a network, packed again only if its parameters have changed or moved."""
    parameters = [(p.data_ptr(), p.device, _version(p)) for p in network.parameters()]
    state = (precision, *parameters)
    if network not in _FIELDS or _FIELDS[network][0] != state:
        _FIELDS[network] = state, Field(network.layers(), precision)
    return _FIELDS[network][1]


def serves(x: Tensor) -> bool:
    """Whether there is a GPU under the image and Triton for it.

    Under ``TRITON_INTERPRET=1`` images on a CPU are served too, for tests.
    """
    return (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1") and has_triton()


@lru_cache(maxsize=1)
def has_triton() -> bool:
    """Whether there is a Triton that is new enough for the kernels."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return False
    return tuple(int(part) for part in version.split(".")[:2]) >= OLDEST_TRITON


_FIELDS: WeakKeyDictionary[LayeredNetwork, tuple[Any, Field]] = WeakKeyDictionary()


def _packed(layers: Layers, dtype: torch.dtype) -> Weights:
    with torch.no_grad():
        first, *others = layers.kernels
        width = max(16, power_of_two(len(first)))
        lift = first.flatten(1)
        inputs = lift.shape[1]
        # The kernel of a single layer holds a whole patch; the others take it in parts.
        columns = -(-inputs // PART) * PART if others else max(PART, power_of_two(inputs))
        down = [_filled(kernel.permute(2, 3, 0, 1), width, width).to(dtype) for kernel in others]
        return Weights(
            lift=_filled(lift, width, columns).to(dtype),
            row_sums=_filled(lift.double().sum(1).to(lift), width),
            hidden=torch.cat([kernel.flatten() for kernel in down])
            if down
            else lift.new_empty(0, dtype=dtype),
            up=[kernel.transpose(2, 3).contiguous() for kernel in down],
            down=down,
            biases=torch.stack([_filled(bias, width) for bias in layers.biases]),
            readout=_filled(layers.readout, width),
            channels=first.shape[1],
            side=first.shape[2],
            dilations=list(layers.dilations),
        )


def _filled(values: Tensor, *shape: int) -> Tensor:
    """Values with zeros after them, along their last axes."""
    sizes = zip(reversed(values.shape), reversed(shape), strict=False)
    return F.pad(values, [n for size, wanted in sizes for n in (0, wanted - size)]).contiguous()


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
