"""What training needs of a prior and its network, and the input validation of every learned prior.

:func:`patchscore.fit` and the objectives of :mod:`patchscore.learning.matching` take any
:class:`Trainable`: a field of patches, or a network that sees the whole image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from patchscore.checks import noise_levels
from patchscore.errors import InputError
from patchscore.priors.patches import Boundary

TrainedOn = Literal["patches", "crops"]
Self = TypeVar("Self", bound="Trainable")
Network = TypeVar("Network", bound="ScoreNetwork")


class ScoreNetwork(nn.Module, ABC):
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

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The arguments that build it again, in types that JSON can hold; without the tensors."""

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
        """A tensor of its dtype, on its device."""
        return next(t for t in (*self.parameters(), *self.buffers()) if t.is_floating_point())


class Trainable(Protocol):
    """A score of images with a network to train, and a card that says how it was trained."""

    card: dict[str, Any]

    @property
    def network(self) -> ScoreNetwork:
        """What is trained."""

    def score(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """grad log p_sigma(x): (B, C, H, W) -> (B, C, H, W)."""

    def denoise(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """x + sigma^2 s(x, sigma): (B, C, H, W) -> (B, C, H, W)."""

    def interior(self, x: Tensor) -> Tensor:
        """The pixels of x that an objective is taken over."""

    def with_boundary(self: Self, boundary: Boundary) -> Self:
        """The same network under another boundary; one that pads by itself returns itself."""

    def network_settings(self) -> dict[str, Any]:
        """What a checkpoint has to agree with, or it is refused."""

    def becomes(self, crop: int, boundary: Boundary) -> TrainedOn:
        """What the network knows after training on such crops; an error if they do not fit."""


def check_images(x: Tensor, sigma: float | Tensor, network: ScoreNetwork) -> Tensor:
    """sigma as a (B,) tensor like x; an :class:`InputError` if x does not suit the network."""
    if x.ndim != 4:
        raise InputError(
            f"x has shape {tuple(x.shape)}; expected (B, C, H, W). For one gray image use x[None, None]."
        )
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
    if x.dtype != network.dtype or x.device != network.device:
        raise InputError(
            f"x is {x.dtype} on {x.device} and the prior {network.dtype} on {network.device}; move one "
            "of them: x.to(...) or prior.to(...)."
        )
    return noise_levels(sigma, x)
