"""Learned cliques: small networks that score a patch.

In units of the noise u = v / sigma, with its mean removed, a network has hidden units

    z_0 = u,    h_l = W_l z_{l-1} + b_l,    z_l = act(h_l),    l = 1 .. D

and is read out either as a potential (:class:`PatchEnergy`), whose score is its exact gradient,

    phi(v; sigma) = a' z_D
    s_V(v; sigma) = -phi'(v) = -(1/sigma) W_1' (act'(h_1) * ... W_D' (act'(h_D) * a))

or as an unconstrained map from patch to patch (:class:`PatchMLP`), s_V = (1/sigma) W_{D+1} z_D.

Shapes are those of :mod:`patchscore.priors.cliques`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchscore.errors import InputError
from patchscore.priors.cliques import Clique, Potential
from patchscore.priors.engines import cpu, triton
from patchscore.priors.engines.layers import Layers, Precision
from patchscore.priors.patches import Boundary
from patchscore.priors.symmetry import PatchSymmetry


class PatchNetwork(Clique):
    """What both networks share: layers of tied weights over patches in units of the noise.

    Each invariance holds exactly, by construction, and can be switched off to study its effect.

    scale_invariant
        The network sees v / sigma and nothing else, so denoise(a x, a sigma) = a denoise(x, sigma).
        Without it the network sees v in the image's own unit and log(sigma) as one more input,
        s_V(v; sigma) = s~(v; log sigma) / sigma (Song and Ermon, NeurIPS 2020, section 3.3); images
        should then be scaled to about [0, 1], in training and ever after.
    brightness_invariant
        The mean is removed from the patch, so denoise(x + c, sigma) = denoise(x, sigma) + c.
    flip_invariant, turn_invariant
        denoise commutes with flips and quarter turns; hidden units come in groups of 4 (either) or
        8 (both) that share weights.
    """

    def __init__(
        self,
        patch_size: int,
        channels: int,
        widths: Sequence[int],
        *,
        scale_invariant: bool,
        brightness_invariant: bool,
        flip_invariant: bool,
        turn_invariant: bool,
    ) -> None:
        super().__init__()
        for name, value in (("patch_size", patch_size), ("channels", channels)):
            if value < 1:
                raise InputError(f"{name} is {value}; expected a whole number of at least 1.")
        self.symmetry = PatchSymmetry(patch_size, channels, flips=flip_invariant, turns=turn_invariant)
        order = self.symmetry.order
        if not widths or any(width < 1 or width % order for width in widths):
            raise InputError(
                f"the hidden layers have {list(widths)} units; with these invariances they come in "
                f"groups of {order}, so every width must be a positive multiple of {order}."
            )
        self.patch_size = patch_size
        self.patch_shape = patch_size, patch_size
        self.channels = channels
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
        fan_ins = [pixels, *widths]
        self.biases = nn.ParameterList(
            uniform((m,), fan_in=fan_in) for m, fan_in in zip(groups, fan_ins, strict=False)
        )
        if not scale_invariant:
            self.noise = uniform((groups[0],), fan_in=pixels)

    def matrices(self) -> list[Tensor]:
        """The plain matrices W_1 .. W_D that the tied weights stand for."""
        first = self.symmetry.lift(self.lift)
        if self.brightness_invariant:
            first = first - first.mean(1, keepdim=True)
        return [first, *(self.symmetry.mix(mix) for mix in self.mixes)]

    def first_layer(self, patches: Tensor, sigma: Tensor, weight: Tensor) -> Tensor:
        """h_1, with the noise level among the inputs where the network needs it."""
        bias = self.symmetry.pool(self.biases[0])[:, None]
        if self.scale_invariant:
            return affine(weight, patches / sigma, bias)
        return affine(weight, patches, bias + self.symmetry.pool(self.noise)[:, None] * sigma.log())

    def score(self, patches: Tensor, sigma: Tensor) -> Tensor:
        """s_V(v; sigma): (B, n, L) -> (B, n, L), in one over the image's unit."""
        return self._score(self.matrices(), patches, sigma)

    def scorer(self) -> Callable[[Tensor, Tensor], Tensor]:
        """:meth:`score` with the tied weights expanded once."""
        return partial(self._score, self.matrices())

    @abstractmethod
    def _score(self, weights: list[Tensor], patches: Tensor, sigma: Tensor) -> Tensor:
        """s_V from the plain matrices."""

    def _invariances(self) -> dict[str, bool]:
        return {
            "scale_invariant": self.scale_invariant,
            "brightness_invariant": self.brightness_invariant,
            "flip_invariant": self.flip_invariant,
            "turn_invariant": self.turn_invariant,
        }


class PatchEnergy(PatchNetwork, Potential):
    """A potential per patch, phi: R^n -> R, of ``depth`` hidden GELU layers of ``width`` units.

    The score is the exact gradient of -phi, so log p exists up to a constant. GELU is smooth, which
    a gradient that is itself trained needs.

    Fails: phi is a clique potential or the potential of a patch marginal, by how it was trained
    (:func:`patchscore.fit`), and it is only trustworthy at noise levels seen there.

    Raises
    ------
    InputError
        If ``width`` does not split into groups of the symmetry's order.
    """

    def __init__(
        self,
        patch_size: int = 9,
        channels: int = 1,
        width: int = 256,
        depth: int = 2,
        *,
        scale_invariant: bool = True,
        brightness_invariant: bool = True,
        flip_invariant: bool = True,
        turn_invariant: bool = True,
    ) -> None:
        if depth < 1:
            raise InputError(f"depth is {depth}; expected at least one hidden layer.")
        super().__init__(
            patch_size,
            channels,
            [width] * depth,
            scale_invariant=scale_invariant,
            brightness_invariant=brightness_invariant,
            flip_invariant=flip_invariant,
            turn_invariant=turn_invariant,
        )
        self.width = width
        self.depth = depth
        self.readout = nn.Parameter(torch.zeros(width // self.symmetry.order))

    def energy(self, patches: Tensor, sigma: Tensor) -> Tensor:
        """phi(v; sigma): (B, n, L) -> (B, L), without unit."""
        last = F.gelu(self._hidden(patches, sigma, self.matrices())[-1])
        energy = torch.einsum("k,bkl->bl", self.symmetry.pool(self.readout), last)
        return energy if self.scale_invariant else energy / sigma.squeeze(-1)

    def layers(self) -> Layers:
        """The plain network that it stands for, if it is scale invariant."""
        first, *others = self.matrices()
        first = first.view(-1, self.channels, *self.patch_shape)
        kernels = [first, *(weight[..., None, None] for weight in others)]
        pool = self.symmetry.pool
        return Layers(kernels, [pool(b) for b in self.biases], pool(self.readout), [1] * self.depth)

    def field_score(
        self, x: Tensor, sigma: Tensor, boundary: Boundary, precision: Precision = "float32"
    ) -> Tensor:
        """sum_c w_c G_c' s_V(G_c x; sigma): (B, C, H, W) -> (B, C, H, W)."""
        size = {"width": self.width, "side": self.patch_size}
        bfloat16 = precision == "bfloat16"
        if self.scale_invariant and bfloat16 and triton.serves(x, self.parameters(), **size):
            return triton.field_of(self, self.layers, precision).score(x, sigma, boundary)
        if self.scale_invariant and cpu.serves(x, self.parameters()):
            return cpu.field_score(self.layers(), x, sigma, boundary, precision)
        return super().field_score(x, sigma, boundary)

    def _score(self, weights: list[Tensor], patches: Tensor, sigma: Tensor) -> Tensor:
        hidden = self._hidden(patches, sigma, weights)
        force = self.symmetry.pool(self.readout)[:, None].to(hidden[-1]).expand_as(hidden[-1])
        for weight, h in zip(reversed(weights), reversed(hidden), strict=True):
            force = weight.T @ torch.ops.aten.gelu_backward(force, h)
        return -force / sigma

    def settings(self) -> dict[str, Any]:
        """The arguments that build this network again."""
        return {
            "patch_size": self.patch_size,
            "channels": self.channels,
            "width": self.width,
            "depth": self.depth,
            **self._invariances(),
        }

    def _hidden(self, patches: Tensor, sigma: Tensor, weights: list[Tensor]) -> list[Tensor]:
        """h_1 .. h_D."""
        hidden = [self.first_layer(patches, sigma, weights[0])]
        for weight, bias in zip(weights[1:], self.biases[1:], strict=True):
            hidden.append(affine(weight, F.gelu(hidden[-1]), self.symmetry.pool(bias)[:, None]))
        return hidden


class PatchMLP(PatchNetwork):
    """An unconstrained map from patch to patch; its score need not be the gradient of anything.

    With all invariances off, the defaults are the layers of Fessler's 2023 talk for 3 x 3 patches:
    9-40-80-160-320-320-160-80-40-9, leaky ReLU in the first five hidden layers, tanh in the last
    three (``tanh_layers``). The last layer has no bias.

    Fails: without a potential there is no ``log_prob``, no line search and no Metropolis correction.

    Raises
    ------
    InputError
        If a width does not split into groups of the symmetry's order.
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
        super().__init__(
            patch_size,
            channels,
            widths,
            scale_invariant=scale_invariant,
            brightness_invariant=brightness_invariant,
            flip_invariant=flip_invariant,
            turn_invariant=turn_invariant,
        )
        if not 0 <= tanh_layers <= len(widths):
            raise InputError(
                f"tanh_layers is {tanh_layers}; expected 0 to {len(widths)}, the hidden layers."
            )
        self.widths = list(widths)
        self.tanh_layers = tanh_layers
        self.project = uniform(
            (widths[-1] // self.symmetry.order, channels * patch_size**2), fan_in=widths[-1]
        )

    def _score(self, weights: list[Tensor], patches: Tensor, sigma: Tensor) -> Tensor:
        h = self.first_layer(patches, sigma, weights[0])
        leaky_layers = len(self.widths) - self.tanh_layers
        for layer, (weight, bias) in enumerate(zip(weights[1:], self.biases[1:], strict=True), 1):
            z = F.leaky_relu(h) if layer <= leaky_layers else h.tanh()
            h = affine(weight, z, self.symmetry.pool(bias)[:, None])
        z = h.tanh() if self.tanh_layers else F.leaky_relu(h)
        return self.symmetry.lift(self.project).T @ z / sigma

    def settings(self) -> dict[str, Any]:
        """The arguments that build this network again."""
        return {
            "patch_size": self.patch_size,
            "channels": self.channels,
            "widths": self.widths,
            "tanh_layers": self.tanh_layers,
            **self._invariances(),
        }


def affine(weight: Tensor, z: Tensor, bias: Tensor) -> Tensor:
    """W z + b for each image of a batch: (o, k), (B, k, L), (o, 1) or (B, o, 1) -> (B, o, L)."""
    return torch.matmul(weight, z).add_(bias)


def uniform(shape: tuple[int, ...], *, fan_in: int) -> nn.Parameter:
    """Weights to begin with: uniform up to 1 / fan_in^(1/2) in absolute value."""
    bound = 1 / math.sqrt(fan_in)
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
