"""An unconstrained network from patch to patch, the score network of the literature.

In units of the noise u = v / sigma, with its mean removed,

    z_0 = u,    h_l = W_l z_{l-1} + b_l,    z_l = act(h_l),    l = 1 .. D
    s_V(v; sigma) = (1/sigma) W_{D+1} z_D

Shapes are those of :mod:`patchscore.priors.cliques`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchscore.checks import check_counts
from patchscore.errors import InputError
from patchscore.priors.cliques import Clique, uniform
from patchscore.priors.registry import register
from patchscore.priors.symmetry import Symmetry


@register
class PatchMLP(Clique):
    """An unconstrained map from patch to patch; its score need not be the gradient of anything.

    With all invariances off, the defaults are the layers of Fessler's 2023 talk for 3 x 3 patches:
    9-40-80-160-320-320-160-80-40-9, leaky ReLU in the first five hidden layers, tanh in the last
    three (``tanh_layers``). The last layer has no bias. The four invariances are those of
    :class:`~patchscore.priors.energy.ConvEnergy`, with one common mean of the patch removed.

    There is no ``log_prob``, no line search and no Metropolis correction: these need a potential.

    Raises
    ------
    InputError
        If a number is out of its range, or a width is not a multiple of the order of the symmetry.
    """

    def __init__(
        self,
        patch_size: int = 3,
        channels: int = 1,
        widths: Sequence[int] = (40, 80, 160, 320, 320, 160, 80, 40),
        tanh_layers: int = 3,
        *,
        scale_invariant: bool = True,
        brightness_invariant: bool = True,
        flip_invariant: bool = True,
        turn_invariant: bool = True,
    ) -> None:
        super().__init__()
        check_counts(patch_size=patch_size, channels=channels)
        self.symmetry = Symmetry([patch_size], flips=flip_invariant, turns=turn_invariant)
        order = self.symmetry.order
        if not widths or any(width < 1 or width % order for width in widths):
            raise InputError(
                f"the hidden layers have {list(widths)} units; with these invariances they come in "
                f"groups of {order}, so every width must be a positive multiple of {order}."
            )
        if not 0 <= tanh_layers <= len(widths):
            raise InputError(
                f"tanh_layers is {tanh_layers}; expected 0 to {len(widths)}, the hidden layers."
            )
        self.patch_size = patch_size
        self.patch_shape = patch_size, patch_size
        self.channels = channels
        self.widths = list(widths)
        self.tanh_layers = tanh_layers
        self.scale_invariant = scale_invariant
        self.brightness_invariant = brightness_invariant
        self.flip_invariant = flip_invariant
        self.turn_invariant = turn_invariant

        pixels = channels * patch_size**2
        groups = [width // order for width in widths]
        self.lift = uniform((groups[0], pixels), fan_in=pixels)
        self.mixes = nn.ParameterList(
            uniform((m, k, order), fan_in=k * order) for k, m in pairwise(groups)
        )
        self.biases = nn.ParameterList(
            uniform((m,), fan_in=fan_in) for m, fan_in in zip(groups, [pixels, *widths], strict=False)
        )
        if not scale_invariant:
            self.noise = uniform((groups[0],), fan_in=pixels)
        self.project = uniform((groups[-1], pixels), fan_in=widths[-1])

    def matrices(self) -> list[Tensor]:
        """The plain matrices W_1 .. W_D that the tied weights stand for."""
        first = self.symmetry.lift(self.lift, self.patch_size)
        if self.brightness_invariant:
            first = first - first.mean(1, keepdim=True)
        return [first, *(self.symmetry.spread(mix).squeeze(2) for mix in self.mixes)]

    def score(self, patches: Tensor, sigma: Tensor) -> Tensor:
        """s_V(v; sigma): (B, n, L) -> (B, n, L), in one over the image's unit."""
        return self._score(self.matrices(), patches, sigma)

    def scorer(self) -> Callable[[Tensor, Tensor], Tensor]:
        """:meth:`score` with the tied weights expanded once."""
        return partial(self._score, self.matrices())

    def _score(self, weights: list[Tensor], patches: Tensor, sigma: Tensor) -> Tensor:
        biases = [self.symmetry.pool(bias)[:, None] for bias in self.biases]
        if not self.scale_invariant:
            biases[0] = biases[0] + self.symmetry.pool(self.noise)[:, None] * sigma.log()
        z = patches / sigma if self.scale_invariant else patches
        leaky_layers = len(self.widths) - self.tanh_layers
        for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            h = torch.matmul(weight, z).add_(bias)
            z = F.leaky_relu(h) if layer < leaky_layers else h.tanh()
        return self.symmetry.lift(self.project, self.patch_size).T @ z / sigma
