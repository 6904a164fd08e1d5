"""The generalised Anscombe transform: noise that grows with brightness becomes noise of level one.

    y = offset + gain Poisson((x - offset) / gain) + sigma N(0, 1)
    f(y) = 2 / gain sqrt(max(gain (y - offset) + 3/8 gain^2 + sigma^2, 0))         Var f(y) = 1, nearly
    I(d) = the x with E[f(y) | x] = d

The inverse is the exact unbiased one: f is not linear, so f^-1 of a mean of f(y) is not the mean of y.
It is tabulated from the definition up to 200 photons, and continued by its expansion,
(d / 2)^2 - 1/8 - (sigma / gain)^2 photons.

References: Makitalo and Foi, "Optimal inversion of the generalized Anscombe transformation for
Poisson-Gaussian noise", IEEE TIP 22 (2013), equations 4, 5 and 10.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import numpy as np

TABULATED = 200.0  # photons; beyond, there is the expansion
NODES = 128  # of the Gauss-Hermite rule


class _Table(NamedTuple):
    means: np.ndarray  # E[f(y) | x]
    roots: np.ndarray  # f(x), which is nearly E[f(y) | x], so that interpolation is accurate


class Anscombe:
    """f and its exact unbiased inverse, for arrays in the unit of the image.

    Parameters
    ----------
    gain
        The value of one photon; positive.
    sigma
        The standard deviation of the noise that does not depend on the signal.
    offset
        The value without any light.
    """

    def __init__(self, gain: float, sigma: float = 0.0, offset: float = 0.0) -> None:
        self.gain, self.sigma, self.offset = gain, sigma, offset

    def forward(self, y: np.ndarray) -> np.ndarray:
        """f(y), in float64."""
        return self._root((np.asarray(y, np.float64) - self.offset) / self.gain)

    @property
    def _constant(self) -> float:
        return 3 / 8 + (self.sigma / self.gain) ** 2

    def _root(self, photons: np.ndarray) -> np.ndarray:
        return 2 * np.sqrt(np.maximum(photons + self._constant, 0))

    @cached_property
    def _table(self) -> _Table:
        """E[f(y) | x] by the sum over photons and the Gauss-Hermite rule over the Gaussian part."""
        from scipy.stats import poisson

        rates = np.concatenate([[0.0], np.geomspace(1e-3, TABULATED, 400)])
        counts = np.arange(int(TABULATED + 10 * np.sqrt(TABULATED)))
        nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
        roots = self._root(counts[:, None] + self.sigma / self.gain * nodes)
        given_count = roots @ (weights / weights.sum())
        return _Table(poisson.pmf(counts, rates[:, None]) @ given_count, self._root(rates))

    def inverse(self, d: np.ndarray) -> np.ndarray:
        """I(d), not below the offset, in float64."""
        d = np.asarray(d, np.float64)
        means, roots = self._table
        tabulated = np.square(np.interp(d, means, roots) / 2) - self._constant
        expansion = np.square(d / 2) - 1 / 8 - (self.sigma / self.gain) ** 2
        return self.offset + self.gain * np.where(d < means[-1], tabulated, expansion)
