"""The plain network that a learned clique stands for, as an engine takes it.

    z_0 = G_c x / sigma,    h_l = W_l z_{l-1} + b_l,    z_l = gelu(h_l),    phi = a' z_D

Every layer is a valid convolution over places. In a network on patches all but the first see one place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import Tensor

Precision = Literal["float32", "bfloat16"]


class Layers(NamedTuple):
    """Tied weights, expanded.

    Attributes
    ----------
    kernels : W_1 .. W_D, (outputs, inputs, k_l, k_l)
    biases : b_1 .. b_D, (outputs,)
    readout : a
    dilations : the distance of the places that a layer looks at; 1 in the first
    """

    kernels: Sequence[Tensor]
    biases: Sequence[Tensor]
    readout: Tensor
    dilations: Sequence[int]

    @property
    def reach(self) -> int:
        """P - 1 for patches of side P."""
        pairs = zip(self.kernels, self.dilations, strict=True)
        return sum(d * (kernel.shape[-1] - 1) for kernel, d in pairs)
