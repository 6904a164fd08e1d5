"""Total variation of any linear measurement, against scikit-image and against its own limit."""

import math

import numpy as np
import pytest
import torch
from skimage.data import camera
from skimage.restoration import denoise_tv_chambolle
from torch import Tensor

import patchscore as ps
from patchscore.evaluation.baselines import total_variation_oracle
from patchscore.evaluation.metrics import psnr
from patchscore.evaluation.total_variation import (
    TotalVariationSolver,
    differences,
    differences_adjoint,
    oracle_weight,
    shrink,
)

AGREEMENT = 0.02  # dB
NOISE = 0.1
CLEAN = camera()[100:164, 150:214] / 255.0
NOISY = CLEAN + NOISE * np.random.default_rng(0).standard_normal(CLEAN.shape)


def tensor(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image)[None, None]


def quality(x: Tensor | np.ndarray) -> float:
    return psnr(CLEAN, np.asarray(x).reshape(CLEAN.shape), data_range=1)


class Fourier:
    """Some columns of the Fourier transform of an image in two channels, real and imaginary."""

    def __init__(self, width: int) -> None:
        self.kept = torch.rand(width, generator=torch.Generator().manual_seed(0)) < 0.4
        self.kept[[0, 1, -1]] = True

    def A(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.fft2(torch.complex(x[:, 0], x[:, 1]), norm="ortho") * self.kept
        return torch.view_as_real(spectrum).movedim(-1, 1)

    def A_adjoint(self, y: Tensor) -> Tensor:
        image = torch.fft.ifft2(torch.complex(y[:, 0], y[:, 1]) * self.kept, norm="ortho")
        return torch.view_as_real(image).movedim(-1, 1)


def test_differences_have_their_adjoint() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, 5, 7, dtype=torch.float64, generator=generator)
    z = torch.randn(1, 2, 2, 5, 7, dtype=torch.float64, generator=generator)
    forward, backward = (differences(x) * z).sum(), (x * differences_adjoint(z)).sum()
    assert forward.item() == pytest.approx(backward.item(), rel=1e-12)


def test_shrinking_shortens_the_vector_of_a_pixel_over_all_channels() -> None:
    z = torch.tensor([3.0, 0.0, 0.0, 4.0], dtype=torch.float64).reshape(1, 2, 2, 1, 1)
    assert shrink(z, 2.0).flatten().tolist() == pytest.approx([1.8, 0, 0, 2.4], rel=1e-12)
    assert shrink(z, 5.0).abs().max() == 0


@pytest.mark.parametrize("weight", [0.03, 0.12, 0.3])
def test_it_denoises_as_scikit_image_does(weight: float) -> None:
    ours = TotalVariationSolver(tensor(NOISY), ps.Identity()).solve(weight)
    theirs = denoise_tv_chambolle(NOISY, weight=weight, eps=1e-9, max_num_iter=20_000)
    assert abs(quality(ours) - quality(theirs)) < AGREEMENT

    def objective(x: Tensor) -> float:
        variation = differences(x).square().sum((1, 2)).sqrt().sum()
        return float((x - tensor(NOISY)).square().sum() / 2 + weight * variation)

    assert objective(ours) < (1 + 1e-3) * objective(tensor(theirs))


def test_the_oracle_weight_is_as_good_as_that_of_a_bounded_search() -> None:
    solver = TotalVariationSolver(tensor(NOISY), ps.Identity())
    weight, x = oracle_weight(solver, lambda x: -quality(x), NOISE)
    assert 0.2 * NOISE < weight < 2 * NOISE
    assert abs(quality(x) - quality(total_variation_oracle(NOISY, NOISE, CLEAN))) < AGREEMENT


@pytest.mark.parametrize("start", [1e-3, 10.0])
def test_the_oracle_weight_is_found_from_far_away(start: float) -> None:
    solver = TotalVariationSolver(tensor(NOISY), ps.Identity())
    near, _ = oracle_weight(solver, lambda x: -quality(x), NOISE)
    far, _ = oracle_weight(
        TotalVariationSolver(tensor(NOISY), ps.Identity()), lambda x: -quality(x), start * NOISE
    )
    assert abs(math.log(far / near)) < 0.1


def test_it_converges_where_pixels_are_missing() -> None:
    """The last steps change less than what PSNR is compared to."""
    mask = torch.rand(1, 1, *CLEAN.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    y = tensor(NOISY) * mask
    solver = TotalVariationSolver(y, ps.Mask(mask))
    coarse = quality(solver.solve(0.1))
    fine = quality(solver.solve(0.1, tolerance=1e-6, max_steps=5000))
    assert abs(coarse - fine) < AGREEMENT
    warm = TotalVariationSolver(y, ps.Mask(mask))
    warm.solve(0.3)
    assert abs(quality(warm.solve(0.1)) - fine) < AGREEMENT


def test_a_complex_image_has_no_preferred_phase() -> None:
    """A turn of all measurements by a phase turns the solution."""
    clean = tensor(CLEAN[:32, :32])
    operator = Fourier(32)
    y = operator.A(torch.cat([clean, 0 * clean], dim=1))

    def turned(x: Tensor) -> Tensor:
        c, s = math.cos(1.0), math.sin(1.0)
        return torch.stack([c * x[:, 0] - s * x[:, 1], s * x[:, 0] + c * x[:, 1]], dim=1)

    def solution(y: Tensor) -> Tensor:
        return TotalVariationSolver(y, operator).solve(0.01, tolerance=1e-5)

    x = solution(y)
    assert (solution(turned(y)) - turned(x)).abs().max() < 1e-3
    errors = [(z.norm(dim=1) - clean[:, 0]).norm() for z in (x, operator.A_adjoint(y))]
    assert errors[0] < 0.8 * errors[1]
