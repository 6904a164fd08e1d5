"""The objectives against what they must find: the known score of a Gaussian, and each other."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import patchscore as ps
from patchscore.learning import matching
from patchscore.priors.cliques import Clique

SIDE = 2
LEVEL = 0.7


class LinearClique(Clique):
    """s_V(v) = -A v, with every entry of A free: the score of a Gaussian patch if A is its precision."""

    patch_shape = SIDE, SIDE
    channels = 1
    scale_invariant = True  # used at one noise level only

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.zeros(SIDE**2, SIDE**2, dtype=torch.float64))

    def score(self, patches: Tensor, sigma: Tensor) -> Tensor:
        return -self.matrix @ patches

    def settings(self) -> dict[str, Any]:
        return {}


@pytest.fixture(scope="module")
def covariance() -> Tensor:
    i = torch.arange(SIDE**2)
    row, column = i // SIDE, i % SIDE
    distance = (row[:, None] - row).abs() + 0.5 * (column[:, None] - column).abs()
    return torch.exp(-distance.double())


def gaussian_patches(covariance: Tensor, count: int, generator: torch.Generator) -> Tensor:
    z = torch.randn(count, SIDE**2, generator=generator, dtype=torch.float64)
    return (z @ torch.linalg.cholesky(covariance).T).view(count, 1, SIDE, SIDE)


def minimiser(objective, prior: ps.PatchPrior, x: Tensor, sigma: Tensor, generator) -> Tensor:
    """Every objective is quadratic in A, so one Newton step from zero finds its minimum."""
    matrix = prior.network.matrix
    (gradient,) = torch.autograd.grad(
        objective(prior, x, sigma, generator=generator), matrix, create_graph=True
    )
    rows = [torch.autograd.grad(g, matrix, retain_graph=True)[0].flatten() for g in gradient.flatten()]
    return -torch.linalg.solve(torch.stack(rows), gradient.detach().flatten()).view_as(matrix)


def precision(covariance: Tensor, variance: float) -> Tensor:
    return torch.linalg.inv(covariance + variance * torch.eye(len(covariance), dtype=torch.float64))


@pytest.mark.parametrize("name", ["denoising", "explicit", "implicit", "sliced", "sure", "noise2score"])
def test_every_objective_finds_the_score_of_a_gaussian(name: str, covariance: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    prior = ps.PatchPrior(LinearClique(), assembly="mean", boundary="open")
    truth = precision(covariance, LEVEL**2)
    objective = {
        "denoising": matching.denoising_score_matching,
        "explicit": partial(
            matching.explicit_score_matching,
            target=lambda y, _: (-truth @ y.flatten(1).T).T.view_as(y),
        ),
        "implicit": matching.implicit_score_matching,
        "sliced": matching.sliced_score_matching,
        "sure": matching.sure,
        "noise2score": matching.noise2score,
    }[name]
    found = []
    for _ in range(24):
        x = gaussian_patches(covariance, 4000, generator)
        if name in ("sure", "noise2score"):
            x = x + LEVEL * torch.randn(x.shape, generator=generator, dtype=torch.float64)
        found.append(minimiser(objective, prior, x, torch.full((4000,), LEVEL).double(), generator))
    found = torch.stack(found)
    if name == "noise2score":
        # A linear score cannot follow the added noise: the best one is the average, weighted by the
        # square of the added level, of the precisions at the levels that it sees, in the metric of y.
        truth = noise2score_optimum(covariance)
    error = found.std(0) / len(found) ** 0.5
    if name == "explicit":
        # Without noise in the target every batch finds it exactly.
        assert (found - truth).abs().max() < 1e-10
    else:
        z = (found.mean(0) - truth) / error
        assert z.abs().max() < 4, z


def noise2score_optimum(covariance: Tensor) -> Tensor:
    """argmin_A E_tau tau^2 E | (A - A_tau) y_tau |^2 with tau = LEVEL r, log r uniform."""
    u = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    tau = LEVEL * matching.LEAST_ADDED * (matching.MOST_ADDED / matching.LEAST_ADDED) ** u
    eye = torch.eye(len(covariance), dtype=torch.float64)
    seen = covariance + (LEVEL**2 + tau[:, None, None] ** 2) * eye
    weight = (tau**2)[:, None, None]
    # A_tau C_tau = I, so the normal equations are A sum(tau^2 C_tau) = sum(tau^2) I.
    return torch.linalg.inv((weight * seen).mean(0)) * weight.mean()


@pytest.fixture
def potential() -> ps.PatchPrior:
    """A random potential on open crops, in float64."""
    torch.manual_seed(3)
    network = ps.PatchEnergy(patch_size=3, width=16).double()
    nn.init.normal_(network.readout)
    return ps.PatchPrior(network, boundary="open")


def test_sure_is_unbiased(potential: ps.PatchPrior) -> None:
    generator = torch.Generator().manual_seed(1)
    clean = torch.rand(1, 1, 9, 10, generator=generator, dtype=torch.float64)
    sigma = torch.tensor([0.4], dtype=torch.float64)
    differences = []
    for _ in range(600):
        noisy = clean + sigma * torch.randn(clean.shape, generator=generator, dtype=torch.float64)
        risk = potential.interior(potential.denoise(noisy, sigma) - clean).square().mean() / sigma**2
        differences.append((matching.sure(potential, noisy, sigma, generator=generator) - risk).detach())
    differences = torch.stack(differences)
    assert abs(differences.mean() / differences.std() * len(differences) ** 0.5) < 4
    # The test has power: the divergence that it stands on is far from zero.
    assert abs(differences.mean() / (risk - 1)) < 0.1


def test_sliced_is_implicit_on_average(potential: ps.PatchPrior) -> None:
    clean = torch.rand(2, 1, 7, 8, dtype=torch.float64)
    sigma = torch.tensor([0.4, 0.6], dtype=torch.float64)
    noise = torch.Generator()
    differences = []
    for seed in range(200):
        # The noise is the first thing that both draw, so it is the same.
        exact, sliced = (
            objective(potential, clean, sigma, generator=noise.manual_seed(seed)).detach()
            for objective in (matching.implicit_score_matching, matching.sliced_score_matching)
        )
        differences.append(sliced - exact)
    differences = torch.stack(differences)
    assert differences.std() > 1e-3
    assert abs(differences.mean() / differences.std() * len(differences) ** 0.5) < 4


def test_denoising_is_explicit_up_to_a_constant(covariance: Tensor) -> None:
    """Vincent's identity: on a Gaussian the constant is tr(C (C + sigma^2)^-1) / n, for every model."""
    generator = torch.Generator().manual_seed(2)
    prior = ps.PatchPrior(LinearClique(), assembly="mean", boundary="open")
    truth = precision(covariance, LEVEL**2)

    def target(y: Tensor, _: Tensor) -> Tensor:
        return (-truth @ y.flatten(1).T).T.view_as(y)

    count, sigma = 20_000, torch.full((1,), LEVEL).double()
    x = gaussian_patches(covariance, count, generator)
    for matrix in (torch.zeros_like(truth), truth, torch.eye(4).double(), truth.flip(0)):
        prior.network.matrix.data.copy_(matrix)
        differences = []
        for batch in x.split(200):
            state = generator.get_state()
            levels = sigma.expand(len(batch))
            explicit = matching.explicit_score_matching(
                prior, batch, levels, generator=generator, target=target
            )
            generator.set_state(state)
            denoising = matching.denoising_score_matching(prior, batch, levels, generator=generator)
            differences.append((denoising - explicit).detach())
        differences = torch.stack(differences)
        constant = torch.trace(covariance @ truth) / SIDE**2
        z = (differences.mean() - constant) / differences.std() * len(differences) ** 0.5
        assert abs(z) < 4, matrix


def test_fit_takes_every_objective(covariance: Tensor) -> None:
    noisy = torch.rand(3, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    for objective in (
        matching.denoising_score_matching,
        partial(matching.explicit_score_matching, target=lambda y, _: -y),
        matching.sliced_score_matching,
        matching.sure,
        matching.noise2score,
    ):
        torch.manual_seed(0)
        prior = ps.PatchPrior(ps.PatchEnergy(patch_size=3, width=16))
        history = ps.fit(
            prior, noisy, sigmas=(0.2, 0.2), crop=9, steps=120, objective=objective, progress=False
        )
        assert history.loss[-40:].mean() < history.loss[:5].mean()
