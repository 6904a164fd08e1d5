"""Mixtures of Gaussians learned from patches, by expectation-maximisation.

    r_k(v) = w_k N(v; mu_k, C_k) / sum_j w_j N(v; mu_j, C_j)           expectation
    w_k = E r_k,  mu_k = E[r_k v] / w_k,  C_k = E[r_k v v'] / w_k - mu_k mu_k'      maximisation

over all patches, or over one batch after the other with averaged statistics.

References: Dempster, Laird and Rubin, J. R. Stat. Soc. B 39 (1977); Cappe and Moulines, "On-line
expectation-maximization algorithm for latent data models", J. R. Stat. Soc. B 71 (2009).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from patchscore.errors import InputError
from patchscore.priors.cliques import check_tensor
from patchscore.priors.mixture import GaussianMixture
from patchscore.randomness import seeded

# Patches processed at once, which bounds the memory; patches per component that initialise the fit.
PATCHES_PER_BLOCK = 16_384
SEEDING_PATCHES_PER_COMPONENT = 200


class MixtureFit(NamedTuple):
    """The fitted mixture, and the mean log density of the patches of each step before it, (steps,)."""

    mixture: GaussianMixture
    log_likelihood: Tensor


class Moments(NamedTuple):
    """The average over patches of r_k (K,), r_k v (K, n) and r_k v v' (K, n, n), in float64."""

    zeroth: Tensor
    first: Tensor
    second: Tensor


def fit_mixture(
    patches: Tensor,
    components: int,
    *,
    zero_mean: bool = False,
    brightness_invariant: bool = False,
    passes: int = 20,
    batch_size: int | None = None,
    floor: float = 1e-6,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> MixtureFit:
    """Fit a mixture by expectation-maximisation, over all patches or batch by batch.

    With the statistics s(v) = (r_k, r_k v, r_k v v') of a patch, step t = 0, 1, .. is

        S <- S + g_t (mean of s over the batch - S)        g_t = 1, or (t + 2)^-0.6 with batches
        w = S_0,  mu = S_1 / S_0,  C = S_2 / S_0 - mu mu'  with eigenvalues of at least the floor

    Without batches the likelihood never decreases, because the clipped C is the best one that the floor
    allows. Batches (of some hundred patches per component) need far fewer passes; use them for millions
    of patches.

    Parameters
    ----------
    patches
        (N, C, rows, columns), clean, in any unit; float32 is precise enough for images.
    zero_mean
        All mu_k = 0: each component is a subspace and a contrast, as in EPLL.
    passes
        How often every patch is used.
    batch_size
        The approximate number of patches per step; by default all.
    floor
        The smallest eigenvalue of a C_k, as a fraction of the mean square of a pixel (after subtracting
        the average patch, unless all means are zero).
    generator
        For the starting point and the order of the patches; on the CPU. Seed 0 by default.

    Raises
    ------
    InputError
        If there are fewer patches than components, all patches are alike, or a number is out of range.

    Notes
    -----
    EM ends in a local maximum; compare several generators.
    """
    generator = seeded(generator)
    batch_size = len(patches) if batch_size is None else batch_size
    if patches.ndim != 4 or not 1 <= components <= len(patches):
        raise InputError(
            f"patches have shape {tuple(patches.shape)}, for {components} components; expected "
            "(N, C, rows, columns) with at least one patch for each component."
        )
    check_tensor("patches", patches, tuple(patches.shape))
    if min(passes, batch_size) < 1 or not 0 < floor < 1:
        raise InputError(
            f"passes is {passes}, batch_size {batch_size} and floor {floor}; expected numbers of at "
            "least 1, and a floor between 0 and 1."
        )
    shape, data = patches.shape[1:], patches.flatten(1)
    center = data.new_zeros(data.shape[1]) if zero_mean else data.mean(0)

    def centered(chosen: Tensor) -> Tensor:
        v = data[chosen] - center
        return v - v.mean(1, keepdim=True) if brightness_invariant else v

    def maximize(moments: Moments) -> GaussianMixture:
        weights = moments.zeroth.clamp_min(1e-12)
        means = (0 if zero_mean else 1) * moments.first / weights[:, None]
        covariances = moments.second / weights[:, None, None] - means[:, :, None] * means[:, None]
        return GaussianMixture(
            shape[1:],
            components,
            channels=shape[0],
            weights=(weights / weights.sum()).to(patches),
            means=means.to(patches),
            covariances=covariances.to(patches),
            brightness_invariant=brightness_invariant,
            floor=smallest,
        )

    some = SEEDING_PATCHES_PER_COMPONENT * components
    seeding = centered(torch.randperm(len(data), generator=generator)[:some])
    smallest = floor * float(seeding.square().mean())
    if smallest == 0:
        raise InputError("all patches are alike, so there is nothing to fit; give different ones.")
    moments = _seed(seeding, components, zero_mean, generator)
    model = maximize(moments)
    trace: list[float] = []
    batches = max(1, len(data) // batch_size)  # of equal size, since they have equal weight
    for _ in tqdm(range(passes), disable=not progress):
        for batch in torch.randperm(len(data), generator=generator).tensor_split(batches):
            found, log_likelihood = _expectation(model, centered, batch)
            gain = 1.0 if batches == 1 else (len(trace) + 2) ** -0.6
            moments = Moments(*(s + gain * (new - s) for s, new in zip(moments, found, strict=True)))
            model = maximize(moments)
            trace.append(log_likelihood)
    model.means += center - center.mean() if brightness_invariant else center
    return MixtureFit(model, torch.tensor(trace, dtype=torch.float64))


def _expectation(
    model: GaussianMixture, patches: Callable[[Tensor], Tensor], batch: Tensor
) -> tuple[Moments, float]:
    """The moments of a batch under a model, and its mean log density."""
    count, n = model.means.shape
    zeroth, first, second = (torch.zeros(count, *s, dtype=torch.float64) for s in ((), (n,), (n, n)))
    log_likelihood = 0.0
    for block in batch.split(PATCHES_PER_BLOCK):
        v = patches(block)
        log_joint = model.log_joint(v.T[None], v.new_zeros(1, 1, 1))[0]
        total = log_joint.logsumexp(0)
        log_likelihood += total.sum(dtype=torch.float64).item()
        responsibilities = (log_joint - total).exp()
        zeroth += responsibilities.sum(1, dtype=torch.float64)
        first += responsibilities @ v
        for k, r in enumerate(responsibilities):
            second[k] += (v * r[:, None]).T @ v
    return Moments(*(s / len(batch) for s in (zeroth, first, second))), log_likelihood / len(batch)


def _seed(v: Tensor, components: int, zero_mean: bool, generator: torch.Generator) -> Moments:
    """Initialise EM: clusters around patches that are far from each other (k-means++), regularised.

    The squared distance is |u - v|^2, or |u|^2 + |v|^2 - 2 (u'v)^2 / (|u| |v|) if all means are zero,
    since the sign of a patch then does not matter.

    Reference: Arthur and Vassilvitskii, "k-means++", SODA 2007.
    """
    v = v.double()
    lengths = v.norm(dim=1).clamp_min(torch.finfo(v.dtype).tiny ** 0.5)
    closest = torch.full((len(v),), math.inf, dtype=v.dtype)
    labels = torch.zeros(len(v), dtype=torch.long)
    chosen = torch.randint(len(v), (), generator=generator)
    for k in range(components):
        product = v @ v[chosen]
        if zero_mean:
            product = product.square() / (lengths * lengths[chosen])
        distances = (lengths.square() + lengths[chosen].square() - 2 * product).clamp_min(0)
        labels[distances < closest] = k
        closest = torch.minimum(closest, distances)
        chosen = torch.multinomial(closest + closest.max() * 1e-12 + 1e-300, 1, generator=generator)[0]
    clusters = [v[labels == k] for k in range(components)]
    n = v.shape[1]
    zeroth = torch.tensor([len(c) for c in clusters], dtype=v.dtype) / len(v)
    means = torch.stack([c.sum(0) / max(1, len(c)) * (not zero_mean) for c in clusters])
    deviations = [c - mean for c, mean in zip(clusters, means, strict=True)]
    pooled = sum(d.square().sum() for d in deviations) / len(v)
    second = torch.zeros(components, n, n, dtype=v.dtype)
    for k, d in enumerate(deviations):
        # As if n isotropic patches with the scale of this cluster had been seen as well.
        scale = (d.square().sum() + pooled) / (len(d) + 1)
        covariance = (d.T @ d + scale * torch.eye(n)) / (len(d) + n)
        second[k] = zeroth[k] * (covariance + torch.outer(means[k], means[k]))
    return Moments(zeroth, zeroth[:, None] * means, second)
