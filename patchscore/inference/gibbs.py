"""Split Gibbs sampling: the posterior of any linear measurement, through samples of denoised images.

The image is split in two that are held together by a Gaussian of width rho,

    p(x, z | y) ~ exp(-|A x - y|^2 / (2 noise_std^2) - |x - z|^2 / (2 rho^2)) p(z)

and each is drawn given the other:

    x | z, y    a Gaussian, by perturbation and conjugate gradients
    z | x       the clean image behind x at the noise level rho, by the reverse diffusion

The draws of z are those of the posterior p(z) N(y; A z, noise_std^2 I + rho^2 A A'), so rho is all that
they differ by from p(z | y). For the identity and for masks nothing differs if rho^2 is
taken out of the variance of the noise beforehand.

References: Vono, Dobigeon and Chainais, "Split-and-Augmented Gibbs Sampler", IEEE TSP 67 (2019),
algorithm 1; Xu and Chi, "Provably Robust Score-Based Diffusion Posterior Sampling for Plug-and-Play
Image Reconstruction", NeurIPS 2024, algorithm 1 (the reverse diffusion as the step of the prior).
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchscore.checks import check_noise_level
from patchscore.errors import InputError
from patchscore.inference.chain import Chain, Keep, Recorder
from patchscore.inference.diffusion import LAST_LEVEL, Order, denoised_path
from patchscore.inference.posterior import Posterior
from patchscore.inference.schedules import noise_schedule


@torch.no_grad()
def split_gibbs(
    posterior: Posterior,
    x0: Tensor,
    *,
    rho: float,
    steps: int,
    burn_in: int | None = None,
    levels: int = 10,
    order: Order = 2,
    keep: Keep = "samples",
    generator: torch.Generator,
    resume: Chain | None = None,
    progress: bool = True,
) -> Chain:
    """Draw from p(z | y) by split Gibbs sampling, one chain for each image of x0.

    Parameters
    ----------
    posterior
        Of a prior (any score of blurred images) and a likelihood.
    x0
        (B, C, H, W), where z begins.
    rho
        The width of the split, in the unit of the image: small against the noise for little bias, large
        for fast mixing. About noise_std / |A| doubles the variance of the noise.
    steps, burn_in, keep, generator, resume, progress
        As of :func:`langevin`; every step is recorded after the burn-in.
    levels, order
        Of the reverse diffusion from rho, in every step.

    Raises
    ------
    InputError
        Before any work: for settings that do not fit, or samples that do not fit in memory. Later: if
        the linear system of the data does not converge.

    Notes
    -----
    Fails to mix for rho far below the spread of the posterior: a step moves by about rho. Pixels that
    are not measured move by the prior alone.
    """
    check_noise_level(rho)
    if burn_in is None:
        burn_in = steps // 2 if resume is None else resume.burn_in
    if not 0 <= burn_in < steps:
        raise InputError(f"burn_in is {burn_in} of {steps} steps; expected fewer than all of them.")
    recorder = Recorder(x0, steps - burn_in, keep, generator, resume)
    z = x0 if resume is None else resume.state.to(x0)
    sigmas = [z.new_full((len(z),), s) for s in noise_schedule(rho, rho * LAST_LEVEL, levels + 1)]

    def step(k: int) -> int:
        nonlocal z
        x = posterior.likelihood.proximal_sample(z, 1 / rho**2, generator)
        z = denoised_path(posterior.prior, x, sigmas, order, generator)
        if k >= burn_in:
            recorder.add(z)
        return 1

    done, reason = recorder.repeat(step, steps, unit="step", progress=progress)
    evaluations = (done - recorder.first) * (order * levels + 1)
    return recorder.chain(z, done, evaluations, reason, burn_in=burn_in)
