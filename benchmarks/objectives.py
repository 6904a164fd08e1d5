"""Learning from noisy images alone, beside learning from clean ones.

Priors of one size are trained from one seed, with the same steps on the same crops, at one noise level:

    clean          denoising score matching
    noisy          Stein's unbiased risk (SURE), Noise2Score

The noisy training images are made once and are all that the last two see. All are then scored one-step
on a test set with noise of that level.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

import patchscore as ps
from benchmarks.data import gray_images
from benchmarks.quality import add_noise
from patchscore.evaluation.metrics import psnr
from patchscore.learning.matching import denoising_score_matching, noise2score, sure

SEED = 0
# Numbers of training images start far from those of test images, so that no noise is shared.
FIRST_TRAINING_NUMBER = 1_000_000
OBJECTIVES = {
    "denoising score matching, clean images": denoising_score_matching,
    "SURE, noisy images": sure,
    "Noise2Score, noisy images": noise2score,
}


class Result(NamedTuple):
    """One objective: what its prior reaches, and what it cost."""

    objective: str
    psnr: float
    steps: int
    seconds: float


def compare_objectives(*, train: str, test: str, sigma: float, steps: int) -> list[Result]:
    """Train with every objective on one set and measure on another; PSNR in dB, of 255.

    Raises
    ------
    InputError
        If a set cannot be loaded, or the noise level or the number of steps is not positive.
    """
    clean = [image.pixels for image in gray_images(train)]
    noisy = [
        add_noise(image, sigma, seed=SEED, number=FIRST_TRAINING_NUMBER + number)
        for number, image in enumerate(clean)
    ]
    results = []
    for name, objective in OBJECTIVES.items():
        torch.manual_seed(SEED)
        prior = ps.PatchPrior(ps.PatchEnergy(patch_size=9, width=128))
        history = ps.fit(
            prior,
            clean if objective is denoising_score_matching else noisy,
            sigmas=(sigma, sigma),
            steps=steps,
            objective=objective,
            generator=torch.Generator().manual_seed(SEED),
        )
        results.append(Result(name, _psnr(prior, test, sigma), steps, history.seconds))
    return results


def _psnr(prior: ps.PatchPrior, test: str, sigma: float) -> float:
    return float(
        np.mean(
            [
                psnr(
                    clean,
                    ps.denoise(add_noise(clean, sigma, seed=SEED, number=number), sigma, prior=prior),
                    data_range=255,
                )
                for number, (_, clean) in enumerate(gray_images(test))
            ]
        )
    )
