"""Which engine scores images: the one place that decides.

Triton      images in float32 on a GPU, if bfloat16 is allowed and no gradient is asked for
oneDNN      images in float32 on a CPU, if no gradient is asked for
PyTorch     everything else: other dtypes, gradients, transforms and compilers of PyTorch, networks that
            are not scale invariant
"""

from __future__ import annotations

import warnings
from weakref import WeakSet

import torch
from torch import Tensor

from patchscore.checks import is_traced
from patchscore.priors.engines import cpu, layers, triton
from patchscore.priors.engines.layers import LayeredNetwork, Precision
from patchscore.priors.patches import Boundary

# Networks that Triton could not serve here: compiling takes long, and one warning says it.
_REFUSED: WeakSet[LayeredNetwork] = WeakSet()


def field_score(
    network: LayeredNetwork, x: Tensor, sigma: Tensor, boundary: Boundary, precision: Precision
) -> Tensor:
    """sum_c w_c G_c' s_V(G_c x; sigma): (B, C, H, W), (B,) -> (B, C, H, W)."""
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *network.parameters()))
    plain = not (learns or is_traced(x) or is_traced(sigma))
    if network.scale_invariant and x.dtype == torch.float32 and plain:
        if precision == "bfloat16" and triton.serves(x) and network not in _REFUSED:
            try:
                return triton.field_of(network, precision).score(x, sigma, boundary)
            except Exception as error:  # compilers and drivers raise errors of many kinds
                _REFUSED.add(network)
                warnings.warn(
                    f"the Triton kernels cannot score {network!r} here ({error}); from now on PyTorch "
                    "does, in float32 and slower.",
                    stacklevel=2,
                )
        if x.device.type == "cpu" and torch.backends.mkldnn.is_available():
            return cpu.field_score(network.layers(), x, sigma, boundary, precision)
    return layers.field_score(network.layers(), x, sigma, boundary)
