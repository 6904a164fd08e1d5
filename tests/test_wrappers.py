"""A gray prior on channels and on complex images: by hand, and against exact Gaussian answers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import patchscore as ps
from patchscore.inference import diagnostics
from patchscore.inference.curvature import curvature_bound
from patchscore.inference.diagnostics import curl, mean_gap
from patchscore.inference.langevin import annealed_langevin
from patchscore.inference.splitting import half_quadratic_splitting

SHAPE = 6, 8
SIGMA = torch.tensor([0.3, 0.7], dtype=torch.float64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def field() -> ps.GaussianCliques:
    return ps.GaussianCliques.exponential(SHAPE, std=2.0, length=2.0, mean=1.0)


@pytest.fixture
def draw(normal):
    """Standard normal images, real or complex, with unit variance per component."""

    def complex_normal(*shape: int, seed: int = 0) -> Tensor:
        return torch.complex(normal(*shape, seed=2 * seed), normal(*shape, seed=2 * seed + 1))

    return {"real": normal, "complex": complex_normal}


# By hand


@pytest.fixture(params=["network", "field"])
def gray(request, randomized, field):
    if request.param == "field":
        return field
    return ps.PatchPrior(randomized(ps.PatchEnergy(3, width=16))).requires_grad_(False)


def test_channelwise_is_the_gray_prior_on_every_channel(gray, normal, error) -> None:
    prior, x = ps.Channelwise(gray), normal(2, 3, *SHAPE)
    channels = [x[:, c : c + 1] for c in range(3)]
    for name in ("score", "denoise", "forward"):
        by_hand = torch.cat([getattr(gray, name)(channel, SIGMA) for channel in channels], 1)
        assert error(getattr(prior, name)(x, SIGMA), by_hand) < 1e-10
    log_prob = sum(gray.log_prob(channel, SIGMA) for channel in channels)
    assert error(prior.log_prob(x, SIGMA), log_prob) < 1e-10
    assert error(prior.score(x, 0.3)[0], prior.score(x, SIGMA)[0]) < 1e-10
    assert prior.has_potential
    assert prior.curvature_bound(0.3) == gray.curvature_bound(0.3)


def test_complex_is_the_prior_on_real_and_imaginary_part(gray, draw, error) -> None:
    prior, x = ps.ComplexPrior(gray), draw["complex"](2, 1, *SHAPE)
    for name in ("score", "denoise", "forward"):
        f = getattr(gray, name)
        by_hand = f(x.real, SIGMA) + 1j * f(x.imag, SIGMA)
        assert error(getattr(prior, name)(x, SIGMA), by_hand) < 1e-10
    log_prob = gray.log_prob(x.real, SIGMA) + gray.log_prob(x.imag, SIGMA)
    assert error(prior.log_prob(x, SIGMA), log_prob) < 1e-10
    assert prior.has_potential
    assert prior.curvature_bound(0.3) == gray.curvature_bound(0.3)


@pytest.mark.parametrize("wrap", [ps.ComplexPrior, lambda p: ps.ComplexPrior(ps.Channelwise(p))])
def test_the_score_is_the_gradient_of_log_prob(wrap, gray, draw, error) -> None:
    prior, channels = wrap(gray), 1 if wrap is ps.ComplexPrior else 3
    x = draw["complex"](2, channels, *SHAPE).requires_grad_()
    (gradient,) = torch.autograd.grad(prior.log_prob(x, SIGMA).sum(), x)  # d/d Re + i d/d Im
    assert error(prior.score(x, SIGMA), gradient) < 1e-10


def test_the_order_of_wrappers_does_not_matter(gray, draw, error) -> None:
    x = draw["complex"](2, 3, *SHAPE)
    one = ps.ComplexPrior(ps.Channelwise(gray)).score(x, SIGMA)
    assert error(ps.Channelwise(ps.ComplexPrior(gray)).score(x, SIGMA), one) < 1e-10


def test_what_a_wrapper_cannot_do_is_told(gray, randomized, normal, draw) -> None:
    with pytest.raises(ps.InputError, match="expected a complex image"):
        ps.ComplexPrior(gray).score(normal(1, 1, *SHAPE), 1.0)
    with pytest.raises(ps.InputError, match=r"expected \(B, C, H, W\)"):
        ps.Channelwise(gray).score(normal(*SHAPE), 1.0)
    with pytest.raises(ps.InputError, match="positive and finite"):
        ps.Channelwise(gray).denoise(normal(1, 3, *SHAPE), 0.0)
    mlp = ps.PatchPrior(randomized(ps.PatchMLP(3, widths=(8, 8), tanh_layers=1)))
    assert not ps.Channelwise(mlp).has_potential
    with pytest.raises(ps.InputError, match="only a score"):
        ps.ComplexPrior(mlp).log_prob(draw["complex"](1, 1, *SHAPE), 1.0)
    with pytest.raises(ps.InputError, match=r"patchscore\.ComplexPrior\(prior\)"):
        mlp.score(draw["complex"](1, 1, *SHAPE), 1.0)
    with pytest.raises(ps.InputError, match=r"patchscore\.Channelwise\(prior\)"):
        mlp.score(normal(1, 3, *SHAPE), 1.0)


# The likelihood of complex data


class Fourier:
    """Every second row of the discrete Fourier transform, with a phase: complex, and not symmetric."""

    def __init__(self, *, real: bool = False) -> None:
        phase = torch.linspace(0, 3, SHAPE[1], dtype=torch.float64)
        self.sensitivity = torch.exp(1j * phase) * (1 + phase)
        self.real = real

    def A(self, x: Tensor) -> Tensor:
        return torch.fft.fft2(self.sensitivity * x, norm="ortho")[..., ::2, :]

    def A_adjoint(self, y: Tensor) -> Tensor:
        full = y.new_zeros(*y.shape[:-2], *SHAPE)
        full[..., ::2, :] = y
        x = self.sensitivity.conj() * torch.fft.ifft2(full, norm="ortho")
        return x.real if self.real else x


class Unconjugated(Fourier):
    def A_adjoint(self, y: Tensor) -> Tensor:
        return super().A_adjoint(y) * self.sensitivity / self.sensitivity.conj()


def vectors(x: Tensor) -> Tensor:
    """The real numbers of each image: (B, C, H, W) -> (B, n)."""
    return torch.cat([x.real.flatten(1), x.imag.flatten(1)], 1) if x.is_complex() else x.flatten(1)


def dense(operator: Fourier) -> Tensor:
    """The matrix of an operator between real and imaginary parts."""
    units = torch.eye(math.prod(SHAPE), dtype=torch.float64).view(-1, 1, *SHAPE)
    units = units if operator.real else torch.cat([units, 1j * units])
    return vectors(operator.A(units)).T


@pytest.fixture(params=["complex image", "real image"])
def measurement(request, draw):
    """A likelihood with complex data, its dense matrix, and a function that draws images."""
    operator = Fourier(real=request.param == "real image")
    y = draw["complex"](1, 1, SHAPE[0] // 2, SHAPE[1], seed=5)
    likelihood = ps.GaussianLikelihood(y, operator, 0.5, tolerance=1e-13)
    return likelihood, dense(operator), draw[request.param.split()[0]]


def test_the_score_of_complex_data_is_a_gradient(measurement, error) -> None:
    likelihood, matrix, images = measurement
    x = images(2, 1, *SHAPE, seed=1).requires_grad_()
    for sigma in (0.0, SIGMA):
        (gradient,) = torch.autograd.grad(likelihood.log_prob(x, sigma).sum(), x)
        assert error(likelihood.score(x, sigma), gradient) < 1e-10
    residual = vectors(likelihood.y) - vectors(x) @ matrix.T
    for sigma in (0.0, 0.3):
        covariance = 0.5**2 * torch.eye(len(matrix)).double() + sigma**2 * matrix @ matrix.T
        solved = torch.linalg.solve(covariance, residual.T).T
        assert error(likelihood.log_prob(x, sigma), -(residual * solved).sum(1) / 2) < 1e-10
        assert error(vectors(likelihood.score(x, sigma)), solved @ matrix) < 1e-10
    norm = torch.linalg.matrix_norm(matrix, 2).item()
    assert likelihood.whitened_norm == pytest.approx(norm / 0.5, rel=2e-3)
    bound = norm**2 / (0.5**2 + (0.3 * norm) ** 2)
    assert likelihood.curvature_bound(0.3) == pytest.approx(bound, rel=4e-3)


def test_the_proximal_point_of_complex_data_solves_the_dense_system(measurement, error) -> None:
    likelihood, matrix, images = measurement
    z, precision = images(2, 1, *SHAPE, seed=1), 0.7
    left = matrix.T @ matrix / 0.5**2 + precision * torch.eye(matrix.shape[1]).double()
    right = vectors(likelihood.y) @ matrix / 0.5**2 + precision * vectors(z)
    expected = torch.linalg.solve(left, right.T).T
    assert error(vectors(likelihood.proximal(z, precision)), expected) < 1e-10


def test_the_posterior_of_weighted_complex_data_is_that_of_dense_matrices(
    measurement, field, draw, error
) -> None:
    """The mean of a Gaussian, as the fixed point of proximal and denoising steps."""
    likelihood, matrix, _ = measurement
    y, operator, sigma = likelihood.y, likelihood.operator, 0.5
    levels = torch.linspace(0.3, 2.0, y.numel()).double().view_as(y)
    levels[..., 0, 2] = torch.inf
    weighted = ps.GaussianLikelihood(y, operator, levels, tolerance=1e-13)
    units = torch.eye(math.prod(SHAPE), dtype=torch.float64).view(-1, 1, *SHAPE)
    prior = filtered(units, 1 / (field.power_spectrum + sigma**2)).flatten(1)
    mean = field.mean.expand(len(prior))
    denoiser = field
    if not operator.real:
        denoiser = ps.ComplexPrior(field)
        prior, mean = torch.block_diag(prior, prior), mean.repeat(2)
    data = matrix.T * (1 / levels.flatten().square()).repeat(2)
    off = vectors(y)[0] - matrix @ mean
    expected = mean + torch.linalg.solve(prior + data @ matrix, data @ off)
    x0 = torch.zeros_like(weighted.back_projection)
    found = half_quadratic_splitting(
        denoiser, weighted, x0, sigmas=[sigma], tolerance=1e-11, repeats=5000, progress=False
    )
    assert error(vectors(found.x)[0], expected) < 1e-6


def test_proximal_samples_of_complex_data_have_the_covariance(measurement) -> None:
    likelihood, matrix, images = measurement
    z, precision, count = images(1, 1, *SHAPE, seed=1), 0.7, 4000
    draws = likelihood.proximal_sample(z.expand(count, -1, -1, -1), precision, seeded())
    left = matrix.T @ matrix / 0.5**2 + precision * torch.eye(matrix.shape[1]).double()
    covariance = torch.linalg.inv(left)
    spread = vectors(draws - likelihood.proximal(z, precision))
    found = spread.T @ spread / count
    # Wishart: var of an entry is (c_ii c_jj + c_ij^2) / count; up to 96 x 96 of them, so below 5.5.
    diagonal = covariance.diagonal()
    standard_error = ((diagonal[:, None] * diagonal + covariance**2) / count).sqrt()
    assert ((found - covariance) / standard_error).abs().max() < 5.5
    assert (spread.mean(0) / (diagonal / count).sqrt()).abs().max() < 5


def test_an_adjoint_without_conjugation_is_refused(draw) -> None:
    with pytest.raises(ps.InputError, match="their conjugates"):
        ps.GaussianLikelihood(draw["complex"](1, 1, 3, 8), Unconjugated(), 0.5)


def test_complex_normal_numbers_have_unit_variance_per_component(z_score) -> None:
    from patchscore.randomness import standard_normal

    z = standard_normal(torch.zeros(200, 200, dtype=torch.complex128), seeded())
    for part in (z.real, z.imag):
        assert z_score(part.flatten(), 0.0) < 4
        assert z_score(part.flatten().square(), 1.0) < 4
    assert z_score((z.real * z.imag).flatten(), 0.0) < 4


# Every solver, against the exact posterior of a Gaussian field
#
# A = 1 and A = i r (a gain and a turn of the phase) leave real and imaginary part independent, so that
# every part is a scalar filter: prior spectrum S, data q = Re, Im of conj(A) y / |A|^2 with the noise
# noise_std / |A|.

NOISE, GAIN = 0.5, 2.0


class Turned:
    """A = 2 i."""

    def A(self, x: Tensor) -> Tensor:
        return 1j * GAIN * x

    def A_adjoint(self, y: Tensor) -> Tensor:
        return -1j * GAIN * y


CASES = ["channels", "complex"]


@pytest.fixture(params=CASES)
def case(request, field, draw):
    """A wrapped prior, a posterior, noisy images and a function that gives the exact answer by parts."""
    if request.param == "channels":
        prior, y = ps.Channelwise(field), draw["real"](2, 3, *SHAPE)
        operator, seen, level = ps.Identity(), y, NOISE
    else:
        prior, y = ps.ComplexPrior(field), draw["complex"](2, 1, *SHAPE)
        operator, seen, level = Turned(), -1j * y / GAIN, NOISE / GAIN
    posterior = ps.Posterior(prior, ps.GaussianLikelihood(y, operator, NOISE))

    def exact(f, images: Tensor = seen) -> Tensor:
        """f on every part of the images."""
        if images.is_complex():
            return torch.complex(f(images.real), f(images.imag))
        return torch.cat([f(images[:, c : c + 1]) for c in range(images.shape[1])], 1)

    return prior, posterior, seen, level, exact


def filtered(x: Tensor, gain: Tensor) -> Tensor:
    return torch.fft.ifft2(torch.fft.fft2(x) * gain).real


def test_the_posterior_and_its_bound(case, error) -> None:
    prior, posterior, seen, _, _ = case
    x = seen.roll(1, -1).requires_grad_()
    (gradient,) = torch.autograd.grad(posterior.log_prob(x, SIGMA).sum(), x)
    assert error(posterior.score(x, SIGMA), gradient) < 1e-10
    assert posterior.has_potential
    expected = prior.curvature_bound(0.2) + posterior.likelihood.curvature_bound(0.2)
    assert (curvature_bound(posterior, seen, 0.2).value == expected).all()


@pytest.mark.parametrize("potential", [True, False])
def test_map_estimate(case, field, potential) -> None:
    """The Wiener filter of a field with S + sigma^2.

    sigma does not add to the noise of the data of a posterior, only to that of a score of any kind.
    """
    _, posterior, seen, level, exact = case
    sigma = 0.4

    class ScoreOnly:
        def score(self, x: Tensor, sigma: float | Tensor) -> Tensor:
            return posterior.score(x, sigma)

    model = posterior if potential else ScoreOnly()
    found = ps.map_estimate(
        model, torch.zeros_like(seen), sigma=sigma, tolerance=1e-9, max_steps=5000, progress=False
    )
    noise = level**2 if potential else level**2 + sigma**2
    prior, data = 1 / (field.power_spectrum + sigma**2), 1 / noise
    expected = exact(lambda q: field.mean + filtered(q - field.mean, data / (data + prior)))
    # x - argmax = s / curvature along every frequency; the residual is the root mean square of sigma s.
    off = components(found.x - expected).square().flatten(1).mean(1).sqrt()
    residual = torch.from_numpy(found.residual[-1])
    assert (off <= residual / (sigma * (prior + data).min()) + 1e-10).all()
    assert residual.max() < 1e-6


def test_splitting(case, field, error) -> None:
    prior, posterior, seen, level, exact = case
    x0, rho = torch.zeros_like(seen), 0.3
    found = half_quadratic_splitting(
        prior, posterior.likelihood, x0, sigmas=[1.0, rho], progress=False
    ).x

    def by_hand(q: Tensor) -> Tensor:
        x = torch.zeros_like(q)
        for r in (1.0, rho):
            z = field.denoise(x, r)
            x = (q / level**2 + z / r**2) / (1 / level**2 + 1 / r**2)
        return x

    assert error(found, exact(by_hand)) < 1e-10
    red = half_quadratic_splitting(
        prior, posterior.likelihood, x0, sigmas=[rho], tolerance=1e-12, repeats=2000, progress=False
    )

    def fixed_point(q: Tensor) -> Tensor:
        curvature = 1 / (field.power_spectrum + rho**2)
        return field.mean + filtered(q - field.mean, 1 / (1 + level**2 * curvature))

    assert error(red.x, exact(fixed_point)) < 1e-9


def components(x: Tensor) -> Tensor:
    """Real and imaginary part of every pixel as numbers of their own: (...) -> (..., 1 or 2)."""
    return torch.view_as_real(x) if x.is_complex() else x[..., None]


def z_of_moments(draws: Tensor, mean: Tensor, variance: Tensor) -> tuple[float, float]:
    """The largest z of the means, and that of the pooled variance, of independent draws (n, ...)."""
    count = len(draws)
    off = components(draws - mean)
    z_mean = (off.mean(0) / (variance / count) ** 0.5).abs().max().item()
    pooled = off.square().mean((1, 2, 3, 4, 5)) / variance
    z_variance = ((pooled.mean() - 1) / (pooled.std() / count**0.5)).abs().item()
    return z_mean, z_variance


def spread_of_chi_squared(variance: Tensor, images: Tensor) -> float:
    """The relative standard deviation of the squared norm of images with this power spectrum."""
    parts = components(images[0]).numel() / variance.numel()
    return (2 * variance.square().sum() / parts).sqrt().item() / variance.sum().item()


def test_sample_denoised(case, field) -> None:
    """Independent draws: mean of the Wiener filter, variance S v / (S + v) averaged over frequencies."""
    prior, _, seen, _, exact = case
    sigma, count = 0.8, 300
    chain = ps.sample_denoised(prior, seen, sigma, count, levels=80, generator=seeded(), progress=False)
    mean = exact(lambda q: field.denoise(q, sigma))
    spectrum = field.power_spectrum
    by_frequency = spectrum * sigma**2 / (spectrum + sigma**2)
    variance = by_frequency.mean().item()
    z_mean, z_variance = z_of_moments(chain.samples, mean, variance)
    assert z_mean < 4.5
    assert z_variance < 4  # with 80 levels the variance is less than 0.3 % too small
    gap = mean_gap(chain, prior, seen, sigma)
    assert (gap.z.square() - 1).abs().max() < 4 * spread_of_chi_squared(by_frequency, seen)


@pytest.mark.parametrize("metropolis", [True, False])
def test_langevin(case, field, metropolis) -> None:
    """The exact posterior at the level sigma, with ULA's known bias along every frequency."""
    _, posterior, _, level, exact = case
    sigma, chains = 0.5, 400
    curvature = 1 / (field.power_spectrum + sigma**2) + 1 / (level**2 + sigma**2)
    mean = exact(lambda q: field.mean + filtered(q - field.mean, 1 / (level**2 + sigma**2) / curvature))
    x0 = mean[:1].expand(chains, -1, -1, -1)
    y, operator = posterior.likelihood.y[:1], posterior.likelihood.operator
    h = 0.0 if metropolis else 0.1 / curvature.max().item()
    chain = ps.langevin(
        ps.Posterior(posterior.prior, ps.GaussianLikelihood(y, operator, NOISE)), x0,
        sigma=sigma, steps=120, burn_in=119, step_size=h or None, metropolis=metropolis,
        generator=seeded(), progress=False,
    )  # fmt: skip
    variance = (1 / (curvature * (1 - h * curvature / 2))).mean().item()
    z_mean, z_variance = z_of_moments(chain.samples[0][:, None], mean[:1], variance)
    assert z_mean < 4.5
    assert z_variance < 4
    if metropolis:
        assert 0.4 < chain.acceptance.mean() <= 1


def test_annealed_langevin_ends_at_the_posterior(case, field) -> None:
    _, posterior, seen, level, exact = case
    chain = annealed_langevin(
        posterior, torch.zeros_like(seen), sigmas=[2.0, 1.0, 0.5], steps_per_level=800,
        generator=seeded(), progress=False, keep="moments",
    )  # fmt: skip
    curvature = 1 / (field.power_spectrum + 0.25) + 1 / (level**2 + 0.25)
    mean = exact(lambda q: field.mean + filtered(q - field.mean, 1 / (level**2 + 0.25) / curvature))
    off = components(chain.mean - mean).square().flatten(1).mean(1)
    # Of a mode the walk forgets in 1 / (h lambda) steps, so it is worth h lambda / 2 draws a step.
    h = 0.1 / posterior.curvature_bound(0.5)
    draws = 800 * h * curvature / 2
    variance = 1 / curvature / draws
    assert (off / variance.mean() - 1).max() < 4 * spread_of_chi_squared(variance, seen)


def test_curl_of_a_gradient_is_zero(case) -> None:
    prior, _, seen, _, _ = case
    assert curl(prior, seen, 0.4, generator=seeded()).max() < 1e-8


def test_diagnostics_of_complex_images_are_those_of_both_parts(draw) -> None:
    samples, truth = draw["complex"](24, 3, 1, *SHAPE), draw["complex"](3, 1, *SHAPE, seed=1)
    of = [(samples.real, truth.real), (samples.imag, truth.imag)]
    for name in ("r_hat", "effective_sample_size", "monte_carlo_error"):
        f = getattr(diagnostics, name)
        assert torch.equal(f(samples), torch.stack([f(part) for part, _ in of], -1))
    ranks = [diagnostics.rank_statistics(*part) for part in of]
    assert torch.equal(diagnostics.rank_statistics(samples, truth), torch.stack(ranks, -1))
    found = diagnostics.coverage(samples, truth)
    parts = [diagnostics.coverage(*part) for part in of]
    assert found.share == pytest.approx((parts[0].share + parts[1].share) / 2, abs=1e-12)
    assert (found.width - (parts[0].width + parts[1].width) / 2).abs().max() < 1e-12
