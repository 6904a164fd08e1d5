"""Adaptation where the best possible denoiser is known, and where there is nothing to gain."""

from __future__ import annotations

import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from skimage import data
from tqdm import tqdm

import patchscore as ps
from benchmarks.residuals import patterns
from patchscore.adaptation.adapt import adapt
from patchscore.adaptation.residual import DOUBTED, VARIANCES, WITNESS
from patchscore.adaptation.risk import estimated_gain, respond
from patchscore.adaptation.search import Search, SplitImage, random_halves
from patchscore.errors import InputError
from patchscore.measurements.noisy_image import NoisyImage
from patchscore.priors.energy import ConvEnergy
from patchscore.priors.gaussian import GaussianPatches

SIDE, SIGMA = 64, 0.5
RATE = 4e-3
TOLERATED = 0.05  # dB


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def prior():
    """A small network that has learned rough fields."""
    rough = ps.GaussianCliques.exponential((SIDE, SIDE), std=1.0, length=8.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        prior = ps.PatchPrior(ConvEnergy((5, 3), (1, 2), width=16))
    clean = rough.sample(16, generator=seeded(0)).float()
    ps.fit(
        prior,
        clean,
        sigmas=(SIGMA, SIGMA),
        crop=32,
        boundary="symmetric",
        steps=150,
        batch_size=2,
        learning_rate=1e-2,
        average=0.95,
        optimizer="soap",
        generator=seeded(0),
        progress=False,
    )
    return prior


@pytest.fixture(scope="module")
def bundled():
    return ps.load_prior("natural-gray-fast", device="cpu")


def smooth(side=SIDE):
    """Correlation exp(-|d|^2 / 8), wrapped around."""
    d = torch.arange(side).double() + side * torch.arange(-4, 5)[:, None]
    along = (-(d**2) / 8).exp().sum(0)
    return ps.GaussianCliques.from_covariance(torch.outer(along, along) / along[0] ** 2)


def drawn(seed, side=SIDE):
    """A smooth field, and a noisy image of it, in float64."""
    generator = seeded(1000 + seed)
    clean = smooth(side).sample(1, generator=generator)
    return clean, clean + SIGMA * torch.randn(clean.shape, dtype=clean.dtype, generator=generator)


@pytest.fixture(scope="module")
def noisy():
    return drawn(0)[1][0, 0].numpy()


def error(prior, y, clean, sigma=SIGMA):
    """The mean squared error of the estimate, with y in the dtype of the prior."""
    with torch.no_grad():
        return (prior.denoise(y.to(prior.network.like), sigma) - clean).square().mean().item()


def weights(prior):
    return {name: tensor.clone() for name, tensor in prior.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def quietly(prior, y, sigma=SIGMA, *, seed=0, **settings):
    options = {"learning_rate": RATE, "max_seconds": 600, "max_steps": 15, "progress": False}
    return adapt(prior, y, sigma, generator=seeded(seed), **(options | settings))


def searched(prior, y, seed):
    """15 steps whatever they gain, the image as the search sees it, and the response before."""
    generator = seeded(seed)
    image = SplitImage.of(NoisyImage.of(y, SIGMA), prior, generator)
    old = respond(prior, image.y, image.sigma, image.probes)
    search = Search(prior, [image], [old], RATE, 0.0, generator)
    search.run(15, math.inf, tqdm(disable=True))
    return search, image, old


def test_it_moves_towards_the_wiener_filter(prior):
    side = 96
    before, after, best, accepted = [], [], [], []
    for seed in range(4):
        clean, y = drawn(seed, side)
        adapted, report = quietly(prior, y[0, 0].numpy(), seed=seed, max_steps=45)
        before.append(error(prior, y, clean))
        after.append(error(adapted, y, clean))
        best.append((smooth(side).denoise(y, SIGMA) - clean).square().mean().item())
        accepted.append(report.adapted)
    assert max(10 * np.log10(np.divide(after, before))) < TOLERATED
    assert sum(accepted) > len(accepted) / 2
    for was, now, least, moved in zip(before, after, best, accepted, strict=True):
        # No denoiser has a lower expected error than Wiener's.
        assert (least < now < was) if moved else now == was


def test_the_gain_is_that_of_the_halves_and_the_mean_is_no_worse(prior, z_score):
    """One check only, so that there is no choice among checks: its error is the one that is stated."""
    scores, advantages = [], []
    for seed in range(16):
        clean, y = drawn(seed)
        search, image, old = searched(prior, y[0, 0].numpy(), seed)
        assert torch.equal(image.half, random_halves(SIDE, SIDE, seeded(seed)))
        truth = (clean - np.median(y)) / SIGMA

        def left(response, where, truth=truth):
            return (response.estimate - truth).square()[..., where].sum().item()

        gain = variance = risk = true_gain = 0.0
        for descent in search.descents:
            judges = image.half != descent.half
            taught = search.with_weights(descent.averaged)
            new = respond(taught, image.y, image.sigma, image.probes)
            found = estimated_gain(new, old, image.y, image.sigma, image.probes, judges)
            gain, variance, risk = gain + found.gain, variance + found.variance, risk + found.risk
            true_gain += left(old, judges) - left(new, judges)
        (check,) = search.checks
        assert check.gain == pytest.approx(gain / risk, rel=1e-5)
        assert check.error == pytest.approx(math.sqrt(variance) / risk, rel=1e-5)
        assert check.bound == check.gain - 2 * check.error
        scores.append((gain - true_gain) / math.sqrt(variance))

        search.best_weights = [descent.averaged for descent in search.descents]
        mean = respond(search.adapted(), image.y, image.sigma, image.probes)
        everywhere = torch.ones_like(image.half)
        advantages.append(left(old, everywhere) - left(mean, everywhere) - true_gain)
    assert z_score(scores, 0) < 4
    squares = np.square(scores)
    assert squares.mean() - 1 < 4 * squares.std(ddof=1) / math.sqrt(len(squares))
    assert np.mean(advantages) > -4 * np.std(advantages, ddof=1) / math.sqrt(len(advantages))


def test_half_of_the_blocks():
    half = random_halves(96, 80, seeded(0))
    blocks = half.view(6, 16, 5, 16).float().mean((1, 3))
    assert set(blocks.flatten().tolist()) == {0, 1}
    assert blocks.sum() == 15
    assert not torch.equal(half, random_halves(96, 80, seeded(1)))


@pytest.mark.parametrize("half", [False, True])
def test_each_half_learns_from_its_own_pixels(half, prior):
    """The loss on the pixels of the other half does not reach the weights."""
    search, image, _ = searched(prior, drawn(0)[1][0, 0].numpy(), 0)
    descent = search.descents[half]
    y, sigma, counts = descent._crop([image])
    assert torch.equal(y, image.y)
    assert sigma == image.sigma
    assert torch.equal(counts, (image.half == half).float())


def test_the_prior_that_was_given_is_not_changed(prior, noisy):
    before, card = weights(prior), json.dumps(prior.card)
    wanted = [parameter.requires_grad for parameter in prior.parameters()]
    adapted, report = quietly(prior, noisy)
    assert report.adapted
    assert same(weights(prior), before)
    assert not same(weights(adapted), before)
    assert json.dumps(prior.card) == card
    assert [parameter.requires_grad for parameter in prior.parameters()] == wanted


def test_one_seed_gives_one_result(prior, noisy):
    (one, first), (two, second), (_, other) = (quietly(prior, noisy, seed=seed) for seed in (0, 0, 1))
    assert first.adapted
    assert same(weights(one), weights(two))
    assert first._replace(seconds=0.0) == second._replace(seconds=0.0)
    assert first.checks != other.checks


def test_fewer_steps_are_the_first_of_more(prior, noisy):
    few, more = (quietly(prior, noisy, max_steps=steps)[1].checks for steps in (30, 60))
    assert len(few) < len(more)
    assert more[: len(few)] == few


def stopped_after(steps, prior, noisy, monkeypatch):
    """A run whose time is up after so many steps."""
    # At the clock: after every step, and before the steps of every check.
    looks = steps + max(steps - 1, 0) // 15
    ticks = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: math.inf if next(ticks) >= looks else 0.0)
    with monkeypatch.context() as patch:
        patch.setattr("patchscore.adaptation.search.time", clock)
        return quietly(prior, noisy, max_steps=400)


def test_a_run_that_was_out_of_time_can_be_repeated(prior, noisy, monkeypatch):
    stopped, first = stopped_after(22, prior, noisy, monkeypatch)
    assert [check.step for check in first.checks] == [15, 22]
    assert "time was up after 22 steps" in first.reason
    again, second = quietly(prior, noisy, max_steps=22)
    assert first.adapted
    assert first.checks == second.checks
    assert same(weights(stopped), weights(again))


def test_no_time_for_a_step_is_said(prior, noisy, monkeypatch):
    adapted, report = stopped_after(0, prior, noisy, monkeypatch)
    assert adapted is prior
    assert report.checks == ()
    assert "time was up after 0 steps" in report.reason


def test_steps_that_are_much_too_long_do_no_harm(prior, noisy):
    adapted, report = quietly(prior, noisy, learning_rate=1e6, max_steps=75)
    assert adapted is prior
    assert [check.learning_rate for check in report.checks] == [1e6, 5e5, 2.5e5, 1.25e5]
    assert "there was no more gain" in report.reason


def test_all_weights_move(prior, noisy):
    search, image, _ = searched(prior, noisy, 0)
    for descent in 2 * search.descents:  # the first step of SOAP only measures the curvature
        descent.update([image])
    search.best_weights = [descent.averaged for descent in search.descents]
    given = dict(prior.network.named_parameters())
    for name, new in search.adapted().network.named_parameters():
        assert not torch.equal(new, given[name]), name


def photograph(sigma, side=SIDE, seed=0):
    """A part of a photograph with leaves, coat and sky, and a noisy image of it."""
    clean = torch.from_numpy(data.camera()[60 : 60 + 2 * side : 2, 180 : 180 + 2 * side : 2].copy())
    clean = clean.double()[None, None]
    return clean, clean + sigma * torch.randn(clean.shape, dtype=clean.dtype, generator=seeded(seed))


def case(name):
    """Clean, noisy, the noise level that is told, and words that the report has to contain."""
    told, words = 25.0, ""
    clean, y = photograph(25.0)
    match name:
        case "pure noise":
            clean, y = torch.zeros_like(clean), y - clean
        case "no noise":
            y, words = clean, "less noise than sigma says"
        case "constant":
            clean = y = torch.full_like(clean, 7.0)
            words = "less noise than sigma says"
        case "sigma too high":
            told, words = 50.0, "less noise than sigma says"
        case "sigma too low":
            told, words = 12.5, "more noise than sigma says"
        case "sigma a little too high":
            told = 28.5
        case "sigma a fifth too low":
            told, words = 20.0, "more noise than sigma says"
        case "photon noise":
            words = "depends on the signal"
            scale = 25.0**2 / clean.mean()
            y = scale * torch.poisson(clean / scale, generator=seeded(0))
        case "speckle":
            words = "depends on the signal"
            y = clean + 25.0 * clean / clean.square().mean().sqrt() * (y - clean) / 25.0
        case "clipped":
            told, words = 50.0, "seems clipped"
            clean, y = photograph(50.0)
            y = y.clamp(0, 255)
        case "small":
            clean, y = photograph(25.0, side=24)
        case "tiny":
            clean, y = photograph(25.0, side=15)
            words = "too small to be split into two halves"
    return clean, y, told, words


@pytest.mark.parametrize(
    "name",
    [
        "pure noise",
        "no noise",
        "constant",
        "sigma too high",
        "sigma too low",
        "sigma a little too high",
        "sigma a fifth too low",
        "photon noise",
        "speckle",
        "clipped",
        "small",
        "tiny",
    ],
)
def test_it_does_no_harm(name, bundled):
    clean, y, told, words = case(name)
    adapted, report = quietly(bundled, y[0, 0].numpy(), told, learning_rate=1e-3, max_steps=30)
    assert words in str(report)
    if not report.adapted:
        assert adapted is bundled
        assert (report.steps, report.gain, report.error) == (0, 0, 0)
        assert str(report).startswith("not adapted: ")
        return
    assert not words
    assert report.gain < 1  # no error falls below zero
    before, after = (error(one, y / told, clean / told, 1.0) for one in (bundled, adapted))
    assert 10 * math.log10(after / before) < TOLERATED


def test_a_pattern_is_not_taken_for_a_wrong_level(bundled):
    """Both leave a residual of too small a variance; only the second witness tells them apart."""
    noise = np.random.default_rng(0).standard_normal((96, 96))
    weave = {image.name: image.pixels[:96, :96] for image in patterns()}["weave"]
    pattern, level = weave + 15 * noise, photograph(15.0, 96)[1][0, 0].numpy()
    _, known = quietly(bundled, pattern, 15.0, max_steps=1)
    _, wrong = quietly(bundled, level, 1.1 * 15.0, max_steps=1)
    for report in (known, wrong):
        assert VARIANCES[0] < report.residuals[0].variance < DOUBTED[0]
    assert not known.warnings
    assert known.residuals[0].witness > WITNESS > wrong.residuals[0].witness
    assert "less noise than sigma says" in str(wrong)
    _, wrong = quietly(bundled, pattern, 1.2 * 15.0, max_steps=1)
    assert "less noise than sigma says" in str(wrong)


def test_images_of_a_set_have_units_of_their_own(prior):
    """The descent starts alike; its first steps are in a basis that rounding may turn."""
    precise = ps.PatchPrior(ConvEnergy((5, 3), (1, 2), width=16)).double()
    precise.load_state_dict(prior.state_dict())
    images = [drawn(1)[1][0, 0, :48].numpy(), drawn(2)[1][0, 0, :, :32].numpy()]
    rescaled = [images[0], 100 * images[1] + 7]
    one, other = (
        [SplitImage.of(NoisyImage.of(y, sigma), precise, seeded(0)) for y, sigma in given]
        for given in (
            [(y, SIGMA) for y in images],
            zip(rescaled, (SIGMA, 100 * SIGMA), strict=True),
        )
    )
    for first, second in zip(one, other, strict=True):
        torch.testing.assert_close(first.y, second.y, rtol=0, atol=1e-10)
        assert first.sigma == second.sigma == 1
        assert torch.equal(first.half, second.half)
        assert torch.equal(first.probes, second.probes)


def test_a_set_is_judged_by_all_of_its_images(prior, noisy):
    images = [noisy, drawn(1)[1][0, 0, :48, :33].numpy()]
    adapted, report = quietly(prior, images, [SIGMA, SIGMA])
    assert report.adapted
    assert report.sigmas == (SIGMA, SIGMA)
    assert [residual.clipped for residual in report.residuals] == [0, 0]
    assert adapted.card["adapted"][0]["images"] == 2
    _, one_wrong = quietly(prior, images, [SIGMA, 4 * SIGMA])
    assert not one_wrong.adapted
    assert one_wrong.warnings
    assert all(warning.startswith("image 1: ") for warning in one_wrong.warnings)


def test_the_noise_level_is_estimated_if_it_is_not_given(prior, noisy):
    _, report = quietly(prior, noisy, None, max_steps=1)
    assert report.sigmas == (ps.estimate_noise(noisy).sigma,)


def test_what_was_done_is_kept_with_the_prior(prior, noisy, tmp_path):
    adapted, report = quietly(prior, noisy)
    again, _ = quietly(adapted, drawn(3)[1][0, 0].numpy(), seed=1, max_steps=1)
    path = tmp_path / "adapted.safetensors"
    adapted.save(path)
    loaded = ps.PatchPrior.load(path)
    assert same(weights(loaded), weights(adapted))
    assert loaded.card == json.loads(json.dumps(adapted.card)) == adapted.card
    (entry,) = loaded.card["adapted"]
    assert (entry["steps"], entry["learning_rate"], entry["gain"], entry["error"]) == (
        report.steps,
        report.learning_rate,
        report.gain,
        report.error,
    )
    assert entry["sigmas"] == [SIGMA]
    assert again.card["adapted"][0] == entry
    assert report.decibels == pytest.approx(-10 * math.log10(1 - report.gain), rel=1e-12)
    assert str(report).startswith("adapted: ")
    assert repr(report).startswith(f"Report(adapted, gain {100 * report.gain:.1f} +- ")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sigma": [SIGMA, SIGMA]}, "1 images and 2 noise levels"),
        ({"sigma": -1.0}, "-1"),
        ({"max_seconds": 0}, "max_seconds is 0"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"max_steps": 1.5}, "max_steps is 1.5"),
        ({"learning_rate": -1e-3}, "learning_rate is"),
        ({"learning_rate": math.inf}, "learning_rate is"),
        ({"sigma_error": 1.5}, "sigma_error is 1.5; expected a fraction of sigma"),
        ({"y": NoisyImage.of(np.eye(8), 1.0)}, "a NoisyImage has its own noise level"),
        ({"y": np.zeros(5)}, r"shape \(5,\)"),
        ({"y": [np.zeros((8, 8, 8, 8))]}, r"shape \(8, 8, 8, 8\)"),
    ],
)
def test_errors_teach(settings, words, prior, noisy):
    options = {"y": noisy, "sigma": SIGMA} | settings
    with pytest.raises(InputError, match=words):
        quietly(prior, **options)


def test_a_prior_without_weights_or_a_generator_elsewhere_is_refused(prior, noisy):
    patches = ps.PatchPrior(GaussianPatches((3, 3)), assembly="mean")
    with pytest.raises(InputError, match="GaussianPatches has no parameters"):
        quietly(patches, noisy)

    class Elsewhere(torch.Generator):
        device = torch.device("cuda")

    with pytest.raises(InputError, match="the generator is on cuda"):
        adapt(prior, noisy, SIGMA, generator=Elsewhere())


@pytest.mark.parametrize("seed", range(4))
def test_an_error_near_zero_is_no_scale_for_gains(bundled, seed):
    """On a flat image hardly any error is left, and its estimate is all chance."""
    flat = 100 + 20 * np.random.default_rng(seed).standard_normal((32, 32))
    adapted, report = adapt(bundled, flat, 20.0, max_steps=15, progress=False)
    assert adapted is bundled
    assert "too uncertain to measure a gain: give more or larger images" in report.reason
    assert report.checks == ()
