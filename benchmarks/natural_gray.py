"""Train the bundled priors again: python -m benchmarks.natural_gray natural-gray | natural-gray-fast.

With ``--measure``, print the PSNR of a prior on the images that were held out instead.

Convolutional potentials with all invariances, learned as clique potentials from crops of 360 images of
``bsd400``, mirrored beyond their borders, by denoising score matching at noise levels from 1/255 to
60/255 of the images' range. With the weight sigma^0.7, a decibel counts about as much at every level.
Every tenth image is held out; all choices were made on these (:mod:`benchmarks.architectures`).
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import patchscore as ps
from benchmarks.data import gray_images
from benchmarks.quality import add_noise
from patchscore.evaluation.metrics import psnr
from patchscore.priors.energy import ConvEnergy

EVERY = 10
SIGMAS = 15.0, 25.0, 50.0
SEED = 7


class Stage(NamedTuple):
    """One run of training: its length, its crops and how noise levels are weighted, sigma^power."""

    steps: int
    crop: int
    batch_size: int
    learning_rate: float
    power: float


class Recipe(NamedTuple):
    """The network and its training."""

    sides: tuple[int, ...]
    dilations: tuple[int, ...]
    width: int
    stages: tuple[Stage, ...]


RECIPES = {
    "natural-gray": Recipe(
        (7, 3, 3, 3),
        (1, 2, 3, 3),
        64,
        (
            Stage(18_000, 80, 4, 8e-3, 0.7),
            Stage(3_000, 112, 3, 3e-3, 1.0),
            Stage(5_000, 112, 3, 5e-3, 1.0),
            Stage(4_500, 112, 3, 5e-3, 1.6),
        ),
    ),
    "natural-gray-fast": Recipe((5, 3, 3), (1, 2, 3), 32, (Stage(18_000, 80, 4, 8e-3, 0.7),)),
}
CARD = {
    "data": "bsd400 but every tenth: 360 gray crops of 180 x 180 pixels of BSDS500 training photographs,"
    " scaled to 0..1",
    "terms": "BSDS500 is offered for non-commercial research; see natural-gray.md beside the weights",
}


def weighted_score_matching(
    prior: ps.PatchPrior,
    clean: Tensor,
    sigma: Tensor,
    *,
    generator: torch.Generator,
    power: float = 0.7,
) -> Tensor:
    """E (sigma / sigma_0)^power | sigma s(x + sigma z, sigma) + z |^2, with sigma_0 of 25/255."""
    z = torch.randn(clean.shape, generator=generator).to(clean)
    levels = sigma[:, None, None, None]
    residual = prior.interior(levels * prior.score(clean + levels * z, sigma) + z)
    return ((255 / 25 * levels) ** power * residual.square()).mean()


def split() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The images to train on, and those held out, in 0..1."""
    images = [image.pixels / 255 for image in gray_images("bsd400")]
    return [image for k, image in enumerate(images) if k % EVERY], images[::EVERY]


def train(recipe: Recipe, images: list[np.ndarray], *, device: str, out: Path) -> ps.PatchPrior:
    """A prior learned by this recipe, going on from the checkpoints beside ``out`` if there are any."""
    torch.manual_seed(0)
    network = ConvEnergy(recipe.sides, recipe.dilations, width=recipe.width)
    prior = ps.PatchPrior(network.to(device))
    for number, stage in enumerate(recipe.stages):
        ps.fit(
            prior,
            images,
            sigmas=(1 / 255, 60 / 255),
            crop=stage.crop,
            boundary="symmetric",
            steps=stage.steps,
            batch_size=stage.batch_size,
            learning_rate=stage.learning_rate,
            warmup=100,
            objective=partial(weighted_score_matching, power=stage.power),
            optimizer="soap",
            mixed_precision=True,
            generator=torch.Generator().manual_seed(number),
            checkpoint=out.with_suffix(f".{number}.checkpoint"),
        )
    prior.card["stages"] = [stage._asdict() for stage in recipe.stages]
    return prior


def held_out_psnr(prior: ps.PatchPrior) -> tuple[float, ...]:
    """The mean PSNR of the one-step estimate of the images held out, at ``SIGMAS``, in dB of 255."""
    images = [255 * image for image in split()[1]]
    means = []
    for sigma in SIGMAS:
        noisy = [add_noise(clean, sigma, seed=SEED, number=n) for n, clean in enumerate(images)]
        estimates = [ps.denoise(y, sigma, prior=prior) for y in noisy]
        values = [psnr(*pair, data_range=255) for pair in zip(images, estimates, strict=True)]
        means.append(float(np.mean(values)))
    return tuple(means)


def main() -> None:
    """Train and write the weights, or measure some."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=RECIPES, help="the recipe; with --measure, the bundled prior")
    parser.add_argument("--measure", action="store_true", help="the weights at --out, if it is given")
    parser.add_argument("--out", type=Path, help="default: NAME.safetensors")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    if options.measure:
        print(*(f"{value:.2f}" for value in held_out_psnr(ps.load_prior(options.out or options.name))))
        return
    out = options.out or Path(f"{options.name}.safetensors")
    prior = train(RECIPES[options.name], split()[0], device=options.device, out=out)
    prior.card |= {"name": options.name, **CARD}
    prior.save(out)


if __name__ == "__main__":
    main()
