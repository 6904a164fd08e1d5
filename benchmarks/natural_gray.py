"""Train the bundled priors again: python -m benchmarks.natural_gray natural-gray | natural-gray-fast.

Convolutional potentials with all invariances, learned as clique potentials from crops of 360 images of
``bsd400``, mirrored beyond their borders, by denoising score matching at noise levels from 1/255 to
60/255 of the images' range. With the weight sigma^0.7, a decibel counts about as much at every level.
Every tenth image is held out; all choices were made on these (:mod:`benchmarks.architectures`).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import patchscore as ps
from benchmarks.data import gray_images
from patchscore.priors.convolutional import ConvEnergy

POWER = 0.7
EVERY = 10


class Recipe(NamedTuple):
    """The network and the length of its training."""

    sides: tuple[int, ...]
    dilations: tuple[int, ...]
    width: int
    steps: int
    learning_rate: float


RECIPES = {
    "natural-gray": Recipe((7, 3, 3, 3), (1, 2, 3, 3), 64, 18_000, 8e-3),
    "natural-gray-fast": Recipe((5, 3, 3), (1, 2, 3), 32, 15_000, 8e-3),
}
CARD = {
    "data": "bsd400 but every tenth: 360 gray crops of 180 x 180 pixels of BSDS500 training photographs,"
    " scaled to 0..1",
    "terms": "BSDS500 is offered for non-commercial research; see natural-gray.md beside the weights",
}


def weighted_score_matching(
    prior: ps.PatchPrior, clean: Tensor, sigma: Tensor, *, generator: torch.Generator
) -> Tensor:
    """E (sigma / sigma_0)^0.7 | sigma s(x + sigma z, sigma) + z |^2, with sigma_0 of 25/255."""
    z = torch.randn(clean.shape, generator=generator).to(clean)
    levels = sigma[:, None, None, None]
    residual = prior.interior(levels * prior.score(clean + levels * z, sigma) + z)
    return ((255 / 25 * levels) ** POWER * residual.square()).mean()


def split() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The images to train on, and those held out, in 0..1."""
    images = [image.pixels / 255 for image in gray_images("bsd400")]
    return [image for k, image in enumerate(images) if k % EVERY], images[::EVERY]


def train(recipe: Recipe, images: list[np.ndarray], *, device: str, checkpoint: Path) -> ps.PatchPrior:
    """A prior learned by this recipe, going on from a checkpoint if there is one."""
    torch.manual_seed(0)
    network = ConvEnergy(recipe.sides, recipe.dilations, width=recipe.width)
    prior = ps.PatchPrior(network.to(device))
    ps.fit(
        prior,
        images,
        sigmas=(1 / 255, 60 / 255),
        crop=80,
        boundary="symmetric",
        steps=recipe.steps,
        batch_size=4,
        learning_rate=recipe.learning_rate,
        warmup=100,
        objective=weighted_score_matching,
        optimizer="soap",
        mixed_precision=True,
        generator=torch.Generator().manual_seed(0),
        checkpoint=checkpoint,
    )
    return prior


def main() -> None:
    """Train and write the weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=RECIPES)
    parser.add_argument("--out", type=Path, help="default: NAME.safetensors")
    parser.add_argument("--steps", type=int, help="default: those of the recipe")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    recipe = RECIPES[options.name]
    if options.steps:
        recipe = recipe._replace(steps=options.steps)
    out = options.out or Path(f"{options.name}.safetensors")
    prior = train(recipe, split()[0], device=options.device, checkpoint=out.with_suffix(".checkpoint"))
    prior.card |= {"name": options.name, **CARD}
    prior.save(out)


if __name__ == "__main__":
    main()
