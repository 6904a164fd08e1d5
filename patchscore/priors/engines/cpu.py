"""Scores of whole images on a CPU: a few large convolutions per tile of the image.

The equations are those of :mod:`patchscore.priors.engines.layers`. What makes it fast changes nothing
but rounding:

- Pixels are the rows and channels the columns of every buffer. Convolutions of oneDNN then run at the
  full rate of the processor, where other matrix products need not.
- W_1 has few inputs and W_1* few outputs: k_1 rows become channels, and a 1 x k_1 convolution is left.
- The hidden units of a tile stay in the cache. Their memory comes back to the next tile.
- A tile is cut from, and added to, the image itself: there is no padded copy of the image.
- With ``"bfloat16"``, where the processor has it, all layers above the first multiply in bfloat16. W_1
  and W_1* do not: rounded, their rows would no longer sum to zero, and a flat image would have a score.
  Nor is a rounded, since all cliques share that error: W_D* is multiplied by it in float32 first.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from patchscore.linear_algebra import expand
from patchscore.priors.engines.layers import Layers, Precision, row_kernels, summed_rows
from patchscore.priors.patches import KEPT_BYTES, Boundary, PatchGrid, source_index, tiling

# Units of one layer in flight at once, 8 MB: above 32 MB the system takes the memory back each time.
UNITS_PER_TILE = 2**21


def has_bfloat16() -> bool:
    """Whether this processor multiplies in bfloat16: without that it would be slower than float32."""
    names = "_is_avx512_bf16_supported", "_is_amx_tile_supported"  # newer PyTorch has more of these
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)


@torch.no_grad()
def field_score(
    layers: Layers, x: Tensor, sigma: Tensor, boundary: Boundary, precision: Precision = "float32"
) -> Tensor:
    """-sum_c w_c G_c' phi'(G_c x / sigma) / sigma: (B, C, H, W), (B,) -> (B, C, H, W)."""
    low = precision == "bfloat16" and has_bfloat16()
    tile_force = _TileForce(layers, torch.bfloat16 if low else torch.float32)
    grid = PatchGrid(x.shape[-2:], layers.patch_shape, boundary)
    weights = grid.weights(x)
    axes = zip(grid.image_shape, grid.before, grid.padded_shape, strict=True)
    sources = [source_index(*axis, boundary) for axis in axes]
    total = torch.zeros_like(x)
    torch.empty(KEPT_BYTES, dtype=torch.uint8)
    limit = UNITS_PER_TILE // len(layers.readout)
    for images, rows, columns in tiling(len(x), grid.shape, limit, layers.rim):
        _, _, *window = grid.window(images, rows, columns)
        at = [source[part] for source, part in zip(sources, window, strict=True)]
        levels = expand(sigma[images])
        u = layers.normalised(x[images].index_select(-2, at[0]).index_select(-1, at[1]), sigma[images])
        force = tile_force(u, None if weights is None else weights[rows, columns])
        # Beyond the border the same pixel occurs more than once.
        place = [None, None, at[0][:, None], at[1]]
        torch.ops.aten.index_put_(total[images], place, force.div_(levels).neg_(), accumulate=True)
    return total


class _TileForce:
    """The gradient of the sum of w_c phi over the cliques of a tile, with weights packed once."""

    def __init__(self, layers: Layers, dtype: torch.dtype) -> None:
        first, *others = layers.kernels
        width, channels, side, _ = first.shape
        self.dtype = dtype
        self.side = side
        self.dilations = layers.dilations[1:]
        self.lift = _packed(first.reshape(width, channels * side, 1, side), torch.float32)
        self.lift_bias = layers.biases[0]
        self.mixes = [_packed(kernel, dtype) for kernel in others]
        self.biases = [bias.to(dtype) for bias in layers.biases[1:]]
        first, *others = [*layers.kernels[:-1], layers.readout.view(-1, 1, 1, 1) * layers.kernels[-1]]
        self.drop = _packed(row_kernels(first), torch.float32)
        self.spreads = [_packed(kernel.flip(-2, -1).transpose(0, 1), dtype) for kernel in others]

    def __call__(self, u: Tensor, weights: Tensor | None) -> Tensor:
        """(b, C, h, w) -> (b, C, h, w)."""
        hidden = [_convolution(self._rows(u), self.lift, self.lift_bias).to(self.dtype)]
        for mix, bias, d in zip(self.mixes, self.biases, self.dilations, strict=True):
            hidden.append(_convolution(F.gelu(hidden[-1]), mix, bias, dilation=d))
        last = hidden.pop()
        force = last.new_ones(()) if weights is None else weights.to(last)
        force = torch.ops.aten.gelu_backward.grad_input(force.expand_as(last), last, grad_input=last)
        for spread, d in zip(reversed(self.spreads), reversed(self.dilations), strict=True):
            rim = d * (spread.shape[-1] - 1)
            force = _convolution(force, spread, padding=(rim, rim), dilation=d)
            torch.ops.aten.gelu_backward.grad_input(force, hidden.pop(), grad_input=force)
        rows = _convolution(force.float(), self.drop, padding=(0, self.side - 1))
        return summed_rows(rows, self.side)

    def _rows(self, u: Tensor) -> Tensor:
        """k_1 rows as channels: (b, C, h, w) -> (b, C k_1, h - k_1 + 1, w)."""
        windows = u.unfold(2, self.side, 1).permute(0, 2, 3, 1, 4)
        return windows.flatten(3).permute(0, 3, 1, 2)


def _convolution(
    z: Tensor,
    kernel: Tensor,
    bias: Tensor | None = None,
    *,
    padding: tuple[int, int] = (0, 0),
    dilation: int = 1,
) -> Tensor:
    """The convolution of oneDNN, where F.conv2d takes a slower way for kernels of one pixel."""
    return torch.mkldnn_convolution(z, kernel, bias, padding, (1, 1), (dilation, dilation), 1)


def _packed(kernel: Tensor, dtype: torch.dtype) -> Tensor:
    return kernel.to(dtype).contiguous(memory_format=torch.channels_last)
