"""One image with its noise level, for every function that takes one: its doubt is passed on."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage import data

import patchscore as ps
from patchscore import cli, denoising
from patchscore.adaptation.adapt import Report, adapt
from patchscore.measurements.noise import estimated_sigma, estimated_sigma_where
from patchscore.measurements.noisy_image import GIVEN_ERROR, NoisyImage

SIGMA = 20.0


@pytest.fixture(scope="module")
def wall() -> np.ndarray:
    """A pattern that repeats: there is a gain, but one that an error of 10 % could simulate."""
    clean = data.brick()[:128, :128].astype(np.float64)
    return clean + SIGMA * np.random.default_rng(0).standard_normal(clean.shape)


@pytest.fixture(scope="module")
def prior() -> ps.PatchPrior:
    return ps.load_prior("natural-gray-fast", "cpu")


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[Report]:
    """What the adaptations of a test report, each of 15 steps."""
    found: list[Report] = []

    def limited(prior: ps.PatchPrior, y: object, *arguments: object, **options: object) -> ps.Adapted:
        options = options | {"max_steps": 15, "max_seconds": math.inf, "progress": False}
        result = adapt(prior, y, *arguments, **options)  # type: ignore[arg-type]
        found.append(result.report)
        return result

    monkeypatch.setattr(denoising, "adapt_prior", limited)
    monkeypatch.setattr(cli, "adapt", limited)
    return found


def test_an_estimated_level_is_not_taken_for_a_given_one(
    wall: np.ndarray, prior: ps.PatchPrior, reports: list[Report], tmp_path: Path
) -> None:
    """By denoise and by the command line: the doubt, and so the decision, are those of the estimate."""
    limits = {"max_steps": 15, "max_seconds": math.inf, "progress": False}
    adapted, expected = adapt(prior, wall, **limits)
    noise = ps.estimate_noise(wall)
    _, told = adapt(prior, wall, noise.sigma, **limits)
    ratio = expected.checks[0].doubt / told.checks[0].doubt
    assert noise.error > 2 * GIVEN_ERROR
    assert ratio == pytest.approx(noise.error / GIVEN_ERROR, rel=1e-12)
    assert told.adapted

    estimate = ps.denoise(wall, prior=prior, adapt=True, progress=False)
    np.testing.assert_array_equal(estimate, ps.denoise(wall, noise, prior=adapted))
    np.save(tmp_path / "noisy.npy", wall)
    command = f"denoise {tmp_path}/noisy.npy {tmp_path}/clean.npy --prior natural-gray-fast --adapt"
    assert cli.main(command.split()) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "clean.npy"), estimate)
    for report in reports:
        assert report.checks == expected.checks
        assert (report.adapted, report.sigmas) == (expected.adapted, expected.sigmas)
    assert len(reports) == 2


def test_every_door_takes_a_noisy_image(wall: np.ndarray, prior: ps.PatchPrior) -> None:
    noisy = NoisyImage.of(wall, SIGMA)
    np.testing.assert_array_equal(ps.denoise(noisy, prior=prior), ps.denoise(wall, SIGMA, prior=prior))
    assert ps.surprise(prior, noisy).value == ps.surprise(prior, wall, SIGMA).value
    one, other = (
        adapt(prior, *given, max_steps=1, progress=False).report.checks  # type: ignore[arg-type]
        for given in ((noisy,), (wall, SIGMA))
    )
    assert one == other


@pytest.mark.parametrize(
    ("sigma", "stated", "error"), [(None, None, 0.1), (2.0, None, 0.005), (2.0, 0.3, 0.3)]
)
def test_the_doubt_is_that_of_how_the_level_is_known(
    sigma: float | None, stated: float | None, error: float, wall: np.ndarray
) -> None:
    noisy = NoisyImage.of(wall, sigma, sigma_error=stated)
    assert noisy.sigma_error == error
    assert noisy.sigma == (sigma or estimated_sigma(wall))


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_a_prior_sees_units_of_the_noise_and_the_caller_his_own(axis: int, wall: np.ndarray) -> None:
    """There and back, exactly up to rounding, for each kind of prior and each layout."""
    colour = np.stack([wall, wall[::-1], 2 * wall], axis)
    noisy = NoisyImage.of(colour, SIGMA, channel_axis=axis)
    x = torch.from_numpy(np.moveaxis(colour, axis, 0).copy())
    for network, invariant, batch in (
        (ps.PatchEnergy(3).double(), True, 3),
        (ps.PatchEnergy(3, channels=3).double(), True, 1),
        (ps.PatchEnergy(3, scale_invariant=False, brightness_invariant=False).double(), False, 3),
    ):
        seen = noisy.seen_by(ps.PatchPrior(network))
        expected = (x - np.median(colour)) / SIGMA if invariant else x
        assert seen.y.shape[:2] == (batch, 3 // batch)
        torch.testing.assert_close(seen.y.view(x.shape), expected, rtol=0, atol=1e-10)
        assert seen.sigma == (1 if invariant else SIGMA)
        np.testing.assert_allclose(seen.estimate(seen.y), colour, rtol=0, atol=1e-10)
        ones = seen.deviation(torch.ones_like(seen.y))
        np.testing.assert_allclose(ones, np.full(colour.shape, seen.unit), rtol=1e-12)


def test_errors_teach(wall: np.ndarray) -> None:
    noisy = NoisyImage.of(np.stack([wall, wall]), SIGMA, channel_axis=0)
    with pytest.raises(ps.InputError, match=r"has 2 channel\(s\) and the prior 3; use a gray prior"):
        noisy.split(3)
    for options in ({"sigma": 1.0}, {"channel_axis": 0}, {"sigma_error": 0.1}):
        with pytest.raises(ps.InputError, match="a NoisyImage has its own noise level and channels"):
            NoisyImage.of(noisy, **options)  # type: ignore[arg-type]
    with pytest.raises(ps.InputError, match="no noise was found in y"):
        ps.surprise(ps.load_prior("natural-gray-fast", "cpu"), np.ones((64, 64)))


@pytest.mark.parametrize("shape", [(120, 160), (120, 160, 3)])
def test_the_noise_of_the_pixels_that_are_seen(shape: tuple[int, ...]) -> None:
    """A plane has no diagonal coefficients, so only the noise remains."""
    generator = np.random.default_rng(0)
    rows, columns = np.indices(shape[:2])
    seen = generator.random(shape[:2]) < 0.7
    plane = (2.0 * rows + 3.0 * columns).reshape(*shape[:2], *[1] * (len(shape) - 2))
    image = plane + 5 * generator.standard_normal(shape)
    image[~seen] = 1e6
    blocks = 0.7**4 * image.size
    # The standard error of a median of |N(0, 1)| is 1 / (2 f sqrt n), f its density there. Neighbouring
    # blocks share pixels, which no more than doubles the variance.
    error = 5 * 2**0.5 / (2 * 0.6356 * blocks**0.5) / 0.6745
    assert abs(estimated_sigma_where(image, seen) - 5) < 4 * error


def test_too_few_pixels_to_estimate_noise_from() -> None:
    with pytest.raises(ps.InputError, match="only 81 blocks"):
        estimated_sigma_where(np.zeros((10, 10)), np.ones((10, 10), bool))
