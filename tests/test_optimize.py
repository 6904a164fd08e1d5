from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import patchscore as ps
from patchscore.inference.schedules import noise_schedule
from patchscore.inference.splitting import half_quadratic_splitting

SHAPE = 12, 10
NOISE_STD = 0.5


class Blur:
    """A periodic blur along the rows."""

    def A(self, x: Tensor) -> Tensor:
        return 0.6 * x + 0.4 * x.roll(1, -1)

    def A_adjoint(self, y: Tensor) -> Tensor:
        return 0.6 * y + 0.4 * y.roll(-1, -1)


class ScoreOnly:
    """A prior without a log density."""

    def __init__(self, prior: ps.GaussianCliques) -> None:
        self.prior = prior

    def score(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        return self.prior.score(x, sigma)


def mask() -> ps.Mask:
    return ps.Mask(torch.rand(SHAPE, generator=torch.Generator().manual_seed(5)) < 0.6)


OPERATORS = {"identity": ps.Identity(), "mask": mask(), "blur": Blur()}


@pytest.fixture
def field() -> ps.GaussianCliques:
    return ps.GaussianCliques.exponential(SHAPE, std=2.0, length=3.0, mean=1.0)


def problem(field: ps.GaussianCliques, name: str) -> tuple[ps.GaussianLikelihood, Tensor]:
    generator = torch.Generator().manual_seed(1)
    operator = OPERATORS[name]
    noise = torch.randn(2, 1, *SHAPE, generator=generator, dtype=torch.float64)
    y = operator.A(field.sample(2, generator=generator)) + NOISE_STD * noise
    likelihood = ps.GaussianLikelihood(y, operator, NOISE_STD, tolerance=1e-13)
    return likelihood, exact_mean(field, likelihood, 0.0)


def exact_mean(
    field: ps.GaussianCliques, likelihood: ps.GaussianLikelihood, sigma: float, strength: float = 1.0
) -> Tensor:
    """The mean of a Gaussian posterior by a dense solve; its prior is p_sigma to the strength."""
    units = torch.eye(math.prod(SHAPE), dtype=torch.float64).view(-1, 1, *SHAPE)
    A = likelihood.operator.A(units).flatten(1).T
    covariance = torch.fft.ifft2(torch.fft.fft2(units) * (field.power_spectrum + sigma**2)).real.flatten(
        1
    )
    covariance = covariance / strength
    noise = NOISE_STD**2 * torch.eye(len(A), dtype=A.dtype)
    gain = covariance @ A.T @ torch.linalg.inv(A @ covariance @ A.T + noise)
    mean = field.mean.expand(len(A.T))
    return (mean + (likelihood.y.flatten(1) - A @ mean) @ gain.T).view(-1, 1, *SHAPE)


@pytest.mark.parametrize("name", OPERATORS)
def test_the_maximum_is_the_posterior_mean_of_a_gaussian(name: str, field, error) -> None:
    likelihood, mean = problem(field, name)
    solution = ps.map_estimate(
        ps.Posterior(field, likelihood),
        likelihood.back_projection,
        sigma=1e-4,
        tolerance=1e-11,
        max_steps=2000,
        progress=False,
    )
    assert error(solution.x, mean) < 1e-6
    assert solution.reason.startswith("converged")


@pytest.mark.parametrize("strength", [1.0, 0.3])
@pytest.mark.parametrize("name", OPERATORS)
def test_a_noise_level_smooths_the_prior_only(name: str, strength: float, field, error) -> None:
    likelihood, _ = problem(field, name)
    for prior in (field, ScoreOnly(field)):
        solution = ps.map_estimate(
            ps.Posterior(prior, likelihood),
            likelihood.back_projection,
            sigma=[1.0, 0.6],
            strength=strength,
            tolerance=1e-9,
            max_steps=3000,
            progress=False,
        )
        assert error(solution.x, exact_mean(field, likelihood, 0.6, strength)) < 1e-6
        assert set(solution.sigmas) == {1.0, 0.6}
        assert bool(np.isnan(solution.objective).all()) == isinstance(prior, ScoreOnly)


@pytest.fixture
def network(randomized) -> ps.PatchPrior:
    return ps.PatchPrior(randomized(ps.PatchEnergy(3, width=32)))


def test_the_objective_never_falls_and_is_the_log_density(network, normal) -> None:
    y = normal(3, 1, 9, 11)
    posterior = ps.Posterior(network, ps.GaussianLikelihood(y, ps.Identity(), 0.5))
    levels = [0.5, 0.2, 0.1]
    solution = ps.map_estimate(posterior, 3 * y, sigma=levels, max_steps=100, progress=False)
    for level in levels:
        objective = solution.objective[solution.sigmas == level]
        assert len(objective) > 3
        assert (np.diff(objective, axis=0) >= 0).all()
        assert (objective[-1] > objective[0]).all()
    prior = network.log_prob(solution.x, levels[-1])
    found = (prior + posterior.likelihood.log_prob(solution.x)).detach().numpy()
    np.testing.assert_allclose(solution.objective[-1], found, rtol=1e-12)


def test_images_of_a_batch_climb_on_their_own(network, normal, error) -> None:
    """The data are so precise that the posterior is log-concave, with one maximum."""
    y = normal(2, 1, 9, 11) * torch.tensor([1.0, 50.0], dtype=torch.float64)[:, None, None, None]

    def maximum(y: Tensor) -> Tensor:
        posterior = ps.Posterior(network, ps.GaussianLikelihood(y, ps.Identity(), 0.05))
        return ps.map_estimate(
            posterior, 0 * y, sigma=0.05, tolerance=1e-11, max_steps=2000, progress=False
        ).x

    both = maximum(y)
    for k in (0, 1):
        assert error(both[k : k + 1], maximum(y[k : k + 1])) < 1e-6


def test_it_says_why_it_stopped(field) -> None:
    likelihood, _ = problem(field, "identity")
    posterior = ps.Posterior(field, likelihood)

    def reason(**settings) -> str:
        return ps.map_estimate(
            posterior, likelihood.y, **{"sigma": 0.5, "progress": False, **settings}
        ).reason

    assert "residual is below 0.01" in reason(tolerance=1e-2)
    assert "stopped after 3 steps" in reason(max_steps=3)
    assert "rounding" in reason(tolerance=0.0, max_steps=10_000)


def test_single_precision_climbs_to_rounding(field) -> None:
    likelihood, _ = problem(field, "identity")
    exact = exact_mean(field, likelihood, 0.5)
    single = ps.GaussianLikelihood(likelihood.y.float(), ps.Identity(), NOISE_STD)
    solution = ps.map_estimate(
        ps.Posterior(field.float(), single), single.y, sigma=0.5, tolerance=0.0, progress=False
    )
    assert "rounding" in solution.reason
    assert (solution.x - exact).abs().max() < 1e-3


def test_splitting_of_a_gaussian_is_a_recursion_of_wiener_filters(field, error) -> None:
    likelihood, _ = problem(field, "identity")
    levels = noise_schedule(1.0, 0.1, 5)
    solution = half_quadratic_splitting(field, likelihood, likelihood.y, sigmas=levels, progress=False)
    x = likelihood.y
    for rho in levels:
        z = field.denoise(x, rho)
        x = (likelihood.y / NOISE_STD**2 + z / rho**2) / (1 / NOISE_STD**2 + 1 / rho**2)
    assert error(solution.x, x) < 1e-10
    assert "5 levels" in solution.reason


def test_repeated_splitting_at_one_level_is_the_mode_of_a_power_of_the_prior(field, error) -> None:
    likelihood, _ = problem(field, "mask")
    solution = half_quadratic_splitting(
        field, likelihood, likelihood.y, sigmas=[0.4], strength=0.3, repeats=5000, tolerance=1e-12,
        progress=False,
    )  # fmt: skip
    assert error(solution.x, exact_mean(field, likelihood, 0.4, 0.3)) < 1e-8
    assert 10 < solution.steps < 5000


@pytest.mark.parametrize("name", OPERATORS)
def test_repeated_splitting_finds_the_stationary_point_of_the_score(name: str, field) -> None:
    """Which is that of regularisation by denoising."""
    likelihood, _ = problem(field, name)
    solution = half_quadratic_splitting(
        field, likelihood, likelihood.back_projection, sigmas=[0.4], tolerance=1e-12, repeats=5000,
        progress=False,
    )  # fmt: skip
    force = likelihood.score(solution.x) + field.score(solution.x, 0.4)
    assert force.abs().max() < 1e-8 * likelihood.score(torch.zeros_like(solution.x)).abs().max()
    assert solution.reason == "all 1 levels of the schedule are done"


def test_splitting_without_enough_steps_says_so(field) -> None:
    likelihood, _ = problem(field, "blur")
    solution = half_quadratic_splitting(
        field, likelihood, likelihood.y, sigmas=[4.0, 0.4], repeats=2, progress=False
    )
    assert "2 of them stopped after 2 steps, before x changed by less than 0" in solution.reason


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sigma": 0.0}, "positive noise level"),
        ({"sigma": []}, "positive noise level"),
        ({"sigma": [0.1, 0.5]}, "from large to small"),
        ({"sigma": 0.5, "max_steps": 0}, "max_steps"),
        ({"sigma": 0.5, "tolerance": -1.0}, "tolerance"),
    ],
)
def test_bad_settings_are_refused(settings: dict, words: str, field) -> None:
    likelihood, _ = problem(field, "identity")
    with pytest.raises(ps.InputError, match=words):
        ps.map_estimate(ps.Posterior(field, likelihood), likelihood.y, progress=False, **settings)


def test_a_score_that_is_not_finite_is_an_error(field) -> None:
    likelihood, _ = problem(field, "identity")
    with pytest.raises(ps.InputError, match="not finite"):
        ps.map_estimate(ps.Posterior(field, likelihood), likelihood.y * 1e300, sigma=0.5, progress=False)


def test_bad_settings_of_splitting_are_refused(field) -> None:
    likelihood, _ = problem(field, "identity")
    with pytest.raises(ps.InputError, match="positive noise level"):
        half_quadratic_splitting(field, likelihood, likelihood.y, sigmas=[0.5, 0.0], progress=False)
    with pytest.raises(ps.InputError, match="strength is -1"):
        half_quadratic_splitting(
            field, likelihood, likelihood.y, sigmas=[0.4], strength=-1.0, progress=False
        )
