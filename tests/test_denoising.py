"""The front door: units, dtypes, colour, tiles, and what bad input gets."""

import numpy as np
import pytest
import torch

import patchscore as ps
from patchscore.measurements.noise import estimated_sigma

SIGMA = 25.0


@pytest.fixture(scope="module")
def noisy() -> np.ndarray:
    from skimage.data import camera

    clean = camera()[100:180, 150:220].astype(np.float64)
    return clean + SIGMA * np.random.default_rng(0).standard_normal(clean.shape)


@pytest.fixture(scope="module")
def prior() -> ps.PatchPrior:
    """A small random potential in float64: identities hold to rounding, whatever the weights."""
    torch.manual_seed(1)
    network = ps.PatchEnergy(patch_size=5, width=32)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return ps.PatchPrior(network.double()).requires_grad_(False)


def test_it_is_the_priors_one_step_estimate(noisy: np.ndarray, prior: ps.PatchPrior) -> None:
    expected = prior.denoise(torch.from_numpy(noisy)[None, None], SIGMA)[0, 0].numpy()
    estimate = ps.denoise(noisy, SIGMA, prior=prior)
    # The scaled image passes through float32, with a relative rounding of 2^-24 of its range.
    assert np.abs(estimate - expected).max() < 1e-4


def test_it_removes_noise_from_a_photograph() -> None:
    from skimage.data import camera

    clean = camera()[:128, 100:228].astype(np.float64)
    noisy = clean + SIGMA * np.random.default_rng(0).standard_normal(clean.shape)
    error = np.mean((ps.denoise(noisy, SIGMA) - clean) ** 2)
    # A seventh is 8.45 dB: what BM3D is published to gain on BSD68 at this level, 20.17 to 28.57 dB.
    assert error < SIGMA**2 / 7


@pytest.mark.parametrize(("gain", "offset"), [(1e-9, 0.0), (1 / 255, 0.5), (300.0, -1e5), (1e12, 7e13)])
def test_any_unit_gives_the_same_estimate_in_that_unit(
    noisy: np.ndarray, gain: float, offset: float
) -> None:
    expected = ps.denoise(noisy, SIGMA)
    estimate = ps.denoise(gain * noisy + offset, gain * SIGMA)
    # Rounding of the input and float32 inside, both relative to the range of the image.
    assert np.abs((estimate - offset) / gain - expected).max() < 1e-3


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "int64", "float16", "float32", "float64"])
def test_every_numeric_dtype_is_taken_at_its_values(noisy: np.ndarray, dtype: str) -> None:
    image = np.clip(noisy, 0, 255).astype(dtype)
    estimate = ps.denoise(image, SIGMA)
    expected = ps.denoise(image.astype(np.float64), SIGMA)
    assert estimate.dtype == (np.float32 if dtype in ("float16", "float32") else np.float64)
    assert np.abs(estimate - expected).max() < 1e-3


def test_colour_is_denoised_channel_by_channel(noisy: np.ndarray) -> None:
    image = np.stack([noisy, noisy.T[:70, :70].repeat(2, 0)[:80], noisy[::-1]], axis=1)
    estimate = ps.denoise(image, SIGMA, channel_axis=1, prior="natural-gray")
    for channel in range(3):
        alone = ps.denoise(image[:, channel], SIGMA)
        assert np.abs(estimate[:, channel] - alone).max() < 1e-3
    moved = ps.denoise(np.moveaxis(image, 1, -1), SIGMA, channel_axis=-1, prior="natural-gray")
    np.testing.assert_array_equal(np.moveaxis(moved, -1, 1), estimate)


def test_a_colour_prior_sees_all_channels(noisy: np.ndarray) -> None:
    torch.manual_seed(2)
    network = ps.PatchEnergy(patch_size=3, channels=3, width=16)
    torch.nn.init.normal_(network.readout)
    prior = ps.PatchPrior(network)
    image = np.stack([noisy, 255 - noisy, noisy[::-1]], axis=-1)
    x = torch.from_numpy(image).movedim(-1, 0)[None].float()
    expected = prior.denoise(x, SIGMA)[0].movedim(0, -1).detach().numpy()
    assert np.abs(ps.denoise(image, SIGMA, prior=prior, channel_axis=-1) - expected).max() < 1e-2
    with pytest.raises(ps.InputError, match=r"has 1 channel\(s\) and the prior 3"):
        ps.denoise(noisy, SIGMA, prior=prior)


def test_the_noise_level_is_estimated_when_not_given(noisy: np.ndarray) -> None:
    np.testing.assert_array_equal(ps.denoise(noisy), ps.denoise(noisy, ps.estimate_noise(noisy)))
    # White noise alone: the median absolute deviation of n coefficients has a relative standard error
    # of about 1.17 / sqrt(n).
    white = 3 * np.random.default_rng(3).standard_normal((512, 512))
    assert abs(estimated_sigma(white) / 3 - 1) < 4 * 1.17 / 256


def test_an_image_without_noise_comes_back_with_a_warning() -> None:
    image = np.full((32, 32), 7, dtype=np.uint8)
    with pytest.warns(UserWarning, match="estimated noise level is zero"):
        np.testing.assert_array_equal(ps.denoise(image), image)


def test_a_fitted_weight_is_taken_at_the_noise_level_of_the_image(
    noisy: np.ndarray, prior: ps.PatchPrior
) -> None:
    weighted = prior.with_score_weight({1.0: 0.1, SIGMA: 0.9})
    expected = noisy + 0.9 * (ps.denoise(noisy, SIGMA, prior=prior) - noisy)
    assert np.abs(ps.denoise(noisy, SIGMA, prior=weighted) - expected).max() < 1e-4


def test_a_bfloat16_tensor_is_taken_at_its_values(noisy: np.ndarray) -> None:
    image = torch.from_numpy(noisy).bfloat16()
    assert np.array_equal(ps.denoise(image, SIGMA), ps.denoise(image.float().numpy(), SIGMA))


def test_the_image_given_is_not_changed(noisy: np.ndarray) -> None:
    before = noisy.copy()
    ps.denoise(noisy, SIGMA)
    np.testing.assert_array_equal(noisy, before)


def test_a_prior_is_not_moved_when_a_device_is_named(noisy: np.ndarray, prior: ps.PatchPrior) -> None:
    np.testing.assert_array_equal(
        ps.denoise(noisy, SIGMA, prior=prior, device="cpu"), ps.denoise(noisy, SIGMA, prior=prior)
    )


@pytest.mark.parametrize("shape", [(3, 40), (1, 1), (24, 24), (10, 12)])
def test_an_image_smaller_than_a_patch_is_denoised(shape: tuple[int, int]) -> None:
    """It is that of the mirrored image, twice as large in both directions, in its corner."""
    noisy = 100 + SIGMA * np.random.default_rng(0).standard_normal(shape)
    mirrored = np.pad(noisy, ((0, shape[0]), (0, shape[1])), mode="symmetric")
    expected = ps.denoise(mirrored, SIGMA)[: shape[0], : shape[1]]
    assert np.abs(ps.denoise(noisy, SIGMA) - expected).max() < 1e-3


BAD_IMAGES = {
    "nan": (np.where(np.eye(20) > 0, np.nan, 1.0), r"20 NaN or infinite values of 400.*\(0, 0\)"),
    "infinite": (np.where(np.eye(20) > 0, np.inf, 1.0), "NaN or infinite"),
    "empty": (np.zeros((0, 20)), r"shape \(0, 20\): there are no pixels"),
    "one-dimensional": (np.zeros(20), r"shape \(20,\); expected two dimensions"),
    "five-dimensional": (np.zeros((1, 1, 1, 20, 20)), "expected two dimensions"),
    "volume": (np.zeros((20, 20, 20)), "say which axis holds the channels"),
    "complex": (np.zeros((20, 20), complex), "dtype complex128: denoise the real and the imaginary"),
    "boolean": (np.zeros((20, 20), bool), "dtype bool: a mask has no noise level"),
    "object": (np.full((20, 20), None), "dtype object: expected integers or floating-point"),
    "text": (np.full((20, 20), "a"), "dtype <U1: expected integers or floating-point"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_images_are_refused(case: str) -> None:
    image, message = BAD_IMAGES[case]
    with pytest.raises(ps.InputError, match=message):
        ps.denoise(image, 0.1)


BAD_SIGMAS = {
    "zero": (0, "sigma is 0; a noise level is positive"),
    "negative": (-1.0, "sigma is -1.0; a noise level is positive"),
    "nan": (np.nan, "sigma is nan; a noise level is positive"),
    "infinite": (np.inf, "sigma is inf; a noise level is positive"),
    "one per pixel": (np.ones((20, 20)), "expected one number"),
    "list": ([1.0, 2.0], "expected one number"),
    "text": ("25", "sigma is '25'; expected one number"),
    "boolean": (True, "sigma is True; expected one number"),
}


@pytest.mark.parametrize("case", BAD_SIGMAS)
def test_bad_noise_levels_are_refused(case: str) -> None:
    sigma, message = BAD_SIGMAS[case]
    with pytest.raises(ps.InputError, match=message):
        ps.denoise(np.random.default_rng(0).random((20, 20)), sigma)


@pytest.mark.parametrize(("shape", "axis"), [((20, 20), 0), ((3, 20, 20), 3), ((2, 3, 20, 20), 1)])
def test_a_channel_axis_that_is_not_there_is_refused(shape: tuple[int, ...], axis: int) -> None:
    with pytest.raises(ps.InputError, match="expected three dimensions and one of them"):
        ps.denoise(np.zeros(shape), 1.0, channel_axis=axis)


def test_unknown_priors_and_devices_are_refused(noisy: np.ndarray) -> None:
    with pytest.raises(ps.InputError, match=r"no prior 'unnatural': .*natural-gray"):
        ps.denoise(noisy, SIGMA, prior="unnatural")
    with pytest.raises(ps.InputError, match="device 'abacus' cannot be used here"):
        ps.denoise(noisy, SIGMA, device="abacus")
    if not torch.cuda.is_available():
        with pytest.raises(ps.InputError, match=r"device 'cuda' cannot be used .* devices found: 0"):
            ps.denoise(noisy, SIGMA, device="cuda")


def test_the_standard_deviation_is_that_of_posterior_samples(
    noisy: np.ndarray, prior: ps.PatchPrior
) -> None:
    estimate, std = ps.denoise(
        noisy, SIGMA, prior=prior, return_std=True, samples=5,
        generator=torch.Generator().manual_seed(3), progress=False,
    )  # fmt: skip
    np.testing.assert_array_equal(estimate, ps.denoise(noisy, SIGMA, prior=prior))
    chain = ps.sample_denoised(
        prior, torch.from_numpy(noisy)[None, None], SIGMA, 5,
        generator=torch.Generator().manual_seed(3), progress=False,
    )  # fmt: skip
    expected = chain.samples.std(0)[0, 0].numpy()
    np.testing.assert_allclose(std, expected, rtol=1e-4, atol=1e-4)


def test_the_standard_deviation_has_the_shape_and_unit_of_a_colour_image(
    noisy: np.ndarray, prior: ps.PatchPrior
) -> None:
    image = np.stack([noisy, noisy[::-1], noisy], 0)[:, :30, :20]
    settings = {"prior": prior, "channel_axis": 0, "return_std": True, "samples": 3, "progress": False}
    _, std = ps.denoise(image, SIGMA, **settings)
    _, scaled = ps.denoise(10 * image + 3, 10 * SIGMA, **settings)
    assert std.shape == image.shape
    np.testing.assert_allclose(scaled, 10 * std, rtol=1e-3)


def test_one_sample_has_no_standard_deviation(noisy: np.ndarray) -> None:
    with pytest.raises(ps.InputError, match="two or more"):
        ps.denoise(noisy, SIGMA, return_std=True, samples=1)


def test_without_noise_there_is_no_doubt() -> None:
    with pytest.warns(UserWarning, match="noise level is zero"):
        estimate, std = ps.denoise(np.full((32, 32), 7.0), return_std=True)
    assert np.all(estimate == 7.0)
    assert np.all(std == 0.0)


def test_adaptation_keeps_colour_channels_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each channel is an image of its own, adapted to together."""
    from skimage.data import page

    monkeypatch.setitem(ps.adapt.__kwdefaults__, "max_steps", 15)
    clean = np.stack([page()[30:94, left : left + 64] for left in (50, 120, 190)], -1).astype(np.float64)
    noisy = clean + 20 * np.random.default_rng(0).standard_normal(clean.shape)
    prior = ps.load_prior("natural-gray-fast", "cpu")
    options = {"prior": prior, "channel_axis": -1, "progress": False}
    estimate = ps.denoise(noisy, 20.0, adapt=True, **options)
    adapted, _ = ps.adapt(prior, list(np.moveaxis(noisy, -1, 0)), 20.0, progress=False)
    assert adapted is not prior
    np.testing.assert_array_equal(estimate, ps.denoise(noisy, 20.0, prior=adapted, channel_axis=-1))


def test_adaptation_warns_of_what_is_wrong() -> None:
    """A level three times too high is told, and nothing is learned."""
    from skimage.data import astronaut

    clean = astronaut()[60:124, 180:244].astype(np.float64)
    noisy = clean + 20 * np.random.default_rng(0).standard_normal(clean.shape)
    prior = ps.load_prior("natural-gray-fast", "cpu")
    options = {"prior": prior, "channel_axis": -1, "progress": False}
    level = pytest.warns(UserWarning, match="times the variance that is expected")
    places = pytest.warns(UserWarning, match="times the variance in bright places")
    with level, places:
        wrong = ps.denoise(noisy, 60.0, adapt=True, **options)
    np.testing.assert_array_equal(wrong, ps.denoise(noisy, 60.0, prior=prior, channel_axis=-1))
