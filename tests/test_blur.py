"""Blur, coarser pixels and their compositions: against SciPy, and as dense matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage, signal
from torch import Tensor

import patchscore as ps

SHAPE = 8, 9


def dense(apply, shape: tuple[int, ...]) -> Tensor:
    """The matrix of a linear map of images (1, 1, *shape)."""
    basis = torch.eye(int(np.prod(shape)), dtype=torch.float64)
    return torch.stack([apply(column.view(1, 1, *shape)).flatten() for column in basis], 1)


@pytest.fixture(params=[(3, 3), (2, 5), (4, 1), (1, 1)], ids=str)
def kernel(request, normal) -> Tensor:
    return normal(*request.param, seed=1)


def test_an_open_blur_is_a_convolution_where_the_kernel_fits(kernel, normal, error) -> None:
    x = normal(2, 3, *SHAPE)
    by_scipy = np.stack(
        [[signal.convolve2d(channel, kernel, mode="valid") for channel in image] for image in x]
    )
    assert error(ps.Blur(kernel).A(x), torch.from_numpy(by_scipy)) < 1e-10


def test_a_periodic_blur_is_centred(kernel, normal, error) -> None:
    x = normal(1, 1, *SHAPE)
    by_scipy = ndimage.convolve(x[0, 0].numpy(), kernel.numpy(), mode="wrap")
    blur = ps.Blur(kernel, "periodic")
    assert blur.frame(x) is x
    assert error(blur.A(x)[0, 0], torch.from_numpy(by_scipy)) < 1e-10


def test_the_frame_is_where_the_light_comes_from(kernel, normal, error) -> None:
    spike = torch.zeros_like(kernel)
    spike[kernel.shape[0] // 2, kernel.shape[1] // 2] = 1
    blur, x = ps.Blur(spike), normal(1, 1, *SHAPE)
    assert error(blur.A(x), blur.frame(x)) < 1e-10


OPERATORS = {
    "open": ps.Blur,
    "periodic": lambda kernel: ps.Blur(kernel, "periodic"),
    "masked": lambda kernel: ps.Product(ps.Mask(torch.arange(9) % 3 > 0), ps.Blur(kernel, "periodic")),
    "blocks of 1": lambda kernel: ps.Downsample(1),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_the_adjoint_is_the_transpose(name: str, kernel, normal, error) -> None:
    operator = OPERATORS[name](kernel)
    y = operator.A(normal(1, 1, *SHAPE))
    assert operator.A_adjoint(y).shape == (1, 1, *SHAPE)
    matrix = dense(operator.A, SHAPE)
    assert error(dense(operator.A_adjoint, tuple(y.shape[-2:])), matrix.T) < 1e-10
    ps.GaussianLikelihood(y, operator, noise_std=1.0)  # which checks the adjoint by itself


@pytest.mark.parametrize("factor", [2, 4])
def test_coarser_pixels_are_means_of_blocks(factor: int, normal, error) -> None:
    x, operator = normal(2, 3, 8, 12), ps.Downsample(factor)
    blocks = x.reshape(2, 3, 8 // factor, factor, 12 // factor, factor).mean((3, 5))
    assert error(operator.A(x), blocks) < 1e-10
    matrix = dense(operator.A, (8, 12))
    assert error(dense(operator.A_adjoint, (8 // factor, 12 // factor)), matrix.T) < 1e-10
    assert error(operator.A(operator.A_adjoint(blocks)) * factor**2, blocks) < 1e-10


def test_one_after_the_other(normal, error) -> None:
    blur, coarse = ps.Blur(normal(3, 3)), ps.Downsample(2)
    both, x = ps.Product(coarse, blur), normal(1, 1, 10, 12)
    assert error(both.A(x), coarse.A(blur.A(x))) < 1e-10
    assert error(dense(both.A_adjoint, (4, 5)), dense(both.A, (10, 12)).T) < 1e-10


def test_a_gaussian_blur(normal, error) -> None:
    blur = ps.Blur.gaussian(1.3, "periodic")
    assert blur.kernel.shape == (13, 13)
    assert blur.kernel.sum().item() == pytest.approx(1, abs=1e-12)
    x = normal(1, 1, 16, 20)
    by_scipy = ndimage.gaussian_filter(x[0, 0].numpy(), 1.3, mode="wrap", radius=6)
    assert error(blur.A(x)[0, 0], torch.from_numpy(by_scipy)) < 1e-10


def test_the_grid_may_change(normal, error) -> None:
    blur, x = ps.Blur.gaussian(0.7, "periodic"), normal(1, 1, 16, 20)
    wide = blur.A(x)
    assert error(blur.A(x[..., :16]), ps.Blur.gaussian(0.7, "periodic").A(x[..., :16])) < 1e-10
    assert error(blur.A(x), wide) < 1e-10
    single = blur.A(x.float())
    assert single.dtype == torch.float32
    assert error(single.double(), wide) < 1e-6


def test_what_does_not_fit_is_told(normal) -> None:
    for kernel in (normal(3), normal(3, 3) / 0, torch.eye(3, dtype=torch.complex64)):
        with pytest.raises(ps.InputError, match="the kernel is"):
            ps.Blur(kernel)
    with pytest.raises(ps.InputError, match="boundary is 'zero'"):
        ps.Blur(normal(3, 3), "zero")
    with pytest.raises(ps.InputError, match="12 x 3 and the image 8 x 9"):
        ps.Blur(normal(12, 3)).A(normal(1, 1, *SHAPE))
    with pytest.raises(ps.InputError, match="std is 0"):
        ps.Blur.gaussian(0)
    with pytest.raises(ps.InputError, match=r"factor is 1\.5"):
        ps.Downsample(1.5)
    with pytest.raises(ps.InputError, match=r"8 x 9 pixels.*factor 2"):
        ps.Downsample(2).A(normal(1, 1, *SHAPE))


@pytest.mark.parametrize("std", [1e6, 1e300])
def test_a_blur_larger_than_the_memory_is_refused(std):
    with pytest.raises(ps.InputError, match="GB of memory, and"):
        ps.Blur.gaussian(std)
