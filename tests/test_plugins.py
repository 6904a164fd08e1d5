"""A clique, an operator and a sampler that others wrote, against dense linear algebra.

The prior is a field of springs between neighbours, the measurement a camera that bins pixels in pairs,

    phi(v) = k (v_2 - v_1)^2 / 2,    y = A x + n,    (A x)_i = (x_{2i} + x_{2i+1}) / sqrt 2,

and the sampler is the unadjusted Langevin algorithm. All is Gaussian, so all is known.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import patchscore as ps
from patchscore.inference import State, run
from patchscore.priors import registry
from patchscore.randomness import standard_normal

ROWS, COLUMNS = 3, 8
STIFFNESS, NOISE_STD, SIGMA = 1.75, 0.6, 0.2

Fixture = Callable[..., Tensor]


class Spring(ps.Potential):
    """Neighbours in a row are alike. Its patches are 1 x 2 pixels."""

    patch_shape = (1, 2)
    channels = 1
    trained_on = "crops"  # a potential of cliques, to be summed
    brightness_invariant = True

    def __init__(self, stiffness: float = 1.0) -> None:
        super().__init__()
        self.stiffness = stiffness
        self.register_buffer("k", torch.tensor(stiffness))

    def energy(self, patches: Tensor, sigma: Tensor) -> Tensor:
        return self.k / 2 * (patches[:, 1] - patches[:, 0]).square()

    def score(self, patches: Tensor, sigma: Tensor) -> Tensor:
        force = self.k * (patches[:, 1:] - patches[:, :1])
        return torch.cat([force, -force], dim=1)


class Binning:
    """Pairs of pixels in a row are read out together."""

    def A(self, x: Tensor) -> Tensor:
        return (x[..., ::2] + x[..., 1::2]) / 2**0.5

    def A_adjoint(self, y: Tensor) -> Tensor:
        return y.repeat_interleave(2, dim=-1) / 2**0.5


def unadjusted_langevin(posterior: ps.Posterior, h: float) -> Callable[[State, torch.Generator], State]:
    """x <- x + h s(x) + sqrt(2 h) z."""

    def step(state: State, generator: torch.Generator) -> State:
        drift = h * posterior.score(state.x, SIGMA)
        x = state.x + drift + (2 * h) ** 0.5 * standard_normal(state.x, generator)
        return state._replace(x=x, evaluations=state.evaluations + 1)

    return step


@pytest.fixture
def prior(monkeypatch: pytest.MonkeyPatch) -> ps.PatchPrior:
    """Springs around a torus. What is registered in a test is forgotten after it."""
    monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    ps.register(Spring)
    return ps.PatchPrior(Spring(STIFFNESS).double(), boundary="periodic")


def precision() -> Tensor:
    """Of the prior: every pixel is tied to its right neighbour, that of the last one is the first."""
    matrix = torch.zeros(ROWS * COLUMNS, ROWS * COLUMNS, dtype=torch.float64)
    for row in range(ROWS):
        for column in range(COLUMNS):
            i, j = row * COLUMNS + column, row * COLUMNS + (column + 1) % COLUMNS
            matrix[i, i] += STIFFNESS
            matrix[j, j] += STIFFNESS
            matrix[i, j] -= STIFFNESS
            matrix[j, i] -= STIFFNESS
    return matrix


def binning() -> Tensor:
    """A as a matrix."""
    matrix = torch.zeros(ROWS * COLUMNS // 2, ROWS * COLUMNS, dtype=torch.float64)
    for i in range(len(matrix)):
        matrix[i, 2 * i : 2 * i + 2] = 0.5**0.5
    return matrix


@pytest.fixture
def measured(prior: ps.PatchPrior, normal: Fixture) -> tuple[ps.Posterior, Tensor, Tensor]:
    """The posterior, and its mean and precision by dense matrices. A A' = I: y has one variance more."""
    y = normal(1, 1, ROWS, COLUMNS // 2, seed=5) + 2
    posterior = ps.Posterior(prior, ps.GaussianLikelihood(y, Binning(), NOISE_STD))
    A, variance = binning(), NOISE_STD**2 + SIGMA**2
    H = precision() + A.T @ A / variance
    return posterior, torch.linalg.solve(H, A.T @ y.flatten() / variance), H


def test_a_clique_has_the_score_and_the_density_of_its_field(
    prior: ps.PatchPrior, normal: Fixture, error: Callable[[Tensor, Tensor], float]
) -> None:
    x = normal(4, 1, ROWS, COLUMNS)
    flat = x.flatten(1)
    assert error(prior.score(x, SIGMA).flatten(1), -flat @ precision()) < 1e-10
    assert error(prior.log_prob(x, SIGMA), -((flat @ precision()) * flat).sum(1) / 2) < 1e-10


def test_a_clique_is_saved_and_loaded(prior: ps.PatchPrior, normal: Fixture, tmp_path: Path) -> None:
    prior.save(tmp_path / "springs.safetensors")
    again = ps.load_prior(tmp_path / "springs.safetensors", "cpu")
    assert type(again.network) is Spring
    assert again.network.stiffness == STIFFNESS
    x = normal(1, 1, ROWS, COLUMNS)
    assert torch.equal(again.score(x, SIGMA), prior.score(x, SIGMA))


def test_an_operator_makes_a_posterior(
    measured: tuple[ps.Posterior, Tensor, Tensor],
    normal: Fixture,
    error: Callable[[Tensor, Tensor], float],
) -> None:
    posterior, mean, H = measured
    x = normal(4, 1, ROWS, COLUMNS)
    deviation = x.flatten(1) - mean
    assert error(posterior.score(x, SIGMA).flatten(1), -deviation @ H) < 1e-10
    rise = posterior.log_prob(x, SIGMA) - posterior.log_prob(mean.view(1, 1, ROWS, COLUMNS), SIGMA)
    assert error(rise, -((deviation @ H) * deviation).sum(1) / 2) < 1e-10


def test_the_most_probable_image_is_the_posterior_mean(
    measured: tuple[ps.Posterior, Tensor, Tensor],
) -> None:
    """It stops at a root mean square of sigma s(x), and |x - m| <= |s| / lambda.

    As a score of any kind, so that sigma is in the data too.
    """
    posterior, mean, H = measured

    class Blurred:
        score, log_prob = posterior.score, posterior.log_prob

    x0 = torch.zeros(1, 1, ROWS, COLUMNS, dtype=torch.float64)
    found = ps.map_estimate(Blurred(), x0, sigma=SIGMA, tolerance=1e-6, progress=False).x
    distance = (found.flatten() - mean).square().mean().sqrt()
    assert distance <= 1e-6 / (SIGMA * torch.linalg.eigvalsh(H)[0])


def test_a_sampler_has_its_stationary_mean_and_variance(
    measured: tuple[ps.Posterior, Tensor, Tensor], z_score: Callable[[object, float], float]
) -> None:
    """For a precision H, steps of length h end at the mean, with covariance (H (1 - h H / 2))^-1."""
    posterior, mean, H = measured
    rates = torch.linalg.eigvalsh(H)
    h = 0.5 / rates[-1].item()
    steps = int(10 / (h * rates[0].item()))  # all begin at the mean: exp(-20) of the variance is missing
    x0 = mean.view(1, 1, ROWS, COLUMNS).repeat(4000, 1, 1, 1)
    generator = torch.Generator().manual_seed(0)
    chain = run(
        unadjusted_langevin(posterior, h), x0, steps=steps, burn_in=steps - 1, generator=generator,
        progress=False,
    )  # fmt: skip
    assert chain.evaluations == steps
    covariance = torch.linalg.inv(H @ (torch.eye(len(H), dtype=H.dtype) - h / 2 * H))
    deviation = chain.samples[0].flatten(1) - mean
    for i in range(len(mean)):
        assert z_score(deviation[:, i], 0) < 4
        for j in (i, (i + 1) % len(mean)):
            assert z_score(deviation[:, i] * deviation[:, j], covariance[i, j].item()) < 4
