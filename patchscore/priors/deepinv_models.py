"""Priors as classes of deepinv; a module of its own, since deepinv may be missing.

    D(x, sigma) = x + sigma^2 s(x, sigma)            deepinv.models.Denoiser
    g(x, sigma) = -log p_sigma(x),  grad g = -s      deepinv.optim.Prior

:func:`patchscore.as_deepinv` makes them.
"""

from __future__ import annotations

import copy
import math
from itertools import chain
from typing import Any

import torch
from deepinv.models import Denoiser
from deepinv.optim import Prior
from torch import Tensor, nn

from patchscore.errors import InputError
from patchscore.linear_algebra import expand
from patchscore.priors.wrappers import Channelwise
from patchscore.protocols import Score, known_bound, require_potential

# How far above the trained levels one step is still better than a flat image, on photographs.
EXTRAPOLATION = 4.5
ROUNDING = 1e-5  # of a schedule in float32 that begins at the highest level


class ScoreDenoiser(Denoiser):  # type: ignore[misc]  # deepinv has no types
    """A score as a denoiser for deepinv, made by :func:`patchscore.as_deepinv`.

    Attributes
    ----------
    highest_sigma : the highest noise level that it takes, in the unit of the images
    trained_up_to : the highest noise level that the prior was trained for, if its card says so
    """

    def __init__(self, prior: Score, highest_sigma: float | None = None) -> None:
        super().__init__()
        self.score_model = copy.deepcopy(prior)
        trained = getattr(prior, "card", {}).get("training", {}).get("sigmas")
        self.trained_up_to: float | None = trained and trained[-1]
        if highest_sigma is None:
            highest_sigma = EXTRAPOLATION * (self.trained_up_to or math.inf)
        self.highest_sigma = float(highest_sigma)

    def forward(self, x: Tensor, sigma: float | Tensor, **_: Any) -> Tensor:
        """The one-step posterior mean of x at noise level sigma: (B, C, H, W), like x."""
        y, levels = self.arguments(x, sigma)
        noisy = levels > 0
        # The network needs a positive level; where there is no noise its result is not used.
        score = self.model_for(y).score(y, torch.where(noisy, levels, 1))
        return torch.where(expand(noisy), y + expand(levels**2) * score, y).to(x.dtype)

    def prior(self) -> ScoreEnergy:
        """The energy -log p_sigma as a ``deepinv.optim.Prior``.

        Raises :class:`InputError` if the prior has only a score.
        """
        return ScoreEnergy(self)

    def arguments(self, x: Tensor, sigma: float | Tensor) -> tuple[Tensor, Tensor]:
        """x in a dtype that priors take, and its noise levels, (B,)."""
        if x.ndim != 4:
            raise InputError(f"x has shape {tuple(x.shape)}; expected (B, C, H, W).")
        if x.is_complex():
            raise InputError(
                f"x is {x.dtype}; for complex images use deepinv.models.to_complex_denoiser(denoiser)."
            )
        y = x if x.dtype == torch.float64 else x.float()
        levels = torch.as_tensor(sigma, dtype=y.dtype, device=y.device)
        if levels.numel() not in (1, len(y)):
            raise InputError(
                f"sigma has shape {tuple(levels.shape)}; expected one number, or one for each of the "
                f"{len(y)} images. The prior has one noise level for all pixels of an image."
            )
        levels = levels.reshape(-1).expand(len(y))
        if not bool(((levels >= 0) & (levels <= (1 + ROUNDING) * self.highest_sigma)).all()):
            trained = f" (trained up to {self.trained_up_to:.4g})" if self.trained_up_to else ""
            raise InputError(
                f"sigma is {levels.max().item():.4g}, and this prior takes 0 to "
                f"{self.highest_sigma:.4g}{trained}. At more noise it cannot know how bright the image "
                "is. Start a diffusion at denoiser.highest_sigma: DDRM(denoiser, "
                "sigmas=np.linspace(denoiser.highest_sigma, 0, 50)), or, since the images are in -1..1 "
                "there, VarianceExplodingDiffusion(sigma_max=2 * denoiser.highest_sigma). If your "
                "images are not in 0..1, give their highest level: as_deepinv(prior, highest_sigma=...)."
            )
        return y, levels

    def model_for(self, y: Tensor) -> Any:
        """The prior, with the dtype and on the device of y, for its channels."""
        model = self.score_model
        if isinstance(model, nn.Module):
            for tensor in chain(model.parameters(), model.buffers()):
                if tensor.is_floating_point():
                    if tensor.dtype != y.dtype or tensor.device != y.device:
                        model.to(y.device, y.dtype)
                    break
        gray = getattr(getattr(model, "network", None), "channels", None) == 1
        return Channelwise(model) if gray and y.shape[1] != 1 else model


class ScoreEnergy(Prior):  # type: ignore[misc]
    """g(x, sigma) = -log p_sigma(x) up to a constant, for the optimisers of deepinv.

    Made by :meth:`ScoreDenoiser.prior`.
    """

    def __init__(self, denoiser: ScoreDenoiser) -> None:
        super().__init__()
        require_potential(denoiser.score_model, "an explicit prior of deepinv")
        self.denoiser = denoiser
        self.explicit_prior = True

    def fn(self, x: Tensor, sigma_denoiser: float | Tensor, *_: Any, **__: Any) -> Tensor:
        """-log p_sigma(x): (B, C, H, W) -> (B,)."""
        y, levels = self.denoiser.arguments(x, sigma_denoiser)
        energy: Tensor = -self.denoiser.model_for(y).log_prob(y, levels)
        return energy.to(x.dtype)

    def grad(self, x: Tensor, sigma_denoiser: float | Tensor, *_: Any, **__: Any) -> Tensor:
        """-score(x, sigma): (B, C, H, W) -> (B, C, H, W)."""
        y, levels = self.denoiser.arguments(x, sigma_denoiser)
        gradient: Tensor = -self.denoiser.model_for(y).score(y, levels)
        return gradient.to(x.dtype)

    def prox(
        self,
        x: Tensor,
        sigma_denoiser: float,
        *_: Any,
        gamma: float = 1.0,
        stepsize_inter: float | None = None,
        **options: Any,
    ) -> Tensor:
        """argmin_z gamma g(z) + |z - x|^2 / 2, by deepinv's gradient descent: like x.

        Its step is 1 / (1 + gamma times the curvature of g) unless you give one; deepinv's own, 1,
        diverges at noise levels below 1.
        """
        if stepsize_inter is None:
            level = float(torch.as_tensor(sigma_denoiser).min())
            stepsize_inter = 1 / (1 + float(gamma) * known_bound(self.denoiser.score_model, level))
        result: Tensor = super().prox(
            x, sigma_denoiser, gamma=gamma, stepsize_inter=stepsize_inter, **options
        )
        return result
