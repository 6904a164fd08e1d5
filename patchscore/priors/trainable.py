"""What training needs of a prior and its network, and the input validation of every learned prior.

:func:`patchscore.fit` and the objectives of :mod:`patchscore.learning.matching` take any
:class:`Trainable`: a field of patches, or a network that sees the whole image.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from itertools import chain
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from patchscore.checks import check_alike, check_batch, is_traced, noise_levels
from patchscore.errors import InputError
from patchscore.linear_algebra import expand, tweedie
from patchscore.priors.patches import Boundary

TrainedOn = Literal["patches", "crops"]
Self = TypeVar("Self", bound="Trainable")
Network = TypeVar("Network", bound="ScoreNetwork")


class ScoreNetwork(nn.Module):
    """A network that can be saved and built again; at least one parameter or buffer holds floats.

    Attributes
    ----------
    channels : of the images or patches
    trained_on
        ``"patches"`` if it knows the marginal of a patch, ``"crops"`` if it learned from larger pieces,
        None if that is not known.
    """

    channels: int
    trained_on: TrainedOn | None = None

    def settings(self) -> dict[str, Any]:
        """The arguments that build it again, without the tensors, in types that JSON can hold.

        By default each argument of the class, from the attribute of the same name.
        """
        values = {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}

    @classmethod
    def from_settings(cls: type[Network], settings: dict[str, Any]) -> Network:
        """Build it again from :meth:`settings`; its tensors are loaded afterwards."""
        return cls(**settings)

    @property
    def dtype(self) -> torch.dtype:
        """Of its numbers, and of the images that it takes."""
        return self.like.dtype

    @property
    def device(self) -> torch.device:
        """Where it is, and where its images have to be."""
        return self.like.device

    @property
    def like(self) -> Tensor:
        """A tensor of its dtype, on its device, for ``x.to(network.like)``."""
        return next(t for t in chain(self.parameters(), self.buffers()) if t.is_floating_point())


class Trainable(nn.Module, ABC):
    """A prior with a network to train, and a card that says what it was trained on and how."""

    network: ScoreNetwork
    card: dict[str, Any]

    @abstractmethod
    def score(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """grad log p_sigma(x): (B, C, H, W) -> (B, C, H, W), in one over the image's unit.

        Raises :class:`InputError` for a wrong shape, dtype or noise level. NaN is not looked for.
        """

    def denoise(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """The one-step posterior mean E[clean | x], x + sigma^2 s(x, sigma): (B, C, H, W)."""
        score, sigma = self.score(x, sigma), check_images(x, sigma, self.network)
        if score.requires_grad or is_traced(x):
            return tweedie(x, score, sigma)
        return score.mul_(expand(sigma)).mul_(expand(sigma)).add_(x)  # in place: images may be large

    forward = denoise

    def curvature_bound(self, sigma: float) -> float:
        """1 / sigma^2, which no density that is blurred by sigma exceeds."""
        return 1 / sigma**2

    def interior(self, x: Tensor) -> Tensor:
        """The pixels of x that an objective is taken over."""
        return x

    def with_boundary(self: Self, boundary: Boundary) -> Self:
        """The same network under another boundary; one that pads by itself stays as it is."""
        return self

    @abstractmethod
    def network_settings(self) -> dict[str, Any]:
        """What a checkpoint has to agree with, or it is refused."""

    @abstractmethod
    def becomes(self, crop: int, boundary: Boundary) -> TrainedOn:
        """What the network knows after training on such crops; an error if they do not fit."""


def check_images(x: Tensor, sigma: float | Tensor, network: ScoreNetwork) -> Tensor:
    """sigma as a (B,) tensor like x; an :class:`InputError` if x does not suit the network."""
    check_batch(x, "x", values=False)
    if x.is_complex():
        raise InputError(
            f"x is {x.dtype} and the prior is one of real images; for complex images use "
            "patchscore.ComplexPrior(prior)."
        )
    if x.shape[1] != network.channels:
        raise InputError(
            f"x has {x.shape[1]} channels and the prior {network.channels}; to use a gray prior on each "
            "channel by itself: patchscore.Channelwise(prior)."
        )
    check_alike(x, network.like, name="x", holder="prior")
    return noise_levels(sigma, x)
