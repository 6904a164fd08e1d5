"""Total variation for any linear measurement, to compare priors with.

    x* = argmin_x  1/2 |A x - y|^2 + weight TV(x),      TV(x) = sum_i |(D x)_i|

D takes forward differences, zero across the border, and |.| is the length of the 2 C numbers at a pixel:
channels share their edges, so a complex image in two channels has the variation of complex numbers. It
is solved by the alternating direction method of multipliers for z = D x,

    (A'A + p D'D) x = A'y + p D'(z - u)         z = shrink(D x + u, weight / p)         u = u + D x - z

with a few steps of conjugate gradients for x, preconditioned by the mean of A'A over all shifts, and
with a penalty p that keeps both residuals alike.

References: Rudin, Osher and Fatemi, Physica D 60 (1992); Boyd et al., Foundations and Trends in Machine
Learning 3 (2011), sections 3.3 (when to stop) and 3.4 (the penalty, over-relaxation).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from patchscore.checks import check_positive
from patchscore.errors import InputError
from patchscore.linear_algebra import dot, norm
from patchscore.protocols import Operator
from patchscore.randomness import standard_normal

TOLERANCE = 1e-3
MAX_STEPS = 1000
INNER_STEPS = 8
INNER_TOLERANCE = 0.1  # of the residual at the start of an inner solve
RELAXATION = 1.7
PROBES = 8
FLOOR = 1e-3
WEIGHT_RATIO = 1.6  # of neighbours in the grid of weights


class State(NamedTuple):
    """Where the iteration is: the image, the multipliers of its gradients, and weight / penalty."""

    x: Tensor
    u: Tensor
    threshold: float


class TotalVariationSolver:
    """Minimise 1/2 |A x - y|^2 + weight TV(x), for one weight after the other.

    Parameters
    ----------
    y
        The measurement (1, ...) of one image.
    operator
        Anything with ``A`` and its exact adjoint ``A_adjoint``; images are real.
    """

    def __init__(self, y: Tensor, operator: Operator) -> None:
        self.y, self.operator = y, operator
        self.back_projection = operator.A_adjoint(y)
        if self.back_projection.is_complex():
            raise InputError("the images of this operator are complex; give them as two channels.")
        self.data_symbol = self._symbol(self._normal)
        self.variation_symbol = self._symbol(lambda x: differences_adjoint(differences(x)))
        self.state: State | None = None

    def solve(
        self, weight: float, *, tolerance: float = TOLERANCE, max_steps: int = MAX_STEPS
    ) -> Tensor:
        """The minimiser (1, C, H, W), started where the last weight ended.

        It stops when both residuals of the splitting are below ``tolerance``, relative to the gradients
        of the image and to the force of the regulariser.
        """
        check_positive(weight=weight, tolerance=tolerance)
        x, u, threshold = self.state or self._start(weight)
        penalty = weight / threshold
        gradient = differences(x)
        z = shrink(gradient + u, threshold)
        for step in range(max_steps):
            right = self.back_projection + penalty * differences_adjoint(z - u)
            x = self._least_squares(right, x, penalty)
            gradient = differences(x)
            relaxed = RELAXATION * gradient + (1 - RELAXATION) * z
            previous, z = z, shrink(relaxed + u, weight / penalty)
            u = u + relaxed - z
            size = max(norm(gradient).item(), norm(z).item(), 1e-30)
            force = max(norm(differences_adjoint(u)).item(), 1e-30)
            primal = norm(gradient - z).item() / size
            dual = norm(differences_adjoint(z - previous)).item() / force
            if max(primal, dual) < tolerance:
                break
            if step % 10 == 9 and step < max_steps // 2:
                factor = min(max(math.sqrt(primal / max(dual, 1e-30)), 0.5), 2.0)
                if not 0.7 < factor < 1.4:
                    penalty, u = penalty * factor, u / factor
        self.state = State(x, u, weight / penalty)
        return x

    def _start(self, weight: float) -> State:
        x = torch.zeros_like(self.back_projection)
        u = differences(x)
        x = self._least_squares(self.back_projection, x, weight, steps=20)
        typical = differences(x).square().mean().sqrt().item()
        return State(x, u, max(typical, 1e-30))

    def _normal(self, x: Tensor) -> Tensor:
        return self.operator.A_adjoint(self.operator.A(x))

    def _symbol(self, apply: Callable[[Tensor], Tensor]) -> Tensor:
        """The gain of every frequency, on the mean over random images."""
        generator = torch.Generator().manual_seed(0)
        noises = [standard_normal(self.back_projection, generator) for _ in range(PROBES)]
        spectra = torch.fft.rfft2(torch.cat(noises))
        images = torch.fft.rfft2(torch.cat([apply(noise) for noise in noises]))
        gains: Tensor = (spectra.conj() * images).real.sum((0, 1)) / spectra.abs().square().sum((0, 1))
        return gains.clamp_min(FLOOR * gains.mean().item())

    def _least_squares(
        self, right: Tensor, x: Tensor, penalty: float, steps: int = INNER_STEPS
    ) -> Tensor:
        """Improve a solution of (A'A + penalty D'D) x = right by preconditioned conjugate gradients."""
        symbol = self.data_symbol + penalty * self.variation_symbol

        def left(v: Tensor) -> Tensor:
            return self._normal(v) + penalty * differences_adjoint(differences(v))

        def preconditioned(v: Tensor) -> Tensor:
            filtered: Tensor = torch.fft.irfft2(torch.fft.rfft2(v) / symbol, s=v.shape[-2:])
            return filtered

        residual = right - left(x)
        image = preconditioned(residual)
        direction, energy = image, dot(residual, image).item()
        enough = INNER_TOLERANCE**2 * energy
        for _ in range(steps):
            if energy <= enough or energy <= 0:
                break
            bent = left(direction)
            length = energy / dot(direction, bent).item()
            x = x + length * direction
            residual = residual - length * bent
            image = preconditioned(residual)
            previous, energy = energy, dot(residual, image).item()
            direction = image + (energy / previous) * direction
        return x


def oracle_weight(
    solver: TotalVariationSolver, error: Callable[[Tensor], float], noise_std: float
) -> tuple[float, Tensor]:
    """The weight with the least error, which only the clean image can tell, and its minimiser.

    On a geometric grid, from half of ``noise_std`` in the unit of the image upwards or downwards until
    the error rises, and then at the minimum of the parabola through the best three; every weight starts
    at the minimiser of the one before.
    """
    found: dict[float, tuple[float, Tensor]] = {}

    def at(log_weight: float) -> float:
        if log_weight not in found:
            x = solver.solve(math.exp(log_weight))
            found[log_weight] = error(x), x
        return found[log_weight][0]

    step = math.log(WEIGHT_RATIO)
    here = math.log(noise_std * solver.data_symbol.mean().sqrt().item() / 2)
    if at(here + step) > at(here):
        step = -step
    while at(here + step) < at(here):
        here += step
    left, middle, right = at(here - step), at(here), at(here + step)
    at(here + step * (left - right) / (2 * (left - 2 * middle + right)))
    best = min(found, key=lambda log_weight: found[log_weight][0])
    return math.exp(best), found[best][1]


def differences(x: Tensor) -> Tensor:
    """D x: (B, C, H, W) -> (B, 2, C, H, W), downwards and to the right, zero across the border."""
    found = x.new_zeros(len(x), 2, *x.shape[1:])
    found[:, 0, :, :-1] = x[:, :, 1:] - x[:, :, :-1]
    found[:, 1, :, :, :-1] = x[:, :, :, 1:] - x[:, :, :, :-1]
    return found


def differences_adjoint(z: Tensor) -> Tensor:
    """D' z: (B, 2, C, H, W) -> (B, C, H, W)."""
    x = torch.zeros_like(z[:, 0])
    x[:, :, 1:] += z[:, 0, :, :-1]
    x[:, :, :-1] -= z[:, 0, :, :-1]
    x[:, :, :, 1:] += z[:, 1, :, :, :-1]
    x[:, :, :, :-1] -= z[:, 1, :, :, :-1]
    return x


def shrink(z: Tensor, threshold: float) -> Tensor:
    """Shorten the vector of every pixel by ``threshold``, to zero if it is shorter."""
    length = z.square().sum((1, 2), keepdim=True).sqrt()
    return torch.where(length > threshold, z * (1 - threshold / length), 0)
