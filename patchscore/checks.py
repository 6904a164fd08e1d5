"""Input validation that several modules need: noise levels, numbers and counts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchscore.errors import InputError


def noise_levels(sigma: float | Tensor, x: Tensor) -> Tensor:
    """sigma as a (B,) tensor like x; an error if it is not positive and finite, or not one per image.

    The values of a tensor on a GPU are not checked: every evaluation would wait for the device.
    """
    if not isinstance(sigma, Tensor) or sigma.device.type == "cpu":
        values = np.asarray(sigma.detach() if isinstance(sigma, Tensor) else sigma, np.float64)
        if not (np.isfinite(values) & (values > 0)).all():
            raise InputError(
                f"sigma is {values.tolist()}; a noise level is positive and finite, in the image's unit."
            )
    sigma = torch.as_tensor(sigma, dtype=x.real.dtype, device=x.device)
    if sigma.shape not in ((), (1,), (len(x),)):
        raise InputError(
            f"sigma has shape {tuple(sigma.shape)}; expected one number, or one for each of the "
            f"{len(x)} images."
        )
    return sigma.expand(len(x))


def check_noise_level(sigma: Any) -> None:
    """Raise :class:`InputError` unless sigma is one positive, finite number."""
    value = np.asarray(sigma)
    if value.dtype.kind not in "uif" or value.ndim != 0:
        raise InputError(
            f"sigma is {sigma!r}; expected one number, the noise level in the unit of the image."
        )
    if not 0 < value < math.inf:
        raise InputError(
            f"sigma is {sigma}; a noise level is positive and finite, in the unit of the image."
        )


def check_schedule(sigmas: Sequence[float]) -> None:
    """Raise :class:`InputError` unless these are noise levels, at least one, that do not rise."""
    falling = all(lower <= higher for higher, lower in pairwise(sigmas))
    if not (len(sigmas) and falling and all(0 < sigma < math.inf for sigma in sigmas)):
        raise InputError(
            f"the noise levels are {list(sigmas)}; expected at least one positive noise level, and "
            "several from large to small."
        )


def noise_level_range(sigmas: Sequence[float]) -> tuple[float, float]:
    """The lowest and the highest of a range of noise levels; :class:`InputError` if it is not one."""
    low, high = float(sigmas[0]), float(sigmas[1])
    if not 0 < low <= high < math.inf:
        raise InputError(
            f"sigmas is ({low}, {high}); expected the lowest and the highest noise level, both positive "
            "and in the unit of the images."
        )
    return low, high


def check_counts(**counts: object) -> None:
    """Raise :class:`InputError` unless all are positive whole numbers; None is allowed."""
    for name, value in counts.items():
        if value is not None and not (isinstance(value, int | np.integer) and value > 0):
            raise InputError(f"{name} is {value!r}; expected a positive whole number.")


def check_choice(choices: Iterable[object], **values: object) -> None:
    """Raise :class:`InputError` unless all are among the choices."""
    choices = tuple(choices)
    for name, value in values.items():
        if value not in choices:
            raise InputError(f"{name} is {value!r}; choose one of {choices}.")


def check_alike(x: Tensor, like: Tensor, *, name: str, holder: str) -> None:
    """Raise :class:`InputError` unless x has the dtype and the device of ``like``."""
    if x.dtype != like.dtype or x.device != like.device:
        raise InputError(
            f"{name} is {x.dtype} on {x.device} and the {holder} {like.dtype} on {like.device}; move "
            f"one of them: {name}.to(...) or {holder}.to(...)."
        )


def check_positive(**numbers: float | None) -> None:
    """Raise :class:`InputError` unless all are positive and finite; None is allowed."""
    for name, value in numbers.items():
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"{name} is {value}; expected a positive number.")
