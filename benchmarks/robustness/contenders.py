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
from benchmarks.robustness.table import Budget, Series
from benchmarks.robustness.training import Choice, Effort, Lesson
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


def is_prepared_here(contender: Series) -> bool:
    """Whether it is trained or tuned by the benchmark."""
    return contender.training_images > 0 and contender.method not in (BUNDLED, ADAPTED)


def is_slow(contender: Series) -> bool:
    """Whether it is measured on fewer images and at one noise level only."""
    return contender.estimate in SAMPLES or contender.method in (ADAPTED, EPLL)


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

    def lesson(self, contender: Series) -> Lesson:
        """What a network has to learn."""
        method, _, train_set, images = contender
        return Lesson(method, train_set, images, self.seed, self.effort)


@lru_cache(maxsize=4)
def ready(contender: Series, sigma: float, settings: Settings) -> Method:
    """The denoiser; ``sigma`` is the level that a tuned one is tuned for.

    Raises
    ------
    InputError
        If its weights, its mixture or its package are missing.
    """
    if not is_prepared_here(contender):
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


def tuned(contender: Series, sigma: float, settings: Settings) -> Choice:
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


def tuning_budget(contender: Series, sigmas: Sequence[float], settings: Settings) -> Budget:
    """Tune a classical method for these noise levels, and say what it took."""
    choices = [tuned(contender, sigma, settings) for sigma in sigmas]
    values = ", ".join(f"{c.value:g} at {s:g}" for s, c in zip(sigmas, choices, strict=True))
    return Budget(
        contender.method,
        contender.train_set,
        contender.training_images,
        1,
        round(sum(choice.seconds for choice in choices), 1),
        sum(len(choice.candidates) for choice in choices),
        f"{contender.estimate.removeprefix('tuned ')} over sigma, the best of "
        f"{len(STRENGTHS[contender.method])} for every noise level by PSNR on held-out training images: "
        f"{values}",
        processor(),
    )


def _as_it_comes(contender: Series, mixture: Path | None) -> Method:
    name = contender.method
    if name == EPLL and mixture is not None:
        return by_epll(mixture)
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


def _network(contender: Series, settings: Settings) -> Method:
    lesson = settings.lesson(contender)
    prior = training.load(lesson, settings.weights)
    estimate = training.one_step(prior)
    if contender.estimate != ONE_STEP:
        estimate = partial(training.mean_of_samples, prior, samples=SAMPLES[contender.estimate])
    run = training.scaled(estimate, lesson)
    return blind(contender.method, version_of(prior), contender.estimate, run)


def _with_strength(method: str, strength: float, noisy: np.ndarray, sigma: float) -> np.ndarray:
    if method == TV:
        return total_variation(noisy, sigma, weight=strength)
    return non_local_means(noisy, sigma, strength=strength)
