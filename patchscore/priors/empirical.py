"""The training patches themselves as a prior: a kernel density estimate, exact at every noise level.

    p_sigma(v) = 1/N sum_j N(v; p_j, sigma^2 I)

Reference: Parzen, Annals of Mathematical Statistics 33 (1962).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from patchscore.errors import InputError
from patchscore.priors.cliques import Potential, check_tensor, patch_pixels, stack_shape
from patchscore.priors.registry import register

# Patches and training patches compared at once: 2048 x 4096 distances, 64 MB in float64.
QUERIES_PER_BLOCK = 4096
EXAMPLES_PER_BLOCK = 2048


@register
class EmpiricalPatches(Potential):
    """The training patches blurred by the noise: what an infinitely flexible patch network would learn.

        p_sigma(v) = 1/N sum_j N(v; p_j, sigma^2 I)
        s(v, sigma) = (sum_j r_j p_j - v) / sigma^2,       r_j = softmax_j(-|v - p_j|^2 / (2 sigma^2))

    Exact at every noise level, and normalised; assembled by ``"mean"``. Time grows with N; memory
    does not, beyond the patches themselves.

    Parameters
    ----------
    patches
        p, (N, C, rows, columns); or only this shape, before its tensors are loaded. Their dtype is that
        of the clique.
    brightness_invariant
        All patches count at every brightness: the density of the mean-free part, flat in the mean.

    Raises
    ------
    InputError
        If the patches are not four-dimensional and finite.

    Notes
    -----
    Where sigma is below the distance between patches, it returns the nearest training patch. Squared
    distances round by a part eps |v|^2 / sigma^2: use float64 where sigma is small.
    """

    trained_on = "patches"
    patches: Tensor

    def __init__(self, patches: Tensor | Sequence[int], *, brightness_invariant: bool = False) -> None:
        super().__init__()
        shape = stack_shape("patches", patches)
        self.channels = shape[1]
        self.patch_shape, _ = patch_pixels(shape[2:], self.channels)
        patches = patches if isinstance(patches, Tensor) else torch.zeros(shape)
        check_tensor("patches", patches, shape)
        if brightness_invariant and math.prod(shape[1:]) == 1:
            raise InputError("one pixel has no mean-free part; use brightness_invariant=False.")
        self.brightness_invariant = brightness_invariant
        self.register_buffer("patches", patches)

    def energy(self, patches: Tensor, sigma: Tensor) -> Tensor:
        """-log p_sigma(v), normalised: (B, n, L) -> (B, L)."""
        dimensions = patches.shape[1] - self.brightness_invariant
        normal = 0.5 * dimensions * (2 * math.pi * sigma.square()).log().squeeze(1)
        log_sum, _ = self._posterior(patches, sigma)
        return normal + math.log(len(self.patches)) - log_sum

    def score(self, patches: Tensor, sigma: Tensor) -> Tensor:
        """(sum_j r_j p_j - v) / sigma^2: (B, n, L) -> (B, n, L), in one over the image's unit."""
        _, shift = self._posterior(patches, sigma)
        return shift / sigma.square()

    def marginal(self, patch_shape: Sequence[int]) -> EmpiricalPatches:
        """The marginal of the top left part of this shape: that part of every training patch."""
        part = self.patches[..., : patch_shape[0], : patch_shape[1]]
        return EmpiricalPatches(part, brightness_invariant=self.brightness_invariant)

    def settings(self) -> dict[str, Any]:
        """The arguments that build it again, before its tensors are loaded."""
        return {
            "patches": list(self.patches.shape),
            "brightness_invariant": self.brightness_invariant,
        }

    def _posterior(self, patches: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """log sum_j exp(-|v - p_j|^2 / (2 sigma^2)) and sum_j r_j p_j - v: (B, L) and (B, n, L)."""
        examples = self.patches.flatten(1)
        center = examples.mean(0)  # near the origin the squares are smallest
        examples, v = examples - center, patches - center[:, None]
        if self.brightness_invariant:
            examples = examples - examples.mean(1, keepdim=True)
            v = v - v.mean(1, keepdim=True)
        blocks = [
            _softmax_mean(image_block, examples, variance)
            for image, variance in zip(v, sigma.square().view(-1), strict=True)
            for image_block in image.split(QUERIES_PER_BLOCK, dim=1)
        ]
        log_sums, means = (torch.cat(parts, -1) for parts in zip(*blocks, strict=True))
        log_sum = log_sums.view(len(v), -1)
        mean = means.view(v.shape[1], len(v), -1).transpose(0, 1)
        return log_sum, mean - v


def _softmax_mean(v: Tensor, examples: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Over examples (N, n), block by block: the log-sum (L,) and the mean (n, L) for patches (n, L)."""
    log_sum = v.new_full((v.shape[1],), -math.inf)
    mean = torch.zeros_like(v)
    for block in examples.split(EXAMPLES_PER_BLOCK):
        distances = block.square().sum(1, keepdim=True) - 2 * (block @ v) + v.square().sum(0)
        logits = -distances / (2 * variance)
        total = torch.logaddexp(log_sum, logits.logsumexp(0))
        mean = mean * (log_sum - total).exp() + block.T @ (logits - total).exp()
        log_sum = total
    return log_sum, mean
