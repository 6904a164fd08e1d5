"""Learn from the noisy image itself, unless that would make it worse.

    y = x + sigma z                                the noisy image, or several of one kind; no clean one
    loss = E_b sigma^2 [ |s|^2 + 2 b' (s(y + e b) - s(y - e b)) / 2 e ]         over random crops of y

Without the truth, Stein's unbiased estimate of the risk takes its place, with one probe b of random
signs in every step (:mod:`patchscore.adaptation.risk`). The pixels are split into two halves, in blocks:
each teaches a copy of the prior, and judges the copy that the other one taught
(:mod:`patchscore.adaptation.search`). By the gain that is measured so, it is decided how fast to learn,
when to stop, and whether to keep what was learned: only if the gain is above twice its own standard
error and what a small error of sigma could feign. Else the prior that was given comes back.

References: Stein, Annals of Statistics 9 (1981); Soltanayev and Chun, NeurIPS 2018 (SURE as the loss of
a network); Mohan, Vincent, Manzorro, Crozier, Simoncelli and Fernandez-Granda, "Adaptive denoising via
GainTuning", NeurIPS 2021 (adaptation to one image by its risk).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from datetime import date
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from patchscore.adaptation.moving import Moving, chart
from patchscore.adaptation.residual import Residual, look_at_residual, suspicions
from patchscore.adaptation.risk import random_signs, respond
from patchscore.adaptation.search import Check, NoisyImage, Search, random_halves
from patchscore.adaptation.surprise import KEY, SMALLEST, Surprise, surprise
from patchscore.checks import check_noise_level
from patchscore.errors import InputError
from patchscore.images import ImageSource, training_images
from patchscore.measurements.noise import estimated_sigma
from patchscore.priors.prior import PatchPrior
from patchscore.randomness import seeded

PROBES = 2
# How well a noise level is known, as a share of it.
GIVEN_ERROR, ESTIMATED_ERROR = 0.005, 0.1


class Report(NamedTuple):
    """What was seen and decided.

    Attributes
    ----------
    adapted : whether the prior was changed
    reason : why, in words
    gain, error
        The estimated fall of the mean squared error and its standard error, as shares of the error
        before: each half of the pixels judges what the other one taught.
    sigmas : the noise level of each image, in its unit
    steps, learning_rate : of the weights that are kept; 0 steps if none are
    seconds : all of it
    checks : all that was tried
    residuals : what is left of each image under the prior that was given
    surprises
        How unlike its training images each image is for that prior, with a map to plot, in units of the
        noise; None for images too small for it. Empty if the prior does not know what to expect.
    warnings : what may be wrong with the images or their noise levels, in words
    """

    adapted: bool
    reason: str
    gain: float
    error: float
    sigmas: tuple[float, ...]
    steps: int
    learning_rate: float
    seconds: float
    checks: tuple[Check, ...]
    residuals: tuple[Residual, ...]
    surprises: tuple[Surprise | None, ...]
    warnings: tuple[str, ...]

    @property
    def decibels(self) -> float:
        """The estimated gain in dB."""
        return -10 * math.log10(max(1 - self.gain, 1e-12))

    def __str__(self) -> str:
        verdict = "adapted" if self.adapted else "not adapted"
        lines = [f"{verdict}: {self.reason}", *(f"warning: {text}" for text in self.warnings)]
        for number, found in enumerate(self.surprises):
            if found is not None and found.value > 1:
                name = f"image {number}" if len(self.surprises) > 1 else "the image"
                lines.append(
                    f"{name} is unlike the training images: a surprise of {found.value:.1f}, where 1 is "
                    "the mark that 5 % of them exceed"
                )
        return "\n".join(lines)


class Adapted(NamedTuple):
    """The prior to use, and how it came about."""

    prior: PatchPrior
    report: Report


def adapt(
    prior: PatchPrior,
    y: np.ndarray | Tensor | ImageSource,
    sigma: float | Sequence[float] | None = None,
    *,
    generator: torch.Generator | None = None,
    max_seconds: float = 60.0,
    max_steps: int = 400,
    learning_rate: float = 1e-3,
    sigma_error: float | None = None,
    moving: Moving = "all",
    progress: bool = True,
) -> Adapted:
    """Move a prior to the noisy image that it is to restore, or to several noisy images of one kind.

    Parameters
    ----------
    prior
        It is not changed.
    y
        One image (H, W), or the images of a set as for :func:`patchscore.fit`.
    sigma
        The noise level in the unit of the images: one for all, one for each, or None to have each
        estimated.
    generator
        Of the halves, the crops and the probes; on the CPU. Seed 0 if not given. On one machine, with
        one number of threads, the same seed gives the same prior to the last bit.
    max_seconds, max_steps
        When to stop at the latest. If it was the time, the report says after how many steps, and the
        same ``max_steps`` with more time gives the same prior again.
    learning_rate
        The first one; it is halved, from the best weights so far, whenever it gains nothing.
    sigma_error
        How well the noise level is known, as a share of it: what such an error could feign is not
        taken for a gain. By default 0.005 for a level that is given and 0.1 for one that is estimated.
    moving
        The weights that are learned: ``"all"``, those ``"upper"`` than the first layer, one of the
        ``"gains"`` for every filter, or a ``"low-rank"`` change of the filters.
    progress
        Whether a progress bar is shown.

    Returns
    -------
    Adapted
        A new prior with its history in its card, or the one given, and the report.

    Raises
    ------
    InputError
        If an image, a noise level or an option does not fit, or the prior has nothing to learn.

    Notes
    -----
    Fails if the noise is not white and Gaussian or its level is wrong, since the risk is then biased:
    the residual is compared with what is expected, and a prior is not adapted to noise that is clearly
    of another kind. Gains are largest where structure repeats and where the image is unlike what the
    prior was trained on; on an image of few pixels they can rarely be told from chance.
    """
    start = time.perf_counter()
    generator = seeded(generator)
    if sigma_error is None:
        sigma_error = ESTIMATED_ERROR if sigma is None else GIVEN_ERROR
    _check(max_seconds, max_steps, learning_rate, sigma_error)
    moves = chart(prior.network, moving, generator)
    images, sigmas = _noisy_images(prior, y, sigma, generator)
    surprises = _surprises(prior, images)
    exact = prior.with_precision("float32")  # differences of rounded estimates would be noise
    first_look = time.perf_counter()
    before = [respond(exact, image.y, image.sigma, image.probes) for image in images]
    residuals = tuple(
        look_at_residual(old, image.y, image.sigma, image.probes)
        for old, image in zip(before, images, strict=True)
    )
    # The last check looks at what each half has taught, and counts.
    last_look = 2 * (time.perf_counter() - first_look)
    warnings, obstacle = suspicions(residuals)
    if not any(image.half.any() for image in images):
        obstacle = "the images are too small for two halves, one to judge what the other one taught"
    search = Search(exact, moves, images, before, learning_rate, sigma_error, generator)
    if obstacle is None:
        with tqdm(total=max_steps, unit="step", disable=not progress) as bar:
            search.run(max_steps, start + max_seconds - last_look, bar)
    best = search.best
    accepted = best.step > 0
    report = Report(
        accepted,
        obstacle or _reason(search),
        best.gain,
        best.error,
        sigmas,
        best.step,
        best.learning_rate,
        time.perf_counter() - start,
        tuple(search.checks),
        residuals,
        surprises,
        warnings,
    )
    if not accepted:
        return Adapted(prior, report)
    adapted = search.adapted().with_precision(prior.precision)
    entry = {
        "images": len(images),
        "sigmas": list(sigmas),
        "moving": moving,
        "learning_rate": report.learning_rate,
        "steps": report.steps,
        "gain": report.gain,
        "error": report.error,
        "date": date.today().isoformat(),
    }
    adapted.card.pop(KEY, None)  # it expects what the prior given made of its training images
    adapted.card["adapted"] = [*adapted.card.get("adapted", []), entry]
    return Adapted(adapted, report)


def _check(
    max_seconds: float,
    max_steps: int,
    learning_rate: float,
    sigma_error: float,
) -> None:
    if not max_seconds > 0:
        raise InputError(f"max_seconds is {max_seconds}; expected a positive number.")
    if not (isinstance(max_steps, int | np.integer) and max_steps > 0):
        raise InputError(f"max_steps is {max_steps!r}; expected a positive whole number.")
    if not 0 < learning_rate < math.inf:
        raise InputError(f"learning_rate is {learning_rate}; expected a positive number.")
    if not 0 <= sigma_error < 1:
        raise InputError(
            f"sigma_error is {sigma_error}; expected a share of sigma, 0 if it is known exactly."
        )


def _noisy_images(
    prior: PatchPrior,
    y: np.ndarray | Tensor | ImageSource,
    sigma: float | Sequence[float] | None,
    generator: torch.Generator,
) -> tuple[list[NoisyImage], tuple[float, ...]]:
    """The images, each in units of its noise and about its mean if that changes nothing."""
    network = prior.network
    source: ImageSource = [y] if isinstance(y, np.ndarray | Tensor) and y.ndim == 2 else y
    data = training_images(source, channels=network.channels, smallest=1, constant=True)
    if sigma is None:
        levels = [estimated_sigma(image.numpy(), 0) for image in data]
    else:
        levels = [*sigma] if isinstance(sigma, Sequence) else [sigma] * len(data)
    if len(levels) != len(data):
        raise InputError(
            f"there are {len(data)} images and {len(levels)} noise levels; give one for all, or one for "
            "each."
        )
    images = []
    for number, (image, level) in enumerate(zip(data, levels, strict=True)):
        if sigma is None and level == 0:
            raise InputError(f"no noise was found in image {number}; give sigma if there is some.")
        check_noise_level(level)
        u = image.double()[None]
        if network.brightness_invariant:
            u = u - u.mean()
        unit = level if prior.scale_invariant else 1.0
        u = (u / unit).to(network.like)
        half = random_halves(u.shape[-2], u.shape[-1], generator).to(u.device)
        images.append(NoisyImage(u, level / unit, random_signs(PROBES, u, generator), half))
    return images, tuple(float(level) for level in levels)


def _surprises(prior: PatchPrior, images: Sequence[NoisyImage]) -> tuple[Surprise | None, ...]:
    if KEY not in prior.card:
        return ()
    large = (min(image.y.shape[-2:]) >= SMALLEST for image in images)
    return tuple(
        surprise(prior, image.y, image.sigma) if enough else None
        for image, enough in zip(images, large, strict=True)
    )


def _reason(search: Search) -> str:
    best = search.best
    if not search.checks:
        return f"{search.ended}, before any could be judged; give it more"
    if best.step > 0:
        return f"the estimated error fell by {_percent(best)} in {best.step} steps; {search.ended}"
    closest = max(search.checks, key=lambda check: check.bound)
    return (
        f"no gain that could be told from chance, at best {_percent(closest)} of the estimated error, "
        f"so the prior is as it was given; {search.ended}"
    )


def _percent(check: Check) -> str:
    return f"{100 * check.gain:.1f} +- {100 * check.error:.1f} %"
