"""The most probable image, by gradient ascent on log p_sigma(x | y).

    x <- x + h s(x, sigma)

A prior that is a density needs no regularisation weight: the noise level of the data is all that
balances the two terms. With a potential, h starts at the step of Barzilai and Borwein, h = |d|^2 / <d,
-g>, for the last change d of the image and g of the score, and is halved until the objective has risen
by Armijo's rule,

    log p(x + h s) >= log p(x) + c h |s|^2

so the objective never falls. Without one, h = 1 / L with the measured curvature L of the score.

References: Barzilai and Borwein, IMA J. Numer. Anal. 8 (1988), equation 5; Nocedal and Wright,
"Numerical Optimization" (2006), equation 3.4; Fessler, "Score-based priors for image reconstruction"
(talk, 2023).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from patchscore.errors import InputError
from patchscore.inference.curvature import curvature, curvature_bound
from patchscore.protocols import Density, Score, has_potential

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ARMIJO = 1e-4
HALVINGS = 40


class Solution(NamedTuple):
    """An estimate, and how it came about.

    Attributes
    ----------
    x : (B, C, H, W) the estimate
    objective
        (rows, B): log p_sigma(x | y) at the start of every noise level and after every step, up to a
        constant that depends on sigma; NaN without a potential.
    residual
        (rows, B): what was driven to zero, |sigma s(x)| / sqrt(pixels), or the change of x in splitting.
    sigmas : (rows,), the noise level of the prior
    reason : why it stopped
    evaluations : of the prior, each of the whole batch
    seconds : wall-clock time
    """

    x: Tensor
    objective: np.ndarray
    residual: np.ndarray
    sigmas: np.ndarray
    reason: str
    evaluations: int
    seconds: float

    def plot(self) -> Figure:
        """The estimate of the first image, the objective (with a potential) and the residual."""
        from patchscore.inference.figures import solution_figure

        return solution_figure(self)


@torch.no_grad()
def map_estimate(
    posterior: Score,
    x0: Tensor,
    *,
    sigma: float | Sequence[float],
    tolerance: float = 1e-4,
    max_steps: int = 500,
    progress: bool = True,
) -> Solution:
    """argmax_x log p_sigma(x | y), by gradient ascent, (B, C, H, W) -> Solution.

    Parameters
    ----------
    posterior
        A :class:`Posterior`, or any score. If it has a potential, steps are chosen by line search, image
        by image.
    x0
        Where to start.
    sigma
        The noise level of the prior: one, which should be small against the noise of the data and not
        below what the prior was trained at; or several, from large to small, each started where the one
        before stopped. Annealing avoids poor local maxima, and the objective can be compared within a
        level only.
    tolerance
        Stops when the root mean square of sigma s(x) is below, for every image: the distance of a pixel
        to the maximum, in units of sigma, as far as the curvature is 1 / sigma^2.
    max_steps
        At each level.

    Raises
    ------
    InputError
        If a shape or a noise level does not fit, or the score stops being finite.

    Notes
    -----
    Fails to be a typical image: the maximum is smoother than any sample, and where the posterior has
    several modes it is the one that is near. It is not the estimate of least squared error either; that
    is the posterior mean (``prior.denoise``, :func:`sample_denoised`). A learned prior is a density of
    images blurred by sigma: as sigma falls below its training range, its maximum means less and less.
    """
    sigmas = _levels(sigma)
    _check(tolerance, max_steps)
    objective, residual, levels = [], [], []
    evaluations, reason = 0, ""
    start = time.perf_counter()
    x = x0
    with tqdm(total=len(sigmas) * max_steps, unit="step", disable=not progress) as bar:
        for level in sigmas:
            climb = _Ascent(posterior, x, level)
            while True:
                objective.append(climb.objective.tolist())
                residual.append(climb.residual.tolist())
                levels.append(level)
                bar.set_postfix(sigma=f"{level:.3g}", residual=f"{climb.residual.max():.2g}")
                if not bool(climb.residual.isfinite().all()):
                    raise InputError(
                        f"the score is not finite after {len(levels)} steps at sigma = {level:g}; check "
                        "that x0 is finite and that the prior was trained near this noise level."
                    )
                reason = climb.reason(tolerance, max_steps)
                if reason:
                    break
                climb.step()
                bar.update()
            x = climb.x
            evaluations += climb.evaluations
    return Solution(
        x,
        np.array(objective),
        np.array(residual),
        np.array(levels),
        reason,
        evaluations,
        time.perf_counter() - start,
    )


class _Ascent:
    """The state of the climb at one noise level; every image has its own step."""

    def __init__(self, posterior: Score, x: Tensor, sigma: float) -> None:
        self.posterior, self.x, self.sigma = posterior, x, sigma
        self.density: Density | None = posterior if has_potential(posterior) else None  # type: ignore[assignment]
        self.score = posterior.score(x, sigma)
        self.objective = (
            self.density.log_prob(x, sigma) if self.density else x.new_full((len(x),), math.nan)
        )
        self.stuck = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self.steps = 0
        self.evaluations = 1
        if self.density:  # the search corrects it, and what it learns of the curvature is better
            self.step_size = x.new_full((len(x), 1, 1, 1), 1 / curvature_bound(posterior, x, sigma))
        else:
            self.step_size = _over_pixels(1 / curvature(posterior, x, sigma))

    @property
    def residual(self) -> Tensor:
        """The root mean square of sigma s(x): (B,)."""
        return self.sigma * self.score.square().mean((1, 2, 3)).sqrt()

    def reason(self, tolerance: float, max_steps: int) -> str:
        """Why it is over, or nothing."""
        arrived = self.residual <= tolerance
        if bool(arrived.all()):
            return f"converged: the residual is below {tolerance:g}"
        if bool((arrived | self.stuck).all()):
            return "converged to rounding: no step along the gradient raises the objective"
        if self.steps == max_steps:
            return f"stopped after {max_steps} steps, before the residual was below {tolerance:g}"
        return ""

    def step(self) -> None:
        """One step along the gradient."""
        self.steps += 1
        x, score = self.x, self.score
        self.x = x + self.step_size * score if self.density is None else self._search(self.density)
        self.score = self.posterior.score(self.x, self.sigma)
        self.evaluations += 1
        if self.density is not None:
            change, bend = self.x - x, score - self.score
            along = _dot(change, bend)
            barzilai_borwein = _dot(change, change) / along
            # Where the objective is not concave along the step, the last step was too careful.
            self.step_size = torch.where(along > 0, barzilai_borwein, 2 * self.step_size)
            self.step_size = torch.where(_over_pixels(self.stuck), 0, self.step_size)

    def _search(self, density: Density) -> Tensor:
        """Halve the step of each image until its objective has risen enough."""
        rise = ARMIJO * _dot(self.score, self.score).flatten()
        moving = ~self.stuck
        for _ in range(HALVINGS):
            trial = self.x + self.step_size * self.score
            objective = density.log_prob(trial, self.sigma)
            self.evaluations += 1
            enough = objective >= self.objective + self.step_size.flatten() * rise
            if bool((enough | ~moving).all()):
                break
            self.step_size = torch.where(_over_pixels(enough), self.step_size, self.step_size / 2)
        risen = moving & enough & (objective > self.objective)
        self.stuck |= ~risen
        self.objective = torch.where(risen, objective, self.objective)
        return torch.where(_over_pixels(risen), trial, self.x)


def _levels(sigma: float | Sequence[float]) -> list[float]:
    levels = [float(s) for s in (sigma if isinstance(sigma, Sequence) else [sigma])]
    if not levels or not all(0 < level < math.inf for level in levels):
        raise InputError(
            f"sigma is {sigma}; expected a positive noise level, or several from large to small."
        )
    if any(b > a for a, b in pairwise(levels)):
        raise InputError(f"the noise levels {levels} rise; anneal from large to small.")
    return levels


def _check(tolerance: float, max_steps: int) -> None:
    if not 0 <= tolerance < math.inf:
        raise InputError(f"tolerance is {tolerance}; expected at least zero.")
    if not (isinstance(max_steps, int) and max_steps > 0):
        raise InputError(f"max_steps is {max_steps!r}; expected a positive whole number.")


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((1, 2, 3), keepdim=True)


def _over_pixels(values: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1)."""
    return values[:, None, None, None]
