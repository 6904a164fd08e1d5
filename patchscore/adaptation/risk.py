"""The squared error of a denoiser, estimated without the clean image, and the accuracy of the estimate.

For y = x + n with noise of level sigma, D(y) = y + sigma^2 s(y, sigma) and its derivative J = dD/dy,

    risk = |D - y|^2 - m sigma^2 + 2 sigma^2 tr J          E risk = E |D - x|^2             over m pixels

    E error^2 = 4 sigma^2 E |D - y|^2 + 4 sigma^4 E tr J^2 - 2 m sigma^4

(Stein 1981; the error by Stein's lemma, as below). If D' = D + d is a second denoiser, it is better by

    gain = -d'(d + 2 (D - y)) - 2 sigma^2 tr dd/dy         = |D - x|^2 - |D' - x|^2 + error
    error = 2 (d'n - sigma^2 tr dd/dy)                     E error = 0
    E error^2 = 4 sigma^2 E |d|^2 + 4 sigma^4 E tr (dd/dy)^2

(Stein's lemma, twice: Bellec and Zhang 2021, theorem 2.1; for the risk, of 2 (D - y) + n). What both
risks share cancels, so the gain of a small change is known accurately. Traces use K probes b of random
signs and central differences (Hutchinson; Ramani, Blu and Unser 2008), tr J ~ b' (D(y + e b) - D(y - e
b)) / 2 e, which adds 8 sigma^4 |dd/dy|^2 / K to the squared error of the gain, and 8 sigma^4 |J|^2 / K
to that of the risk.

References: Stein, Annals of Statistics 9 (1981), theorem 1; Ramani, Blu and Unser, IEEE Trans. Image
Processing 17 (2008), equation 14; Bellec and Zhang, Annals of Statistics 49 (2021), "Second-order
Stein".
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from patchscore.priors.prior import PatchPrior

# A fraction of sigma: far above rounding in float32, far below the scale on which a denoiser bends.
DIFFERENCE = 0.1


class Response(NamedTuple):
    """The estimate of a denoiser, (1, C, H, W), and J b for its probes b, (K, C, H, W)."""

    estimate: Tensor
    moves: Tensor


class Gain(NamedTuple):
    """The decrease of the squared error from one denoiser to another, and its variance.

    All are sums over pixels in units of sigma^2, so those of several images add up. ``risk`` is the
    estimated squared error of the first denoiser, with its own variance, and ``pixels`` the number of
    values. ``trace`` is tr dd/dy: a relative error e of sigma changes the gain by 4 e times the trace.
    """

    gain: float
    variance: float
    trace: float
    risk: float
    risk_variance: float
    pixels: float


def random_signs(count: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """Independent signs in the shape of an image: (count, C, H, W)."""
    signs = torch.randint(0, 2, (count, *like.shape[1:]), generator=generator, device=generator.device)
    return (2 * signs - 1).to(like)


@torch.no_grad()
def respond(prior: PatchPrior, y: Tensor, sigma: float, probes: Tensor) -> Response:
    """D(y), and J b for every probe, for an image (1, C, H, W).

    D(y) is approximated, to second order, by the mean over y +- e b, which saves an evaluation.
    """
    step = DIFFERENCE * sigma
    estimate = torch.zeros_like(y)
    moves = []
    for b in probes.split(1):
        ahead, behind = prior.denoise(y + step * b, sigma), prior.denoise(y - step * b, sigma)
        moves.append((ahead - behind) / (2 * step))
        estimate += (ahead + behind) / (2 * len(probes))
    return Response(estimate, torch.cat(moves))


def estimated_gain(
    new: Response, old: Response, y: Tensor, sigma: float, probes: Tensor, where: Tensor
) -> Gain:
    """The gain of ``new`` over ``old`` on the pixels ``where``, a mask (H, W)."""
    mask = where.to(y)
    variance = sigma**2
    change = new.estimate - old.estimate
    moved = new.moves - old.moves
    trace = (mask * probes * moved).sum() / len(probes)
    squared = (mask * moved.square()).sum() / len(probes)
    pixels = mask.sum() * y.shape[1]
    residual = old.estimate - y
    gain = -(mask * change * (change + 2 * residual)).sum() - 2 * variance * trace
    square = 4 * variance * (mask * change.square()).sum()
    square = square + 4 * variance**2 * squared * (1 + 2 / len(probes))
    old_trace = (mask * probes * old.moves).sum() / len(probes)
    left = (mask * residual.square()).sum()
    risk = left + variance * (2 * old_trace - pixels)
    old_squared = (mask * old.moves.square()).sum() / len(probes)
    risk_square = 4 * left / variance + 4 * old_squared * (1 + 2 / len(probes)) - 2 * pixels
    return Gain(
        float(gain / variance),
        float(square / variance**2),
        float(trace),
        float(risk / variance),
        float(risk_square.clamp_min(0)),
        float(pixels),
    )
