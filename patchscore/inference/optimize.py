"""The most probable image, by gradient ascent.

    J(x) = strength log p_sigma(x) + log p(y | x),    x <- x + h grad J(x)

sigma smooths the prior only.

A prior that is a density needs no regularisation weight: the noise level of the data alone balances
the two terms. With a potential, h starts at the step of Barzilai and Borwein, h = |d|^2 / <d, -g>, where
d is the last change of the image and g that of the score, and is halved until Armijo's rule holds:

    log p(x + h s) >= log p(x) + c h |s|^2

so the objective never falls. Without a potential, h = 1 / L with the measured curvature L of the score.

References: Barzilai and Borwein, IMA J. Numer. Anal. 8 (1988), equation 5; Nocedal and Wright,
"Numerical Optimization" (2006), equation 3.4; Fessler, "Score-based priors for image reconstruction"
(talk, 2023).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from patchscore.checks import (
    check_batch,
    check_counts,
    check_positive,
    check_schedule,
    numbers,
    one_number,
)
from patchscore.errors import InputError
from patchscore.figures import as_html, counted, image_size, solution_figure
from patchscore.inference.curvature import curvature, curvature_bound
from patchscore.inference.posterior import Objective, Posterior
from patchscore.linear_algebra import dot, expand, rms
from patchscore.protocols import Density, Score, check_score, has_potential

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
        (rows, B): J(x) at the start of every noise level and after every step, up to a
        constant that depends on sigma; NaN without a potential.
    residual
        (rows, B): what is driven to zero, |sigma s(x)| / sqrt(pixels), or the change of x in splitting.
    sigmas : (rows,), the noise level of the prior
    reason : why it stopped
    evaluations : of the prior, each of the whole batch
    seconds : wall-clock time
    steps : made, at all noise levels together
    """

    x: Tensor
    objective: np.ndarray
    residual: np.ndarray
    sigmas: np.ndarray
    reason: str
    evaluations: int
    seconds: float
    steps: int = 0

    def plot(self) -> Figure:
        """The estimate of the first image, the objective (with a potential) and the residual."""
        cost = f"{counted(self.evaluations, 'evaluation')} of the prior, {self.seconds:.3g} s"
        title = f"{cost}\n{self.reason}"
        return solution_figure(self.x, self.objective[:, 0], self.residual[:, 0], self.sigmas, title)

    def __repr__(self) -> str:
        converged = "converged in " if self.reason.startswith("converged") else ""
        return (
            f"Solution({image_size(self.x)}, {converged}{counted(self.steps, 'step')}, "
            f"{counted(self.evaluations, 'evaluation')}, {self.seconds:.3g} s)"
        )

    def _repr_html_(self) -> str:
        return as_html(self)


@torch.no_grad()
def map_estimate(
    posterior: Score,
    x0: Tensor,
    *,
    sigma: float | Sequence[float],
    strength: float = 1.0,
    tolerance: float = 1e-4,
    max_steps: int = 500,
    progress: bool = True,
) -> Solution:
    """The MAP estimate argmax_x strength log p_sigma(x) + log p(y | x): (B, C, H, W) -> Solution.

    Parameters
    ----------
    posterior
        A :class:`Posterior`, or any score (which is maximised as it is, blurred data included). If it
        has a potential, steps are chosen by line search, image by image.
    x0
        Where to start.
    sigma
        The noise level of the prior. One level should be small against the noise of the data, but not
        below the training range of the prior. Several levels go from large to small, and each starts
        where the one before stopped; this avoids poor local maxima. Objectives can be compared within a
        level only.
    strength
        Of the prior of a :class:`Posterior` against its data. One is Bayes' rule. The mode of a learned
        prior is smoother than images are, and about 0.3 at a small sigma is closest to them.
    tolerance
        Stop when the root mean square of sigma s(x) is below, for every image. If the curvature is 1 /
        sigma^2, this is the distance of a pixel to the maximum, in units of sigma.
    max_steps
        The most steps at each level.

    Raises
    ------
    InputError
        If a shape or a noise level does not fit, or the score stops being finite.

    Notes
    -----
    Not a typical image: the maximum is smoother than any sample. If the posterior has several modes, a
    near one is found, not always the highest. Not the estimate of least squared error: that is the
    posterior mean (``prior.denoise``, :func:`sample_denoised`). Unreliable for a sigma below the
    training range of the prior.
    """
    check_score(posterior)
    check_batch(x0, "x0")
    sigmas = np.atleast_1d(numbers(sigma)).tolist()
    check_schedule(sigmas)
    check_counts(max_steps=max_steps)
    check_positive(strength=strength)
    model = Objective(posterior, strength) if isinstance(posterior, Posterior) else posterior
    tolerance = one_number(tolerance, "tolerance")
    if not 0 <= tolerance < math.inf:
        raise InputError(f"tolerance is {tolerance}; expected a number of at least zero.")
    objective, residual, levels = [], [], []
    evaluations, steps, reason = 0, 0, ""
    start = time.perf_counter()
    x = x0
    with tqdm(total=len(sigmas) * max_steps, unit="step", disable=not progress) as bar:
        for level in sigmas:
            climb = _Ascent(model, x, level)
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
            steps += climb.steps
    rows = np.array(objective), np.array(residual), np.array(levels)
    return Solution(x, *rows, reason, evaluations, time.perf_counter() - start, steps)


class _Ascent:
    """The state of the climb at one noise level; every image has its own step."""

    def __init__(self, posterior: Score, x: Tensor, sigma: float) -> None:
        self.posterior, self.x, self.sigma = posterior, x, sigma
        self.density: Density | None = posterior if has_potential(posterior) else None  # type: ignore[assignment]
        self.score = posterior.score(x, sigma)
        unknown = x.real.new_full((len(x),), math.nan)
        self.objective = self.density.log_prob(x, sigma) if self.density else unknown
        self.stuck = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self.steps = 0
        self.evaluations = 1
        if self.density:  # a bound will do: the line search corrects it
            largest = curvature_bound(posterior, x, sigma)
        else:
            largest = curvature(posterior, x, sigma)
        self.step_size = 1 / largest.value
        self.evaluations += largest.evaluations

    @property
    def residual(self) -> Tensor:
        """The root mean square of sigma s(x): (B,)."""
        return self.sigma * rms(self.score)

    def reason(self, tolerance: float, max_steps: int) -> str:
        """Why it ends here; empty to go on."""
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
        h = expand(self.step_size)
        self.x = x + h * score if self.density is None else self._search(self.density)
        self.score = self.posterior.score(self.x, self.sigma)
        self.evaluations += 1
        if self.density is not None:
            change, bend = self.x - x, score - self.score
            along = dot(change, bend)
            barzilai_borwein = dot(change, change) / along
            # If the objective is not concave along the step, a longer one can be tried.
            self.step_size = torch.where(along > 0, barzilai_borwein, 2 * self.step_size)
            self.step_size = torch.where(self.stuck, 0, self.step_size)

    def _search(self, density: Density) -> Tensor:
        """Halve the step of each image until its objective has risen enough."""
        rise = ARMIJO * dot(self.score, self.score)
        moving = ~self.stuck
        for _ in range(HALVINGS):
            trial = self.x + expand(self.step_size) * self.score
            objective = density.log_prob(trial, self.sigma)
            self.evaluations += 1
            enough = objective >= self.objective + self.step_size * rise
            if bool((enough | ~moving).all()):
                break
            self.step_size = torch.where(enough, self.step_size, self.step_size / 2)
        risen = moving & enough & (objective > self.objective)
        self.stuck |= ~risen
        self.objective = torch.where(risen, objective, self.objective)
        return torch.where(expand(risen), trial, self.x)
