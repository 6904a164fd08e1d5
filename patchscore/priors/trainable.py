"""What a prior and its network have to offer to be trained, and the door of every learned prior.

:func:`patchscore.fit` and the objectives of :mod:`patchscore.learning.matching` ask for no more than a
:class:`Trainable`: a field of patches or a network that sees the whole image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal, Protocol, TypeVar

from torch import Tensor, nn

from patchscore.checks import noise_levels
from patchscore.errors import InputError
from patchscore.priors.patches import Boundary

TrainedOn = Literal["patches", "crops"]
Self = TypeVar("Self", bound="Trainable")


class ScoreNetwork(nn.Module, ABC):
    """A network that can be built again from a file; at least one parameter or buffer holds floats.

    Attributes
    ----------
    channels : of the images or patches that it takes
    trained_on
        ``"patches"`` if it knows the marginal of a patch, ``"crops"`` if it learned from larger ones,
        None if it does not say.
    """

    channels: int
    trained_on: TrainedOn | None = None

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The arguments that build it again, before its tensors are loaded; as JSON can hold them."""

    @property
    def like(self) -> Tensor:
        """A tensor of its dtype, on its device."""
        return next(t for t in (*self.parameters(), *self.buffers()) if t.is_floating_point())


class Trainable(Protocol):
    """A score of images with a network to train, and a card to write down how."""

    card: dict[str, Any]

    @property
    def network(self) -> ScoreNetwork:
        """What is trained."""

    def score(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """grad log p_sigma(x): (B, C, H, W) -> (B, C, H, W)."""

    def denoise(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """x + sigma^2 s(x, sigma): (B, C, H, W) -> (B, C, H, W)."""

    def interior(self, x: Tensor) -> Tensor:
        """The pixels of x that count in an objective."""

    def with_boundary(self: Self, boundary: Boundary) -> Self:
        """The same network, with this beyond the border of an image."""

    def network_settings(self) -> dict[str, Any]:
        """What tells the network apart from those that a checkpoint would not fit."""

    def becomes(self, crop: int, boundary: Boundary) -> TrainedOn:
        """What crops of this size make of the network; :class:`InputError` if they do not fit."""


def check_images(x: Tensor, sigma: float | Tensor, network: ScoreNetwork) -> Tensor:
    """sigma as a (B,) tensor like x; an error that says what to do if x does not suit the network."""
    like = network.like
    if x.ndim != 4:
        raise InputError(
            f"x has shape {tuple(x.shape)}; expected (B, C, H, W). For one gray image use x[None, None]."
        )
    if x.shape[1] != network.channels:
        raise InputError(
            f"x has {x.shape[1]} channels and the prior {network.channels}; to use a gray "
            "prior on colour, denoise each channel by itself (patchscore.denoise does)."
        )
    if x.dtype != like.dtype or x.device != like.device:
        raise InputError(
            f"x is {x.dtype} on {x.device} and the prior {like.dtype} on "
            f"{like.device}; move one of them: x.to(...) or prior.to(...)."
        )
    return noise_levels(sigma, x)
