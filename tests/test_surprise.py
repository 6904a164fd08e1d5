"""Surprise on fields whose score, energy and distribution are known."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy.stats import betabinom, chi2, mannwhitneyu
from skimage import data

import patchscore as ps
from benchmarks.surprise import auc, store
from patchscore.adaptation import surprise as module
from patchscore.adaptation.surprise import KEY, SCALES, Expectation, Law, expect, p_value, surprise
from patchscore.measurements.noisy_image import NoisyImage
from patchscore.priors.energy import ConvEnergy

SIDE = 64
SIGMAS = 0.15, 2.0


class Silent:
    """A prior that changes nothing: its score is zero, so d = y."""

    def score(self, x, sigma):
        return 0 * x


@pytest.fixture(scope="module")
def field():
    return ps.GaussianCliques.exponential((SIDE, SIDE), std=1.0, length=6.0)


def draws(field, count, seed, gain=1.0):
    generator = torch.Generator().manual_seed(seed)
    return gain * field.sample(count, generator=generator)


def noisy(clean, sigma, seed):
    generator = torch.Generator().manual_seed(seed)
    return clean + sigma * torch.randn(clean.shape, dtype=clean.dtype, generator=generator)


@pytest.fixture(scope="module")
def expected(field):
    generator = torch.Generator().manual_seed(2)
    return expect(field, draws(field, 150, seed=1), sigmas=SIGMAS, generator=generator, progress=False)


@pytest.fixture
def prior(randomized):
    return ps.PatchPrior(randomized(ConvEnergy((3, 3), (1, 1), width=8)))


def test_blur_is_a_gaussian_of_its_width():
    impulse = np.zeros((129, 129))
    impulse[64, 64] = 1
    blurred = module._blur(impulse, 4.0)
    offset = np.arange(129) - 64
    assert blurred.sum() == pytest.approx(1, abs=1e-12)
    assert (blurred.sum(0) * offset**2).sum() == pytest.approx(16, abs=1e-10)
    gaussian = np.exp(-(offset**2) / 32) / np.sqrt(32 * np.pi)
    np.testing.assert_allclose(blurred, gaussian[:, None] * gaussian, rtol=0, atol=1e-12)


def test_contrasts_of_a_cosine():
    amplitude, sigma, waves = 30.0, 5.0, 6
    omega = np.pi * waves / SIDE
    y = np.cos(omega * (np.arange(SIDE) + 0.5)) * np.ones((SIDE, 1)) * amplitude + 7
    whole, _ = module._features(Silent(), NoisyImage.of(y, sigma))
    passed = 1 - np.exp(-((np.array(SCALES) * omega) ** 2) / 2)
    contrasts = np.log(amplitude**2 / 2 * passed**2 / sigma**2 + 0.01)
    np.testing.assert_allclose(whole[:-1], contrasts, rtol=0, atol=1e-10)
    assert whole[-1] == 0


@pytest.mark.parametrize("sigma", [0.2, 1.0])
@pytest.mark.parametrize("gain", [1.0, 2.0])
def test_local_energy_is_what_stein_says(gain, sigma, field):
    """E e = tr((I - G) R) / n with R = K_prior^-1 K_draws under noise; 1 - tr G / n where R = I."""
    y = noisy(draws(field, 200, seed=3, gain=gain), sigma, seed=4)
    found = [module._features(field, NoisyImage.of(image[0], sigma))[0][-1] for image in y]
    variance = field.power_spectrum + sigma**2
    ratio = (gain**2 * field.power_spectrum + sigma**2) / variance
    circulant = torch.fft.ifft2(ratio).real.numpy()
    blur = module._blur(np.eye(SIDE)[:, None], SCALES[0])[:, 0]  # along one axis
    lags = (np.arange(SIDE)[:, None] - np.arange(SIDE)) % SIDE
    at_lag = np.array([blur[lags == lag].sum() for lag in range(SIDE)])
    energy = ratio.mean().item() - (np.outer(at_lag, at_lag) * circulant).sum() / SIDE**2
    if gain == 1:
        assert energy == pytest.approx(1 - np.trace(blur) ** 2 / SIDE**2, abs=1e-12)
    assert abs(np.mean(found) - energy) < 4.5 * np.std(found) / np.sqrt(len(found))


def test_a_law_is_found_again_and_its_distances_are_chi():
    rng = np.random.default_rng(0)
    n = 20_000
    mean, log_std = rng.normal(size=(3, 6)), 0.1 * rng.normal(size=(3, 6))
    mix = np.eye(6) + 0.3 * rng.normal(size=(6, 6))
    covariance = mix @ mix.T
    truth = Law(np.array([-2.0, 2.0]), mean, log_std, covariance, 1.0)

    def sample(count):
        c = rng.uniform(-2, 2, count)
        basis = np.stack([np.ones(count), c, c**2], 1)
        f = basis @ mean + np.exp(basis @ log_std) * (rng.normal(size=(count, 6)) @ mix.T)
        return np.column_stack([c, f])

    exact = truth.distance(sample(n)) ** 2
    assert abs(exact.mean() - 6) < 4.5 * np.sqrt(12 / n)
    found = Law.fit(sample(n))
    fresh = found.distance(sample(n)) ** 2
    # 57 fitted numbers change the mean of r^2 by about 57 / n of itself.
    assert abs(fresh.mean() - 6) < 4.5 * np.sqrt(12 / n) * np.sqrt(2) + 6 * 57 / n
    over = (fresh > found.mark**2).sum()
    assert abs(over - 0.05 * n) < 4.5 * np.sqrt(2 * 0.0475 * n)
    assert found.mark**2 == pytest.approx(chi2(6).ppf(0.95), rel=4.5 * 0.011)


def test_distance_beyond_the_bounds_is_that_to_the_law_at_the_bound():
    mean = np.array([[0.0] * 6, [1.0] * 6, [0.0] * 6])
    law = Law(np.array([0.0, 1.0]), mean, np.zeros((3, 6)), np.eye(6), 1.0)
    features = np.array([[3.0] + [1.0] * 6, [0.5] + [0.5] * 5 + [2.5], [-4.0] + [0.0] * 5 + [-3.0]])
    np.testing.assert_allclose(law.distance(features), [0, 2, 3], rtol=0, atol=1e-12)


@pytest.mark.parametrize("sigma", [0.4, 0.6, 1.0])
def test_new_draws_rank_evenly_among_the_training_images(sigma, field, expected):
    clean = draws(field, 100, seed=int(10 * sigma))
    found = [
        surprise(field, image, sigma, expectation=expected)
        for image in noisy(clean, sigma, seed=int(10 * sigma) + 1)[:, None]
    ]
    distances = [result.value * expected.image.mark for result in found]
    assert mannwhitneyu(distances, expected.distances).pvalue > 1e-4
    # How many of m new draws pass the largest but k - 1 of N exchangeable ones.
    n = len(expected.distances)
    k = (expected.distances >= expected.image.mark).sum()
    assert sum(result.value > 1 for result in found) <= betabinom(len(found), k, n + 1 - k).isf(1e-4)
    assert [result.p_value for result in found] == [p_value(expected, r) for r in distances]


def test_p_values_count_training_images():
    expectation = Expectation(None, None, np.array([1.0, 2.0, 2.0, 5.0]))
    found = [p_value(expectation, r) for r in (0.5, 2.0, 4.0, 5.0, 6.0)]
    assert found == [1, 4 / 5, 2 / 5, 2 / 5, 1 / 5]


@pytest.mark.parametrize("sigma", [0.3, 1.0])
def test_what_is_not_a_draw_is_far_off(sigma, field, expected):
    d = torch.arange(SIDE).double() + SIDE * torch.arange(-4, 5)[:, None]
    along = (-(d**2) / 72).exp().sum(0)
    smooth = ps.GaussianCliques.from_covariance(torch.outer(along, along) / along[0] ** 2)
    for clean in (
        draws(field, 8, seed=5, gain=2.0),
        draws(smooth, 8, seed=5),
        torch.zeros(8, 1, SIDE, SIDE),
    ):
        for image in noisy(clean.double(), sigma, seed=6)[:, None]:
            found = surprise(field, image, sigma, expectation=expected)
            assert found.value > 1
            assert found.p_value < 0.05


def test_the_map_shows_where(expected):
    """Three times the contrast in the right half: there the map passes the mark, and not far from it."""
    sigma, side = 0.5, 3 * SIDE
    field = ps.GaussianCliques.exponential((SIDE, side), std=1.0, length=6.0)
    clean = draws(field, 8, seed=8)
    clean[..., side // 2 :] *= 3
    maps = [
        surprise(field, image, sigma, expectation=expected).map
        for image in noisy(clean, sigma, seed=10)[:, None]
    ]
    columns = np.mean(maps, (0, 1))
    assert columns[0] < 1 < columns[-1]


def test_unit_and_brightness_change_nothing(prior, expected, normal):
    y = normal(1, 1, SIDE, SIDE + 5)
    one = surprise(prior, y, 0.5, expectation=expected)
    other = surprise(prior, 40 * y + 1000, 20.0, expectation=expected)
    np.testing.assert_allclose(other.map, one.map, rtol=1e-9)
    assert other.value == pytest.approx(one.value, rel=1e-9)
    assert other.p_value == one.p_value


def test_turned_and_mirrored_images_surprise_as_much(prior, expected, normal):
    y = normal(SIDE, SIDE + 5).numpy()
    one = surprise(prior, y, 0.5, expectation=expected)
    for change in (np.rot90, np.flipud):
        other = surprise(prior, change(y).copy(), 0.5, expectation=expected)
        np.testing.assert_allclose(other.map, change(one.map), rtol=1e-9)
        assert other.value == pytest.approx(one.value, rel=1e-9)


def test_channels_are_averaged(field, expected):
    y = noisy(draws(field, 1, seed=11), 0.5, seed=12)
    one = surprise(field, y, 0.5, expectation=expected)
    three = surprise(field, y.expand(1, 3, -1, -1), 0.5, expectation=expected)
    np.testing.assert_allclose(three.map, one.map, rtol=1e-12)
    np.testing.assert_array_equal(one.y, y[0, 0])


def test_it_is_kept_with_the_prior(prior, field, tmp_path):
    images = draws(field, 24, seed=15)

    def made():
        return expect(prior, images, sigmas=(0.1, 1.0), draws=1, progress=False)

    expectation = made()
    store(prior, expectation, str(tmp_path / "prior.safetensors"))
    assert json.dumps(made().card()) == json.dumps(expectation.card())  # seeded
    assert len(json.dumps(expectation.card())) < 8000
    loaded = ps.load_prior(tmp_path / "prior.safetensors", device="cpu")
    y = noisy(draws(field, 1, seed=16), 0.5, seed=17)
    one, other = surprise(prior, y, 0.5, expectation=expectation), surprise(loaded, y, 0.5)
    # The laws of the card have ten digits, which their covariance may amplify; the distances have five.
    assert other.value == pytest.approx(one.value, rel=1e-5)
    np.testing.assert_allclose(other.map, one.map, rtol=1e-5)


def test_errors_teach(prior, expected, normal, field):
    y = normal(SIDE, SIDE)
    with pytest.raises(ps.InputError, match=r"no entry \"surprise\".*expect"):
        surprise(prior, y, 0.5)
    for shape in ((SIDE - 1, SIDE), (2, 1, SIDE, SIDE), (1, SIDE, SIDE)):
        with pytest.raises(ps.InputError, match=r"y has shape .*at least 64 x 64"):
            surprise(prior, normal(*shape), 0.5, expectation=expected)
    with pytest.raises(ps.InputError, match="sigma is -1"):
        surprise(prior, y, -1, expectation=expected)
    with pytest.raises(ps.InputError, match="NaN"):
        surprise(prior, y * np.nan, 0.5, expectation=expected)
    images = normal(19, 1, SIDE, SIDE)
    with pytest.raises(ps.InputError, match=r"19 images.*at least 20"):
        expect(field, images, sigmas=SIGMAS)
    with pytest.raises(ps.InputError, match="do not vary enough"):
        expect(Silent(), normal(20, 1, SIDE, SIDE), sigmas=SIGMAS, progress=False)
    for sigmas in ((0.0, 1.0), (2.0, 1.0)):
        with pytest.raises(ps.InputError, match="the lowest and the highest noise level"):
            expect(field, images, sigmas=sigmas)


def test_the_figure_shows_image_and_map(field, expected):
    clean = draws(field, 1, seed=13)
    clean[..., SIDE // 2 :] *= 4
    found = surprise(field, noisy(clean, 0.5, seed=14), 0.5, expectation=expected)
    figure = found.plot()
    figure.canvas.draw()
    left, right, bar = figure.axes
    np.testing.assert_array_equal(left.images[0].get_array(), found.y)
    np.testing.assert_array_equal(right.images[0].get_array(), found.map)
    assert right.images[0].get_clim() == (0, max(2, found.map.max()))
    assert f"{found.value:.2f}" in figure.get_suptitle()
    assert "5 %" in bar.get_ylabel()


@pytest.mark.parametrize("name", ["natural-gray", "natural-gray-fast"])
def test_text_surprises_a_prior_of_photographs(name):
    prior = ps.load_prior(name, device="cpu")
    if KEY not in prior.card:
        pytest.skip("no expectation is stored yet: python -m benchmarks surprise --store")
    rng = np.random.default_rng(0)
    page, photograph = (x + 25 * rng.standard_normal(x.shape) for x in (data.page(), data.camera()))
    assert surprise(prior, page, 25).value > surprise(prior, photograph, 25).value


def test_area_under_the_curve_counts_pairs():
    assert auc(np.array([2.0, 3.0]), np.array([1.0, 2.0])) == 0.875
