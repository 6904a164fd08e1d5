"""How scores of patches become the score of an image, where it is more than a sum over one grid.

    center      s(x)_i = [s_V(G_i x)]_center                  the patch that is centred on pixel i
    partition   s(x)   = sum_{c in a tiling} G_c' s_V(G_c x)  each pixel belongs to one patch
    kikuchi     s(x)   = sum_r k_r sum_{c in r} G_c' s_r(G_c x)

over the regions r = P x P, P x (P-1), (P-1) x P, (P-1) x (P-1) with counting numbers k = 1, -1, -1, 1,
each with the score s_r of its own marginal: overlaps of neighbouring patches are taken out again, and
the overlaps of these put back. It is exact, without noise, on an open Markov chain of pairs.

References: Hu et al., "Learning Image Priors through Patch-based Diffusion Models" (PaDIS), NeurIPS 2024
(partition); Yedidia, Freeman and Weiss, IEEE Trans. Information Theory 51 (2005), section VI (counting
numbers of a region-based approximation).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from patchscore.errors import InputError
from patchscore.priors.cliques import Clique, Potential
from patchscore.priors.patches import Boundary, PatchGrid, patches_per_tile, source_index


@runtime_checkable
class Marginal(Protocol):
    """A potential that knows the marginal of a part of its patch."""

    def marginal(self, patch_shape: tuple[int, int]) -> Potential:
        """The potential of the top left part of this shape."""


def center_score(clique: Clique, x: Tensor, sigma: Tensor, boundary: Boundary) -> Tensor:
    """The centre of each patch's score, at its own pixel; zero where no patch is centred.

    Raises :class:`InputError` if the patches have no central pixel.
    """
    rows, columns = clique.patch_shape
    if rows % 2 == 0 or columns % 2 == 0:
        raise InputError(
            f"patches of {rows} x {columns} pixels have no central pixel; the assembly 'center' needs "
            "odd sides."
        )
    center = x.new_zeros(clique.channels, rows, columns)
    center[:, rows // 2, columns // 2] = 1
    score = clique.scorer()
    grid = PatchGrid(x.shape[-2:], clique.patch_shape, boundary)
    return grid.apply(x, sigma, lambda v, levels: center.view(-1, 1) * score(v, levels))


def partition_score(
    clique: Clique, x: Tensor, sigma: Tensor, boundary: Boundary, offset: tuple[int, int]
) -> Tensor:
    """The scores of the patches of one tiling, side by side; ``offset`` is where one of them begins.

    Raises :class:`InputError` if the boundary is open, since tiles then reach beyond it.
    """
    if boundary == "open":
        raise InputError(
            "the tiles of a partition reach beyond the border of the image; use "
            'boundary="symmetric" or "periodic".'
        )
    size = x.shape[-2:]
    top, left = (-shift % side for shift, side in zip(offset, clique.patch_shape, strict=True))
    for axis, before, side in ((-2, top, clique.patch_shape[0]), (-1, left, clique.patch_shape[1])):
        padded = -(-(before + x.shape[axis]) // side) * side
        x = x.index_select(axis, source_index(x.shape[axis], before, padded, boundary).to(x.device))
    patches = F.unfold(x, clique.patch_shape, stride=clique.patch_shape)
    score, levels = clique.scorer(), sigma[:, None, None]
    parts = patches.split(max(1, patches_per_tile(x) // len(x)), dim=2)
    scores = torch.cat([score(part, levels) for part in parts], dim=2)
    tiled = F.fold(scores, x.shape[-2:], clique.patch_shape, stride=clique.patch_shape)
    return tiled[..., top : top + size[0], left : left + size[1]]


def kikuchi_regions(clique: Clique) -> list[Potential]:
    """The potentials of the patch, of its overlaps with both neighbours and of the overlap of these.

    Raises :class:`InputError` if the marginals of parts of the patch are not known.
    """
    if not isinstance(clique, Marginal):
        raise InputError(
            f"the marginals of parts of a patch are not known for {type(clique).__name__}, and the "
            "assembly 'kikuchi' needs them; use a closed-form clique such as GaussianPatches."
        )
    rows, columns = clique.patch_shape
    shapes = product((rows, rows - 1), (columns, columns - 1))
    return [clique.marginal(shape) for shape in shapes if min(shape) > 0]


def kikuchi_score(regions: Sequence[Potential], x: Tensor, sigma: Tensor, boundary: Boundary) -> Tensor:
    """The sum over regions of k_r sum_c G_c' s_r(G_c x); the first region is the patch."""
    score = torch.zeros_like(x)
    for region in regions:
        counting, inside = _place(region, regions[0], x, boundary)
        grid = PatchGrid(x[inside].shape[-2:], region.patch_shape, boundary)
        score[inside] += counting * grid.apply(x[inside], sigma, region.score)
    return score


def kikuchi_energy(regions: Sequence[Potential], x: Tensor, sigma: Tensor, boundary: Boundary) -> Tensor:
    """The sum over regions of k_r sum_c phi_r(G_c x): (B,)."""
    energy = x.new_zeros(len(x))
    for region in regions:
        counting, inside = _place(region, regions[0], x, boundary)
        grid = PatchGrid(x[inside].shape[-2:], region.patch_shape, boundary)
        energy = energy + counting * grid.total(x[inside], sigma, region.energy)
    return energy


def _place(
    region: Potential, patch: Potential, x: Tensor, boundary: Boundary
) -> tuple[int, tuple[slice, ...]]:
    """The counting number of a region, and the part of the image whose windows are such regions.

    On an open boundary the outermost windows belong to one patch only: they are no overlaps.
    """
    overlap = [a < b for a, b in zip(region.patch_shape, patch.patch_shape, strict=True)]
    trims = [int(trimmed and boundary == "open") for trimmed in overlap]
    rows, columns = (slice(t, n - t) for t, n in zip(trims, x.shape[-2:], strict=True))
    return (-1) ** sum(overlap), (slice(None), slice(None), rows, columns)
