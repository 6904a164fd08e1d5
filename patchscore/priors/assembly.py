"""How the scores of patches become the score of an image.

    sum         s(x)   = sum_c G_c' s_V(G_c x)                     clique potentials
    mean        s(x)   = sum_c G_c' s_V(G_c x) / overlap           patch marginals, as all that follow
    center      s(x)_i = [s_V(G_i x)]_center                       of the patch centred on pixel i
    partition   s(x)   = sum_{c in a tiling} G_c' s_V(G_c x)       each pixel belongs to one patch
    kikuchi     s(x)   = sum_r k_r sum_{c in r} G_c' s_r(G_c x)    overlaps are subtracted

A network that was trained on single patches knows the marginal of a patch: a sum of these would count
every pixel P^2 times. One that was trained on larger crops, through the sum, is a clique potential.

References: Roth and Black, IJCV 82 (2009) (sum); Hu et al., "Learning Image Priors through Patch-based
Diffusion Models" (PaDIS), NeurIPS 2024 (partition); Yedidia, Freeman and Weiss, IEEE Trans. Information
Theory 51 (2005), section VI (Kikuchi; the counting numbers k_r of a region-based approximation).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from patchscore.checks import check_choice
from patchscore.errors import InputError
from patchscore.priors.cliques import Clique, Potential
from patchscore.priors.engines.layers import Precision
from patchscore.priors.patches import Boundary, PatchGrid, patches_per_tile, source_index
from patchscore.priors.trainable import TrainedOn


@runtime_checkable
class Marginal(Protocol):
    """A potential that knows the marginal of a part of its patch."""

    def marginal(self, patch_shape: tuple[int, int]) -> Potential:
        """The potential of the top left part of this shape."""


class Field(NamedTuple):
    """What a rule assembles: the network, the potentials that it has as overlaps, and where and how."""

    network: Clique
    overlaps: Sequence[Potential]
    boundary: Boundary
    precision: Precision = "float32"


@dataclass(frozen=True)
class Assembly(ABC):
    """A rule by which the scores of patches become the score of an image.

    Attributes
    ----------
    name : in files, in messages and in ``PatchPrior(assembly=name)``
    trained_on : what networks for this rule are trained on
    gradient_under : the boundaries under which the score of a potential is a gradient
    """

    name: ClassVar[str]
    trained_on: ClassVar[TrainedOn] = "patches"
    gradient_under: ClassVar[tuple[Boundary, ...]] = ()

    @abstractmethod
    def score(self, field: Field, x: Tensor, sigma: Tensor) -> Tensor:
        """The score of images: (B, C, H, W), (B,) -> (B, C, H, W)."""

    def energy(self, field: Field, x: Tensor, sigma: Tensor) -> Tensor:
        """-log p(x), if :meth:`check_gradient` passes: (B, C, H, W), (B,) -> (B,).

        Raises :class:`InputError` for a rule that does not define it.
        """
        raise InputError(
            f"the assembly {self.name!r} has no energy, so there is no log_prob; define "
            f"{type(self).__name__}.energy, or work with the score alone."
        )

    def check_gradient(self, boundary: Boundary) -> None:
        """Raise :class:`InputError` if the score of a potential is not a gradient, and say why."""
        if boundary in self.gradient_under:
            return
        raise InputError(
            f"the {self.name} over an {boundary} boundary is not the gradient of a density (pixels near "
            'the border belong to fewer patches); use boundary="symmetric" or "periodic".'
            if self.gradient_under
            else f"the assembly {self.name!r} is not the gradient of a density of whole images; use "
            '"mean" or "kikuchi" for patch marginals, or work with the score alone.'
        )

    def overlaps(self, network: Clique) -> list[Potential]:
        """The potentials of overlaps of patches that the rule needs beside the network."""
        return []

    def fits(self, crop: int, side: int, boundary: Boundary) -> bool:
        """Whether crops of this size can train a network on patches of this side for the rule."""
        return False

    def interior(self, x: Tensor, patch_shape: tuple[int, int], boundary: Boundary) -> Tensor:
        """The pixels of x whose score has all its cliques: all of them, unless the boundary is open."""
        if boundary != "open":
            return x
        rows, columns = (
            slice(side - 1, size - side + 1)
            for side, size in zip(patch_shape, x.shape[-2:], strict=True)
        )
        return x[..., rows, columns]


class Sum(Assembly):
    """The sum over all patches: a field of clique potentials."""

    name = "sum"
    trained_on = "crops"
    gradient_under = ("symmetric", "periodic", "open")

    def score(self, field: Field, x: Tensor, sigma: Tensor) -> Tensor:
        """sum_c G_c' s_V(G_c x)."""
        return field.network.field_score(x, sigma, field.boundary, field.precision)

    def energy(self, field: Field, x: Tensor, sigma: Tensor) -> Tensor:
        """sum_c phi(G_c x)."""
        return cast(Potential, field.network).field_energy(x, sigma, field.boundary)

    def fits(self, crop: int, side: int, boundary: Boundary) -> bool:
        """Crops in which some pixel has all its cliques."""
        return crop >= (2 * side - 1 if boundary == "open" else side)


class Mean(Assembly):
    """The mean over the patches that overlap at a pixel."""

    name = "mean"
    gradient_under = ("symmetric", "periodic")

    def score(self, field: Field, x: Tensor, sigma: Tensor) -> Tensor:
        """sum_c G_c' s_V(G_c x) / overlap."""
        grid = PatchGrid(x.shape[-2:], field.network.patch_shape, field.boundary)
        return Sum().score(field, x, sigma) / grid.overlap(x)

    def energy(self, field: Field, x: Tensor, sigma: Tensor) -> Tensor:
        """sum_c phi(G_c x) / P^2."""
        return Sum().energy(field, x, sigma) / math.prod(field.network.patch_shape)

    def fits(self, crop: int, side: int, boundary: Boundary) -> bool:
        """Single patches."""
        return crop == side

    def interior(self, x: Tensor, patch_shape: tuple[int, int], boundary: Boundary) -> Tensor:
        """All pixels: a mean of few patches is a mean too."""
        return x


class Center(Assembly):
    """At every pixel the score of the patch that is centred on it; patches have odd sides."""

    name = "center"

    def score(self, field: Field, x: Tensor, sigma: Tensor) -> Tensor:
        """[s_V(G_i x)]_center; zero where no patch is centred.

        Raises :class:`InputError` if the patches have no central pixel.
        """
        rows, columns = field.network.patch_shape
        if rows % 2 == 0 or columns % 2 == 0:
            raise InputError(
                f"patches of {rows} x {columns} pixels have no central pixel; the assembly 'center' "
                "needs odd sides."
            )
        center = x.new_zeros(field.network.channels, rows, columns)
        center[:, rows // 2, columns // 2] = 1
        score = field.network.scorer()
        grid = PatchGrid(x.shape[-2:], (rows, columns), field.boundary)
        return grid.apply(x, sigma, lambda v, levels: center.view(-1, 1) * score(v, levels))


@dataclass(frozen=True)
class Partition(Assembly):
    """The patches of one tiling, side by side.

    Over many steps of a sampler, tilings at random places leave no seams: :meth:`random`.

    Parameters
    ----------
    offset
        The row and the column where one of the tiles begins.
    """

    name = "partition"
    offset: tuple[int, int] = (0, 0)

    @classmethod
    def random(cls, patch_shape: tuple[int, int], generator: torch.Generator) -> Partition:
        """A tiling at a place drawn with equal probability from all that there are."""
        rows, columns = (int(torch.randint(side, (), generator=generator)) for side in patch_shape)
        return cls((rows, columns))

    def score(self, field: Field, x: Tensor, sigma: Tensor) -> Tensor:
        """sum_{c in the tiling} G_c' s_V(G_c x).

        Raises :class:`InputError` if the boundary is open, since tiles then reach beyond it.
        """
        if field.boundary == "open":
            raise InputError(
                "the tiles of a partition reach beyond the border of the image; use "
                'boundary="symmetric" or "periodic".'
            )
        size, shape = x.shape[-2:], field.network.patch_shape
        top, left = (-shift % side for shift, side in zip(self.offset, shape, strict=True))
        for axis, before, side in ((-2, top, shape[0]), (-1, left, shape[1])):
            padded = -(-(before + x.shape[axis]) // side) * side
            sources = source_index(x.shape[axis], before, padded, field.boundary)
            x = x.index_select(axis, sources.to(x.device))
        patches = F.unfold(x, shape, stride=shape)
        score, levels = field.network.scorer(), sigma[:, None, None]
        parts = patches.split(max(1, patches_per_tile(x) // len(x)), dim=2)
        scores = torch.cat([score(part, levels) for part in parts], dim=2)
        tiled = F.fold(scores, x.shape[-2:], shape, stride=shape)
        return tiled[..., top : top + size[0], left : left + size[1]]


class Kikuchi(Assembly):
    """Patches, less their overlaps with both neighbours, plus the overlaps of these.

    The regions r are P x P, P x (P-1), (P-1) x P and (P-1) x (P-1), with counting numbers k = 1, -1, -1,
    1 and the score s_r of their own marginal. Exact, without noise, on an open Markov chain of pairs.
    """

    name = "kikuchi"
    gradient_under = ("symmetric", "periodic", "open")

    def overlaps(self, network: Clique) -> list[Potential]:
        """The marginals of the smaller regions.

        Raises :class:`InputError` if the network does not know them.
        """
        if not isinstance(network, Marginal):
            raise InputError(
                f"the marginals of parts of a patch are not known for {type(network).__name__}, and the "
                "assembly 'kikuchi' needs them; use a closed-form clique such as GaussianPatches."
            )
        rows, columns = network.patch_shape
        shapes = [(rows, columns - 1), (rows - 1, columns), (rows - 1, columns - 1)]
        return [network.marginal(shape) for shape in shapes if min(shape) > 0]

    def score(self, field: Field, x: Tensor, sigma: Tensor) -> Tensor:
        """sum_r k_r sum_c G_c' s_r(G_c x)."""
        score = torch.zeros_like(x)
        for region, counting, inside, grid in _regions(field, x):
            score[inside] += counting * grid.apply(x[inside], sigma, region.score)
        return score

    def energy(self, field: Field, x: Tensor, sigma: Tensor) -> Tensor:
        """sum_r k_r sum_c phi_r(G_c x)."""
        energy = x.new_zeros(len(x))
        for region, counting, inside, grid in _regions(field, x):
            energy = energy + counting * grid.total(x[inside], sigma, region.energy)
        return energy


ASSEMBLIES: dict[str, type[Assembly]] = {
    rule.name: rule for rule in (Sum, Mean, Center, Partition, Kikuchi)
}


def assembly_for(network: Clique, assembly: str | Assembly) -> Assembly:
    """The rule of this name, or the rule that it is.

    Raises :class:`InputError` if there is none, or the network was trained for others.
    """
    if isinstance(assembly, str):
        check_choice(ASSEMBLIES, assembly=assembly)
    rule = ASSEMBLIES[assembly]() if isinstance(assembly, str) else assembly
    if network.trained_on not in (None, rule.trained_on):
        fitting = [name for name, rule in ASSEMBLIES.items() if rule.trained_on == network.trained_on]
        raise InputError(
            f"this network was trained on {network.trained_on}, so its scores are assembled by "
            f"{' or '.join(map(repr, fitting))}, not by {rule.name!r}: the sum of patch marginals "
            "counts every pixel once per patch, and the mean of clique potentials weakens the prior as "
            "often."
        )
    return rule


def _regions(field: Field, x: Tensor) -> Iterator[tuple[Potential, int, tuple[slice, ...], PatchGrid]]:
    """Each region with its counting number, the part of the image that it covers, and its windows.

    On an open boundary the outermost windows belong to one patch only: they are no overlaps.
    """
    for region in (cast(Potential, field.network), *field.overlaps):
        smaller = [a < b for a, b in zip(region.patch_shape, field.network.patch_shape, strict=True)]
        trims = [int(trimmed and field.boundary == "open") for trimmed in smaller]
        rows, columns = (slice(t, n - t) for t, n in zip(trims, x.shape[-2:], strict=True))
        inside = (slice(None), slice(None), rows, columns)
        grid = PatchGrid(x[inside].shape[-2:], region.patch_shape, field.boundary)
        yield region, (-1) ** sum(smaller), inside, grid
