"""Random numbers: always from a generator, drawn where the generator is."""

from __future__ import annotations

import torch
from torch import Tensor

from patchscore.errors import InputError


def seeded(generator: torch.Generator | None) -> torch.Generator:
    """The generator, or one of seed 0.

    Raises :class:`InputError` if it is not on the CPU: a run draws the same numbers on every device.
    """
    if generator is None:
        return torch.Generator().manual_seed(0)
    if generator.device.type != "cpu":
        raise InputError(
            f"the generator is on {generator.device}; expected one on the CPU, so that a run draws the "
            "same crops and noise on every device: torch.Generator().manual_seed(0)."
        )
    return generator


def standard_normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """N(0, I) in the shape, dtype and device of a tensor; drawn where the generator is.

    The real and the imaginary part of a complex number have unit variance each.
    """
    z = torch.randn(like.shape, dtype=like.dtype, device=generator.device, generator=generator)
    return (2**0.5 * z if z.is_complex() else z).to(like.device)
