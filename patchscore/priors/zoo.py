"""The priors that come with the library: weights, each with a model card beside them."""

from __future__ import annotations

import os
from importlib.resources import as_file, files
from pathlib import Path

import torch

from patchscore.errors import InputError
from patchscore.priors.prior import PatchPrior

WEIGHTS = files("patchscore.priors") / "weights"
SUFFIX = ".safetensors"


def bundled_priors() -> list[str]:
    """The names that :func:`load_prior` knows."""
    return sorted(
        entry.name.removesuffix(SUFFIX) for entry in WEIGHTS.iterdir() if entry.name.endswith(SUFFIX)
    )


def load_prior(name_or_path: str | Path, device: str | torch.device = "auto") -> PatchPrior:
    """A bundled prior by its name, or one from a file, ready to use.

    Parameters
    ----------
    name_or_path
        A name from :func:`bundled_priors` (``"natural-gray"``), or the path of a ``.safetensors`` file
        that :meth:`PatchPrior.save` wrote.
    device
        ``"auto"`` (CUDA if there is one, else the CPU), ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ...

    Raises
    ------
    InputError
        If there is no such prior, file or device, or the file is damaged, altered or not a prior.
    """
    where = find_device(device)
    if str(name_or_path) in bundled_priors():
        with as_file(WEIGHTS / f"{name_or_path}{SUFFIX}") as path:
            prior = PatchPrior.load(path)
    elif os.path.isfile(str(name_or_path)):  # where Path.is_file raises an error for some names
        prior = PatchPrior.load(name_or_path)
    else:
        raise InputError(
            f"there is no prior {str(name_or_path)[:200]!r}: it is neither a file nor one of the "
            f"bundled priors ({', '.join(bundled_priors())})."
        )
    return prior.to(where).requires_grad_(False)


def find_device(device: str | torch.device) -> torch.device:
    """The device of this name.

    Raises :class:`InputError` if the name is unknown, or there is no such device.
    """
    if not isinstance(device, str | torch.device):
        raise InputError(f'the device {device!r:.100} cannot be used here; use "cpu", "cuda" or "auto".')
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.zeros((), device=found).item()  # a device without numbers, such as "meta", is none
    except (RuntimeError, AssertionError, TypeError) as error:
        raise InputError(
            f"the device {str(device)!r} cannot be used here ({str(error).splitlines()[0]}); use "
            f'"cpu", or "auto" to take CUDA when there is one. CUDA devices found: '
            f"{torch.cuda.device_count()}."
        ) from error
    return found
