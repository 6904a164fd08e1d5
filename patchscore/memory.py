"""How much memory is free."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

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
