"""Gaussian mixtures against dense densities and quadrature, EM against theory, EPLL against loops."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from patchscore.errors import InputError
from patchscore.evaluation.epll import epll
from patchscore.learning.mixture import fit_mixture
from patchscore.priors.empirical import EmpiricalPatches
from patchscore.priors.experts import StudentT, TotalVariation
from patchscore.priors.gaussian import GaussianCliques, GaussianPatches
from patchscore.priors.mixture import GaussianMixture
from patchscore.priors.prior import PatchPrior

SIGMA = torch.tensor([0.3, 2.5], dtype=torch.float64)
LEVELS = SIGMA[:, None, None]
SHAPE = 2, 2
EYE = torch.eye(8, dtype=torch.float64)


@pytest.fixture
def parameters(normal):
    """Three components of 2 x 2 patches in two channels, one of them singular."""
    factors = normal(3, 8, 8)
    factors[1, :, 5:] = 0
    return {
        "weights": torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64),
        "means": normal(3, 8, seed=1),
        "covariances": factors @ factors.mT,
    }


@pytest.fixture(params=[False, True], ids=["whole patch", "mean-free part"])
def mixture(request, parameters):
    return GaussianMixture(SHAPE, 3, channels=2, brightness_invariant=request.param, **parameters)


def dense(weights, means, covariances, sigma):
    """p_sigma as torch.distributions has it."""
    noise = sigma**2 * torch.eye(means.shape[1], dtype=torch.float64)
    return MixtureSameFamily(Categorical(weights), MultivariateNormal(means, covariances + noise))


# The density


def test_energy_is_minus_the_normalised_log_density(parameters, normal, error):
    mixture = GaussianMixture(SHAPE, 3, channels=2, **parameters)
    v = normal(2, 8, 7)
    for i, found in enumerate(mixture.energy(v, LEVELS)):
        assert error(found, -dense(**parameters, sigma=SIGMA[i]).log_prob(v[i].T)) < 1e-10


def test_mean_free_energy_is_that_of_the_coordinates_in_the_subspace(parameters, normal, error):
    mixture = GaussianMixture(SHAPE, 3, channels=2, brightness_invariant=True, **parameters)
    basis = torch.linalg.svd(EYE - 1 / 8).U[:, :7]
    within = dict(
        parameters,
        means=parameters["means"] @ basis,
        covariances=basis.T @ parameters["covariances"] @ basis,
    )
    v = normal(2, 8, 7)
    for i, found in enumerate(mixture.energy(v, LEVELS)):
        assert error(found, -dense(**within, sigma=SIGMA[i]).log_prob(v[i].T @ basis)) < 1e-10


def test_score_is_the_gradient_of_the_log_density(mixture, normal, error):
    v = normal(2, 8, 7).requires_grad_()
    (gradient,) = torch.autograd.grad(-mixture.energy(v, LEVELS).sum(), v)
    assert error(mixture.score(v.detach(), LEVELS), gradient) < 1e-10


def test_score_far_from_all_components_is_finite_and_exact(parameters, error):
    """The nearest component alone is left, where the densities of all underflow."""
    mixture = GaussianMixture(SHAPE, 3, channels=2, **parameters)
    v = torch.full((1, 8, 1), 1e4, dtype=torch.float64)
    sigma = torch.full((1, 1, 1), 0.5, dtype=torch.float64)
    k = mixture.log_joint(v, sigma).argmax().item()
    covariance = parameters["covariances"][k] + 0.25 * EYE
    expected = -torch.linalg.solve(covariance, v[0] - parameters["means"][k][:, None])
    assert error(mixture.score(v, sigma)[0], expected) < 1e-10


@pytest.mark.parametrize("dimensions", [1, 2])
@pytest.mark.parametrize("sigma", [0.05, 0.6, 3.0])
def test_blurred_density_and_score_against_quadrature(dimensions, sigma, normal):
    """p_sigma(v) = E p(v - sigma z) and s = E p(v - sigma z) (-z) / sigma / p_sigma, by the trapezium
    rule, which converges exponentially for these integrands."""
    factors = normal(2, dimensions, dimensions) / 2
    clean = {
        "weights": torch.tensor([0.3, 0.7], dtype=torch.float64),
        "means": normal(2, dimensions, seed=1),
        "covariances": factors @ factors.mT + 0.3 * torch.eye(dimensions, dtype=torch.float64),
    }
    axis = torch.linspace(-9, 9, 301, dtype=torch.float64)
    z = torch.cartesian_prod(*[axis] * dimensions).view(-1, dimensions)
    noise = (-z.square().sum(1) / 2).exp() * ((axis[1] - axis[0]) / math.sqrt(2 * math.pi)) ** dimensions
    v = torch.linspace(0.2, 1.1, dimensions, dtype=torch.float64)
    weighted = noise * dense(**clean, sigma=0).log_prob(v - sigma * z).exp()
    mixture = GaussianMixture((1, dimensions), 2, **clean)
    patch, level = v.view(1, -1, 1), torch.full((1, 1, 1), sigma, dtype=torch.float64)
    density = weighted.sum()
    torch.testing.assert_close(
        mixture.energy(patch, level)[0, 0], -density.log(), rtol=1e-10, atol=1e-10
    )
    slope = -(weighted @ z) / sigma / density
    torch.testing.assert_close(mixture.score(patch, level)[0, :, 0], slope, rtol=1e-10, atol=1e-10)


def test_one_component_is_gaussian_patches(parameters, normal, error):
    mean, covariance = parameters["means"][0], parameters["covariances"][0]
    one = GaussianMixture(SHAPE, 1, channels=2, means=mean[None], covariances=covariance[None])
    gaussian = GaussianPatches(SHAPE, covariance, mean, channels=2)
    v = normal(2, 8, 7)
    assert error(one.score(v, LEVELS), gaussian.score(v, LEVELS)) < 1e-10
    assert error(one.energy(v, LEVELS), gaussian.energy(v, LEVELS)) < 1e-10


@pytest.mark.parametrize("brightness_invariant", [False, True])
def test_points_of_equal_weight_are_the_empirical_patches(brightness_invariant, normal, error):
    points = normal(6, 8)
    mixture = GaussianMixture(
        SHAPE,
        6,
        channels=2,
        means=points,
        covariances=torch.zeros(6, 8, 8, dtype=torch.float64),
        brightness_invariant=brightness_invariant,
    )
    empirical = EmpiricalPatches(points.view(6, 2, *SHAPE), brightness_invariant=brightness_invariant)
    v = normal(2, 8, 7, seed=1)
    assert error(mixture.score(v, LEVELS), empirical.score(v, LEVELS)) < 1e-10
    assert error(mixture.energy(v, LEVELS), empirical.energy(v, LEVELS)) < 1e-10


def test_marginals_are_those_of_the_parameters(parameters, normal, error):
    part = torch.tensor([0, 1, 4, 5])  # the upper row of both channels
    within = dict(
        parameters,
        means=parameters["means"][:, part],
        covariances=parameters["covariances"][:, part][:, :, part],
    )
    v = normal(2, 4, 7)
    for brightness_invariant in (False, True):
        whole, expected = (
            GaussianMixture(shape, 3, channels=2, brightness_invariant=brightness_invariant, **values)
            for shape, values in ((SHAPE, parameters), ((1, 2), within))
        )
        assert error(whole.marginal((1, 2)).energy(v, LEVELS), expected.energy(v, LEVELS)) < 1e-10


def test_brightness_invariance_is_what_is_said(mixture, normal, error):
    v = normal(2, 8, 7)
    moved = error(mixture.score(v + 3, LEVELS), mixture.score(v, LEVELS))
    assert (moved < 1e-10) == mixture.brightness_invariant


@pytest.mark.parametrize("boundary", ["symmetric", "periodic"])
def test_prior_score_is_the_gradient_of_log_prob(mixture, boundary, normal, error):
    prior = PatchPrior(mixture, assembly="mean", boundary=boundary)
    x = normal(2, 2, 5, 6).requires_grad_()
    (gradient,) = torch.autograd.grad(prior.log_prob(x, SIGMA).sum(), x)
    assert error(prior.score(x.detach(), SIGMA), gradient) < 1e-10


def test_mixtures_are_saved_and_loaded(mixture, normal):
    copied = GaussianMixture(**mixture.settings()).double()
    copied.load_state_dict(mixture.state_dict())
    v = normal(2, 8, 7)
    assert torch.equal(copied.score(v, LEVELS), mixture.score(v, LEVELS))


@pytest.mark.parametrize(
    "build",
    [
        lambda C, v: GaussianPatches(SHAPE, C[0, :4, :4], v[0, :4]),
        lambda C, v: GaussianMixture(SHAPE, 3, means=v[:, :4], covariances=C[:, :4, :4]),
        lambda C, v: GaussianMixture(SHAPE, 3, covariances=C[:, :4, :4], brightness_invariant=True),
        lambda C, v: EmpiricalPatches(v.view(6, 1, *SHAPE)),
        lambda C, v: StudentT(v.view(6, 1, *SHAPE), v[:, 0].exp().repeat(2)),
        lambda C, v: TotalVariation(0.7).double(),
    ],
)
def test_a_prior_of_every_closed_form_survives_a_file(build, parameters, normal, tmp_path):
    clique = build(parameters["covariances"], parameters["means"])
    prior = PatchPrior(clique, assembly="mean")
    prior.save(tmp_path / "prior.safetensors")
    loaded = PatchPrior.load(tmp_path / "prior.safetensors")
    x = normal(2, 1, 5, 6)
    assert torch.equal(loaded.score(x, SIGMA), prior.score(x, SIGMA))
    assert torch.equal(loaded.log_prob(x, SIGMA), prior.log_prob(x, SIGMA))


# Fitting


def draw(weights, means, covariances, count, seed=0):
    """Patches of 1 x n from a mixture."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.multinomial(weights, count, replacement=True, generator=generator)
    z = torch.randn(count, means.shape[1], 1, dtype=torch.float64, generator=generator)
    v = means[labels] + (torch.linalg.cholesky(covariances)[labels] @ z)[:, :, 0]
    return v[:, None, None]


SEPARATE = {
    "weights": torch.tensor([0.3, 0.7], dtype=torch.float64),
    "means": torch.tensor([[-10.0, 0.0], [10.0, 5.0]], dtype=torch.float64),
    "covariances": torch.tensor([[[1.0, 0.5], [0.5, 2.0]], [[0.5, -0.2], [-0.2, 1.0]]]).double(),
}


@pytest.mark.parametrize("zero_mean", [False, True])
@pytest.mark.parametrize("brightness_invariant", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_likelihood_never_decreases(zero_mean, brightness_invariant, seed, normal):
    factors = normal(4, 6, 6)
    covariances = torch.tensor([0.1, 0.5, 1, 3]).double()[:, None, None] ** 2 * factors @ factors.mT
    means = normal(4, 6, seed=1) * (not zero_mean)
    patches = draw(torch.full((4,), 0.25, dtype=torch.float64), means, covariances, 600)
    fit = fit_mixture(
        patches.view(600, 1, 2, 3),
        5,
        zero_mean=zero_mean,
        brightness_invariant=brightness_invariant,
        passes=40,
        floor=0.05,  # high enough that it is reached
        generator=torch.Generator().manual_seed(seed),
    )
    assert (fit.mixture.eigenvalues == fit.mixture.eigenvalues.min()).sum() > 1
    assert (fit.log_likelihood.diff() > -1e-10).all()
    assert fit.log_likelihood[-1] > fit.log_likelihood[0]


def test_one_component_has_the_moments_of_the_patches(normal, error):
    patches = normal(100, 1, 2, 2) + 3
    v = patches.flatten(1)
    free = fit_mixture(patches, 1, passes=1).mixture
    assert error(free.means[0], v.mean(0)) < 1e-10
    assert error(free.covariances[0], v.T.cov(correction=0)) < 1e-10
    zero = fit_mixture(patches, 1, passes=1, zero_mean=True).mixture
    assert not zero.means.any()
    assert error(zero.covariances[0], v.T @ v / 100) < 1e-10
    mean_free = fit_mixture(patches, 1, passes=1, brightness_invariant=True).mixture
    v = v - v.mean(1, keepdim=True)
    assert error(mean_free.covariances[0], v.T.cov(correction=0)) < 1e-10
    assert error(mean_free.means[0], v.mean(0)) < 1e-10


@pytest.mark.parametrize(("batch_size", "passes"), [(None, 20), (500, 4)])
def test_a_known_mixture_is_recovered(batch_size, passes):
    """Within four standard errors, those of labelled patches as the components hardly overlap.

    With batches the moments are an average with weights g_t (1 - g)^.., about (2 - g) / g batches long.
    """
    count = 8000
    fit = fit_mixture(draw(**SEPARATE, count=count), 2, passes=passes, batch_size=batch_size)
    variance = 1 / count
    if batch_size:
        gain = (len(fit.log_likelihood) + 1) ** -0.6
        variance += gain / (2 - gain) / batch_size
    mixture = fit.mixture
    order = mixture.means[:, 0].argsort()
    w, C = SEPARATE["weights"], SEPARATE["covariances"]
    scale = (variance / w).sqrt()
    spread = C.diagonal(dim1=1, dim2=2)
    z = [
        (mixture.weights[order] - w) / (variance * w * (1 - w)).sqrt(),
        (mixture.means[order] - SEPARATE["means"]) / (spread.sqrt() * scale[:, None]),
        (mixture.covariances[order] - C)
        / ((spread[:, :, None] * spread[:, None] + C.square()).sqrt() * scale[:, None, None]),
    ]
    assert max(values.abs().max().item() for values in z) < 4


def test_contrasts_are_told_apart_without_means():
    """Two zero-mean components that differ in scale alone, as flat and textured patches do."""
    weights = torch.tensor([0.4, 0.6], dtype=torch.float64)
    covariances = torch.tensor([1.0, 400.0], dtype=torch.float64)[:, None, None] * torch.eye(9)
    patches = draw(weights, torch.zeros(2, 9, dtype=torch.float64), covariances, 4000)
    mixture = fit_mixture(patches, 2, zero_mean=True).mixture
    order = mixture.eigenvalues.mean(1).argsort()
    for k, w, variance in zip(order, weights, (1, 400), strict=True):
        assert abs(mixture.weights[k] - w) < 4 * (0.4 * 0.6 / 4000) ** 0.5
        relative = mixture.eigenvalues[k].mean() / variance - 1
        assert abs(relative) < 4 * (2 / (9 * 4000 * w)) ** 0.5


def test_a_fit_is_reproducible():
    patches = draw(**SEPARATE, count=300)
    first, again = (
        fit_mixture(patches, 3, batch_size=100, passes=2, generator=generator).mixture
        for generator in (torch.Generator().manual_seed(0), None)
    )
    assert torch.equal(first.covariances, again.covariances)


def test_duplicates_and_spare_components_do_no_harm(normal):
    patches = normal(3, 1, 2, 2).float().repeat(10, 1, 1, 1)
    fit = fit_mixture(patches, 5, passes=10)
    v = patches.flatten(1).T[None]
    assert fit.mixture.score(v, torch.full((1, 1, 1), 0.1)).isfinite().all()


# EPLL


def restored_patch(v, variance, mixture):
    """The Wiener filter of the most probable component, with dense matrices."""
    level = v.mean() if mixture.brightness_invariant else torch.zeros((), dtype=v.dtype)
    eye = torch.eye(len(v), dtype=v.dtype)
    v = v - level
    gaussians = [
        MultivariateNormal(mean, covariance + variance * eye)
        for mean, covariance in zip(mixture.means, mixture.covariances, strict=True)
    ]
    joint = [
        w.log() + gaussian.log_prob(v) for w, gaussian in zip(mixture.weights, gaussians, strict=True)
    ]
    k = torch.stack(joint).argmax()
    gain = mixture.covariances[k] @ torch.linalg.inv(mixture.covariances[k] + variance * eye)
    return mixture.means[k] + gain @ (v - mixture.means[k]) + level


def epll_by_loops(y, sigma, mixture):
    rows, columns = mixture.patch_shape
    n = mixture.channels * rows * columns
    x = y.clone()
    for beta in (multiple / sigma**2 for multiple in (1, 4, 8, 16, 32)):
        total, counts = torch.zeros_like(x), torch.zeros_like(x)
        for top in range(y.shape[1] - rows + 1):
            for left in range(y.shape[2] - columns + 1):
                window = slice(None), slice(top, top + rows), slice(left, left + columns)
                patch = restored_patch(x[window].flatten(), 1 / beta, mixture)
                total[window] += patch.view(-1, rows, columns)
                counts[window] += 1
        weight = n / sigma**2
        x = (weight * y + beta * n * total / counts) / (weight + beta * n)
    return x


def test_epll_is_what_plain_loops_give(mixture, normal, error):
    y = 2 * normal(2, 2, 6, 5, seed=3)
    expected = torch.stack([epll_by_loops(y[i], SIGMA[i], mixture) for i in range(2)])
    assert error(epll(y, SIGMA, mixture), expected) < 1e-10


def test_most_probable_wiener_filter_is_exact_for_one_component(parameters, normal, error):
    one = GaussianMixture(
        SHAPE, 1, channels=2, means=parameters["means"][:1], covariances=parameters["covariances"][:1]
    )
    v = normal(2, 8, 7)
    assert error(one.map_denoise(v, LEVELS), v + LEVELS**2 * one.score(v, LEVELS)) < 1e-10


def test_epll_lies_between_the_noisy_image_and_the_wiener_filter():
    """On a Gaussian field, where the Wiener filter has the least mean square error there is."""
    field = GaussianCliques.exponential((64, 64), std=1.0, length=6.0)
    generator = torch.Generator().manual_seed(0)
    clean = field.sample(2, generator=generator)
    noisy = clean + 0.5 * torch.randn(clean.shape, dtype=clean.dtype, generator=generator)
    patches = field.patches((6, 6))
    mixture = GaussianMixture((6, 6), 1, covariances=patches.covariance[None])

    def mean_square_error(estimate):
        return (estimate - clean).square().mean().item()

    restored = mean_square_error(epll(noisy, 0.5, mixture))
    assert mean_square_error(field.denoise(noisy, 0.5)) < restored < mean_square_error(noisy)


def test_the_benchmark_trains_a_mixture_that_denoises(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1]))
    from benchmarks.epll import train
    from benchmarks.methods import by_epll
    from benchmarks.quality import add_noise

    rows, columns = np.mgrid[:60, :50]
    images = [np.floor(60.0 + 90 * (rows > k * columns + 9) + columns) for k in (0, 1, 2)]
    fit = train(images[:2], 3, patches=3000, passes=3, batch_size=1000)
    assert len(fit.log_likelihood) == 9
    path = tmp_path / "mixture.safetensors"
    PatchPrior(fit.mixture, assembly="mean").save(path)
    noisy = add_noise(images[2], 25.0, seed=0, number=0)
    restored = by_epll(path).run(noisy, 25.0, images[2])
    assert np.square(restored - images[2]).mean() < np.square(noisy - images[2]).mean()


# What cannot be used


def mixture_of(**parameters):
    return GaussianMixture((1, 2), 2, **parameters)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GaussianMixture((1, 2), 0), "components is 0"),
        (lambda: GaussianMixture((1, 1), 2, brightness_invariant=True), "one pixel"),
        (lambda: mixture_of(weights=torch.tensor([0.5, 0.6])), "sum one"),
        (lambda: mixture_of(weights=torch.tensor([1.0, 0.0])), "positive"),
        (lambda: mixture_of(weights=torch.ones(3) / 3), r"expected \(2,\)"),
        (lambda: mixture_of(means=torch.zeros(2, 3)), r"expected \(2, 2\)"),
        (lambda: mixture_of(covariances=torch.eye(2)), r"expected \(2, 2, 2\)"),
        (lambda: mixture_of(covariances=-torch.eye(2).repeat(2, 1, 1)), "smallest eigenvalue"),
        (lambda: fit_mixture(torch.ones(9, 4), 2), r"\(N, C, rows, columns\)"),
        (lambda: fit_mixture(torch.rand(1, 1, 2, 2), 2), "at least one patch"),
        (lambda: fit_mixture(torch.ones(9, 1, 2, 2), 2), "alike"),
        (lambda: fit_mixture(torch.full((9, 1, 2, 2), math.nan), 2), "finite"),
        (lambda: fit_mixture(torch.rand(9, 1, 2, 2), 2, passes=0), "passes is 0"),
        (lambda: fit_mixture(torch.rand(9, 1, 2, 2), 2, floor=0.0), "floor"),
        (lambda: PatchPrior(mixture_of()), "counts every pixel"),
        (lambda: epll(torch.ones(4, 4), 1.0, mixture_of()), r"\(B, C, H, W\)"),
        (lambda: epll(torch.ones(1, 3, 4, 4), 1.0, mixture_of()), "channels of the mixture"),
        (lambda: epll(torch.ones(1, 1, 4, 4).double(), 1.0, mixture_of()), "float64"),
        (lambda: epll(torch.ones(1, 1, 4, 4), -1.0, mixture_of()), "noise level"),
        (lambda: epll(torch.ones(1, 1, 4, 1), 1.0, mixture_of()), "smaller than one patch"),
    ],
)
def test_bad_input_is_refused(build, message):
    with pytest.raises(InputError, match=message):
        build()
