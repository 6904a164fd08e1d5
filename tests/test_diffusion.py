from __future__ import annotations

import math
from itertools import count

import numpy as np
import pytest
import torch
from torch import Tensor

import patchscore as ps
from patchscore.inference import diffusion, langevin
from patchscore.inference.diffusion import predictor_corrector, reverse_step
from patchscore.inference.gibbs import split_gibbs
from patchscore.inference.schedules import noise_schedule

SHAPE = 8, 8


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class White:
    """Independent Gaussian pixels of one variance: every pixel is a run of its own."""

    def __init__(self, variance: float, mean: float = 0.0) -> None:
        self.variance, self.mean = variance, mean

    def score(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        sigma = torch.as_tensor(sigma, dtype=x.dtype)
        variance = self.variance + (sigma**2 if sigma.ndim == 0 else sigma[:, None, None, None] ** 2)
        return -(x - self.mean) / variance


@pytest.fixture
def field() -> ps.GaussianCliques:
    return ps.GaussianCliques.exponential(SHAPE, std=1.0, length=2.0, mean=0.5)


def spectrum(x: Tensor) -> Tensor:
    return torch.fft.fft2(x, norm="ortho").abs().square()


def test_a_step_is_exact_where_the_clean_image_is_known(z_score) -> None:
    """x_v = x + sqrt(v) z again, and correlated with x_u as taking noise away has it."""
    clean, u, v = 2.0, torch.tensor(4.0).double(), torch.tensor(1.5).double()
    generator = seeded()
    shape = 100_000, 1, 1, 1
    x_u = clean + u.sqrt() * torch.randn(shape, generator=generator, dtype=torch.float64)
    z = torch.randn(shape, generator=generator, dtype=torch.float64)
    x_v = reverse_step(x_u, torch.tensor(clean).double(), u.sqrt()[None], v.sqrt()[None], z).flatten()
    x_u = x_u.flatten()
    assert z_score(x_v, clean) < 4
    assert z_score((x_v - clean).square(), v.item()) < 4
    assert z_score((x_v - clean) * (x_u - clean), v.item()) < 4


@pytest.fixture
def impulses(monkeypatch) -> None:
    """Noise that is one at the k-th pixel in the k-th draw and zero elsewhere.

    A sampler of independent Gaussian pixels is linear in its noise, so the pixels then hold its weights,
    and the sum of their squares is the variance of a sample, to rounding.
    """
    calls = count()

    def impulse(like: Tensor, generator: torch.Generator) -> Tensor:
        z = torch.zeros_like(like)
        z.view(-1)[next(calls)] = 1
        return z

    monkeypatch.setattr(diffusion, "standard_normal", impulse)
    monkeypatch.setattr(langevin, "standard_normal", impulse)


def slope(counts: tuple[int, ...], errors: list[float]) -> float:
    return float(np.polyfit(np.log(counts), np.log(errors), 1)[0])


@pytest.mark.parametrize("variance", [0.05, 1.0, 30.0])
@pytest.mark.parametrize("order", [1, 2])
def test_the_reverse_diffusion_converges_at_its_order(order: int, variance: float, impulses) -> None:
    exact = 1 / (1 / variance + 1)
    lost = 1 / (1 / variance + 25**2)  # by the last denoising step, whatever the order
    counts = (80, 160, 320)
    errors = []
    for levels in counts:
        y = torch.zeros(1, 1, 1, sum(counts) + 3, dtype=torch.float64)
        chain = ps.sample_denoised(
            White(variance), y, 1.0, 1, levels=levels, order=order, generator=seeded(), progress=False
        )
        errors.append(abs(chain.samples.square().sum().item() + lost - exact))
    assert slope(counts, errors) == pytest.approx(-order, abs=0.1)
    assert errors[-1] < 0.05 * exact


def test_samples_have_the_mean_and_covariance_of_the_posterior(field, z_score) -> None:
    sigma = 0.7
    y = field.sample(1, generator=seeded(1))
    chain = ps.sample_denoised(field, y, sigma, 4000, levels=60, generator=seeded(), progress=False)
    assert chain.samples.shape == (4000, 1, 1, *SHAPE)
    error = (chain.samples - field.denoise(y, sigma))[:, 0, 0]
    prior = field.power_spectrum
    # Tweedie at the last level takes out what is left of the noise.
    lowest = sigma / 25
    expected = prior * sigma**2 / (prior + sigma**2) - prior * lowest**2 / (prior + lowest**2)
    power = spectrum(error) / expected
    assert z_score(power.mean((1, 2)), 1.0) < 4
    for k in ((0, 0), (0, 1), (3, 2), (4, 4)):
        assert z_score(power[:, k[0], k[1]], 1.0) < 4
    assert z_score(error[:, 2, 5], 0.0) < 4


def test_every_image_has_its_own_noise_level(field, z_score) -> None:
    sigma = torch.tensor([0.3, 1.5], dtype=torch.float64)
    y = field.sample(2, generator=seeded(1))
    chain = ps.sample_denoised(field, y, sigma, 1500, levels=60, generator=seeded(), progress=False)
    errors = (chain.samples - field.denoise(y, sigma)).square().mean((2, 3, 4))
    for k in (0, 1):
        u, v, prior = sigma[k] ** 2, (sigma[k] / 25) ** 2, field.power_spectrum
        exact = (prior * u / (prior + u) - prior * v / (prior + v)).mean().item()
        assert z_score(errors[:, k], exact) < 4


def mixture_prior() -> ps.PatchPrior:
    """Two far modes of an image of 1 x 2 pixels."""
    mixture = ps.GaussianMixture(
        (1, 2),
        2,
        weights=torch.tensor([0.3, 0.7], dtype=torch.float64),
        means=torch.tensor([[-3.0, -3.0], [3.0, 3.0]], dtype=torch.float64),
        covariances=0.2 * torch.eye(2, dtype=torch.float64).expand(2, 2, 2),
    )
    return ps.PatchPrior(mixture, assembly="mean", boundary="open")


def test_both_modes_are_visited_in_their_proportions(z_score) -> None:
    """A noisy image between two modes that no walk could cross between."""
    sigma = 3.0
    y = torch.tensor([[[[0.2, 0.3]]]], dtype=torch.float64)
    chain = ps.sample_denoised(mixture_prior(), y, sigma, 4000, generator=seeded(), progress=False)
    log_weights = torch.tensor([0.3, 0.7]).double().log() - torch.stack(
        [(y - mode).square().sum() / (2 * (0.2 + sigma**2)) for mode in (-3.0, 3.0)]
    )
    upper = log_weights.softmax(0)[1].item()
    assert z_score((chain.samples.mean((1, 2, 3, 4)) > 0).numpy(), upper) < 4


def test_drawing_from_nothing_visits_both_modes(z_score) -> None:
    chain = predictor_corrector(
        mixture_prior(), torch.zeros(3000, 1, 1, 2, dtype=torch.float64),
        sigmas=noise_schedule(60.0, 0.02, 150), generator=seeded(), progress=False,
    )  # fmt: skip
    draws = chain.samples[0]
    assert z_score((draws.mean((1, 2, 3)) > 0).numpy(), 0.7) < 4
    within = draws - 3 * draws.mean((1, 2, 3), keepdim=True).sign()
    assert z_score(within.square().mean((1, 2, 3)), 0.2) < 4


@pytest.mark.parametrize(("order", "corrections"), [(1, 0), (2, 0), (2, 2)])
def test_predictor_corrector_converges_at_its_order(order: int, corrections: int, impulses) -> None:
    """From a draw of the prior. The bias of the corrector falls as its step, here with the levels."""
    counts = (40, 80, 160)
    errors = []
    for levels in counts:
        x0 = torch.zeros(1, 1, 1, 1 + sum(counts) * (1 + corrections) + 3, dtype=torch.float64)
        x0[..., -1] = 1.0  # the weight of an image of the prior, of unit variance
        chain = predictor_corrector(
            White(1.0),
            x0,
            sigmas=noise_schedule(2.0, 0.02, levels + 1),
            corrections=corrections,
            step_fraction=0.2 / levels**2,
            order=order,
            generator=seeded(),
            progress=False,
        )
        lost = 1 / (1 + 0.02**-2)
        errors.append(abs(chain.samples.square().sum().item() + lost - 1.0))
    assert slope(counts, errors) == pytest.approx(-order, abs=0.15)


def test_corrections_bring_the_walk_back_to_the_posterior(field, z_score) -> None:
    """With many steps at the last level the draws are those of the unadjusted walk there."""
    y, last = field.sample(1, generator=seeded(1)), 0.3
    posterior = ps.Posterior(field, ps.GaussianLikelihood(y, ps.Identity(), 0.5))
    with pytest.warns(UserWarning, match="not calibrated on posteriors"):
        chain = predictor_corrector(
            posterior, torch.zeros(1000, 1, *SHAPE, dtype=torch.float64),
            sigmas=[3.0, 1.5, 0.8, 0.5, last], corrections=60, step_fraction=0.3, generator=seeded(),
            progress=False,
        )  # fmt: skip
    noise = 0.5**2 + last**2
    precision = 1 / (field.power_spectrum + last**2) + 1 / noise
    h = 0.3 / (1 / last**2 + 1 / noise)
    walked = 1 / (precision * (1 - h * precision / 2))
    expected = (1 - last**2 * precision) ** 2 * walked  # one denoising step with the posterior's score
    prior = field.power_spectrum + last**2
    mean = field.mean + torch.fft.ifft2(torch.fft.fft2(y - field.mean) * prior / (prior + noise)).real
    power = spectrum(chain.samples[0] - mean)[:, 0] / expected
    assert z_score(power.mean((1, 2)), 1.0) < 4


def draws(n: int, **settings: object) -> torch.Tensor:
    y = torch.zeros(2, 1, 4, 4, dtype=torch.float64)
    arguments = {"generator": seeded(2), "progress": False, **settings}
    return ps.sample_denoised(White(1.0), y, 0.5, n, **arguments)


def test_an_interrupted_run_goes_on_to_the_same_draws(monkeypatch) -> None:
    monkeypatch.setattr(diffusion, "PIXELS_CPU", 3 * 32)  # three draws at once
    whole = draws(8)
    calls = 0

    class Interrupting(White):
        def score(self, x: Tensor, sigma: float | Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            if calls == 41 + 17:
                raise KeyboardInterrupt
            return super().score(x, sigma)

    y = torch.zeros(2, 1, 4, 4, dtype=torch.float64)
    part = ps.sample_denoised(Interrupting(1.0), y, 0.5, 8, generator=seeded(2), progress=False)
    assert part.reason == "interrupted after 3 of 8 samples"
    assert len(part.samples) == part.draws == 3
    resumed = draws(8, resume=part, generator=seeded(77))
    torch.testing.assert_close(resumed.samples, whole.samples, rtol=0, atol=0)
    assert resumed.evaluations == whole.evaluations == 8 * 41
    more = draws(12, resume=whole)
    torch.testing.assert_close(more.samples[:8], whole.samples, rtol=0, atol=0)
    assert more.draws == 12


def test_moments_alone_are_those_of_the_samples() -> None:
    kept, moments = draws(9), draws(9, keep="moments")
    assert moments.samples is None
    torch.testing.assert_close(moments.mean, kept.samples.mean(0), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(moments.std, kept.samples.std(0), rtol=1e-12, atol=1e-14)


def test_the_unit_of_the_image_does_not_matter(randomized, normal, error) -> None:
    prior = ps.PatchPrior(randomized(ps.PatchEnergy(3, width=16)))
    y = normal(1, 1, 8, 8)
    one = ps.sample_denoised(prior, y, 0.5, 3, generator=seeded(), progress=False)
    other = ps.sample_denoised(prior, 100 * y + 7, 50.0, 3, generator=seeded(), progress=False)
    assert error(other.samples, 100 * one.samples + 7) < 1e-10


@pytest.mark.parametrize("operator", ["identity", "mask", "roll"])
def test_split_gibbs_draws_from_the_posterior_of_its_split(operator, field, z_score) -> None:
    """N(y; A z, noise_std^2 I + rho^2 A A') p(z), by a dense solve; the last draws of many chains."""

    class Roll:
        def A(self, x: Tensor) -> Tensor:
            return 0.7 * x + 0.3 * x.roll(1, -2)

        def A_adjoint(self, y: Tensor) -> Tensor:
            return 0.7 * y + 0.3 * y.roll(-1, -2)

    mask = ps.Mask(torch.rand(SHAPE, generator=seeded(5)) < 0.7)
    A = {"identity": ps.Identity(), "mask": mask, "roll": Roll()}[operator]
    noise_std, rho, chains = 0.5, 0.4, 500
    y = A.A(field.sample(1, generator=seeded(1)))
    posterior = ps.Posterior(field, ps.GaussianLikelihood(y, A, noise_std))
    x0 = field.denoise(y, noise_std).expand(chains, -1, -1, -1)
    chain = split_gibbs(
        posterior, x0, rho=rho, steps=40, burn_in=39, levels=40, generator=seeded(), progress=False
    )
    units = torch.eye(math.prod(SHAPE), dtype=torch.float64).view(-1, 1, *SHAPE)
    matrix = A.A(units).flatten(1).T
    covariance = torch.fft.ifft2(torch.fft.fft2(units) * field.power_spectrum).real.flatten(1)
    noise = noise_std**2 * torch.eye(len(matrix), dtype=matrix.dtype) + rho**2 * matrix @ matrix.T
    gain = covariance @ matrix.T @ torch.linalg.inv(matrix @ covariance @ matrix.T + noise)
    mean = field.mean + gain @ (y.flatten() - matrix @ field.mean.expand(len(matrix)))
    exact = covariance - gain @ matrix @ covariance
    error = chain.samples[-1].flatten(1) - mean
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(exact), error.T, upper=False)
    # The last denoising step of every draw takes out less than (rho / 25)^2 of the variance.
    assert z_score(whitened.square().mean(0), 1.0) < 4
    assert z_score(error.mean(1), 0.0) < 4


def test_a_draw_that_is_not_finite_is_an_error() -> None:
    y = torch.zeros(1, 1, 4, 4)
    with pytest.raises(ps.InputError, match="draw 1 has values that are NaN"):
        ps.sample_denoised(White(math.nan), y, 0.5, 2, generator=seeded(), progress=False)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"n": 0}, "n is 0"),
        ({"n": 3, "levels": 0}, "levels is 0"),
        ({"n": 3, "order": 3}, "order is 3"),
        ({"n": 10**12}, r"GB are free: \d+ fit"),
    ],
)
def test_bad_settings_are_refused_before_work(settings: dict, words: str) -> None:
    with pytest.raises(ps.InputError, match=words):
        draws(**settings)


def test_bad_settings_of_split_gibbs(field) -> None:
    y = field.sample(1, generator=seeded())
    posterior = ps.Posterior(field, ps.GaussianLikelihood(y, ps.Identity(), 0.5))
    for settings, words in (
        ({"rho": 0.0, "steps": 5}, "noise level is positive"),
        ({"rho": 0.1, "steps": 5, "burn_in": 5}, "burn_in is 5 of 5"),
    ):
        with pytest.raises(ps.InputError, match=words):
            split_gibbs(posterior, y, generator=seeded(), progress=False, **settings)
