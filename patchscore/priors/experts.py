"""The classical experts: Student-t filters and total variation.

    StudentT            phi(v) = sum_i a_i log(1 + (J_i' v)^2 / 2)
    TotalVariation      phi(v) = strength * sum of |v_q - v_p|^exponent over neighbouring pixels p, q

References: Hinton, "Training Products of Experts", Neural Computation 14 (2002); Roth and Black, "Fields
of Experts", IJCV 82 (2009), equation 8; Rudin, Osher and Fatemi, Physica D 60 (1992).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from patchscore.errors import InputError
from patchscore.priors.cliques import Potential, check_tensor, patch_pixels, stack_shape
from patchscore.priors.registry import register


@register
class StudentT(Potential):
    """Filters with heavy-tailed responses, phi(v) = sum_i a_i log(1 + (J_i' v)^2 / 2), a_i > 0.

    The sum over all patches is a field of experts, the density of one patch a product of experts.
    Filters and weights are parameters, so :func:`patchscore.fit` trains them.

    A Student-t density has no closed form under Gaussian blur, so this prior is approximate at every
    sigma > 0. It means one of two things:

    ``scale_invariant=True``   phi(v / sigma), in units of the noise: one shape at all noise levels, for
                               training over noise levels (what is learned is a model of the blurred
                               density), in any unit of the image.
    ``scale_invariant=False``  phi(v), whatever sigma is: the density of clean images, as in the
                               literature, for MAP estimates and for sampling at low noise. Filters are
                               then in one over the unit of the image.

    Parameters
    ----------
    filters
        J, (K, C, rows, columns); or only this shape, for filters with entries N(0, 1 / n).
    weights
        a, (K,). Ones if not given.
    brightness_invariant
        The mean is removed from every filter. Without it, phi sees the brightness of the patch.

    Raises
    ------
    InputError
        If a shape does not fit, a value is not finite, or a weight is not positive.

    Notes
    -----
    Not a normalised density where no filter sees some direction, such as that of constant patches.
    """

    def __init__(
        self,
        filters: Tensor | Sequence[int],
        weights: Tensor | None = None,
        *,
        scale_invariant: bool = True,
        brightness_invariant: bool = True,
    ) -> None:
        super().__init__()
        shape = stack_shape("filters", filters)
        self.channels = shape[1]
        self.patch_shape, n = patch_pixels(shape[2:], self.channels)
        if not isinstance(filters, Tensor):
            filters = torch.empty(shape).normal_(0, 1 / math.sqrt(n))
        weights = filters.new_ones(shape[0]) if weights is None else weights
        check_tensor("filters", filters, shape)
        check_tensor("weights", weights, shape[:1])
        if not weights.is_meta and weights.min() <= 0:
            raise InputError(
                f"the smallest weight is {weights.min():g}; every expert needs a positive one, else its "
                "density grows with the response of its filter."
            )
        self.scale_invariant = self.blurred = scale_invariant
        self.brightness_invariant = brightness_invariant
        self.filters = nn.Parameter(filters.clone())
        self.log_weights = nn.Parameter(weights.to(filters).log())

    def energy(self, patches: Tensor, sigma: Tensor) -> Tensor:
        """phi: (B, n, L) -> (B, L), without unit."""
        responses, _ = self._responses(patches, sigma)
        return torch.einsum("k,bkl->bl", self.log_weights.exp(), (responses.square() / 2).log1p())

    def score(self, patches: Tensor, sigma: Tensor) -> Tensor:
        """-sum_i a_i J_i t_i / (1 + t_i^2 / 2) with t_i = J_i' v: (B, n, L) -> (B, n, L)."""
        responses, filters = self._responses(patches, sigma)
        force = self.log_weights.exp()[:, None] * responses / (1 + responses.square() / 2)
        score = -(filters.T @ force)
        return score / sigma if self.scale_invariant else score

    def settings(self) -> dict[str, Any]:
        """The arguments that build it again, before its tensors are loaded."""
        return {
            "filters": list(self.filters.shape),
            "scale_invariant": self.scale_invariant,
            "brightness_invariant": self.brightness_invariant,
        }

    def _responses(self, patches: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        filters = self.filters.flatten(1)
        if self.brightness_invariant:
            filters = filters - filters.mean(1, keepdim=True)
        return filters @ (patches / sigma if self.scale_invariant else patches), filters


@register
class TotalVariation(Potential):
    """Differences d of neighbouring pixels, anisotropic: phi(v) = strength * sum |d|^exponent.

    The patch is a pair, 2 x 1 or 1 x 2, or a square of 2 x 2 with its two vertical and two horizontal
    pairs. A pair lies in two squares, so there each counts one half, and the sum over all squares is
    the total variation of the image: exactly so under a ``"periodic"`` or ``"symmetric"`` boundary;
    under an ``"open"`` one the pairs along the border count one half.

    ``blurred=True`` (exponent 1) is exact for a pair at every noise level. The difference of two
    pixels has the noise variance t^2 = 2 sigma^2, and the Laplace density b/2 exp(-b |d|) becomes

        p_sigma(d) = b/2 exp(b^2 t^2 / 2) [exp(-b d) Phi(d/t - b t) + exp(b d) Phi(-d/t - b t)]
        s(d; sigma) = -b tanh((A_1 - A_2) / 2),      A_1, A_2 the logarithms of the two terms

    with b = strength, phi = -sum log p_sigma(d), a flat density of the pair's mean, and Phi the normal
    distribution function. In an image this is the product of blurred pairs, not the blur of the
    product: only a pair of pixels has a closed form. ``blurred=False`` is the density of clean images,
    whatever sigma is.

    Parameters
    ----------
    strength
        In one over the unit of the image, to the power of the exponent; positive.
    patch_shape
        (2, 1), (1, 2) or (2, 2), the default.
    exponent
        Above 0; from 1 on, phi is convex.
    smoothing
        |d|^exponent becomes (d^2 + smoothing^2)^(exponent / 2), in the unit of the image (Charbonnier et
        al., IEEE Trans. Image Processing 6 (1997)). At 0 the score of d = 0 is set to 0.

    Raises
    ------
    InputError
        If a parameter is out of its range, or the blur is asked for where it has no closed form.
    """

    brightness_invariant = True
    differences: Tensor

    def __init__(
        self,
        strength: float,
        *,
        patch_shape: Sequence[int] = (2, 2),
        channels: int = 1,
        exponent: float = 1.0,
        smoothing: float = 0.0,
        blurred: bool = True,
    ) -> None:
        super().__init__()
        self.patch_shape, _ = patch_pixels(patch_shape, channels)
        if self.patch_shape not in ((2, 1), (1, 2), (2, 2)):
            raise InputError(
                f"patch_shape is {self.patch_shape}; total variation takes (2, 1), (1, 2) or (2, 2)."
            )
        if not (0 < strength < math.inf and 0 < exponent < math.inf and 0 <= smoothing < math.inf):
            raise InputError(
                f"strength is {strength}, exponent {exponent} and smoothing {smoothing}; expected "
                "positive numbers, and a smoothing of at least 0."
            )
        if blurred and (exponent != 1 or smoothing != 0):
            raise InputError(
                f"there is no closed form of the blurred density with exponent {exponent:g} and "
                f"smoothing {smoothing:g}; use exponent 1 without smoothing, or blurred=False."
            )
        self.channels = channels
        self.strength = strength
        self.exponent = exponent
        self.smoothing = smoothing
        self.blurred = blurred
        self.register_buffer("differences", _differences(self.patch_shape, channels))
        self.share = 0.5 if self.patch_shape == (2, 2) else 1.0

    def energy(self, patches: Tensor, sigma: Tensor) -> Tensor:
        """phi: (B, n, L) -> (B, L), without unit."""
        d = self.differences @ patches
        if self.blurred:
            values = -_blurred_laplace(d, self.strength, math.sqrt(2) * sigma)[0]
        else:
            values = self.strength * self._power(d, self.exponent / 2)
        return self.share * values.sum(1)

    def score(self, patches: Tensor, sigma: Tensor) -> Tensor:
        """-phi': (B, n, L) -> (B, n, L), in one over the image's unit."""
        d = self.differences @ patches
        if self.blurred:
            score = _blurred_laplace(d, self.strength, math.sqrt(2) * sigma)[1]
        else:
            score = -self.strength * self.exponent * d * self._power(d, self.exponent / 2 - 1)
        return self.share * (self.differences.T @ score)

    def _power(self, d: Tensor, exponent: float) -> Tensor:
        """(d^2 + smoothing^2)^exponent, and 0 at 0, also for autograd."""
        squared = d.square() + self.smoothing**2
        return torch.where(squared > 0, squared, 1).pow(exponent) * (squared > 0)


def _blurred_laplace(d: Tensor, b: float, t: Tensor) -> tuple[Tensor, Tensor]:
    """log p(d) and its derivative, for a Laplace density of rate b blurred by N(0, t^2).

    With u = |d| / t and a = b t, both terms carry exp(-u^2 / 2) once Phi is written with erfcx; the one
    whose argument (a - u) / sqrt 2 is negative is kept as it is, since erfcx overflows there.
    """
    u, a = d.abs() / t, b * t
    z = (a - u) / math.sqrt(2)
    common = -u.square() / 2
    near = torch.special.erfcx(z.clamp_min(0)).log()
    tail = torch.special.erfc(z.clamp_max(0)).log()
    far = torch.special.erfcx((a + u) / math.sqrt(2)).log()
    first = torch.where(z > 0, common + near, a * (a / 2 - u) + tail)
    log_p = math.log(b / 4) + torch.logaddexp(first, common + far)
    lead = torch.where(z > 0, near, z.square() + tail) - far
    return log_p, -b * d.sign() * (lead / 2).tanh()


def _differences(patch_shape: tuple[int, int], channels: int) -> Tensor:
    """The matrix that takes a patch to the differences of its vertical and horizontal neighbours."""
    pixels = torch.eye(channels * math.prod(patch_shape)).unflatten(0, (channels, *patch_shape))
    return torch.cat([pixels.diff(dim=axis).flatten(0, 2) for axis in (1, 2)])
