"""A prior for whole images, assembled from the scores of overlapping patches.

    s(x, sigma) = sum_c G_c' s_V(G_c x, sigma)                  assembly "sum": clique potentials
    s(x, sigma) = sum_c G_c' s_V(G_c x, sigma) / overlap        assembly "mean": patch marginals
    denoise(x, sigma) = x + sigma^2 s(x, sigma) = E[clean | noisy = x]      (Tweedie)

A network that was trained on single patches knows the marginal of a patch: summing these would count
every pixel P^2 times. One that was trained on crops, through the sum, is a clique potential. Other ways
to assemble patch marginals are in :mod:`patchscore.priors.assembly`.

References: Roth and Black, IJCV 82 (2009); Efron, JASA 106 (2011), equation 1.4 (Tweedie's formula).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn

from patchscore.errors import InputError
from patchscore.priors.assembly import (
    center_score,
    kikuchi_energy,
    kikuchi_regions,
    kikuchi_score,
    partition_score,
)
from patchscore.priors.cliques import Clique, Potential
from patchscore.priors.convolutional import ConvEnergy
from patchscore.priors.empirical import EmpiricalPatches
from patchscore.priors.engines.layers import Precision
from patchscore.priors.experts import StudentT, TotalVariation
from patchscore.priors.gaussian import GaussianPatches
from patchscore.priors.mixture import GaussianMixture
from patchscore.priors.networks import PatchEnergy, PatchMLP
from patchscore.priors.patches import Boundary, PatchGrid
from patchscore.priors.trainable import TrainedOn, check_images
from patchscore.storage import load_tensors, save_tensors

Assembly = Literal["sum", "mean", "center", "partition", "kikuchi"]
KIND = "patchscore prior"
CLIQUES: dict[str, type[Clique]] = {
    clique.__name__: clique
    for clique in (
        PatchEnergy,
        PatchMLP,
        ConvEnergy,
        GaussianPatches,
        GaussianMixture,
        StudentT,
        TotalVariation,
        EmpiricalPatches,
    )
}
ASSEMBLIES_OF = {"patches": ("mean", "center", "partition", "kikuchi"), "crops": ("sum",)}


class PatchPrior(nn.Module):
    """The score, the denoiser and (for a potential) the log density of whole images.

    Images are (B, C, H, W) tensors in any unit; sigma is in the same unit, a number, () or (B,).

    Parameters
    ----------
    network
        What scores a patch: a :class:`PatchEnergy`, a :class:`PatchMLP` or any other clique.
    assembly
        ``"sum"`` (the default) for clique potentials. For patch marginals ``"mean"`` (over the patches
        that overlap at a pixel), ``"center"`` (only from the patch centred on it), ``"partition"`` (from
        the patch of one tiling) or ``"kikuchi"`` (overlaps taken out again).
    boundary
        ``"symmetric"`` (the default), ``"periodic"`` or ``"open"``: see
        :class:`~patchscore.priors.patches.PatchGrid`.
    score_weight
        A factor alpha(sigma) on the score, as a mapping from noise levels to factors, linear in between
        in log sigma; see :func:`patchscore.fit_score_weight`. One if not given.
    offset
        Where a tile of the ``"partition"`` begins; see :meth:`with_random_offset`.
    precision
        ``"float32"`` (the default), or ``"bfloat16"`` for the products of float32 images, which on a GPU
        is also the engine of fused kernels; see :meth:`with_precision`. Not kept when it is saved.
    card
        What the prior was trained on and how, kept with it when it is saved.

    Raises
    ------
    InputError
        If the network was trained for another assembly, or cannot be assembled in this way.
    """

    def __init__(
        self,
        network: Clique,
        *,
        assembly: Assembly = "sum",
        boundary: Boundary = "symmetric",
        score_weight: Mapping[float, float] | None = None,
        offset: tuple[int, int] = (0, 0),
        precision: Precision = "float32",
        card: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        for name, value, choices in (
            ("assembly", assembly, get_args(Assembly)),
            ("boundary", boundary, get_args(Boundary)),
            ("precision", precision, get_args(Precision)),
        ):
            if value not in choices:
                raise InputError(f"{name} is {value!r}; choose one of {choices}.")
        if network.trained_on is not None and assembly not in ASSEMBLIES_OF[network.trained_on]:
            raise InputError(
                f"this network was trained on {network.trained_on}, so its scores are assembled by "
                f"{' or '.join(map(repr, ASSEMBLIES_OF[network.trained_on]))}, not by {assembly!r}: the "
                "sum of patch marginals counts every pixel once per patch, and the mean of clique "
                "potentials weakens the prior as often."
            )
        self.network = network
        self.regions = cast(
            Sequence[Potential],
            nn.ModuleList(kikuchi_regions(network) if assembly == "kikuchi" else []),
        )
        self.assembly = assembly
        self.boundary = boundary
        self.score_weight = dict(sorted(score_weight.items())) if score_weight else {}
        self.offset = offset
        self.precision = precision
        self.card = dict(card or {})

    @property
    def has_potential(self) -> bool:
        """Whether the score is the gradient of a known log density, so that there is a log_prob."""
        gradient = self.assembly not in ("center", "partition")
        gradient &= (self.assembly, self.boundary) != ("mean", "open")
        return gradient and isinstance(self.network, Potential)

    @property
    def scale_invariant(self) -> bool:
        """Whether denoise(a x, a sigma) = a denoise(x, sigma): a weight has noise levels of its own."""
        return self.network.scale_invariant and not self.score_weight

    def score(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """grad log p_sigma(x): (B, C, H, W) -> (B, C, H, W), in one over the image's unit.

        Raises :class:`InputError` for a wrong shape, dtype or noise level. NaN is not looked for.
        """
        return self._score(x, check_images(x, sigma, self.network))

    def denoise(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """The one-step posterior mean E[clean | x], x + sigma^2 s(x, sigma): (B, C, H, W)."""
        sigma = check_images(x, sigma, self.network)
        score, variance = self._score(x, sigma), sigma[:, None, None, None] ** 2
        if score.requires_grad:
            return torch.addcmul(x, variance, score)
        return score.mul_(variance).add_(x)  # in place, since images may be large

    forward = denoise

    def log_prob(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """log p_sigma(x) up to a constant: (B, C, H, W) -> (B,). Its gradient is the score.

        The constant depends on sigma and on the shape, so only values at one noise level and one
        shape can be compared.

        Raises :class:`InputError` if the score is not a gradient: a network without a potential, or
        the mean over an ``"open"`` boundary.
        """
        sigma = check_images(x, sigma, self.network)
        if not isinstance(self.network, Potential):
            raise InputError(
                f"{type(self.network).__name__} has no potential, so there is no log_prob; use "
                "PatchEnergy, or work with the score alone."
            )
        if self.assembly in ("center", "partition"):
            raise InputError(
                f"the assembly {self.assembly!r} is not the gradient of a density of whole images; use "
                '"mean" or "kikuchi" for patch marginals, or work with the score alone.'
            )
        if self.assembly == "mean" and self.boundary == "open":
            raise InputError(
                "the mean over an open boundary is not the gradient of a density (pixels near the "
                'border belong to fewer patches); use boundary="symmetric" or "periodic".'
            )
        if self.assembly == "kikuchi":
            energy = kikuchi_energy(self.regions, x, sigma, self.boundary)
        else:
            energy = self.network.field_energy(x, sigma, self.boundary)
            energy = energy / math.prod(self.network.patch_shape) if self.assembly == "mean" else energy
        return -energy * self._alpha(sigma) if self.score_weight else -energy

    def curvature_bound(self, sigma: float) -> float:
        """1 / sigma^2, which no density that is blurred by sigma exceeds."""
        return 1 / sigma**2

    def interior(self, x: Tensor) -> Tensor:
        """The pixels of x whose score has all its cliques.

        All of them, unless the boundary is open and cliques are summed.
        """
        if self.boundary != "open" or self.assembly == "mean":
            return x
        rows, columns = (
            slice(side - 1, size - side + 1)
            for side, size in zip(self.network.patch_shape, x.shape[-2:], strict=True)
        )
        return x[..., rows, columns]

    def network_settings(self) -> dict[str, Any]:
        """The arguments that build the network again; a checkpoint of others is refused."""
        return self.network.settings()

    def becomes(self, crop: int, boundary: Boundary) -> TrainedOn:
        """What crops of this size make of the network; an error if it is not how it is assembled."""
        side = max(self.network.patch_shape)
        if crop == side and self.assembly == "mean":
            return "patches"
        if crop >= (2 * side - 1 if boundary == "open" else side) and self.assembly == "sum":
            return "crops"
        raise InputError(
            f"crops of {crop} do not fit patches of {side} assembled by {self.assembly!r}. For a clique "
            f'potential use assembly="sum" and crops of at least {2 * side - 1}, so that some pixel has '
            f'all its cliques; for the score of the patch marginal use assembly="mean" and crops of '
            f"{side}."
        )

    def with_boundary(self, boundary: Boundary) -> PatchPrior:
        """The same network under another boundary; its parameters are shared, not copied."""
        return self._replaced(boundary=boundary)

    def with_score_weight(self, score_weight: Mapping[float, float]) -> PatchPrior:
        """The same network with another factor alpha(sigma) on the score."""
        return self._replaced(score_weight=score_weight)

    def with_precision(self, precision: Precision) -> PatchPrior:
        """The same network with products of ``"float32"`` or ``"bfloat16"`` numbers.

        On a processor that multiplies in bfloat16, float32 images then take 60 % of the time. One-step
        estimates of photographs change by a few thousandths of a dB, but the score, off by up to 1 % of
        its largest value, is no longer the exact gradient of ``log_prob``: use it to denoise, not to
        sample. Elsewhere it changes nothing.
        """
        return self._replaced(precision=precision)

    def with_random_offset(self, generator: torch.Generator) -> PatchPrior:
        """The same network on another tiling: over many steps of a sampler the tiles leave no seams."""
        rows, columns = (
            int(torch.randint(n, (), generator=generator)) for n in self.network.patch_shape
        )
        return self._replaced(offset=(rows, columns))

    def save(self, path: str | Path) -> None:
        """Write weights, settings and card to a safetensors file, whole or not at all.

        Raises :class:`InputError` if the path cannot be written, or the clique is one of your own.
        """
        if type(self.network).__name__ not in CLIQUES:
            raise InputError(
                f"a prior of {type(self.network).__name__} cannot be saved; only {', '.join(CLIQUES)} "
                "can be built again from a file."
            )
        settings = {
            "network": {"type": type(self.network).__name__, **self.network.settings()},
            "trained_on": self.network.trained_on,
            "assembly": self.assembly,
            "boundary": self.boundary,
            "score_weight": list(self.score_weight.items()),
            "offset": self.offset,
            "card": self.card,
        }
        save_tensors(path, self.network.state_dict(), settings, kind=KIND)

    @classmethod
    def load(cls, path: str | Path) -> PatchPrior:
        """Read what :meth:`save` wrote, to the CPU.

        Raises :class:`InputError` if the file is missing, truncated, foreign, altered, or of a
        network that this version does not know.
        """
        tensors, settings = load_tensors(path, kind=KIND)
        try:
            arguments = dict(settings["network"])
            kind = arguments.pop("type")
            if kind not in CLIQUES:
                raise InputError(
                    f"{path} holds a {kind}; this version of patchscore knows {', '.join(CLIQUES)}. "
                    "A newer version may be needed."
                )
            dtype = next(t.dtype for t in tensors.values() if t.is_floating_point())
            network = CLIQUES[kind](**arguments).to(dtype)
            network.load_state_dict(tensors)
            network.trained_on = settings["trained_on"]
            return cls(
                network.eval(),
                assembly=settings["assembly"],
                boundary=settings["boundary"],
                score_weight=dict(settings["score_weight"]),
                offset=tuple(settings["offset"]),
                card=settings["card"],
            )
        except (KeyError, TypeError, RuntimeError) as error:
            raise InputError(
                f"the settings and the weights in {path} do not fit together ({error}); it was not "
                "written by this version of patchscore."
            ) from error

    def _score(self, x: Tensor, sigma: Tensor) -> Tensor:
        match self.assembly:
            case "sum":
                score = self.network.field_score(x, sigma, self.boundary, self.precision)
            case "mean":
                score = self.network.field_score(x, sigma, self.boundary, self.precision)
                grid = PatchGrid(x.shape[-2:], self.network.patch_shape, self.boundary)
                score = score / grid.overlap(x)
            case "center":
                score = center_score(self.network, x, sigma, self.boundary)
            case "partition":
                score = partition_score(self.network, x, sigma, self.boundary, self.offset)
            case "kikuchi":
                score = kikuchi_score(self.regions, x, sigma, self.boundary)
        return score * self._alpha(sigma)[:, None, None, None] if self.score_weight else score

    def _replaced(
        self,
        boundary: Boundary | None = None,
        score_weight: Mapping[float, float] | None = None,
        offset: tuple[int, int] | None = None,
        precision: Precision | None = None,
    ) -> PatchPrior:
        return PatchPrior(
            self.network,
            assembly=self.assembly,
            boundary=boundary or self.boundary,
            score_weight=self.score_weight if score_weight is None else score_weight,
            offset=offset or self.offset,
            precision=precision or self.precision,
            card=self.card,
        )

    def _alpha(self, sigma: Tensor) -> Tensor:
        """The factor at each noise level: (B,)."""
        levels = np.log(sigma.detach().cpu().double().numpy())
        alpha = np.interp(levels, np.log(list(self.score_weight)), list(self.score_weight.values()))
        return torch.from_numpy(alpha).to(sigma)
