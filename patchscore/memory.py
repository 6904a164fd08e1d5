"""How much memory is free, and errors in words where it is too little."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from patchscore.errors import InputError

MEMINFO = Path("/proc/meminfo")


def free_bytes(device: torch.device | str = "cpu") -> int | None:
    """Memory that can be had on a device; None where the system does not say.

    On Linux this is what programs can have without swapping, of which the caches of files are a part.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        if available := re.search(r"^MemAvailable: *(\d+) kB", MEMINFO.read_text(), re.MULTILINE):
            return 1024 * int(available[1])
    except OSError:
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def check_memory(needed: float, what: object) -> None:
    """Raise :class:`InputError` if so many bytes are more than what is free."""
    free = free_bytes()
    if free is not None and needed > free:
        raise InputError(
            f"{what} needs {needed / 1e9:.3g} GB of memory, and {free / 1e9:.3g} GB are free; make it "
            "smaller, or use a machine with more memory."
        )


@contextmanager
def enough_memory(what: object) -> Iterator[None]:
    """Raise :class:`InputError` where memory ends."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        said = ("out of memory", "allocate memory", "overflow")
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in said):
            raise
        raise InputError(f"there is not enough memory for {what}; make it smaller.") from error
