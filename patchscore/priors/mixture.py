"""Mixtures of Gaussians as patch priors, exact at every noise level, and how they are fitted.

    p_sigma(v) = sum_k w_k N(v; mu_k, C_k + sigma^2 I)
    s(v, sigma) = - sum_k r_k(v) (C_k + sigma^2 I)^-1 (v - mu_k),      r_k = softmax_k log w_k N(...)

It is fitted by :func:`patchscore.fit_mixture`.

Reference: Zoran and Weiss, "From learning models of natural image patches to whole image restoration",
ICCV 2011.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from patchscore.checks import check_counts
from patchscore.errors import InputError
from patchscore.priors.cliques import Potential, check_tensor, patch_pixels
from patchscore.priors.gaussian import eigendecomposition
from patchscore.priors.registry import register


@register
class GaussianMixture(Potential):
    """A mixture of K Gaussians as the marginal of a patch; assembled by ``"mean"``.

    phi(v; sigma) = -log p_sigma(v), normalised, from the eigenvectors of each C_k, computed once.

    ``brightness_invariant=True`` makes it a density of the mean-free part of the patch, v - mean(v), as
    in EPLL: each C_k and mu_k is projected onto this subspace of n - 1 dimensions, where phi is
    normalised, and constant patches are all equally probable. This too is exact at every noise level.

    Parameters
    ----------
    patch_shape : (rows, columns)
    components : K
    weights
        w, (K,), positive, with sum one. Equal if not given.
    means
        mu, (K, n) with n = channels * rows * columns. Zero if not given.
    covariances
        C, (K, n, n), in the squared unit of the image; they may be singular. White with unit variance if
        not given. Their dtype is that of the clique.
    floor
        Smaller eigenvalues of a C_k are raised to it. If not given, negative ones are an error.

    Raises
    ------
    InputError
        If a shape does not fit, the weights are not positive with sum one, or a covariance is not
        symmetric and positive semi-definite.

    Notes
    -----
    To use a full-covariance mixture of scikit-learn, pass its ``weights_``, ``means_`` and
    ``covariances_`` as tensors.
    """

    trained_on = "patches"
    weights: Tensor
    means: Tensor
    eigenvalues: Tensor
    eigenvectors: Tensor

    def __init__(
        self,
        patch_shape: Sequence[int],
        components: int,
        *,
        channels: int = 1,
        weights: Tensor | None = None,
        means: Tensor | None = None,
        covariances: Tensor | None = None,
        brightness_invariant: bool = False,
        floor: float | None = None,
    ) -> None:
        super().__init__()
        self.patch_shape, n = patch_pixels(patch_shape, channels)
        check_counts(components=components)
        if brightness_invariant and n == 1:
            raise InputError("one pixel has no mean-free part; use brightness_invariant=False.")
        if covariances is None:
            covariances = torch.eye(n).repeat(components, 1, 1)
        if weights is None:
            weights = covariances.new_full((components,), 1 / components)
        means = covariances.new_zeros(components, n) if means is None else means
        check_tensor("covariances", covariances, (components, n, n))
        check_tensor("weights", weights, (components,))
        check_tensor("means", means, (components, n))
        off = not weights.is_meta and (weights.min() <= 0 or abs(weights.double().sum() - 1) > 1e-5)
        if off:
            raise InputError(
                f"the weights have sum {weights.sum():g} and smallest value {weights.min():g}; expected "
                "positive weights with sum one: drop the empty components and divide by the sum."
            )
        self.channels = channels
        self.components = components
        self.brightness_invariant = brightness_invariant
        weights, means = weights.to(covariances), means.to(covariances)
        if brightness_invariant:
            basis = _mean_free_basis(n).to(covariances)
            values, within = eigendecomposition(basis.T @ covariances @ basis, floor)
            vectors = basis @ within
            means = means - means.mean(1, keepdim=True)
        else:
            values, vectors = eigendecomposition(covariances, floor)
        self.register_buffer("weights", weights)
        self.register_buffer("means", means)
        self.register_buffer("eigenvalues", values)
        self.register_buffer("eigenvectors", vectors)

    @property
    def covariances(self) -> Tensor:
        """C, (K, n, n)."""
        return self.eigenvectors * self.eigenvalues[:, None] @ self.eigenvectors.mT

    def log_joint(self, patches: Tensor, sigma: Tensor) -> Tensor:
        """log w_k N(v; mu_k, C_k + sigma^2 I): (B, n, L) -> (B, K, L); its softmax is r_k."""
        return torch.stack([log_p for log_p, _, _ in self._terms(patches, sigma)], dim=1)

    def energy(self, patches: Tensor, sigma: Tensor) -> Tensor:
        """-log p_sigma(v): (B, n, L) -> (B, L)."""
        (total, _, _), *others = self._terms(patches, sigma)
        for log_p, _, _ in others:
            total = torch.logaddexp(total, log_p)
        return -total

    def score(self, patches: Tensor, sigma: Tensor) -> Tensor:
        """-sum_k r_k (C_k + sigma^2 I)^-1 (v - mu_k): (B, n, L) -> (B, n, L), in one over the unit."""
        total = patches.new_full((len(patches), patches.shape[2]), -math.inf)
        score = torch.zeros_like(patches)
        for vectors, (log_p, t, variance) in zip(
            self.eigenvectors, self._terms(patches, sigma), strict=True
        ):
            # The sum over k so far is kept relative to its own total weight, so that nothing overflows.
            previous, total = total, torch.logaddexp(total, log_p)
            kept, new = (previous - total).exp()[:, None], (log_p - total).exp()[:, None]
            score = kept * score - vectors @ (t * (new / variance))
        return score

    def map_denoise(self, patches: Tensor, sigma: Tensor) -> Tensor:
        """The Wiener filter of the most probable component alone: (B, n, L) -> (B, n, L).

        k = argmax_k r_k(v), then mu_k + C_k (C_k + sigma^2 I)^-1 (v - mu_k); what is not in the subspace
        of a brightness-invariant mixture, the mean of the patch, is kept. This is the step of EPLL.
        """
        best = patches.new_full((len(patches), patches.shape[2]), -math.inf)
        which = torch.zeros_like(best, dtype=torch.long)
        for k, (log_p, _, _) in enumerate(self._terms(patches, sigma)):
            which[log_p > best] = k
            best = torch.maximum(best, log_p)
        clean = torch.empty_like(patches)
        levels = sigma.square().expand(-1, 1, patches.shape[2]).squeeze(1)
        for k in which.unique().tolist():
            image, column = (which == k).nonzero(as_tuple=True)
            v = patches[image, :, column]
            t = (v - self.means[k]) @ self.eigenvectors[k]
            # v - (1 - gain) (v - mu), so that what no eigenvector sees stays.
            rest = levels[image, column][:, None]
            shrunk = t * (rest / (self.eigenvalues[k] + rest))
            clean[image, :, column] = v - shrunk @ self.eigenvectors[k].T
        return clean

    def marginal(self, patch_shape: Sequence[int]) -> GaussianMixture:
        """The marginal of the top left part of this shape: its rows and columns of C_k and mu_k."""
        pixels = torch.arange(self.means.shape[1]).view(self.channels, *self.patch_shape)
        part = pixels[:, : patch_shape[0], : patch_shape[1]].flatten()
        return GaussianMixture(
            patch_shape,
            self.components,
            channels=self.channels,
            weights=self.weights,
            means=self.means[:, part],
            covariances=self.covariances[:, part][:, :, part],
            brightness_invariant=self.brightness_invariant,
        )

    def settings(self) -> dict[str, Any]:
        """The arguments that build it again, before its tensors are loaded."""
        return {
            "patch_shape": list(self.patch_shape),
            "components": self.components,
            "channels": self.channels,
            "brightness_invariant": self.brightness_invariant,
        }

    def _terms(self, patches: Tensor, sigma: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """For each k: log w_k N(v), E_k'(v - mu_k) and the variances l_k + sigma^2 along E_k."""
        for weight, mean, values, vectors in zip(
            self.weights, self.means, self.eigenvalues, self.eigenvectors, strict=True
        ):
            variance = values[:, None] + sigma.square()
            t = vectors.T @ patches - (vectors.T @ mean)[:, None]
            distance = (1 / variance).mT @ t.square() + (2 * math.pi * variance).log().sum(1, True)
            yield weight.log() - 0.5 * distance.squeeze(1), t, variance


def _mean_free_basis(n: int) -> Tensor:
    """An orthonormal basis of the patches with mean zero, (n, n - 1), in float64."""
    start = torch.eye(n, dtype=torch.float64)
    start[:, 0] = 1
    basis: Tensor = torch.linalg.qr(start).Q[:, 1:]
    return basis
