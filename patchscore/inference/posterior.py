"""The posterior of an image given a linear measurement: again a score.

    y = A x + n,    n ~ N(0, noise_std^2 I)
    grad log p_sigma(x | y) = s(x, sigma) + A'(y - A x) / (noise_std^2 + sigma^2 |A|^2)

The argument of both scores is the image blurred by noise, x_sigma = x + sigma z, and the likelihood is
that of y given x_sigma. If nothing is known of x but x_sigma, A x is N(A x_sigma, sigma^2 A A'), which
is added to the noise; A A' is replaced by |A|^2 I, |A| the largest singular value.

Exact: as sigma tends to zero, for every A. At sigma > 0 the formula is an approximation that widens the
likelihood: knowing the prior, p(x | x_sigma) is narrower than sigma. For the identity and for masks A A'
is |A|^2 I, so nothing is lost by the replacement; for other A it widens the likelihood further.

Reference: Jalal et al., "Robust Compressed Sensing MRI with Deep Generative Priors", NeurIPS 2021,
equation 6 (a likelihood that is annealed with the noise level of the prior).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from patchscore.errors import InputError
from patchscore.inference.curvature import largest_eigenvalue
from patchscore.noise import standard_normal

CONJUGATE_GRADIENT_STEPS = 1000


class ScoreModel(Protocol):
    """What solvers see: a prior, or a posterior. Images are (B, C, H, W), sigma a number or (B,)."""

    def score(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """grad log p_sigma(x): (B, C, H, W) -> (B, C, H, W)."""


@runtime_checkable
class Density(Protocol):
    """A score model whose score is the gradient of a log density that can be evaluated."""

    def score(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """grad log p_sigma(x): (B, C, H, W) -> (B, C, H, W)."""

    def log_prob(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """log p_sigma(x) up to a constant: (B, C, H, W) -> (B,)."""


class Operator(Protocol):
    """A linear measurement of images, such as the physics objects of deepinv."""

    def A(self, x: Tensor) -> Tensor:
        """A x: (B, C, H, W) -> (B, ...)."""

    def A_adjoint(self, y: Tensor) -> Tensor:
        """A' y: (B, ...) -> (B, C, H, W)."""


class Identity:
    """A = I: denoising."""

    def A(self, x: Tensor) -> Tensor:
        """X itself."""
        return x

    def A_adjoint(self, y: Tensor) -> Tensor:
        """Y itself."""
        return y


class Mask:
    """A = diag(mask): some pixels are measured, the others are to be filled in (inpainting).

    Parameters
    ----------
    mask
        True where a pixel is measured; any shape that broadcasts to (B, C, H, W). What y holds elsewhere
        is ignored.
    """

    def __init__(self, mask: Tensor) -> None:
        if mask.dtype != torch.bool:
            raise InputError(
                f"the mask is {mask.dtype}; expected torch.bool, True where a pixel is measured: "
                "mask != 0."
            )
        self.mask = mask

    def A(self, x: Tensor) -> Tensor:
        """The measured pixels of x, zero elsewhere."""
        return x * self.mask

    A_adjoint = A


class GaussianLikelihood:
    """log p(y | x) = -|A x - y|^2 / (2 noise_std^2) + const.

    Parameters
    ----------
    y
        The measurement, (B, ...), real. With B = 1 it serves a whole batch of images.
    operator
        Anything with ``A(x)`` and ``A_adjoint(y)``: :class:`Identity` for denoising, a :class:`Mask`, or
        the physics of another library.
    noise_std
        The noise level of y in its own unit, positive.

    Raises
    ------
    InputError
        If y is complex or not finite, noise_std is not positive, or A_adjoint is not the adjoint of A.

    Notes
    -----
    Fails where the noise is not Gaussian and white, as in magnitude MRI at low signal. The adjoint is
    tested with one pair of random vectors, at construction.
    """

    def __init__(self, y: Tensor, operator: Operator, noise_std: float) -> None:
        if y.is_complex() or not y.is_floating_point():
            raise InputError(
                f"y is {y.dtype}; the priors here are of real images. For complex data let the "
                "operator return real and imaginary parts, torch.view_as_real(A x), and give y likewise."
            )
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
        _check_adjoint(self.operator, self.back_projection, y)

    @cached_property
    def norm(self) -> float:
        """|A|, the largest singular value, by power iteration on A'A (an estimate from below)."""
        squared = largest_eigenvalue(
            lambda x: self.operator.A_adjoint(self.operator.A(x)), self.back_projection
        )
        return math.sqrt(squared.max().item())

    def variance(self, sigma: float | Tensor) -> Tensor:
        """noise_std^2 + sigma^2 |A|^2, of y given x_sigma: () or (B, 1, 1, 1)."""
        sigma = torch.as_tensor(sigma, dtype=self.y.dtype, device=self.y.device)
        variance = self.noise_std**2 + (sigma * self.norm) ** 2
        return variance if variance.ndim == 0 else variance[:, None, None, None]

    def score(self, x: Tensor, sigma: float | Tensor = 0.0) -> Tensor:
        """A'(y - A x) / variance(sigma): (B, C, H, W) -> (B, C, H, W)."""
        gradient = self.operator.A_adjoint(self.y - self.operator.A(x))
        return gradient / self.variance(sigma)

    def log_prob(self, x: Tensor, sigma: float | Tensor = 0.0) -> Tensor:
        """-|A x - y|^2 / (2 variance(sigma)): (B, C, H, W) -> (B,)."""
        misfit = (self.y - self.operator.A(x)).flatten(1).square().sum(1)
        return -0.5 * misfit / self.variance(sigma).flatten()

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


class Posterior:
    """p_sigma(x | y), proportional to p_sigma(x) p_sigma(y | x): a score, as a prior is.

    Parameters
    ----------
    prior
        Anything with ``score(x, sigma)``; with ``log_prob(x, sigma)`` too, the posterior is a density.
    likelihood
        Of the measurement.
    """

    def __init__(self, prior: ScoreModel, likelihood: GaussianLikelihood) -> None:
        self.prior = prior
        self.likelihood = likelihood

    @property
    def has_potential(self) -> bool:
        """Whether the score is the gradient of a known log density, so that there is a log_prob."""
        return has_potential(self.prior)

    def score(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """grad log p_sigma(x | y): (B, C, H, W) -> (B, C, H, W)."""
        return self.prior.score(x, sigma) + self.likelihood.score(x, sigma)

    def log_prob(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """log p_sigma(x | y) up to a constant that depends on sigma: (B, C, H, W) -> (B,)."""
        prior = require_potential(self.prior, "log_prob")
        return prior.log_prob(x, sigma) + self.likelihood.log_prob(x, sigma)


def curvature_bound(model: ScoreModel, sigma: float) -> float:
    """The largest curvature that a density blurred by sigma can have.

        L <= 1 / sigma^2                                  a prior
        L <= 1 / sigma^2 + |A|^2 / variance(sigma)        a posterior

    The score of x + sigma z has the Jacobian (Cov[x | x_sigma] / sigma^2 - I) / sigma^2, and no
    covariance is negative. A learned score may break the bound where it is not the score of any density.
    """
    prior = 1 / sigma**2
    if not isinstance(model, Posterior):
        return prior
    likelihood = model.likelihood
    return prior + likelihood.norm**2 / likelihood.variance(sigma).item()


def has_potential(model: ScoreModel) -> bool:
    """Whether log_prob can be evaluated."""
    return bool(getattr(model, "has_potential", isinstance(model, Density)))


def require_potential(model: ScoreModel, what: str) -> Density:
    """The model as a density, or an error that says what needs it."""
    if not has_potential(model):
        raise InputError(
            f"{what} needs the log density, and the prior has only a score; use a prior with a "
            "potential (PatchEnergy, trained on crops), or a method that needs the score alone."
        )
    return cast(Density, model)


def conjugate_gradients(left: Callable[[Tensor], Tensor], right: Tensor, x: Tensor) -> Tensor:
    """Solve left(x) = right for a symmetric positive definite map, image by image, from a first guess.

    Raises :class:`InputError` if it has not converged to rounding in 1000 steps.
    """
    tolerance = 10 * torch.finfo(x.dtype).eps * _dot(right, right).sqrt()
    residual = right - left(x)
    direction, energy = residual, _dot(residual, residual)
    for _ in range(CONJUGATE_GRADIENT_STEPS):
        if bool((energy.sqrt() <= tolerance).all()):
            return x
        image = left(direction)
        step = energy / _dot(direction, image).clamp_min(torch.finfo(x.dtype).tiny)
        x = x + step * direction
        residual = residual - step * image
        previous, energy = energy, _dot(residual, residual)
        direction = residual + energy / previous.clamp_min(torch.finfo(x.dtype).tiny) * direction
    raise InputError(
        f"the linear system of the data did not converge in {CONJUGATE_GRADIENT_STEPS} steps of "
        "conjugate gradients: the operator is too badly conditioned for this noise level; scale it to a "
        "norm of about one, or give a larger noise_std."
    )


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((1, 2, 3), keepdim=True)


def _check_adjoint(operator: Operator, x: Tensor, y: Tensor) -> None:
    """An error unless <A u, v> = <u, A' v> for random u and v, and the shapes fit."""
    image = operator.A(x)
    if image.shape != y.shape:
        raise InputError(
            f"y has shape {tuple(y.shape)}, but A of an image {tuple(x.shape)} (the shape of "
            f"A_adjoint(y)) has {tuple(image.shape)}; give the measurement that this operator makes."
        )
    generator = torch.Generator().manual_seed(0)
    u, w = standard_normal(x, generator), standard_normal(y, generator)
    a_u = operator.A(u)
    tiny = torch.finfo(y.dtype).tiny
    # With a part along A u the products are large, so that an error of scale shows at any size.
    v = w + a_u * (w.norm() / a_u.norm().clamp_min(tiny))
    forward, backward = (a_u * v).sum(), (u * operator.A_adjoint(v)).sum()
    mismatch = ((forward - backward).abs() / (a_u.norm() * v.norm()).clamp_min(tiny)).item()
    if not mismatch <= math.sqrt(torch.finfo(y.dtype).eps):
        raise InputError(
            f"A_adjoint is not the adjoint of A: <A u, v> = {forward.item():.6g} and <u, A' v> = "
            f"{backward.item():.6g} for random u and v, a mismatch of {mismatch:.2g}; gradients would "
            "be wrong. Filtered back-projection and pseudo-inverses are no adjoints."
        )
