"""Our priors in deepinv: the same numbers as by hand, and its algorithms restore a photograph."""

import math
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from skimage.data import camera
from torch import Tensor

import patchscore as ps

deepinv = pytest.importorskip("deepinv")

NOISE, SIGMA = 0.03, 0.05
pytestmark = pytest.mark.filterwarnings("default")  # of deepinv itself


@pytest.fixture(scope="module")
def prior() -> ps.PatchPrior:
    return ps.load_prior("natural-gray-fast", device="cpu")


@pytest.fixture(scope="module")
def photograph() -> Tensor:
    return torch.tensor(camera()[100:164, 200:264] / 255, dtype=torch.float32)[None, None]


@pytest.fixture
def field() -> ps.GaussianCliques:
    return ps.GaussianCliques.exponential((6, 8), std=2.0, length=2.0, mean=1.0)


# By hand


@pytest.mark.parametrize(
    "sigma",
    [
        0.1,
        np.float64(0.1),
        torch.tensor(0.1),
        torch.tensor([0.1]),
        torch.tensor([0.1, 0.1]),
        torch.full((2, 1, 1, 1), 0.1),
    ],
    ids=lambda sigma: f"{type(sigma).__name__}{tuple(np.shape(sigma))}",
)
def test_a_noise_level_comes_in_any_shape(sigma, prior, normal, error) -> None:
    x = normal(2, 1, 12, 16).float()
    denoiser = ps.as_deepinv(prior)
    assert isinstance(denoiser, deepinv.models.Denoiser)
    assert error(denoiser(x, sigma), prior.denoise(x, 0.1)) < 1e-5


def test_an_image_without_noise_is_returned(prior, normal, error) -> None:
    x = normal(2, 1, 12, 16).float()
    denoiser = ps.as_deepinv(prior)
    assert torch.equal(denoiser(x, 0), x)
    mixed = denoiser(x, torch.tensor([0.0, 0.1]))
    assert torch.equal(mixed[0], x[0])
    assert error(mixed[1:], prior.denoise(x[1:], 0.1)) < 1e-5


def test_the_prior_follows_the_images_and_yours_stays(prior, normal, error) -> None:
    x = normal(2, 1, 12, 16)
    denoiser = ps.as_deepinv(prior)
    by_hand = ps.load_prior("natural-gray-fast", device="cpu").double().denoise(x, 0.1)
    for _ in range(2):
        assert denoiser(x, 0.1).dtype == torch.float64
        assert error(denoiser(x, 0.1), by_hand) < 1e-10
        assert error(denoiser(x.float(), 0.1).double(), by_hand) < 1e-5
    half = denoiser(x.bfloat16(), 0.1)
    assert half.dtype == torch.bfloat16
    assert prior.network.dtype == torch.float32


def test_a_gray_prior_sees_each_channel_by_itself(prior, normal, error) -> None:
    x, sigma = normal(2, 3, 12, 16), torch.tensor([0.1, 0.2])
    denoiser = ps.as_deepinv(prior)
    by_hand = torch.cat([denoiser(x[:, c : c + 1], sigma) for c in range(3)], 1)
    assert error(denoiser(x, sigma), by_hand) < 1e-10
    energy = sum(denoiser.prior().fn(x[:, c : c + 1], sigma) for c in range(3))
    assert error(denoiser.prior().fn(x, sigma), energy) < 1e-10
    colour = ps.load_prior("natural-color", device="cpu").double()
    assert error(ps.as_deepinv(colour)(x, sigma), colour.denoise(x, sigma)) < 1e-10
    with pytest.raises(ps.InputError, match="2 channels and the prior 3"):
        ps.as_deepinv(colour)(x[:, :2], sigma)


def test_complex_images_through_their_wrapper(prior, normal, error) -> None:
    x = torch.complex(normal(2, 1, 12, 16), normal(2, 1, 12, 16, seed=1))
    denoiser = ps.as_deepinv(prior)
    wrapped = deepinv.models.to_complex_denoiser(denoiser)
    by_hand = ps.ComplexPrior(ps.load_prior("natural-gray-fast", device="cpu").double())
    for sigma in (0.125, torch.tensor([0.125]), torch.full((1, 1, 1, 1), 0.125)):
        assert error(wrapped(x, sigma), by_hand.denoise(x, 0.125)) < 1e-10
    with pytest.raises(ps.InputError, match="to_complex_denoiser"):
        denoiser(x, 0.125)


@pytest.mark.parametrize("channels", [1, 2])
def test_the_gradient_is_minus_the_score_and_that_of_the_energy(
    channels: int, prior, normal, error
) -> None:
    x, sigma = normal(2, channels, 12, 16).requires_grad_(), torch.tensor([0.1, 0.2])
    energy = ps.as_deepinv(prior).prior()
    assert isinstance(energy, deepinv.optim.Prior)
    assert energy.explicit_prior
    score = ps.Channelwise(ps.load_prior("natural-gray-fast", device="cpu").double()).score
    gradient = energy.grad(x, sigma)
    assert error(gradient, -score(x, sigma)) < 1e-10
    value = energy.fn(x, sigma)
    assert value.shape == (2,)
    assert error(gradient, torch.autograd.grad(value.sum(), x)[0]) < 1e-10


def test_the_proximal_map_is_that_of_a_gaussian(field, normal, error) -> None:
    """x - mean, in every frequency times (S + sigma^2) / (S + sigma^2 + gamma)."""
    x, gamma, sigma = normal(2, 1, 6, 8), 0.7, 0.3
    variance = field.power_spectrum + sigma**2
    by_hand = 1.0 + torch.fft.ifft2(torch.fft.fft2(x - 1.0) * variance / (variance + gamma)).real
    found = ps.as_deepinv(field).prior().prox(
        x, sigma, gamma=gamma, max_iter_inter=5000, tol_inter=1e-13
    )  # fmt: skip
    assert error(found, by_hand) < 1e-10


def test_the_range_of_noise_levels(prior, field, normal) -> None:
    x = normal(2, 1, 12, 16)
    denoiser = ps.as_deepinv(prior)
    assert denoiser.trained_up_to == pytest.approx(60 / 255)
    start = np.linspace(denoiser.highest_sigma, 0, 3, dtype=np.float32)[0]
    assert denoiser(x, start).isfinite().all()
    for sigma in (80.0, torch.tensor([0.1, 80.0]), math.nan, -1.0):
        with pytest.raises(ps.InputError, match=r"trained up to 0\.2353.*how bright.*highest_sigma"):
            denoiser(x, sigma)
    eight_bits = ps.as_deepinv(prior, highest_sigma=60)
    torch.testing.assert_close(eight_bits(255 * x, 25.5), 255 * denoiser(x, 0.1))
    with pytest.raises(ps.InputError, match="0 to 60"):
        eight_bits(x, 61)
    assert ps.as_deepinv(prior, highest_sigma=math.inf)(x, 80).isfinite().all()
    assert ps.as_deepinv(field).highest_sigma == math.inf
    with pytest.raises(ps.InputError, match="highest_sigma is -1"):
        ps.as_deepinv(prior, highest_sigma=-1)


def test_what_it_cannot_do_is_told(prior, normal, monkeypatch: pytest.MonkeyPatch) -> None:
    x = normal(2, 1, 12, 16)
    denoiser = ps.as_deepinv(prior)
    with pytest.raises(ps.InputError, match=r"expected \(B, C, H, W\)"):
        denoiser(x[0], 0.1)
    for levels in (torch.full((3,), 0.1), torch.full((2, 1, 12, 16), 0.1)):
        with pytest.raises(ps.InputError, match="one for each of the 2 images"):
            denoiser(x, levels)
    with pytest.raises(ps.InputError, match="sigma is"):
        denoiser.prior().fn(x, 0.0)
    with pytest.raises(ps.InputError, match="needs the log density"):
        ps.as_deepinv(ps.PatchPrior(ps.PatchMLP(3))).prior()
    monkeypatch.delitem(sys.modules, "patchscore.priors.deepinv_models")
    monkeypatch.setitem(sys.modules, "deepinv.models", None)
    with pytest.raises(ps.InputError, match=r"pip install 'patchscore\[inverse\]'"):
        ps.as_deepinv(prior)


# In their algorithms


@pytest.fixture(scope="module")
def blurred(photograph: Tensor) -> tuple[Tensor, object]:
    kernel = deepinv.physics.functional.blur.gaussian_blur(sigma=(1.6, 1.6))
    noise = deepinv.physics.GaussianNoise(NOISE, rng=torch.Generator().manual_seed(0))
    physics = deepinv.physics.BlurFFT((1, 64, 64), kernel, noise_model=noise)
    return physics(photograph), physics


def psnr(x: Tensor, truth: Tensor) -> float:
    return -10 * math.log10((x - truth).square().mean().item())


def half_quadratic(denoiser, y, physics):
    sigmas = np.geomspace(0.2, NOISE, 12).tolist()
    return deepinv.optim.HQS(
        prior=deepinv.optim.PnP(denoiser), data_fidelity=deepinv.optim.L2(), max_iter=len(sigmas),
        sigma_denoiser=sigmas, stepsize=[4 * (sigma / NOISE) ** 2 for sigma in sigmas],
    )(y, physics)  # fmt: skip


def proximal_gradient(denoiser, y, physics):
    return deepinv.optim.PGD(
        prior=deepinv.optim.PnP(denoiser), data_fidelity=deepinv.optim.L2(), max_iter=50,
        sigma_denoiser=SIGMA, stepsize=1.0,
    )(y, physics)  # fmt: skip


def red(denoiser, y, physics):
    return deepinv.optim.GD(
        prior=deepinv.optim.RED(denoiser), data_fidelity=deepinv.optim.L2(), max_iter=50,
        sigma_denoiser=SIGMA, stepsize=0.7, lambda_reg=0.3,
    )(y, physics)  # fmt: skip


def langevin(denoiser, y, physics):
    step = 0.4 / (1 / NOISE**2 + 1 / SIGMA**2)
    sampler = deepinv.sampling.sampling_builder(
        "ULA", deepinv.optim.L2(sigma=NOISE), deepinv.optim.ScorePrior(denoiser),
        params_algo={"step_size": step, "alpha": 1.0, "sigma": SIGMA}, max_iter=300, thinning=1,
    )  # fmt: skip
    return sampler.sample(y, physics, x_init=y, seed=0)[0]


ALGORITHMS: dict[str, Callable[..., Tensor]] = {
    "HQS": half_quadratic,
    "PGD": proximal_gradient,
    "RED": red,
    "ULA": langevin,
    "DPIR": lambda denoiser, y, physics: deepinv.optim.DPIR(NOISE, denoiser)(y, physics),
    "DDRM": lambda denoiser, y, physics: deepinv.sampling.DDRM(
        denoiser, sigmas=np.linspace(denoiser.highest_sigma, 0, 30)
    )(y, physics, seed=1),
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_their_algorithms_restore_a_blurred_photograph(name, prior, photograph, blurred) -> None:
    y, physics = blurred
    with torch.no_grad():
        restored = ALGORITHMS[name](ps.as_deepinv(prior), y, physics)
    assert psnr(restored, photograph) > psnr(y, photograph) + 2


def test_a_line_search_on_the_energy(prior, photograph, normal) -> None:
    truth = photograph.double()
    y = truth + 0.1 * normal(*truth.shape)
    solver = deepinv.optim.GD(
        prior=ps.as_deepinv(prior).prior(), data_fidelity=deepinv.optim.L2(sigma=0.1), max_iter=40,
        sigma_denoiser=SIGMA, stepsize=0.01, backtracking=deepinv.optim.BacktrackingConfig(gamma=0.1),
    )  # fmt: skip
    restored, metrics = solver(y, deepinv.physics.Denoising(), compute_metrics=True)
    cost = metrics["cost"][0]
    assert len(cost) > 10
    assert np.all(np.diff(cost) < 0)
    assert psnr(restored, truth) > psnr(y, truth) + 2
