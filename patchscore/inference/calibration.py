"""Calibration: whether intervals from samples hold the truth as often as they claim.

    P(x_(a) < truth < x_(b)) = (b - a) / (n + 1)        x_(1) < .. < x_(n) the draws in order
    rank = #{k : x_k < truth} is uniform on 0, 1, .., n

Both are exact for every n if the truth is drawn from the prior, the data are made from the truth, and
the samples are drawn from the posterior.

References: Talts et al., "Validating Bayesian Inference Algorithms with Simulation-Based Calibration",
arXiv:1804.06788, theorem 1; David and Nagaraja, "Order Statistics" (2003), section 7.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from patchscore.errors import InputError
from patchscore.figures import as_html, rank_axes
from patchscore.linear_algebra import components

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEAST_EXPECTED = 5  # in a bin, for the chi-square law to hold
MOST_BINS = 20
BAND = 0.99


class Coverage(NamedTuple):
    """How often intervals from samples hold the truth.

    Attributes
    ----------
    level : the nominal share
    share : that was found, over all pixels of all images
    standard_error : of the share, from its spread over the images; NaN for a single one
    per_image : (B,), the share of the pixels of each
    width : (B,), the mean width of the interval, in the unit of the image
    """

    level: float
    share: float
    standard_error: float
    per_image: Tensor
    width: Tensor


@torch.no_grad()
def coverage(samples: Tensor, truth: Tensor, level: float = 0.9) -> Coverage:
    """Share of the pixels whose central credible interval holds the truth: (n, B, ...), (B, ...).

    The interval ends at the order statistics of position a = (1 - level) (n + 1) / 2 from both sides. If
    a is not a whole number, each end is one of its two neighbours, at random in proportion, and the
    share is the mean over that. So a calibrated sampler reaches exactly the level, for every n.

    Parameters
    ----------
    samples
        n independent draws of each image, such as ``Chain.samples`` of :func:`sample_denoised`.
    truth
        The images that the data were made from.

    Raises
    ------
    InputError
        If shapes do not fit, a value is not finite, or n is too small for the level: a >= 1 needs
        n >= 2 / (1 - level) - 1, 19 draws for 90 %.

    Notes
    -----
    The level is reached on average over truths from the prior, so a wrong share can come from the prior
    or from the sampler. Errors that cancel are not seen: half of the images too narrow and half too
    wide, or samples of the prior, which are calibrated but say nothing about y (see the width). Pixels
    of one image are correlated; ``standard_error``, from many images, tells which deviation is
    significant. Neighbouring draws of a Markov chain make the interval too narrow: thin them by
    :func:`effective_sample_size`. A truth that equals a draw, as after clipping, counts as below it.
    """
    samples, truth = components(samples), components(truth)
    ranks = rank_statistics(samples, truth)
    if not 0 < level < 1:
        raise InputError(f"level is {level}; expected a number between 0 and 1, such as 0.9.")
    n = len(samples)
    needed = math.ceil(2 / (1 - level) - 1 - 1e-9)
    if n < needed:
        highest = (n - 1) / (n + 1)
        raise InputError(
            f"{n} samples are too few for an interval of level {level:g}: draw {needed} or more, or ask "
            f"for a level of at most {math.floor(1000 * highest) / 1000:g}."
        )
    a = max(1.0, (1 - level) / 2 * (n + 1))
    # A rank r is the interval [r, r + 1] of [0, n + 1]. The part of it between the two ends counts.
    inside = ((ranks + 1).clamp_max(n + 1 - a) - ranks.clamp_min(a)).clamp_min(0).double()
    per_image = inside.reshape(len(truth), -1).mean(1)
    spread = per_image.std().item() if len(per_image) > 1 else math.nan
    width = torch.stack([_width(samples[:, b], a) for b in range(len(truth))])
    return Coverage(level, per_image.mean().item(), spread / math.sqrt(len(per_image)), per_image, width)


@torch.no_grad()
def rank_statistics(
    samples: Tensor, truth: Tensor, statistic: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Rank of the truth among its n samples, 0 to n: (n, B, ...), (B, ...) -> (B, ...) of int64.

        rank = #{k : f(samples_k) < f(truth)}

    For simulation-based calibration: draw truths from the prior, make data from the truths, and draw
    samples from the posteriors. The ranks are then uniform on 0, 1, .., n.

    Parameters
    ----------
    samples
        n independent draws of each image.
    statistic
        f, from images (B, C, H, W) to numbers (B, ...): ``lambda x: x.mean((1, 2, 3))``, or a few
        distant pixels, ``lambda x: x[:, 0, ::16, ::16]``. It may depend on the data, image by image;
        log p(y | x) sees more than any pixel. By default every pixel by itself, and both parts of a
        complex one, (B, ..., 2).

    Raises
    ------
    InputError
        If shapes do not fit or a value is not finite.

    Notes
    -----
    Biased for statistics with ties, such as clipped pixels: equal values count as not below.
    """
    if samples.ndim < 2 or samples.shape[1:] != truth.shape or samples.numel() == 0:
        raise InputError(
            f"samples have shape {tuple(samples.shape)} and the truth {tuple(truth.shape)}; expected "
            "(n, B, C, H, W) and (B, C, H, W): n draws of each image."
        )
    if not bool(samples.isfinite().all() and truth.isfinite().all()):
        raise InputError("samples or truth have values that are NaN or infinite; a rank needs numbers.")
    f = statistic if statistic is not None else components
    of_truth = f(truth)
    if len(of_truth) != len(truth):
        raise InputError(
            f"the statistic of {len(truth)} images has shape {tuple(of_truth.shape)}; expected "
            f"({len(truth)}, ...), each image by itself: lambda x: x.mean((1, 2, 3))."
        )
    below = torch.zeros(of_truth.shape, dtype=torch.int64, device=truth.device)
    for sample in samples:
        below += f(sample) < of_truth
    return below


class RankHistogram(NamedTuple):
    """Ranks in bins, and whether they are uniform.

    Attributes
    ----------
    counts, expected : (bins,)
    edges : (bins + 1,), a bin holds the ranks edges[i] <= rank < edges[i + 1]
    chi_square : sum of (counts - expected)^2 / expected
    p_value : of a chi-square so large or larger from uniform ranks
    """

    counts: np.ndarray
    expected: np.ndarray
    edges: np.ndarray
    chi_square: float
    p_value: float

    def plot(self, ax: Axes | None = None) -> Axes:
        """Counts over what is expected, with the band that holds 99 % of uniform ranks in each bin."""
        total = self.counts.sum()
        band = np.array(stats.binom.interval(BAND, total, self.expected / total)) / self.expected
        title = f"{total} ranks among {self.edges[-1] - 1} draws, p = {self.p_value:.2g}"
        return rank_axes(self.edges, self.counts / self.expected, band, title, ax)

    def __repr__(self) -> str:
        ranks, bins = self.counts.sum(), len(self.counts)
        return f"RankHistogram({ranks:,} ranks in {bins} bins, p = {self.p_value:.2g})"

    def _repr_html_(self) -> str:
        return as_html(self)


def rank_histogram(ranks: Tensor, draws: int, *, bins: int | None = None) -> RankHistogram:
    """Sort ranks (N,) into bins and test that they are uniform on 0 .. draws, by Pearson's chi-square.

    A valley: the samples are too narrow. A hill: too wide. Rising to the right: too low.

    Parameters
    ----------
    ranks
        One statistic of N independent truths: a column of :func:`rank_statistics`.
    draws
        The number n of samples.
    bins
        As equal as whole ranks allow, with expected counts in proportion. By default at most 20, with
        ten ranks in each, and of equal width where that needs at least half as many bins.

    Raises
    ------
    InputError
        If ranks are not one list of whole numbers from 0 to draws, or there are too few for the bins.

    Notes
    -----
    p is too small for ranks that are not independent, such as those of pixels or statistics of one
    image, or of draws of one Markov chain. Test one statistic of many truths (for several statistics,
    divide the significance level by their number), or flatten only pixels further apart than the
    posterior is correlated. Errors that the statistic does not depend on are not seen.
    """
    if ranks.ndim != 1:
        raise InputError(
            f"ranks have shape {tuple(ranks.shape)}; expected (N,), one statistic of N independent "
            "truths, such as ranks[:, 0]. Pixels of one image are correlated, and counting them as "
            "independent rejects samplers that are right; if they are far apart, flatten() them."
        )
    if ranks.is_floating_point() or not bool(((ranks >= 0) & (ranks <= draws)).all()):
        raise InputError(f"expected ranks of whole numbers from 0 to {draws}, one of {draws} draws.")
    total = len(ranks)
    bins = _bins(total, draws) if bins is None else bins
    if not 2 <= bins <= draws + 1:
        raise InputError(f"bins is {bins}; expected at least 2 and at most {draws + 1}, one per rank.")
    edges = np.arange(bins + 1) * (draws + 1) // bins
    expected = total * np.diff(edges) / (draws + 1)
    if expected.min() < LEAST_EXPECTED:
        raise InputError(
            f"{total} ranks are too few for {bins} bins: a bin should expect {LEAST_EXPECTED} or more, "
            "so take fewer bins or more truths."
        )
    counts = np.histogram(ranks.cpu().numpy(), edges - 0.5)[0]
    test = stats.chisquare(counts, expected)
    return RankHistogram(counts, expected, edges, float(test.statistic), float(test.pvalue))


def _bins(total: int, draws: int) -> int:
    most = min(draws + 1, MOST_BINS, max(2, total // 10))
    equal = [bins for bins in range(max(2, most // 2), most + 1) if (draws + 1) % bins == 0]
    return max(equal, default=most)


def _width(samples: Tensor, a: float) -> Tensor:
    """The mean distance between the order statistics a from below and from above, interpolated."""
    ordered, whole, part = samples.sort(0).values, int(a), a % 1
    lower = ordered[whole - 1].lerp(ordered[whole], part)
    return (ordered[-whole].lerp(ordered[-whole - 1], part) - lower).mean()
