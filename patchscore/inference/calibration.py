"""Whether samples hold the truth as often as they claim.

    P(x_(a) < truth < x_(b)) = (b - a) / (n + 1)       of n draws in order, if the truth is one of them
    rank = #{k : x_k < truth} is uniform on 0, 1, .., n                          (the same, in general)

Both are exact for every n, and both hold for truths drawn from the prior, data made of them, and draws
from the posterior.

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

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEAST_EXPECTED = 5  # in a bin, for the chi-square law to hold
MOST_BINS = 20
BAND = 0.99


class Coverage(NamedTuple):
    """How often intervals from samples hold the truth.

    Attributes
    ----------
    level : what was asked for
    share : what was found, over all pixels of all images
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

    The interval ends at the order statistics of positions a = (1 - level) (n + 1) / 2 from either side.
    Where a is no whole number each end is one of the two next to it, at random in proportion, and the
    share is the mean over that: it is exactly the level for every distribution and n, not only as n
    grows.

    Parameters
    ----------
    samples
        n independent draws of each image, such as ``Chain.samples`` of :func:`sample_denoised`.
    truth
        The images that the data were made of.

    Raises
    ------
    InputError
        If shapes do not fit, a value is not finite, or n is too small for the level: a >= 1 takes
        n >= 2 / (1 - level) - 1, 19 draws for 90 %.

    Notes
    -----
    The level is reached on average over truths that come from the prior itself. A share that is off may
    thus be the prior's fault or the sampler's. Fails to see errors that cancel: half the images too
    narrow and half too wide, or the prior itself as sampler, whose intervals are calibrated and say
    nothing about y (see the width). Pixels of one image are correlated, so only ``standard_error``, from
    many images, says how far from the level is too far. Neighbouring draws of one Markov chain narrow
    the interval; thin them by :func:`effective_sample_size`. Pixels where draws and truth are equal, as
    after clipping, count as if the truth were below.
    """
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
    # A rank r is the stretch [r, r + 1] of n + 1; what of it lies between the two ends counts.
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

    For simulation-based calibration: draw truths from the prior, data from the truths, samples from the
    posteriors; the ranks are then uniform on 0, 1, .., n.

    Parameters
    ----------
    samples
        n independent draws of each image.
    statistic
        f, from images (B, C, H, W) to numbers (B, ...): ``lambda x: x.mean((1, 2, 3))``, or a few
        distant pixels, ``lambda x: x[:, 0, ::16, ::16]``. It may depend on the data, image by image, and
        one such as log p(y | x) sees more than any pixel. If not given, every pixel is one.

    Raises
    ------
    InputError
        If shapes do not fit or a value is not finite.

    Notes
    -----
    Fails for statistics with ties, as of clipped pixels: equal values count as not below.
    """
    if samples.ndim < 2 or samples.shape[1:] != truth.shape or samples.numel() == 0:
        raise InputError(
            f"samples have shape {tuple(samples.shape)} and the truth {tuple(truth.shape)}; expected "
            "(n, B, C, H, W) and (B, C, H, W): n draws of each image."
        )
    if not bool(samples.isfinite().all() and truth.isfinite().all()):
        raise InputError("samples or truth have values that are NaN or infinite; a rank needs numbers.")
    f = statistic if statistic is not None else lambda x: x
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

    A valley means samples that are too narrow, a hill too wide, a slope to the right too low.

    Parameters
    ----------
    ranks
        Of N independent truths, one statistic: a column of :func:`rank_statistics`.
    draws
        The n that ranks were taken among.
    bins
        As equal as whole ranks allow, with what is expected in proportion. If not given, at most 20,
        with ten ranks in each, and of equal width where that takes no less than half as many.

    Raises
    ------
    InputError
        If ranks are not one list of whole numbers from 0 to draws, or there are too few for the bins.

    Notes
    -----
    Lies, towards small p, for ranks that are not independent: pixels of one image are correlated, and so
    are statistics of one image and draws of one Markov chain. Test one statistic of many truths (and
    divide the level by the number of statistics), or flatten only pixels that are further apart than the
    posterior is correlated. Fails to see what the statistic does not depend on.
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
