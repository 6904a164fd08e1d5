"""Non-local means and wavelets against scikit-image.

Total variation and BM3D are in ``test_evaluation.py``.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from skimage.restoration import cycle_spin, denoise_nl_means, denoise_wavelet

from patchscore.errors import InputError
from patchscore.evaluation.baselines import non_local_means, wavelets

SIGMA = 20.0


@pytest.fixture
def images() -> list[np.ndarray]:
    """Plateaus and slopes in 8-bit units, of different sizes."""
    rows, columns = np.mgrid[:40, :48]
    first = 60.0 + 90.0 * (rows > 18) + 40.0 * (columns > 25) + 0.5 * columns
    second = 128.0 + 60.0 * np.sin(rows / 6.0) * (columns > 12)
    return [first[6:30, 12:40], second[:24, :32]]


@pytest.fixture
def noisy(images: list[np.ndarray]) -> np.ndarray:
    return images[0] + SIGMA * np.random.default_rng(1).standard_normal(images[0].shape)


def test_non_local_means_is_that_of_scikit_image(noisy: np.ndarray) -> None:
    expected = denoise_nl_means(
        noisy, patch_size=5, patch_distance=7, h=0.7 * SIGMA, sigma=SIGMA, fast_mode=True
    )
    estimate = non_local_means(noisy, SIGMA, strength=0.7)
    np.testing.assert_allclose(estimate, expected, rtol=0, atol=1e-10 * SIGMA)


@pytest.mark.parametrize(("size", "levels"), [((40, 48), 3), ((96, 50), 4), ((7, 9), 1)])
def test_wavelets_are_those_of_scikit_image(size: tuple[int, int], levels: int) -> None:
    """As many levels as the shorter side allows, up to four, averaged over 16 shifts."""
    noisy = 100 + SIGMA * np.random.default_rng(0).standard_normal(size).cumsum(0)
    settings = {"sigma": SIGMA, "wavelet": "db2", "wavelet_levels": levels, "method": "BayesShrink"}
    expected = cycle_spin(noisy, denoise_wavelet, max_shifts=3, workers=1, func_kw=settings)
    np.testing.assert_allclose(wavelets(noisy, SIGMA), expected, rtol=0, atol=1e-10 * noisy.max())


@pytest.mark.parametrize("denoiser", [non_local_means, wavelets])
@pytest.mark.parametrize(("gain", "offset"), [(1 / 255, 0.0), (257.0, -1024.0), (1e-9, 3e-8)])
def test_in_any_unit(denoiser, gain: float, offset: float, noisy: np.ndarray) -> None:
    other = denoiser(gain * noisy + offset, gain * SIGMA)
    np.testing.assert_allclose(
        (other - offset) / gain, denoiser(noisy, SIGMA), rtol=0, atol=1e-10 * SIGMA
    )


@pytest.mark.parametrize("denoiser", [non_local_means, wavelets])
def test_a_flat_image_loses_most_of_its_noise(denoiser, z_score) -> None:
    """Wavelets keep 1 of 64 coefficients at three levels and what passes a threshold; patches of noise
    alone are all alike, so that means over up to 225 pixels are left."""
    rng = np.random.default_rng(3)
    errors = [np.mean(denoiser(rng.standard_normal((32, 32)), 1.0) ** 2) for _ in range(8)]
    assert np.mean(errors) + 4 * np.std(errors, ddof=1) / math.sqrt(8) < 1 / 4


def test_refusals(noisy: np.ndarray) -> None:
    for strength in (0.0, -1.0, np.inf):
        with pytest.raises(InputError, match="strength"):
            non_local_means(noisy, SIGMA, strength=strength)
    with pytest.raises(InputError, match="5 x 30 pixels, too small"):
        wavelets(np.eye(5, 30), 1.0)
    for denoiser in (non_local_means, wavelets):
        with pytest.raises(InputError, match=r"expected \(H, W\)"):
            denoiser(np.ones((16, 16, 3)), 1.0)
        with pytest.raises(InputError, match="NaN"):
            denoiser(np.full((16, 16), np.nan), 1.0)
        with pytest.raises(InputError, match="noise level"):
            denoiser(noisy, 0.0)
