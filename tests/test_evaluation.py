"""Metrics against their formulas, classical denoisers against what theory says of them."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from patchscore.errors import InputError
from patchscore.evaluation.baselines import (
    bm3d,
    has_bm3d,
    total_variation,
    total_variation_oracle,
)
from patchscore.evaluation.metrics import psnr, ssim

SIGMA = 20.0


@pytest.fixture
def clean() -> np.ndarray:
    """Four plateaus and a slope, 8-bit units."""
    rows, columns = np.mgrid[:40, :48]
    return 60.0 + 90.0 * (rows > 18) + 40.0 * (columns > 25) + 0.5 * columns


@pytest.fixture
def noisy(clean: np.ndarray) -> np.ndarray:
    return clean + SIGMA * np.random.default_rng(1).standard_normal(clean.shape)


def test_psnr_is_its_formula(clean: np.ndarray, noisy: np.ndarray) -> None:
    expected = 10 * np.log10(255**2 / np.mean((clean - noisy) ** 2))
    assert psnr(clean, noisy, data_range=255) == pytest.approx(expected, abs=1e-10)
    assert psnr(clean, clean, data_range=255) == np.inf


def test_psnr_neither_clips_nor_quantises() -> None:
    assert psnr(np.zeros((4, 4), np.uint8), np.full((4, 4), -0.5), data_range=255) == pytest.approx(
        20 * np.log10(255 / 0.5), abs=1e-10
    )


def test_ssim_is_the_index_of_wang_et_al(clean: np.ndarray, noisy: np.ndarray) -> None:
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets**2) / (2 * 1.5**2))
    weights = np.outer(window, window) / window.sum() ** 2
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for i in range(5, clean.shape[0] - 5):
        for j in range(5, clean.shape[1] - 5):
            x, e = (image[i - 5 : i + 6, j - 5 : j + 6] for image in (clean, noisy))
            mx, me = (weights * x).sum(), (weights * e).sum()
            sxx, see = (weights * (x - mx) ** 2).sum(), (weights * (e - me) ** 2).sum()
            sxe = (weights * (x - mx) * (e - me)).sum()
            values.append(
                (2 * mx * me + c1) * (2 * sxe + c2) / ((mx**2 + me**2 + c1) * (sxx + see + c2))
            )
    assert ssim(clean, noisy, data_range=255) == pytest.approx(np.mean(values), abs=1e-10)
    assert ssim(clean, clean, data_range=255) == pytest.approx(1, abs=1e-12)


def test_ssim_of_constant_images() -> None:
    c1 = (0.01 * 255) ** 2
    expected = (2 * 80 * 120 + c1) / (80**2 + 120**2 + c1)
    first, second = np.full((16, 16), 80.0), np.full((16, 16), 120.0)
    assert ssim(first, second, data_range=255) == pytest.approx(expected, abs=1e-10)


def test_ssim_of_channels_is_the_mean_over_them(clean: np.ndarray, noisy: np.ndarray) -> None:
    one, other = ssim(clean, noisy, data_range=255), ssim(clean, clean, data_range=255)
    stacked = ssim(np.stack([clean, clean]), np.stack([noisy, clean]), data_range=255, channel_axis=0)
    assert stacked == pytest.approx((one + other) / 2, abs=1e-12)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_metrics_refuse_what_has_no_meaning(metric, clean: np.ndarray) -> None:
    with pytest.raises(InputError, match="must be the same"):
        metric(clean, clean[:-1], data_range=255)
    for data_range in (0, -1, np.nan, np.inf):
        with pytest.raises(InputError, match="data_range"):
            metric(clean, clean, data_range=data_range)


def test_ssim_refuses_images_smaller_than_its_window() -> None:
    with pytest.raises(InputError, match="at least 11 pixels"):
        ssim(np.ones((10, 40)), np.ones((10, 40)), data_range=1)


def test_total_variation_of_a_step() -> None:
    """Minimising 1/2 |x - y|^2 + w sigma TV(x) for a step moves both plateaus by w sigma / width."""
    width, weight = 5, 1.5
    step = np.repeat([[-40.0, 40.0]], width, axis=1).repeat(6, axis=0)
    shift = weight * SIGMA / width
    estimate = total_variation(step, SIGMA, weight=weight, tolerance=1e-14)
    np.testing.assert_allclose(estimate, step - shift * np.sign(step), atol=1e-9)


@pytest.mark.parametrize("weight", [0.1, 0.3, 0.6, 1.0, 2.0, 5.0])
def test_no_weight_beats_the_oracle(weight: float, clean: np.ndarray, noisy: np.ndarray) -> None:
    best = psnr(clean, total_variation_oracle(noisy, SIGMA, clean), data_range=255)
    fixed = total_variation(noisy, SIGMA, weight=weight, tolerance=1e-5)
    assert psnr(clean, fixed, data_range=255) <= best


@pytest.mark.parametrize(("gain", "offset"), [(1 / 255, 0.0), (257.0, -1024.0), (1e-9, 3e-8)])
def test_total_variation_in_any_unit(
    gain: float, offset: float, clean: np.ndarray, noisy: np.ndarray
) -> None:
    for one, other in (
        (
            total_variation(noisy, SIGMA, weight=0.8),
            total_variation(gain * noisy + offset, gain * SIGMA, weight=0.8),
        ),
        (
            total_variation_oracle(noisy, SIGMA, clean),
            total_variation_oracle(gain * noisy + offset, gain * SIGMA, gain * clean + offset),
        ),
    ):
        np.testing.assert_allclose((other - offset) / gain, one, rtol=0, atol=1e-10 * SIGMA)


@pytest.mark.parametrize(("gain", "offset"), [(1 / 255, 0.0), (257.0, -1024.0), (1e-9, 3e-8)])
def test_bm3d_in_any_unit(gain: float, offset: float, noisy: np.ndarray, monkeypatch) -> None:
    """The package sees the same image in every unit, and what it returns comes back in that unit.

    Its own sums depend on the order of its threads, which can change which blocks it takes for similar:
    an exact stand-in takes its place.
    """
    package = pytest.importorskip("bm3d")
    seen = []
    monkeypatch.setattr(package, "bm3d", lambda y, sigma: seen.append((y, sigma)) or np.tanh(y))
    one, other = bm3d(noisy, SIGMA), bm3d(gain * noisy + offset, gain * SIGMA)
    (first, level), (second, same_level) = seen
    assert level == same_level
    np.testing.assert_allclose(second, first, rtol=0, atol=1e-10)
    np.testing.assert_allclose((other - offset) / gain, one, rtol=0, atol=1e-10 * SIGMA)


def test_bm3d_denoises(clean: np.ndarray, noisy: np.ndarray) -> None:
    """A block of a plateau has 64 pixels and 1 coefficient, so most of the noise has to go."""
    pytest.importorskip("bm3d")
    assert np.mean((bm3d(noisy, SIGMA) - clean) ** 2) < SIGMA**2 / 4


def test_missing_bm3d_says_how_to_get_it(monkeypatch, noisy: np.ndarray) -> None:
    monkeypatch.setitem(sys.modules, "bm3d", None)
    assert not has_bm3d()
    with pytest.raises(InputError, match=r"pip install 'patchscore\[bm3d\]'.*non-commercial"):
        bm3d(noisy, SIGMA)


@pytest.mark.parametrize(
    "denoiser",
    [
        lambda noisy, sigma: total_variation(noisy, sigma, weight=1),
        lambda noisy, sigma: total_variation_oracle(noisy, sigma, noisy),
        pytest.param(bm3d, marks=pytest.mark.skipif(not has_bm3d(), reason="needs bm3d")),
    ],
    ids=["total_variation", "total_variation_oracle", "bm3d"],
)
def test_denoisers_refuse_what_they_cannot_do(denoiser) -> None:
    image = np.ones((16, 16))
    with pytest.raises(InputError, match=r"expected \(H, W\)"):
        denoiser(np.ones((16, 16, 3)), 1.0)
    with pytest.raises(InputError, match="NaN"):
        denoiser(np.full((16, 16), np.nan), 1.0)
    for sigma in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(InputError, match="noise level"):
            denoiser(image, sigma)


def test_single_refusals(noisy: np.ndarray) -> None:
    for weight in (0.0, -1.0, np.inf):
        with pytest.raises(InputError, match="weight"):
            total_variation(noisy, SIGMA, weight=weight)
    with pytest.raises(InputError, match="must be the same"):
        total_variation_oracle(noisy, SIGMA, noisy[1:])


def test_bm3d_refuses_images_smaller_than_a_block() -> None:
    pytest.importorskip("bm3d")
    with pytest.raises(InputError, match="smaller than a block"):
        bm3d(np.ones((7, 20)), 1.0)
