"""The package deepinv, also where torchvision, which it imports, was built for another PyTorch."""

from __future__ import annotations

import importlib
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch

from patchscore.errors import InputError

_kept: list[torch.library.Library] = []  # a library ends with its last reference


@lru_cache
def mend_torchvision() -> None:
    """Let torchvision load, if it is installed.

    Beside a PyTorch of another build it fails for want of two operators. deepinv uses neither of them,
    so it is enough to declare them.
    """
    if find_spec("torchvision"):
        try:
            importlib.import_module("torchvision")
        except RuntimeError:
            library = torch.library.Library("torchvision", "DEF")
            for name in ("nms", "qnms"):
                library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _kept.append(library)


def import_deepinv() -> Any:
    """The package; :class:`InputError` if it is not installed."""
    mend_torchvision()
    try:
        return importlib.import_module("deepinv")
    except ImportError as error:
        raise InputError(
            "this study needs deepinv; install it with pip install 'patchscore[inverse]'."
        ) from error
