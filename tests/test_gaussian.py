"""Gaussian patches and fields against dense linear algebra and torch.distributions."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal

from patchscore.errors import InputError
from patchscore.priors.gaussian import GaussianCliques, GaussianPatches
from patchscore.priors.prior import PatchPrior

SIGMA = torch.tensor([0.3, 2.5], dtype=torch.float64)
SHAPE = 5, 6


@pytest.fixture
def clique(normal):
    """Patches of 2 x 3 pixels in two channels, with a mean and a covariance of rank 10 of 12."""
    factor = normal(12, 10)
    return GaussianPatches((2, 3), factor @ factor.T, normal(12, seed=1), channels=2)


@pytest.fixture
def field():
    return GaussianCliques.exponential(SHAPE, std=1.5, length=2.0, mean=-0.7)


def dense_covariance(field):
    """C as a matrix, from the images of unit vectors under the covariance's Fourier multiplier."""
    pixels = math.prod(field.power_spectrum.shape)
    units = torch.eye(pixels, dtype=torch.float64).view(pixels, *field.power_spectrum.shape)
    return torch.fft.ifft2(torch.fft.fft2(units) * field.power_spectrum).real.reshape(pixels, pixels)


def blurred(mean, covariance, sigma):
    return MultivariateNormal(mean, covariance + sigma**2 * torch.eye(len(mean), dtype=torch.float64))


# Patches


def test_patch_energy_is_minus_the_normalised_log_density(clique, normal, error):
    v = normal(2, 12, 7)
    found = clique.energy(v, SIGMA[:, None, None])
    for i in range(2):
        density = blurred(clique.mean, clique.covariance, SIGMA[i])
        assert error(found[i], -density.log_prob(v[i].T)) < 1e-10


def test_patch_score_is_the_gradient_of_its_log_density(clique, normal, error):
    v = normal(2, 12, 7).requires_grad_()
    (gradient,) = torch.autograd.grad(-clique.energy(v, SIGMA[:, None, None]).sum(), v)
    assert error(clique.score(v.detach(), SIGMA[:, None, None]), gradient) < 1e-10


def test_covariance_is_the_one_that_was_given(normal, error):
    factor = normal(6, 6)
    covariance = factor @ factor.T
    assert error(GaussianPatches((3, 2), covariance).covariance, covariance) < 1e-10


def test_white_patches_are_the_default(normal, error):
    v = normal(2, 4, 3)
    score = GaussianPatches((2, 2)).double().score(v, SIGMA[:, None, None])
    assert error(score, -v / (1 + SIGMA[:, None, None] ** 2)) < 1e-10


def test_the_variance_of_a_mode_without_variance_is_that_of_the_noise(error):
    """C = 0: all patches are mu, so the denoiser returns mu."""
    mean = torch.arange(4.0, dtype=torch.float64)
    clique = GaussianPatches((2, 2), torch.zeros(4, 4, dtype=torch.float64), mean)
    v = torch.ones(1, 4, 1, dtype=torch.float64)
    denoised = v + 0.01**2 * clique.score(v, torch.full((1, 1, 1), 0.01, dtype=torch.float64))
    assert error(denoised[0, :, 0], mean) < 1e-10


@pytest.mark.parametrize("boundary", ["symmetric", "periodic"])
def test_patches_make_a_prior_whose_score_is_the_gradient_of_log_prob(clique, boundary, normal, error):
    prior = PatchPrior(clique, assembly="mean", boundary=boundary)
    x = normal(2, 2, *SHAPE).requires_grad_()
    (gradient,) = torch.autograd.grad(prior.log_prob(x, SIGMA).sum(), x)
    assert error(prior.score(x.detach(), SIGMA), gradient) < 1e-10


def test_marginals_are_not_summed(clique):
    with pytest.raises(InputError, match="counts every pixel"):
        PatchPrior(clique, assembly="sum")


def test_pixels_as_patches_are_the_pixelwise_wiener_filter(field, normal, error):
    prior = PatchPrior(field.patches((1, 1)), assembly="mean")
    y = normal(2, 1, *SHAPE)
    gain = 1.5**2 / (1.5**2 + SIGMA[:, None, None, None] ** 2)
    assert error(prior.denoise(y, SIGMA), -0.7 + gain * (y + 0.7)) < 1e-10


def test_a_patch_as_large_as_the_image_has_the_score_of_the_field(field, normal, error):
    prior = PatchPrior(field.patches(SHAPE, channels=2), assembly="mean", boundary="open")
    x = normal(2, 2, *SHAPE)
    assert error(prior.score(x, SIGMA), field.score(x, SIGMA)) < 1e-10


def test_patches_are_saved_and_loaded(clique, normal):
    copied = GaussianPatches(**clique.settings()).double()
    copied.load_state_dict(clique.state_dict())
    v = normal(2, 12, 7)
    assert torch.equal(copied.score(v, SIGMA[:, None, None]), clique.score(v, SIGMA[:, None, None]))


# Fields


def test_field_log_prob_is_that_of_the_dense_gaussian(field, normal, error):
    x = normal(2, 3, *SHAPE)
    covariance = dense_covariance(field)
    mean = torch.full((30,), -0.7, dtype=torch.float64)
    expected = torch.stack(
        [blurred(mean, covariance, SIGMA[i]).log_prob(x[i].flatten(1)).sum() for i in range(2)]
    )
    assert error(field.log_prob(x, SIGMA), expected) < 1e-10


def test_field_score_is_the_gradient_of_log_prob(field, normal, error):
    x = normal(2, 3, *SHAPE).requires_grad_()
    (gradient,) = torch.autograd.grad(field.log_prob(x, SIGMA).sum(), x)
    assert error(field.score(x.detach(), SIGMA), gradient) < 1e-10


def test_field_denoiser_is_the_dense_wiener_filter_and_tweedie(field, normal, error):
    y = normal(2, 3, *SHAPE)
    covariance = dense_covariance(field)
    found = field(y, SIGMA)
    for i in range(2):
        noisy_covariance = covariance + SIGMA[i] ** 2 * torch.eye(30, dtype=torch.float64)
        deviation = torch.linalg.solve(noisy_covariance, y[i].flatten(1).T + 0.7)
        assert error(found[i].flatten(1).T, -0.7 + covariance @ deviation) < 1e-10
    assert error(found, y + SIGMA[:, None, None, None] ** 2 * field.score(y, SIGMA)) < 1e-10


def test_correlations_are_wrapped_around(error):
    def along(size):
        wrapped = [sum(math.exp(-abs(d + m * size) / 2.0) for m in range(-60, 61)) for d in range(size)]
        return torch.tensor(wrapped, dtype=torch.float64) / wrapped[0]

    field = GaussianCliques.exponential(SHAPE, std=1.5, length=2.0)
    covariance = torch.fft.ifft2(field.power_spectrum).real
    assert error(covariance, 2.25 * along(5)[:, None] * along(6)) < 1e-10


def test_exponential_spectrum_is_that_of_an_autoregression(error):
    """One row: S(w) = (1 - r^2) / (1 - 2 r cos w + r^2), over the wrapped variance."""
    field = GaussianCliques.exponential((1, 64), std=1.0, length=5.0)
    r = math.exp(-1 / 5)
    frequency = 2 * math.pi * torch.arange(64, dtype=torch.float64) / 64
    spectrum = (1 - r**2) / (1 - 2 * r * frequency.cos() + r**2)
    assert error(field.power_spectrum[0], spectrum / spectrum.mean()) < 1e-10


def test_marginals_of_the_field(field, error):
    covariance = dense_covariance(field)
    inside = torch.tensor([6 * row + column for row in (1, 2, 3) for column in (2, 3)])
    patches = field.patches((3, 2), channels=2)
    block = covariance[inside][:, inside]
    assert error(patches.covariance, torch.block_diag(block, block)) < 1e-10
    assert error(patches.mean, torch.full((12,), -0.7, dtype=torch.float64)) < 1e-10


def test_moments_of_prior_samples(field, z_score):
    x = field.sample(4000, channels=1, generator=torch.Generator().manual_seed(0)) + 0.7
    covariance = dense_covariance(field)
    assert z_score(x[:, 0, 2, 3], 0) < 4
    for row, column in ((2, 3), (2, 4), (4, 3), (0, 0)):
        product = x[:, 0, 2, 3] * x[:, 0, row, column]
        assert z_score(product, covariance[15, 6 * row + column].item()) < 4


def test_moments_of_posterior_samples(field, normal, z_score):
    """Mean and covariance of clean given noisy = y, from the dense formulas."""
    sigma = 0.8
    y = normal(1, 1, *SHAPE)
    samples = field.sample_denoised(
        y.expand(40_000, -1, -1, -1), sigma, generator=torch.Generator().manual_seed(0)
    )
    covariance = dense_covariance(field)
    gain = covariance @ torch.linalg.inv(covariance + sigma**2 * torch.eye(30, dtype=torch.float64))
    mean = -0.7 + gain @ (y.flatten() + 0.7)
    posterior = covariance - gain @ covariance
    deviation = samples.flatten(1) - mean
    for pixel in (0, 15, 29):
        assert z_score(deviation[:, pixel], 0) < 4
        for other in (0, 14, 15, 21):
            assert z_score(deviation[:, pixel] * deviation[:, other], posterior[pixel, other]) < 4


def test_posterior_samples_of_prior_samples_are_prior_samples(field, z_score):
    """x -> y -> x' leaves the prior unchanged: the variance of a pixel stays, per noise level."""
    generator = torch.Generator().manual_seed(1)
    x = field.sample(4000, generator=generator)
    sigma = torch.tensor([0.3, 2.5], dtype=torch.float64).repeat(2000)
    y = x + sigma[:, None, None, None] * torch.randn(x.shape, generator=generator, dtype=x.dtype)
    again = field.sample_denoised(y, sigma, generator=generator)[:, 0] + 0.7
    for half in (again[::2], again[1::2]):
        assert z_score(half[:, 1, 1] ** 2, 1.5**2) < 4


# What cannot be used


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GaussianPatches((2, 2), torch.eye(5)), r"expected \(4, 4\)"),
        (lambda: GaussianPatches((2, 2), torch.eye(4), torch.zeros(3)), r"expected \(4,\)"),
        (lambda: GaussianPatches((1, 2), torch.tensor([[1.0, 2.0], [2.0, 1.0]])), "smallest eigenvalue"),
        (lambda: GaussianPatches((1, 2), torch.tensor([[1.0, 0.5], [0.0, 1.0]])), "mirror images"),
        (lambda: GaussianPatches((1, 1), torch.tensor([[math.nan]])), "finite"),
        (lambda: GaussianPatches((1, 1), torch.tensor([[1]])), "floating-point"),
        (lambda: GaussianPatches((0, 2)), "at least 1"),
        (lambda: GaussianPatches((2, 2), channels=0), "at least 1"),
        (lambda: GaussianCliques(torch.ones(4)), r"\(H, W\)"),
        (lambda: GaussianCliques(-torch.ones(4, 4)), "non-negative"),
        (lambda: GaussianCliques(torch.arange(16.0).view(4, 4)), "even"),
        (lambda: GaussianCliques.from_covariance(torch.ones(3)), r"\(H, W\)"),
        (lambda: GaussianCliques.from_covariance(torch.eye(3)[:2]), "wrap it around|Wrap it around"),
        (lambda: GaussianCliques.exponential((4, 4), std=0.0, length=1.0), "std"),
        (lambda: GaussianCliques.exponential((4, 4), std=1.0, length=math.inf), "length"),
    ],
)
def test_bad_parameters_are_refused(build, message):
    with pytest.raises(InputError, match=message):
        build()


@pytest.mark.parametrize(
    ("x", "sigma", "message"),
    [
        (torch.zeros(1, 1, 6, 5, dtype=torch.float64), 1.0, "for the size of the image"),
        (torch.zeros(5, 6, dtype=torch.float64), 1.0, r"\(B, C, 5, 6\)"),
        (torch.zeros(1, 1, 5, 6), 1.0, "float32"),
        (torch.zeros(1, 1, 5, 6, dtype=torch.float64), 0.0, "positive"),
        (torch.zeros(2, 1, 5, 6, dtype=torch.float64), np.ones(3), "one for each"),
    ],
)
def test_bad_images_are_refused(field, x, sigma, message):
    for method in (field.score, field.denoise, field.log_prob):
        with pytest.raises(InputError, match=message):
            method(x, sigma)


def test_a_patch_larger_than_the_field_is_refused(field):
    with pytest.raises(InputError, match="does not fit"):
        field.patches((6, 6))
