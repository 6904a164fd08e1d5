"""Let a prior learn from the noisy image itself, and keep what it learned only if that helps.

    y = x + sigma z                            one noisy image or several of one kind; no clean images
    loss = E_b sigma^2 [ |s|^2 + 2 b' (s(y + e b) - s(y - e b)) / 2 e ]        over random crops of y

Stein's unbiased risk estimate replaces the unknown clean image, with one probe b of random signs per
step (:mod:`patchscore.adaptation.risk`). The pixels are split into two halves, in blocks. Each half
trains its own copy of the prior and evaluates the copy trained on the other half
(:mod:`patchscore.adaptation.search`). This cross-validated gain sets the learning rate and the stopping
time, and decides whether the result is kept: the gain must exceed twice its standard error plus what
a plausible error of sigma could simulate. Otherwise the given prior is returned.

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

from patchscore.adaptation.noise_estimation import noise_and_image
from patchscore.adaptation.residual import Residual, look_at_residual, suspicions
from patchscore.adaptation.risk import respond
from patchscore.adaptation.search import Check, Search, SplitImage
from patchscore.adaptation.surprise import KEY, SMALLEST, Surprise, surprise
from patchscore.checks import check_counts, check_positive, one_number
from patchscore.errors import InputError
from patchscore.figures import counted
from patchscore.images import ImageSource, training_images
from patchscore.measurements.noisy_image import NoisyImage
from patchscore.priors.prior import PatchPrior
from patchscore.randomness import seeded


class Report(NamedTuple):
    """What was measured and decided.

    Attributes
    ----------
    adapted : whether the prior was changed
    reason : why, in words
    gain, error
        The estimated decrease of the mean squared error and its standard error, as fractions of the
        error before. Each half of the pixels evaluates the weights trained on the other half.
    sigmas : the noise level of each image, in its unit
    steps, learning_rate : of the weights that are kept; 0 steps if none are
    seconds : total time
    checks : every evaluation of the search
    residuals : the residual of each image under the given prior
    surprises
        How unlike the training images each image is, with a map to plot; None for images below 64 x 64.
        Empty if the card of the prior has no expectation.
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
                    f"{name} is unlike the training images: surprise {found.value:.1f} (5 % of the "
                    "training images exceed 1)"
                )
        return "\n".join(lines)

    def __repr__(self) -> str:
        verdict = "adapted" if self.adapted else "not adapted"
        gain = f", gain {100 * self.gain:.1f} +- {100 * self.error:.1f} %" if self.adapted else ""
        parts = counted(self.steps, "step"), counted(len(self.warnings), "warning")
        return f"Report({verdict}{gain}, {', '.join(parts)}, {self.seconds:.3g} s)"


class Adapted(NamedTuple):
    """The prior to use, and the report."""

    prior: PatchPrior
    report: Report


def adapt(
    prior: PatchPrior,
    y: ImageSource | NoisyImage,
    sigma: float | Sequence[float] | None = None,
    *,
    generator: torch.Generator | None = None,
    max_seconds: float = 60.0,
    max_steps: int = 400,
    learning_rate: float = 1e-3,
    sigma_error: float | None = None,
    progress: bool = True,
) -> Adapted:
    """Adapt a prior to the noisy image that it is to restore, or to several noisy images of one kind.

    Parameters
    ----------
    prior
        It is not changed.
    y
        One image (H, W), the images of a set as for :func:`patchscore.fit`, or a
        :class:`~patchscore.measurements.noisy_image.NoisyImage` with its own noise level.
    sigma
        The noise level in the unit of the images: one for all, one for each, or None to estimate each.
    generator
        For the halves, the crops and the probes; on the CPU. Seed 0 by default. On one machine, with
        the same number of threads, the same seed gives the same prior to the last bit.
    max_seconds, max_steps
        Upper limits. If time runs out, the report says after how many steps; the same ``max_steps``
        with more time then gives the same prior again.
    learning_rate
        The initial one. It is halved, from the best weights so far, whenever there is no improvement.
    sigma_error
        The relative error of the noise level. A gain that such an error could simulate does not count.
        By default 0.005 for a level that is given, and that of the estimate for one that is estimated.
    progress
        Whether a progress bar is shown.

    Returns
    -------
    Adapted
        A new prior with its history in its card, or the given one, and the report.

    Raises
    ------
    InputError
        If an image, a noise level or an option does not fit, or the prior has nothing to learn.

    Notes
    -----
    Unreliable if the noise is not white and Gaussian or its level is wrong, because the risk estimate is
    then biased. The residual is tested for this, and clear violations are refused. Overestimating sigma
    by 10 % on fine texture is the hardest error to detect, and can cost up to 0.8 dB. Gains are largest
    where structure repeats and where the image is unlike the training images of the prior. On small
    images a gain is rarely significant.
    """
    start = time.perf_counter()
    if not isinstance(prior, PatchPrior):
        raise InputError(
            f"the prior is {prior!r:.100}; expected a PatchPrior: patchscore.load_prior(...)."
        )
    generator = seeded(generator)
    check_counts(max_steps=max_steps)
    check_positive(learning_rate=learning_rate)
    if not one_number(max_seconds, "max_seconds") > 0:
        raise InputError(f"max_seconds is {max_seconds}; expected a positive number, or math.inf.")
    if sigma_error is not None and not 0 <= one_number(sigma_error, "sigma_error") < 1:
        raise InputError(
            f"sigma_error is {sigma_error}; expected a fraction of sigma, 0 if it is known exactly."
        )
    if not any(True for _ in prior.network.parameters()):
        raise InputError(
            f"{type(prior.network).__name__} has no parameters, so there is nothing to adapt; use a "
            "learned prior."
        )
    noisy = _noisy_images(prior, y, sigma, sigma_error)
    images = [SplitImage.of(image, prior, generator) for image in noisy]
    surprises = _surprises(prior, noisy)
    exact = prior.with_precision("float32")  # differences of rounded estimates would be noise
    first_look = time.perf_counter()
    before = [respond(exact, image.y, image.sigma, image.probes) for image in images]
    residuals = tuple(
        look_at_residual(old, image.y, image.sigma, image.probes)
        for old, image in zip(before, images, strict=True)
    )
    # The last check evaluates both halves, and its time counts.
    last_look = 2 * (time.perf_counter() - first_look)
    warnings, obstacle = suspicions(residuals)
    warnings = (*(text for image in noisy for text in image.doubts(prior)), *warnings)
    if not any(image.half.any() for image in images):
        obstacle = "the images are too small to be split into two halves that evaluate each other"
    doubt = max(image.sigma_error for image in noisy)
    search = Search(exact, images, before, learning_rate, doubt, generator)
    obstacle = obstacle or search.obstacle()
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
        tuple(image.sigma for image in noisy),
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
        "sigmas": list(report.sigmas),
        "learning_rate": report.learning_rate,
        "steps": report.steps,
        "gain": report.gain,
        "error": report.error,
        "date": date.today().isoformat(),
    }
    adapted.card.pop(KEY, None)  # the expectation holds for the weights before
    adapted.card["adapted"] = [*adapted.card.get("adapted", []), entry]
    return Adapted(adapted, report)


def _noisy_images(
    prior: PatchPrior,
    y: ImageSource | NoisyImage,
    sigma: float | Sequence[float] | None,
    sigma_error: float | None,
) -> list[NoisyImage]:
    """The images to adapt to, each with its noise level and the channels of the prior."""
    channels = prior.network.channels
    if isinstance(y, NoisyImage):
        if sigma is not None or sigma_error is not None:
            raise InputError("a NoisyImage has its own noise level; leave out sigma and sigma_error.")
        images = y.split(channels)
    else:
        source: ImageSource = [y] if isinstance(y, np.ndarray | Tensor) and y.ndim == 2 else y
        data = training_images(source, channels=channels, smallest=1, constant=True)
        levels = [*sigma] if isinstance(sigma, Sequence) else [sigma] * len(data)
        if len(levels) != len(data):
            raise InputError(
                f"there are {len(data)} images and {len(levels)} noise levels; give one for all, or one "
                "for each."
            )
        images = [
            noise_and_image(image, level, channel_axis=0)[1]
            if level is None and sigma_error is None
            else NoisyImage.of(image, level, channel_axis=0, sigma_error=sigma_error)
            for image, level in zip(data, levels, strict=True)
        ]
    for number, image in enumerate(images):
        if image.sigma == 0:
            raise InputError(f"no noise was found in image {number}; give sigma if there is some.")
    return images


def _surprises(prior: PatchPrior, images: Sequence[NoisyImage]) -> tuple[Surprise | None, ...]:
    if KEY not in prior.card:
        return ()
    large = (min(image.pixels.shape[1:]) >= SMALLEST for image in images)
    return tuple(
        surprise(prior, image) if enough else None for image, enough in zip(images, large, strict=True)
    )


def _reason(search: Search) -> str:
    best = search.best
    if not search.checks:
        return f"{search.ended}, before any could be evaluated; allow more time"
    if best.step > 0:
        return f"the estimated error fell by {best} in {best.step} steps; {search.ended}"
    closest = max(search.checks, key=lambda check: check.bound)
    return (
        f"no significant gain (at best {closest} of the estimated error), so the prior is unchanged; "
        f"{search.ended}"
    )
