"""Expected patch log likelihood (EPLL), trained and measured here.

A mixture of 200 zero-mean Gaussians on 2 million 8 x 8 patches of the 400 images of ``bsd400``, their
means removed, and its PSNR and SSIM on ``bsd68``; Zoran and Weiss report 28.68 dB at noise level 25.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import patchscore as ps
from benchmarks import quality
from benchmarks.data import DATA_RANGE, gray_images
from benchmarks.methods import by_epll
from benchmarks.study import SEED, SIGMAS, Job, Option, Study
from patchscore.learning.mixture import MixtureFit, fit_mixture

PATCH_SIZE = 8


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    """Train the mixture if its file is not there, and measure EPLL with it."""
    if not options.mixture.exists():
        images = [image.pixels for image in gray_images("bsd400")]
        fit = train(images, options.components, patches=options.patches, passes=options.passes)
        ps.PatchPrior(fit.mixture, assembly="mean").save(options.mixture)
    methods = [by_epll(options.mixture)]
    for name in options.sets:
        images_of_set = gray_images(name)[: options.images]
        yield from quality.jobs_of(name, images_of_set, methods, options.sigmas, options.seed)


def train(
    images: Sequence[np.ndarray],
    components: int,
    *,
    patches: int,
    passes: int,
    batch_size: int = 40_000,
    seed: int = 0,
) -> MixtureFit:
    """Fit a mixture to random patches of images (H, W) in 0..255; its unit is 1 for 255.

    Every image gives the same number of patches. They are spread over their quantisation interval:
    patches of one gray value only would draw components of no variance at all.
    """
    generator = torch.Generator().manual_seed(seed)
    cut = torch.cat([_random_patches(image, -(-patches // len(images)), generator) for image in images])
    return fit_mixture(
        cut,
        components,
        zero_mean=True,
        brightness_invariant=True,
        passes=passes,
        batch_size=batch_size,
        generator=generator,
        progress=True,
    )


def _random_patches(image: np.ndarray, count: int, generator: torch.Generator) -> Tensor:
    pixels = torch.from_numpy(image).float()
    windows = pixels.unfold(0, PATCH_SIZE, 1).unfold(1, PATCH_SIZE, 1)
    top, left = (torch.randint(size, (count,), generator=generator) for size in windows.shape[:2])
    patches = windows[top, left][:, None]
    return (patches + torch.rand(patches.shape, generator=generator) - 0.5) / DATA_RANGE


STUDY = Study(
    "epll",
    __doc__,
    quality.Row,
    key=quality.STUDY.key,
    depends=quality.STUDY.depends,
    jobs=jobs,
    summary=quality.summary,
    options=(
        Option("mixture", Path("epll.safetensors"), "the file of the mixture; trained if it is missing"),
        Option("components", 200, "of the mixture", quick=20),
        Option("patches", 2_000_000, "to train on", quick=20_000),
        Option("passes", 5, "over the patches", quick=1),
        Option("sets", ("bsd68",), "sets of gray photographs", quick=("set12",)),
        SIGMAS,
        Option("images", None, "of every set, at most", quick=1, kind=int),
        SEED,
    ),
)
