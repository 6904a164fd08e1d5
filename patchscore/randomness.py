"""Random numbers: always from a generator, drawn where the generator is.

A sampler makes a generator of its own on the device of the images, seeded by the user's generator.
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchscore.errors import InputError

LOW = 2**32 - 1  # the CPU generator uses the lower half of a seed alone


def seeded(generator: torch.Generator | None) -> torch.Generator:
    """The generator, or one of seed 0.

    Raises :class:`InputError` if it is not on the CPU: a run draws the same numbers on every device.
    """
    if generator is None:
        return torch.Generator().manual_seed(0)
    check_generator(generator)
    if generator.device.type != "cpu":
        raise InputError(
            f"the generator is on {generator.device}; expected one on the CPU, so that a run draws the "
            "same crops and noise on every device: torch.Generator().manual_seed(0)."
        )
    return generator


def check_generator(generator: object) -> None:
    """Raise :class:`InputError` unless it is a generator of PyTorch."""
    if not isinstance(generator, torch.Generator):
        raise InputError(
            f"the generator is {generator!r:.100}; expected one of PyTorch: "
            "torch.Generator().manual_seed(0)."
        )


def generator_like(x: Tensor, generator: torch.Generator) -> torch.Generator:
    """A new generator on the device of x, seeded by one number of another generator.

    Raises :class:`InputError` if that is no generator of PyTorch.
    """
    check_generator(generator)
    seed = torch.randint(2**63 - 1, (), generator=generator, device=generator.device)
    return torch.Generator(x.device).manual_seed(int(seed))


def stream(generator: torch.Generator, number: int) -> torch.Generator:
    """A new generator for the draw of this number, on the same device.

    It depends on the seed of the generator alone, not on how far that has been used. No two of the first
    2^32 streams are equal.
    """
    seed = generator.initial_seed()
    # The last steps of MurmurHash3 (A. Appleby, public domain): one to one on 32 bits, and neighbouring
    # numbers get seeds that have nothing in common.
    low = (seed + number) & LOW
    low = (low ^ low >> 16) * 0x85EBCA6B & LOW
    low = (low ^ low >> 13) * 0xC2B2AE35 & LOW
    low ^= low >> 16
    return torch.Generator(generator.device).manual_seed((seed & ~LOW) | low)


def standard_normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """N(0, I) in the shape, dtype and device of a tensor; drawn where the generator is.

    The real and the imaginary part of a complex number have unit variance each.
    """
    z = torch.randn(like.shape, dtype=like.dtype, device=generator.device, generator=generator)
    return (2**0.5 * z if z.is_complex() else z).to(like.device)
