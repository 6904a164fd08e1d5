"""Patches of an image: the cutting operators G_c, their adjoints, and what lies beyond the border.

    image -> patches      G_c  = S_c E
    patches -> image      G_c' = E' S_c'

E extends the image beyond its border (a linear map, so it has an adjoint) and S_c cuts the c-th
P x P window out of the extended image. A Markov random field over all overlapping patches is then

    log p(x) = - sum_c w_c phi(G_c x) + const
    grad log p(x) = - sum_c w_c G_c' phi'(G_c x)

which is an exact gradient for every boundary, because E' is the exact adjoint of E.

Reference: Roth and Black, "Fields of Experts", IJCV 82 (2009), equation 7.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import product
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from patchscore.checks import check_choice
from patchscore.errors import InputError

Boundary = Literal["symmetric", "periodic", "open"]
Window = tuple[slice, slice, slice, slice]

# Patches in flight at once: on a CPU the activations of a tile should stay in the cache, on a GPU
# a tile should fill the device.
PATCHES_PER_TILE_CPU = 1024
PATCHES_PER_TILE_GPU = 262_144
# glibc returns freed memory to the system, and fresh pages for every tile then cost as much as half the
# arithmetic, until a block of up to 32 MB has come and gone: from then on it keeps as much for reuse.
KEPT_BYTES = 31 * 2**20


class PatchGrid:
    """The cliques of an image: all overlapping patches of one size, under one boundary.

    Boundaries
    ----------
    ``"periodic"``   the image is a torus: H x W patches.
    ``"symmetric"``  half-sample reflection (d c b a | a b c d | d c b a): the patches centred on the
                     image's pixels, or on its pixel corners where a side of the patch is even; those
                     on the rim then count half (w_c = 1/2). The energy is a quarter of that of the
                     mirrored image on the torus of twice the size if phi is invariant to flips.
    ``"open"``       only patches inside the image: (H - P + 1) x (W - P + 1). Pixels closer than
                     P - 1 to the border belong to fewer cliques.

    In the first two every pixel belongs to P^2 cliques (counting reflected ones), and an image smaller
    than a patch is repeated until the patch is full.

    Parameters
    ----------
    image_shape : (H, W), at least as large as the patch if the boundary is open
    patch_shape : (rows, columns) of a patch
    """

    def __init__(
        self, image_shape: Sequence[int], patch_shape: Sequence[int], boundary: Boundary
    ) -> None:
        check_choice(get_args(Boundary), boundary=boundary)
        small = any(size < side for size, side in zip(image_shape, patch_shape, strict=True))
        if boundary == "open" and small:
            raise InputError(
                f"the image is {_by(image_shape)} pixels, smaller than one patch of "
                f"{_by(patch_shape)}; use a larger image or another boundary."
            )
        self.image_shape = tuple(image_shape)
        self.patch_shape = tuple(patch_shape)
        self.boundary = boundary
        margins = [_margins(side, boundary) for side in patch_shape]
        self.before = margins[0][0], margins[1][0]
        self.padded_shape = tuple(size + sum(m) for size, m in zip(image_shape, margins, strict=True))
        self.shape = tuple(
            size - side + 1 for size, side in zip(self.padded_shape, patch_shape, strict=True)
        )

    def pad(self, x: Tensor) -> Tensor:
        """E x: (B, C, H, W) extended beyond its border, (B, C, *padded_shape)."""
        if self.padded_shape == self.image_shape:
            return x
        rows, columns = self._sources(x.device)
        return x.index_select(-2, rows).index_select(-1, columns)

    def pad_adjoint(self, y: Tensor) -> Tensor:
        """E' y: what was put beyond the border is added to the pixels that it was copied from."""
        rows, columns = self._sources(y.device)
        y = _fold_back(y, -2, rows, self.before[0], self.image_shape[0])
        return _fold_back(y, -1, columns, self.before[1], self.image_shape[1])

    def extract(self, x: Tensor) -> Tensor:
        """All patches (G_1 x, ..., G_L x): (B, C, H, W) -> (B, C P^2, L). The definition."""
        return F.unfold(self.pad(x), self.patch_shape)

    def assemble(self, patches: Tensor) -> Tensor:
        """sum_c G_c' v_c: (B, C P^2, L) -> (B, C, H, W). The adjoint of :meth:`extract`."""
        return self.pad_adjoint(F.fold(patches, self.padded_shape, self.patch_shape))

    def weights(self, like: Tensor) -> Tensor | None:
        """The weights w_c as a (rows, columns) grid; None where all are one."""
        if self.boundary != "symmetric" or all(side % 2 for side in self.patch_shape):
            return None
        rows, columns = (
            _rim_weights(count, side, self.boundary, like)
            for count, side in zip(self.shape, self.patch_shape, strict=True)
        )
        return rows[:, None] * columns

    def overlap(self, like: Tensor) -> Tensor:
        """How many cliques a pixel belongs to, sum_c w_c G_c' 1: (1, 1, H, W)."""
        counts = []
        for axis, sources in enumerate(self._sources(like.device)):
            side = self.patch_shape[axis]
            weights = _rim_weights(self.shape[axis], side, self.boundary, like)
            spread = F.conv_transpose1d(weights[None, None], like.new_ones(1, 1, side))[0, 0]
            counts.append(_fold_back(spread, 0, sources, self.before[axis], self.image_shape[axis]))
        return (counts[0][:, None] * counts[1])[None, None]

    def apply(self, x: Tensor, sigma: Tensor, f: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """sum_c w_c G_c' f(G_c x, sigma), tile by tile, so that patches are never all in memory.

        x is (B, C, H, W), sigma (B,), and f maps patches (b, n, l) and sigma (b, 1, 1) to (b, n, l).
        """
        padded = self.pad(x)
        total = torch.zeros_like(padded)
        for window, weights in self.pieces(padded, patches_per_tile(x)):
            patches = F.unfold(padded[window], self.patch_shape)
            values = f(patches, sigma[window[0], None, None])
            values = values if weights is None else values * weights.flatten()
            total[window] += F.fold(values, total[window].shape[-2:], self.patch_shape)
        return self.pad_adjoint(total)

    def total(self, x: Tensor, sigma: Tensor, phi: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """sum_c w_c phi(G_c x, sigma), tile by tile: (B,). phi maps (b, n, l) to (b, l)."""
        padded, total = self.pad(x), x.new_zeros(len(x))
        for window, weights in self.pieces(padded, patches_per_tile(x)):
            images = window[0]
            values = phi(F.unfold(padded[window], self.patch_shape), sigma[images, None, None])
            total[images] += (values if weights is None else values * weights.flatten()).sum(-1)
        return total

    def pieces(self, padded: Tensor, limit: int, rim: int = 0) -> Iterator[tuple[Window, Tensor | None]]:
        """Windows of the padded images, and the weights w_c: see :func:`tiling`.

        Every patch is in one window.
        """
        if padded.device.type == "cpu":
            torch.empty(KEPT_BYTES, dtype=torch.uint8)
        weights = self.weights(padded)
        for images, rows, columns in tiling(len(padded), self.shape, limit, rim):
            yield (
                self.window(images, rows, columns),
                None if weights is None else weights[rows, columns],
            )

    def window(self, images: slice, rows: slice, columns: slice) -> Window:
        """The pixels of the padded images that the patches of a tile see."""
        down, right = (side - 1 for side in self.patch_shape)
        return (
            images,
            slice(None),
            slice(rows.start, rows.stop + down),
            slice(columns.start, columns.stop + right),
        )

    def _sources(self, device: torch.device) -> list[Tensor]:
        """For both axes: the pixel of the image that each pixel of the padded image copies."""
        # A compiler would warn of the cache.
        index = source_index.__wrapped__ if torch.compiler.is_compiling() else source_index
        return [
            index(size, before, padded, self.boundary, device)
            for size, before, padded in zip(
                self.image_shape, self.before, self.padded_shape, strict=True
            )
        ]


def tiling(
    images: int, shape: Sequence[int], limit: int, rim: int = 0
) -> Iterator[tuple[slice, slice, slice]]:
    """Pieces (images, rows, columns) of grids of cliques: nearly square, nearly equal, within a limit.

    Square, since neighbours compute the hidden units of their rims twice. With a rim of so many rows and
    columns, no piece has more places than a square one of ``limit`` cliques.
    """
    side = math.isqrt(limit)
    places = max(limit, (side + rim) ** 2)
    height = _part(shape[0], side)
    width = _part(shape[1], max(1, places // (height + rim) - rim))
    depth = _part(images, max(1, places // ((height + rim) * (width + rim))))
    for first, top, left in product(
        range(0, images, depth), range(0, shape[0], height), range(0, shape[1], width)
    ):
        yield (
            slice(first, min(first + depth, images)),
            slice(top, min(top + height, shape[0])),
            slice(left, min(left + width, shape[1])),
        )


def _part(size: int, limit: int) -> int:
    """The size of a part, if it is split into as few equal parts up to the limit as there can be."""
    return math.ceil(size / math.ceil(size / limit))


def patches_per_tile(x: Tensor) -> int:
    """How many patches to work on at once, on the device of x."""
    return PATCHES_PER_TILE_CPU if x.device.type == "cpu" else PATCHES_PER_TILE_GPU


def _margins(side: int, boundary: Boundary) -> tuple[int, int]:
    """Pixels added before and after an axis."""
    match boundary:
        case "open":
            return 0, 0
        case "periodic":
            return side // 2, side - 1 - side // 2
        case "symmetric":
            return side // 2, side // 2


@lru_cache(maxsize=64)
def source_index(
    size: int, before: int, padded: int, boundary: Boundary, device: torch.device | str = "cpu"
) -> Tensor:
    """Along one axis, the pixel of the image that each pixel of the padded image copies.

    It is kept on its device, since a copy to a GPU would wait for it at every score.
    """
    with torch.inference_mode(False):  # a cached tensor must serve autograd too
        index = torch.arange(-before, padded - before, device=device)
        if boundary == "symmetric":
            index = index % (2 * size)
            return torch.minimum(index, 2 * size - 1 - index)
        return index % size


def _fold_back(y: Tensor, axis: int, sources: Tensor, before: int, size: int) -> Tensor:
    """The adjoint of copying along one axis: the middle stays, both margins are added to it."""
    after = y.shape[axis] - before - size
    if before == after == 0:
        return y
    middle = y.narrow(axis, before, size)
    left = middle.index_add(axis, sources[:before], y.narrow(axis, 0, before))
    return left.index_add_(axis, sources[before + size :], y.narrow(axis, before + size, after))


def _rim_weights(count: int, side: int, boundary: Boundary, like: Tensor) -> Tensor:
    weights = like.new_ones(count)
    if boundary == "symmetric" and side % 2 == 0:
        weights[0] = weights[-1] = 0.5
    return weights


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
