"""A prior for whole images, assembled from the scores of overlapping patches.

    s(x, sigma) = sum_c G_c' s_V(G_c x, sigma)                  assembly "sum": clique potentials
    s(x, sigma) = sum_c G_c' s_V(G_c x, sigma) / overlap        assembly "mean": patch marginals
    denoise(x, sigma) = x + sigma^2 s(x, sigma) = E[clean | noisy = x]      (Tweedie)

A network that was trained on single patches knows the marginal of a patch: summing these would
count every pixel P^2 times. One that was trained on crops, through the sum, is a clique potential.

References: Roth and Black, IJCV 82 (2009); Efron, JASA 106 (2011), equation 1.4 (Tweedie's formula).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from patchscore.errors import InputError
from patchscore.priors.cliques import Clique, Potential
from patchscore.priors.networks import PatchEnergy, PatchMLP
from patchscore.priors.patches import Boundary, PatchGrid
from patchscore.storage import load_tensors, save_tensors

Assembly = Literal["sum", "mean"]
KIND = "patchscore prior"
NETWORKS = {network.__name__: network for network in (PatchEnergy, PatchMLP)}
_ASSEMBLY_OF = {"patches": "mean", "crops": "sum"}


class PatchPrior(nn.Module):
    """The score, the denoiser and (for a potential) the log density of whole images.

    Images are (B, C, H, W) tensors in any unit; sigma is in the same unit, a number, () or (B,).

    Parameters
    ----------
    network
        What scores a patch: a :class:`PatchEnergy`, a :class:`PatchMLP` or any other clique.
    assembly
        ``"sum"`` (the default) for clique potentials, ``"mean"`` for patch marginals.
    boundary
        ``"symmetric"`` (the default), ``"periodic"`` or ``"open"``: see
        :class:`~patchscore.priors.patches.PatchGrid`.
    card
        What the prior was trained on and how, kept with it when it is saved.

    Raises
    ------
    InputError
        If the network was trained for the other assembly.
    """

    def __init__(
        self,
        network: Clique,
        *,
        assembly: Assembly = "sum",
        boundary: Boundary = "symmetric",
        card: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        for name, value, choices in (
            ("assembly", assembly, get_args(Assembly)),
            ("boundary", boundary, get_args(Boundary)),
        ):
            if value not in choices:
                raise InputError(f"{name} is {value!r}; choose one of {choices}.")
        if network.trained_on is not None and _ASSEMBLY_OF[network.trained_on] != assembly:
            raise InputError(
                f"this network was trained on {network.trained_on}, so its scores are assembled by "
                f"{_ASSEMBLY_OF[network.trained_on]!r}, not by {assembly!r}: the sum of patch "
                "marginals counts every pixel once per patch, and the mean of clique potentials "
                "weakens the prior as often."
            )
        self.network = network
        self.assembly = assembly
        self.boundary = boundary
        self.card = dict(card or {})

    @property
    def has_potential(self) -> bool:
        """Whether the score is the gradient of a known log density."""
        return isinstance(self.network, Potential)

    def score(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """grad log p_sigma(x): (B, C, H, W) -> (B, C, H, W), in one over the image's unit.

        Raises :class:`InputError` for a wrong shape, dtype or noise level. NaN is not looked for.
        """
        sigma = self._check(x, sigma)
        grid = PatchGrid(x.shape[-2:], self.network.patch_shape, self.boundary)
        score = grid.apply(x, sigma, self.network.score)
        return score if self.assembly == "sum" else score / grid.overlap(x)

    def denoise(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """The one-step posterior mean E[clean | x], x + sigma^2 s(x, sigma): (B, C, H, W)."""
        variance = self._check(x, sigma)[:, None, None, None] ** 2
        return x + variance * self.score(x, sigma)

    forward = denoise

    def log_prob(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """log p_sigma(x) up to a constant: (B, C, H, W) -> (B,). Its gradient is the score.

        The constant depends on sigma and on the shape, so only values at one noise level and one
        shape can be compared.

        Raises :class:`InputError` if the score is not a gradient: a network without a potential, or
        the mean over an ``"open"`` boundary.
        """
        sigma = self._check(x, sigma)
        if not isinstance(self.network, Potential):
            raise InputError(
                f"{type(self.network).__name__} has no potential, so there is no log_prob; use "
                "PatchEnergy, or work with the score alone."
            )
        if self.assembly == "mean" and self.boundary == "open":
            raise InputError(
                "the mean over an open boundary is not the gradient of a density (pixels near the "
                'border belong to fewer patches); use boundary="symmetric" or "periodic".'
            )
        grid = PatchGrid(x.shape[-2:], self.network.patch_shape, self.boundary)
        energy = grid.total(x, sigma, self.network.energy)
        return -energy if self.assembly == "sum" else -energy / math.prod(self.network.patch_shape)

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

    def with_boundary(self, boundary: Boundary) -> PatchPrior:
        """The same network under another boundary; the weights are shared, not copied."""
        return PatchPrior(self.network, assembly=self.assembly, boundary=boundary, card=self.card)

    def save(self, path: str | Path) -> None:
        """Write weights, settings and card to a safetensors file, whole or not at all.

        Raises :class:`InputError` if the path cannot be written.
        """
        settings = {
            "network": {"type": type(self.network).__name__, **self.network.settings()},
            "trained_on": self.network.trained_on,
            "assembly": self.assembly,
            "boundary": self.boundary,
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
            if kind not in NETWORKS:
                raise InputError(
                    f"{path} holds a {kind}; this version of patchscore knows {', '.join(NETWORKS)}. "
                    "A newer version may be needed."
                )
            network = NETWORKS[kind](**arguments).to(tensors["lift"].dtype)
            network.load_state_dict(tensors)
            network.trained_on = settings["trained_on"]
            return cls(
                network.eval(),
                assembly=settings["assembly"],
                boundary=settings["boundary"],
                card=settings["card"],
            )
        except (KeyError, TypeError, RuntimeError) as error:
            raise InputError(
                f"the settings and the weights in {path} do not fit together ({error}); it was not "
                "written by this version of patchscore."
            ) from error

    def _check(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """The door: x and sigma as the equations need them, or an error that says what to do."""
        like = self.network.like
        if x.ndim != 4:
            raise InputError(
                f"x has shape {tuple(x.shape)}; expected (B, C, H, W). For one gray image use "
                "x[None, None]."
            )
        if x.shape[1] != self.network.channels:
            raise InputError(
                f"x has {x.shape[1]} channels and the prior {self.network.channels}; to use a gray "
                "prior on colour, denoise each channel by itself (patchscore.denoise does)."
            )
        if x.dtype != like.dtype or x.device != like.device:
            raise InputError(
                f"x is {x.dtype} on {x.device} and the prior {like.dtype} on "
                f"{like.device}; move one of them: x.to(...) or prior.to(...)."
            )
        return noise_levels(sigma, x)


def noise_levels(sigma: float | Tensor, x: Tensor) -> Tensor:
    """sigma as a (B,) tensor like x; an error if it is not positive, not finite or not one per image."""
    sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
    if sigma.shape not in ((), (1,), (len(x),)):
        raise InputError(
            f"sigma has shape {tuple(sigma.shape)}; expected one number, or one for each of the "
            f"{len(x)} images."
        )
    if not bool(((sigma > 0) & sigma.isfinite()).all()):
        raise InputError(
            f"sigma is {sigma.tolist()}; a noise level is positive and finite, in the image's unit."
        )
    return sigma.expand(len(x))
