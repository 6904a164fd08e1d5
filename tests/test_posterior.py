from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import patchscore as ps
from patchscore.inference.curvature import curvature, curvature_bound


class Blur:
    """A periodic blur with a kernel that is not symmetric: an operator of another library."""

    def __init__(self, shape: tuple[int, int]) -> None:
        kernel = torch.zeros(shape, dtype=torch.float64)
        kernel[0, 0], kernel[0, 1], kernel[1, 0], kernel[-1, 0] = 0.5, 0.3, 0.1, 0.1
        self.transfer = torch.fft.fft2(kernel)

    def A(self, x: Tensor) -> Tensor:
        return torch.fft.ifft2(torch.fft.fft2(x) * self.transfer).real

    def A_adjoint(self, y: Tensor) -> Tensor:
        return torch.fft.ifft2(torch.fft.fft2(y) * self.transfer.conj()).real


class Rows:
    """Every second row, as a smaller image, times a gain."""

    def __init__(self, gain: float = 1.0) -> None:
        self.gain = gain

    def A(self, x: Tensor) -> Tensor:
        return self.gain * x[..., ::2, :]

    def A_adjoint(self, y: Tensor) -> Tensor:
        x = y.new_zeros(*y.shape[:-2], 2 * y.shape[-2], y.shape[-1])
        x[..., ::2, :] = self.gain * y
        return x


def checkerboard(shape: tuple[int, int]) -> Tensor:
    rows, columns = (torch.arange(size) for size in shape)
    return (rows[:, None] + columns) % 2 == 0


SHAPE = 6, 8
OPERATORS = {
    "identity": ps.Identity(),
    "mask": ps.Mask(checkerboard(SHAPE)),
    "blur": Blur(SHAPE),
    "rows": Rows(3.0),
}


def dense(operator: object) -> Tensor:
    """The matrix of an operator on images of SHAPE."""
    units = torch.eye(math.prod(SHAPE), dtype=torch.float64).view(-1, 1, *SHAPE)
    return operator.A(units).flatten(1).T


@pytest.fixture
def field() -> ps.GaussianCliques:
    return ps.GaussianCliques.exponential(SHAPE, std=2.0, length=2.0, mean=1.0)


def likelihood_of(operator: object, x: Tensor, noise_std: float = 0.5) -> ps.GaussianLikelihood:
    return ps.GaussianLikelihood(operator.A(x), operator, noise_std)


@pytest.mark.parametrize("name", OPERATORS)
def test_the_score_is_the_gradient_of_the_log_density(name, field, normal, error) -> None:
    posterior = ps.Posterior(field, likelihood_of(OPERATORS[name], normal(2, 1, *SHAPE)))
    x = normal(2, 1, *SHAPE, seed=1).requires_grad_()
    sigma = torch.tensor([0.3, 0.7], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(posterior.log_prob(x, sigma).sum(), x)
    assert error(posterior.score(x, sigma), gradient) < 1e-10


def test_a_prior_network_and_data_make_a_posterior(randomized, normal, error) -> None:
    prior = ps.PatchPrior(randomized(ps.PatchEnergy(3, width=16)))
    posterior = ps.Posterior(prior, likelihood_of(OPERATORS["blur"], normal(1, 1, *SHAPE)))
    assert posterior.has_potential
    x = normal(3, 1, *SHAPE, seed=1).requires_grad_()  # one measurement serves three images
    (gradient,) = torch.autograd.grad(posterior.log_prob(x, 0.4).sum(), x)
    assert error(posterior.score(x, 0.4), gradient) < 1e-10


def test_a_posterior_without_potential_says_so(randomized, normal) -> None:
    prior = ps.PatchPrior(randomized(ps.PatchMLP(3, widths=(8, 8), tanh_layers=1)))
    posterior = ps.Posterior(prior, likelihood_of(ps.Identity(), normal(1, 1, *SHAPE)))
    assert not posterior.has_potential
    with pytest.raises(ps.InputError, match="only a score"):
        posterior.log_prob(normal(1, 1, *SHAPE), 0.4)


def test_the_variance_is_that_of_the_data_given_a_blurred_image(normal, z_score) -> None:
    """Of y = x + n given x_sigma = x + sigma z, for images of which nothing else is known."""
    noise_std, sigma = 0.5, 1.2
    x_sigma = torch.zeros(1, 1, 200, 100, dtype=torch.float64)
    x = x_sigma - sigma * normal(*x_sigma.shape)
    y = x + noise_std * normal(*x_sigma.shape, seed=1)
    variance = ps.GaussianLikelihood(y, ps.Identity(), noise_std).variance(sigma).item()
    assert variance == pytest.approx(noise_std**2 + sigma**2, rel=1e-9)
    assert z_score(y.flatten().square(), variance) < 4


@pytest.mark.parametrize("name", OPERATORS)
def test_the_norm_is_the_largest_singular_value(name, normal) -> None:
    operator = OPERATORS[name]
    exact = torch.linalg.svdvals(dense(operator))[0].item()
    norm = likelihood_of(operator, normal(1, 1, *SHAPE)).norm
    assert 0.99 * exact < norm < exact * (1 + 1e-10)


@pytest.mark.parametrize("name", OPERATORS)
def test_the_proximal_point_solves_the_dense_system(name, normal, error) -> None:
    operator, noise_std, precision = OPERATORS[name], 0.3, 0.7
    z = normal(2, 1, *SHAPE, seed=1)
    likelihood = likelihood_of(operator, normal(2, 1, *SHAPE), noise_std)
    A = dense(operator)
    left = A.T @ A / noise_std**2 + precision * torch.eye(len(A.T), dtype=A.dtype)
    right = likelihood.y.flatten(1) @ A / noise_std**2 + precision * z.flatten(1)
    expected = torch.linalg.solve(left, right.T).T.view_as(z)
    assert error(likelihood.proximal(z, precision), expected) < 1e-10


@pytest.mark.parametrize("name", OPERATORS)
def test_proximal_samples_have_the_posterior_covariance(name, normal) -> None:
    operator, noise_std, precision, count = OPERATORS[name], 0.8, 0.7, 4000
    z = normal(1, 1, *SHAPE, seed=1)
    likelihood = likelihood_of(operator, normal(1, 1, *SHAPE), noise_std)
    generator = torch.Generator().manual_seed(0)
    draws = likelihood.proximal_sample(z.expand(count, -1, -1, -1), precision, generator)
    A = dense(operator)
    covariance = torch.linalg.inv(
        A.T @ A / noise_std**2 + precision * torch.eye(len(A.T), dtype=A.dtype)
    )
    spread = (draws - likelihood.proximal(z, precision)).flatten(1)
    found = spread.T @ spread / count
    # Wishart: var of an entry is (c_ii c_jj + c_ij^2) / count; 48 x 48 of them, so below 5.5.
    diagonal = covariance.diagonal()
    standard_error = ((diagonal[:, None] * diagonal + covariance**2) / count).sqrt()
    assert ((found - covariance) / standard_error).abs().max() < 5.5
    assert (spread.mean(0) / (diagonal / count).sqrt()).abs().max() < 5


@pytest.mark.parametrize(("sigma", "shape"), [(0.5, (6, 8)), (0.1, (16, 16))])
def test_the_curvature_of_a_gaussian_field(sigma: float, shape: tuple[int, int], normal) -> None:
    field = ps.GaussianCliques.exponential(shape, std=2.0, length=2.0)
    exact = 1 / (field.power_spectrum.min() + sigma**2)
    found = curvature(field, normal(2, 1, *shape), sigma)
    assert bool((found > 0.98 * exact).all())
    assert bool((found < exact * (1 + 1e-6)).all())
    assert found.max() <= field.curvature_bound(sigma)


@pytest.mark.parametrize("name", OPERATORS)
def test_the_bound_on_the_curvature_holds(name, field, normal) -> None:
    posterior = ps.Posterior(field, likelihood_of(OPERATORS[name], normal(1, 1, *SHAPE)))
    for sigma in (0.1, 1.0, 10.0):
        x = normal(1, 1, *SHAPE)
        found = curvature(posterior, x, sigma).item()
        assert found <= posterior.curvature_bound(sigma) * (1 + 1e-6)


def test_a_posterior_that_is_wrapped_keeps_a_safe_step(field, normal) -> None:
    """A wrapper that offers the score alone is measured, and never taken for a prior."""
    posterior = ps.Posterior(field, likelihood_of(OPERATORS["identity"], normal(1, 1, *SHAPE)))

    class Wrapped:
        def score(self, x: Tensor, sigma: float | Tensor) -> Tensor:
            return posterior.score(x, sigma)

    x = normal(1, 1, *SHAPE)
    assert curvature_bound(posterior, x, 0.1) == posterior.curvature_bound(0.1)
    assert curvature_bound(Wrapped(), x, 0.1) == curvature(posterior, x, 0.1).item()


class ScaledAdjoint(Rows):
    def A_adjoint(self, y: Tensor) -> Tensor:
        return 1.01 * super().A_adjoint(y)


class ShiftedAdjoint(Blur):
    def A_adjoint(self, y: Tensor) -> Tensor:
        return self.A(y)


@pytest.mark.parametrize("shape", [SHAPE, (1024, 1024)])
@pytest.mark.parametrize("kind", [ScaledAdjoint, ShiftedAdjoint])
def test_a_wrong_adjoint_is_refused_with_its_mismatch(kind: type, shape, normal) -> None:
    operator = kind() if kind is ScaledAdjoint else kind(shape)
    with pytest.raises(ps.InputError, match=r"mismatch of 0\.\d+"):
        likelihood_of(operator, normal(1, 1, *shape))


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "integers": (
        lambda: ps.GaussianLikelihood(torch.zeros(1, 1, 4, 4).int(), ps.Identity(), 1.0),
        "int32",
    ),
    "no noise": (
        lambda: ps.GaussianLikelihood(torch.zeros(1, 1, 4, 4), ps.Identity(), 0.0),
        "a thousandth",
    ),
    "NaN": (
        lambda: ps.GaussianLikelihood(torch.full((1, 1, 4, 4), math.nan), ps.Identity(), 1.0),
        "NaN",
    ),
    "mask": (lambda: ps.Mask(torch.ones(4, 4)), r"mask != 0"),
}


class Cropped(ps.Identity):
    """Its adjoint returns an image that it does not measure in the shape of y."""

    def A(self, x: Tensor) -> Tensor:
        return x[..., 1:]


def test_a_measurement_of_another_shape_is_refused() -> None:
    with pytest.raises(ps.InputError, match=r"\(1, 1, 4, 4\), but A of an image"):
        ps.GaussianLikelihood(torch.zeros(1, 1, 4, 4), Cropped(), 0.1)


@pytest.mark.parametrize("case", BAD)
def test_bad_data_are_refused(case: str) -> None:
    make, words = BAD[case]
    with pytest.raises(ps.InputError, match=words):
        make()


def test_a_system_that_does_not_converge_says_so(normal) -> None:
    class Steep:
        def A(self, x: Tensor) -> Tensor:
            return x * torch.logspace(-6, 6, x.shape[-1], dtype=x.dtype)

        A_adjoint = A

    likelihood = ps.GaussianLikelihood(normal(1, 1, 64, 512), Steep(), 1e-3)
    with pytest.raises(ps.InputError, match="badly conditioned"):
        likelihood.proximal(normal(1, 1, 64, 512), 1e-9)
