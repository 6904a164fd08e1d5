"""Descent on the estimated risk of noisy images: two halves of the pixels teach, and judge each other.

    loss = sum_i c_i sigma^2 s_i^2 + sigma^2 b' (s(y + e b) - s(y - e b)) / e       per pixel that counts

is Stein's estimate on a crop, in units of sigma^2 and up to a constant: b are random signs on the pixels
with c_i = 1, and zeros elsewhere. Of two descents each sees the loss of one half of the pixels, in
blocks, and the gain of its weights is measured on the other half. So every pixel judges weights that it
did not teach. What is kept is the mean of both weights, in which what each learned of the noise of its
half counts half: the gain that is measured is, if anything, below that of the mean.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from patchscore.adaptation.moving import Chart
from patchscore.adaptation.risk import DIFFERENCE, Gain, Response, estimated_gain, random_signs, respond
from patchscore.learning.soap import SOAP
from patchscore.priors.prior import PatchPrior

BLOCK = 16
CROP = 128
STEPS_BETWEEN_CHECKS = 15
WARMUP = 10
AVERAGE = 0.9
# A check without a better bound sends the descent back, at half the rate; so many of them end it.
HALVINGS = 4
STANDARD_ERRORS = 2.0


class Check(NamedTuple):
    """The gain after so many steps, as a share of the risk before, and how well it is known.

    ``error`` is its standard error, and ``doubt`` what the uncertainty of sigma may make of it.
    """

    learning_rate: float
    step: int
    gain: float
    error: float
    doubt: float

    @property
    def bound(self) -> float:
        """The gain that is certain: checks are compared by it, and it has to be positive."""
        return self.gain - STANDARD_ERRORS * self.error - self.doubt


class NoisyImage(NamedTuple):
    """An image (1, C, H, W) at its noise level, its probes, and the half of a pixel, (H, W) bool."""

    y: Tensor
    sigma: float
    probes: Tensor
    half: Tensor


class Search:
    """The two descents: what was tried, and the best weights so far, of no steps at first."""

    def __init__(
        self,
        prior: PatchPrior,
        chart: Chart,
        images: Sequence[NoisyImage],
        before: Sequence[Response],
        rate: float,
        sigma_error: float,
        generator: torch.Generator,
    ) -> None:
        self.given = prior
        self.chart = chart
        self.sigma_error = sigma_error
        self.images = images
        self.before = before
        self.descents = [_Descent(prior, chart, rate, half, generator) for half in (False, True)]
        self.best = Check(rate, 0, 0.0, 0.0, 0.0)
        self.best_places = [descent.averaged_copy() for descent in self.descents]
        self.checks: list[Check] = []
        self.ended = "all steps were taken"

    def run(self, max_steps: int, deadline: float, bar: tqdm) -> None:
        """Descend until it gains no more, all steps are taken, or time is up; the last check counts."""
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
                    self.ended = "it gained no more"
                    return
                for descent, place in zip(self.descents, self.best_places, strict=True):
                    descent.go_back(place)
        if step < max_steps:
            self.ended = f"time was up after {step} steps"

    def adapted(self) -> PatchPrior:
        """The prior with the mean of the best weights of both halves."""
        first, second = (self.chart.weights(place) for place in self.best_places)
        return self._with({name: (w + second[name]) / 2 for name, w in first.items()})

    def _better(self, step: int, bar: tqdm) -> bool:
        """Measure the gain, and keep the weights if its bound is the best so far."""
        gains = []
        for descent in self.descents:
            view = self._with(self.chart.weights(descent.averaged))
            for image, old in zip(self.images, self.before, strict=True):
                y, sigma, probes, half = image
                judges = half != descent.half
                new = respond(view, y, sigma, probes)
                gains.append(estimated_gain(new, old, y, sigma, probes, judges))
        total = Gain(*(sum(values) for values in zip(*gains, strict=True)))
        # A risk estimated near or below zero, of a few pixels, is no scale.
        risk = max(total.risk, total.pixels / 1000)
        rate = self.descents[0].rate
        doubt = 4 * self.sigma_error * abs(total.trace) / risk
        check = Check(rate, step, total.gain / risk, math.sqrt(total.variance) / risk, doubt)
        self.checks.append(check)
        bar.set_postfix_str(f"gain {100 * check.gain:.1f} +- {100 * check.error:.1f} %")
        # No error can fall by more than itself: beyond that the risk itself is wrong.
        better = math.isfinite(check.bound) and self.best.bound < check.bound and check.gain < 1
        if better:
            self.best = check
            self.best_places = [descent.averaged_copy() for descent in self.descents]
        return better

    def _with(self, weights: dict[str, Tensor]) -> PatchPrior:
        prior = copy.deepcopy(self.given).requires_grad_(False)
        prior.network.load_state_dict(weights, strict=False)
        return prior


class _Descent:
    """Steps of SOAP on random crops of the noisy images, from the prior that was given.

    Only pixels of one half count, and their number is what ``half`` is in :class:`NoisyImage`.
    """

    def __init__(
        self,
        prior: PatchPrior,
        chart: Chart,
        rate: float,
        half: bool,
        generator: torch.Generator,
    ) -> None:
        self.prior = copy.deepcopy(prior).requires_grad_(False)
        self.chart = chart
        self.place = [nn.Parameter(tensor.clone()) for tensor in chart.start]
        self.averaged = [tensor.clone() for tensor in chart.start]
        self.optimizer = SOAP(self.place, lr=rate)
        self.rate = rate
        self.half = half
        self.generator = generator
        self.step = 0

    def update(self, images: Sequence[NoisyImage]) -> None:
        """One step on one crop."""
        self.optimizer.param_groups[0]["lr"] = self.rate * min(1.0, (self.step + 1) / WARMUP)
        self.optimizer.zero_grad()
        self._learn(images)
        self.optimizer.step()
        self.step += 1
        decay = min(AVERAGE, self.step / (self.step + 9))
        for averaged, tensor in zip(self.averaged, self.place, strict=True):
            averaged.lerp_(tensor.detach(), 1 - decay)

    def averaged_copy(self) -> list[Tensor]:
        """The place to be judged, as it is now."""
        return [tensor.clone() for tensor in self.averaged]

    def go_back(self, place: Sequence[Tensor]) -> None:
        """To an earlier place, at half the rate, without the moments of what led astray."""
        self.rate /= 2
        self.optimizer.state.clear()
        for tensor, averaged, earlier in zip(self.place, self.averaged, place, strict=True):
            tensor.data.copy_(earlier)
            averaged.copy_(earlier)

    def _learn(self, images: Sequence[NoisyImage]) -> None:
        """The gradient of the loss: first by the weights, and then by their coordinates."""
        weights = self.chart.weights(self.place)
        network = {name: self.prior.network.get_parameter(name) for name in weights}
        for name, parameter in network.items():
            parameter.data.copy_(weights[name])
            parameter.grad = None
            parameter.requires_grad_()
        self._loss(images).backward()
        torch.autograd.backward(list(weights.values()), [p.grad for p in network.values()])

    def _loss(self, images: Sequence[NoisyImage]) -> Tensor:
        """Stein's estimate on a crop, per pixel that counts, in units of sigma^2, up to a constant."""
        y, sigma, counts = self._crop(images)
        b = random_signs(1, y, self.generator) * counts
        step = DIFFERENCE * sigma
        ahead, behind = (sigma * self.prior.score(y + sign * step * b, sigma) for sign in (1, -1))
        trace = sigma * (b * (ahead - behind)).sum() / (2 * step)
        return ((counts * ((ahead + behind) / 2).square()).sum() + 2 * trace) / counts.sum()

    def _crop(self, images: Sequence[NoisyImage]) -> tuple[Tensor, float, Tensor]:
        """A crop of an image, drawn by its size, and the pixels in it that count, as a mask of floats.

        Those of the other half do not, nor those within half a patch of where the image was cut.
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
