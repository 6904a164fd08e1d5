"""The estimated risk, its gain and its error bar, against linear denoisers of which all is known.

With D y = W y, D' y = V y, E = V - W, M the mask, K probes and m the pixels in it,

    error of the gain = 2 (n' M E y - sigma^2 mean_k b_k' M E b_k)
    its variance      = 4 sigma^2 E |M E y|^2 + 4 sigma^4 tr M E M E + 8 sigma^4 |S|^2 / K

where S is the symmetric part of M E without its diagonal (the variance of b' N b for random signs).
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from skimage import data

import patchscore as ps
from patchscore.adaptation import risk
from patchscore.adaptation.residual import look_at_residual
from patchscore.adaptation.risk import Response, estimated_gain, random_signs, respond
from patchscore.priors.energy import ConvEnergy
from patchscore.priors.gaussian import GaussianPatches

SHAPE = 12, 10
N = math.prod(SHAPE)
SIGMA = 0.7
Z = 4.0


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def field(length, shape=SHAPE):
    return ps.GaussianCliques.exponential(shape, std=1.0, length=length)


def matrix(prior, sigma=SIGMA):
    """W of D y = W y, column by column."""
    unit = torch.eye(N, dtype=torch.float64).view(N, 1, *SHAPE)
    return prior.denoise(unit, sigma).view(N, N).T


@pytest.fixture(scope="module")
def truth():
    """A clean image, not drawn from any of the fields."""
    rows, columns = torch.meshgrid(*(torch.arange(side) for side in SHAPE), indexing="ij")
    return ((rows > 5) + 0.3 * (columns % 3)).double()[None, None]


@pytest.fixture(scope="module")
def linear():
    """W, V: the Wiener filter of one field, and the mean of patch marginals of another."""
    patches = GaussianPatches((3, 3), field(1.0).patches((3, 3)).covariance)
    return matrix(field(4.0)), matrix(ps.PatchPrior(patches, assembly="mean", boundary="periodic"))


@pytest.fixture(scope="module", params=["all", "some"])
def where(request):
    mask = torch.ones(SHAPE, dtype=torch.bool)
    if request.param == "some":
        mask[:7] = False
        mask[:, 8:] = True
    return mask


def answer(w, y, probes):
    """What :func:`respond` gives for D y = W y."""
    moves = (probes.flatten(1) @ w.T).view_as(probes)
    return Response((y.flatten(1) @ w.T).view_as(y), moves)


def test_a_linear_response_is_that_of_the_matrix(linear, truth):
    probes = random_signs(3, truth, seeded(0))
    assert set(probes.unique().tolist()) == {-1, 1}
    found, expected = respond(field(4.0), truth, SIGMA, probes), answer(linear[0], truth, probes)
    torch.testing.assert_close(found.estimate, expected.estimate, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.moves, expected.moves, rtol=0, atol=1e-10)


def test_the_response_is_the_derivative_to_second_order(randomized, monkeypatch, normal):
    prior = ps.PatchPrior(randomized(ConvEnergy((3, 3), (1, 1), width=8)))
    y, probes = normal(1, 1, 14, 11), random_signs(2, normal(1, 1, 14, 11), seeded(0))
    exact = torch.cat(
        [torch.func.jvp(lambda v: prior.denoise(v, SIGMA), (y,), (b,))[1] for b in probes.split(1)]
    ).detach()
    errors = []
    for step in (0.02, 0.01):
        monkeypatch.setattr(risk, "DIFFERENCE", step)
        errors.append((respond(prior, y, SIGMA, probes).moves - exact).norm().item())
    # The next order is 0.02^2 of this one, times a ratio of derivatives that is below 25.
    assert errors[0] / errors[1] == pytest.approx(4, rel=25 * 0.02**2)


@pytest.mark.parametrize("count", [1, 2, 8])
def test_gain_and_error_bar(count, linear, truth, where, z_score):
    w, v = linear
    e, m = v - w, where.flatten().double()
    generator = seeded(count)
    risks, errors, variances, risk_variances = [], [], [], []
    for _ in range(3000):
        y = truth + SIGMA * torch.randn(truth.shape, dtype=torch.float64, generator=generator)
        probes = random_signs(count, y, generator)
        old, new = answer(w, y, probes), answer(v, y, probes)
        gain = estimated_gain(new, old, y, SIGMA, probes, where)
        before, after = (
            ((one.estimate - truth).flatten().square() @ m).item() / SIGMA**2 for one in (old, new)
        )
        risks.append(gain.risk - before)
        errors.append(gain.gain - (before - after))
        variances.append(gain.variance)
        risk_variances.append(gain.risk_variance)
    assert gain.pixels == m.sum()
    assert z_score(risks, 0) < Z
    assert z_score(errors, 0) < Z

    # E (|M (D y - x)|^2 - risk)^2 of D y = W y, in the same way.
    residual, mw = m[:, None] * (w - torch.eye(N, dtype=w.dtype)), m[:, None] * w
    left = (residual @ truth.flatten()).square().sum() / SIGMA**2 + residual.square().sum()
    off = (mw + mw.T) / 2
    off = off - off.diagonal().diag()
    exact = 4 * left + 4 * (mw * mw.T).sum() - 2 * m.sum() + 8 * off.square().sum() / count
    assert z_score(np.square(risks), exact.item()) < Z
    stated = 4 * left + 4 * mw.square().sum() * (1 + 2 / count) - 2 * m.sum()
    assert z_score(risk_variances, stated.item()) < Z
    assert exact <= stated

    me = m[:, None] * e
    moved = (me @ truth.flatten()).square().sum() / SIGMA**2 + me.square().sum()  # E |M E y|^2 / sigma^2
    symmetric = (me + me.T) / 2
    probing = (symmetric - symmetric.diagonal().diag()).square().sum()
    exact = 4 * moved + 4 * (me * me.T).sum() + 8 * probing / count
    assert z_score(np.square(errors), exact.item()) < Z
    stated = 4 * moved + 4 * me.square().sum() * (1 + 2 / count)
    assert z_score(variances, stated.item()) < Z
    # Too large by no more than the diagonal, and what the mask cuts off the symmetric part.
    excess = (1 + 1 / count) * (me.square().sum() - (me * me.T).sum())
    excess = 4 * excess + 8 / count * me.diagonal().square().sum()
    assert (stated - exact).item() == pytest.approx(excess.item(), abs=1e-10)
    assert excess > 0


def test_units_change_nothing(randomized, normal):
    old = ps.PatchPrior(randomized(ConvEnergy((3, 3), (1, 1), width=8)))
    new = ps.PatchPrior(randomized(ConvEnergy((3, 3), (1, 1), width=8), seed=1))
    y, where = normal(1, 1, 14, 11), torch.arange(14 * 11).view(14, 11) % 3 > 0
    probes = random_signs(2, y, seeded(0))
    found = []
    for unit in (1, 1000):
        one, other = (respond(prior, unit * y, unit * SIGMA, probes) for prior in (old, new))
        look = look_at_residual(one, unit * y, unit * SIGMA, probes)
        gain = estimated_gain(other, one, unit * y, unit * SIGMA, probes, where)
        found.append([*gain, look.variance, *look.correlation])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-10, atol=0)


def spectrum_of_noise(kind):
    """The power spectrum of the noise that is there, of which the look is told SIGMA."""
    frequency = 2 * math.pi * torch.arange(SHAPE[1], dtype=torch.float64) / SHAPE[1]
    white = torch.full(SHAPE, SIGMA**2, dtype=torch.float64)
    scale = {"right": 1.0, "half": 0.25, "double": 4.0}
    # An average of two neighbours in a row, of variance sigma^2 in all.
    return white * (scale[kind] if kind in scale else 1 + frequency.cos())


@pytest.mark.parametrize("kind", ["right", "half", "double", "coloured"])
def test_the_residual_is_what_the_spectrum_says(kind, z_score):
    prior = field(2.0)
    noise = spectrum_of_noise(kind)
    y_of = ps.GaussianCliques(prior.power_spectrum + noise)
    gain = prior.power_spectrum / (prior.power_spectrum + SIGMA**2)
    residual = torch.fft.ifft2((1 - gain).square() * (prior.power_spectrum + noise) / SIGMA**2).real
    told = torch.fft.ifft2(1 - gain).real  # what white noise of SIGMA leaves
    if kind == "right":
        torch.testing.assert_close(residual, told, rtol=0, atol=1e-10)
    generator = seeded(0)
    variances, columns, rows = [], [], []
    w = matrix(prior)
    for y in y_of.sample(3000, generator=generator).split(1):
        probes = random_signs(2, y, generator)
        response = answer(w, y, probes)
        look = look_at_residual(response, y, SIGMA, probes)
        # Of the two means only the ratio comes back, and a mean of ratios is no ratio of means.
        variances.append(look.variance * (1 - (probes * response.moves).mean().item()))
        columns.append(look.correlation[0])
        rows.append(look.correlation[1])
    assert z_score(variances, residual[0, 0].item()) < Z
    assert z_score(columns, (residual - told)[1, 0].item()) < Z
    assert z_score(rows, (residual - told)[0, 1].item()) < Z
    if kind == "coloured":
        assert (residual - told)[0, 1] > 0.1


def test_bright_over_dark_is_the_ratio_of_the_variances(linear, truth, z_score):
    """Of known levels: half of the image is bright, with three times the noise, and J is 1/2 there."""
    level = torch.zeros(1, 1, 32, 32, dtype=torch.float64)
    level[..., 16:] = 1
    slope = level / 2
    ratios = []
    for seed in range(200):
        z = torch.randn(level.shape, dtype=level.dtype, generator=seeded(seed))
        noise = torch.where(level > 0, math.sqrt(3 * 0.5), 1.0) * z
        probes = random_signs(2, level, seeded(seed))
        estimate = level + 1e-6 * z  # without ties
        response = Response(estimate, slope * probes)
        look = look_at_residual(response, estimate + SIGMA * noise, SIGMA, probes)
        ratios.append(look.bright_over_dark)
    # The mean of a ratio of two means of 256 squares: 3 (1 + 2 / 256), by its dark half.
    assert z_score(ratios, 3 * 256 / 254) < Z
    # A mirrored image has its darkest place where the other has its brightest one.
    y = truth + torch.randn(truth.shape, dtype=truth.dtype, generator=seeded(0))
    probes = random_signs(2, y, seeded(1))
    one, other = (
        look_at_residual(answer(linear[0], sign * y, probes), sign * y, SIGMA, probes)
        for sign in (1, -1)
    )
    assert one.bright_over_dark * other.bright_over_dark == pytest.approx(1, abs=1e-10)


def test_clipped_pixels_are_counted(linear, truth):
    y = truth.clone()
    y[0, 0, :3, :4] = y.max() + 1
    y[0, 0, 5, :2] = y.min() - 1
    probes = random_signs(1, y, seeded(0))
    look = look_at_residual(answer(linear[0], y, probes), y, SIGMA, probes)
    assert look.clipped == pytest.approx((14 - 2) / N, abs=1e-12)


def test_the_risk_of_the_bundled_network_is_unbiased(z_score):
    """In float32 and with differences of a tenth of sigma; of its gain, the error bar is safe."""
    sigma, side = 25.0, 48
    prior = ps.load_prior("natural-gray-fast", device="cpu")
    other = ps.load_prior("natural-gray-fast", device="cpu")
    other.network.readout.mul_(1.2)
    pixels = data.camera()[100 : 100 + side, 200 : 200 + side] / sigma
    clean = torch.from_numpy(pixels).float()[None, None]
    everywhere = torch.ones(side, side, dtype=torch.bool)
    generator = seeded(0)
    risks, errors, slack = [], [], []
    for _ in range(40):
        y = clean + torch.randn(clean.shape, generator=generator)
        probes = random_signs(2, y, generator)
        old, new = (respond(one, y, 1.0, probes) for one in (prior, other))
        gain = estimated_gain(new, old, y, 1.0, probes, everywhere)
        before, after = ((one.estimate - clean).double().square().sum().item() for one in (old, new))
        risks.append(gain.risk - before)
        errors.append(gain.gain - (before - after))
        slack.append(gain.variance - errors[-1] ** 2)
    assert z_score(risks, 0) < Z
    assert z_score(errors, 0) < Z
    assert np.mean(slack) > -Z * np.std(slack, ddof=1) / math.sqrt(len(slack))
