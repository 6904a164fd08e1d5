"""Langevin samplers: a walk along the score that forgets where it began.

    x' = x + h s(x, sigma) + sqrt(2 h) z,    z ~ N(0, I)
    (langevin_step)

Unadjusted (ULA), its stationary distribution is biased: along a direction of curvature lambda a Gaussian
has the variance 1 / (lambda (1 - h lambda / 2)) instead of 1 / lambda, and the walk is unstable from h =
2 / L on, L the largest curvature. Metropolis-adjusted (MALA), x' is taken with probability

    min(1, p(x') q(x | x') / (p(x) q(x' | x))),    q(b | a) = N(b; a + h s(a), 2 h I)

and the stationary distribution is p, exactly.

References: Roberts and Tweedie, Bernoulli 2 (1996), equations 5-8; Roberts and Rosenthal, JRSS B 60
(1998), theorem 1 (acceptance 0.574); Song and Ermon, NeurIPS 2019, algorithm 1 (annealed).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from patchscore.checks import check_noise_level
from patchscore.errors import InputError
from patchscore.inference.chain import Chain, Keep, Recorder
from patchscore.inference.curvature import curvature, curvature_bound
from patchscore.protocols import Density, Score, require_potential
from patchscore.randomness import standard_normal

# h L of the unadjusted walk: the variance in the stiffest direction is 1 / (1 - 0.1 / 2) = 1.05 times
# that of the density.
UNADJUSTED = 0.1
# h L d^(1/3) of the corrected walk and its acceptance where it mixes fastest, on a white Gaussian.
OPTIMAL_STEP, OPTIMAL_ACCEPTANCE = 1.36, 0.574
# Of the score, over its size where the walk began: no stable walk comes near.
GROWTH = 1e6


def langevin_step(x: Tensor, score: Tensor, step_size: Tensor, generator: torch.Generator) -> Tensor:
    """x + h s + sqrt(2 h) z: (B, C, H, W); h is (B, 1, 1, 1)."""
    return x + step_size * score + (2 * step_size).sqrt() * standard_normal(x, generator)


@torch.no_grad()
def langevin(
    posterior: Score,
    x0: Tensor,
    *,
    sigma: float,
    steps: int,
    burn_in: int | None = None,
    step_size: float | None = None,
    metropolis: bool = False,
    thin: int = 1,
    keep: Keep = "samples",
    generator: torch.Generator,
    resume: Chain | None = None,
    progress: bool = True,
) -> Chain:
    """Draw from p_sigma(x | y) by a Langevin walk, one chain for each image of x0.

    Parameters
    ----------
    posterior
        A :class:`Posterior`, a prior, or any score.
    x0
        (B, C, H, W), where the chains begin. For several chains of one posterior, repeat it (a
        measurement with B = 1 serves all of them), best at places that are further apart than the
        posterior is wide.
    sigma
        The noise level of the prior.
    steps
        To make in all, burn-in included.
    burn_in
        Steps that are not recorded; if not given half of all, or what it was in the chain to go on from.
    step_size
        h, in the squared unit of the image. If not given, 0.1 / L with the measured curvature L at x0;
        with Metropolis' correction it then starts at 1.36 d^(-1/3) / L for d pixels and is tuned during
        the burn-in, chain by chain, to the acceptance 0.574, and fixed from there on.
    metropolis
        Whether to correct the walk to be exact (MALA); needs a potential.
    thin
        Record every so many steps.
    keep
        ``"samples"``, or ``"moments"`` for the running mean and variance alone.
    resume
        A chain to go on from, with the same settings and more steps: the same draws as in one go.

    Returns
    -------
    Chain
        Also when it was interrupted from the keyboard: what there is by then.

    Raises
    ------
    InputError
        Before any work: for settings that do not fit, samples that do not fit in memory, a correction
        without a potential. Later: if the walk diverges, with the bound that its step broke.

    Notes
    -----
    Fails to cross between modes that are far apart: in that case use :func:`annealed_langevin` or
    :func:`sample_denoised`. Neighbouring draws are correlated; see
    ``diagnostics.effective_sample_size``. In float32 a log density of N pixels is known to about N /
    10^7, which the correction needs to be below one.
    """
    check_noise_level(sigma)
    if burn_in is None:
        burn_in = steps // 2 if resume is None else resume.burn_in
    _check(steps, burn_in, thin, step_size)
    density = require_potential(posterior, "metropolis=True") if metropolis else None
    recorder = Recorder(x0, (steps - burn_in) // thin, keep, generator, resume)
    walk = _Walk(posterior, density, x0, sigma, step_size, burn_in, generator, resume)

    def step(k: int) -> int:
        walk.step(k)
        if k >= burn_in and (k - burn_in + 1) % thin == 0:
            recorder.add(walk.x)
        return 1

    done, reason = recorder.repeat(step, steps, unit="step", progress=progress)
    return recorder.chain(
        walk.x,
        done,
        walk.evaluations,
        reason,
        burn_in=burn_in,
        step_size=walk.step_size,
        acceptance=walk.accepted / max(1, done - burn_in) if metropolis else None,
    )


@torch.no_grad()
def annealed_langevin(
    posterior: Score,
    x0: Tensor,
    *,
    sigmas: Sequence[float],
    steps_per_level: int = 20,
    thin: int = 1,
    step_fraction: float = UNADJUSTED,
    keep: Keep = "samples",
    generator: torch.Generator,
    resume: Chain | None = None,
    progress: bool = True,
) -> Chain:
    """Langevin walks at falling noise levels, each begun where the one before ended.

    At the level sigma the step is step_fraction / L with the bound L = 1 / sigma^2 (+ |A|^2 / variance
    of a posterior) on the curvature of every density that is blurred by sigma.

    Parameters
    ----------
    x0
        (B, C, H, W); with a highest level above the spread of the images it matters little.
    sigmas
        From large, where the posterior has one mode, to small, each about 0.8 of the one before.
    steps_per_level
        At the last level the walk is recorded, every ``thin`` steps.
    generator, keep, resume, progress
        As of :func:`langevin`.

    Raises
    ------
    InputError
        Before any work: for settings that do not fit, or samples that do not fit in memory. Later: if
        the walk diverges.

    Notes
    -----
    The draws are of p_sigma(x | y) at the last level, with the bias of the unadjusted walk. Fails to
    have modes in their proportions if levels are far apart or the steps at each are few.
    """
    for sigma in sigmas:
        check_noise_level(sigma)
    _check(steps_per_level, 0, thin, step_fraction)
    recorder = Recorder(x0, steps_per_level // thin, keep, generator, resume)
    x = x0 if resume is None else resume.state.to(x0)
    burn_in = (len(sigmas) - 1) * steps_per_level
    guard: _Guard | None = None

    def step(k: int) -> int:
        nonlocal x, guard
        sigma = sigmas[k // steps_per_level]
        step_size = x.new_full((len(x), 1, 1, 1), step_fraction / curvature_bound(posterior, x, sigma))
        score = posterior.score(x, sigma)
        if k % steps_per_level == 0 or guard is None:
            guard = _Guard(posterior, x, sigma, score)
        guard.check(score, step_size, k)
        x = langevin_step(x, score, step_size, generator)
        if k >= burn_in and (k - burn_in + 1) % thin == 0:
            recorder.add(x)
        return 1

    last = len(sigmas) * steps_per_level
    done, reason = recorder.repeat(step, last, unit="step", progress=progress)
    return recorder.chain(x, done, done - recorder.first, reason, burn_in=burn_in)


class _Walk:
    """A Langevin walk at one noise level, plain or corrected; every image has its own step size."""

    def __init__(
        self,
        posterior: Score,
        density: Density | None,
        x0: Tensor,
        sigma: float,
        step_size: float | None,
        burn_in: int,
        generator: torch.Generator,
        resume: Chain | None,
    ) -> None:
        self.posterior, self.density, self.sigma = posterior, density, sigma
        self.burn_in, self.generator = burn_in, generator
        self.tuned = density is not None and step_size is None
        self.x = x0 if resume is None else resume.state.to(x0)
        self.score = posterior.score(self.x, sigma)
        self.log_prob = density.log_prob(self.x, sigma) if density else x0.new_zeros(len(x0))
        self.evaluations = 1
        self.accepted = x0.new_zeros(len(x0))
        self.guard = _Guard(posterior, self.x, sigma, self.score)
        if resume is not None:
            self.step_size = resume.step_size.to(x0)
            self.accepted = (resume.acceptance.to(x0) * max(1, resume.steps - burn_in)).round()
        elif step_size is not None:
            self.step_size = x0.new_full((len(x0),), step_size)
        else:
            pixels = x0[0].numel()
            fraction = UNADJUSTED if density is None else OPTIMAL_STEP * pixels ** (-1 / 3)
            self.step_size = fraction / curvature(posterior, x0, sigma)

    def step(self, k: int) -> None:
        """The k-th step."""
        h = self.step_size[:, None, None, None]
        proposal = langevin_step(self.x, self.score, h, self.generator)
        score = self.posterior.score(proposal, self.sigma)
        self.evaluations += 1
        if self.density is None:
            self.guard.check(score, h, k)
            self.x, self.score = proposal, score
            return
        log_prob = self.density.log_prob(proposal, self.sigma)
        there = _squared(proposal - self.x - h * self.score) / (4 * self.step_size)
        back = _squared(self.x - proposal - h * score) / (4 * self.step_size)
        probability = (log_prob - self.log_prob + there - back).exp().nan_to_num(0).clamp_max(1)
        u = torch.rand(
            len(self.x), generator=self.generator, dtype=h.dtype, device=self.generator.device
        )
        taken = u.to(h.device) < probability
        pick = taken[:, None, None, None]
        self.x, self.score = torch.where(pick, proposal, self.x), torch.where(pick, score, self.score)
        self.log_prob = torch.where(taken, log_prob, self.log_prob)
        if k >= self.burn_in:
            self.accepted = self.accepted + taken
        elif self.tuned:
            # Robbins and Monro (1951); the gain falls slowly, for a walk that has still to arrive.
            gain = 1 - k / self.burn_in
            self.step_size = self.step_size * (gain * (probability - OPTIMAL_ACCEPTANCE)).exp()


def _check(steps: int, burn_in: int, thin: int, step_size: float | None) -> None:
    for name, value in (("steps", steps), ("thin", thin)):
        if not (isinstance(value, int) and value > 0):
            raise InputError(f"{name} is {value!r}; expected a positive whole number.")
    if not 0 <= burn_in < steps:
        raise InputError(
            f"burn_in is {burn_in} of {steps} steps; expected at least 0 and fewer than all of them."
        )
    if step_size is not None and not 0 < step_size < math.inf:
        raise InputError(f"the step size is {step_size}; expected a positive number.")


class _Guard:
    """Stops a walk whose score has left every bound."""

    def __init__(self, posterior: Score, x0: Tensor, sigma: float, score: Tensor) -> None:
        self.posterior, self.x0, self.sigma = posterior, x0, sigma
        self.limit = GROWTH * (score.abs().max() + 1 / sigma)

    def check(self, score: Tensor, step_size: Tensor, k: int) -> None:
        """An error that names the bound of the step if the score has grown a million times."""
        if bool((score.abs() < self.limit).all()):
            return
        bound = 2 / curvature(self.posterior, self.x0, self.sigma).max().item()
        raise InputError(
            f"the chain diverged at step {k}: its step size is {step_size.max().item():.3g}, and a "
            f"Langevin walk is stable below 2 / L = {bound:.3g}, with the curvature L = {2 / bound:.3g} "
            "measured where it began. Leave the step size out to have it chosen, or give a smaller one."
        )


def _squared(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B,)."""
    return x.square().sum((1, 2, 3))
