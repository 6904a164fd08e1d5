"""Descent on the estimated risk of noisy images, cross-validated between two halves of the pixels.

    loss = sum_i c_i sigma^2 s_i^2 + sigma^2 b' (s(y + e b) - s(y - e b)) / e      per pixel that counts

This is Stein's estimate on a crop, in units of sigma^2 and up to a constant; b holds random signs on the
pixels with c_i = 1, and zeros elsewhere. There are two descents. Each sees the loss of one half of the
pixels, in blocks, and the gain of its weights is measured on the other half, so no pixel evaluates
weights that it trained. The average of both weights is kept. It has fitted the noise of each half only
half as much, so its gain is, if anything, above the measured one.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from patchscore.adaptation.risk import DIFFERENCE, Gain, Response, estimated_gain, random_signs, respond
from patchscore.learning.soap import SOAP
from patchscore.measurements.noisy_image import NoisyImage
from patchscore.priors.prior import PatchPrior

PROBES = 2
BLOCK = 16
CROP = 128
STEPS_BETWEEN_CHECKS = 15
WARMUP = 10
AVERAGE = 0.9
# After a check without a better bound the descent restarts from the best weights, at half the rate.
HALVINGS = 4
STANDARD_ERRORS = 2.0
# A risk that is known less well is no scale for gains.
RISK_ERRORS = 3.0


class Check(NamedTuple):
    """The gain after some steps, as a fraction of the risk before.

    ``error`` is its standard error, and ``doubt`` the gain that an error of sigma could simulate.
    """

    learning_rate: float
    step: int
    gain: float
    error: float
    doubt: float

    @property
    def bound(self) -> float:
        """A lower bound of the gain: checks are compared by it, and it has to be positive."""
        return self.gain - STANDARD_ERRORS * self.error - self.doubt

    def __str__(self) -> str:
        return f"{100 * self.gain:.1f} +- {100 * self.error:.1f} %"


class SplitImage(NamedTuple):
    """An image (1, C, H, W) as a prior sees it, its probes, and the half of each pixel, (H, W) bool."""

    y: Tensor
    sigma: float
    probes: Tensor
    half: Tensor

    @classmethod
    def of(cls, image: NoisyImage, prior: PatchPrior, generator: torch.Generator) -> SplitImage:
        """Draw the halves, then the probes."""
        seen = image.seen_by(prior)
        half = random_halves(seen.y.shape[2], seen.y.shape[3], generator).to(seen.y.device)
        return cls(seen.y, seen.sigma, random_signs(PROBES, seen.y, generator), half)


Weights = dict[str, Tensor]


class Search:
    """The two descents, every check, and the best weights so far (the given ones at first)."""

    def __init__(
        self,
        prior: PatchPrior,
        images: Sequence[SplitImage],
        before: Sequence[Response],
        rate: float,
        sigma_error: float,
        generator: torch.Generator,
    ) -> None:
        self.given = prior
        self.sigma_error = sigma_error
        self.images = images
        self.before = before
        self.descents = [_Descent(prior, rate, half, generator) for half in (False, True)]
        self.best = Check(rate, 0, 0.0, 0.0, 0.0)
        self.best_weights = [descent.averaged_copy() for descent in self.descents]
        self.checks: list[Check] = []
        self.ended = "all steps were taken"

    def obstacle(self) -> str | None:
        """Why gains cannot be measured on these images, if they cannot."""
        everywhere = [torch.ones_like(image.half) for image in self.images]
        found = [
            estimated_gain(old, old, image.y, image.sigma, image.probes, where)
            for image, old, where in zip(self.images, self.before, everywhere, strict=True)
        ]
        risk, error = sum(one.risk for one in found), math.sqrt(sum(one.risk_variance for one in found))
        if risk >= RISK_ERRORS * error:
            return None
        pixels = sum(one.pixels for one in found)
        return (
            f"the estimated error of a pixel, {risk / pixels:.2g} +- {error / pixels:.2g} of the "
            "variance of the noise, is too uncertain to measure a gain: give more or larger images"
        )

    def run(self, max_steps: int, deadline: float, bar: tqdm) -> None:
        """Descend until there is no more gain, no step or no time left; the last check counts."""
        step = halvings = 0
        while step < max_steps and time.perf_counter() < deadline:
            for _ in range(min(STEPS_BETWEEN_CHECKS, max_steps - step)):
                for descent in self.descents:
                    descent.update(self.images)
                bar.update()
                step += 1
                if time.perf_counter() > deadline:
                    break
            if not self._better(step, bar):
                halvings += 1
                if halvings == HALVINGS:
                    self.ended = "there was no more gain"
                    return
                for descent, weights in zip(self.descents, self.best_weights, strict=True):
                    descent.go_back(weights)
        if step < max_steps:
            self.ended = f"time was up after {step} steps"

    def adapted(self) -> PatchPrior:
        """The prior with the average of the best weights of both halves."""
        first, second = self.best_weights
        return self.with_weights({name: (w + second[name]) / 2 for name, w in first.items()})

    def with_weights(self, weights: Weights) -> PatchPrior:
        """The given prior with other weights."""
        prior = copy.deepcopy(self.given).requires_grad_(False)
        prior.network.load_state_dict(weights, strict=False)
        return prior

    def _better(self, step: int, bar: tqdm) -> bool:
        """Measure the gain, and keep the weights if its bound is the best so far."""
        gains = []
        for descent in self.descents:
            view = self.with_weights(descent.averaged)
            for image, old in zip(self.images, self.before, strict=True):
                y, sigma, probes, half = image
                new = respond(view, y, sigma, probes)
                gains.append(estimated_gain(new, old, y, sigma, probes, half != descent.half))
        total = Gain(*(sum(values) for values in zip(*gains, strict=True)))
        risk = total.risk
        doubt = 4 * self.sigma_error * abs(total.trace) / risk
        rate = self.descents[0].rate
        check = Check(rate, step, total.gain / risk, math.sqrt(total.variance) / risk, doubt)
        self.checks.append(check)
        bar.set_postfix_str(f"gain {check}")
        # No error can fall by more than itself: beyond that the risk estimate is wrong.
        better = math.isfinite(check.bound) and self.best.bound < check.bound and check.gain < 1
        if better:
            self.best = check
            self.best_weights = [descent.averaged_copy() for descent in self.descents]
        return better


class _Descent:
    """Steps of SOAP on random crops of the noisy images, starting from the given prior.

    Only the pixels of one half count: those where the ``half`` of a :class:`SplitImage` is this one.
    """

    def __init__(self, prior: PatchPrior, rate: float, half: bool, generator: torch.Generator) -> None:
        self.prior = copy.deepcopy(prior).requires_grad_(False)
        self.prior.network.requires_grad_()
        self.averaged = {n: p.detach().clone() for n, p in self.prior.network.named_parameters()}
        self.optimizer = SOAP(self.prior.network.parameters(), lr=rate)
        self.rate = rate
        self.half = half
        self.generator = generator
        self.step = 0

    def update(self, images: Sequence[SplitImage]) -> None:
        """One step on one crop."""
        self.optimizer.param_groups[0]["lr"] = self.rate * min(1.0, (self.step + 1) / WARMUP)
        self.optimizer.zero_grad()
        self._loss(images).backward()
        self.optimizer.step()
        self.step += 1
        decay = min(AVERAGE, self.step / (self.step + 9))
        for name, weight in self.prior.network.named_parameters():
            self.averaged[name].lerp_(weight.detach(), 1 - decay)

    def averaged_copy(self) -> Weights:
        """The averaged weights, as they are now."""
        return {name: tensor.clone() for name, tensor in self.averaged.items()}

    def go_back(self, weights: Weights) -> None:
        """Restart from earlier weights, at half the rate and without the moments of the optimiser."""
        self.rate /= 2
        self.optimizer.state.clear()
        for name, weight in self.prior.network.named_parameters():
            weight.data.copy_(weights[name])
            self.averaged[name].copy_(weights[name])

    def _loss(self, images: Sequence[SplitImage]) -> Tensor:
        """Stein's estimate on a crop, per pixel that counts, in units of sigma^2, up to a constant."""
        y, sigma, counts = self._crop(images)
        b = random_signs(1, y, self.generator) * counts
        step = DIFFERENCE * sigma
        ahead, behind = (sigma * self.prior.score(y + sign * step * b, sigma) for sign in (1, -1))
        trace = sigma * (b * (ahead - behind)).sum() / (2 * step)
        return ((counts * ((ahead + behind) / 2).square()).sum() + 2 * trace) / counts.sum()

    def _crop(self, images: Sequence[SplitImage]) -> tuple[Tensor, float, Tensor]:
        """A crop of an image, drawn by its size, and the pixels in it that count, as a mask of floats.

        Pixels of the other half do not count, nor those within half a patch of a cut through the image.
        """
        sizes = torch.tensor([image.half.numel() for image in images], dtype=torch.float64)
        while True:
            image = images[int(torch.multinomial(sizes, 1, generator=self.generator))]
            window = []
            for size, side in zip(image.y.shape[-2:], self.prior.network.patch_shape, strict=True):
                crop = min(size, CROP)
                first = int(torch.randint(size - crop + 1, (), generator=self.generator))
                rim = (side - 1) // 2
                inside = slice(rim * (first > 0), crop - rim * (first + crop < size))
                window.append((slice(first, first + crop), inside))
            (rows, inner_rows), (columns, inner_columns) = window
            mine = image.half[rows, columns] == self.half
            counts = torch.zeros_like(mine)
            counts[inner_rows, inner_columns] = mine[inner_rows, inner_columns]
            if counts.any():
                return image.y[..., rows, columns], image.sigma, counts.to(image.y)


def random_halves(height: int, width: int, generator: torch.Generator) -> Tensor:
    """Which half a pixel belongs to, in blocks: (H, W) bool."""
    rows, columns = math.ceil(height / BLOCK), math.ceil(width / BLOCK)
    count = rows * columns
    blocks = torch.zeros(count, dtype=torch.bool)
    blocks[torch.randperm(count, generator=generator)[: count // 2]] = True
    mask = blocks.view(rows, columns).repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return mask[:height, :width]
