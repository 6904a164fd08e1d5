"""The passes of :mod:`patchscore.priors.engines.triton` over an image, as launches of its kernels.

    patch_forces    one kernel per stripe of lines, as many as there is room for their sums
    conv_forces     one kernel per layer and direction for each tile, as its hidden units fit the budget

Both add -sum_c w_c S_c' phi'(S_c y / sigma) / sigma to an image for the extended image y = E x.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from patchscore.priors.patches import PatchGrid, tiling

# Sums along rows, between the two kernels; they should stay in the second-level cache.
SUMS_BYTES = 2**26
# Hidden units of a tile of a convolutional network. A larger tile repeats less of its rim.
HIDDEN_BYTES = 2**29
# Pixels of a patch per product.
PART = 32
FOLD_BLOCK = 256


class Tiles(NamedTuple):
    """How a kernel is cut up.

    Attributes
    ----------
    block : cliques, or places of a layer, per program
    chunk : hidden units per product
    warps, stages : of a program, and how many loads are in flight
    """

    block: int
    chunk: int
    warps: int
    stages: int


class Weights(NamedTuple):
    """Layers as the kernels take them, padded with zeros to powers of two.

    Attributes
    ----------
    lift : W_1, (width, n)
    row_sums : W_1 1
    hidden : all of ``down``, one after the other
    up, down : W_l(q) of the other layers, (k, k, inputs, outputs) and (k, k, outputs, inputs)
    biases, readout : (D, width) and (width,)
    channels, side : of the first layer
    dilations : of all layers
    """

    lift: Tensor
    row_sums: Tensor
    hidden: Tensor
    up: list[Tensor]
    down: list[Tensor]
    biases: Tensor
    readout: Tensor
    channels: int
    side: int
    dilations: list[int]

    @property
    def width(self) -> int:
        """Hidden units of a layer."""
        return len(self.readout)

    def constants(self) -> dict[str, Any]:
        """What all kernels are compiled for."""
        half = self.lift.dtype == torch.bfloat16
        return {
            "CHANNELS": self.channels,
            "SIDE": self.side,
            "PADDED": self.lift.shape[1],
            "WIDTH": self.width,
            "BF16": half,
            "PRECISION": "tf32" if half else "tf32x3",
        }


class Sums:
    """Sums along rows: room for them, and their way to the image.

    A program covers ``span`` columns, so for each of the k_1 rows of a patch it leaves span + k_1 - 1
    sums of the one row that its cliques share.
    """

    def __init__(self, weights: Weights, columns: int, tiles: Tiles) -> None:
        self.side, self.channels = weights.side, weights.channels
        self.columns = columns
        self.span = span_of(columns, self.side, tiles)
        self.segments = -(-columns // self.span)
        self.per_line = self.channels * self.side * self.segments * (self.span + self.side - 1)

    def empty(self, lines: int, like: Tensor) -> Tensor:
        """Room for the sums of some lines."""
        return like.new_empty(lines * self.per_line)

    def add(self, sums: Tensor, total: Tensor, first: int, lines: int, rows: int) -> None:
        """Add to images the sums of lines ``first`` to first + lines, each image having ``rows``."""
        from patchscore.priors.engines import triton_kernels

        height, width = total.shape[-2:]
        top, bottom = (line // rows * height + line % rows for line in (first, first + lines - 1))
        grid = bottom + self.side - top, -(-width // FOLD_BLOCK), self.channels
        places = first, lines, rows, self.columns, height, width, top
        constants = {"SIDE": self.side, "SPAN": self.span, "BLOCK": FOLD_BLOCK}
        triton_kernels.fold[grid](
            sums, total, *total.stride()[:3], *places, **constants, num_warps=4, enable_fp_fusion=True
        )

    def cut(self) -> dict[str, int]:
        """What the kernels that leave sums are compiled for."""
        return {"LINES": max(16, power_of_two(self.channels * self.side)), "PART": PART}


def patch_forces(
    weights: Weights, grid: PatchGrid, padded: Tensor, sigma: Tensor, total: Tensor, tiles: Tiles
) -> None:
    """Add all forces of a network on patches, of at most three layers, to ``total``."""
    from patchscore.priors.engines import triton_kernels

    rows, columns = grid.shape
    sums = Sums(weights, columns, tiles)
    at_once = tiles.block // sums.span
    stripe = max(1, SUMS_BYTES // (4 * sums.per_line * at_once)) * at_once
    image = padded, *padded.stride()[:3], sigma
    layers = weights.lift, weights.row_sums, weights.hidden, weights.biases, weights.readout
    constants = {
        "DEPTH": len(weights.dilations),
        "HALVES": grid.weights(padded) is not None,
        "CHUNK": min(tiles.chunk, weights.width),
        **weights.constants(),
        **sums.cut(),
        **launch(tiles, sums.span),
    }
    for first in range(0, len(padded) * rows, stripe):
        lines = min(stripe, len(padded) * rows - first)
        room = sums.empty(lines, padded)
        triton_kernels.patch_forces[(programs(lines, columns, sums.span, tiles),)](
            *image, *layers, room, first, lines, rows, columns, **constants
        )
        sums.add(room, total, first, lines, rows)


def conv_forces(
    weights: Weights, grid: PatchGrid, padded: Tensor, sigma: Tensor, total: Tensor, tiles: Tiles
) -> None:
    """Add all forces of a network of at least two layers to ``total``."""
    for images, rows, columns in tiling(len(padded), grid.shape, cliques_per_tile(weights, grid)):
        window = grid.window(images, rows, columns)
        rim = {
            "top": rows.start,
            "left": columns.start,
            "last_row": grid.shape[0] - 1,
            "last_column": grid.shape[1] - 1,
            "HALVES": grid.weights(padded) is not None,
        }
        conv_tile(weights, padded[window], sigma[images], total[window], rim, tiles)


def conv_tile(
    weights: Weights, u: Tensor, sigma: Tensor, total: Tensor, rim: dict[str, Any], tiles: Tiles
) -> None:
    """One pass over a tile: up to the last layer, and down again."""
    from patchscore.priors.engines import triton_kernels

    rows, columns = (side - weights.side + 1 for side in u.shape[-2:])
    lines = len(u) * rows
    sums = Sums(weights, columns, tiles)
    room = sums.empty(lines, u)
    z = u.new_empty((len(u), rows, columns, weights.width), dtype=weights.lift.dtype)
    slope = torch.empty_like(z)
    image = u, *u.stride()[:3], sigma
    layer_one = weights.lift, weights.row_sums, weights.biases
    constants = {"PART": PART, **weights.constants(), **launch(tiles, sums.span)}
    triton_kernels.conv_first[(programs(lines, columns, sums.span, tiles),)](
        *image, *layer_one, z, slope, lines, rows, columns, **constants
    )

    def layer(
        mode: Any, source: Tensor, kernel: Tensor, step: int, bias: Tensor, slope: Tensor, out: Tensor
    ) -> Tensor:
        """One layer up or down, to ``out``, at the places of ``slope``."""
        rows, columns = slope.shape[1:3]
        span = span_of(columns, weights.side, tiles)
        lines = len(slope) * rows
        inputs = source, *source.shape[1:3], kernel, step, weights.readout, bias
        outputs = slope, out, sigma, weights.lift, room
        constants = {
            "MODE": mode,
            "TAPS": len(kernel),
            "CHUNK": min(tiles.chunk, weights.width),
            **weights.constants(),
            **sums.cut(),
            **launch(tiles, span),
        }
        triton_kernels.conv_next[(programs(lines, columns, span, tiles),)](
            *inputs, *outputs, lines, rows, columns, **rim, **constants
        )
        return out

    def smaller(source: Tensor, kernel: Tensor, d: int) -> Tensor:
        """Room for the hidden units above some."""
        size = [side - d * (len(kernel) - 1) for side in source.shape[1:3]]
        return source.new_empty((len(source), *size, weights.width))

    slopes = [slope]
    *between, last = zip(weights.up, weights.dilations[1:], weights.biases[1:], strict=True)
    for kernel, d, bias in between:
        slopes.append(smaller(z, kernel, d))
        z = layer(triton_kernels.HIDDEN, z, kernel, d, bias, slopes[-1], torch.empty_like(slopes[-1]))
    kernel, d, bias = last
    force = smaller(z, kernel, d)
    force = layer(triton_kernels.FORCE, z, kernel, d, bias, force, force)
    for kernel, d in zip(reversed(weights.down), weights.dilations[:0:-1], strict=True):
        slope = slopes.pop()
        mode, out = (
            (triton_kernels.CHAIN, torch.empty_like(slope)) if slopes else (triton_kernels.FOLD, slope)
        )
        force = layer(mode, force, kernel, -d, bias, slope, out)
    sums.add(room, total, 0, lines, lines // len(u))


def cliques_per_tile(weights: Weights, grid: PatchGrid) -> int:
    """How many cliques may be in a square tile whose hidden units and sums fit the budget."""
    bytes_each = (len(weights.dilations) + 1) * weights.width * weights.lift.element_size()
    bytes_each += 8 * weights.channels * weights.side
    reach = grid.patch_shape[0] - weights.side  # of the hidden units of the first layer, around a tile
    return max(16, math.isqrt(HIDDEN_BYTES // bytes_each) - reach) ** 2


def least_block(side: int) -> int:
    """The fewest places per program for a first layer to reach no further than the next program."""
    return max(16, power_of_two(side - 1))


def span_of(columns: int, side: int, tiles: Tiles) -> int:
    """Columns per program: as many as there are, if a program can have so many."""
    return min(tiles.block, max(power_of_two(columns), least_block(side)))


def programs(lines: int, columns: int, span: int, tiles: Tiles) -> int:
    """How many programs cover lines of columns."""
    return -(-lines * span // tiles.block) * -(-columns // span)


def launch(tiles: Tiles, span: int) -> dict[str, Any]:
    """How a program is cut up."""
    return {
        "BLOCK": tiles.block,
        "SPAN": span,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
        "enable_fp_fusion": True,
    }


def power_of_two(number: int) -> int:
    """The least power of two that is no smaller."""
    return 1 << (number - 1).bit_length() if number > 1 else 1
