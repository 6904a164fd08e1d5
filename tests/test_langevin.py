from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import patchscore as ps
from patchscore.inference.chain import Chain
from patchscore.inference.langevin import annealed_langevin, langevin_step
from patchscore.inference.schedules import noise_schedule

SHAPE = 8, 8


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class White:
    """Independent Gaussian pixels of one precision; the noise level is not looked at."""

    def __init__(self, precision: float = 1.0, mean: float = 0.0) -> None:
        self.precision, self.mean = precision, mean

    def score(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        return -self.precision * (x - self.mean)

    def log_prob(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        return -0.5 * self.precision * (x - self.mean).square().sum((1, 2, 3))


class TooGentle(White):
    """It promises the curvature of a blurred density, and is not the score of one."""

    def curvature_bound(self, sigma: float) -> float:
        return 1 / sigma**2


class ScoreOnly(White):
    has_potential = False


@pytest.fixture
def field() -> ps.GaussianCliques:
    return ps.GaussianCliques.exponential(SHAPE, std=1.0, length=2.0, mean=0.5)


def spectrum(x: Tensor) -> Tensor:
    """The power of every frequency: (..., H, W) -> (..., H, W)."""
    return torch.fft.fft2(x, norm="ortho").abs().square()


@pytest.mark.parametrize("step_size", [0.1, 0.5, 1.0])
def test_the_unadjusted_walk_has_its_biased_variance(step_size: float) -> None:
    """1 / (precision (1 - h precision / 2)), to 2 %."""
    precision = 1.5
    x0 = torch.zeros(1, 1, 200, 200, dtype=torch.float64)
    chain = ps.langevin(
        White(precision), x0, sigma=1.0, steps=120, burn_in=100, step_size=step_size,
        generator=seeded(), progress=False,
    )  # fmt: skip
    expected = 1 / (precision * (1 - step_size * precision / 2))
    assert chain.samples.square().mean().item() == pytest.approx(expected, rel=0.02)
    assert chain.acceptance.isnan().all()


def test_the_corrected_walk_has_the_variance_of_the_target(z_score) -> None:
    precision, mean = 1.5, 0.3
    x0 = torch.zeros(4000, 1, 2, 3, dtype=torch.float64)
    chain = ps.langevin(
        White(precision, mean), x0, sigma=1.0, steps=60, burn_in=59, step_size=0.5, metropolis=True,
        generator=seeded(), progress=False,
    )  # fmt: skip
    assert z_score(chain.state.mean((1, 2, 3)), mean) < 4
    assert z_score((chain.state - mean).square().mean((1, 2, 3)), 1 / precision) < 4
    assert 0.3 < chain.acceptance.mean() < 0.95


def test_the_corrected_walk_visits_both_modes_in_their_proportions(z_score) -> None:
    """A mixture of two Gaussians whose modes a walk can cross between, weights 0.3 and 0.7."""
    mixture = ps.GaussianMixture(
        (1, 1),
        2,
        weights=torch.tensor([0.3, 0.7], dtype=torch.float64),
        means=torch.tensor([[-1.5], [1.5]], dtype=torch.float64),
        covariances=0.25 * torch.ones(2, 1, 1, dtype=torch.float64),
    )
    prior = ps.PatchPrior(mixture, assembly="mean", boundary="periodic")
    x0 = torch.zeros(3000, 1, 1, 1, dtype=torch.float64)
    chain = ps.langevin(
        prior, x0, sigma=0.5, steps=400, burn_in=200, metropolis=True, thin=200,
        generator=seeded(), progress=False,
    )  # fmt: skip
    assert z_score((chain.samples[-1] > 0).flatten(), 0.7) < 4


@pytest.mark.parametrize("metropolis", [False, True])
def test_mean_and_covariance_of_a_posterior(metropolis: bool, field, z_score) -> None:
    """At every frequency; the unadjusted walk with the bias of its step."""
    generator, sigma, noise_std = seeded(), 0.3, 0.5
    y = field.sample(1, generator=generator)
    posterior = ps.Posterior(field, ps.GaussianLikelihood(y, ps.Identity(), noise_std))
    noise = noise_std**2 + sigma**2
    precision = 1 / (field.power_spectrum + sigma**2) + 1 / noise
    mean = posterior_mean(field, y, sigma, noise)
    chain = ps.langevin(
        posterior, mean.expand(1500, -1, -1, -1), sigma=sigma, steps=150, burn_in=149,
        metropolis=metropolis, generator=generator, progress=False,
    )  # fmt: skip
    h = 0.0 if metropolis else chain.step_size.mean().item()
    expected = 1 / (precision * (1 - h * precision / 2))
    power = spectrum(chain.state - mean)[:, 0] / expected
    assert z_score(power.mean((1, 2)), 1.0) < 4
    for k in ((0, 0), (0, 1), (3, 2), (4, 4)):
        assert z_score(power[:, k[0], k[1]], 1.0) < 4
    assert z_score((chain.state - mean)[:, 0, 3, 3], 0.0) < 4


def posterior_mean(field: ps.GaussianCliques, y: Tensor, sigma: float, noise: float) -> Tensor:
    prior = field.power_spectrum + sigma**2
    change = torch.fft.fft2(y - field.mean) * prior / (prior + noise)
    return field.mean + torch.fft.ifft2(change).real


def test_the_step_is_tuned_to_its_best_acceptance(field) -> None:
    chain = ps.langevin(
        field, field.sample(20, generator=seeded()), sigma=0.3, steps=600, burn_in=400, metropolis=True,
        keep="moments", generator=seeded(), progress=False,
    )  # fmt: skip
    assert chain.acceptance.mean().item() == pytest.approx(0.574, abs=0.04)


def test_the_step_is_tuned_though_the_walk_has_still_to_arrive() -> None:
    """On the way in from far off nearly everything is accepted, whatever the step."""
    field = ps.GaussianCliques.exponential((64, 64), std=40.0, length=6.0).float()
    y = field.sample(2, generator=seeded())
    y = y + 25 * torch.randn(y.shape, generator=seeded(1))
    posterior = ps.Posterior(field, ps.GaussianLikelihood(y, ps.Identity(), 25.0))
    chain = ps.langevin(
        posterior, y, sigma=5.0, steps=300, metropolis=True, keep="moments", generator=seeded(),
        progress=False,
    )  # fmt: skip
    assert chain.acceptance.mean().item() == pytest.approx(0.574, abs=0.1)


def test_the_step_comes_from_the_curvature(field) -> None:
    chain = ps.langevin(
        field, torch.zeros(1, 1, *SHAPE, dtype=torch.float64), sigma=0.3, steps=1, burn_in=0,
        generator=seeded(), progress=False,
    )  # fmt: skip
    curvature = 1 / (field.power_spectrum.min() + 0.3**2)
    # Power iteration finds the curvature from below.
    assert 0.1 / curvature <= chain.step_size.item() < 1.1 * 0.1 / curvature


def test_annealing_ends_at_the_posterior_of_the_last_level(field, z_score) -> None:
    sigmas = noise_schedule(3.0, 0.3, 12)
    y = field.sample(1, generator=seeded(3))
    posterior = ps.Posterior(field, ps.GaussianLikelihood(y, ps.Identity(), 0.5))
    chain = annealed_langevin(
        posterior, torch.full((1000, 1, *SHAPE), 9.0, dtype=torch.float64), sigmas=sigmas,
        steps_per_level=60, step_fraction=0.3, thin=60, generator=seeded(), progress=False,
    )  # fmt: skip
    noise = 0.5**2 + 0.3**2
    h = 0.3 / (1 / 0.3**2 + 1 / noise)
    precision = 1 / (field.power_spectrum + 0.3**2) + 1 / noise
    expected = 1 / (precision * (1 - h * precision / 2))
    error = chain.samples[-1] - posterior_mean(field, y, 0.3, noise)
    assert z_score((spectrum(error)[:, 0] / expected).mean((1, 2)), 1.0) < 4
    assert z_score(error.mean((1, 2, 3)), 0.0) < 4


def walk(x0: Tensor, steps: int, **settings: object) -> Chain:
    arguments = {"sigma": 1.0, "burn_in": 10, "generator": seeded(4), "progress": False, **settings}
    return ps.langevin(White(2.0), x0, steps=steps, **arguments)


@pytest.mark.parametrize("metropolis", [False, True])
@pytest.mark.parametrize("pause", [4, 25])
def test_a_chain_that_goes_on_is_the_chain_in_one_go(metropolis, pause, normal, tmp_path) -> None:
    x0 = normal(3, 1, 4, 4)
    whole = walk(x0, 40, metropolis=metropolis, thin=3)
    with_pause = interrupted_after(pause, x0, metropolis=metropolis)
    assert with_pause.reason == f"interrupted after {pause} of 40 steps"
    with_pause.save(tmp_path / "chain.safetensors")
    loaded = Chain.load(tmp_path / "chain.safetensors")
    resumed = walk(x0, 40, metropolis=metropolis, thin=3, resume=loaded, generator=seeded(99))
    for name in ("samples", "mean", "variance", "state", "step_size", "acceptance"):
        torch.testing.assert_close(
            getattr(resumed, name), getattr(whole, name), rtol=0, atol=0, equal_nan=True
        )
    assert resumed.draws == whole.draws == 10
    # One at x0, two for each of two iterations of the curvature, and one in each step.
    assert resumed.evaluations == whole.evaluations == 1 + 4 + 40


def interrupted_after(steps: int, x0: Tensor, *, metropolis: bool) -> Chain:
    class Interrupting(White):
        calls = 0

        def score(self, x: Tensor, sigma: float | Tensor) -> Tensor:
            # Without a potential given, nothing but the walk asks: one call at x0, one a step; the
            # curvature is measured with pairs of calls at the beginning.
            if torch.equal(x, stop_at):
                raise KeyboardInterrupt
            return super().score(x, sigma)

    stop_at = torch.empty(0)
    states: list[Tensor] = []

    class Recording(White):
        def score(self, x: Tensor, sigma: float | Tensor) -> Tensor:
            states.append(x)
            return super().score(x, sigma)

    settings = {"sigma": 1.0, "burn_in": 10, "thin": 3, "progress": False, "metropolis": metropolis}
    ps.langevin(Recording(2.0), x0, steps=40, generator=seeded(4), **settings)
    stop_at = states[len(states) - 40 + steps]  # the proposal of the step after the last that is kept
    return ps.langevin(Interrupting(2.0), x0, steps=40, generator=seeded(4), **settings)


def test_moments_alone_are_those_of_the_samples(normal) -> None:
    x0 = normal(2, 1, 4, 4)
    kept, moments = walk(x0, 50), walk(x0, 50, keep="moments")
    assert moments.samples is None
    torch.testing.assert_close(moments.mean, kept.samples.mean(0), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(moments.variance, kept.samples.var(0), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(moments.std, kept.samples.std(0), rtol=1e-12, atol=1e-14)
    assert moments.draws == len(kept.samples) == 40


def test_a_chain_without_samples_is_saved_too(normal, tmp_path) -> None:
    chain = walk(normal(2, 1, 4, 4), 20, keep="moments")
    chain.save(tmp_path / "chain.safetensors")
    loaded = Chain.load(tmp_path / "chain.safetensors")
    assert loaded.samples is None
    assert (loaded.draws, loaded.steps, loaded.reason) == (10, 20, "all 20 steps are done")


def test_the_step_is_its_equation(normal, error) -> None:
    x, score, h = normal(2, 1, 3, 3), normal(2, 1, 3, 3, seed=1), torch.tensor([0.1, 0.4]).double()
    h = h[:, None, None, None]
    z = torch.randn(x.shape, dtype=x.dtype, generator=seeded())
    assert error(langevin_step(x, score, h, seeded()), x + h * score + (2 * h).sqrt() * z) < 1e-14


def test_a_diverging_chain_names_the_bound(normal) -> None:
    with pytest.raises(ps.InputError, match=r"step size is 1\.2, .* 2 / L = 1, .* L = 2"):
        walk(normal(1, 1, 4, 4), 1000, step_size=1.2)
    with pytest.raises(ps.InputError, match=r"diverged"):
        annealed_langevin(
            TooGentle(2.0), normal(1, 1, 4, 4), sigmas=[9.0, 5.0], steps_per_level=200,
            step_fraction=0.5, generator=seeded(), progress=False,
        )  # fmt: skip


BAD: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "no potential": (
        lambda x: ps.langevin(
            ScoreOnly(), x, sigma=1.0, steps=9, metropolis=True, generator=seeded(), progress=False
        ),
        "metropolis=True needs the log density",
    ),
    "steps": (lambda x: walk(x, 0, burn_in=0), "steps is 0"),
    "burn-in": (lambda x: walk(x, 10, burn_in=10), "burn_in is 10 of 10 steps"),
    "thin": (lambda x: walk(x, 20, thin=0), "thin is 0"),
    "step size": (
        lambda x: walk(x, 20, step_size=-1.0),
        r"step_size is -1\.0; expected a positive number",
    ),
    "sigma": (lambda x: walk(x, 20, sigma=0.0), "noise level is positive"),
    "keep": (lambda x: walk(x, 20, keep="all"), "keep is 'all'"),
    "memory": (lambda x: walk(x, 10**12), r"GB are free: \d+ fit"),
    "another chain": (
        lambda x: walk(x, 20, resume=walk(x[:, :, 1:], 5, burn_in=0)),
        "go on with the images",
    ),
    "moments only": (
        lambda x: walk(x, 20, resume=walk(x, 15, keep="moments")),
        'keep="moments"',
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_are_refused_before_work(case: str, normal) -> None:
    call, words = BAD[case]
    with pytest.raises(ps.InputError, match=words):
        call(normal(2, 1, 4, 4))


def test_moments_need_no_memory_for_samples(normal) -> None:
    x0 = normal(1, 1, 4, 4)
    assert math.isfinite(walk(x0, 30, keep="moments").std.mean())


def test_going_on_does_not_move_the_burn_in(normal) -> None:
    x0 = normal(2, 1, 4, 4)
    first = walk(x0, 20, burn_in=None, metropolis=True)
    longer = walk(x0, 60, burn_in=None, metropolis=True, resume=first)
    assert (first.burn_in, first.draws) == (10, 10)
    assert (longer.burn_in, longer.draws, longer.steps) == (10, 50, 60)
    taken = (longer.samples[1:] != longer.samples[:-1]).any(-1).any(-1).any(-1)
    # The first draw may or may not be a step that was taken.
    assert bool(((longer.acceptance * 50 - taken.sum(0)).round().abs() <= 1).all())
