"""Phantoms against geometry done by another method, and mixtures against calculus."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

from patchscore.errors import InputError
from patchscore.evaluation import phantoms
from patchscore.evaluation.phantoms import ScalarMixture, disks, gamma_sample, rectangles

# A background of 0 and a foreground of 1: the image is the fraction of each pixel that is covered.
MASK = {"background": (0.0, 0.0), "foreground": (1.0, 0.0), "dtype": torch.float64}
# As documented, for the 16 x 16 images and smaller ones.
ROUNDING = 1e-15 * 16**2


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clipped(polygon: np.ndarray, axis: int, limit: float, sign: int) -> np.ndarray:
    """The part of a polygon (N, 2) where sign * coordinate <= sign * limit (Sutherland and Hodgman)."""
    corners = []
    for p, q in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        before, after = sign * (p[axis] - limit), sign * (q[axis] - limit)
        if before <= 0:
            corners.append(p)
        if before * after < 0:
            corners.append(p + (q - p) * before / (before - after))
    return np.reshape(corners, (-1, 2))


def covered(polygon: np.ndarray, size: int) -> np.ndarray:
    """The area of a polygon (N, 2) in every pixel of an image, by clipping and the shoelace formula."""
    area = np.zeros((size, size))
    for j in range(size):
        column = clipped(clipped(polygon, 0, j, -1), 0, j + 1, 1)
        for i in range(size):
            x, y = clipped(clipped(column, 1, i, -1), 1, i + 1, 1).T
            area[i, j] = 0.5 * (x @ np.roll(y, -1) - y @ np.roll(x, -1))
    return area


def rectangle(center: tuple[float, float], side: float, angle: float) -> np.ndarray:
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    corners = side / 2 * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    return corners @ turn.T + center


@pytest.mark.parametrize("angle", [0.0, 1e-9, 0.3, math.pi / 4, 1.2, math.pi / 2])
@pytest.mark.parametrize("center", [0.5, 0.43, 0.8])
def test_a_rectangle_covers_every_pixel_as_the_clipped_polygon_does(angle: float, center: float) -> None:
    size, side = 12, 0.55
    image = rectangles(
        1,
        size,
        center=(center, center),
        sides=(side, side),
        angle=(angle, angle),
        **MASK,
        generator=generator(),
    )
    expected = covered(rectangle((size * center, size * center), size * side, angle), size)
    assert np.abs(image[0, 0].numpy() - expected).max() < ROUNDING


@pytest.mark.parametrize("center", [0.5, 0.43, 0.8])
def test_a_disk_covers_every_pixel_as_a_polygon_of_many_sides_does(center: float) -> None:
    size, radius, corners = 12, 0.31 * 12, 400
    image = disks(1, size, center=(center, center), radius=(0.31, 0.31), **MASK, generator=generator())
    angles = 2 * math.pi * np.arange(corners) / corners
    inscribed = size * center + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    excess = image[0, 0].numpy() - covered(inscribed, size)
    missing = radius**2 * (math.pi - 0.5 * corners * math.sin(2 * math.pi / corners))
    assert excess.min() > -ROUNDING
    if center < 0.6:  # the disk is inside the image
        assert abs(excess.sum() - missing) < ROUNDING
    assert excess.max() < missing


@pytest.mark.parametrize("size", [16, 37])
def test_a_disk_inside_its_image_has_the_area_pi_r2(size: int) -> None:
    radius = 0.27
    image = disks(500, size, center=(0.28, 0.72), radius=(radius, radius), **MASK, generator=generator())
    area = image.sum((1, 2, 3))
    assert (area / (math.pi * (size * radius) ** 2) - 1).abs().max() < ROUNDING


def test_a_rectangle_inside_its_image_has_the_area_of_its_sides_for_every_orientation() -> None:
    image = rectangles(500, 16, center=(0.36, 0.64), sides=(0.5, 0.5), **MASK, generator=generator())
    area = image.sum((1, 2, 3))
    assert (area / (16 * 0.5) ** 2 - 1).abs().max() < ROUNDING


def test_the_mean_area_is_that_of_the_distribution_of_widths(z_score: Callable[..., float]) -> None:
    low, high = 0.1, 0.3
    disk = disks(4000, 16, radius=(low, high), **MASK, generator=generator()).mean((1, 2, 3))
    assert z_score(disk, math.pi * (low**2 + low * high + high**2) / 3) < 4
    box = rectangles(4000, 16, sides=(low, high), **MASK, generator=generator()).mean((1, 2, 3))
    assert z_score(box, ((low + high) / 2) ** 2) < 4


def test_every_centre_and_orientation_is_as_likely_as_its_mirror(z_score: Callable[..., float]) -> None:
    for draw in (disks, rectangles):
        image = draw(4000, 16, **MASK, generator=generator())[:, 0]
        for mirrored in (image.flip(1), image.flip(2), image.mT):
            weight = torch.linspace(0, 1, 256, dtype=torch.float64).reshape(16, 16)
            assert z_score(((image - mirrored) * weight).sum((1, 2)), 0.0) < 4


def test_a_side_in_the_middle_of_pixels_covers_exactly_half_of_them() -> None:
    # Half a side of 16/4 about a centre of 8.5: the sides lie at 6.5 and 10.5.
    image = rectangles(
        1,
        center=(8.5 / 16, 8.5 / 16),
        sides=(1 / 4, 1 / 4),
        angle=(0.0, 0.0),
        **MASK,
        generator=generator(),
    )[0, 0]
    profile = torch.zeros(16, dtype=torch.float64)
    profile[6:11] = torch.tensor([0.5, 1, 1, 1, 0.5])
    assert torch.equal(image, profile[:, None] * profile)


def test_pixels_away_from_the_edge_have_exactly_the_two_values() -> None:
    for draw in (disks, rectangles):
        image = draw(2000, 16, **MASK, generator=generator())
        assert image.min() == 0
        assert image.max() == 1
        partial = (image > ROUNDING) & (image < 1 - ROUNDING)
        # A convex outline enters a pixel where it crosses one of 17 + 17 lines, each at most twice.
        assert partial.sum((1, 2, 3)).max() <= 68


@pytest.mark.parametrize("draw", [disks, rectangles])
def test_background_and_foreground_are_independent_normal_numbers(
    draw: Callable[..., Tensor], z_score: Callable[..., float]
) -> None:
    width = {"radius": (0.2, 0.3)} if draw is disks else {"sides": (0.4, 0.6)}
    image = draw(20_000, 16, center=(0.5, 0.5), **width, dtype=torch.float64, generator=generator())
    background, foreground = image[:, 0, 0, 0], image[:, 0, 8, 8]
    for values, std in ((background, 0.1), (foreground, 0.03)):
        assert z_score(values, 1.0) < 4
        assert z_score((values - 1) ** 2, std**2) < 4
        assert z_score((values - 1) ** 4, 3 * std**4) < 4
    assert z_score((background - 1) * (foreground - 1), 0.0) < 4


@pytest.mark.parametrize("draw", [disks, rectangles])
def test_the_seed_decides_and_the_chunks_do_not(
    draw: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = draw(300, 20, generator=generator())
    assert images.shape == (300, 1, 20, 20)
    assert images.dtype == torch.float32
    assert not torch.equal(images, draw(300, 20, generator=generator(1)))
    exact = draw(300, 20, dtype=torch.float64, generator=generator())
    assert torch.equal(images, exact.float())
    for corners in (1, 7 * 21**2, 10**9):
        monkeypatch.setattr(phantoms, "CORNERS_PER_CHUNK", corners)
        assert torch.equal(images, draw(300, 20, generator=generator()))


def test_a_width_of_zero_covers_nothing() -> None:
    assert not disks(3, radius=(0.0, 0.0), **MASK, generator=generator()).any()
    assert not rectangles(3, sides=(0.0, 0.0), **MASK, generator=generator()).any()


@pytest.mark.parametrize(
    ("draw", "options", "message"),
    [
        (disks, {"count": 0}, "count is 0; expected a positive whole number"),
        (rectangles, {"size": -4}, "size is -4; expected a positive whole number"),
        (disks, {"radius": (0.3, 0.1)}, r"radius is \(0.3, 0.1\); expected a range, lowest first"),
        (disks, {"center": (-0.1, 0.5)}, r"center is \(-0.1, 0.5\); expected a range"),
        (rectangles, {"sides": (0.1, math.inf)}, r"sides is \(0.1, inf\); expected a range"),
        (rectangles, {"angle": (0.0, 3.2)}, r"angle is \(0.0, 3.2\); expected a range in radians"),
        (disks, {"background": (1.0, -0.1)}, r"background is \(1.0, -0.1\); expected a mean"),
        (rectangles, {"foreground": (math.nan, 0.1)}, r"foreground is \(nan, 0.1\); expected a mean"),
    ],
)
def test_settings_that_make_no_image(
    draw: Callable[..., Tensor], options: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        draw(**{"count": 1, **options}, generator=generator())


def test_gamma_samples_have_the_moments_of_the_density(z_score: Callable[..., float]) -> None:
    shape, scale = 2.5, 0.8
    x = gamma_sample(100_000, shape=shape, scale=scale, generator=generator())
    assert x.dtype == torch.float64
    assert z_score(x, shape * scale) < 4
    assert z_score((x - shape * scale) ** 2, shape * scale**2) < 4
    assert z_score((-x / scale).exp(), 2**-shape) < 4  # the Laplace transform
    assert torch.equal(x, gamma_sample(100_000, shape=shape, scale=scale, generator=generator()))


@pytest.mark.parametrize("name", ["count", "shape", "scale"])
def test_gamma_parameters_are_positive(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} is 0; expected a positive number"):
        gamma_sample(**{"count": 5, "shape": 1.0, "scale": 1.0, name: 0}, generator=generator())


@pytest.fixture
def mixture() -> ScalarMixture:
    """Three components; the weights do not add up to one."""
    numbers = ([1.0, 3.0, 2.0], [-2.0, 0.5, 3.0], [0.4, 0.2, 1.1])
    return ScalarMixture(*(torch.tensor(row, dtype=torch.float64) for row in numbers))


@pytest.mark.parametrize("sigma", [0.0, 0.3, 5.0])
def test_the_score_is_the_gradient_of_the_log_density(mixture: ScalarMixture, sigma: float) -> None:
    x = torch.linspace(-60, 60, 2001, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(mixture.log_prob(x, sigma).sum(), x)
    assert torch.allclose(mixture.score(x, sigma), gradient, rtol=1e-10, atol=1e-10)


def test_the_blurred_density_is_the_convolution_with_the_noise(mixture: ScalarMixture) -> None:
    def density(x: float) -> float:
        return mixture.log_prob(torch.tensor(x, dtype=torch.float64)).exp().item()

    assert abs(quad(density, -15, 15, points=[-2, 0.5, 3], epsabs=1e-12)[0] - 1) < 1e-10
    for sigma in (0.3, 1.0):
        for y in (-2.5, 0.0, 1.7):
            convolved, _ = quad(
                lambda x: density(x) * math.exp(-0.5 * ((y - x) / sigma) ** 2),  # noqa: B023
                -15,
                15,
                points=[-2, 0.5, 3, y],
                epsabs=1e-12,
                limit=200,
            )
            found = mixture.log_prob(torch.tensor(y, dtype=torch.float64), sigma).exp().item()
            assert abs(found - convolved / (sigma * math.sqrt(2 * math.pi))) < 1e-10


def test_every_point_may_have_its_own_noise_level(mixture: ScalarMixture) -> None:
    x = torch.tensor([[-1.0, 0.0, 2.0]], dtype=torch.float64)
    sigma = torch.tensor([[0.0], [0.5]], dtype=torch.float64)
    for function in (mixture.log_prob, mixture.score):
        each = torch.stack([function(x[0], level.item()) for level in sigma])
        assert torch.equal(function(x, sigma), each)


def test_samples_of_a_mixture_have_its_moments(
    mixture: ScalarMixture, z_score: Callable[..., float]
) -> None:
    x = mixture.sample(100_000, generator=generator())
    w = mixture.weights / mixture.weights.sum()
    assert z_score(x, (w @ mixture.means).item()) < 4
    assert z_score(x**2, (w @ (mixture.means**2 + mixture.stds**2)).item()) < 4
    # Stein's identity: E[score(x)] = 0 and E[x score(x)] = -1.
    assert z_score(mixture.score(x), 0.0) < 4
    assert z_score(x * mixture.score(x), -1.0) < 4
    assert torch.equal(x, mixture.sample(100_000, generator=generator()))


def test_a_mixture_can_be_fitted(mixture: ScalarMixture) -> None:
    """At the parameters that drew the samples, the expected gradient of log p in them is zero."""
    parameters = [t.clone().requires_grad_() for t in (mixture.weights, mixture.means, mixture.stds)]
    x = mixture.sample(20_000, generator=generator())
    log_prob = ScalarMixture(*parameters).log_prob(x)
    # The scores of 200 batches of 100 samples.
    gradients = [
        torch.autograd.grad(part.sum(), parameters, retain_graph=True) for part in log_prob.split(100)
    ]
    stacked = torch.stack([torch.cat(batch) for batch in gradients])
    z = stacked.mean(0) / (stacked.std(0) / math.sqrt(len(stacked)))
    assert z.abs().max() < 4


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (([1.0], [0.0, 1.0], [1.0]), "expected one number of each per component"),
        (([], [], []), "expected one number of each per component"),
        (([1.0, 0.0], [0.0, 1.0], [1.0, 1.0]), r"weights is \[1.0, 0.0\]; expected positive"),
        (([1.0], [math.nan], [1.0]), r"means is \[nan\]; expected finite"),
        (([1.0], [0.0], [-1.0]), r"stds is \[-1.0\]; expected positive"),
    ],
)
def test_a_mixture_that_is_none(numbers: tuple[list[float], ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ScalarMixture(*(torch.tensor(row) for row in numbers))


def test_a_noise_level_is_not_negative(mixture: ScalarMixture) -> None:
    with pytest.raises(InputError, match=r"sigma is -0.5; a noise level is finite and not negative"):
        mixture.log_prob(torch.zeros(1, dtype=torch.float64), -0.5)
