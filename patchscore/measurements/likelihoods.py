"""The likelihood of a linear measurement with white Gaussian noise.

    y = A x + n,    n ~ N(0, noise_std^2 I)
    grad log p_sigma(y | x) = A'(y - A x) / (noise_std^2 + sigma^2 |A|^2)

The argument is the image blurred by noise, x_sigma = x + sigma z, and the likelihood is that of y given
x_sigma. If nothing is known of x but x_sigma, A x is N(A x_sigma, sigma^2 A A'), which is added to the
noise; A A' is replaced by |A|^2 I, where |A| is the largest singular value.

Exact as sigma tends to zero, for every A. At sigma > 0 it is an approximation that widens the
likelihood: given the prior, p(x | x_sigma) is narrower than sigma. For the identity and for masks A A'
is |A|^2 I, so the replacement loses nothing; for other A it widens the likelihood further.

Images and measurements may be complex. Then n has the standard deviation noise_std in its real and in
its imaginary part, and the gradient is that of :mod:`patchscore.priors.wrappers`: the score is A^H(y -
A x) over the variance.

Reference: Jalal et al., "Robust Compressed Sensing MRI with Deep Generative Priors", NeurIPS 2021,
equation 6 (a likelihood that is annealed with the noise level of the prior).
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from patchscore.errors import InputError
from patchscore.linear_algebra import conjugate_gradients, dot, expand, largest_eigenvalue
from patchscore.measurements.operators import check_adjoint
from patchscore.protocols import Operator
from patchscore.randomness import standard_normal


class GaussianLikelihood:
    """log p(y | x) = -|A x - y|^2 / (2 noise_std^2) + const.

    Parameters
    ----------
    y
        The measurement, (B, ...), real or complex. With B = 1 it serves a whole batch of images.
    operator
        Anything with ``A(x)`` and ``A_adjoint(y)``: :class:`Identity` for denoising, a :class:`Mask`, or
        the physics of another library. Images are real or complex as A_adjoint(y) is.
    noise_std
        The noise level of y in its own unit, positive; of complex y, that of the real part, which is
        that of the imaginary part too.

    Raises
    ------
    InputError
        If y holds integers or is not finite, noise_std is not positive, or A_adjoint is not the adjoint
        of A.

    Notes
    -----
    Wrong where the noise is not Gaussian and white, as in magnitude MRI at low signal. The adjoint is
    tested with one pair of random vectors, at construction.
    """

    def __init__(self, y: Tensor, operator: Operator, noise_std: float) -> None:
        if not (y.is_floating_point() or y.is_complex()):
            raise InputError(f"y is {y.dtype}; expected floating-point or complex numbers: y.float().")
        if not bool(y.isfinite().all()):
            raise InputError(
                "y has values that are NaN or infinite; leave these measurements out, with a Mask or in "
                "the operator."
            )
        if not 0 < noise_std < math.inf:
            raise InputError(
                f"noise_std is {noise_std}; expected a positive number in the unit of y. For data "
                "without noise use a small one, such as a thousandth of the largest value: the "
                "posterior then keeps to the data that closely."
            )
        self.y = y
        self.operator = operator
        self.noise_std = float(noise_std)
        self.back_projection = self.operator.A_adjoint(y)
        check_adjoint(self.operator, self.back_projection, y)

    @cached_property
    def norm(self) -> float:
        """|A|, the largest singular value, by power iteration on A'A (an estimate from below)."""
        squared = largest_eigenvalue(
            lambda x: self.operator.A_adjoint(self.operator.A(x)), self.back_projection
        )
        return math.sqrt(squared.max().item())

    def variance(self, sigma: float | Tensor) -> Tensor:
        """noise_std^2 + sigma^2 |A|^2, of y given x_sigma: () or (B, 1, 1, 1)."""
        sigma = torch.as_tensor(sigma, dtype=self.y.real.dtype, device=self.y.device)
        variance = self.noise_std**2 + (sigma * self.norm) ** 2
        return variance if variance.ndim == 0 else expand(variance)

    def score(self, x: Tensor, sigma: float | Tensor = 0.0) -> Tensor:
        """A'(y - A x) / variance(sigma): (B, C, H, W) -> (B, C, H, W)."""
        gradient = self.operator.A_adjoint(self.y - self.operator.A(x))
        return gradient / self.variance(sigma)

    def log_prob(self, x: Tensor, sigma: float | Tensor = 0.0) -> Tensor:
        """-|A x - y|^2 / (2 variance(sigma)): (B, C, H, W) -> (B,)."""
        residual = self.y - self.operator.A(x)
        return -0.5 * dot(residual, residual) / self.variance(sigma).flatten()

    def curvature_bound(self, sigma: float) -> float:
        """|A|^2 / variance(sigma)."""
        return self.norm**2 / self.variance(sigma).item()

    def proximal(self, z: Tensor, precision: float, noise: Tensor | None = None) -> Tensor:
        """The mode of p(y | x) N(x; z, I / precision): (B, C, H, W) -> (B, C, H, W).

            (A'A / noise_std^2 + precision I) x = A'y / noise_std^2 + precision z + noise

        by conjugate gradients; one step where A'A is a multiple of the identity, two for a mask. With
        ``noise`` of the covariance of the left-hand side, x is a sample instead of the mode.
        """
        right = self.back_projection / self.noise_std**2 + precision * z
        right = right if noise is None else right + noise

        def left(x: Tensor) -> Tensor:
            return self.operator.A_adjoint(self.operator.A(x)) / self.noise_std**2 + precision * x

        return conjugate_gradients(left, right, z)

    def proximal_sample(self, z: Tensor, precision: float, generator: torch.Generator) -> Tensor:
        """A sample of p(y | x) N(x; z, I / precision): (B, C, H, W) -> (B, C, H, W).

        Perturbation and optimisation: Papandreou and Yuille, NeurIPS 2010, equation 4.
        """
        of_data = standard_normal(self.operator.A(z), generator) / self.noise_std
        noise = self.operator.A_adjoint(of_data) + math.sqrt(precision) * standard_normal(z, generator)
        return self.proximal(z, precision, noise)
