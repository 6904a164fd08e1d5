"""Calibration and convergence diagnostics against order statistics, autoregressions and Gaussians."""

import importlib.util
import math
import sys

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from patchscore.errors import InputError
from patchscore.inference import diagnostics
from patchscore.inference.chain import Chain
from patchscore.inference.diagnostics import (
    coverage,
    curl,
    effective_sample_size,
    mean_gap,
    monte_carlo_error,
    r_hat,
    rank_histogram,
    rank_statistics,
)
from patchscore.priors.energy import PatchEnergy
from patchscore.priors.gaussian import GaussianCliques
from patchscore.priors.mlp import PatchMLP
from patchscore.priors.prior import PatchPrior

SHAPE = 6, 5
SIGMA = 0.8
needs_arviz = pytest.mark.skipif(importlib.util.find_spec("arviz") is None, reason="needs arviz")


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def field():
    return GaussianCliques.exponential(SHAPE, std=1.5, length=2.0, mean=-0.7)


@pytest.fixture
def draw(field, generator):
    """Independent truths of the field, noisy images of them, and exact samples given those."""

    def make(images, n):
        truth = field.sample(images, generator=generator)
        noise = torch.randn(truth.shape, generator=generator, dtype=truth.dtype)
        y = truth + SIGMA * noise
        samples = field.sample_denoised(y.repeat(n, 1, 1, 1), SIGMA, generator=generator)
        return truth, y, samples.view(n, *y.shape)

    return make


@pytest.fixture
def autoregression(normal):
    """x_t = a x_{t-1} + sqrt(1 - a^2) z_t, stationary from the start: (n, chains, pixels)."""

    def make(a, n, chains, pixels):
        z = normal(n, chains, pixels)
        x = [z[0]]
        for noise in z[1:]:
            x.append(a * x[-1] + math.sqrt(1 - a**2) * noise)
        return torch.stack(x)

    return make


def chain_of(samples):
    nothing = torch.zeros(samples.shape[1])
    mean, variance = samples.mean(0), samples.var(0)
    state = torch.Generator().get_state()
    return Chain(
        samples, mean, variance, len(samples), samples[-1], 0, 0, nothing, nothing, 0, 0.0, "", state
    )


class Linear:
    """The score M x of images, for a matrix M: the Jacobian is known."""

    def __init__(self, matrix):
        self.matrix = matrix

    def score(self, x, sigma):
        return (x.flatten(1) @ self.matrix.T).view(x.shape)


# Coverage


@pytest.mark.parametrize(("n", "level"), [(16, 0.8), (19, 0.9), (33, 0.9), (64, 0.95), (2, 0.3)])
def test_coverage_of_exact_posterior_samples_is_the_level(n, level, draw, z_score):
    truth, _, samples = draw(1500, n)
    found = coverage(samples, truth, level)
    assert z_score(found.per_image, level) < 4
    assert found.level == level
    assert found.share == pytest.approx(found.per_image.mean().item(), abs=1e-12)
    standard_error = found.per_image.std().item() / math.sqrt(1500)
    assert found.standard_error == pytest.approx(standard_error, rel=1e-12)


@pytest.mark.parametrize("n", [20, 32])
def test_coverage_is_exact_for_a_distribution_that_is_far_from_symmetric(n, normal, z_score):
    """Log-normal draws with positions that are no whole numbers, where interpolation is off."""
    draws = (2 * normal(n + 1, 4000, 10)).exp()
    assert z_score(coverage(draws[1:], draws[0]).per_image, 0.9) < 4


def test_coverage_of_samples_that_are_too_narrow(normal, z_score):
    """With 39 draws the interval is that between ranks 2 and 38: the mean of a binomial over truths."""
    narrow = 0.8
    truth, samples = normal(4000, 10), narrow * normal(39, 4000, 10, seed=1)
    rank = lambda t: stats.binom(39, stats.norm.cdf(t / narrow))  # noqa: E731
    held = lambda t: stats.norm.pdf(t) * (rank(t).cdf(37) - rank(t).cdf(1))  # noqa: E731
    expected = integrate.quad(held, -8, 8)[0]
    assert z_score(coverage(samples, truth).per_image, expected) < 4
    # As n grows: P(|truth| < 0.8 * 1.645).
    assert expected == pytest.approx(2 * stats.norm.cdf(0.8 * stats.norm.ppf(0.95)) - 1, abs=0.01)


def test_coverage_counts_whole_and_split_ranks():
    """Of 4 draws at level 0.4 the ends are at 1.5 and 3.5: ranks 1 and 3 are held half of the time."""
    samples = torch.arange(4.0).view(4, 1).expand(4, 5)
    truth = torch.tensor([-0.5, 0.5, 1.5, 2.5, 3.5])
    found = coverage(samples, truth, 0.4)
    assert found.per_image.tolist() == pytest.approx([0, 0.5, 1, 0.5, 0], abs=1e-12)
    assert found.share == pytest.approx(0.4, abs=1e-12)


@pytest.mark.parametrize(("n", "level"), [(19, 0.9), (33, 0.9), (50, 0.5), (3, 0.001)])
def test_width_is_that_between_weibull_quantiles(n, level, normal, error):
    samples = normal(n, 3, 1, *SHAPE)
    ends = [(1 - level) / 2, (1 + level) / 2]
    lower, upper = np.quantile(samples.numpy(), ends, axis=0, method="weibull")
    expected = torch.as_tensor((upper - lower).mean((1, 2, 3)))
    assert error(coverage(samples, samples[0], level).width, expected) < 1e-10


def test_complex_images_are_calibrated_in_both_parts(normal, error):
    samples, truth = normal(40, 300, 1, 2, 3, 2), normal(300, 1, 2, 3, 2, seed=1)
    found = coverage(torch.view_as_complex(samples), torch.view_as_complex(truth))
    expected = coverage(samples, truth)
    assert (found.share, found.standard_error) == (expected.share, expected.standard_error)
    assert error(found.width, expected.width) < 1e-12
    ranks = rank_statistics(torch.view_as_complex(samples), torch.view_as_complex(truth))
    assert torch.equal(ranks, rank_statistics(samples, truth))


def test_coverage_of_one_image_has_no_standard_error(normal):
    assert math.isnan(coverage(normal(19, 1, 1, 2, 2), normal(1, 1, 2, 2)).standard_error)


# Ranks


def test_ranks_count_the_samples_below(normal):
    samples, truth = normal(7, 2, 1, 3, 4), normal(2, 1, 3, 4, seed=1)
    assert torch.equal(rank_statistics(samples, truth), (samples < truth).sum(0))
    means = (samples.mean((2, 3, 4)) < truth.mean((1, 2, 3))).sum(0)
    assert torch.equal(rank_statistics(samples, truth, lambda x: x.mean((1, 2, 3))), means)


@pytest.mark.parametrize("n", [15, 18])
def test_ranks_of_an_exact_sampler_are_uniform(n, field, draw):
    """Of a pixel, and of a statistic that depends on the data: how close the image is to y."""
    truth, y, samples = draw(3000, n)
    for statistic in (lambda x: x[:, 0, 2, 3], lambda x: (x - y).square().sum((1, 2, 3))):
        ranks = rank_statistics(samples, truth, statistic)
        assert rank_histogram(ranks, n).p_value > 1e-4


@pytest.mark.parametrize("wrong", [lambda e: e + 0.3, lambda e: 0.7 * e, lambda e: 1.4 * e])
def test_ranks_of_a_wrong_sampler_are_not_uniform(wrong, field, draw):
    truth, y, samples = draw(3000, 15)
    mean = field.denoise(y, SIGMA)
    ranks = rank_statistics(mean + wrong(samples - mean), truth, lambda x: x[:, 0, 2, 3])
    assert rank_histogram(ranks, 15).p_value < 1e-10


def test_p_values_of_uniform_ranks_are_uniform(generator):
    """In bins of unequal widths, too."""
    ranks = torch.randint(17, (400, 300), generator=generator)
    p_values = [rank_histogram(row, 16, bins=5).p_value for row in ranks]
    assert stats.kstest(p_values, "uniform").pvalue > 1e-4


def test_bins_hold_the_ranks_that_they_say():
    ranks = torch.arange(10).repeat(6)
    found = rank_histogram(ranks, 9, bins=4)
    assert found.edges.tolist() == [0, 2, 5, 7, 10]
    assert found.counts.tolist() == found.expected.tolist() == [12, 18, 12, 18]
    assert (found.chi_square, found.p_value) == (0, 1)


@pytest.mark.parametrize(
    ("total", "draws", "bins"), [(600, 31, 16), (600, 18, 19), (45, 31, 4), (300, 36, 20)]
)
def test_bins_are_equal_where_that_costs_few(total, draws, bins):
    ranks = torch.arange(total) % (draws + 1)
    assert len(rank_histogram(ranks, draws).counts) == bins


def test_rank_plot_shows_the_counts_and_the_binomial_band():
    ranks = torch.arange(8).repeat(25)
    ax = rank_histogram(ranks, 7, bins=4).plot()
    assert [bar.get_height() for bar in ax.patches[:4]] == [1, 1, 1, 1]
    assert [bar.get_width() for bar in ax.patches[:4]] == [0.25] * 4
    band = ax.patches[4].get_data()
    low, high = stats.binom.interval(0.99, 200, 0.25)
    np.testing.assert_allclose(band.values, [high / 50] * 4, rtol=1e-12)
    np.testing.assert_allclose(band.baseline, [low / 50] * 4, rtol=1e-12)
    assert ax.get_title() == "200 ranks among 7 draws, p = 1"


# Mixing


@needs_arviz
def test_r_hat_of_independent_draws_and_of_chains_that_differ(normal):
    samples = normal(1000, 4, 1, 2, 3)
    assert (r_hat(chain_of(samples)) - 1).abs().max() < 0.01
    apart = samples + 3 * torch.arange(4.0)[:, None, None, None]
    assert r_hat(apart).min() > 1.5
    # Of equal means and unequal widths.
    wider = samples * torch.tensor([1.0, 1.0, 1.0, 4.0])[:, None, None, None]
    assert r_hat(wider).min() > 1.1


@needs_arviz
def test_maps_are_those_of_every_pixel(autoregression, error):
    import arviz

    samples = autoregression(0.7, 50, 3, 6).view(50, 3, 1, 2, 3)
    dataset = arviz.convert_to_dataset(samples.transpose(0, 1).numpy())
    for found, expected in (
        (r_hat(samples), arviz.rhat(dataset)),
        (effective_sample_size(samples), arviz.ess(dataset)),
        (effective_sample_size(samples, "tail"), arviz.ess(dataset, method="tail")),
        (monte_carlo_error(samples), arviz.mcse(dataset)),
    ):
        assert error(found, torch.as_tensor(expected["x"].values)) < 1e-10


@needs_arviz
@pytest.mark.parametrize("a", [0.5, 0.8, 0.9])
@pytest.mark.parametrize("kind", ["bulk", "mean"])
def test_effective_sample_size_of_an_autoregression(a, kind, autoregression, z_score):
    found = effective_sample_size(autoregression(a, 2000, 2, 40), kind)
    assert z_score(found, 4000 * (1 - a) / (1 + a)) < 4


@needs_arviz
def test_effective_sample_size_of_independent_draws(autoregression):
    """The sum over lags keeps what happens to be positive, so it is low, but within its error."""
    found = effective_sample_size(autoregression(0.0, 2000, 2, 40))
    assert abs(found.mean() - 4000) < found.std()


@needs_arviz
def test_monte_carlo_error_is_the_spread_of_the_mean(autoregression, z_score):
    """Squared deviations of the means over squared errors have the mean 1; the true mean is 0."""
    samples = autoregression(0.8, 1000, 2, 200)
    error = monte_carlo_error(samples)
    assert z_score((samples.mean((0, 1)) / error).square(), 1) < 4
    assert z_score(error.square(), 1 / 2000 * 1.8 / 0.2) < 4


@needs_arviz
def test_statistics_and_pixels_that_never_move(normal):
    samples = normal(10, 2, 1, 2, 2)
    samples[..., 0, 0] = 3.0
    for measure in (r_hat, effective_sample_size, monte_carlo_error):
        assert measure(samples).isnan().flatten().tolist() == [True, False, False, False]
        assert measure(samples.mean((2, 3, 4))).shape == ()
    stuck = torch.tensor([0.0, 1.0]).expand(10, 2)
    assert r_hat(stuck) > 1e3


# The score


def test_mean_of_exact_samples_is_tweedie(field, draw, z_score):
    """z^2 = 1 on average, up to 2 / (n - 1) / pixels from the estimated variance."""
    _, y, samples = draw(1000, 64)
    gap = mean_gap(chain_of(samples), field, y, SIGMA)
    assert z_score(gap.z.square(), 1) < 4


def test_mean_gap_of_a_wrong_prior(field, draw, error):
    """A shift of the mean image by c moves Tweedie, and rms is that move; z grows with sqrt(n)."""
    _, y, samples = draw(50, 400)
    other = GaussianCliques.exponential(SHAPE, std=1.5, length=2.0, mean=0.3)
    gap = mean_gap(chain_of(samples), other, y, SIGMA)
    shift = (other.denoise(y, SIGMA) - field.denoise(y, SIGMA))[0, 0, 0, 0]
    noise = samples.var(0).mean((1, 2, 3)).sqrt() / 20
    assert ((gap.rms - shift).abs() < 4 * noise).all()
    assert error(gap.z, gap.rms / noise) < 1e-10


def test_gradients_have_no_curl(field, randomized, normal, generator):
    x = normal(2, 1, *SHAPE)
    energy = PatchPrior(randomized(PatchEnergy(3, width=16)))
    for model in (field, energy):
        assert curl(model, x, torch.tensor([0.5, 2.0]), generator=generator).max() < 1e-8


def test_an_unconstrained_network_has_curl(randomized, normal, generator, z_score):
    """Against the Jacobian by autograd, at one image that is repeated."""
    prior = PatchPrior(randomized(PatchMLP(3, widths=[16, 16], tanh_layers=1)))
    x = normal(1, 1, 4, 4)
    jacobian = torch.autograd.functional.jacobian(lambda v: prior.score(v, SIGMA), x).view(16, 16)
    share = (jacobian - jacobian.T).square().sum() / (4 * jacobian.square().sum())
    assert share > 1e-3
    found = curl(prior, x.expand(20, -1, -1, -1), SIGMA, generator=generator, probes=100)
    assert z_score(found.square(), share.item()) < 4


def test_curl_of_a_rotation(normal, generator, z_score):
    """-a x + b R x, R a quarter turn of pairs of pixels: the share is b / sqrt(a^2 + b^2)."""
    turn = torch.block_diag(*[torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)] * 15)
    x = normal(1, 1, *SHAPE).expand(2000, -1, -1, -1)
    for a, b in ((0.0, 1.0), (1.0, 0.0), (3.0, 2.0)):
        model = Linear(-a * torch.eye(30, dtype=torch.float64) + b * turn)
        found = curl(model, x, SIGMA, generator=generator)
        if b == 0:
            assert found.max() < 1e-8
        else:
            assert z_score(found.square(), b**2 / (a**2 + b**2)) < 4


# What cannot be used


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: coverage(x[:18], x[0]), r"18 samples are too few.*19 or more.*at most 0\.894"),
        (lambda x: coverage(x, x[0], 1.0), "between 0 and 1"),
        (lambda x: coverage(x, x[0, :1]), r"n draws of each image"),
        (lambda x: coverage(x / 0, x[0]), "NaN"),
        (lambda x: rank_statistics(x, x), r"expected \(n, B, C, H, W\)"),
        (lambda x: rank_statistics(x, x[0], lambda x: x.mean((0, 1))), "each image by itself"),
        (lambda x: rank_histogram(rank_statistics(x, x[0]), 20), "are correlated"),
        (lambda x: rank_histogram(torch.arange(30), 20), "from 0 to 20"),
        (lambda x: rank_histogram(torch.zeros(30), 20), "whole numbers"),
        (lambda x: rank_histogram(torch.zeros(30, dtype=int), 20, bins=7), "too few for 7 bins"),
        (lambda x: rank_histogram(torch.zeros(5, dtype=int), 20), "more truths"),
        (lambda x: rank_histogram(torch.zeros(99, dtype=int), 3, bins=5), "at most 4"),
        pytest.param(lambda x: r_hat(x[:, :1]), "at least 2 chains", marks=needs_arviz),
        pytest.param(lambda x: r_hat(x[:3]), "at least 4 draws", marks=needs_arviz),
        pytest.param(lambda x: monte_carlo_error(x * math.nan), "NaN", marks=needs_arviz),
        pytest.param(
            lambda x: r_hat(chain_of(x)._replace(samples=None)), 'keep="samples"', marks=needs_arviz
        ),
        (lambda x: effective_sample_size(x, "head"), "choose one of"),
        (lambda x: mean_gap(chain_of(x), None, x[0, :1], 1.0), "that it was drawn for"),
        (
            lambda x: mean_gap(chain_of(x[:1].repeat(2, 1, 1, 1, 1))._replace(draws=1), None, x[0], 1.0),
            "two",
        ),
        (lambda x: curl(None, x[0], 1.0, generator=None, probes=1), "two directions"),
        (lambda x: curl(None, x[0], 0.0, generator=None), "positive"),
    ],
)
def test_bad_input_is_refused(call, message, normal):
    with pytest.raises(InputError, match=message):
        call(normal(20, 3, 1, 2, 2))


def test_missing_arviz_says_how_to_get_it(monkeypatch, normal):
    monkeypatch.setitem(sys.modules, "arviz", None)
    with pytest.raises(InputError, match=r"pip install 'patchscore\[diagnostics\]'"):
        r_hat(normal(10, 2))


def test_diagnostics_are_in_one_place():
    assert all(hasattr(diagnostics, name) for name in diagnostics.__all__)
