"""How fast and how large: seconds beside BM3D on the same cores, and the peak of memory.

    ratio = seconds of BM3D / seconds of patchscore       one for each round, then their median

In each round every method denoises the same image once, one after the other, so that a slow drift of
the machine hits all of them. The memory is that of a fresh process, which inherits nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from skimage.data import camera

from patchscore.denoising import denoise
from patchscore.errors import InputError
from patchscore.evaluation.baselines import bm3d, has_bm3d, total_variation
from patchscore.priors.zoo import load_prior

SIGMA = 25.0
TV_WEIGHT = 1.0
PAUSE = 0.5
LARGE_SIDE = 2048
LEAST_RATIO = 5.0
MOST_MEGABYTES = 1000.0


class Timing(NamedTuple):
    """The seconds that a method took, round by round."""

    method: str
    seconds: tuple[float, ...]


class Memory(NamedTuple):
    """Peaks of resident memory in bytes.

    Attributes
    ----------
    baseline : after everything is imported and the prior is loaded
    peak : after an image was made and denoised
    """

    baseline: int
    peak: int


class Machine(NamedTuple):
    """What the numbers were measured on."""

    processor: str
    cores: int
    torch_threads: int
    torch: str


class Line(NamedTuple):
    """One quantity of the report: its median with the least and the greatest value.

    ``met`` is None where there is no target.
    """

    quantity: str
    unit: str
    median: float
    least: float
    greatest: float
    target: str
    met: bool | None


def time_denoisers(prior: str, *, rounds: int) -> list[Timing]:
    """Time TV, BM3D if it is installed, and patchscore on ``camera`` (512 x 512) at sigma 25 of 255.

    Raises
    ------
    InputError
        If the prior cannot be loaded, or there is no round.
    """
    noisy = _noisy(camera())
    loaded = load_prior(prior, "cpu")
    denoisers: dict[str, Callable[[], np.ndarray]] = {
        "tv": lambda: total_variation(noisy, SIGMA, weight=TV_WEIGHT),
        "patchscore": lambda: denoise(noisy, SIGMA, prior=loaded),
    }
    if has_bm3d():
        denoisers["bm3d"] = lambda: bm3d(noisy, SIGMA)
    return time_in_turn(denoisers, rounds=rounds)


def time_in_turn(tasks: Mapping[str, Callable[[], object]], *, rounds: int) -> list[Timing]:
    """Time tasks in turn, round by round, after one round that does not count.

    Before each there is a pause, in which the threads of the one before stop spinning for more work.

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
    return [Timing(name, tuple(times[1:])) for name, times in seconds.items()]


def peak_memory(prior: str, *, side: int = LARGE_SIDE) -> Memory:
    """Measure the memory of denoising a ``side`` x ``side`` image, in a process of its own.

    The process is forked from a small server: one that is started by this process would count the
    peak of this one as its own.

    Raises
    ------
    InputError
        If the prior cannot be loaded, or the system is neither Linux nor macOS.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        raise InputError("the peak of memory can be measured on Linux and macOS only.")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_memory_here, prior, side).result()


def machine() -> Machine:
    """Describe the processor, the cores that this process may use, and PyTorch."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return Machine(_processor(), len(usable), torch.get_num_threads(), torch.__version__)


def report(timings: Sequence[Timing], memory: Memory) -> list[Line]:
    """Summarise the measurements and hold them against the targets."""
    lines = [_line(f"{timing.method}, 512 x 512", "s", timing.seconds) for timing in timings]
    seconds = dict(timings)
    if "bm3d" in seconds:
        pairs = zip(seconds["bm3d"], seconds["patchscore"], strict=True)
        ratio = _line("bm3d / patchscore", "", [slow / fast for slow, fast in pairs])
        lines.append(ratio._replace(target=f"at least {LEAST_RATIO:g}", met=ratio.median >= LEAST_RATIO))
    peak = _line(f"peak memory, {LARGE_SIDE} x {LARGE_SIDE}", "MB", [memory.peak / 1e6])
    above = _line("peak above the loaded prior", "MB", [(memory.peak - memory.baseline) / 1e6])
    lines.append(peak._replace(target=f"at most {MOST_MEGABYTES:g}", met=peak.median <= MOST_MEGABYTES))
    return [*lines, above]


def _line(quantity: str, unit: str, values: Sequence[float]) -> Line:
    return Line(quantity, unit, float(np.median(values)), min(values), max(values), "", None)


def _memory_here(prior: str, side: int) -> Memory:
    loaded = load_prior(prior, "cpu")
    baseline = _peak_bytes()
    image = camera()
    copies = -(-side // len(image))
    denoise(_noisy(np.tile(image, (copies, copies))[:side, :side]), SIGMA, prior=loaded)
    return Memory(baseline, _peak_bytes())


def _peak_bytes() -> int:
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _noisy(image: np.ndarray) -> np.ndarray:
    noisy = np.random.default_rng(0).standard_normal(image.shape)
    noisy *= SIGMA
    noisy += image
    return noisy


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
