"""Which weights of a prior move when it adapts: all of them, or a few numbers that they depend on.

    all         W
    upper       W of the layers above the first
    gains       W_k = g_k W0_k            one g per filter k, 1 at first; biases stay
    low-rank    W = W0 + A B / sqrt(n)    A (k, 2) of zeros and B (2, n) of N(0, 1) at first; biases stay

Few numbers cannot learn the noise by heart, nor much else. References: Mohan et al., "Adaptive denoising
via GainTuning", NeurIPS 2021 (gains); Hu et al., "LoRA", ICLR 2022 (low rank).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from patchscore.errors import InputError

Moving = Literal["all", "upper", "gains", "low-rank"]
RANK = 2


class Chart(NamedTuple):
    """Coordinates for the weights that move: where they start, and (coordinates) -> weights by name."""

    start: list[Tensor]
    weights: Callable[[Sequence[Tensor]], dict[str, Tensor]]


def chart(network: nn.Module, moving: Moving, generator: torch.Generator) -> Chart:
    """The coordinates in which a network adapts; ``generator`` draws B.

    Raises
    ------
    InputError
        If there is no such choice, or the network has nothing that moves.
    """
    if moving not in get_args(Moving):
        raise InputError(f"moving is {moving!r}; choose one of {get_args(Moving)}.")
    given = {name: weight.detach().clone() for name, weight in network.named_parameters()}
    if not given:
        raise InputError(
            f"{type(network).__name__} has no parameters, so there is nothing to adapt; use a learned "
            "prior."
        )
    if moving == "upper" and len(given) > 1:
        del given[next(iter(given))]
    if moving in ("all", "upper"):
        return Chart(list(given.values()), lambda free: dict(zip(given, free, strict=True)))

    filters = {name: weight for name, weight in given.items() if weight.ndim > 1}
    if moving == "gains":
        ones = [torch.ones_like(w[(slice(None), *[slice(1)] * (w.ndim - 1))]) for w in filters.values()]
        return Chart(
            ones,
            lambda gains: {
                name: gain * weight for (name, weight), gain in zip(filters.items(), gains, strict=True)
            },
        )
    factors = []
    for weight in filters.values():
        rows, columns = weight.flatten(1).shape
        mixed = torch.randn(RANK, columns, generator=generator, dtype=torch.float64)
        factors += [weight.new_zeros(rows, RANK), mixed.to(weight) / math.sqrt(columns)]
    return Chart(
        factors,
        lambda pairs: {
            name: weight + (left @ right).view_as(weight)
            for (name, weight), left, right in zip(filters.items(), pairs[::2], pairs[1::2], strict=True)
        },
    )
