"""What the figures of chains and solutions show: the arrays, their scales, and what is said of them."""

import base64
import html
import io
import math
import re
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

import patchscore as ps
from patchscore.inference.chain import Chain
from patchscore.inference.diagnostics import rank_histogram
from patchscore.inference.mixing import mixing_summary
from patchscore.inference.optimize import Solution


@pytest.fixture
def chain(normal):
    """A chain of n draws of two images."""

    def make(n, channels=1, acceptance=math.nan, shape=(6, 8)):
        samples = 5 + normal(n, 2, channels, *shape)
        zero = torch.zeros(2, channels, *shape, dtype=torch.float64)
        return Chain(
            samples=samples,
            mean=samples.mean(0) if n else zero,
            variance=samples.var(0) if n > 1 else zero * math.nan,
            draws=n,
            state=samples[-1] if n else zero + 7,
            steps=n,
            burn_in=0,
            step_size=torch.full((2,), math.nan),
            acceptance=torch.full((2,), acceptance),
            evaluations=1234,
            seconds=5.6789,
            reason="",
            generator_state=torch.Generator().get_state(),
        )

    return make


@pytest.fixture
def solution(normal):
    def make(sigmas, objective=None):
        steps = len(sigmas)
        residual = 10.0 ** -np.arange(steps)[:, None] * np.ones(2)
        nothing = np.full((steps, 2), np.nan)
        objective = nothing if objective is None else np.array(objective)[:, None] * np.ones(2)
        x = normal(2, 1, 6, 8)
        return Solution(x, objective, residual, np.array(sigmas), "converged: it did", 17, 0.25, 12)

    return make


def images(figure):
    """Title -> the image shown under it."""
    return {ax.get_title(): ax.images[0] for ax in figure.axes if ax.images and ax.get_title()}


def lines(figure, label):
    """The curves of the axes with this label, step by step."""
    (ax,) = [ax for ax in figure.axes if ax.get_ylabel() == label]
    return [line.get_xydata().tolist() for line in ax.lines]


def test_a_chain_shows_mean_std_and_draws_of_the_first_image(chain):
    of = chain(10, acceptance=0.574)
    figure = of.plot()
    shown = images(figure)
    expected = {"mean": of.mean, "standard deviation": of.variance.sqrt()}
    expected |= {f"draw {k}": of.samples[k - 1] for k in (1, 4, 7, 10)}
    assert shown.keys() == expected.keys()
    for title, values in expected.items():
        np.testing.assert_array_equal(shown[title].get_array(), values[0, 0].numpy())
    assert figure.get_suptitle() == "10 draws, 57% accepted, 1,234 evaluations of the prior, 5.68 s"


def test_mean_and_draws_share_one_gray_scale_and_the_std_has_its_own(chain):
    of = chain(3)
    figure = of.plot()
    shown = images(figure)
    std = shown.pop("standard deviation")
    everything = torch.cat([of.mean[None], of.samples])[:, 0]
    assert {image.get_clim() for image in shown.values()} == {
        (everything.min().item(), everything.max().item())
    }
    assert {image.get_cmap().name for image in shown.values()} == {"gray"}
    assert std.get_clim() == (0, of.std[0].max())
    assert std.colorbar.ax in figure.axes
    assert all(image.colorbar is None for image in shown.values())
    assert "accepted" not in figure.get_suptitle()


def test_colours_are_put_on_one_scale_and_their_std_is_one_map(chain):
    of = chain(4, channels=3)
    shown = images(of.plot())
    everything = torch.cat([of.mean[None], of.samples])[:, 0]
    low, high = everything.min(), everything.max()
    for title, values in (("mean", of.mean), ("draw 4", of.samples[3])):
        expected = (values[0].permute(1, 2, 0) - low) / (high - low)
        np.testing.assert_allclose(shown[title].get_array(), expected, rtol=0, atol=1e-12)
    std = shown["standard deviation, rms of the channels"].get_array()
    np.testing.assert_allclose(std, of.variance[0].mean(0).sqrt(), rtol=1e-12)


def test_of_two_channels_the_first_is_shown_and_named(chain):
    of = chain(4, channels=2)
    shown = images(of.plot())["mean, channel 1 of 2"]
    np.testing.assert_array_equal(shown.get_array(), of.mean[0, 0])


def test_moments_alone(chain):
    assert images(chain(9)._replace(samples=None).plot()).keys() == {"mean", "standard deviation"}


@pytest.mark.parametrize("keep", ["samples", "moments"])
def test_one_draw_has_no_std(keep, chain):
    of = chain(1)
    shown = images((of if keep == "samples" else of._replace(samples=None)).plot())
    assert shown.keys() == {"the only draw"}
    np.testing.assert_array_equal(shown["the only draw"].get_array(), of.samples[0, 0, 0])


def test_without_draws_it_shows_where_the_chain_stands(chain):
    shown = images(chain(0).plot())
    assert shown.keys() == {"state, no draw yet"}
    assert (shown["state, no draw yet"].get_array() == 7).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_a_chain_that_never_moved(channels, chain):
    of = chain(2, channels)
    same = torch.ones_like(of.mean)
    figure = of._replace(samples=torch.stack([same, same]), mean=same, variance=0 * same).plot()
    figure.canvas.draw()
    assert len(images(figure)) == 4


@pytest.mark.parametrize("shape", [(1, 200), (200, 1), (6, 8)])
def test_figures_of_any_image_are_drawn(shape, chain, solution):
    figure = chain(5, shape=shape).plot()
    figure.canvas.draw()
    width, height = figure.get_size_inches()
    assert max(width, height) < 15
    x = torch.zeros(1, 1, *shape)
    solution([1.0, 1.0])._replace(x=x).plot().canvas.draw()


def test_a_solution_shows_estimate_objective_and_residual(solution):
    of = solution([0.5] * 4, [-40.0, -12.0, -10.5, -10.0])
    figure = of.plot()
    estimate = images(figure)["estimate"]
    np.testing.assert_array_equal(estimate.get_array(), of.x[0, 0])
    assert estimate.get_clim() == (of.x[0].min(), of.x[0].max())
    assert lines(figure, r"rise of $\log\,p$") == [[[0, 0], [1, 28], [2, 29.5], [3, 30]]]
    assert lines(figure, "residual") == [[[0, 1], [1, 0.1], [2, 0.01], [3, 0.001]]]
    (residual,) = [ax for ax in figure.axes if ax.get_ylabel() == "residual"]
    assert residual.get_yscale() == "log"
    assert figure.get_suptitle() == "17 evaluations of the prior, 0.25 s\nconverged: it did"
    assert len(figure.axes) == 3


def test_every_noise_level_begins_anew(solution):
    figure = solution([2.0, 2.0, 1.0, 1.0, 0.5], [-9.0, -5.0, -70.0, -60.0, -3.0]).plot()
    rises = [[[0, 0], [1, 4]], [[2, 0], [3, 10]], [[4, 0]]]
    assert lines(figure, r"rise of $\log\,p$") == rises
    assert lines(figure, "noise level") == [[[0, 2], [1, 2], [2, 1], [3, 1], [4, 0.5]]]


def test_without_a_potential_there_is_no_objective(solution):
    of = solution([1.0, 0.5])
    of.residual[0] = math.nan
    figure = of.plot()
    assert {ax.get_ylabel() for ax in figure.axes} == {"", "residual", "noise level"}
    figure.canvas.draw()


def test_a_residual_of_zero_is_left_out_of_the_log_scale(solution):
    of = solution([1.0, 1.0])
    of.residual[:] = 0
    figure = of.plot()
    figure.canvas.draw()
    assert all(math.isnan(value) for _, value in lines(figure, "residual")[0])


@pytest.mark.parametrize("channels", [1, 2])
def test_of_a_complex_image_the_magnitude_is_shown(channels, chain, solution):
    of = chain(4, channels)
    of = of._replace(samples=(3 + 4j) * of.samples, mean=(3 + 4j) * of.mean)
    shown = {title.partition(",")[0]: image for title, image in images(of.plot()).items()}
    np.testing.assert_allclose(shown["mean"].get_array(), 5 * chain(4, channels).mean[0, 0].abs())
    figure = solution([1.0, 1.0])._replace(x=of.mean).plot()
    assert "magnitude" in next(iter(images(figure)))


def test_results_can_be_read(chain, solution):
    assert repr(chain(1)) == "Chain(1 draw of 2 images of 1 x 6 x 8)"
    moments = chain(32)._replace(samples=None, state=torch.zeros(1, 1, 96, 96))
    assert repr(moments) == "Chain(32 draws of 1 x 96 x 96, moments only)"
    of = solution([1.0, 1.0])
    assert repr(of) == "Solution(2 images of 1 x 6 x 8, converged in 12 steps, 17 evaluations, 0.25 s)"
    of = of._replace(reason="stopped after 12 steps", x=of.x[:1])
    assert repr(of) == "Solution(1 x 6 x 8, 12 steps, 17 evaluations, 0.25 s)"
    history = ps.History(np.array([2.0, 1.25]), np.ones(2), 3.0)
    assert repr(history) == "History(2 steps, last loss 1.25, 3 s)"
    surprise = ps.Surprise(np.ones((64, 80)), 2.345, 0.01, np.ones((64, 80)))
    assert repr(surprise) == "Surprise(64 x 80, value 2.35, p = 0.01)"
    ranks = rank_histogram(torch.arange(10).repeat(6), 9, bins=5)
    assert repr(ranks) == "RankHistogram(60 ranks in 5 bins, p = 1)"


def test_notebooks_show_the_text_and_one_figure(chain, solution):
    results = [
        chain(5),
        solution([1.0, 1.0]),
        ps.History(np.arange(10.0), np.ones(10), 3.0),
        ps.Surprise(np.ones((64, 80)), 2.0, 0.01, np.ones((64, 80))),
        rank_histogram(torch.arange(10).repeat(6), 9, bins=5),
    ]
    for result in results:
        shown = result._repr_html_()
        assert html.escape(repr(result)) in shown
        png = base64.b64decode(re.search('base64,([^"]*)', shown)[1])
        height, width = plt.imread(io.BytesIO(png)).shape[:2]
        assert 100 < height < 1200
        assert 100 < width < 1200
    assert not plt.get_fignums()


def autoregression(a, n, chains):
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(chains, 1, 6, 6, generator=generator)]
    for _ in range(n - 1):
        x.append(a * x[-1] + math.sqrt(1 - a**2) * torch.randn(x[0].shape, generator=generator))
    return torch.stack(x)


def test_the_summary_of_mixing_tells_a_chain_that_mixes_from_one_that_drifts(chain):
    pytest.importorskip("arviz")
    mixed = autoregression(0.5, 2000, 1)
    found = re.fullmatch(r"ESS (\d+), R-hat (\d\.\d\d)", mixing_summary(mixed))
    assert found
    # Of the mean, correlated as a^t, ESS = n (1 - a) / (1 + a); of its square, as a^2t, more.
    assert float(found[1]) == pytest.approx(2000 / 3, rel=0.2)
    assert float(found[2]) < 1.02
    assert mixing_summary(mixed[:, :1] + 1j * mixed[:, :1]) == mixing_summary(mixed)
    drifting = mixed[:200] + torch.linspace(0, 9, 200)[:, None, None, None, None]
    assert float(mixing_summary(drifting).split()[-1]) > 1.5
    assert mixing_summary(mixed[:7]) == ""


def test_without_arviz_the_summary_is_left_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "arviz", None)
    assert mixing_summary(autoregression(0.5, 200, 1)) == ""
    assert mixing_summary(autoregression(0.9, 50, 1)).startswith("too short, worth")
