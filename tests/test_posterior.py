from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import patchscore as ps
from patchscore.inference.curvature import curvature, curvature_bound
from patchscore.inference.splitting import half_quadratic_splitting


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


def likelihood_of(operator: object, x: Tensor, noise_std: object = 0.5) -> ps.GaussianLikelihood:
    return ps.GaussianLikelihood(operator.A(x), operator, noise_std, tolerance=1e-13)


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


NOISE: dict[str, Callable[[Tensor], object]] = {
    "white": lambda y: 0.5,
    "weights": lambda y: torch.linspace(0.2, 3.0, y[0].numel(), dtype=torch.float64).view_as(y[:1]),
    "left out": lambda y: torch.where(torch.arange(y.shape[-1]) < 3, 0.4, torch.inf).double(),
    "whitening": lambda y: Correlated(y.shape[-2:]),
}


class Correlated(Blur):
    """Whitens noise that is correlated along the rows: a filter with complex transfer."""

    def __init__(self, shape: tuple[int, int], unit: float = 1.0) -> None:
        kernel = torch.zeros(shape, dtype=torch.float64)
        kernel[0, 0], kernel[0, 1], kernel[0, 2] = 2.0, -0.9, 0.3
        self.transfer = torch.fft.fft2(kernel) / unit


def dense_noise(noise_std: object, y: Tensor) -> Tensor:
    """C^-1 of one measurement."""
    if isinstance(noise_std, Correlated):
        units = torch.eye(y[0].numel(), dtype=torch.float64).view(-1, *y.shape[1:])
        W = noise_std.A(units).flatten(1).T
        return W.T @ W
    levels = torch.as_tensor(noise_std, dtype=torch.float64).expand_as(y[:1])
    return (1 / levels.flatten().square()).diag()


@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("name", OPERATORS)
def test_the_likelihood_of_a_blurred_image_is_that_of_dense_matrices(name, noise, normal, error) -> None:
    """N(y; A x, C + sigma^2 A A'). What is left out is a row less of A and of C."""
    operator = OPERATORS[name]
    A, y = dense(operator), operator.A(normal(1, 1, *SHAPE))
    noise_std = NOISE[noise](y)
    likelihood = ps.GaussianLikelihood(y, operator, noise_std, tolerance=1e-13)
    precision = dense_noise(noise_std, y)
    kept = precision.diagonal() > 0
    A, precision = A[kept], precision[kept][:, kept]
    x = normal(2, 1, *SHAPE, seed=1).requires_grad_()
    residual = (likelihood.y.flatten(1) - x.flatten(1) @ dense(operator).T)[:, kept]
    for sigma in (0.0, 0.3, 5.0):
        covariance = torch.linalg.inv(precision) + sigma**2 * A @ A.T
        solved = torch.linalg.solve(covariance, residual.T).T
        log_prob = -(residual * solved).sum(1) / 2
        assert error(likelihood.log_prob(x, sigma), log_prob) < 1e-10
        assert error(likelihood.score(x, sigma).flatten(1), solved @ A) < 1e-10
        (gradient,) = torch.autograd.grad(likelihood.log_prob(x, sigma).sum(), x)
        assert error(likelihood.score(x, sigma), gradient) < 1e-10
        bound = torch.linalg.eigvalsh(A.T @ torch.linalg.inv(covariance) @ A)[-1].item()
        assert likelihood.curvature_bound(sigma) == pytest.approx(bound, rel=0.02)
        assert likelihood.curvature_bound(sigma) < bound * (1 + 1e-10)


@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("name", OPERATORS)
def test_the_posterior_of_a_gaussian_field_is_that_of_dense_matrices(
    name, noise, field, normal, error
) -> None:
    """Its mode is its mean: the fixed point of proximal and denoising steps."""
    operator, sigma = OPERATORS[name], 0.5
    A, y = dense(operator), operator.A(field.sample(1, generator=torch.Generator().manual_seed(2)))
    noise_std = NOISE[noise](y)
    likelihood = ps.GaussianLikelihood(y, operator, noise_std, tolerance=1e-13)
    units = torch.eye(math.prod(SHAPE), dtype=torch.float64).view(-1, 1, *SHAPE)
    prior = torch.fft.ifft2(torch.fft.fft2(units) / (field.power_spectrum + sigma**2)).real.flatten(1)
    data = A.T @ dense_noise(noise_std, y)
    mean = field.mean.expand(len(A.T))
    expected = mean + torch.linalg.solve(prior + data @ A, data @ (y.flatten() - A @ mean))
    found = half_quadratic_splitting(
        field, likelihood, likelihood.back_projection, sigmas=[sigma], tolerance=1e-11, repeats=5000,
        progress=False,
    )  # fmt: skip
    assert error(found.x.flatten(), expected) < 1e-6


@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("gain", [1e-3, 1e3])
def test_gains_and_units_change_rounding_alone(noise, gain, normal, error) -> None:
    """Of the data and their noise; of the operator; and of the image."""

    class Scaled(Blur):
        def __init__(self, factor: float) -> None:
            super().__init__(SHAPE)
            self.transfer = factor * self.transfer

    y, z = normal(1, 1, *SHAPE), normal(2, 1, *SHAPE, seed=1)
    levels = NOISE[noise](y)

    def of(data: float, operator: float) -> ps.GaussianLikelihood:
        correlated = isinstance(levels, Correlated)
        noise_std = Correlated(y.shape[-2:], data) if correlated else data * levels
        return ps.GaussianLikelihood(data * y, Scaled(operator), noise_std, tolerance=1e-13)

    one = of(1.0, 1.0)
    for other, unit in ((of(gain, gain), 1.0), (of(1.0, gain), 1 / gain), (of(gain, 1.0), gain)):
        point = other.proximal(unit * z, 0.7 / unit**2)
        assert error(point, unit * one.proximal(z, 0.7)) < 1e-10
        assert error(other.score(unit * z, 0.3 * unit), one.score(z, 0.3) / unit) < 1e-10
        assert error(other.log_prob(unit * z, 0.3 * unit), one.log_prob(z, 0.3)) < 1e-10


@pytest.mark.parametrize("y", [math.nan, math.inf, 3000.0])
def test_what_y_holds_where_nothing_is_measured_is_ignored(y, normal) -> None:
    """To the last bit, in float32 too."""
    mask = OPERATORS["mask"].mask
    data, x = normal(1, 1, *SHAPE).float(), normal(1, 1, *SHAPE, seed=1).float()
    spoiled = torch.where(mask, data, y)
    pairs = [
        (spoiled, data, ps.Mask(mask), 0.5),
        (spoiled, data, ps.Product(ps.Mask(mask), Blur(SHAPE)), 0.5),
        (spoiled, data, ps.Identity(), torch.where(mask, 0.5, torch.inf)),
    ]
    for bad, good, operator, noise_std in pairs:
        likelihoods = [ps.GaussianLikelihood(values, operator, noise_std) for values in (bad, good)]
        for f in (
            lambda li: li.score(x, 0.3),
            lambda li: li.log_prob(x),
            lambda li: li.proximal(x, 1.0),
        ):
            assert torch.equal(*map(f, likelihoods))


@pytest.mark.parametrize("name", OPERATORS)
def test_the_norm_is_the_largest_singular_value(name, normal) -> None:
    operator = OPERATORS[name]
    exact = torch.linalg.svdvals(dense(operator))[0].item()
    norm = likelihood_of(operator, normal(1, 1, *SHAPE), noise_std=0.5).whitened_norm * 0.5
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
    found = curvature(field, normal(2, 1, *shape), sigma).value
    assert bool((found > 0.98 * exact).all())
    assert bool((found < exact * (1 + 1e-6)).all())
    assert found.max() <= field.curvature_bound(sigma)


@pytest.mark.parametrize("name", OPERATORS)
def test_the_bound_on_the_curvature_holds(name, field, normal) -> None:
    posterior = ps.Posterior(field, likelihood_of(OPERATORS[name], normal(1, 1, *SHAPE)))
    for sigma in (0.1, 1.0, 10.0):
        x = normal(1, 1, *SHAPE)
        found = curvature(posterior, x, sigma).value.item()
        assert found <= posterior.curvature_bound(sigma) * (1 + 1e-6)


def test_a_posterior_that_is_wrapped_keeps_a_safe_step(field, normal) -> None:
    """A wrapper that offers the score alone is measured, and never taken for a prior."""
    posterior = ps.Posterior(field, likelihood_of(OPERATORS["identity"], normal(1, 1, *SHAPE)))

    class Wrapped:
        def score(self, x: Tensor, sigma: float | Tensor) -> Tensor:
            return posterior.score(x, sigma)

    x = normal(1, 1, *SHAPE)
    assert curvature_bound(posterior, x, 0.1).value[0] == posterior.curvature_bound(0.1)
    assert curvature_bound(Wrapped(), x, 0.1).value == curvature(posterior, x, 0.1).value


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


class OneWrongPixel(ps.Identity):
    def A_adjoint(self, y: Tensor) -> Tensor:
        x = y.clone()
        x[..., 5, 7] = 0
        return x


@pytest.mark.parametrize("size", [8, 128, 512])
def test_one_wrong_pixel_of_the_adjoint_is_found_in_single_precision(size: int) -> None:
    with pytest.raises(ps.InputError, match="is not the adjoint"):
        ps.GaussianLikelihood(torch.ones(1, 1, size, size), OneWrongPixel(), 0.1)


class SingleOnly(Blur):
    """A right adjoint, with the rounding of float32: it refuses float64, or rounds it."""

    def __init__(self, shape: tuple[int, int], refuses: bool) -> None:
        super().__init__(shape)
        self.transfer = self.transfer.to(torch.complex64)
        self.refuses = refuses

    def A(self, x: Tensor) -> Tensor:
        if self.refuses and x.dtype == torch.float64:
            raise TypeError("expected scalar type Float but found Double")
        return super().A(x.float()).to(x.dtype)

    def A_adjoint(self, y: Tensor) -> Tensor:
        return super().A_adjoint(y.float()).to(y.dtype)


@pytest.mark.parametrize("refuses", [True, False])
def test_an_operator_that_computes_in_single_precision_is_not_refused(refuses, normal) -> None:
    y = normal(1, 1, 256, 256).float()
    assert ps.GaussianLikelihood(y, SingleOnly((256, 256), refuses), 0.1).y is y


class RoundedAdjoint(Blur):
    """It takes float64 and holds a filter of float32, as deepinv's Blur(use_fft=True) does."""

    def A_adjoint(self, y: Tensor) -> Tensor:
        return (1 + 2**-24) * super().A_adjoint(y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_operator_with_numbers_in_single_precision_is_not_refused(dtype) -> None:
    y = torch.ones(1, 1, *SHAPE, dtype=dtype)
    assert ps.GaussianLikelihood(y, RoundedAdjoint(SHAPE), 0.1).y is y


def test_a_whitening_operator_needs_its_adjoint(normal) -> None:
    with pytest.raises(ps.InputError, match="A_adjoint of the whitening operator is not"):
        ps.GaussianLikelihood(normal(1, 1, *SHAPE), ps.Identity(), ShiftedAdjoint(SHAPE))


def of_noise(noise_std: object) -> ps.GaussianLikelihood:
    return ps.GaussianLikelihood(torch.zeros(1, 1, 4, 4), ps.Identity(), noise_std)


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
        r"noise_std=torch\.where\(y\.isfinite\(\), noise_std, torch\.inf\)",
    ),
    "mask": (lambda: ps.Mask(torch.ones(4, 4)), r"mask != 0"),
    "mask of another shape": (
        lambda: ps.GaussianLikelihood(torch.zeros(1, 1, 4, 4), ps.Mask(torch.ones(5, 4) > 0), 1.0),
        r"the mask has shape \(5, 4\)",
    ),
    "mask of more channels": (
        lambda: ps.GaussianLikelihood(torch.zeros(1, 1, 4, 4), ps.Mask(torch.ones(3, 4, 4) > 0), 1.0),
        r"the mask has shape \(3, 4, 4\)",
    ),
    "array": (lambda: ps.GaussianLikelihood(np.zeros((1, 1, 4, 4)), ps.Identity(), 1.0), "as_tensor"),
    "no operator": (lambda: ps.GaussianLikelihood(torch.zeros(1, 1, 4, 4), "blur", 1.0), "type str"),
    "noise as text": (lambda: of_noise("loud"), "noise_std is of type str"),
    "complex noise": (lambda: of_noise(torch.ones(4, 4) * 1j), "a tensor of real numbers"),
    "negative noise": (lambda: of_noise(torch.tensor([1.0, -1, 1, 1])), "not positive"),
    "NaN noise": (lambda: of_noise(torch.tensor([1.0, math.nan, 1, 1])), "not positive"),
    "all left out": (lambda: of_noise(torch.full((4,), math.inf)), "all are infinite"),
    "noise of another shape": (lambda: of_noise(torch.ones(5)), r"noise_std has shape \(5,\)"),
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


def test_a_system_that_does_not_converge_says_so_once_and_goes_on(normal) -> None:
    class Steep:
        def A(self, x: Tensor) -> Tensor:
            return x * torch.logspace(-6, 6, x.shape[-1], dtype=x.dtype)

        A_adjoint = A

    likelihood = ps.GaussianLikelihood(normal(1, 1, 64, 512), Steep(), 1e-3, tolerance=1e-14)
    z = normal(1, 1, 64, 512)
    with pytest.warns(UserWarning, match=r"in 1000 steps of conjugate gradients: [\d.e-]+ of the"):
        point = likelihood.proximal(z, 1e-9)
    assert likelihood.log_prob(point) > likelihood.log_prob(z)
    likelihood.proximal(z, 1e-9)  # a second warning would be an error


@pytest.mark.parametrize("tolerance", [1e-1, 1e-3])
def test_a_loose_proximal_step_is_as_exact_as_asked_for(tolerance: float, normal) -> None:
    """What is left of the gradient at the start."""
    likelihood = likelihood_of(OPERATORS["blur"], normal(2, 1, *SHAPE), 0.03)
    z, start, precision = normal(2, 1, *SHAPE, seed=1), normal(2, 1, *SHAPE, seed=2), 0.7

    def gradient(x: Tensor) -> Tensor:
        return (likelihood.score(x) + precision * (z - x)).flatten(1).norm(dim=1)

    for begin in (None, start):
        x = likelihood.proximal(z, precision, start=begin, tolerance=tolerance)
        left = gradient(x) / gradient(z if begin is None else begin)
        assert bool((left <= tolerance * (1 + 1e-9)).all())
        assert bool((left.max() > 1e-3 * tolerance).all())  # and no more than that
