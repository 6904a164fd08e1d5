"""The machine that numbers are measured on, and its seconds and peaks of memory."""

from __future__ import annotations

import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from patchscore.errors import InputError

PAUSE = 0.5
FOREVER = 1e9  # seconds, for what should not depend on a clock
Result = TypeVar("Result")


class Machine(NamedTuple):
    """The processor, the cores that this process may use, the threads and the version of PyTorch."""

    processor: str
    cores: int
    torch_threads: int
    torch: str

    def __str__(self) -> str:
        return f"{self.processor}, {self.cores} cores, {self.torch_threads} threads"


def machine() -> Machine:
    """Describe this machine, without its name."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return Machine(processor(), len(usable), torch.get_num_threads(), torch.__version__)


@lru_cache
def processor() -> str:
    """The name of the processor's model."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def time_in_turn(tasks: Mapping[str, Callable[[], object]], *, rounds: int) -> dict[str, list[float]]:
    """The seconds of every task in every round; tasks take turns, and a first round does not count.

    A slow drift of the machine then hits all of them. Before each there is a pause, in which the threads
    of the one before stop spinning for more work.

    Raises :class:`InputError` if there is no round.
    """
    if rounds < 1:
        raise InputError(f"rounds is {rounds}; expected at least one.")
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(1 + rounds):
        for name, task in tasks.items():
            time.sleep(PAUSE)
            start = time.perf_counter()
            task()
            seconds[name].append(time.perf_counter() - start)
    return {name: times[1:] for name, times in seconds.items()}


def in_fresh_process(task: Callable[..., Result], *arguments: object) -> Result:
    """Do a task in a process that inherits nothing of this one, least of all its peak of memory.

    It is forked from a small server: a process that this one starts would count the peak of this one as
    its own. Raises :class:`InputError` where there is no such server, as on Windows.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        raise InputError("the peak of memory can be measured on Linux and macOS only.")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(task, *arguments).result()


def peak_bytes() -> int:
    """The peak of resident memory of this process so far."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
