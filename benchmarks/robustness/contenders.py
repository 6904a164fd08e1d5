"""The denoisers that the robustness benchmark compares, behind one signature.

    denoised = f(noisy, sigma; t),    t = argmax over three candidates of the mean PSNR on held-out x

t is the strength of total variation and of non-local means, for every noise level by itself, and the
learning rate of a network (:mod:`benchmarks.robustness.training`); the images x are of the training part
of a set, and are not learned from. Wavelets, BM3D, EPLL and the bundled prior are taken as they come;
the adapted one is the bundled one after it has learned from the noisy image (:func:`patchscore.adapt`).
Only an oracle sees the clean image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np

import patchscore as ps
from benchmarks.data import data_range, middle, psnrs, training_images
from benchmarks.machine import FOREVER, processor
from benchmarks.methods import (
    Method,
    blind,
    by_bm3d,
    by_epll,
    by_total_variation,
    noisy_itself,
    one_step,
    version_of,
)
from benchmarks.robustness import training
from benchmarks.robustness.table import Budget
from benchmarks.robustness.training import Choice, Effort, Lesson
from patchscore.errors import InputError
from patchscore.evaluation.baselines import non_local_means, total_variation, wavelets

BUNDLED, ADAPTED = "patch prior, bundled", "patch prior, adapted"
TV, NLM, EPLL = "TV", "NLM", "EPLL"
ONE_STEP, ORACLE = "one-step", "oracle weight"
TUNED = {TV: "tuned weight", NLM: "tuned strength"}
SAMPLES = {"one sample": 1, "mean of 8 samples": 8}
STRENGTHS = {TV: (0.45, 0.65, 0.9), NLM: (0.45, 0.6, 0.8)}
TUNING_IMAGES = 8
TUNING_SIDE = 128
ADAPTATION_STEPS = 30  # on an image, at most


class Contender(NamedTuple):
    """A method and what it has learned from; "" and 0 if from nothing here."""

    method: str
    estimate: str
    train_set: str = ""
    images: int = 0

    @property
    def is_prepared_here(self) -> bool:
        """Whether it is trained or tuned by the benchmark."""
        return self.images > 0 and self.method not in (BUNDLED, ADAPTED)

    @property
    def is_slow(self) -> bool:
        """Whether it is measured on fewer images and at one noise level only."""
        return self.estimate in SAMPLES or self.method in (ADAPTED, EPLL)


class Settings(NamedTuple):
    """What all contenders of a run share.

    Attributes
    ----------
    weights : the folder of trained networks and tuned strengths
    effort : how long the networks train
    mixture : the file of EPLL's mixture, if there is one
    seed : of the training
    """

    weights: Path
    effort: Effort
    mixture: Path | None
    seed: int

    def lesson(self, contender: Contender) -> Lesson:
        """What a network has to learn."""
        return Lesson(contender.method, contender.train_set, contender.images, self.seed, self.effort)


@lru_cache(maxsize=4)
def ready(contender: Contender, sigma: float, settings: Settings) -> Method:
    """The denoiser; ``sigma`` is the level that a tuned one is tuned for.

    Raises
    ------
    InputError
        If its weights, its mixture or its package are missing, or there is no such method.
    """
    if not contender.is_prepared_here:
        return _as_it_comes(contender, settings.mixture)
    if contender.method not in TUNED:
        return _network(contender, settings)
    strength = tuned(contender, sigma, settings).value
    return blind(
        contender.method,
        f"scikit-image {version('scikit-image')} strength {strength:g}",
        contender.estimate,
        partial(_with_strength, contender.method, strength),
    )


def tuned(contender: Contender, sigma: float, settings: Settings) -> Choice:
    """The strength of a classical method for a noise level; from the folder if it is there."""
    place = contender.train_set.replace("/", "-")
    path = settings.weights / f"{contender.method}-{place}-{sigma:g}-seed-{settings.seed}.json"

    def quality(strength: float) -> float:
        choose = training_images(contender.train_set, count=1, seed=settings.seed).choose
        clean = [middle(image, TUNING_SIDE) for image in choose[:TUNING_IMAGES]]
        run = partial(_with_strength, contender.method, strength)
        scale = data_range(contender.train_set)
        return float(psnrs(clean, run, sigma, seed=settings.seed, data_range=scale).mean())

    return training.choose(path, STRENGTHS[contender.method], quality)


def tuning_budget(contender: Contender, sigmas: Sequence[float], settings: Settings) -> Budget:
    """Tune a classical method for these noise levels, and say what it took."""
    choices = [tuned(contender, sigma, settings) for sigma in sigmas]
    values = ", ".join(f"{c.value:g} at {s:g}" for s, c in zip(sigmas, choices, strict=True))
    return Budget(
        contender.method,
        contender.train_set,
        contender.images,
        1,
        round(sum(choice.seconds for choice in choices), 1),
        sum(len(choice.candidates) for choice in choices),
        f"{contender.estimate.removeprefix('tuned ')} over sigma, the best of "
        f"{len(STRENGTHS[contender.method])} for every noise level by PSNR on held-out training images: "
        f"{values}",
        processor(),
    )


def _as_it_comes(contender: Contender, mixture: Path | None) -> Method:
    name = contender.method
    as_they_come: dict[str, Callable[[], Method]] = {
        "noisy": noisy_itself,
        BUNDLED: lambda: one_step(name, ps.load_prior("natural-gray", "cpu")),
        ADAPTED: lambda: _adapted(name),
        TV: lambda: by_total_variation(name),
        "wavelets": lambda: blind(
            name, f"scikit-image {version('scikit-image')}", contender.estimate, wavelets
        ),
        "BM3D": lambda: by_bm3d(name),
    }
    if mixture is not None:
        as_they_come[EPLL] = lambda: by_epll(mixture)
    if name not in as_they_come:
        raise InputError(f"there is no method {name!r}, or the file of its mixture is missing.")
    return as_they_come[name]()


def _adapted(name: str) -> Method:
    """The bundled prior, adapted to every image; with no limit of time, which nobody could reproduce."""
    prior = ps.load_prior("natural-gray", "cpu")

    def restore(noisy: np.ndarray, sigma: float) -> np.ndarray:
        found = ps.adapt(
            prior, noisy, sigma, max_seconds=FOREVER, max_steps=ADAPTATION_STEPS, progress=False
        )
        estimate: np.ndarray = ps.denoise(noisy, sigma, prior=found.prior)
        return estimate

    code = f"{version_of(prior)} adapted in at most {ADAPTATION_STEPS} steps"
    return blind(name, code, ONE_STEP, restore)


def _network(contender: Contender, settings: Settings) -> Method:
    lesson = settings.lesson(contender)
    prior, scale = training.load(lesson, settings.weights), training.scale_of(lesson)
    estimate = training.one_step(prior)
    if contender.estimate != ONE_STEP:
        estimate = partial(training.mean_of_samples, prior, samples=SAMPLES[contender.estimate])
    return blind(
        contender.method,
        version_of(prior),
        contender.estimate,
        lambda noisy, sigma: estimate(scale * noisy, scale * sigma) / scale,
    )


def _with_strength(method: str, strength: float, noisy: np.ndarray, sigma: float) -> np.ndarray:
    if method == TV:
        return total_variation(noisy, sigma, weight=strength)
    return non_local_means(noisy, sigma, strength=strength)
