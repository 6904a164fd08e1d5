"""The networks of the patch-size study, from patches of 3 x 3 pixels to the whole image.

    patch P          s(x) = - sum_c G_c' phi'(G_c x)      the cliques G_c x of P x P pixels
    whole image      s(x) = - phi'(x)                     one clique of all 32 x 32 pixels
    U-Net            s(x) = F(x)                          one network that sees all pixels

phi is a :class:`patchscore.PatchEnergy` with all its invariances. There are two U-Nets: as it comes, and
invariant to gain and offset as phi is, but not to flips and turns. Every image is of 32 x 32 pixels;
patches see its mirror image beyond the border.

Two rules set the width of phi for patches: the same for all sizes, or as many free parameters as patches
of 9 x 9 pixels have. The networks of the whole image have widths of their own: the score of one clique
lies in the span of its filters, so with 64 it could take 64 / 1024 of the noise away, or 0.3 dB.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import patchscore as ps
from benchmarks.machine import in_fresh_process, peak_bytes, processor
from benchmarks.robustness.training import LEVELS
from benchmarks.throughput import multiply_adds
from patchscore.evaluation.networks import UNetScore, WholeImagePrior

PATCHES = 3, 5, 7, 9, 13, 17, 25
WHOLE, UNET, INVARIANT_UNET = "whole image", "U-Net", "U-Net, invariant"
UNETS = UNET, INVARIANT_UNET
SIDE = 32
WIDTH, GROUP, UNET_WIDTH = 64, 8, 32
WHOLE_WIDTH = 2 * SIDE**2  # of both signs for every pixel
BATCH = 8

Prior = ps.PatchPrior | WholeImagePrior


class Candidate(NamedTuple):
    """A network: the side of its patch (or its name), and its hidden units or channels."""

    size: str
    width: int


NINE = Candidate("9", WIDTH)


class Cost(NamedTuple):
    """What a network costs; the last four columns are of one machine.

    Attributes
    ----------
    parameters : free ones; the symmetries tie the others to them
    multiply_adds : of a score of 32 x 32 pixels, per pixel
    seconds_per_step, seconds_per_megapixel : of training and of denoising, on one core
    megabytes : the peak of memory of training above what the process held before it
    """

    size: str
    width: int
    parameters: int
    multiply_adds: float
    seconds_per_step: float
    seconds_per_megapixel: float
    megabytes: float
    machine: str


def candidates() -> list[Candidate]:
    """The networks of both rules, the patches of 9 x 9 pixels first: others are compared with them."""
    sizes = [str(side) for side in PATCHES]
    equal_width = [Candidate(size, WIDTH) for size in sizes]
    equal_parameters = [Candidate(size, width_of_equal_parameters(size)) for size in sizes]
    whole = [Candidate(WHOLE, WHOLE_WIDTH), *(Candidate(size, UNET_WIDTH) for size in UNETS)]
    return list(dict.fromkeys([NINE, *equal_width, *whole, *equal_parameters]))


@lru_cache
def width_of_equal_parameters(size: str) -> int:
    """The width at which the number of parameters is nearest, in ratio, to that of 9 x 9 patches."""
    wanted = parameters(untrained(NINE))
    widths = range(GROUP, 4 * WIDTH, GROUP)
    return min(
        widths, key=lambda width: abs(math.log(parameters(untrained(Candidate(size, width))) / wanted))
    )


def untrained(candidate: Candidate, images: Sequence[np.ndarray] = ()) -> Prior:
    """A prior to train; a U-Net that learns is told the images, for their mean and spread."""
    size, width = candidate
    if size in UNETS:
        return WholeImagePrior.for_images(
            UNetScore(width=width), images or [np.eye(2)], invariant=size == INVARIANT_UNET
        )
    if size == WHOLE:
        return ps.PatchPrior(ps.PatchEnergy(SIDE, width=width), assembly="mean", boundary="open")
    return ps.PatchPrior(ps.PatchEnergy(int(size), width=width))


def parameters(prior: Prior) -> int:
    """The number of free parameters."""
    return sum(parameter.numel() for parameter in prior.network.parameters())


def trained(
    candidate: Candidate, images: Sequence[np.ndarray], *, rate: float, steps: int, seed: int
) -> Prior:
    """The candidate after its training on images whose data range is 10."""
    torch.manual_seed(seed)
    prior = untrained(candidate, images)
    ps.fit(
        prior,
        images,
        sigmas=LEVELS,
        crop=SIDE,
        boundary="open" if candidate.size == WHOLE else "symmetric",
        steps=steps,
        batch_size=BATCH,
        learning_rate=rate,
        warmup=min(20, steps // 10),
        average=0.99,
        optimizer="adam" if candidate.size in UNETS else "soap",
        generator=torch.Generator().manual_seed(seed),
        progress=False,
    )
    return prior


def cost(candidate: Candidate) -> Cost:
    """Measure what a candidate costs, on images of noise; takes some seconds."""
    images = list(np.random.default_rng(0).standard_normal((BATCH, SIDE, SIDE)))
    _seconds_of_training(candidate, images, 3)  # the first time is slower
    # What comes once in a training, as the first basis of SOAP, is in both and drops out.
    short, long = (_seconds_of_training(candidate, images, steps) for steps in (10, 30))
    prior = untrained(candidate, images)
    x = torch.randn(64, 1, SIDE, SIDE)
    rounds = []
    with torch.no_grad():
        for _ in range(3):
            start = time.process_time()
            prior.denoise(x, 1.0)
            rounds.append(time.process_time() - start)
    return Cost(
        *candidate,
        parameters(prior),
        round(_multiply_adds(prior, x), 1),
        float(f"{(long - short) / 20:.3g}"),
        float(f"{min(rounds) / x.numel() * 1e6:.3g}"),
        round(in_fresh_process(megabytes, candidate), 1),
        processor(),
    )


def _multiply_adds(prior: Prior, x: Tensor) -> float:
    if isinstance(prior, ps.PatchPrior):
        return multiply_adds(prior) / (SIDE**2 if prior.boundary == "open" else 1)
    with FlopCounterMode(display=False) as counter:
        prior.score(x, 1.0)
    return float(counter.get_total_flops() / 2 / x.numel())


def denoised(prior: Prior, noisy: np.ndarray, sigma: float) -> np.ndarray:
    """Denoise every tile of 32 x 32 pixels as an image by itself: (n, H, W) -> (n, H, W)."""
    n, height, width = noisy.shape
    by_tile = n, height // SIDE, SIDE, width // SIDE, SIDE
    tiles = torch.from_numpy(noisy.reshape(by_tile).swapaxes(2, 3)).to(prior.network.like)
    with torch.no_grad():
        found = prior.denoise(tiles.reshape(-1, 1, SIDE, SIDE), sigma)
    result: np.ndarray = found.reshape(tiles.shape).double().numpy().swapaxes(2, 3).reshape(noisy.shape)
    return result


def _seconds_of_training(candidate: Candidate, images: list[np.ndarray], steps: int) -> float:
    start = time.process_time()
    trained(candidate, images, rate=1e-3, steps=steps, seed=0)
    return time.process_time() - start


def megabytes(candidate: Candidate) -> float:
    """The peak of memory of some training steps, above what was held before, in a fresh process."""
    torch.set_num_threads(1)
    images = list(np.random.default_rng(0).standard_normal((BATCH, SIDE, SIDE)))
    for size in ("3", UNET):  # what every training holds, such as libraries, is no cost of this one
        trained(Candidate(size, GROUP), images, rate=1e-3, steps=3, seed=0)
    before = peak_bytes()
    trained(candidate, images, rate=1e-3, steps=3, seed=0)
    return (peak_bytes() - before) / 1e6
