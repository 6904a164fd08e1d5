"""The assembly rules against their definitions and against fields whose score is known."""

from itertools import product

import pytest
import torch
from torch import Tensor

import patchscore as ps
from patchscore.priors.assembly import Partition
from patchscore.priors.gaussian import GaussianPatches

SIGMA = 0.6
TINY = 1e-9


@pytest.fixture
def clique(covariance: Tensor) -> GaussianPatches:
    return GaussianPatches((3, 3), covariance, mean=torch.linspace(-1, 1, 9, dtype=torch.float64))


@pytest.fixture
def covariance() -> Tensor:
    """Of a stationary field, so that the marginal of a part does not depend on where it is."""
    i = torch.arange(9)
    row, column = i // 3, i % 3
    distance = (row[:, None] - row).abs() + 0.5 * (column[:, None] - column).abs()
    return torch.exp(-distance.double())


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 1, 7, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def windows(x: Tensor, boundary: str) -> dict[tuple[int, int], Tensor]:
    """The 3 x 3 patch around every pixel, by loops."""
    mode = {"periodic": "wrap", "symmetric": "symmetric"}[boundary]
    import numpy as np

    padded = torch.from_numpy(np.pad(x.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)), mode=mode))
    return {
        (i, j): padded[..., i : i + 3, j : j + 3].reshape(len(x), -1, 1)
        for i, j in product(range(x.shape[-2]), range(x.shape[-1]))
    }


@pytest.mark.parametrize("boundary", ["periodic", "symmetric"])
def test_center_takes_the_central_score_of_the_patch_around_a_pixel(clique, x, boundary) -> None:
    score = ps.PatchPrior(clique, assembly="center", boundary=boundary).score(x, SIGMA)
    sigma = torch.full((2, 1, 1), SIGMA, dtype=torch.float64)
    for (i, j), patch in windows(x, boundary).items():
        expected = clique.score(patch, sigma)[:, 4, 0]
        assert (score[:, 0, i, j] - expected).abs().max() < 1e-10


def test_center_is_the_posterior_mean_given_the_patch(clique, x) -> None:
    """Tweedie for one pixel: mu_i + C_i (C + sigma^2 I)^-1 (v - mu), the Wiener filter of its patch."""
    denoised = ps.PatchPrior(clique, assembly="center", boundary="periodic").denoise(x, SIGMA)
    gain = clique.covariance[4] @ torch.linalg.inv(clique.covariance + SIGMA**2 * torch.eye(9).double())
    for (i, j), patch in windows(x, "periodic").items():
        expected = clique.mean[4] + (patch[..., 0] - clique.mean) @ gain
        assert (denoised[:, 0, i, j] - expected).abs().max() < 1e-10


@pytest.mark.parametrize("boundary", ["periodic", "symmetric"])
def test_a_tile_of_a_partition_is_denoised_by_itself(clique, x, boundary) -> None:
    score = ps.PatchPrior(clique, assembly=Partition((1, 2)), boundary=boundary).score(x, SIGMA)
    sigma = torch.full((2, 1, 1), SIGMA, dtype=torch.float64)
    tile = x[..., 1:4, 2:5].reshape(2, 9, 1)
    expected = clique.score(tile, sigma).view(2, 1, 3, 3)
    assert (score[..., 1:4, 2:5] - expected).abs().max() < 1e-10


def test_partitions_average_to_the_mean_of_overlapping_patches(clique, x) -> None:
    scores = [
        ps.PatchPrior(clique, assembly=Partition(offset), boundary="periodic").score(x, SIGMA)
        for offset in product(range(3), range(3))
    ]
    mean = ps.PatchPrior(clique, assembly="mean", boundary="periodic").score(x, SIGMA)
    assert (torch.stack(scores).mean(0) - mean).abs().max() < 1e-10


def test_random_offsets_are_uniform_and_reproducible(clique) -> None:
    generator = torch.Generator().manual_seed(0)
    offsets = [Partition.random(clique.patch_shape, generator).offset for _ in range(9 * 200)]
    counts = torch.tensor([offsets.count(o) for o in product(range(3), range(3))]).double()
    # Each count is binomial with mean 200 and variance 200 * 8/9.
    assert ((counts - 200) / (200 * 8 / 9) ** 0.5).abs().max() < 4
    again = Partition.random(clique.patch_shape, torch.Generator().manual_seed(0)).offset
    assert again == offsets[0]


def chain(length: int, correlation: float) -> tuple[Tensor, Tensor]:
    """The covariance of an open first-order Gauss-Markov chain, and its exact precision."""
    i = torch.arange(length)
    covariance = correlation ** (i[:, None] - i).abs().double()
    return covariance, torch.linalg.inv(covariance)


@pytest.mark.parametrize("correlation", [0.3, 0.9])
@pytest.mark.parametrize("horizontal", [True, False])
def test_kikuchi_is_exact_on_an_open_chain_of_pairs(correlation: float, horizontal: bool) -> None:
    covariance, precision = chain(12, correlation)
    shape = (1, 2) if horizontal else (2, 1)
    pairs = GaussianPatches(shape, covariance[:2, :2])
    generator = torch.Generator().manual_seed(0)
    x = (
        torch.randn(3, 12, generator=generator, dtype=torch.float64)
        @ torch.linalg.cholesky(covariance).T
    )
    image = x.view(3, 1, 1, 12) if horizontal else x.view(3, 1, 12, 1)

    def error(assembly: str) -> float:
        pairs.trained_on = None  # also the sum, which counts every pixel twice
        score = ps.PatchPrior(pairs, assembly=assembly, boundary="open").score(image, TINY).flatten(1)
        exact = -x @ precision
        return float((score - exact).norm() / exact.norm())

    assert error("kikuchi") < 1e-8
    # -log p(x) is the sum over pairs minus the sum over the singles between them, so the sum has the
    # inner pixels too much, and the mean is half of that, but for the two ends.
    inner = torch.ones(12, dtype=torch.float64)
    inner[[0, -1]] = 0
    summed = precision + inner.diag()
    averaged = summed / (1 + inner[:, None])
    exact = (x @ precision).norm()
    for assembly, matrix in (("sum", summed), ("mean", averaged)):
        miss = (x @ (matrix - precision).T).norm() / exact
        assert miss > 0.15
        assert error(assembly) == pytest.approx(float(miss), rel=1e-6)


@pytest.mark.parametrize("boundary", ["periodic", "symmetric", "open"])
def test_the_score_of_kikuchi_is_a_gradient(clique, x, boundary) -> None:
    prior = ps.PatchPrior(clique, assembly="kikuchi", boundary=boundary, score_weight={0.1: 0.5, 1: 2})
    x = x.requires_grad_()
    (gradient,) = torch.autograd.grad(prior.log_prob(x, SIGMA).sum(), x)
    assert (gradient - prior.score(x, SIGMA)).abs().max() < 1e-10


def test_kikuchi_of_independent_pixels_is_exact(x) -> None:
    """The counting numbers of the regions around a pixel add up to one."""
    white = GaussianPatches((3, 3), 2 * torch.eye(9, dtype=torch.float64))
    for boundary in ("periodic", "symmetric", "open"):
        score = ps.PatchPrior(white, assembly="kikuchi", boundary=boundary).score(x, SIGMA)
        assert (score + x / (2 + SIGMA**2)).abs().max() < 1e-10


def test_score_weights_are_interpolated_in_the_logarithm(clique, x) -> None:
    plain = ps.PatchPrior(clique, assembly="mean")
    weighted = plain.with_score_weight({1.0: 3.0, 0.1: 1.0})
    for sigma, factor in ((0.01, 1.0), (0.1, 1.0), (0.1**0.5, 2.0), (1.0, 3.0), (7.0, 3.0)):
        expected = factor * plain.score(x, sigma)
        assert (weighted.score(x, sigma) - expected).abs().max() < 1e-10


def test_fitted_weights_undo_a_wrong_scale() -> None:
    """White images under patches that are wrong about the variance: alpha is a ratio of precisions."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(40, 1, 32, 32, generator=generator, dtype=torch.float64)
    wrong = GaussianPatches((3, 3), 4 * torch.eye(9, dtype=torch.float64))
    prior = ps.PatchPrior(wrong, assembly="mean")
    levels = [0.3, 1.0, 3.0]
    fitted = ps.fit_score_weight(prior, images, sigmas=levels, crop=32, crops=200, generator=generator)
    for sigma in levels:
        truth = (4 + sigma**2) / (1 + sigma**2)
        # alpha = -sum z y / sum y^2 / c with n = 200 * 32^2 draws, but only 40 * 32^2 different pixels:
        # its relative error is at most that of sum y^2 and of sum z y over these.
        correlation = sigma / (1 + sigma**2) ** 0.5
        error = ((1 + correlation**2) / correlation**2 / (40 * 32**2)) ** 0.5
        assert abs(fitted.score_weight[sigma] / truth - 1) < 4 * error


@pytest.mark.parametrize("assembly", ["mean", "center", "partition", "kikuchi"])
def test_patch_marginals_are_never_summed_and_cliques_never_averaged(clique, assembly) -> None:
    with pytest.raises(ps.InputError, match=r"trained on patches, .* not by 'sum'"):
        ps.PatchPrior(clique, assembly="sum")
    network = ps.PatchEnergy(patch_size=3, width=16)
    network.trained_on = "crops"
    with pytest.raises(ps.InputError, match=rf"trained on crops, .*'sum', not by '{assembly}'"):
        ps.PatchPrior(network, assembly=assembly)


def test_what_an_assembly_cannot_do_is_told(clique, x) -> None:
    with pytest.raises(
        ps.InputError, match="marginals of parts of a patch are not known for ConvEnergy"
    ):
        ps.PatchPrior(ps.PatchEnergy(patch_size=3, width=16), assembly="kikuchi")
    with pytest.raises(ps.InputError, match="reach beyond the border"):
        ps.PatchPrior(clique, assembly="partition", boundary="open").score(x, SIGMA)
    even = GaussianPatches((2, 3), torch.eye(6, dtype=torch.float64))
    with pytest.raises(ps.InputError, match="2 x 3 pixels have no central pixel"):
        ps.PatchPrior(even, assembly="center").score(x, SIGMA)
    for assembly in ("center", "partition"):
        with pytest.raises(ps.InputError, match=f"'{assembly}' is not the gradient of a density"):
            ps.PatchPrior(clique, assembly=assembly).log_prob(x, SIGMA)
    with pytest.raises(ps.InputError, match="expected one or more positive noise levels"):
        ps.fit_score_weight(ps.PatchPrior(clique, assembly="mean"), x, sigmas=[])
