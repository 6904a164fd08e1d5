"""Intervals that hold the truth as often as they say, where the posterior is known exactly."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

import patchscore as ps
from patchscore.inference.gibbs import split_gibbs

SHAPE = 8, 8
IMAGES = 600
NOISE_STD = 0.6


class Blur:
    """An external operator."""

    def A(self, x: Tensor) -> Tensor:
        return 0.5 * x + 0.3 * x.roll(1, -1) + 0.2 * x.roll(1, -2)

    def A_adjoint(self, y: Tensor) -> Tensor:
        return 0.5 * y + 0.3 * y.roll(-1, -1) + 0.2 * y.roll(-1, -2)


OPERATORS = {
    "identity": ps.Identity(),
    "mask": ps.Mask(torch.rand(SHAPE, generator=torch.Generator().manual_seed(3)) < 0.7),
    "blur": Blur(),
}


def draws(sampler: str, operator: str, n: int) -> tuple[Tensor, Tensor]:
    """Truths (IMAGES, 1, H, W) of a Gaussian field, and posterior samples (n, IMAGES, 1, H, W)."""
    generator = torch.Generator().manual_seed(7)
    field = ps.GaussianCliques.exponential(SHAPE, std=1.0, length=2.0)
    truth = field.sample(IMAGES, generator=generator)
    A = OPERATORS[operator]
    y = A.A(truth)
    y = y + NOISE_STD * torch.randn(y.shape, generator=generator, dtype=y.dtype)
    if sampler == "reverse diffusion":
        chain = ps.sample_denoised(
            field, y, NOISE_STD, n, levels=30, generator=generator, progress=False
        )
        return truth, chain.samples
    if sampler == "split Gibbs":
        # The split adds rho^2 A A' to the noise, which for a mask can be taken out of it beforehand.
        rho = NOISE_STD / 2
        likelihood = ps.GaussianLikelihood(y, A, (NOISE_STD**2 - rho**2) ** 0.5)
        chain = split_gibbs(
            ps.Posterior(field, likelihood), 0 * truth, rho=rho, steps=10 * n, burn_in=0, levels=10,
            generator=generator, progress=False,
        )  # fmt: skip
        return truth, chain.samples[9::10]
    posterior = ps.Posterior(field, ps.GaussianLikelihood(y, A, NOISE_STD))
    chain = ps.langevin(
        posterior, 0 * truth, sigma=0.05, steps=100 + 30 * n, burn_in=100, thin=30, metropolis=True,
        generator=generator, progress=False,
    )  # fmt: skip
    return truth, chain.samples


CASES = [
    ("reverse diffusion", "identity"),
    ("Metropolis", "identity"),
    ("Metropolis", "mask"),
    ("Metropolis", "blur"),
    ("split Gibbs", "mask"),
]


@pytest.mark.parametrize(("sampler", "operator"), CASES)
def test_intervals_hold_the_truth_and_ranks_are_uniform(sampler: str, operator: str) -> None:
    """Of 19 samples, the range from the lowest to the highest holds 18/20 = 90 % of the truths."""
    n = 19
    truth, samples = draws(sampler, operator, n)
    inside = (samples.amin(0) <= truth) & (truth <= samples.amax(0))
    assert 0.88 < inside.double().mean() < 0.92
    # One pixel of each image: ranks of independent truths.
    ranks = (samples < truth).sum(0)[:, 0, 3, 4]
    observed = torch.bincount(ranks, minlength=n + 1)
    assert chisquare(observed.numpy()).pvalue > 1e-3
